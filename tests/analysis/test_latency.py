"""Latencies, gaps between tokens, objectives, and how a run served, against hand-made numbers and plain Polars."""

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from analysis.doubts import check_run
from analysis.gaps import RELATIVE_ERROR, GapHistogram, token_gaps
from analysis.latency import latency_exprs
from analysis.requests import request_table
from analysis.saved import RunEnergy, ensure_energy
from analysis.serving import METRICS, PERCENTILES, Question, parse_percentiles, serving
from analysis.serving_text import group_rows, latency_rows, sentences
from analysis.slo import DEFAULT_SLO, PROFILES, Slo, parse_goodput, parse_slo, split_goodput
from replay.rundir import PartWriter
from replay.sums import Lag, add_up
from tracegen.errors import AnalysisError, RunError

NO_ENERGY = RunEnergy(None, None, why="not asked for")


def test_latencies_follow_their_definitions_and_are_null_where_a_time_is():
    frame = pl.DataFrame(
        {
            "scheduled_ns": [0, 0, 0],
            "sent_ns": [2_000_000, 2_000_000, 2_000_000],
            "first_token_ns": [52_000_000, 52_000_000, None],
            "last_token_ns": [142_000_000, 52_000_000, None],
            "output_tokens": pl.Series([10, 1, None], dtype=pl.UInt32),
        }
    ).with_columns(latency_exprs())
    assert frame["ttft_ms"].to_list() == [50.0, 50.0, None]
    assert frame["tpot_ms"].to_list() == [10.0, None, None]
    assert frame["e2el_ms"].to_list() == [140.0, 50.0, None]
    assert frame["ttft_from_schedule_ms"].to_list() == [52.0, 52.0, None]
    assert frame["e2el_from_schedule_ms"].to_list() == [142.0, 52.0, None]
    assert frame["dispatch_lag_ms"].to_list() == [2.0, 2.0, 2.0]


def test_dispatch_lag_is_the_same_figure_to_the_run_itself_and_to_whoever_asks_later(run_of, rewrite):
    """Percentiles between neighbours, over all that were sent, failed ones too."""
    run = run_of()
    requests = run.scan("requests").collect().with_row_index("row")
    late_ns = (pl.col("row") ** 2).cast(pl.Int64) * 20_000
    requests = requests.with_columns(
        (pl.col("scheduled_ns") - late_ns).alias("scheduled_ns"),
        pl.when(pl.col("row") % 3 == 0).then(pl.lit("timeout")).otherwise("status").alias("status"),
    ).drop("row")
    run = rewrite(run, requests=requests)
    lag = Lag()
    add_up([lag], lambda columns: [requests.select(columns)])
    verdict = lag.verdict()
    found = serving(run, ensure_energy(run)).whole["dispatch_lag_ms_p99"]
    assert found == pytest.approx(verdict.value, rel=1e-9)
    lag_ms = (requests["sent_ns"] - requests["scheduled_ns"]).to_numpy() / 1e6
    assert found == pytest.approx(np.quantile(lag_ms, 0.99), rel=1e-9)
    (doubt,) = (d for d in check_run(run).doubts if d.name == "dispatch_lag")
    assert f"p99 {verdict.value:.2f} ms" in doubt.why
    assert f"p99 {verdict.value:.2f} ms" in verdict.why


def test_a_chunk_of_several_tokens_is_several_gaps_and_one_without_tokens_none():
    ms = 1_000_000
    chunks = pl.DataFrame(
        {
            "chunk_ns": [[0, 30 * ms, 35 * ms, 40 * ms], [5 * ms], [0, 9 * ms], None],
            "chunk_tokens": [[1, 3, 0, 1], [1], [1], None],  # the third does not say what its chunks are
        }
    )
    gaps = token_gaps(chunks)
    assert gaps.row.tolist() == [0, 0]
    assert gaps.itl_ms.tolist() == [10.0, 10.0]
    assert gaps.tokens.tolist() == [3, 1]


