"""The `replay` command: parse, call one function, print."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from replay.plan import DEFAULT_PROFILE, RunOptions
from tracegen.console import make_app, print_json, run_app, say
from tracegen.durations import parse_duration_ns
from tracegen.errors import ReplayError

app = make_app("Send a trace to an LLM server at locked GPU clocks, and record requests, engine steps and power.")


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
        str | None, typer.Option(help="Model to serve or to ask for.", show_default="the engine's own")
    ] = None,
    tp: Annotated[
        int | None, typer.Option(help="Tensor-parallel size.", show_default="as many as --gpus, else 2 for sim or 1")
    ] = None,
    freq: Annotated[
        int | None, typer.Option(help="SM clock to lock, MHz.", show_default="the driver's own clocks")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Run directory to write.", show_default="under runs/")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="GPUs that serve, for example 0,1.", show_default="the first ones")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of a launched server.", show_default="a free one")] = None,
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
    profile: Annotated[str, typer.Option(help="Hardware and model of the simulated engine.")] = DEFAULT_PROFILE,
    vllm_python: Annotated[
        str | None, typer.Option(help="Python of an environment that has vLLM.", show_default="this one")
    ] = None,
    vllm_arg: Annotated[
        list[str] | None, typer.Option(help="Argument for `vllm serve`, repeatable.", show_default="none")
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
      replay run trace.parquet --engine http://localhost:8000 --gpus 0,1 --tp 2
      replay run trace.parquet --engine vllm --model Qwen/Qwen3-8B --vllm-arg=--max-model-len=8192
    """
    import uvloop

    from replay.live import open_progress
    from replay.session import run as run_session
    from replay.summary import lines, summarize

    options = RunOptions(
        trace=trace,
        engine=engine,
        model=model,
        tp=tp,
        freq_mhz=freq,
        output=output,
        gpus=_parse_gpus(gpus),
        port=port,
        profile=profile,
        vllm_python=vllm_python,
        vllm_args=tuple(vllm_arg or ()),
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
        metadata=_parse_metadata(metadata or []),
    )
    with open_progress(quiet=quiet) as progress, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        run_dir = runner.run(run_session(options, progress))
    summary = summarize(run_dir)
    if as_json:
        print_json(summary)
    else:
        say("\n".join(lines(summary)))
        then = "buckets" if summary["energy_j"] is None else "energy"
        say(f"\nwrote {run_dir}; next: analysis {then} {run_dir}")
    if summary["state"] != "complete":
        sys.exit(130 if summary["state"] == "interrupted" else 1)


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
