"""Each reason to doubt a run is found, with the joules that it is about."""

import json
import sys

import numpy as np
import polars as pl
import pytest

from analysis.cli import main
from analysis.doubts import check_run, parse_bound
from analysis.doubts_sensor import _estimates
from analysis.doubts_work import _asked
from analysis.evidence import gather
from analysis.saved import ensure_energy
from analysis.stretches import Meter, joules_between, meters, survey
from replay.rundir import Run
from tracegen.errors import AnalysisError
from tracegen.schema import write_trace

NS = 10**9
SMALL = {"duration_s": 20.0}


def doubt(run, name, **options):
    return next(d for d in check_run(run, **options).doubts if d.name == name)


def window(run):
    return run.manifest["measure_start_ns"], run.manifest["measure_end_ns"]


def between(run, begin_s, end_s):
    start = run.manifest["measure_start_ns"]
    return pl.col("t_ns").is_between(start + int(begin_s * NS), start + int(end_s * NS))


def sampled_j(frame, where):
    """Joules of the rows where `where` holds, each for the time since the one before on its GPU."""
    total = 0.0
    for rows in frame.sort("gpu", "t_ns").partition_by("gpu"):
        dt_s = np.diff(rows["t_ns"].to_numpy()) / 1e9
        chosen = rows.select(where).to_series().to_numpy()[1:]
        total += float((rows["power_instant_mw"].to_numpy()[1:] / 1e3 * dt_s)[chosen].sum())
    return total


def test_a_sound_run_passes_and_says_that_it_is_simulated(run_of):
    check = check_run(run_of(**SMALL), 0.05)
    assert check.passed
    assert {d.name for d in check.doubts if d.status == "doubt"} <= {"simulated", "meter_gain", "counter_agrees"}
    assert len({d.name for d in check.doubts}) == len(check.doubts)
    json.dumps(check.document(), allow_nan=False)


def test_power_that_no_board_draws_is_in_doubt_with_all_its_joules_and_no_figure_changes(run_of, rewrite):
    run = run_of(**SMALL)
    assert doubt(run, "board_power").status == "ok"
    power = run.scan("power").collect().with_columns(
        pl.lit(4_000_000_000, pl.UInt32).alias("power_instant_mw"),
        pl.lit(None, pl.UInt32).alias("power_average_mw"),
        pl.lit(None, pl.UInt64).alias("energy_mj"),
    )  # fmt: skip
    run = rewrite(run, power=power)
    found = doubt(run, "board_power")
    assert (found.status, found.joules) == ("doubt", ensure_energy(run).summary["measured_j"])
    assert found.joules == pytest.approx(2 * 4e6 * ensure_energy(run).summary["window"]["duration_s"], rel=1e-3)
    assert "a GPU drew 4,000,000 W in the mean" in found.why
    assert "board_power" in {d.name for d in check_run(run).serious}


def test_power_far_above_its_cap_is_in_doubt(run_of, rewrite):
    run = run_of(**SMALL)
    mean_w = ensure_energy(run).summary["measured_j"] / ensure_energy(run).summary["window"]["duration_s"] / 2
    for cap_w, status in ((mean_w / 2.9, "ok"), (mean_w / 3.1, "doubt")):
        run = rewrite(run, {"instances": [{**run.manifest["instances"][0], "power_cap_w": cap_w}]})
        assert doubt(run, "board_power").status == status