@given(
    st.lists(st.tuples(st.floats(0.01, 1e6), st.integers(1, 5)), min_size=1, max_size=60),
    st.floats(0, 1),
)
def test_the_histogram_of_gaps_is_as_exact_as_it_says(gaps, share):
    itl_ms, tokens = (np.array(column) for column in zip(*gaps, strict=True))
    group = np.arange(len(gaps)) % 2 + 1
    histogram = GapHistogram(4)
    histogram.add(group, itl_ms.astype(float), tokens)
    first, second, third, fourth, whole = (row[0] for row in histogram.quantiles([share]))
    assert first is None
    assert fourth is None
    for found, chosen in ((second, group == 1), (third, group == 2), (whole, group > 0)):
        if chosen.any():
            exact = np.quantile(np.repeat(itl_ms[chosen], tokens[chosen]), share)
            assert found == pytest.approx(exact, rel=RELATIVE_ERROR * 1.001)


def test_too_many_groups_are_refused_before_memory_is():
    with pytest.raises(AnalysisError, match="group more coarsely"):
        GapHistogram(10**6)


@pytest.mark.parametrize(
    ("words", "bounds"),
    [
        (["ttft:200", "tpot:50", "e2el:5000"], {"ttft": (200,) * 3, "tpot": (50,) * 3, "e2el": (5000,) * 3}),
        (["ttft:200 itl:50"], {"ttft": (200,) * 3, "itl": (50,) * 3}),
        (["ttft:250,400,2000"], {"ttft": (250, 400, 2000)}),
        (["mlperf-llama2-70b-interactive"], {"ttft": (450,) * 3, "tpot": (40,) * 3}),
        (["dynamollm", "tpot:50", "e2el:9e3"], {"ttft": (250, 400, 2000), "tpot": (50,) * 3, "e2el": (9000,) * 3}),
        ([], DEFAULT_SLO.bounds_ms),
    ],
)
def test_objectives_are_read_as_vllm_writes_them_and_by_size_and_by_name(words, bounds):
    assert parse_goodput(words).bounds_ms == bounds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["speed:3"], "'speed' is not one of ttft, tpot"),
        (["ttft:fast"], "give NAME:MS"),
        (["ttft:0"], "give NAME:MS"),
        (["ttft:1,2"], "give NAME:MS"),
        (["ttft:inf"], "give NAME:MS"),
        (["mlperf"], "'mlperf' is no objective; give NAME:MS"),
        (["dynamollm", "mlperf-llama2-70b"], "2 profiles"),
    ],
)
def test_a_wrong_objective_says_what_is_meant(words, message):
    with pytest.raises(AnalysisError, match=message):
        parse_goodput(words)


def test_every_published_set_says_where_it_is_from():
    assert all(profile.source for profile in PROFILES.values())


def test_words_behind_goodput_are_told_from_runs():
    assert split_goodput(["RUN", "tpot:50", "s3://b/run"], ["ttft:200"]) == (
        ["RUN", "s3://b/run"],
        ["ttft:200", "tpot:50"],
    )
    with pytest.raises(AnalysisError, match="without --goodput"):
        split_goodput(["RUN", "ttft:50"], None)
    with pytest.raises(AnalysisError, match="at least one run"):
        split_goodput(["tpot:50"], ["ttft:200"])


@pytest.mark.parametrize("text", ["", "a,b,c", "1,2", "0,1,2"])
def test_a_wrong_slo_is_refused(text):
    with pytest.raises(AnalysisError, match="three positive numbers"):
        parse_slo(text, 100)


def test_one_slo_is_for_all_sizes():
    assert parse_slo("300", 50) == Slo({"ttft": (300, 300, 300), "tpot": (50, 50, 50)})


@pytest.mark.parametrize("text", ["", "x", "50,50", "101", "-1"])
def test_wrong_percentiles_are_refused(text):
    with pytest.raises(AnalysisError, match="--metric-percentiles"):
        parse_percentiles(text)


def met(slo, **columns):
    row = {"status": "ok", "bucket": "SS", "output_tokens": 10, "ttft_ms": 50.0, "tpot_ms": 10.0, "e2el_ms": 140.0}
    return (
        pl.DataFrame({name: [value] for name, value in (row | columns).items()}, strict=False).select(slo.met()).item()
    )


def test_an_objective_is_met_up_to_its_bound_and_all_must_be():
    slo = Slo({"ttft": (50, 60, 70), "tpot": (10,) * 3})
    assert met(slo)
    assert not met(slo, ttft_ms=50.1)
    assert met(slo, ttft_ms=60.0, bucket="ML")
    assert met(slo, ttft_ms=70.0, bucket="XS")
    assert not met(slo, tpot_ms=10.1)
    assert met(slo, status="length_mismatch")
    assert not met(slo, status="timeout")


