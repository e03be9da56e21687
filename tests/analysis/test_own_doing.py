"""A warm-up and a pause between two stretches of a run are its own doing, and no reason to doubt it."""

import json

import polars as pl
import pytest

from analysis.doubts import check_run
from analysis.saved import ensure_energy

NS = 10**9
SMALL = {"duration_s": 20.0}


def doubt(run, name):
    return next(d for d in check_run(run).doubts if d.name == name)


def read_between(run, begin_s, end_s):
    start = run.manifest["measure_start_ns"]
    return pl.col("t_ns").is_between(start + int(begin_s * NS), start + int(end_s * NS))


def test_work_for_the_warm_up_is_not_held_against_others(warmed):
    """Neither is it ours: the joules of requests, idle and other add up as ever."""
    run = warmed(10.0, **SMALL)
    summary = ensure_energy(run).summary
    assert 0 < summary["warmup_j"] == pytest.approx(summary["other_j"])
    assert summary["residual_j"] == pytest.approx(0, abs=1e-6)
    found = doubt(run, "not_ours")
    assert (found.status, found.joules) == ("ok", pytest.approx(0, abs=1e-6))
    assert "are the run's own warm-up" in found.why


def test_strangers_are_still_found_beside_a_warm_up(warmed, rewrite):
    run = warmed(10.0, **SMALL)
    ours = ~pl.col("request_id").is_in(run.scan("requests").collect()["request_id"][-5:].implode())
    run = rewrite(run, **{name: run.scan(name).filter(ours).collect() for name in ("requests", "trace")})
    summary = ensure_energy(run).summary
    found = doubt(run, "not_ours")
    assert found.status == "doubt"
    assert found.joules == pytest.approx(summary["other_j"] - summary["warmup_j"])


def test_a_saved_attribution_that_does_not_tell_the_warm_ups_share_is_made_anew(warmed):
    run = warmed(10.0, **SMALL)
    known = ensure_energy(run).summary
    path = run.path / "energy" / "summary.json"
    path.write_text(json.dumps({key: value for key, value in known.items() if key != "warmup_j"}))
    assert ensure_energy(run).summary["warmup_j"] == pytest.approx(known["warmup_j"])


def paused(run, begin_s, end_s):
    """The manifest's keys of a run that lay between two stretches."""
    start, end = (run.manifest[f"measure_{end}_ns"] for end in ("start", "end"))
    at = [start, start + int(begin_s * NS), start + int(end_s * NS), end]
    return {
        "stretches": [{"start_ns": a, "end_ns": b, "boot_id": "x"} for a, b in (at[:2], at[2:])],
        "paused_s": end_s - begin_s,
    }


def test_a_pause_of_a_run_that_was_resumed_is_no_hole_and_no_restart_of_the_counter(run_of, rewrite):
    run = run_of(**SMALL)
    kept = run.scan("power").collect().filter(~read_between(run, 6, 12))
    unexplained = rewrite(run, power=kept)
    assert {doubt(unexplained, name).status for name in ("sensor_gaps", "counter_sound")} == {"doubt"}
    assert any("no power reading for 6.1 s" in note for note in ensure_energy(unexplained).summary["notes"])
    resumed = rewrite(run, paused(run, 6, 12))
    gaps, sound, agrees = (doubt(resumed, name) for name in ("sensor_gaps", "counter_sound", "counter_agrees"))
    assert (gaps.status, gaps.joules, sound.status, sound.do) == ("ok", 0.0, "ok", "")
    assert "12.0 GPU-seconds that the run lay paused by --resume" in gaps.why
    assert "paused by --resume" in sound.why
    lasted_s = ensure_energy(resumed).summary["window"]["duration_s"]
    assert f"of {lasted_s:.1f} s, where both were read" in agrees.why
    compared_s = float(agrees.why.partition(" over ")[2].partition(" s")[0])
    assert compared_s == pytest.approx(lasted_s - 6, abs=0.2)  # as long as no reading of either lasts
    notes = ensure_energy(resumed).summary["notes"]
    assert not any("no power reading" in note for note in notes)
    assert any("paused by --resume for 6.0 s at 6 s" in note for note in notes)


def test_what_was_not_read_beside_a_pause_is_a_hole_still(run_of, rewrite):
    run = run_of(**SMALL)
    kept = run.scan("power").collect().filter(~read_between(run, 6, 12))
    resumed = rewrite(run, paused(run, 6, 9), power=kept)
    found = doubt(resumed, "sensor_gaps")
    assert found.status == "doubt"
    assert "2 holes of more than 0.5 s, 6.1 GPU-seconds in all, the longest 3.1 s" in found.why
    assert doubt(resumed, "counter_sound").status == "doubt"
