"""Segments say, in few rows, exactly who did what in each step."""

import tempfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.rundir import scan_table
from replay.sim.scheduler import Request, Scheduler
from replay.sim.state import Limits
from replay.steps import SIM_STEP, StepWriter
from replay.tables import SEGMENTS, STEPS
from tracegen.errors import ReplayError


def add(recorder, start_ns, end_ns, batch, *extra):
    recorder.add(start_ns, end_ns, batch.work, batch.parts, batch.waiting, batch.kv_usage, *extra)


def record(run_dir, arrivals, scheduler, flush_every):
    """Run `arrivals` (step, prompt, output) to their end, flushing every so many steps; the number of steps."""
    recorder = StepWriter(run_dir, 3, extra=SIM_STEP)
    pending = [(step, Request(i, prompt, output)) for i, (step, prompt, output) in enumerate(arrivals)]
    step = 0
    while pending or scheduler.running or scheduler.waiting:
        while pending and pending[0][0] <= step:
            scheduler.add(pending.pop(0)[1])
        batch = scheduler.schedule()
        if batch.parts:
            add(recorder, step * 10, step * 10 + 7, batch, 1200.0, 1.0)
            scheduler.complete()
        if step % flush_every == 0:
            recorder.write(recorder.take())
        step += 1
    recorder.write(recorder.take())
    return step


def expand(segments):
    """One row a step and request."""
    return (
        segments.with_columns(step=pl.int_ranges("first_step", pl.col("last_step") + 1))
        .explode("step")
        .with_columns(
            step=pl.col("step").cast(pl.UInt64),
            context=pl.col("context_start")
            + pl.col("tokens_per_step") * (pl.col("step") - pl.col("first_step").cast(pl.Int64)),
            tokens=pl.col("tokens_per_step"),
        )
        .select("request_id", "step", "kind", pl.col("tokens", "context").cast(pl.Int64))
    )


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=6).map(sorted),
    st.integers(1, 25),
    st.integers(1, 30),
)
def test_expanded_segments_add_up_to_each_step(arrivals, budget_tokens, flush_every):
    scheduler = Scheduler(Limits(72, 4, 4, budget_tokens))
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder), arrivals, scheduler, flush_every)
        steps = scan_table(Path(folder), "steps").collect()
        rows = expand(scan_table(Path(folder), "segments").collect())
    assert not rows.select("request_id", "step").is_duplicated().any()
    prefill, decode = pl.col("kind") == "prefill", pl.col("kind") == "decode"
    sums = (
        rows.group_by("step")
        .agg(
            prefill_tokens=pl.col("tokens").filter(prefill).sum(),
            decode_tokens=pl.col("tokens").filter(decode).sum(),
            context_tokens=pl.col("context").filter(decode).sum(),
            prefill_attention=(pl.col("tokens") * (2 * pl.col("context") + pl.col("tokens"))).filter(prefill).sum()
            // 2,
            requests=pl.len(),
        )
        .sort("step")
    )
    columns = ["step", "prefill_tokens", "decode_tokens", "context_tokens", "prefill_attention", "requests"]
    assert sums.select(pl.col(columns).cast(pl.Int64)).equals(steps.select(pl.col(columns).cast(pl.Int64)))
    assert steps["step"].to_list() == list(range(steps.height))


def test_undisturbed_decoding_is_one_row(tmp_path):
    scheduler = Scheduler(Limits(4000, 4, 4, 64))
    record(tmp_path, [(0, 100, 201)], scheduler, flush_every=10_000)
    segments = scan_table(tmp_path, "segments").drop("instance", "request_id").collect()
    # The first flush comes after step 0.
    assert segments.rows() == [(0, 0, "prefill", 64, 0), (1, 1, "prefill", 36, 64), (2, 201, "decode", 1, 100)]


def test_tables_have_the_run_directorys_columns_and_the_clock(tmp_path):
    scheduler = Scheduler(Limits(400, 4, 4, 64))
    recorder = StepWriter(tmp_path, 3, extra=SIM_STEP)
    for request_id in (None, 18_446_744_073_709_551_615):
        scheduler.add(Request(request_id, 5, 1))
    scheduler.add(Request(7, 80, 1))
    add(recorder, 1_000, 2_000, scheduler.schedule(), 1980, 1.0)
    recorder.write(recorder.take())
    steps = scan_table(tmp_path, "steps").collect()
    assert steps.schema == {**STEPS, "clock_mhz": pl.Float64(), "heat": pl.Float64()}
    row = steps.row(0, named=True)
    assert row.pop("kv_usage") == pytest.approx((2 + 2 + 14) / 100)
    assert row == {
        "instance": 3, "step": 0, "start_ns": 1_000, "end_ns": 2_000, "prefill_tokens": 64, "decode_tokens": 0,
        "context_tokens": 0, "prefill_attention": (25 + 25 + 54 * 54) // 2, "requests": 3, "waiting": 0,
        "clock_mhz": 1980.0, "heat": 1.0,
    }  # fmt: skip
    segments = scan_table(tmp_path, "segments").collect()
    assert segments.schema == SEGMENTS
    assert segments["request_id"].to_list() == [None, 18_446_744_073_709_551_615, 7]


def test_steps_already_there_are_not_written_over(tmp_path):
    scheduler = Scheduler(Limits(400, 4, 4, 64))
    record(tmp_path, [(0, 4, 2)], scheduler, flush_every=1)
    with pytest.raises(ReplayError, match="already has steps of instance 3"):
        StepWriter(tmp_path, 3)
    StepWriter(tmp_path, 4)


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReplayError, match=r"cannot be written \(Not a directory\); record into another directory"):
        StepWriter(tmp_path / "file", 0)
