"""The `tracegen` commands that look at traces beside each other: fit, compare, plot."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tracegen.console import note, print_json, say
from tracegen.options import AsJson, Force


def fit(
    file: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace file (Parquet).", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Mix file to write (.toml).", show_default="TRACE.toml")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A fit that gives no request away: see above.")] = False,
    epsilon: Annotated[float, typer.Option(help="How private; smaller is more so.")] = 1.0,
    seeds: Annotated[int, typer.Option(help="Twins to compare with the trace.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Seed of what the fit draws; the same seed gives the same file.")] = 1,
    json: AsJson = False,
    force: Force = False,
) -> None:
    """Fit a mix to a trace, for `synth --mix`.

    Lengths and how they depend on each other, arrivals, clients, sessions and prefix reuse. Then twins are synthesized
    from the mix, and how well they match is printed.

    A private fit (--private) is differentially private: whether any one request was in the trace changes the chance
    of any mix file by a factor of exp(epsilon) at most. The file has lengths and arrivals, from noisy counts alone;
    the comparison that is printed is with the trace itself and is not in the file. The noise differs from fit to fit.

    \b
    Examples:
      tracegen fit conv.parquet -o mymix.toml
      tracegen synth --mix mymix.toml --arrivals production
      tracegen fit conv.parquet --private --epsilon 0.5 -o to-share.toml
    """
    from tracegen.errors import TraceError
    from tracegen.fit.run import fit_trace, save_mix
    from tracegen.render import print_fit

    output = output or Path(f"{file.stem}.toml")
    if output.suffix != ".toml":
        raise TraceError(f"{output}: a mix file ends in .toml; choose another output")
    if output.exists() and not force:
        raise TraceError(f"{output}: exists; choose another output, or --force")
    done = fit_trace(file, private=epsilon if private else None, seed=seed, seeds=seeds, progress=note)
    save_mix(done, output)
    if json:
        print_json({"file": str(output), "goodness": done.goodness, "remarks": done.remarks})
        return
    print_fit(done, output)
    note(f"next: tracegen synth --mix {shlex.quote(str(output))} --arrivals production")


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A trace file (Parquet).", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.", show_default=False)],
    max_ks: Annotated[float | None, typer.Option(help="Exit with 1 where input or output lengths are further.")] = None,
    max_bucket: Annotated[
        float | None, typer.Option(help="Exit with 1 where the worst bucket's share differs by more (0.01).")
    ] = None,
    max_spearman: Annotated[
        float | None, typer.Option(help="Exit with 1 where rank correlations differ by more.")
    ] = None,
    max_dispersion: Annotated[
        float | None, typer.Option(help="Exit with 1 where dispersion at 1, 10 or 60 s differs by a larger factor.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Show how far two traces are apart.

    Kolmogorov-Smirnov distances of lengths and gaps, bucket shares, rank correlation, dispersion, rates and prefix hit
    rates. The exit code is 0 however far they are, unless a --max is given.

    \b
    Examples:
      tracegen compare conv.parquet twin.parquet
      tracegen compare conv.parquet twin.parquet --max-ks 0.03 --max-bucket 0.01 --max-spearman 0.05
    """
    from tracegen.render import print_comparison
    from tracegen.twin import Bounds, beyond, compare_traces

    found = compare_traces(a, b)
    failed = beyond(found["differences"], Bounds(max_ks, max_bucket, max_spearman, max_dispersion))
    if json:
        print_json({**found, "beyond": failed})
    else:
        print_comparison(found)
        for line in failed:
            say(f"beyond: {line}")
    if failed:
        raise typer.Exit(1)


def plot(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Trace files (Parquet), up to six.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Picture to write: .png, .svg or .html.")] = Path(
        "trace.png"
    ),
) -> None:
    """Draw traces, several overlaid.

    Arrival rate over time, lengths, both lengths together, dispersion by window, buckets. HTML needs no network.

    \b
    Examples:
      tracegen plot conv.parquet
      tracegen plot conv.parquet twin.parquet -o both.html
    """
    from tracegen.plot import plot_traces

    plot_traces(files, output)
    say(f"wrote {output}: {', '.join(str(file) for file in files)}")
