"""The `replay` command: parse, call one function, print."""

import asyncio
import os
import shlex
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from replay.live import Progress, open_progress
from replay.plan import RunOptions
from replay.sim.cli import sim_app
from tracegen.console import make_app, note, print_json, print_table, run_app, say
from tracegen.durations import parse_duration_ns
from tracegen.errors import GpuError, ReplayError

app = make_app("Send a trace to an LLM server at locked GPU clocks, and record requests, engine steps and power.")
clocks_app = make_app("Show how GPUs run, and give them back to their driver.")
app.add_typer(clocks_app, name="clocks")
app.add_typer(sim_app, name="sim")

AllGpus = Annotated[str | None, typer.Option("--gpus", help="GPUs, for example 0,1.", show_default="all")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def replay() -> None:
    """Send a trace to an LLM server at locked GPU clocks, and record requests, engine steps and power."""


def main() -> None:
    """Run the command."""
    run_app(app)


@app.command()
def run(
    trace: Annotated[Path, typer.Argument(help="Trace file, as `tracegen` writes it.", show_default=False)],
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
        int | None, typer.Option(help="Replay only the first requests.", show_default="all", min=1)
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

    A server's API key is read from the environment variable OPENAI_API_KEY.
    """
    from replay.summary import lines, summarize

    options = RunOptions(
        trace=trace,
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
        gpus=_parse_gpus(gpus),
        port=port,
        hardware=hardware,
        vllm_python=vllm_python,
        vllm_args=tuple(vllm_arg or ()),
        record_steps=record_steps,
        steps=steps,
        num_warmups=num_warmups,
        api_key=os.environ.get("OPENAI_API_KEY"),
        duration_ns=None if duration is None else parse_duration_ns(duration),
        num_prompts=num_prompts,
        overlong=overlong,
        exact=ignore_eos,
        max_concurrency=max_concurrency,
        max_rate_rps=max_rate,
        idle_ns=parse_duration_ns(idle, zero_ok=True),
        ready_timeout_s=ready_check_timeout_sec,
        request_timeout_s=request_timeout_sec,
        seed=seed,
        save_chunks=save_chunks,
        truth=truth,
        metadata=_parse_metadata(metadata or []),
    )
    with open_progress(quiet=quiet) as progress:
        run_dir = _run(options, progress)
    summary = summarize(run_dir)
    if as_json:
        print_json(summary)
    else:
        say("\n".join(lines(summary)))
        then = "energy" if summary["gpus"] else "buckets"
        say(f"\nwrote {run_dir}; next: analysis {then} {run_dir}")
    if summary["state"] != "complete":
        sys.exit(130 if summary["state"] == "interrupted" else 1)


def _run(options: RunOptions, progress: Progress) -> Path:
    """Replay in wall time or in virtual time."""
    if options.virtual:
        from replay.virtual.run import run_virtual

        return run_virtual(options, progress)
    import uvloop

    from replay.session import run as run_session

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run_session(options, progress))


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


@app.command()
def probe(
    gpus: AllGpus = None,
    seconds: Annotated[float, typer.Option(help="How long each GPU is watched under load, s.", min=2)] = 20.0,
    idle: Annotated[str, typer.Option(help="How long each GPU is watched at rest.")] = "5s",
    load: Annotated[bool, typer.Option(help="Load the GPU on and off; without, windows and lags stay unknown.")] = True,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write.", show_default="where runs look for it")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how this machine's power sensors behave: period, window, lag, counter step, idle power.

    What is found is used by every later run on that GPU, in place of what is published for its model. The GPUs must
    be free.

    \b
    Examples:
      replay probe
      replay probe --gpus 0 --seconds 60
      replay probe --gpus 0 --no-load --json
    """
    from dataclasses import asdict

    from replay.gpu.probe import probe_gpus
    from replay.gpu.sensor_profiles import lines

    idle_s = parse_duration_ns(idle) / 1e9
    found = probe_gpus(
        "nvml", _parse_gpus(gpus), with_load=load, idle_s=idle_s, seconds=seconds, output=output, say=note
    )
    if as_json:
        print_json([{**asdict(profile), "file": str(path)} for profile, path in found])
        return
    for profile, path in found:
        say("\n".join(lines(profile)))
        say(f"wrote {path}")


@clocks_app.command("show")
def clocks_show(as_json: AsJson = False) -> None:
    """Show each GPU's clocks, power, limits and processes.

    Whether a clock is locked no driver tells: see the clock beside its range, and what throttles it.

    \b
    Examples:
      replay clocks show
      replay clocks show --json
    """
    from replay.gpu.base import open_gpus
    from replay.gpu.clocks import show

    with closing(open_gpus("nvml")) as gpus:
        entries = show(gpus)
    if as_json:
        print_json(entries)
        return
    columns = ["GPU", "name", "SM clock", "of", "power", "limit", "temperature", "throttled by", "processes"]
    print_table(columns, [_clock_row(entry) for entry in entries], left=[True] * 2 + [False] * 5 + [True] * 2)


@clocks_app.command("reset")
def clocks_reset(gpus: AllGpus = None) -> None:
    """Unlock the SM clocks and restore the default power limits.

    A run gives back what it set by itself, also when it is killed; this is for what others left.

    \b
    Examples:
      replay clocks reset
      replay clocks reset --gpus 0,1
    """
    from replay.gpu.base import open_gpus
    from replay.gpu.clocks import reset

    with closing(open_gpus("nvml")) as opened:
        indices = _parse_gpus(gpus) or tuple(device.gpu for device in opened.devices())
        done, refused = reset(opened, indices)
    for line in done:
        say(line)
    if refused:
        raise GpuError("; ".join(refused))


def _clock_row(entry: dict[str, Any]) -> list[str]:
    """A GPU of `replay clocks show` as cells."""
    if entry["error"] is not None:
        return [str(entry["gpu"]), entry["name"], *["-"] * 5, entry["error"], "-"]

    def number(value: float | None, unit: str) -> str:
        return "-" if value is None else f"{value:,.0f} {unit}"

    clocks = f"{entry['sm_clock_lowest_mhz'] or '?'}-{entry['sm_clock_highest_mhz'] or '?'}"
    processes = [f"{process['pid']} {process['name'] or ''}".strip() for process in entry["processes"]]
    return [
        str(entry["gpu"]), entry["name"], number(entry["sm_clock_mhz"], "MHz"), clocks, number(entry["power_w"], "W"),
        number(entry["power_limit_w"], "W"), number(entry["temperature_c"], "°C"),
        ", ".join(entry["throttled_by"] or []) or "-", ", ".join(processes) or "-",
    ]  # fmt: skip


def _parse_gpus(text: str | None) -> tuple[int, ...] | None:
    """Indices as in `0,1` or `0-3`. Raises `ReplayError` for anything else."""
    if text is None:
        return None
    result: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            result += range(int(first), int(last or first) + 1)
    except ValueError:
        raise ReplayError(f"--gpus {text}: give GPU indices, for example 0,1 or 0-3") from None
    return tuple(result)


def _parse_metadata(pairs: list[str]) -> dict[str, str]:
    """`key=value` pairs. Raises `ReplayError` for anything else."""
    for pair in pairs:
        if not pair.partition("=")[0] or "=" not in pair:
            raise ReplayError(f"--metadata {pair}: give key=value")
    return dict(pair.split("=", 1) for pair in pairs)


if __name__ == "__main__":
    main()