def test_what_is_not_known_is_not_met_but_one_token_has_nothing_between():
    slo = Slo({"tpot": (10,) * 3})
    assert met(slo, tpot_ms=None, output_tokens=1)
    assert not met(slo, tpot_ms=None, output_tokens=None)
    assert not met(Slo({"ttft": (10,) * 3}), ttft_ms=None, output_tokens=1)


@pytest.mark.parametrize("by", ["bucket", "label", "window"])
def test_groups_partition_the_requests_and_their_figures(run_of, by):
    run = run_of()
    answer = serving(run, ensure_energy(run), Question(by=by, window_s=7.0))
    groups, whole = answer.figures.head(-1), answer.whole
    for name in ("requests", "answered", "slo_met", "output_tokens"):
        assert groups[name].sum() == whole[name]
    assert groups["slo_attainment"].drop_nulls().is_between(0, 1).all()
    assert groups["request_rate"].sum() > 0
    if by == "window":
        spans_s = groups["duration_s"]
        assert spans_s.sum() == pytest.approx(whole["duration_s"])
        assert (groups["request_rate"] * spans_s).sum() == pytest.approx(whole["requests"])
        assert groups["measured_j"].sum() == pytest.approx(whole["measured_j"], rel=1e-6)
        assert groups["start_s"].to_list() == [7.0 * i for i in range(groups.height)]


