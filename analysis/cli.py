"""The `analysis` command: parse, call one function of this package, print."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tracegen.console import format_si, make_app, note, print_json, print_table, run_app, say
from tracegen.errors import AnalysisError

TABLE_ROWS = 200  # a terminal is no place for more

app = make_app("What each request of a run cost in energy, and how runs compare.")

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory of 'replay run'.", show_default=False)]
RunPaths = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Method = Annotated[
    str,
    typer.Option(
        help="How a step is shared: shapley (the work's own price), equal-time, tokens, or marginal (what it adds)."
    ),
]


@app.command()
def energy(
    run: RunPath,
    method: Method = "shapley",
    scope: Annotated[str, typer.Option(help="gpu: the engine's GPUs; node: every sampled GPU.")] = "gpu",
    as_json: AsJson = False,
) -> None:
    """Share a run's measured energy out to its requests and say where the joules went.

    Writes energy/requests.parquet, buckets.parquet and summary.json into the run directory. Every method conserves:
    requests + idle + other = measured. For a simulated run the error against its ground truth is printed, beside that
    of splitting each step equally.

    \b
    Examples:
      analysis energy runs/chat-sim-tp8-1980MHz-20260101T120000Z
      analysis energy RUN --method equal-time
      analysis energy RUN --json
    """
    from analysis.energy import ENERGY_DIR, attribute_methods
    from analysis.evaluate import BASELINE, judge
    from analysis.load import open_run
    from analysis.saved import save
    from analysis.split import MARGINAL

    opened = open_run(run)
    judged = opened.has("truth") and method != MARGINAL
    results = attribute_methods(opened, list(dict.fromkeys([method, *([BASELINE] if judged else [])])), scope)
    save(results[method])
    errors = judge(opened, results) if judged else []
    if as_json:
        truth = {"simulated_ground_truth": [asdict(error) for error in errors]} if judged else {}
        print_json({**results[method].summary, **truth})
        return
    _print_energy(results[method].summary, opened.name)
    if errors:
        say()
        rows = [
            [e.method, f"{100 * e.median_rel:.2f} %", f"{100 * e.p99_rel:.1f} %", f"{100 * e.worst_bucket_rel:.1f} %"]
            for e in errors
        ]
        title = f"error of J/request against SIMULATED ground truth, {errors[0].requests} requests"
        print_table(["method", "median", "p99", "worst bucket mean"], rows, title=title)
    say(f"\nwrote {opened.path / ENERGY_DIR}; next: analysis buckets {run}")


def _print_energy(summary: dict[str, Any], name: str) -> None:
    """Where the joules went, and what that rests on."""
    from analysis.split import MARGINAL

    measured_j = summary["measured_j"]
    window_s = summary["window"]["duration_s"]
    simulated = "SIMULATED  " if summary["simulated"] else ""
    say(f"{simulated}{name}: {format_si(measured_j / 1e3, ' kJ', 4)} in {window_s:.1f} s, {summary['method']}")
    say()
    rows = [
        [name, f"{summary[key] / 1e3:,.3f}", f"{100 * summary[key] / measured_j:.2f} %" if measured_j else "-"]
        for name, key in (
            ("prefill", "prefill_j"),
            ("decode", "decode_j"),
            ("idle (no request in the engine)", "idle_j"),
            (
                "other (not ours)" if summary["method"] != MARGINAL else "other (not ours, or added by nobody)",
                "other_j",
            ),
            ("measured", "measured_j"),
        )
    ]
    print_table(["", "kJ", "share"], rows)
    for domain, joules in summary.get("cpu_j", {}).items():
        say(f"CPU {domain} {'unknown' if joules is None else f'{joules:,.0f} J'}, not attributed")
    each_j = summary["energy_per_request_j"]
    if each_j is not None:
        answered = f"{summary['requests_averaged']:,} answered of {summary['requests']:,} requests"
        say(f"\n{format_si(each_j, ' J', 4)} per request over {answered}")
    say(f"not accounted for: {summary['residual_j']:.3g} J; membership from {summary['membership'] or 'nothing'}")
    for fit in summary["fit"]:
        _print_fit(fit)
    say(f"gain of the power meters: known to ±{100 * summary['gain_rel_se']:.0f} % only, the same for all requests")
    for remark in summary["notes"]:
        say(f"note: {remark}")


def _print_fit(fit: dict[str, Any]) -> None:
    """One instance's meter, idle power and model."""

    def percent(key: str) -> str:
        return "-" if fit[key] is None else f"{100 * fit[key]:.2f} %"

    name = "unused GPUs" if fit["instance"] is None else f"instance {fit['instance']}"
    idle = fit["idle_power_w"]
    mismatch = fit["samples_over_counter_rel"]
    agree = "" if mismatch is None else f", samples {100 * mismatch:+.2f} % against the counter"
    rest = f"idle {idle['before']:.1f} to {idle['after']:.1f} W"
    say(f"{name}: {fit['gpus']} GPUs by {fit['energy_source']}{agree}; {rest}")
    if fit["model"]:
        say(
            f"  {fit['model']} model on {fit['steps']:,} steps and {fit['sensor_windows']:,} sensor windows: residuals "
            f"{percent('duration_rel_rms')} in time, {percent('power_rel_rms')} in power, "
            f"{percent('block_misfit_rel')} between blocks"
        )


