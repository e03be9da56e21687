"""Comparisons: known answers, coverage of the intervals, and what is said where data does not tell."""

import json

import numpy as np
import polars as pl
import pytest

from analysis.bootstrap import CELLS, Draws, compare_means, holm
from analysis.compare import MEASURED, Arm, arms_of, compare, compare_arms
from analysis.compare_text import bucket_rows, findings, limits, overall_rows, total_lines
from analysis.saved import RunEnergy, ensure_energy
from tracegen.errors import AnalysisError


def compared(a, b, **options):
    return compare(a, b, ensure_energy(a), ensure_energy(b), **options)


def of(result, metric, group="all"):
    return next(d for d in result.differences if (d.group, d.metric) == (group, metric))


def test_a_run_compared_with_itself_does_not_differ(run_of):
    a, b = run_of("a"), run_of("b")
    result = compared(a, b)
    for difference in result.differences:
        assert difference.difference_percent in (0.0, None)
        assert difference.verdict in ("not distinguishable", "too few pairs", "no data")
    assert any("the same, figure for figure" in line for line in limits(result))


def later(run, milliseconds):
    """The requests of `run` with their first tokens later, and what would have come before these."""
    moved = run.scan("requests").with_columns(pl.col("first_token_ns") + milliseconds * 1_000_000)
    return moved.with_columns(
        pl.max_horizontal(c, "first_token_ns").alias(c) for c in ("last_token_ns", "done_ns")
    ).collect()


def test_a_difference_is_found_with_its_size_and_sign(run_of, rewrite):
    a = run_of("a")
    b = rewrite(run_of("b"), requests=later(a, 100))
    result = compared(a, b)
    ttft = of(result, "ttft_ms")
    assert ttft.mean_b - ttft.mean_a == pytest.approx(100)
    assert ttft.verdict == "higher"
    assert 0 < ttft.low_percent < ttft.difference_percent < ttft.high_percent
    few = [d for d in result.differences if 0 < d.pairs < 10]
    assert few
    assert all(d.verdict == "too few pairs" and d.low_percent is None for d in few)
    assert compared(a, b).document() == result.document()


def test_different_traces_are_refused_unless_unpaired(run_of, rewrite):
    a, b = run_of("a"), rewrite(run_of("b"), {"trace_sha256": "1" * 64, "engine": "vllm"})
    with pytest.raises(AnalysisError, match="replayed different traces"):
        compared(a, b)
    result = compared(a, b, paired=False)
    assert result.differences[0].difference_percent == 0.0
    assert "the runs differ in engine: simulated and vllm" in result.warnings


def test_runs_without_a_common_request_are_refused(run_of, rewrite):
    a = run_of("a")
    b = rewrite(run_of("b"), requests=a.scan("requests").with_columns(pl.col("request_id") + 10**6).collect())
    with pytest.raises(AnalysisError, match="no request in common"):
        compared(a, b)


def test_requests_are_paired_by_id_whatever_their_order(run_of, rewrite):
    a = run_of("a")
    straight = of(compared(a, rewrite(run_of("b"), requests=later(a, 50))), "ttft_ms")
    table = later(a, 50).with_columns(pl.col("scheduled_ns").reverse())
    mixed = of(compared(a, rewrite(run_of("c"), requests=table.reverse())), "ttft_ms")
    assert (mixed.mean_b, mixed.low_percent) == pytest.approx((straight.mean_b, straight.low_percent), rel=0.1)
    lost = compared(a, rewrite(run_of("d"), requests=later(a, 50).tail(-5)))
    assert any("not every run served them in full: 5 requests" in warning for warning in lost.warnings)


def test_what_joules_rest_on_must_be_alike_or_is_said(run_of):
    a, b = run_of("a"), run_of("b")
    known = ensure_energy(a)
    other = RunEnergy(known.requests, known.summary | {"membership": "client timestamps", "scope": "node"})
    warnings = compare(a, b, known, other).warnings
    assert any("step records and client timestamps" in warning for warning in warnings)
    assert any("gpu and node" in warning for warning in warnings)


def sides(rng, runs, requests=80, run_sd=0.02, effect=0.0, noise=0.05):
    """Requests of very different cost, served by runs that differ by chance from each other and inside."""
    cost = rng.lognormal(5, 1, requests)
    made = [
        [cost * np.exp(shift + rng.normal(0, run_sd) + rng.normal(0, noise, requests)) for _ in range(runs)]
        for shift in (0.0, effect)
    ]
    return made[0], made[1]


