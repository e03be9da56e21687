"""The commands of `analysis` that draw: a page to read, and figures to put elsewhere."""

from pathlib import Path
from typing import Annotated, Any

import typer

from analysis.cli_sweep import By, Scope, SloText
from tracegen.console import note, plural, say
from tracegen.errors import AnalysisError


def add_commands(app: typer.Typer) -> None:
    """Add them to `app`."""
    for command in (report, figures):
        app.command()(command)


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="DIR|RUN...", help="A sweep's directory, or run directories.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="The page's title.", show_default="what it answers")] = None,
    slo: SloText = None,
    attainment: Annotated[float, typer.Option(help="Of a sweep: share of requests that keep to all of --slo.")] = 0.99,
    objective: Annotated[
        str, typer.Option(help="Of a sweep, what is to be least: energy, power, cost, performance or edp.")
    ] = "energy",
    by: By = "bucket",
    scope: Scope = "gpu",
) -> None:
    """Write one self-contained page about a sweep or about runs: the answer first, then what it rests on.

    Of a sweep: the best setting and how sure that is, heat maps, Pareto fronts, every setting. Of runs: where the
    joules went, power over time, sizes, latency; the last five options are for sweeps.

    \b
    Examples:
      analysis report SWEEP -o report.html
      analysis report SWEEP --slo ttft:250,tbt:100 --objective cost --scope node
      analysis report RUN -o run.html
      analysis report RUN_AT_1980_MHZ RUN_AT_1200_MHZ -o clocks.html
    """
    from analysis.report_page import write_page
    from analysis.sweep_file import SWEEP_FILE

    sweeps = [path for path in paths if (path / SWEEP_FILE).is_file()]
    if sweeps and len(paths) > 1:
        raise AnalysisError(f"{sweeps[0]}: is a sweep; a report is about one sweep or about runs")
    if sweeps:
        page = _sweep_page(sweeps[0], title or "Which setting serves best", slo, attainment, objective, by, scope)
    else:
        page = _run_page(paths, title or "What the requests cost")
    write_page(page, output)
    say(f"wrote {output} ({output.stat().st_size / 1024:,.0f} kB); open it in a browser, it needs no network")


def _sweep_page(path: Path, title: str, slo: str | None, attainment: float, objective: str, by: str, scope: str) -> Any:
    from analysis.cli_sweep import load_told
    from analysis.objectives import parse_wanted
    from analysis.recommend import recommend
    from analysis.report_sweep import sweep_page

    wanted = parse_wanted(slo, attainment)
    table = load_told(path, by, scope, wanted.slo)
    return sweep_page(table, recommend(table, wanted, objective), title)


def _run_page(paths: list[Path], title: str) -> Any:
    from analysis.load import open_run
    from analysis.report import run_page
    from analysis.saved import ensure_energy

    opened = [open_run(path) for path in paths]
    energies = [ensure_energy(run) for run in opened]
    for run, energy in zip(opened, energies, strict=True):
        if remark := energy.remark(run):
            note(remark)
    return run_page(opened, energies, title)


def figures(
    path: Annotated[
        Path, typer.Argument(metavar="DIR", help="A sweep's directory, of 'replay sweep'.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write to.")] = Path("figures"),
    kinds: Annotated[str, typer.Option("--format", help="png, svg, vega (JSON), csv: the table behind.")] = "svg,csv",
    by: By = "bucket",
    scope: Scope = "gpu",
) -> None:
    """Draw a sweep's figures: latency, throughput, power and energy against the clock, heat maps, Pareto fronts.

    Curves are by TP, by size, and by batch size where that was swept; heat maps are of J/request by size, clock and TP.

    \b
    Examples:
      analysis figures DIR -o figures
      analysis figures DIR -o figures --format png,svg,vega,csv
      analysis figures DIR -o by-label --by label --scope node
    """
    from analysis.cli_sweep import load_told
    from analysis.sweep_figures import parse_formats, write_figures

    formats = parse_formats(kinds)
    written = write_figures(load_told(path, by, scope, None), output, formats)
    say(f"wrote {plural(len(written), 'file')} to {output}")
