"""The `analysis` command: parse, call one function of this package, print."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from analysis import cli_report
from analysis.cli_sweep import add_commands
from tracegen.console import make_app, note, print_json, print_table, prose, run_app, say
from tracegen.errors import AnalysisError

TABLE_ROWS = 200  # a terminal is no place for more

app = make_app("What each request of a run cost in energy, and how runs compare.")

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory of 'replay run'.", show_default=False)]
Steady = Annotated[bool, typer.Option("--steady", help="Only requests sent while the load was steady.")]
RunPaths = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.", show_default=False)]
Scope = Annotated[str, typer.Option(help="gpu: the engine's GPUs; node: every sampled GPU.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Method = Annotated[
    str,
    typer.Option(
        help="How a step is shared: shapley (the work's own price), work (in proportion of that), equal-time, tokens, "
        "or marginal (what it adds)."
    ),
]


@app.command()
def energy(
    run: RunPath,
    method: Method = "shapley",
    scope: Scope = "gpu",
    idle: Annotated[
        str, typer.Option(help="Idle energy: line (its own), spread-time or spread-requests (also in idle_j).")
    ] = "line",
    pue: Annotated[float | None, typer.Option(help="Facility energy over the GPUs', for example 1.2.")] = None,
    carbon: Annotated[
        str | None, typer.Option(help="g/kWh, or a .csv or .parquet with time and g_per_kwh.", show_default=False)
    ] = None,
    price: Annotated[float | None, typer.Option(help="Price of a kWh.", show_default=False)] = None,
    currency: Annotated[str | None, typer.Option(help="Currency of --price.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Share a run's measured energy out to its requests and say where the joules went.

    Writes energy/requests.parquet, buckets.parquet and summary.json into the run directory. Every method conserves:
    requests + idle + other = measured. For a simulated run the error against its ground truth is printed, beside that
    of splitting each step equally. PUE, carbon and price are worked out beside the joules, never in them.

    \b
    Examples:
      analysis energy runs/chat-sim-tp8-1980MHz-20260101T120000Z
      analysis energy RUN --method equal-time
      analysis energy RUN --idle spread-time --pue 1.2 --carbon 400 --price 0.30 --currency EUR
      analysis energy RUN --json
    """
    from analysis.carbon import parse_carbon
    from analysis.costs import Rates, add_costs
    from analysis.energy import ENERGY_DIR, attribute_methods
    from analysis.evaluate import BASELINE, judge
    from analysis.load import open_run
    from analysis.printing import print_energy, told_every
    from analysis.saved import save
    from analysis.split import MARGINAL
    from analysis.spread import check_choice, spread_idle

    rates = Rates(pue, None if carbon is None else parse_carbon(carbon), price, currency)
    check_choice(idle)
    opened = open_run(run)
    judged = opened.has("truth") and method != MARGINAL
    results = attribute_methods(
        opened, list(dict.fromkeys([method, *([BASELINE] if judged else [])])), scope, told_every()
    )
    result = add_costs(spread_idle(results[method], idle), rates)
    save(result)
    errors = judge(opened, results) if judged else []
    if as_json:
        truth = {"simulated_ground_truth": [asdict(error) for error in errors]} if judged else {}
        print_json({**result.summary, **truth})
        return
    print_energy(result.summary, opened.name, errors)
    say(f"\nwrote {opened.path / ENERGY_DIR}; next: analysis check {run}")


@app.command()
def methods(run: RunPath, scope: Scope = "gpu", as_json: AsJson = False) -> None:
    """Show how much the choice of method moves: J/request of each bucket by every method, beside the default.

    Each method shares the same measured energy, so the lines add up for all of them. For a simulated run the error
    against its ground truth stands beside each. Nothing is written.

    \b
    Examples:
      analysis methods RUN
      analysis methods RUN --json
    """
    from analysis.load import open_run
    from analysis.methods import bucket_rows, compare_methods, method_rows, remarks

    found = compare_methods(open_run(run), scope)
    if as_json:
        print_json(found.document())
        return
    title = f"{'SIMULATED  ' if found.run.simulated else ''}{found.run.name}, scope {found.scope}"
    print_table(*bucket_rows(found), title=title)
    say()
    print_table(*method_rows(found))
    prose(["", *remarks(found)])


