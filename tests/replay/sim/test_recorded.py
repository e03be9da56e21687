"""What the engine behind HTTP recorded in wall time comes out of virtual time as it was."""

import asyncio
import random
import signal
import subprocess
import sys

import aiohttp
import numpy as np
import polars as pl
import pytest

from replay.rundir import scan_table
from replay.sim.arguments import with_arguments
from replay.sim.blocks import content_keys
from replay.sim.hardware import Hardware
from replay.sim.profile import load_profile
from replay.sim.state import DECODE, Limits
from replay.sim.virtual import VirtualEngines, arrivals_of, serve

MHZ = 1980  # of a board that nobody locked
REQUESTS = 40
KV_TOKENS = 1600


@pytest.fixture(scope="module")
def options():
    """Of `vllm serve`: fewer slots, tokens a step and KV blocks than the bursts ask for."""
    profile = load_profile("dgx-h100", "llama-2-7b")
    used_bytes = (
        profile.memory.reserve_bytes + profile.model.weight_bytes + KV_TOKENS * profile.model.kv_bytes_per_token
    )
    utilization = (used_bytes + 1) / profile.memory.gpu_bytes
    limits = ["--max-num-seqs=6", "--max-num-batched-tokens=700", "--max-model-len=1000"]
    return [*limits, f"--gpu-memory-utilization={utilization!r}"]


@pytest.fixture(scope="module")
def hardware(options):
    return Hardware(with_arguments(load_profile("dgx-h100", "llama-2-7b"), options), 1)


@pytest.fixture(scope="module")
def workload():
    """(seconds, prompt, output tokens): two bursts of prompts, half of which begin alike, with some behind them."""
    rng = random.Random(4)
    shared = [rng.randrange(1000) for _ in range(200)]
    requests = []
    for i in range(REQUESTS):
        after_s = 3.5 * (i % 2) + (0 if i < REQUESTS // 2 else rng.uniform(0, 0.5))
        own = [rng.randrange(1000) for _ in range(rng.randint(1, 600))]
        requests.append((after_s, shared[: rng.randint(1, 200)] + own if i % 4 < 2 else own, rng.randint(1, 80)))
    return requests


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, workload, options):
    """The run directory of a server that has served `workload`."""
    folder = tmp_path_factory.mktemp("recorded")
    argv = [sys.executable, "-m", "replay.sim.server", "--hardware", "dgx-h100", "--model", "llama-2-7b", "--tp", "1"]
    argv += ["--board", str(folder / "board"), "--record", str(folder), "--port", "0", "--served-model-name", "m"]
    argv += [f"--vllm-arg={option}" for option in options]

    async def main(url):
        async def one(i, after_s, prompt, output):
            await asyncio.sleep(after_s)
            body = {"prompt": prompt, "max_tokens": output}
            async with session.post(f"{url}/v1/completions", json=body, headers={"X-Request-Id": str(i)}) as answer:
                assert answer.status == 200
                await answer.read()

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(one(i, *row) for i, row in enumerate(workload)))

    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            asyncio.run(main(process.stdout.readline().split()[-1]))
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def arrivals(recorded, workload):
    """The recorded arrivals with their sizes and keys, the keys, and the request ids in that order."""
    table = scan_table(recorded, "arrivals").collect()
    came = [workload[i] for i in table["request_id"]]
    rows = arrivals_of(table["arrival_ns"].to_numpy(), [len(prompt) for _, prompt, _ in came], [row[2] for row in came])
    keys = [content_keys(np.array(prompt, np.uint64), 16) for _, prompt, _ in came]
    rows["keys_count"] = [len(own) for own in keys]
    rows["keys_at"] = np.cumsum(rows["keys_count"]) - rows["keys_count"]
    return rows, np.concatenate(keys), table["request_id"].to_list()


def parts(segments):
    """Everyone's part in every step: (step, request, kind, tokens, context)."""
    return {
        (first + k, request, kind, tokens, context + k * tokens)
        for request, first, last, kind, tokens, context in segments for k in range(last - first + 1)
    }  # fmt: skip


COLUMNS = ("start_ns", "end_ns", "prefill_tokens", "decode_tokens", "context_tokens", "requests", "waiting", "kv_usage")


def check(served, ids, run_dir):
    """`served` has the steps and segments of `run_dir`."""
    steps, segments = scan_table(run_dir, "steps").collect(), scan_table(run_dir, "segments").collect()
    for column in COLUMNS:
        assert served.steps[column].tolist() == steps[column].to_list(), column
    assert (served.steps["attention_twice"] // 2).tolist() == steps["prefill_attention"].to_list()
    mine = (
        (ids[s["number"]], int(s["first_step"]), int(s["last_step"]), "decode" if s["kind"] == DECODE else "prefill",
         int(s["tokens_per_step"]), int(s["context_start"]))
        for s in served.segments
    )  # fmt: skip
    columns = ("request_id", "first_step", "last_step", "kind", "tokens_per_step", "context_start")
    assert parts(mine) == parts(segments.select(columns).iter_rows())


def test_recorded_arrivals_and_step_times_give_the_same_batches(recorded, hardware, arrivals):
    rows, keys, ids = arrivals
    steps = scan_table(recorded, "steps").collect()
    pinned = steps.select("start_ns", "end_ns").to_numpy()
    # A clock that steps would not have had: their times are the recorded ones.
    engines = VirtualEngines(hardware, 800, keys=keys, pinned=pinned)
    served = serve(engines, rows)
    check(served, ids, recorded)
    assert steps["waiting"].max() > 0, "the workload makes some wait"
    assert (steps["start_ns"][1:] > steps["end_ns"][:-1]).any(), "and the engine idle"
    assert served.done["cached_tokens"].max() > 0, "it finds prefixes"
    assert engines.preemptions > 0, "and preempts"


def test_recorded_arrivals_alone_give_the_same_batches_at_the_same_times(recorded, hardware, arrivals):
    rows, keys, ids = arrivals
    check(serve(VirtualEngines(hardware, MHZ, keys=keys), rows), ids, recorded)


def test_every_request_arrives_once_and_before_its_first_step(recorded):
    arrivals = scan_table(recorded, "arrivals").collect()
    assert sorted(arrivals["request_id"]) == list(range(REQUESTS))
    steps, segments = scan_table(recorded, "steps").collect(), scan_table(recorded, "segments").collect()
    first = segments.group_by("request_id").agg(pl.col("first_step").min())
    began = first.join(steps, left_on="first_step", right_on="step").join(arrivals, on="request_id")
    assert (began["arrival_ns"] <= began["start_ns"]).all()


def test_keys_finer_than_a_block_stand_for_all_that_is_before_their_end(hardware):
    """Blocks of 16 tokens, a key every 4: a block is found when its last four tokens' key is the same."""
    limits = Limits(kv_tokens=16 * 100, block_tokens=16, max_num_seqs=4, max_num_batched_tokens=512)
    keys = np.array([*range(1, 11), *range(1, 7), *range(107, 111), *range(1, 9), 209, 210], np.uint64)
    arrivals = arrivals_of(np.arange(3) * 10**9, [41, 41, 41], [1, 1, 1])
    arrivals["keys_at"], arrivals["keys_count"] = [0, 10, 20], 10
    served = serve(VirtualEngines(hardware, MHZ, limits=limits, keys=keys, key_tokens=4), arrivals)
    assert served.done["cached_tokens"].tolist() == [0, 16, 32]
