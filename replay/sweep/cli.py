"""The command `replay sweep`."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from replay.allocators import give_back_freed_memory
from replay.gpu.cli import AsJson, parse_gpus
from replay.live import open_progress
from tracegen.console import print_json, prose, say
from tracegen.durations import parse_duration_ns
from tracegen.errors import ReplayError, WattraceError

if TYPE_CHECKING:
    from replay.sweep.plan import SweepPlan


_BESIDE_PLAN = {"plan", "output", "dry_run", "retry_failed", "jobs", "quiet", "as_json"}
_HOW_OFTEN = {"repeats", "until_ci", "max_repeats"}  # may be raised of a sweep that is there


def sweep(
    context: typer.Context,
    trace: Annotated[
        Path | None, typer.Argument(help="Trace to bring to each rate.", show_default="--mix or --plan")
    ] = None,
    mix: Annotated[
        str | None, typer.Option(help="Mix to synthesize at each rate; see `tracegen mixes`.", show_default="the trace")
    ] = None,
    tp: Annotated[
        str | None, typer.Option(help="Tensor-parallel sizes: 1,2,4,8.", show_default="what `replay run` takes")
    ] = None,
    freq: Annotated[
        str, typer.Option(help="SM clocks, MHz: a list, ranges FROM:TO:STEP with both ends, and `unlocked`.")
    ] = "unlocked",
    rate: Annotated[
        str | None,
        typer.Option(help="Mean rates in requests/s: 0.5,1,2.", show_default="the trace's own, of a mix 0.5"),
    ] = None,
    batch_cap: Annotated[
        str | None,
        typer.Option(help="Requests in an engine step at most (vLLM's --max-num-seqs).", show_default="the server's"),
    ] = None,
    power_cap: Annotated[
        str | None, typer.Option(help="Power limits of each GPU, W.", show_default="the driver's own")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each cell; repeat r has seed + r.", min=1)] = 3,
    until_ci: Annotated[
        str | None,
        typer.Option(
            help="Add repeats until the 95 % interval of J/request is within this share of its mean: 5%.",
            show_default="no",
        ),
    ] = None,
    max_repeats: Annotated[int, typer.Option(help="Repeats at most, with --until-ci.", min=1)] = 20,
    all_rates: Annotated[
        bool, typer.Option("--all-rates", help="Also run rates above one at which a setting was saturated.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the sweep; one that is there goes on.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Plan in TOML, instead of what describes cells here.", show_default="none"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the cells in their order and how long they take; run none.")
    ] = False,
    virtual: Annotated[
        bool, typer.Option("--virtual", help="Simulate in virtual time: hundreds of cells in minutes.")
    ] = False,
    arrivals: Annotated[str, typer.Option(help="Arrivals of a mix, as `tracegen synth` takes them.")] = "poisson",
    duration: Annotated[
        str | None, typer.Option(help="How much of the trace, or how long a mix.", show_default="all; of a mix 5m")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order, of traces and of simulated noise.", min=0)] = 0,
    engine: Annotated[str, typer.Option(help="auto, sim, vllm, or the URL of a running server.")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="Model to serve or to ask for.", show_default="the engine's own")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="Node that the simulated engine simulates.", show_default="dgx-h100")
    ] = None,
    replicas: Annotated[int, typer.Option(help="Servers, each on GPUs of its own.", min=1)] = 1,
    router: Annotated[str, typer.Option(help="Which replica a request goes to, as in `replay run`.")] = "session",
    gpus: Annotated[str | None, typer.Option(help="GPUs that serve.", show_default="the first ones")] = None,
    power: Annotated[str, typer.Option(help="Where power is read, as in `replay run`.")] = "nvml",
    allow_busy: Annotated[bool, typer.Option("--allow-busy", help="Run on GPUs that others use too.")] = False,
    overlong: Annotated[
        str, typer.Option(help="Requests beyond the model's context: refuse, drop or clip.")
    ] = "refuse",
    idle: Annotated[str, typer.Option(help="How long idle power is measured, before and after each cell.")] = "5s",
    warmup: Annotated[str, typer.Option(help="Beginning of each cell that is left out of all figures.")] = "0s",
    cool_down_max: Annotated[
        str, typer.Option(help="Longest wait between cells for idle power to come back; in wall time.")
    ] = "5m",
    truth: Annotated[
        bool, typer.Option("--truth", help="Compute what each request truly cost (simulated; takes longest).")
    ] = False,
    save_chunks: Annotated[bool, typer.Option(help="Keep the time of every chunk.")] = True,
    num_warmups: Annotated[
        int | None, typer.Option(help="Warm-up requests of a server.", show_default="8 for vllm, else 0", min=0)
    ] = None,
    vllm_python: Annotated[
        str | None, typer.Option(help="Python of an environment that has vLLM.", show_default="this one")
    ] = None,
    vllm_arg: Annotated[
        list[str] | None, typer.Option(help="Argument for `vllm serve`, repeatable.", show_default="none")
    ] = None,
    steps: Annotated[
        Path | None, typer.Option(help="Where an attached vLLM logs its steps.", show_default="not recorded")
    ] = None,
    request_timeout_sec: Annotated[
        float | None, typer.Option(help="How long to wait for one request.", show_default="for ever")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run cells again that failed before.")] = False,
    jobs: Annotated[
        int | None, typer.Option(help="Processes, in virtual time.", show_default="one a core", min=1)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the summary.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a workload at every setting: tensor-parallel sizes, clocks, rates, caps; each cell is a run directory.

    Blocks of one server come in random order, and cells in random order within them. All cells of a repeat replay the
    same requests. The same command on the same folder goes on where it was cut off. A clearly saturated cell is ended
    early, and higher rates at its setting are not run.

    \b
    Examples:
      replay sweep --mix chat --tp 2,4,8 --freq 800:1980:200 --rate 0.5,1,2 --virtual -o sweep
      replay sweep trace.parquet --tp 2,4 --freq 1200,unlocked --repeats 5 -o sweep
      replay sweep --mix chat --tp 2 --freq 1200,1980 --rate 1 --until-ci 5% -o sweep
      replay sweep --plan plan.toml --dry-run
      replay sweep -o sweep
      replay sweep -o sweep --repeats 6
    """
    from replay.plan import RunOptions
    from replay.sweep.plan import Grid, SweepPlan
    from replay.sweep.planfile import percent, read_plan
    from replay.sweep.ranges import parse_clocks, parse_numbers, parse_whole
    from replay.sweep.run import Asked, run_sweep, stored_plan
    from replay.sweep.show import lines

    _refuse_beside_plan(context, "--plan" if plan else "" if trace or mix else "going on")
    if plan is not None:
        asked = read_plan(plan)
    elif trace is None and mix is None:
        # More repeats are no other plan: where answers say that there is not enough data, a sweep goes on.
        how_often: dict[str, Any] = {
            "repeats": repeats,
            "until_ci": None if until_ci is None else percent("--until-ci", until_ci),
            "max_repeats": max_repeats,
        }
        given = {name: value for name, value in how_often.items() if name in _given(context)}
        asked = replace(stored_plan(_needed(output)), **given)
    else:
        grid = Grid(
            tp=() if tp is None else parse_whole("--tp", tp),
            freq_mhz=parse_clocks("--freq", freq),
            rate_rps=(None,) if rate is None else parse_numbers("--rate", rate),
            batch_cap=(None,) if batch_cap is None else parse_whole("--batch-cap", batch_cap),
            power_cap_w=(None,) if power_cap is None else parse_numbers("--power-cap", power_cap),
        )
        run = RunOptions(
            Path(),
            engine=engine,
            model=model,
            replicas=replicas,
            router=router,
            virtual=virtual,
            power=power,
            allow_busy=allow_busy,
            gpus=parse_gpus(gpus),
            hardware=hardware,
            vllm_python=vllm_python,
            vllm_args=tuple(vllm_arg or ()),
            steps=steps,
            num_warmups=num_warmups,
            warmup_ns=_duration_ns("--warmup", warmup),
            overlong=overlong,
            idle_ns=_duration_ns("--idle", idle),
            request_timeout_s=request_timeout_sec,
            save_chunks=save_chunks,
            truth=truth or None,
        )
        asked = SweepPlan(
            grids=(grid,),
            trace=trace,
            mix=mix,
            arrivals=arrivals,
            duration_ns=None if duration is None else _duration_ns("--duration", duration, zero_ok=False),
            seed=seed,
            repeats=repeats,
            until_ci=None if until_ci is None else percent("--until-ci", until_ci),
            max_repeats=max_repeats,
            all_rates=all_rates,
            cool_down_max_ns=_duration_ns("--cool-down-max", cool_down_max),
            run=run,
        )
    asked = replace(asked, run=replace(asked.run, api_key=os.environ.get("OPENAI_API_KEY")))
    if dry_run:
        _show_plan(asked, as_json=as_json)
        return
    folder = _needed(output)
    if not asked.virtual:
        give_back_freed_memory()
    with open_progress(quiet=quiet) as progress:
        try:
            document = run_sweep(asked, folder, progress, Asked(jobs, retry_failed))
        except KeyboardInterrupt:
            progress.warn(f"{folder}: cut off; 'replay sweep -o {folder}' goes on")
            raise
    if as_json:
        print_json(document)
    else:
        prose(lines(document))
        say(f"\nwrote {folder}; next: analysis sweep {folder}")


