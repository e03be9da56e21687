"""The `tracegen` commands that make a trace from a trace: parse, call one function, write, print."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tracegen.console import format_si, note, plural, say
from tracegen.durations import parse_duration_ns
from tracegen.options import Force, Seed, TraceFile

if TYPE_CHECKING:
    import polars as pl


def scale(
    file: TraceFile,
    rate: Annotated[float, typer.Option(help="Mean requests per second to reach.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write.", show_default="FILE-RATErps.parquet")
    ] = None,
    seed: Seed = 1,
    force: Force = False,
) -> None:
    """Change a trace's rate, by thinning or superposing.

    To a lower rate requests are dropped at random; to a higher one copies, shifted in time, are superposed. Sessions
    stay whole. Bursts keep their length: `warp` changes the rate by stretching time, which is not the same.

    \b
    Examples:
      tracegen scale conv.parquet --rate 2
      tracegen scale conv.parquet --rate 20 --seed 3 -o busy.parquet
    """
    from tracegen.transform import scale_trace

    frame, metadata = scale_trace(file, rate, seed)
    done = metadata["parameters"]
    detail = (
        f"{done['method']}: {format_si(done['rate_before_rps'])} -> {format_si(done['rate_after_rps'])} requests/s "
        f"({format_si(done['rate_target_rps'])} asked for)"
    )
    _save(frame, metadata, output or Path(f"{file.stem}-{rate:g}rps.parquet"), detail, force=force, sources=[file])


def warp(
    file: TraceFile,
    time_scale: Annotated[
        float, typer.Option(help="Times become so many times as long: 2 is half the rate.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write.", show_default="FILE-xSCALE.parquet")
    ] = None,
    force: Force = False,
) -> None:
    """Stretch or compress a trace's time.

    Every arrival and think time is multiplied, so bursts change their length and keep their requests. `scale` reaches
    a rate without that.

    \b
    Examples:
      tracegen warp conv.parquet --time-scale 0.5
    """
    from tracegen.transform import warp_trace

    name = Path(f"{file.stem}-x{time_scale:g}.parquet")
    _save(*warp_trace(file, time_scale), output or name, force=force, sources=[file])


def slice_(
    file: TraceFile,
    duration: Annotated[str, typer.Option(help="Length of the slice: 90s, 5m, 1.5h.", show_default=False)],
    start: Annotated[str, typer.Option(help="Where it starts, from the trace's start.")] = "0",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File to write.", show_default="FILE-START-DURATION.parquet"),
    ] = None,
    force: Force = False,
) -> None:
    """Cut a stretch of time out of a trace.

    The slice keeps its ids and lengths; its own time starts at 0. Turns whose parent came before have none any more.

    \b
    Examples:
      tracegen slice conv.parquet --duration 10m
      tracegen slice conv.parquet --start 20m --duration 90s -o part.parquet
    """
    from tracegen.transform import slice_trace

    frame, metadata = slice_trace(file, parse_duration_ns(start, zero_ok=True), parse_duration_ns(duration))
    _save(frame, metadata, output or Path(f"{file.stem}-{start}-{duration}.parquet"), force=force, sources=[file])


def clamp(
    file: TraceFile,
    max_context: Annotated[int, typer.Option(help="Most tokens of input and output together.", show_default=False)],
    drop: Annotated[
        bool, typer.Option("--drop/--clip", help="Leave longer requests out, or shorten them.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write.", show_default="FILE-N-tokens.parquet")
    ] = None,
    force: Force = False,
) -> None:
    """Clamp requests to a context length.

    With --drop the later turns of a session go, too, which build on the one that is too long. With --clip the input
    gets shorter, and the output only where it alone is too long.

    \b
    Examples:
      tracegen clamp kimi.parquet --max-context 32768 --drop
      tracegen clamp kimi.parquet --max-context 8192 --clip -o short.parquet
    """
    from tracegen.transform import clamp_trace

    frame, metadata = clamp_trace(file, max_context, "drop" if drop else "clip")
    verb = "dropped" if drop else "clipped"
    detail = f"{verb} {plural(metadata['parameters']['changed'], 'request')}"
    name = Path(f"{file.stem}-{max_context}-tokens.parquet")
    _save(frame, metadata, output or name, detail, force=force, sources=[file])


def sample(
    file: TraceFile,
    requests: Annotated[int, typer.Option("-n", "--requests", help="How many.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write.", show_default="FILE-N.parquet")
    ] = None,
    seed: Seed = 1,
    force: Force = False,
) -> None:
    """Draw requests of a trace at random, in their order.

    Their times stay. Sessions are drawn whole, so there may be a few requests less.

    \b
    Examples:
      tracegen sample conv.parquet -n 1000
    """
    from tracegen.transform import sample_trace

    name = Path(f"{file.stem}-{requests}.parquet")
    _save(*sample_trace(file, requests, seed), output or name, force=force, sources=[file])


def merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Trace files (Parquet).", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("merged.parquet"),
    force: Force = False,
) -> None:
    """Put the requests of several traces on one clock.

    All begin at once. Requests get new ids, and without a label their file's name; sessions, clients and prefixes of
    different files stay different.

    \b
    Examples:
      tracegen merge chat.parquet code.parquet -o both.parquet
    """
    from tracegen.transform import merge_traces

    _save(*merge_traces(files), output, force=force, sources=files)


def relabel(
    file: TraceFile,
    label: Annotated[str, typer.Option(help="The new label.", show_default=False)],
    only: Annotated[str | None, typer.Option(help="Only for requests with this label.", show_default="all")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write.", show_default="FILE-LABEL.parquet")
    ] = None,
    force: Force = False,
) -> None:
    """Give requests another label.

    \b
    Examples:
      tracegen relabel conv.parquet --label chat
      tracegen relabel both.parquet --only chat --label assistant -o both-2.parquet
    """
    from tracegen.transform import relabel_trace

    frame, metadata = relabel_trace(file, label, only)
    detail = f"relabelled {plural(metadata['parameters']['changed'], 'request')}"
    _save(frame, metadata, output or Path(f"{file.stem}-{label}.parquet"), detail, force=force, sources=[file])


def repeat(
    file: TraceFile,
    times: Annotated[int, typer.Option(help="So many times as long.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write.", show_default="FILE-TIMESx.parquet")
    ] = None,
    seed: Seed = 1,
    force: Force = False,
) -> None:
    """Make a trace longer, with fresh randomness instead of copies.

    First the trace itself. Then arrivals as in its minutes, each drawn from those near it; and its requests, or whole
    sessions, in a new random order.

    \b
    Examples:
      tracegen repeat conv.parquet --times 24 -o day.parquet
    """
    from tracegen.transform import repeat_trace

    name = Path(f"{file.stem}-{times}x.parquet")
    _save(*repeat_trace(file, times, seed), output or name, force=force, sources=[file])


COMMANDS: dict[str, Callable[..., None]] = {
    "scale": scale,
    "warp": warp,
    "slice": slice_,
    "clamp": clamp,
    "sample": sample,
    "merge": merge,
    "relabel": relabel,
    "repeat": repeat,
}


def _save(
    frame: "pl.DataFrame",
    metadata: dict[str, Any],
    output: Path,
    *details: str,
    force: bool,
    sources: list[Path],
) -> None:
    """Write a trace; say what was written, the `details`, and what to type next."""
    from tracegen import render
    from tracegen.describe import describe
    from tracegen.schema import check_output, save_trace

    for source in sources:
        check_output(output, force=force, source=source)
    save_trace(frame, output, metadata, force=force)
    say(f"wrote {output}: {render.headline(describe(frame, metadata))}")
    for detail in details:
        say(f"  {detail}")
    note(f"next: replay run {shlex.quote(str(output))} --tp 2 --freq 1200")
