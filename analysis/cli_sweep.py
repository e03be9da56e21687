"""The commands of `analysis` that are about a sweep as a whole, or about who cost most in a run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tracegen.console import note, print_json, print_table, prose, say
from tracegen.errors import AnalysisError

TABLES = ("settings", "cells", "groups")

SweepPath = Annotated[
    Path, typer.Argument(metavar="DIR", help="A sweep's directory, of 'replay sweep'.", show_default=False)
]
By = Annotated[str, typer.Option(help="Group requests by: bucket (size) or label (mix or source).")]
Scope = Annotated[str, typer.Option(help="gpu: the engine's GPUs; node: every sampled GPU.")]
SloText = Annotated[
    str | None,
    typer.Option(
        "--slo",
        help="ttft:250,tbt:100 in ms, of ttft, tbt (a request's mean), e2e and tbt_p99; or by size of input "
        "ttft:250,400,2000.",
        show_default="ttft:250,400,2000,tbt:100",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def add_commands(app: typer.Typer) -> None:
    """Add them to `app`."""
    for command in (sweep, recommend, top):
        app.command()(command)


def sweep(
    path: SweepPath,
    by: By = "bucket",
    scope: Scope = "gpu",
    slo: SloText = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="What to show by group, TP and clock: ttft, ttft_p50, ttft_p99, tbt, tbt_p99, e2e, e2e_p99, "
            "throughput, tokens, power, energy, token_energy, slo; several with commas.",
            show_default="energy",
        ),
    ] = None,
    table: Annotated[str, typer.Option(help="What --csv and --parquet write: settings, cells or groups.")] = "settings",
    csv: Annotated[Path | None, typer.Option(help="Write a table to this file.", show_default=False)] = None,
    parquet: Annotated[Path | None, typer.Option(help="Write a table to this file.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a sweep found: latency, throughput, power and energy of every setting, by load and by group.

    One table a rate with every setting over all requests, then a metric by group and TP against the clock. Energy that
    a run does not have yet is attributed and saved in it. Cells that are missing, saturated or invalid are listed.

    \b
    Examples:
      analysis sweep DIR
      analysis sweep DIR --metric ttft_p99,tbt,power --by label
      analysis sweep DIR --scope node --slo ttft:500,tbt:50
      analysis sweep DIR --csv settings.csv
      analysis sweep DIR --table cells --parquet cells.parquet
    """
    from analysis.objectives import parse_wanted
    from analysis.sweep_text import csv_ready, document, headline, parse_metrics, pivots, rate_tables, remarks

    metrics = parse_metrics(metric)
    if table not in TABLES:
        raise AnalysisError(f"--table '{table}': use one of {', '.join(TABLES)}")
    found = load_told(path, by, scope, parse_wanted(slo).slo)
    frame = getattr(found, table)
    for target, write in ((csv, csv_ready(frame).write_csv), (parquet, frame.write_parquet)):
        if target is not None:
            try:
                write(target)
            except OSError as error:
                raise AnalysisError(f"{target}: cannot be written ({error.strerror or error})") from None
            note(f"wrote {target}: {frame.height:,} rows{', SIMULATED' if found.simulated else ''}")
    if as_json:
        print_json(document(found))
    if as_json or csv or parquet:
        return
    prose([headline(found), ""])
    if metric is None:
        for title, headings, rows in rate_tables(found):
            print_table(headings, rows, title=title)
            say()
    for title, headings, rows in (pivot for one in metrics for pivot in pivots(found, one)):
        print_table(headings, rows, title=title, left=2)
        say()
    prose(remarks(found))


