"""The `replay` command: parse, call one function, print."""

import asyncio
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from replay.allocators import give_back_freed_memory
from replay.gpu.cli import AsJson, clocks_app, parse_gpus, probe
from replay.live import Progress, open_progress
from replay.sim.cli import sim_app
from replay.sweep.cli import sweep
from tracegen.console import make_app, print_json, prose, run_app, say
from tracegen.durations import parse_duration_ns
from tracegen.errors import ReplayError, WattraceError

if TYPE_CHECKING:
    from replay.plan import RunOptions

app = make_app("Send a trace to an LLM server at locked GPU clocks, and record requests, engine steps and power.")
app.add_typer(clocks_app, name="clocks")
app.add_typer(sim_app, name="sim")


@app.callback()
def replay() -> None:
    """Send a trace to an LLM server at locked GPU clocks, and record requests, engine steps and power."""


def main() -> None:
    """Run the command."""
    run_app(app)


@app.command()
def run(
    trace: Annotated[
        Path | None, typer.Argument(help="Trace file, as `tracegen` writes it.", show_default=False)
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, sim, vllm, or the URL of a running server.")] = "auto",
    model: Annotated[
        str | None,
        typer.Option(
            help="Model to serve or to ask for; for sim also a folder with config.json.",
            show_default="the engine's own",
        ),
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option(
            help="Tensor-parallel size.", show_default="as many as --gpus, else 1, for sim the smallest that fits"
        ),
    ] = None,
    replicas: Annotated[
        int,
        typer.Option(help="Servers to launch, each on GPUs and a port of its own.", min=1),
    ] = 1,
    router: Annotated[
        str,
        typer.Option(
            help="Which replica a request goes to: session (in turn, but a session stays), round-robin or least-loaded."
        ),
    ] = "session",
    freq: Annotated[
        int | None, typer.Option(help="SM clock to lock, MHz.", show_default="the driver's own clocks")
    ] = None,
    power_cap: Annotated[
        float | None, typer.Option(help="Power limit of each GPU, W.", show_default="the driver's own limit")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Run directory to write.", show_default="under runs/")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the run in this directory, which was cut short: all else is as it was begun.",
            show_default="a new run",
        ),
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="GPUs that serve, for example 0,1.", show_default="the first ones")
    ] = None,
    allow_busy: Annotated[bool, typer.Option("--allow-busy", help="Run on GPUs that others use too.")] = False,
    power: Annotated[str, typer.Option(help="Where power is read: nvml, csv:FILE or prometheus:URL.")] = "nvml",
    with_cpu: Annotated[bool, typer.Option("--with-cpu", help="Read CPU and DRAM energy too (RAPL).")] = False,
    port: Annotated[
        int | None,
        typer.Option(help="Port of a launched server, and of replicas the next ones.", show_default="free ones"),
    ] = None,
    duration: Annotated[
        str | None, typer.Option(help="Replay only this much of the trace: 90s, 10m.", show_default="all")
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option("--num-prompts", "--limit", help="Replay only the first requests.", show_default="all", min=1),
    ] = None,
    overlong: Annotated[
        str, typer.Option(help="What to do with requests beyond the model's context: refuse, drop or clip.")
    ] = "refuse",
    ignore_eos: Annotated[
        bool, typer.Option(help="Force exact output lengths; off for servers that refuse vLLM's parameters.")
    ] = True,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Cap on requests in flight; closes the loop.", show_default="none", min=1)
    ] = None,
    max_rate: Annotated[
        float | None, typer.Option(help="Cap on requests per second; closes the loop.", show_default="none")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that send.", show_default="as many as the load needs and cores there are", min=1),
    ] = None,
    endpoint: Annotated[
        str, typer.Option(help="completions (token ids, exact lengths) or chat (words, about that long).")
    ] = "completions",
    stream: Annotated[bool, typer.Option(help="Ask for streams; off, no token has a time.")] = True,
    time_scale: Annotated[
        float, typer.Option(help="Stretch the trace's time by this much: 0.5 sends twice as fast.")
    ] = 1.0,
    ramp: Annotated[str, typer.Option(help="Let the rate rise linearly to the trace's own over this time.")] = "0s",
    warmup: Annotated[
        str, typer.Option(help="Send what is due within this time, but leave it out of all figures: 30s.")
    ] = "0s",
    think_time: Annotated[
        bool, typer.Option("--think-time", help="A session's turn leaves its think time after the turn before ended.")
    ] = False,
    idle: Annotated[str, typer.Option(help="How long idle power is measured, before and after.")] = "5s",
    hardware: Annotated[
        str | None,
        typer.Option(help="Node that the simulated engine simulates: a name or a TOML file.", show_default="dgx-h100"),
    ] = None,
    virtual: Annotated[
        bool,
        typer.Option(
            "--virtual",
            help="Simulate in virtual time, without a server: days in minutes. Ctrl-C removes an unfinished run.",
        ),
    ] = False,
    truth: Annotated[
        bool | None,
        typer.Option(
            "--truth/--no-truth",
            help="Compute what each request of a simulated run truly cost.",
            show_default="yes, unless --virtual has above 2000 requests",
        ),
    ] = None,
    vllm_python: Annotated[
        str | None, typer.Option(help="Python of an environment that has vLLM.", show_default="this one")
    ] = None,
    vllm_arg: Annotated[
        list[str] | None, typer.Option(help="Argument for `vllm serve`, repeatable.", show_default="none")
    ] = None,
    record_steps: Annotated[bool, typer.Option(help="Record each engine step inside a launched vLLM.")] = True,
    steps: Annotated[
        Path | None,
        typer.Option(help="Where an attached vLLM logs its steps; see vllm-args.", show_default="not recorded"),
    ] = None,
    num_warmups: Annotated[
        int | None,
        typer.Option(
            help="Requests an instance before the run, not counted.", show_default="8 for vllm, else 0", min=0
        ),
    ] = None,
    ready_check_timeout_sec: Annotated[float, typer.Option(help="How long to wait for a server to start.")] = 600.0,
    request_timeout_sec: Annotated[
        float | None, typer.Option(help="How long to wait for one request.", show_default="for ever")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the simulated sensors' noise.")] = 0,
    save_chunks: Annotated[bool, typer.Option(help="Keep the time of every chunk.")] = True,
    metadata: Annotated[
        list[str] | None, typer.Option(help="key=value kept in the manifest, repeatable.", show_default="none")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the summary.")] = False,
    prometheus_port: Annotated[
        int | None,
        typer.Option(
            help="Show the live figures at http://127.0.0.1:PORT/metrics too.", show_default="no", min=0, max=65535
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Replay a trace, open loop, and write a run directory.

    Without a GPU the simulated engine answers, and everything it writes says so.

    \b
    Examples:
      replay run trace.parquet --tp 2 --freq 1200
      replay run trace.parquet --engine sim --tp 8 --duration 10m -o runs/first
      replay run week.parquet --virtual --tp 2 --replicas 4 --router least-loaded --freq 1400
      replay run trace.parquet --engine sim --hardware dgx-a100 --model Qwen/Qwen3-8B
      replay run trace.parquet --engine vllm --model Qwen/Qwen3-8B --vllm-arg=--max-model-len=8192
      replay run trace.parquet --engine vllm --tp 2 --replicas 4 --freq 1200 --power-cap 500
      replay run trace.parquet --engine http://localhost:8000 --gpus 0,1 --tp 2 --steps /tmp/steps
      replay run --resume runs/first

    A server's API key is read from the environment variable OPENAI_API_KEY.
    """
    if not virtual:
        give_back_freed_memory()
    from replay.plan import RunOptions
    from replay.show import lines
    from replay.summary import summarize

    if (trace is None) is (resume is None):
        raise ReplayError("give either a trace to replay or --resume and the run to go on with")
    options = RunOptions(
        trace=trace or Path(),
        resume=resume,
        engine=engine,
        model=model,
        tp=tp,
        replicas=replicas,
        router=router,
        virtual=virtual,
        freq_mhz=freq,
        power_cap_w=power_cap,
        power=power,
        with_cpu=with_cpu,
        allow_busy=allow_busy,
        output=output,
        gpus=parse_gpus(gpus),
        port=port,
        hardware=hardware,
        vllm_python=vllm_python,
        vllm_args=tuple(vllm_arg or ()),
        record_steps=record_steps,
        steps=steps,
        num_warmups=num_warmups,
        api_key=os.environ.get("OPENAI_API_KEY"),
        duration_ns=None if duration is None else _duration_ns("--duration", duration, zero_ok=False),
        num_prompts=num_prompts,
        time_scale=time_scale,
        ramp_ns=_duration_ns("--ramp", ramp),
        warmup_ns=_duration_ns("--warmup", warmup),
        overlong=overlong,
        exact=ignore_eos,
        max_concurrency=max_concurrency,
        max_rate_rps=max_rate,
        workers=workers,
        endpoint=endpoint,
        stream=stream,
        think_time=think_time,
        idle_ns=_duration_ns("--idle", idle),
        ready_timeout_s=ready_check_timeout_sec,
        request_timeout_s=request_timeout_sec,
        seed=seed,
        save_chunks=save_chunks,
        truth=truth,
        metadata=_parse_metadata(metadata or []),
    )
    with open_progress(quiet=quiet) as progress:
        run_dir = _run(options, progress, prometheus_port)
    summary = summarize(run_dir)
    if as_json:
        print_json(summary)
    else:
        prose(lines(summary))
        then = f"analysis {'energy' if summary['gpus'] else 'buckets'}"
        whole = summary["state"] == "complete" or options.virtual
        say(f"\nwrote {run_dir}; next: {then if whole else 'replay run --resume'} {run_dir}")
    if summary["state"] != "complete":
        sys.exit(130 if summary["state"] == "interrupted" else 1)
    if not summary["requests_ok"]:
        sys.exit(1)


def _run(options: "RunOptions", progress: Progress, prometheus_port: int | None) -> Path:
    """Replay in wall time or in virtual time."""
    if options.virtual:
        from replay.virtual.run import run_virtual

        if prometheus_port is not None:
            raise ReplayError("--prometheus-port with --virtual: nothing goes on long enough to be watched")
        return run_virtual(options, progress)
    import uvloop

    from replay.exposition import WatchedProgress, serve_metrics
    from replay.session import run as run_session

    async def watched_run() -> Path:
        watched = WatchedProgress(progress)
        async with serve_metrics(prometheus_port, watched):
            return await run_session(options, watched)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(watched_run())


RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]


app.command()(sweep)


@app.command()
def show(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Show a run on one screen: what was run, how it ended, rates, latencies, energy as read, verdicts.

    Also of a run that was killed or still goes on, as far as it is on record.

    \b
    Examples:
      replay show runs/first
      replay show runs/first --json
    """
    from replay.show import lines
    from replay.summary import summarize

    summary = summarize(run_dir)
    if as_json:
        print_json(summary)
    else:
        prose(lines(summary))


@app.command()
def check(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Say whether a run is whole, valid and reproducible, and which commands repeat it.

    Whole: every table can be read, each request is on record once, no power or step is missing. Valid: no verdict is
    against it. Reproducible: trace, arguments and constants are those of then. Changes nothing; exit status 1 where a
    run is not whole or not valid.

    \b
    Examples:
      replay check runs/first
      replay check runs/first --json
    """
    from replay.whole import check as check_run
    from replay.whole import good, lines

    found = check_run(run_dir)
    if as_json:
        print_json(found)
    else:
        prose(lines(found))
        if found["commands"]:  # whole, however long: they are to be copied
            say("\n".join(["repeated by", *(f"  {command}" for command in found["commands"])]))
    if not good(found):
        sys.exit(1)


@app.command()
def vllm_args(
    model: Annotated[str, typer.Argument(help="Model to serve.")] = "MODEL",
    steps: Annotated[Path, typer.Option(help="Folder that the step recorder logs into.")] = Path("wattrace-steps"),
    as_json: AsJson = False,
) -> None:
    """Print the `vllm serve` command whose engine steps are recorded; add your own arguments to it.

    The recorder logs into a folder of the server's host, and keeps the last gigabyte. `replay run --engine URL --steps
    FOLDER`, on the same host, reads it from there.

    \b
    Examples:
      replay vllm-args Qwen/Qwen3-8B --steps /tmp/steps
      replay run trace.parquet --engine http://localhost:8000 --gpus 0 --steps /tmp/steps
    """
    from replay.engines.vllm import RECORDER_ARGUMENTS, REQUEST_ARGUMENTS, recorder_environment

    environment, arguments = recorder_environment(steps), [*RECORDER_ARGUMENTS, *REQUEST_ARGUMENTS]
    if as_json:
        print_json({"environment": environment, "arguments": arguments})
        return
    words = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    say(" ".join(["env", *words, "vllm", "serve", shlex.quote(model), *arguments]))


app.command()(probe)


def _duration_ns(option: str, text: str, *, zero_ok: bool = True) -> int:
    """What `option` was given, ns. Raises a `WattraceError` that names it for what is no duration, or is zero."""
    try:
        return parse_duration_ns(text, zero_ok=zero_ok)
    except WattraceError as error:
        raise ReplayError(f"{option} {error}") from None


def _parse_metadata(pairs: list[str]) -> dict[str, str]:
    """`key=value` pairs. Raises `ReplayError` for anything else."""
    for pair in pairs:
        if not pair.partition("=")[0] or "=" not in pair:
            raise ReplayError(f"--metadata {pair}: give key=value")
    return dict(pair.split("=", 1) for pair in pairs)


if __name__ == "__main__":
    main()