@app.command()
def check(
    run: RunPath,
    bound: Annotated[str, typer.Option(help="Share of the measured energy above which a doubt is serious.")] = "5%",
    as_json: AsJson = False,
) -> None:
    """List every reason to doubt a run's figures, each with its size in joules, and what to do about it.

    Exit status 1 when a doubt is larger than --bound, or there are no figures; else 0. The gain of the power meters
    and that a run is simulated are said and not counted.

    \b
    Examples:
      analysis check RUN
      analysis check RUN --bound 1% --json
    """
    from analysis.doubts import advice, check_run, parse_bound, rows_for_people
    from analysis.load import open_run

    found = check_run(open_run(run), parse_bound(bound))
    if found.remark:
        note(found.remark)
    if as_json:
        print_json(found.document())
    else:
        title = f"{'SIMULATED  ' if found.run.simulated else ''}{found.run.name}"
        print_table(*rows_for_people(found), title=title, left=[True, True, False, False, True], wrap=True)
        prose(["", *advice(found)])
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def buckets(
    runs: RunPaths,
    by: Annotated[str, typer.Option(help="Group requests by: bucket (size) or label (mix or source).")] = "bucket",
    slo_ttft: Annotated[
        str, typer.Option(help="TTFT objectives in ms for short, medium, long inputs.")
    ] = "250,400,2000",
    slo_tbt: Annotated[float, typer.Option(help="Objective for a request's mean time between tokens, ms.")] = 100.0,
    steady: Steady = False,
    as_json: AsJson = False,
) -> None:
    """Requests by size bucket: latency percentiles, joules per request and token, objectives met.

    The first letter of a bucket is the input (S < 256, M < 1024, L up to 8192, X beyond), the second the output
    (S < 100, M < 350, L). Percentiles are p50 / p90 / p99, from the send time. Time windows (--by window), other
    objectives (--goodput) and percentiles: analysis latency.

    \b
    Examples:
      analysis buckets RUN
      analysis buckets RUN_A RUN_B --slo-ttft 200,300,1000 --slo-tbt 50
      analysis buckets RUN --by label --json
    """
    from analysis.buckets import bucket_table, remarks_for_people, rows_for_people
    from analysis.load import open_run
    from analysis.serving import only_steady, steady_part
    from analysis.slo import parse_slo

    slo = parse_slo(slo_ttft, slo_tbt)
    documents = []
    for run in [open_run(path) for path in runs]:
        known = _ensure(run)
        found, remarks = steady_part(run)
        table = bucket_table(run, known.requests, by, slo, only_steady(run, found) if steady else None)
        remarks = [] if steady else remarks
        told = {"only_steady": steady, "steady": found.document(), "remarks": remarks, "buckets": table.to_dicts()}
        documents.append({"run": run.name, "simulated": run.simulated, "scope": known.scope, **told})
        if not as_json:
            headings, rows = rows_for_people(table)
            print_table(headings, rows, title=f"{'SIMULATED  ' if run.simulated else ''}{run.name}")
            prose(remarks_for_people(table, slo, known.scope))
            if steady:
                say(f"only what was sent from {found.start_s:,.0f} to {found.end_s:,.0f} s after the first send")
            prose([*(f"note: {remark}" for remark in remarks), ""])
    if as_json:
        print_json(documents)


