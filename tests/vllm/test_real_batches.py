"""A real run of vLLM, and the batches that the simulated scheduler forms from its arrivals and step times."""

import subprocess
import sys
from itertools import accumulate, islice

import numpy as np
import polars as pl
import pytest

from replay.rundir import Run
from replay.sim.blocks import mix
from replay.sim.hardware import Hardware
from replay.sim.profile import load_profile
from replay.sim.state import DECODE, Limits
from replay.sim.virtual import VirtualEngines, arrivals_of, serve
from tracegen.schema import TRACE, write_trace

BLOCK = 128  # tokens of the trace's blocks
# Chunked prefill, fewer slots and KV blocks than the bursts ask for; blocks of the cache are finer than the trace's.
VLLM = [
    "--served-model-name=tiny", "--load-format=dummy", "--dtype=bfloat16", "--max-model-len=2048", "--enforce-eager",
    "--no-async-scheduling", "--block-size=32", "--num-gpu-blocks-override=80", "--max-num-seqs=16",
    "--max-num-batched-tokens=256",
]  # fmt: skip


def make_trace(path):
    """Four bursts of 30 requests; three in four of them begin as others do."""
    rng = np.random.default_rng(5)
    arrival_ms = np.sort(1500 * (np.arange(120) // 30) + rng.integers(0, 400, 120))
    hashes = [[[], [1, 2, 3], [1, 2, 4], [5]][i] for i in rng.integers(0, 4, 120)]
    columns = {
        "request_id": np.arange(100, 220),
        "arrival_ns": arrival_ms * 1_000_000,
        "input_tokens": BLOCK * np.array([len(one) for one in hashes]) + rng.integers(1, 300, 120),
        "output_tokens": rng.integers(1, 150, 120),
    }
    prefixes = pl.Series("prefix_hashes", hashes, dtype=pl.List(pl.UInt64))
    trace = pl.DataFrame(columns, schema=TRACE).with_columns(prefixes)
    write_trace(trace, path, {"generator": "test", "block_tokens": BLOCK})
    return trace


@pytest.fixture
def run(driver, offline, tmp_path, tiny_model, vllm_python):
    """That trace, run by `replay run` on vLLM."""
    make_trace(tmp_path / "trace.parquet")
    argv = [sys.executable, "-m", "replay.cli", "run", tmp_path / "trace.parquet", "--engine", "vllm", "--model"]
    argv += [tiny_model, "--vllm-python", vllm_python, "--idle", "1s", "-o", tmp_path / "run"]
    argv += [f"--vllm-arg={argument}" for argument in VLLM]
    env = offline | driver()
    done = subprocess.run(list(map(str, argv)), env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return Run.open(tmp_path / "run")


def simulated_again(run, first):
    """Virtual time fed the recorded arrivals and step times from step `first` on; the request ids in its order."""
    engine = run.manifest["instances"][0]["recorder"]["engine"]
    limits = Limits(
        kv_tokens=(engine["num_gpu_blocks"] - 1) * engine["block_size"],  # one of vLLM's blocks stands for none
        block_tokens=engine["block_size"],
        max_num_seqs=engine["max_num_seqs"],
        max_num_batched_tokens=engine["max_num_batched_tokens"],
        enable_prefix_caching=engine["enable_prefix_caching"],
        priority=engine["policy"] == "priority",
    )
    trace = run.scan("trace").collect()
    came = run.scan("arrivals").collect().drop_nulls("request_id").join(trace, on="request_id", maintain_order="left")
    arrivals = arrivals_of(came["arrival_ns"].to_numpy(), came["input_tokens"], came["output_tokens"])
    keys = [0]
    for arrival, hashes in zip(arrivals, came["prefix_hashes"], strict=True):
        arrival["keys_at"], arrival["keys_count"] = len(keys), len(hashes)
        # Each stands for all tokens up to its block's end.
        chained = accumulate(hashes, lambda key, one: mix(np.uint64(key), np.uint64(one)), initial=0)
        keys.extend(islice(chained, 1, None))
    pinned = run.scan("steps").collect().filter(pl.col("step") >= first).select("start_ns", "end_ns").to_numpy()
    engines = VirtualEngines(
        Hardware(load_profile(), 8),
        1980,
        limits=limits,
        keys=np.array(keys, np.uint64),
        key_tokens=BLOCK,
        pinned=pinned,
    )
    return serve(engines, arrivals), came["request_id"].to_list(), engines.preemptions


def test_the_simulated_scheduler_forms_the_batches_of_a_real_run(run):
    """Bursts, chunks, prefix-cache hits, preemptions: every step, from the arrivals and step times alone."""
    assert run.manifest["instances"][0]["recorder"]["engine"]["scheduler"] == "Scheduler"
    segments = run.scan("segments").collect()
    first = segments.filter(pl.col("request_id").is_null())["last_step"].max() + 1  # behind the warm-up
    served, ids, preemptions = simulated_again(run, first)

    steps = run.scan("steps").collect().filter(pl.col("step") >= first)
    for column in ("prefill_tokens", "decode_tokens", "context_tokens", "requests", "waiting"):
        assert served.steps[column].tolist() == steps[column].to_list(), column
    assert (served.steps["attention_twice"] // 2).tolist() == steps["prefill_attention"].to_list()
    assert served.steps["kv_usage"] == pytest.approx(steps["kv_usage"].to_numpy(), abs=1e-6)

    def parts(rows):
        return {
            (begin + k, request, kind, tokens, context + k * tokens)
            for request, begin, last, kind, tokens, context in rows for k in range(last - begin + 1)
        }  # fmt: skip

    mine = (
        (ids[s["number"]], int(s["first_step"]) + first, int(s["last_step"]) + first,
         "decode" if s["kind"] == DECODE else "prefill", int(s["tokens_per_step"]), int(s["context_start"]))
        for s in served.segments
    )  # fmt: skip
    columns = ("request_id", "first_step", "last_step", "kind", "tokens_per_step", "context_start")
    assert parts(mine) == parts(segments.drop_nulls("request_id").select(columns).iter_rows())
    cached = dict(run.scan("requests").select("request_id", "cached_tokens").collect().iter_rows())
    assert dict(zip(ids, served.done["cached_tokens"].tolist(), strict=True)) == cached
    assert preemptions > 0
    assert sum(cached.values()) > 0