@app.command()
def buckets(
    runs: RunPaths,
    by: Annotated[str, typer.Option(help="Group requests by: bucket (size) or label (mix or source).")] = "bucket",
    slo_ttft: Annotated[
        str, typer.Option(help="TTFT objectives in ms for short, medium, long inputs.")
    ] = "250,400,2000",
    slo_tbt: Annotated[float, typer.Option(help="Objective for a request's mean time between tokens, ms.")] = 100.0,
    as_json: AsJson = False,
) -> None:
    """Requests by size bucket: latency percentiles, joules per request and token, objectives met.

    The first letter of a bucket is the input (S < 256, M < 1024, L up to 8192, X beyond), the second the output
    (S < 100, M < 350, L). Percentiles are p50 / p90 / p99, from the send time.

    \b
    Examples:
      analysis buckets RUN
      analysis buckets RUN_A RUN_B --slo-ttft 200,300,1000 --slo-tbt 50
      analysis buckets RUN --by label --json
    """
    from analysis.buckets import bucket_table, parse_slo, rows_for_people
    from analysis.load import open_run

    slo = parse_slo(slo_ttft, slo_tbt)
    documents = []
    for run in [open_run(path) for path in runs]:
        known = _ensure(run)
        table = bucket_table(run, known.requests, by, slo)
        documents.append({"run": run.name, "simulated": run.simulated, "buckets": table.to_dicts()})
        if not as_json:
            headings, rows = rows_for_people(table)
            print_table(headings, rows, title=f"{'SIMULATED  ' if run.simulated else ''}{run.name}")
            tokens = table["tbt_source"][0] == "tokens"
            over = "all gaps between tokens" if tokens else "the means of requests"
            say(f"p50 / p90 / p99 of answered requests; TBT over {over}")
            say(
                f"SLO met: of all requests, TTFT within {slo_ttft} ms (short, medium, long input) and a request's mean "
                f"TBT within {slo_tbt:g} ms\n"
            )
    if as_json:
        print_json(documents)


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="The run to compare with.", show_default=False)],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The run to judge.", show_default=False)],
    unpaired: Annotated[bool, typer.Option(help="Compare group means of runs of different traces.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    brief: Annotated[bool, typer.Option("--brief", help="Three lines that say what was found, no tables.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two runs of one trace, request by request: energy and latency, with 95 % intervals.

    \b
    Examples:
      analysis compare RUN_AT_1980_MHZ RUN_AT_1200_MHZ
      analysis compare RUN_A RUN_B --brief
      analysis compare RUN_A RUN_B --unpaired --json
    """
    from analysis.compare import FEWEST_PAIRS, bucket_rows, findings, overall_rows
    from analysis.compare import compare as compare_runs
    from analysis.load import open_run

    a, b = open_run(run_a), open_run(run_b)
    result = compare_runs(a, b, _ensure(a), _ensure(b), paired=not unpaired, seed=seed)
    for warning in result.warnings:
        note(f"warning: {warning}")
    if as_json:
        print_json(result.document())
        return
    if brief:
        say("\n".join(findings(result)))
        return
    for letter, total in zip("AB", result.totals, strict=True):
        each = format_si(total["measured_per_request_j"], " J", 4)
        simulated = "SIMULATED  " if result.simulated else ""
        say(f"{simulated}{letter}: {total['run']}: {total['served']:,} served, {each} each with idle power included")
    say()
    print_table(*overall_rows(result))
    say()
    print_table(*bucket_rows(result))
    say(f"(in brackets: not distinguishable from no difference, or fewer than {FEWEST_PAIRS} pairs)")


@app.command()
def query(
    runs_and_sql: Annotated[
        list[str], typer.Argument(metavar="RUN... SQL", help="Run directories, then the query.", show_default=False)
    ],
    kind: Annotated[str, typer.Option("--format", help="table, csv, json or parquet.")] = "table",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write to this file.", show_default=False)
    ] = None,
) -> None:
    """Ask SQL of all tables of one or several runs.

    Tables: requests (with ttft_ms, tpot_ms, e2el_ms, bucket, label, energy_j, prefill_j, decode_j), energy, buckets,
    runs, trace, steps, segments, arrivals, power, cpu_energy, server_metrics, truth. Each has the columns run, engine,
    tp, freq_mhz.

    \b
    Examples:
      analysis query RUN "SELECT bucket, avg(energy_j) FROM requests GROUP BY bucket"
      analysis query RUN_A RUN_B "SELECT freq_mhz, sum(energy_j) FROM requests GROUP BY freq_mhz" --format csv
      analysis query RUN "SELECT * FROM steps" --format parquet -o steps.parquet
    """
    from analysis.load import open_run
    from analysis.query import FORMATS, as_text, save_result
    from analysis.query import query as run_query

    *paths, sql = runs_and_sql
    if not paths:
        raise AnalysisError("give at least one run directory and then the query, in quotes, as the last argument")
    if kind not in FORMATS:
        raise AnalysisError(f"--format '{kind}': use one of {', '.join(FORMATS)}")
    if kind == "parquet" and output is None:
        raise AnalysisError("--format parquet needs a file: -o FILE")
    if output is not None and kind == "table":
        raise AnalysisError("-o needs --format csv, json or parquet")
    frame = run_query([open_run(path) for path in paths], sql, note)
    if output is not None:
        save_result(frame, output, kind)
        note(f"wrote {frame.height} rows to {output}")
    elif kind == "table":
        cells = [[_cell(value) for value in row] for row in frame.head(TABLE_ROWS).iter_rows()]
        print_table(frame.columns, cells, left=[not d.is_numeric() for d in frame.dtypes])
        if frame.height > TABLE_ROWS:
            note(f"{frame.height - TABLE_ROWS} more rows; --format csv prints all")
    else:
        say(as_text(frame, kind).rstrip("\n"))


@app.command()
def report(
    runs: RunPaths,
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="The page's title.")] = "What the requests cost",
) -> None:
    """Write one self-contained page: the answer, where the joules went, power over time, buckets, latency.

    \b
    Examples:
      analysis report RUN -o report.html
      analysis report RUN_AT_1980_MHZ RUN_AT_1200_MHZ -o clocks.html
    """
    from analysis.load import open_run
    from analysis.report import write_report

    opened = [open_run(path) for path in runs]
    write_report(opened, [_ensure(run) for run in opened], output, title)
    say(f"wrote {output} ({output.stat().st_size / 1024:,.0f} kB); open it in a browser, it needs no network")


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