def test_a_window_holds_what_was_sent_in_it(run_of):
    run = run_of()
    answer = serving(run, NO_ENERGY, Question(by="window", window_s=10.0))
    rows = request_table(run)
    start = run.manifest["measure_start_ns"]
    for i, row in enumerate(answer.figures.head(-1).iter_rows(named=True)):
        mine = rows.filter((pl.col("sent_ns") - start) // 10_000_000_000 == i)
        assert row["requests"] == mine.height
        assert row["ttft_ms_p90"] == (pytest.approx(mine["ttft_ms"].quantile(0.9, "linear")) if mine.height else None)


def test_what_comes_out_in_a_window_is_counted_when_it_comes(run_of):
    run = run_of()
    answer = serving(run, ensure_energy(run), Question(by="window", window_s=9.0))
    groups, whole = answer.figures.head(-1), answer.whole
    rows, start = request_table(run), run.manifest["measure_start_ns"]
    for name in ("request_throughput", "output_throughput", "total_token_throughput"):
        assert (groups[name] * groups["duration_s"]).sum() == pytest.approx(whole[name] * whole["duration_s"])
    assert (groups["output_tokens_per_joule"] * groups["measured_j"]).sum() == pytest.approx(
        rows["output_tokens"].sum()
    )
    for i, row in enumerate(groups.iter_rows(named=True)):
        a, b = start + i * 9 * 10**9, start + round((row["start_s"] + row["duration_s"]) * 1e9)
        done = rows.filter(pl.col("last_token_ns").is_between(a, b, closed="left"))
        assert row["request_throughput"] == pytest.approx(done.height / row["duration_s"])
        inside = pl.min_horizontal("last_token_ns", pl.lit(b)) - pl.max_horizontal("first_token_ns", pl.lit(a))
        share = inside.clip(0) / (pl.col("last_token_ns") - pl.col("first_token_ns"))
        tokens = rows.select((share * pl.col("output_tokens")).sum()).item()
        assert row["output_throughput"] == pytest.approx(tokens / row["duration_s"], abs=1e-6)


@pytest.mark.parametrize("by", ["bucket", "window"])
def test_the_tables_for_people_have_a_cell_for_each_heading(run_of, by):
    answer = serving(run_of(), NO_ENERGY, Question(by=by, window_s=7.0, percentiles=(99.0,)))
    for headings, rows in (latency_rows(answer), group_rows(answer)):
        assert all(len(row) == len(headings) for row in rows)


def test_rates_and_energies_are_of_the_measured_window(run_of):
    run = run_of()
    known = ensure_energy(run)
    answer = serving(run, known, Question(slo=parse_goodput(["ttft:100", "e2el:3000"])))
    rows, whole = request_table(run), answer.whole
    seconds = (run.manifest["measure_end_ns"] - run.manifest["measure_start_ns"]) / 1e9
    good = rows.filter((pl.col("ttft_ms") <= 100) & (pl.col("e2el_ms") <= 3000)).height
    joules, tokens = known.summary["measured_j"], rows["output_tokens"].sum()
    assert 0 < good < rows.height
    assert whole["request_throughput"] == pytest.approx(rows.height / seconds)
    assert whole["request_goodput"] == pytest.approx(good / seconds)
    assert whole["output_throughput"] == pytest.approx(tokens / seconds)
    assert whole["slo_attainment"] == pytest.approx(good / rows.height)
    assert whole["power_w"] == pytest.approx(joules / seconds, rel=1e-6)
    assert whole["goodput_per_watt"] == pytest.approx(good / joules, rel=1e-6)
    assert whole["output_tokens_per_joule"] == pytest.approx(tokens / joules)
    assert whole["energy_delay_product"] == pytest.approx(joules / rows.height * rows["e2el_ms"].mean() / 1e3)
    assert json.loads(json.dumps(answer.document(), allow_nan=False))["all"]["requests"] == rows.height


def test_without_energy_what_rests_on_it_is_null_with_the_reason(run_of):
    answer = serving(run_of(), NO_ENERGY, Question(by="window"))
    assert answer.whole["power_w"] is answer.whole["goodput_per_watt"] is answer.whole["energy_delay_product"] is None
    assert answer.document()["why_no_energy"] == "not asked for"
    assert any("no power: not asked for" in line for line in sentences(answer))


def with_chunks(run, rewrite):
    """`run` with the times of two chunks a request: its first token, and all others at its end."""
    chunks = pl.concat_list("first_token_ns", "last_token_ns").alias("chunk_ns")
    counts = pl.concat_list(pl.lit(1, pl.UInt16), (pl.col("output_tokens") - 1).cast(pl.UInt16)).alias("chunk_tokens")
    return rewrite(run, requests=run.scan("requests").with_columns(chunks, counts).collect())


def test_itl_is_judged_by_the_longest_gap_and_needs_the_times_of_chunks(run_of, rewrite):
    run = run_of()
    with pytest.raises(AnalysisError, match="no columns chunk_ns and chunk_tokens"):
        serving(run, NO_ENERGY, Question(slo=parse_goodput(["itl:30"])))
    run = with_chunks(run, rewrite)
    answer = serving(run, NO_ENERGY, Question(by="bucket", slo=parse_goodput(["itl:30"])))
    rows = request_table(run)  # all of a request's gaps are as long here
    assert answer.itl_source == "tokens"
    assert 0 < answer.whole["slo_attainment"] < 1
    assert answer.whole["slo_met"] == rows.filter((pl.col("tpot_ms") <= 30) | (pl.col("output_tokens") == 1)).height
    repeated = np.repeat(rows["tpot_ms"].fill_null(0).to_numpy(), rows["output_tokens"].to_numpy() - 1)
    for p in PERCENTILES:
        exact = pytest.approx(np.quantile(repeated, p / 100), rel=RELATIVE_ERROR)
        assert answer.whole[f"itl_ms_p{p:g}"] == exact


def test_requests_out_of_order_and_failed_ones_keep_their_own_gaps(run_of, rewrite):
    run = with_chunks(run_of(), rewrite)
    table = run.scan("requests").collect()
    odd = pl.col("request_id") % 2 == 1
    status = pl.when(odd).then(pl.lit("aborted")).otherwise("status").alias("status")
    mixed = rewrite(run, requests=table.with_columns(status).sample(fraction=1.0, shuffle=True, seed=1))
    served = table.filter(~odd)
    one = serving(mixed, NO_ENERGY, Question(by="bucket"))
    two = serving(rewrite(run, requests=served), NO_ENERGY, Question(by="bucket"))
    for metric in METRICS:
        names = [f"{metric}_p{p:g}" for p in PERCENTILES]
        assert [one.whole[n] for n in names] == pytest.approx([two.whole[n] for n in names], rel=1e-9)


def test_a_count_that_is_missing_is_said_where_tpot_is_judged(run_of, rewrite):
    run = run_of()
    requests = run.scan("requests").with_columns(pl.lit(None, pl.UInt32).alias("output_tokens")).collect()
    answer = serving(rewrite(run, requests=requests), NO_ENERGY)
    assert answer.whole["slo_attainment"] == 0
    assert any(f"{requests.height:,} answers have no token count" in remark for remark in answer.remarks)


def test_hosts_whose_clocks_differ_are_brought_onto_one(run_of, rewrite):
    run = run_of()
    question = Question(by="window", window_s=10.0)
    here = serving(run, NO_ENERGY, question).figures
    hour = 3_600_000_000_000
    shifted = rewrite(
        run,
        {
            "hosts": [{"host": "node", "offset_ns": 0}, {"host": "far", "offset_ns": hour}],
            "workers": [{"worker": 0, "host": "far"}],
        },
        requests=run.scan("requests").with_columns(pl.col("^.*_ns$") + hour).collect(),
    )
    assert_frame_equal(serving(shifted, NO_ENERGY, question).figures, here)


def test_a_run_that_still_goes_on_is_read_in_parts(run_of, rewrite):
    run = with_chunks(run_of(), rewrite)
    whole = serving(run, NO_ENERGY, Question(by="bucket")).figures
    table = run.scan("requests").collect()
    rewrite(run, requests=None)
    for start in range(0, table.height, 40):
        PartWriter(run.path, "requests", prefix=f"p{start:04}").append(table.slice(start, 40))
    assert_frame_equal(serving(run, NO_ENERGY, Question(by="bucket")).figures, whole)


def test_a_null_where_none_may_be_is_named_with_its_column_and_row(run_of, rewrite):
    run = run_of()
    third = pl.when(pl.int_range(pl.len()) != 2).then("request_id").alias("request_id")
    broken = rewrite(run, requests=run.scan("requests").with_columns(third).collect())
    with pytest.raises(RunError, match=r"requests.parquet: column 'request_id' has a null in row 2"):
        serving(broken, NO_ENERGY)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question(by="colour"), "cannot group by 'colour'"),
        (Question(by="window", window_s=0.0), "give a positive length"),
        (Question(by="window", window_s=1e-3), "more than 2,000; give a longer one"),
    ],
)
def test_a_question_without_an_answer_says_so(run_of, question, message):
    with pytest.raises(AnalysisError, match=message):
        serving(run_of(), NO_ENERGY, question)


