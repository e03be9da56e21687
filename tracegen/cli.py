"""The `tracegen` command: parse, call one function, print."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tracegen.console import format_si, make_app, note, print_json, print_table, run_app, say
from tracegen.durations import parse_duration_ns

if TYPE_CHECKING:
    import polars as pl

app = make_app("Make, import and describe traces of LLM requests: arrival times, input and output token lengths.")
import_app = make_app("Turn a published trace into a trace file.")
app.add_typer(import_app, name="import")

TraceFile = Annotated[Path, typer.Argument(metavar="FILE", help="A trace file (Parquet).", show_default=False)]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers; the same seed gives the same file.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite whatever file is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with figures in full.")]


def main() -> None:
    """Run the command."""
    run_app(app)


@app.command()
def synth(
    mix: Annotated[str, typer.Option(help="Length mix; `tracegen mixes` lists them.")] = "chat",
    rate: Annotated[float, typer.Option(help="Mean requests per second.")] = 0.5,
    duration: Annotated[str, typer.Option(help="Length of the trace: 90s, 5m, 1.5h.")] = "5m",
    seed: Seed = 1,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("trace.parquet"),
    force: Force = False,
) -> None:
    """Synthesize a trace from a length mix.

    Arrivals are Poisson; lengths follow a mix that was fitted to a public trace.

    \b
    Examples:
      tracegen synth --mix chat
      tracegen synth --mix code --rate 2 --duration 10m --seed 7 -o code.parquet
    """
    from tracegen.synthesize import synthesize

    _save(*synthesize(mix, rate, parse_duration_ns(duration), seed), output, force=force)


@import_app.command()
def azure(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="The published CSV, plain, .xz or .gz.", show_default=False),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write.", show_default="LABEL.parquet")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Label of each row.", show_default="the file's name without suffixes")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Drop and count bad rows instead of stopping.")] = False,
    force: Force = False,
) -> None:
    """Import an Azure LLM trace of 2023.

    Columns TIMESTAMP,ContextTokens,GeneratedTokens; the files are at https://github.com/Azure/AzurePublicDataset
    under data/.

    \b
    Examples:
      tracegen import azure AzureLLMInferenceTrace_conv.csv -o conv.parquet
      tracegen import azure AzureLLMInferenceTrace_code.csv.xz --label code
    """
    from tracegen.importers.azure import import_azure

    frame, metadata = import_azure(file, label=label, skip_bad=skip_bad)
    source = metadata["source"]
    details = [
        f"read {source['rows_read']:,} rows, dropped {source['rows_dropped']:,}",
        *(f"dropped {count:,}: {why}" for why, count in source["dropped"].items()),
    ]
    output = output or Path(f"{metadata['parameters']['label']}.parquet")
    _save(frame, metadata, output, *details, force=force, source=file)


@app.command()
def scale(
    file: TraceFile,
    rate: Annotated[float, typer.Option(help="Mean requests per second to reach.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write.", show_default="FILE-RATErps.parquet")
    ] = None,
    seed: Seed = 1,
    force: Force = False,
) -> None:
    """Change a trace's rate.

    To a lower rate requests are dropped at random; to a higher one copies, shifted in time, are superposed.

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
    _save(frame, metadata, output or Path(f"{file.stem}-{rate:g}rps.parquet"), detail, force=force, source=file)


@app.command("slice")
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

    The slice keeps its ids and lengths; its own time starts at 0.

    \b
    Examples:
      tracegen slice conv.parquet --duration 10m
      tracegen slice conv.parquet --start 20m --duration 90s -o part.parquet
    """
    from tracegen.transform import slice_trace

    frame, metadata = slice_trace(file, parse_duration_ns(start, zero_ok=True), parse_duration_ns(duration))
    _save(frame, metadata, output or Path(f"{file.stem}-{start}-{duration}.parquet"), force=force, source=file)


@app.command()
def describe(file: TraceFile, json: AsJson = False) -> None:
    """Show a trace's rate, lengths and buckets.

    Burstiness, correlation, and histograms too.

    \b
    Examples:
      tracegen describe trace.parquet
      tracegen describe trace.parquet --json
    """
    from tracegen import render
    from tracegen.describe import describe_trace

    document = describe_trace(file)
    if json:
        print_json(document)
    else:
        render.print_description(document)


@app.command()
def validate(file: TraceFile) -> None:
    """Check a trace against the schema.

    A broken rule is named with its row (from 0) and column, and the exit code is 2.

    \b
    Examples:
      tracegen validate trace.parquet
    """
    from tracegen.schema import read_trace

    frame = read_trace(file)
    say(f"{file}: a valid trace, {frame.height:,} requests, columns {', '.join(frame.columns)}")


@app.command()
def mixes(json: AsJson = False) -> None:
    """List the length mixes.

    Each with the public trace it was fitted to and how well it fits.

    \b
    Examples:
      tracegen mixes
      tracegen mixes --json
    """
    from dataclasses import asdict

    from tracegen.lengths import all_mixes

    found = all_mixes()
    if json:
        print_json([asdict(mix) for mix in found])
        return
    print_table(
        ["mix", "fitted to", "rows", "mean in", "mean out", "KS in", "KS out"],
        [
            [
                mix.name,
                Path(mix.source["file"]).name,
                f"{mix.source['rows']:,}",
                format_si(mix.source["mean_input_tokens"], digits=4),
                format_si(mix.source["mean_output_tokens"], digits=4),
                f"{mix.goodness['ks_input_median']:.3f}",
                f"{mix.goodness['ks_output_median']:.3f}",
            ]
            for mix in found
        ],
        left=2,
    )
    say("\nKS: Kolmogorov-Smirnov distance of a sample of as many rows to the source, median over seeds.")


def _save(
    frame: "pl.DataFrame",
    metadata: dict[str, Any],
    output: Path,
    *details: str,
    force: bool,
    source: Path | None = None,
) -> None:
    """Write a trace; say what was written, the `details`, and what to type next."""
    from tracegen import render
    from tracegen.describe import describe
    from tracegen.schema import save_trace

    save_trace(frame, output, metadata, force=force, source=source)
    say(f"wrote {output}: {render.headline(describe(frame, metadata))}")
    for detail in details:
        say(f"  {detail}")
    note(f"next: replay run {shlex.quote(str(output))} --tp 2 --freq 1200")


if __name__ == "__main__":
    main()