def _show_plan(asked: "SweepPlan", *, as_json: bool) -> None:
    """Print what a sweep would do."""
    from replay.sweep.estimate import estimate, print_estimate

    found = estimate(asked)
    if as_json:
        print_json(found)
    else:
        print_estimate(found)


def _given(context: typer.Context) -> list[str]:
    """What stands on the command line."""
    return [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]


def _refuse_beside_plan(context: typer.Context, what: str) -> None:
    """Raise `ReplayError` for an option that describes cells, where `what` does."""
    if not what:
        return
    beside = _BESIDE_PLAN if what == "--plan" else _BESIDE_PLAN | _HOW_OFTEN
    if others := [name for name in _given(context) if name not in beside]:
        option = others[0] if others[0] == "trace" else f"--{others[0].replace('_', '-')}"
        where = "say it in the plan's file" if what == "--plan" else "a trace or --mix begins a sweep"
        raise ReplayError(f"{option} with {what}: the plan says what the cells are; {where}")


def _needed(output: Path | None) -> Path:
    if output is None:
        raise ReplayError("give -o and the folder of the sweep; or a trace, --mix or --plan and --dry-run")
    return output


def _duration_ns(option: str, text: str, *, zero_ok: bool = True) -> int:
    """What `option` was given, ns. Raises `ReplayError` that names it."""
    try:
        return parse_duration_ns(text, zero_ok=zero_ok)
    except WattraceError as error:
        raise ReplayError(f"{option} {error}") from None