def test_a_run_in_which_nothing_ended_says_what_to_do(run_of, rewrite):
    run = rewrite(run_of(), {"state": "failed"}, requests=None)
    with pytest.raises(AnalysisError, match=r"no request had ended .*state: failed.*replay it again"):
        serving(run, NO_ENERGY)
    empty = pl.DataFrame(schema=run_of("other").scan("requests").collect_schema())
    with pytest.raises(AnalysisError, match="no request was sent"):
        serving(rewrite(run, {"measure_start_ns": None, "measure_end_ns": None}, requests=empty), NO_ENERGY)


def test_a_joule_bought_nothing_less_for_what_the_warm_up_took(warmed):
    run = warmed(8.0, duration_s=20.0)
    energy = ensure_energy(run)
    measured_j, warmup_j = energy.summary["measured_j"], energy.summary["warmup_j"]
    answer = serving(run, energy)
    whole, ours_j = answer.whole, measured_j - warmup_j
    assert whole["measured_j"] == pytest.approx(measured_j)
    assert whole["power_w"] == pytest.approx(measured_j / whole["duration_s"])
    assert whole["output_tokens_per_joule"] == pytest.approx(whole["output_tokens"] / ours_j)
    assert whole["goodput_per_watt"] == pytest.approx(whole["slo_met"] / ours_j)
    product = ours_j / whole["answered"] * whole["e2el_ms_mean"] / 1e3
    assert whole["energy_delay_product"] == pytest.approx(product)
    assert sum("left out of what is per joule" in remark for remark in answer.remarks) == 1
    assert not any("is not known" in remark for remark in answer.remarks)


def test_a_stretch_with_a_part_of_the_warm_ups_time_is_said_to_have_a_part_of_its_joules(warmed):
    run = warmed(8.0, duration_s=20.0)
    answer = serving(run, ensure_energy(run), Question(by="window", window_s=0.05))
    assert any("how much of it in each stretch of time is not known" in remark for remark in answer.remarks)
    figures = answer.figures
    last = figures.row(-3, named=True)  # long after the warm-up's requests
    assert last["goodput_per_watt"] == pytest.approx(last["slo_met"] / last["measured_j"])