@app.command()
def latency(
    runs_and_goodput: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run directories.", show_default=False)
    ],
    by: Annotated[str | None, typer.Option(help="Also by bucket (size), label or window.", show_default=False)] = None,
    window: Annotated[str, typer.Option(help="How long a window is, with --by window.")] = "60s",
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            help="What a good request meets: NAME:MS of ttft, tpot, itl (the longest gap), e2el; or a profile's name.",
            show_default="dynamollm",
        ),
    ] = None,
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles to show.")] = "50,90,95,99",
    steady: Steady = False,
    as_json: AsJson = False,
) -> None:
    """How a run served: latency percentiles, throughput, goodput, and what a watt bought.

    Profiles: dynamollm (TTFT 250, 400 or 2000 ms for short, medium or long inputs, TPOT 100 ms), and those of MLPerf's
    Server: mlperf-llama2-70b, mlperf-llama3.1-405b, mlperf-llama3.1-8b (each also -interactive), mlperf-mixtral-8x7b,
    mlperf-deepseek-r1.

    \b
    Examples:
      analysis latency RUN
      analysis latency RUN --goodput ttft:200 tpot:50 e2el:5000
      analysis latency RUN --goodput ttft:250,400,2000 --by bucket
      analysis latency RUN --by window --window 5m --metric-percentiles 50,99.9
      analysis latency RUN_A RUN_B --goodput mlperf-llama2-70b-interactive --steady --json
    """
    from analysis.load import open_run
    from analysis.serving import Question, parse_percentiles, serving
    from analysis.serving_text import group_rows, latency_rows, sentences
    from analysis.slo import parse_goodput, split_goodput
    from tracegen.durations import parse_duration_ns

    paths, words = split_goodput(runs_and_goodput, goodput)
    slo, percentiles = parse_goodput(words), parse_percentiles(metric_percentiles)
    question = Question(by, parse_duration_ns(window) / 1e9, slo, percentiles, steady)
    documents = []
    for run in [open_run(path) for path in paths]:
        answer = serving(run, _ensure(run), question)
        documents.append(answer.document())
        if not as_json:
            print_table(*latency_rows(answer), title=f"{'SIMULATED  ' if run.simulated else ''}{run.name}")
            prose(["", *sentences(answer), ""])
            if by is not None:
                print_table(*group_rows(answer))
    if as_json:
        print_json(documents)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="A B, or A... vs B...", show_default=False)],
    by: Annotated[
        str | None,
        typer.Option(help="Tell runs apart by freq_mhz, tp or another setting or --metadata.", show_default=False),
    ] = None,
    unpaired: Annotated[bool, typer.Option(help="Compare group means of runs of different traces.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    brief: Annotated[bool, typer.Option("--brief", help="Three lines that say what was found, no tables.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare runs of one trace, request by request: energy and latency, with 95 % intervals and effect sizes.

    One run of each setting tells what changed for these requests; two or more of each tell whether a repeated run
    would show it too. With --by every other setting is compared with the first run's.

    \b
    Examples:
      analysis compare RUN_AT_1980_MHZ RUN_AT_1200_MHZ
      analysis compare A1 A2 A3 vs B1 B2 B3
      analysis compare runs/chat-* --by freq_mhz
      analysis compare RUN_A RUN_B --brief
      analysis compare RUN_A RUN_B --unpaired --json
    """
    from analysis.compare import arms_of, compare_arms
    from analysis.compare_text import bracket_note, bucket_rows, findings, limits, overall_rows, total_lines
    from analysis.load import open_run

    def open_all(paths: Sequence[str]) -> Any:
        opened = [open_run(path) for path in paths]
        return opened, [_ensure(run) for run in opened]

    first, *others = arms_of(runs, by, open_all)
    results = [compare_arms(first, other, paired=not unpaired, seed=seed) for other in others]
    for warning in dict.fromkeys(warning for result in results for warning in result.warnings):
        note(f"warning: {warning}")
    if as_json:
        documents = [result.document() for result in results]
        print_json(documents if len(documents) > 1 else documents[0])
        return
    for result in results:
        if brief:
            prose(findings(result))
            continue
        prose([*total_lines(result), ""])
        print_table(*overall_rows(result))
        say()
        print_table(*bucket_rows(result))
        prose([bracket_note(), *limits(result), ""])


@app.command()
def query(
    runs_and_sql: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... SQL", help="Runs, folders of runs, patterns or URLs, then the query.", show_default=False
        ),
    ],
    kind: Annotated[
        str | None,
        typer.Option("--format", help="table, csv, json or parquet.", show_default="table, or by the ending of -o"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write to this file.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask SQL of all tables of one or several runs.

    Tables: requests (with ttft_ms, tpot_ms, e2el_ms, bucket, label, energy_j, prefill_j, decode_j), energy, buckets,
    runs, trace, steps, segments, arrivals, power, cpu_energy, server_metrics, truth. Each has the columns run, engine,
    mix, tp, freq_mhz (or freq).

    Runs may also be a folder of runs, a quoted pattern, or a URL (s3, gs, abfs, hdfs; others with wattrace[remote]).

    \b
    Examples:
      analysis query RUN "SELECT bucket, avg(energy_j) FROM requests GROUP BY bucket"
      analysis query 'runs/*' "SELECT mix, tp, freq, avg(energy_j) FROM requests GROUP BY mix, tp, freq" --format csv
      analysis query s3://bucket/runs "SELECT run, model, measured_j FROM runs"
      analysis query RUN "SELECT * FROM steps" -o steps.parquet
    """
    from analysis.query import as_text, collect, format_of, plan, save_result
    from analysis.tables import open_runs

    *paths, sql = runs_and_sql
    if not paths:
        raise AnalysisError("give at least one run directory and then the query, in quotes, as the last argument")
    kind = format_of("json" if as_json else kind, output)
    answer = plan(open_runs(*paths, note=note), sql)
    if output is not None:
        save_result(answer, output, kind)
        note(f"wrote {output} ({output.stat().st_size / 1024:,.0f} kB)")
        return
    frame = collect(answer)
    if kind == "table":
        cells = [[_cell(value) for value in row] for row in frame.head(TABLE_ROWS).iter_rows()]
        print_table(frame.columns, cells, left=[not d.is_numeric() for d in frame.dtypes])
        if frame.height > TABLE_ROWS:
            note(f"{frame.height - TABLE_ROWS} more rows; --format csv prints all")
    else:
        say(as_text(frame, kind).rstrip("\n"))


cli_report.add_commands(app)
add_commands(app)


def _ensure(run: Any) -> Any:
    """The run's energy, with a remark where it was just computed or cannot be."""
    from analysis.saved import ensure_energy

    known = ensure_energy(run)
    remark = known.remark(run)
    if remark:
        note(remark)
    return known


def _cell(value: Any) -> str:
    """A value for people."""
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Entry point of the console command."""
    run_app(app)


if __name__ == "__main__":
    main()