def recommend(
    path: SweepPath,
    slo: SloText = None,
    attainment: Annotated[float, typer.Option(help="Share of requests that keep to all of --slo.")] = 0.99,
    objective: Annotated[
        str,
        typer.Option(
            help="What is to be least: energy (J/request), power (W), cost (GPU-hours a request), performance (mean "
            "E2E), edp (J/request times mean E2E)."
        ),
    ] = "energy",
    per_bucket: Annotated[
        bool, typer.Option("--per-bucket", help="Answer for each bucket (or label) on its own, as a schedule.")
    ] = False,
    by: By = "bucket",
    scope: Scope = "gpu",
    rate: Annotated[float | None, typer.Option(help="Only at this rate, requests/s.", show_default="each")] = None,
    gpu_hour_price: Annotated[
        float | None, typer.Option(help="Price of a GPU-hour, with --objective cost.", show_default=False)
    ] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Also show the Pareto fronts.")] = False,
    schedule: Annotated[
        Path | None,
        typer.Option(help="With --per-bucket: write the schedule for a router to this file.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which clock and TP of a sweep serve best under latency objectives, what that saves, and how sure it is.

    Settings that are sound and keep to --slo may be chosen; the best has the least objective. It is set against the
    highest clock of its TP and against the fastest setting, with 95 % intervals of differences that are paired by
    repeat. Where the interval against the runner-up includes zero there is not enough data to name a winner.

    \b
    Examples:
      analysis recommend DIR
      analysis recommend DIR --slo ttft:250,tbt:100 --attainment 0.95 --rate 1
      analysis recommend DIR --objective cost --gpu-hour-price 2.5 --scope node
      analysis recommend DIR --per-bucket --schedule schedule.json
      analysis recommend DIR --pareto --json
    """
    import json

    from analysis import recommend_json as documents
    from analysis import recommend_text as text
    from analysis.objectives import check_price, parse_wanted
    from analysis.objectives import objective as objective_of
    from analysis.recommend import recommend as recommended

    wanted = parse_wanted(slo, attainment)
    check_price(gpu_hour_price, objective_of(objective))
    if schedule is not None and not per_bucket:
        raise AnalysisError(f"--schedule {schedule}: a schedule is by bucket or label; add --per-bucket")
    found = recommended(load_told(path, by, scope, wanted.slo), wanted, objective, per_group=per_bucket, rate_rps=rate)
    if schedule is not None:
        try:
            schedule.write_text(json.dumps(documents.schedule(found), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise AnalysisError(f"{schedule}: cannot be written ({error.strerror or error})") from None
        note(f"wrote {schedule}{', SIMULATED' if found.table.simulated else ''}")
    if as_json:
        print_json(documents.document(found, gpu_hour_price))
        return
    prose([*text.opening(found), ""])
    if len(found.answers) > 1:
        headings, rows = text.answer_rows(found)
        print_table(headings, rows, left=[h in {by, "best", "next"} for h in headings], wrap=True)
        say()
    for answer in found.answers if not per_bucket else ():
        prose([*text.answer_lines(found, answer, gpu_hour_price), ""])
    if len(found.answers) == 1:
        print_table(*text.loser_rows(found, found.answers[0]), left=[True, False, False, False, True], wrap=True)
        say()
    for title, headings, rows in text.front_rows(found) if pareto else ():
        print_table(headings, rows, title=title)
        say()
    prose(text.closing(found))
    if len(found.answers) > 1:
        say(f"why the others lose: {'--json' if per_bucket else '--rate RATE, or --json'}")


def top(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory of 'replay run'.", show_default=False)],
    by: Annotated[str, typer.Option(help="request, client, session, label or bucket.")] = "request",
    metric: Annotated[
        str,
        typer.Option(
            help="energy_j, prefill_j, decode_j, input_tokens, output_tokens (sums), ttft_ms, tpot_ms, e2el_ms (means)."
        ),
    ] = "energy_j",
    n: Annotated[int, typer.Option("-n", help="How many to list.")] = 10,
    as_json: AsJson = False,
) -> None:
    """List who cost most in a run: requests, clients, sessions, labels or buckets.

    \b
    Examples:
      analysis top RUN
      analysis top RUN --by client -n 20
      analysis top RUN --by bucket --metric e2el_ms --json
    """
    from analysis import top as found_by
    from analysis.load import open_run
    from analysis.saved import ensure_energy

    opened = open_run(run)
    energy = ensure_energy(opened)
    if remark := energy.remark(opened):
        note(remark)
    found = found_by.top(opened, energy, by, metric, n)
    if as_json:
        print_json(found.document())
        return
    headings, rows = found_by.rows_for_people(found)
    print_table(headings, rows, title=found_by.title(found), left=[True, *[False] * (len(headings) - 2), True])
    prose(found_by.remarks(found))


def load_told(path: Path, by: str, scope: str, slo: Any) -> Any:
    """The sweep's tables; says how far it is where that takes long."""
    import os

    from analysis.printing import told_every
    from analysis.sweep import load_sweep

    told = told_every(what="cells analysed:")
    return load_sweep(
        path, by=by, scope=scope, slo=slo, progress=lambda done, of: told(done / of), processes=os.cpu_count() or 1
    )
