"""The step recorder against vLLM's own schedulers, driven as its engine drives them."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from replay.engines.vllm import RECORDER_FOLDER
from replay.rundir import scan_table
from replay.steplog import StepLogDecoder, StepLogReader
from replay.steps import StepWriter

DRIVER = Path(__file__).parent / "drive_scheduler.py"


def unroll(segments):
    """One row a step and request, in the order of steps."""
    steps = pl.int_ranges("first_step", pl.col("last_step") + 1).alias("step")
    grown = pl.col("tokens_per_step") * (pl.col("step") - pl.col("first_step").cast(pl.Int64))
    rows = segments.with_columns(steps).explode("step").with_columns(context=pl.col("context_start") + grown)
    return rows.select("step", "request_id", "kind", pl.col("tokens_per_step").alias("tokens"), "context")


# Chunked prefill and prefix-cache hits everywhere; preemption where blocks are few.
SETTINGS = [
    {"name": f"{'async' if asynchronous else 'sync'}-{drafts}-{blocks}-{seed}", "asynchronous": asynchronous,
     "drafts": drafts, "blocks": blocks, "budget": 64, "seed": seed}
    for asynchronous in (False, True) for drafts in (0, 3) for blocks in (2000, 32) for seed in (1, 2, 3)
]  # fmt: skip


@pytest.fixture(scope="module")
def driven(vllm_python, tiny_model, offline, tmp_path_factory):
    """The folder of the driver's results; one process does them all, for importing vLLM takes long."""
    folder = tmp_path_factory.mktemp("driven")
    argv = [vllm_python, str(DRIVER), str(tiny_model), str(folder), json.dumps(SETTINGS)]
    env = offline | {"PYTHONPATH": str(RECORDER_FOLDER)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["name"])
def test_what_is_recorded_is_what_a_worker_computes(driven, tmp_path, settings):
    asynchronous, drafts, blocks = settings["asynchronous"], settings["drafts"], settings["blocks"]
    truth = json.loads((driven / f"{settings['name']}.json").read_text())
    writer = StepWriter(tmp_path, 0)
    decoder = StepLogDecoder(writer, 0, "0a1b2c3d")
    for frame in StepLogReader(driven / settings["name"]).frames():
        decoder.feed(frame)
    assert decoder.failed is None
    writer.write(writer.take())
    steps, segments = scan_table(tmp_path, "steps").collect(), scan_table(tmp_path, "segments").collect()
    assert decoder.settings["scheduler"] == ("AsyncScheduler" if asynchronous else "Scheduler")
    rows = unroll(segments)
    seen = [{} for _ in truth["steps"]]
    for step, request_id, _, tokens, context in rows.iter_rows():
        seen[step][request_id] = [tokens, context]
    assert len(seen) == steps.height
    expected = [{int(i.split("-")[2]): part for i, part in step.items()} for step in truth["steps"]]
    assert seen == expected

    preemptions, cached, generated, prompts = (
        {int(i.split("-")[2]): count for i, count in truth[key].items()}
        for key in ("preemptions", "cached", "generated", "prompts")
    )
    assert (sum(preemptions.values()) > 0) == (blocks == 32), "the workload is what its name says"
    assert sum(cached.values()) > 0
    sums = Counter()
    for _, request_id, kind, tokens, _ in rows.iter_rows():
        sums[request_id, kind] += tokens
    for i, count in generated.items():
        if not preemptions[i]:
            left = prompts[i] - cached[i]
            # vLLM pads a prompt of which one token is left with drafts.
            assert sums[i, "prefill"] - left in ({0, drafts} if left == 1 else {0})
            if not drafts:
                assert sums[i, "decode"] == count - 1
    totals = rows.group_by("step").agg(
        prefill=pl.col("tokens").filter(pl.col("kind") == "prefill").sum(),
        decode=pl.col("tokens").filter(pl.col("kind") == "decode").sum(),
        context=pl.col("context").filter(pl.col("kind") == "decode").sum(),
    )
    totals = totals.sort("step").select(pl.col("prefill", "decode", "context").cast(pl.Int64))
    columns = ["prefill_tokens", "decode_tokens", "context_tokens"]
    assert totals.rows() == steps.select(pl.col(columns).cast(pl.Int64)).rows()
    assert (steps["end_ns"] >= steps["start_ns"]).all()
    assert (steps["start_ns"][1:] >= steps["end_ns"][:-1]).all(), "steps do not overlap, though two are in flight"
