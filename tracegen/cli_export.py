"""The `tracegen export` command: parse, call `export_trace`, print."""

from pathlib import Path
from typing import Annotated

import typer

from tracegen.console import note, plural, say
from tracegen.options import Force, TraceFile


def export(
    file: TraceFile,
    format: Annotated[  # noqa: A002 - the option's name
        str, typer.Option("--format", help="mooncake, azure, aiperf or vllm-bench.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write.", show_default="FILE with the format's suffix")
    ] = None,
    origin: Annotated[
        str, typer.Option(help="Date of the trace's start in Azure's format, UTC.")
    ] = "2000-01-01 00:00:00",
    force: Force = False,
) -> None:
    """Write a trace for other tools.

    Mooncake JSON Lines (times to the ms), Azure CSV (to 100 ns), AIPerf and vLLM bench (exact). Blocks that a prompt
    shares with others keep their hash ids' pattern. What the format has no column for is left out and named.

    \b
    Examples:
      tracegen export trace.parquet --format aiperf
      tracegen export trace.parquet --format azure --origin 2026-01-05 -o trace.csv
    """
    from tracegen.exporters import export_trace

    report = export_trace(file, output, format=format, origin=origin, force=force)
    say(f"wrote {report.output}: {plural(report.rows, 'request')}")
    if report.left_out:
        say(f"  left out: {', '.join(report.left_out)}")
    for remark in report.remarks:
        say(f"  {remark}")
    if report.run_with:
        note(f"next: {report.run_with}")