@pytest.mark.parametrize("runs", [1, 2, 3, 5])
def test_intervals_cover_the_truth_as_often_as_they_say(runs):
    rng = np.random.default_rng(runs)
    run_sd = 0.02 if runs > 1 else 0.0  # one run of each knows nothing of how runs vary
    covered, trials = 0, 200
    for _ in range(trials):
        a, b = sides(rng, runs, run_sd=run_sd, effect=0.05)
        found = compare_means(a, b, Draws(rng), paired=True)
        covered += found.low_percent <= 100 * np.expm1(0.05) <= found.high_percent
    assert 0.9 <= covered / trials <= 1.0


def test_single_runs_take_the_luck_of_a_run_for_a_difference_and_repeats_do_not():
    rng = np.random.default_rng(5)
    told = {1: 0, 3: 0}
    for runs in told:
        for _ in range(60):
            a, b = sides(rng, runs, requests=300, run_sd=0.05)
            told[runs] += compare_means(a, b, Draws(rng), paired=True).p_value < 0.05
    assert told[1] > 30
    assert told[3] < 9


def test_pairs_tell_what_groups_cannot():
    a, b = sides(np.random.default_rng(2), 1, effect=0.05)
    assert compare_means(a, b, Draws(np.random.default_rng(0)), paired=True).p_value < 0.01
    assert compare_means(a, b, Draws(np.random.default_rng(0)), paired=False).p_value > 0.1


def test_effect_sizes_are_the_textbook_s():
    a, b = np.array([10.0, 20.0, 30.0, 40.0]), np.array([11.0, 22.0, 33.0, 42.0])
    draws = Draws(np.random.default_rng(0))
    assert compare_means([a], [b], draws, paired=True).effect_size == pytest.approx(2.0 / np.std([1, 2, 3, 2], ddof=1))
    pooled = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    assert compare_means([a], [b], draws, paired=False).effect_size == pytest.approx(2.0 / pooled)
    runs = [[np.array([x]) for x in side] for side in ((10.0, 11.0, 12.0), (13.0, 14.0, 15.0))]
    assert compare_means(*runs, draws, paired=True).effect_size == pytest.approx(3.0 * (1 - 3 / 15))  # Hedges' g


def test_random_groups_of_many_requests_give_the_same_uncertainty():
    rng = np.random.default_rng(3)
    a, b = sides(rng, 1, requests=20 * CELLS, noise=0.3)
    ratio = b[0].mean() / a[0].mean()
    exact = np.std(b[0] - ratio * a[0]) / np.sqrt(a[0].size) / b[0].mean()  # the delta method
    assert compare_means(a, b, Draws(rng), paired=True).se == pytest.approx(exact, rel=0.1)


def test_as_much_data_as_is_asked_for_finds_the_difference():
    rng = np.random.default_rng(4)
    a, b = sides(rng, 2, requests=200, run_sd=0.03, effect=0.03)
    first = compare_means(a, b, Draws(rng), paired=True)
    assert first.p_value > 0.05
    assert first.needed > 2
    found = [sides(rng, first.needed, requests=200, run_sd=0.03, effect=first.log_ratio) for _ in range(20)]
    told = [compare_means(*made, Draws(rng), paired=True).p_value < 0.05 for made in found]
    assert np.mean(told) > 0.5


def test_a_small_sample_asks_for_more_pairs():
    rng = np.random.default_rng(6)
    a, b = sides(rng, 1, requests=20, effect=0.005, run_sd=0.0)
    found = compare_means(a, b, Draws(rng), paired=True)
    assert found.p_value > 0.05
    assert found.needed > 20
    assert found.smallest_percent > abs(found.percent)


def test_holm_is_the_textbook_s():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def repeated(run_of, rewrite, count, shift_ms=0):
    """Runs of one setting whose first tokens differ by chance from run to run."""
    rng = np.random.default_rng(shift_ms)
    runs = []
    for i in range(count):
        run = run_of(f"run-{shift_ms}-{i}")
        runs.append(rewrite(run, requests=later(run, shift_ms + int(rng.integers(0, 20)))))
    return Arm(f"{shift_ms} ms", tuple(runs), tuple(ensure_energy(run) for run in runs))