def test_why_a_request_has_no_energy_is_the_true_reason(run_of, rewrite):
    """Idle power that takes everything, readings that end early, a record that was lost."""
    run = run_of(**SMALL)
    start, end = window(run)
    power, segments = (run.scan(name).collect() for name in ("power", "segments"))
    early = rewrite(run, power=power.filter(pl.col("t_ns") < (start + end) // 2))
    summary = ensure_energy(early).summary
    unread = early.scan("requests").filter(pl.col("sent_ns") >= summary["window"]["end_ns"]).collect().height
    assert summary["requests_without_energy"] == {"unread": unread}
    assert f"{unread} requests ran while no power was read: energy is null, not zero" in summary["notes"]
    assert f"{unread} ran while no power was read" in doubt(early, "no_record").why
    lost = rewrite(run, power=power, segments=segments.filter(pl.col("request_id") != segments["request_id"][0]))
    summary = ensure_energy(lost).summary
    assert summary["requests_without_energy"] == {"unrecorded": 1}
    assert "1 request left no record of work: energy is null, not zero" in summary["notes"]
    high = {"counter": 9900.0, "instant": 9900.0}
    gpus = [{**gpu, "idle_power_w": high, "idle_power_after_w": high} for gpu in run.manifest["gpus"]]
    idle = rewrite(run, {"gpus": gpus}, segments=segments)
    reasons = ensure_energy(idle).summary["requests_without_energy"]
    assert set(reasons) <= {"idle"}
    assert sum(reasons.values()) == ensure_energy(idle).requests["energy_j"].null_count()


def test_where_nobody_has_energy_another_clock_is_suspected(run_of, rewrite):
    run = run_of(**SMALL)
    times = ["scheduled_ns", "sent_ns", "headers_ns", "first_token_ns", "last_token_ns", "done_ns"]
    requests = run.scan("requests").with_columns(pl.col(times) + 3600 * NS).collect()
    steps = run.scan("steps").with_columns(pl.col("start_ns", "end_ns") + 3600 * NS).collect()
    run = rewrite(run, requests=requests, steps=steps)
    found = doubt(run, "no_record")
    assert found.joules == ensure_energy(run).summary["measured_j"]
    assert f"{requests.height} ran while no power was read, so that nobody has energy" in found.why
    assert "another clock" in found.why


def test_drifting_idle_power_counts_half_its_difference_all_the_time(run_of, rewrite):
    run = run_of(**SMALL)
    gpus = [{**g, "idle_power_after_w": {"counter": 120.0}} for g in run.manifest["gpus"]]
    run = rewrite(run, {"gpus": gpus})
    start, end = window(run)
    assert doubt(run, "idle_drift").joules == pytest.approx(2 * 20.0 / 2 * (end - start) / NS, rel=1e-9)
    assert doubt(run, "idle_drift").status == "doubt"


def test_idle_power_that_is_missing_after_the_run_is_trusted_to_two_per_cent(run_of, rewrite):
    run = run_of(**SMALL)
    run = rewrite(run, {"gpus": [{**g, "idle_power_after_w": None} for g in run.manifest["gpus"]]})
    start, end = window(run)
    found = doubt(run, "idle_baseline")
    assert found.joules == pytest.approx(0.02 * 200.0 * (end - start) / NS, rel=1e-9)
    assert "none after the run for 2 of 2 GPUs" in found.why
    assert doubt(run, "idle_drift").status == "unknown"


def test_holes_count_at_the_mean_power_of_the_rest(run_of, rewrite):
    run = run_of(**SMALL)
    frame = run.scan("power").collect()
    kept = frame.filter(~between(run, 12, 15))
    found = doubt(rewrite(run, power=kept), "sensor_gaps")
    assert "2 holes of more than 0.5 s" in found.why
    whole_s = 2 * (window(run)[1] - window(run)[0]) / NS
    assert found.joules == pytest.approx(sampled_j(frame, between(run, 0, 1e6)) * 6.0 / whole_s, rel=0.2)


def test_failed_polls_are_counted(run_of, rewrite):
    run = run_of(**SMALL)
    null = [
        pl.when(between(run, 5, 5.3)).then(None).otherwise(pl.col(c)).alias(c)
        for c in ("power_instant_mw", "energy_mj")
    ]
    frame = run.scan("power").collect()
    failed = frame.filter(between(run, 5, 5.3)).height
    found = doubt(rewrite(run, power=frame.with_columns(null)), "failed_polls")
    assert found.why.startswith(f"{failed} of ")


@pytest.mark.parametrize(
    ("column", "value", "name", "words"),
    [
        ("sm_clock_mhz", 1500, "clocks_off", "10.0 of "),
        ("throttle_reasons", 0x4, "throttled", "software power cap for 10.0 GPU-seconds"),
        ("throttle_reasons", 0x40, "throttled", "hardware thermal slowdown for 10.0 GPU-seconds"),
    ],
)
def test_time_off_the_clock_and_throttled_time_have_the_joules_spent_in_them(
    run_of, rewrite, column, value, name, words
):
    run = run_of(**SMALL)
    usual = {"sm_clock_mhz": 1980, "throttle_reasons": 0}[column]
    inside = between(run, 10, 15 - 1e-6)
    dtype = run.scan("power").collect_schema()[column]
    frame = run.scan("power").with_columns(
        pl.when(inside).then(value).otherwise(usual).cast(dtype).alias(column)
    ).collect()  # fmt: skip
    found = doubt(rewrite(run, power=frame), name)
    assert words in found.why
    assert found.joules == pytest.approx(sampled_j(frame, inside), rel=1e-9)
    assert found.status == "doubt"


def test_a_clock_read_while_the_gpu_slept_says_nothing(run_of, rewrite):
    run = run_of(**SMALL)
    schema = run.scan("power").collect_schema()
    asleep = [pl.lit(345).cast(schema["sm_clock_mhz"]).alias("sm_clock_mhz")]
    asleep.append(pl.lit(1).cast(schema["throttle_reasons"]).alias("throttle_reasons"))
    run = rewrite(run, power=run.scan("power").with_columns(asleep).collect())
    assert doubt(run, "clocks_off").joules == 0
    assert doubt(run, "throttled").status == "ok"


def test_late_requests_and_failed_ones_have_their_own_joules(run_of, rewrite):
    run = run_of(**SMALL)
    requests = run.scan("requests").collect().with_row_index("row")
    late, failed = pl.col("row") < 7, pl.col("row").is_between(20, 24)
    requests = requests.with_columns(
        pl.when(late).then(pl.col("scheduled_ns") - 50_000_000).otherwise(pl.col("scheduled_ns")).alias("scheduled_ns"),
        pl.when(failed).then(pl.lit("timeout")).otherwise(pl.col("status")).alias("status"),
    )
    run = rewrite(run, requests=requests.drop("row"))
    energy = ensure_energy(run).requests.join(requests.select("request_id", "row"), on="request_id")
    assert doubt(run, "dispatch_lag").joules == pytest.approx(energy.filter(late)["energy_j"].sum(), rel=1e-12)
    assert doubt(run, "not_ok").joules == pytest.approx(energy.filter(failed)["energy_j"].sum(), rel=1e-12)
    assert "5 timeout" in doubt(run, "not_ok").why


def test_what_is_not_in_requests_is_not_ours(run_of, rewrite):
    run = run_of(**SMALL)
    requests = run.scan("requests").collect()
    run = rewrite(run, requests=requests.head(requests.height // 2))
    found = doubt(run, "not_ours")
    assert found.joules == pytest.approx(ensure_energy(run).summary["other_j"])
    assert not check_run(run).passed


def test_steps_without_a_row_count_as_mean_steps(run_of, rewrite):
    run = run_of(**SMALL)
    steps = run.scan("steps").collect()
    gone = pl.col("step").is_between(100, 149)
    run = rewrite(run, steps=steps.filter(~gone))
    found = doubt(run, "steps_missing")
    assert found.why == f"50 of {steps.height:,} step numbers have no row"
    summary = ensure_energy(run).summary
    busy_j = summary["measured_j"] - summary["idle_j"]
    assert found.joules == pytest.approx(busy_j * 50 / steps.height)


def test_prefixes_are_asked_for_up_to_the_first_block_that_is_new(tmp_path, run_of):
    run = run_of(**SMALL)
    trace = pl.DataFrame(
        {
            "request_id": pl.Series([1, 2, 3, 4], dtype=pl.UInt64),
            "arrival_ns": [0, 1, 2, 3],
            "input_tokens": pl.Series([48] * 4, dtype=pl.UInt32),
            "output_tokens": pl.Series([1] * 4, dtype=pl.UInt32),
            "prefix_hashes": pl.Series([[7, 8], [7, 9], [7, 10, 8], None], dtype=pl.List(pl.UInt64)),
        }
    )
    write_trace(trace, run.path / "trace.parquet", {"block_tokens": 16})
    assert dict(_asked(Run.open(run.path)).iter_rows()) == {1: 0, 2: 16, 3: 16}


def test_hits_that_nobody_asked_for_are_priced_as_prefill(run_of, rewrite):
    run = run_of(**SMALL)
    requests = run.scan("requests").collect().with_row_index("row")
    hit = pl.when(pl.col("row") < 10).then(32).otherwise(0).cast(pl.UInt32).alias("cached_tokens")
    run = rewrite(run, requests=requests.with_columns(hit).drop("row"))
    energy = ensure_energy(run).requests
    computed = requests["input_tokens"].sum() - int(requests.head(10)["input_tokens"].clip(0, 32).sum())
    found = doubt(run, "prefix_cache")
    assert found.joules == pytest.approx(320 * energy["prefill_j"].sum() / computed)
    assert "320 of 320 cached tokens" in found.why
    assert "estimate" in found.why


def test_a_run_without_power_fails_and_still_says_what_else_is_known(run_of, rewrite):
    check = check_run(rewrite(run_of(**SMALL), power=None))
    assert not check.passed
    assert check.measured_j is None
    by_name = {d.name: d for d in check.doubts}
    assert "has no power samples" in by_name["attribution"].why
    assert by_name["dispatch_lag"].why
    assert by_name["steps_missing"].joules is None
    json.dumps(check.document(), allow_nan=False)


def test_a_run_without_step_records_is_said_to_be_guessed(run_of, rewrite):
    run = rewrite(run_of(**SMALL), {"no_steps": "asked for with --no-record-steps"}, steps=None, segments=None)
    found = doubt(run, "membership")
    assert found.joules == pytest.approx(ensure_energy(run).summary["measured_j"])
    assert "asked for with --no-record-steps" in found.why


def test_an_unfinished_run_that_shared_its_gpus_says_both(run_of, rewrite):
    run = rewrite(run_of(**SMALL), {"state": "interrupted", "gpus_shared_with": ["gpu 0: process 42"]})
    assert doubt(run, "incomplete").status == "doubt"
    assert "process 42" in doubt(run, "gpus_shared").why


def test_the_order_and_the_batches_of_the_readings_change_nothing(run_of, rewrite, monkeypatch):
    run = run_of(**SMALL)
    plain = survey(run, meters(run), window(run))
    monkeypatch.setattr("replay.rundir._BATCH_ROWS", 97)
    assert vars(survey(run, meters(run), window(run)))["whole"].joules == pytest.approx(plain.whole.joules, rel=1e-12)
    shuffled = run.scan("power").collect().sample(fraction=1.0, shuffle=True, seed=3)
    again = survey(rewrite(run, power=shuffled), meters(run), window(run))
    assert again.whole.joules == pytest.approx(plain.whole.joules, rel=1e-12)
    assert again.whole.count == plain.whole.count
    by_gpu = survey(rewrite(run, power=shuffled.sort("gpu", "t_ns")), meters(run), window(run))
    assert by_gpu.whole.seconds == pytest.approx(plain.whole.seconds, rel=1e-12)


def test_parts_of_a_window_add_up_to_it(run_of):
    run = run_of(**SMALL)
    start, end = window(run)
    edges = [start, start + 7 * NS, start + 19 * NS, end]
    parts = joules_between(run, meters(run), edges)
    assert parts.sum() == pytest.approx(joules_between(run, meters(run), [start, end]).sum(), rel=1e-12)
    assert parts.min() > 0


def test_gpus_that_are_not_asked_for_are_left_out(run_of):
    run = run_of(**SMALL)
    one = survey(run, [Meter("node", 1)], window(run))
    assert one.gpus == 1
    assert one.whole.seconds == pytest.approx(survey(run, meters(run), window(run)).whole.seconds / 2, rel=1e-6)


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0.02", 0.02), ("100%", 1.0)])
def test_a_bound_is_a_share(text, value):
    assert parse_bound(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["5", "-1%", "nan", "five", ""])
def test_another_bound_is_refused(text):
    with pytest.raises(AnalysisError, match="--bound"):
        parse_bound(text)


@pytest.mark.parametrize(("bound", "code"), [("5%", 0), ("0", 1)])
def test_the_exit_status_is_one_where_a_doubt_is_larger_than_the_bound(run_of, monkeypatch, capsys, bound, code):
    monkeypatch.setattr(sys, "argv", ["analysis", "check", str(run_of(**SMALL).path), "--bound", bound])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert (exit_.value.code or 0) == code
    out = capsys.readouterr().out
    assert "SIMULATED" in out
    assert ("NOT TO BE TRUSTED" in out) == bool(code)


def test_steps_on_another_clock_put_all_of_the_energy_in_doubt(run_of, rewrite):
    run = run_of(**SMALL)
    hour = pl.col("start_ns", "end_ns") + 3600 * NS
    check = check_run(rewrite(run, steps=run.scan("steps").with_columns(hour).collect()))
    assert not check.passed
    assert check.serious[0].name == "no_record"
    assert check.serious[0].joules == check.measured_j


def test_idle_power_above_what_the_run_drew_is_serious(run_of, rewrite):
    run = run_of(**SMALL)
    watts = {"counter": 2000.0}
    gpus = [{**g, "idle_power_w": watts, "idle_power_after_w": watts} for g in run.manifest["gpus"]]
    check = check_run(rewrite(run, {"gpus": gpus}))
    assert "idle_baseline" in {doubt.name for doubt in check.serious}


def told(run, rewrite, **sensor):
    """`run` with a manifest that tells something else of the power sensor; None: nothing."""
    instant = {"period_ns": 10**8, "window_ns": 25 * 10**6, "lag_ns": 0} | sensor
    sensors = {"instant": {key: value for key, value in instant.items() if value is not None}}
    return rewrite(run, {"gpus": [{**gpu, "sensors": sensors} for gpu in run.manifest["gpus"]]})


def test_a_sensor_that_is_not_as_the_manifest_tells_counts_what_it_puts_on_other_bills(run_of, rewrite):
    right = run_of()
    assert doubt(right, "sensor_windows").status == "ok"
    known_j = ensure_energy(right).requests["energy_j"]
    wrong = told(run_of("wrong"), rewrite, window_ns=10**9)
    found = doubt(wrong, "sensor_windows")
    assert found.status == "doubt"
    assert "gpu 0 on node: the manifest gives the instant sensor a window 1000 ms where the run shows 2" in found.why
    off_j = float((ensure_energy(wrong).requests["energy_j"] - known_j).abs().sum()) / 2
    assert found.joules == pytest.approx(off_j, rel=0.5)


def test_a_sensor_of_which_nothing_is_told_is_not_compared(run_of, rewrite):
    found = doubt(told(run_of(**SMALL), rewrite, window_ns=None), "sensor_windows")
    assert found.status == "unknown"
    assert "tells no sensor's window" in found.why


def test_a_sensor_whose_readings_seem_to_come_early_is_checked_as_one_without_a_lag(run_of, rewrite):
    run = run_of()
    early = run.scan("power").with_columns(pl.col("^.*_ns$") - 20_000_000).collect()
    run = told(rewrite(run, power=early), rewrite, window_ns=10**9)
    found = doubt(run, "sensor_windows")
    assert all(estimate.lag_s < 0 for _, estimate in _estimates(gather(run)).values())
    assert found.status == "doubt"
    assert "where the run shows" in found.why