def test_repeats_speak_of_runs_and_single_runs_say_that_they_do_not(run_of, rewrite):
    a, b = repeated(run_of, rewrite, 3), repeated(run_of, rewrite, 3, shift_ms=400)
    result = compare_arms(a, b)
    assert result.repeats
    assert of(result, "ttft_ms").verdict == "higher"
    assert of(result, MEASURED).verdict == "not distinguishable"
    assert not any("one run of a setting" in line for line in limits(result))
    assert len(total_lines(result)) == 6
    single = compared(a.runs[0], b.runs[0])
    assert any("do not speak of how much a repeated run would vary" in line for line in limits(single))
    assert "one run each" in findings(single)[0]
    for made in (result, single):
        assert len(findings(made)) == 3
        for headings, rows in (overall_rows(made), bucket_rows(made)):
            assert all(len(row) == len(headings) for row in rows)
        json.dumps(made.document(), allow_nan=False)


def test_copies_are_no_repeats(run_of):
    a, b = run_of("a"), run_of("b")
    arm = Arm("A", (a, b), (ensure_energy(a), ensure_energy(b)))
    assert any("do not differ from each other" in warning for warning in compare_arms(arm, arm).warnings)
    with pytest.raises(AnalysisError, match="named twice"):
        compare_arms(arm, Arm("B", (a, a), (ensure_energy(a), ensure_energy(a))))


def test_a_sentence_says_how_much_more_would_tell(run_of, rewrite):
    rng = np.random.default_rng(0)
    a = run_of("a")
    table = a.scan("requests").collect()
    noise = pl.Series((rng.normal(0, 200, table.height) * 1e6).astype(np.int64))
    b = rewrite(run_of("b"), requests=table.with_columns(pl.col("last_token_ns") + noise))
    said = next(line for line in limits(compared(a, b)) if line.startswith("E2E"))
    assert "not enough data to tell" in said or "no difference to speak of" in said
    assert "in 4 of 5 cases" in said


def test_words_name_settings(run_of, rewrite):
    def freq(name, mhz):
        run = run_of(name)
        return rewrite(run, {"instances": [{**run.manifest["instances"][0], "freq_mhz": mhz}]})

    runs = {name: freq(name, mhz) for name, mhz in (("a", 1980), ("b", 1200), ("c", 1980), ("d", 900))}

    def open_all(words):
        return [runs[w] for w in words], [RunEnergy(None, None) for _ in words]

    def names(words, by=None):
        return [(arm.name, [run.name for run in arm.runs]) for arm in arms_of(words, by, open_all)]

    assert names(["a", "b"]) == [("a", ["a"]), ("b", ["b"])]
    assert names(["a", "c", "vs", "b"]) == [("A (2 runs)", ["a", "c"]), ("b", ["b"])]
    by = [("freq_mhz 1980", ["a", "c"]), ("freq_mhz 1200", ["b"]), ("freq_mhz 900", ["d"])]
    assert names(["a", "b", "c", "d"], "freq_mhz") == by
    with pytest.raises(AnalysisError, match="nothing to compare by gpus"):
        names(["a", "b"], "gpus")
    for words, key, message in (
        (["a"], None, "do not say what to compare"),
        (["a", "b", "c"], None, "A1 A2 A3 vs B1 B2 B3"),
        (["vs", "b"], None, "both sides"),
        (["a", "vs", "b", "vs", "c"], None, "both sides"),
        (["a", "c"], "freq_mhz", "nothing to compare by freq_mhz"),
        (["a", "b"], "colour", "no 'colour' to compare by; it has .*freq_mhz"),
    ):
        with pytest.raises(AnalysisError, match=message):
            names(words, key)


def test_requests_of_another_runs_warm_up_are_said_to_be_left_out_for_that(run_of, warmed, rewrite):
    whole = run_of("whole", duration_s=20.0)
    late = warmed(8.0, name="late", duration_s=20.0)
    count = late.scan("warmup").collect().height
    assert f"left out, for they were due in a run's warm-up: {count} requests" in compared(whole, late).warnings
    failed = (
        late.scan("requests")
        .with_row_index("row")
        .with_columns(pl.when(pl.col("row") < 3).then(pl.lit("http_error")).otherwise("status").alias("status"))
    )
    warnings = compared(whole, rewrite(late, requests=failed.drop("row").collect())).warnings
    assert f"left out, for they were due in a run's warm-up: {count} requests" in warnings
    assert "left out, for not every run served them in full: 3 requests" in warnings


def test_a_run_is_not_charged_per_request_for_its_warm_up(warmed):
    run = warmed(8.0, duration_s=20.0)
    summary = ensure_energy(run).summary
    total = compared(run, run).totals[0]
    assert total[MEASURED] * total["served"] == pytest.approx(summary["measured_j"] - summary["warmup_j"])
