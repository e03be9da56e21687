"""Virtual time does what the engine does one step at a time, only faster."""

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.sim.hardware import Hardware
from replay.sim.profile import load_profile
from replay.sim.scheduler import Request, Scheduler
from replay.sim.state import DECODE, Limits
from replay.sim.virtual import LEAST_LOADED, VirtualEngines, arrivals_of, serve

HARDWARE = Hardware(load_profile("dgx-h100", "llama-2-70b"), 8)
MHZ = 1200


def one_by_one(limits, arrivals, keys):
    """Steps (start, end, totals, waiting, KV use) and parts, and each request's tokens, by the step-wise scheduler."""
    scheduler, coming = Scheduler(limits), deque()
    for i, a in enumerate(arrivals):
        own = keys[a["keys_at"] : a["keys_at"] + a["keys_count"]]
        coming.append(Request(i, int(a["prompt"]), int(a["output"]), keys=own, priority=int(a["priority"])))
    now, steps, parts = 0, [], set()
    tokens = {request.request_id: [] for request in coming}
    cached = {}
    while coming or scheduler.running or scheduler.waiting:
        if not scheduler.running + scheduler.waiting:
            now = max(now, int(arrivals["arrival_ns"][coming[0].request_id]))
        while coming and arrivals["arrival_ns"][coming[0].request_id] <= now:
            scheduler.add(coming.popleft())
        batch = scheduler.schedule()
        end = now + max(1, round(HARDWARE.step_s(batch.work, MHZ) * 1e9))
        parts |= {(len(steps), p.request.request_id, p.kind, p.tokens, p.context_tokens) for p in batch.parts}
        steps.append((now, end, *batch.work, len(batch.parts), batch.waiting, np.float32(batch.kv_usage)))
        for request in scheduler.complete():
            tokens[request.request_id].append(end)
            cached[request.request_id] = request.cached_tokens
        now = end
    return steps, parts, tokens, cached, scheduler.preemptions


def unrolled(segments):
    return {
        (int(s["first_step"]) + k, int(s["number"]), "decode" if s["kind"] == DECODE else "prefill",
         int(s["tokens_per_step"]), int(s["context_start"]) + k * int(s["tokens_per_step"]))
        for s in segments for k in range(int(s["last_step"] - s["first_step"]) + 1)
    }  # fmt: skip


def step_rows(steps):
    return [
        (int(s["start_ns"]), int(s["end_ns"]), float(s["prefill_tokens"]), float(s["decode_tokens"]),
         float(s["context_tokens"]), s["attention_twice"] / 2, int(s["requests"]), int(s["waiting"]), s["kv_usage"])
        for s in steps
    ]  # fmt: skip


@st.composite
def workloads(draw):
    """Small engines, so that everything happens: queues, chunks, preemption, shared beginnings, priorities."""
    block = draw(st.sampled_from([2, 4]))
    blocks = draw(st.integers(6, 40))
    limits = Limits(
        kv_tokens=block * blocks,
        block_tokens=block,
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(6, 40)),
        enable_prefix_caching=draw(st.booleans()),
        priority=draw(st.booleans()),
    )
    n = draw(st.integers(1, 14))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    arrival_ns = np.sort(rng.integers(0, draw(st.sampled_from([1, 10**8, 2 * 10**9])), n))
    prompt = rng.integers(1, block * blocks * 2 // 3 + 1, n)
    arrivals = arrivals_of(arrival_ns, prompt, rng.integers(1, block * blocks - prompt + 1))
    arrivals["priority"] = rng.integers(0, 3, n)
    # One of two beginnings, of a length of its own.
    keys = np.concatenate([np.arange(100, 100 + blocks), np.arange(500, 500 + blocks)]).astype(np.uint64)
    arrivals["keys_at"] = rng.integers(0, 2, n) * blocks
    arrivals["keys_count"] = np.minimum(rng.integers(0, blocks + 1, n), prompt // block)
    return limits, arrivals, keys


@settings(max_examples=200, deadline=None)
@given(workloads(), st.integers(7, 60))
def test_the_same_arrivals_give_the_same_steps_whichever_way(workload, buffer_steps):
    limits, arrivals, keys = workload
    steps, parts, tokens, cached, preemptions = one_by_one(limits, arrivals, keys)
    engines = VirtualEngines(HARDWARE, MHZ, limits=limits, keys=keys, buffer_steps=buffer_steps)
    served = serve(engines, arrivals)
    assert step_rows(served.steps) == steps
    assert unrolled(served.segments) == parts
    assert served.done["first_token_ns"].tolist() == [times[0] for times in tokens.values()]
    assert served.done["last_token_ns"].tolist() == [times[-1] for times in tokens.values()]
    assert served.done["cached_tokens"].tolist() == [cached[i] for i in tokens]
    assert served.done["preemptions"].sum() == engines.preemptions == preemptions
    # A request's segments are as few as can be: neighbours differ in more than the step.
    assert len({(s["number"], s["first_step"]) for s in served.segments}) == len(served.segments)


@settings(max_examples=60, deadline=None)
@given(workloads())
def test_recorded_step_times_give_the_recorded_batches(workload):
    limits, arrivals, keys = workload
    recorded = serve(VirtualEngines(HARDWARE, MHZ, limits=limits, keys=keys), arrivals)
    pinned = np.stack([recorded.steps["start_ns"], recorded.steps["end_ns"]], axis=1)
    again = serve(VirtualEngines(HARDWARE, 1980, limits=limits, keys=keys, pinned=pinned), arrivals)
    assert step_rows(again.steps) == step_rows(recorded.steps)
    assert unrolled(again.segments) == unrolled(recorded.segments)


def trace(n, rate_rps, seed=0, instance=0):
    rng = np.random.default_rng(seed)
    arrival_ns = np.cumsum(rng.exponential(1e9 / rate_rps, n)).astype(np.int64)
    return arrivals_of(arrival_ns, rng.integers(1, 2000, n), rng.integers(1, 400, n), instance)


def test_chunks_of_a_trace_give_what_the_whole_gives():
    arrivals = trace(5000, 8)
    whole = serve(VirtualEngines(HARDWARE, MHZ), arrivals)
    engines = VirtualEngines(HARDWARE, MHZ, buffer_steps=300)
    outputs = [output for part in np.array_split(arrivals, 13) for output in engines.feed(part)]
    outputs += engines.finish()
    assert len(outputs) > 20
    assert np.array_equal(np.concatenate([output.steps for output in outputs]), whole.steps)
    done = np.concatenate([output.done for output in outputs])
    assert np.array_equal(done[np.argsort(done["number"])], whole.done)
    assert unrolled(np.concatenate([output.segments for output in outputs])[:500]) <= unrolled(whole.segments)


def test_instances_are_independent_unless_the_router_asks_them():
    arrivals = trace(2000, 20)
    arrivals["instance"] = np.arange(2000) % 3
    together = serve(VirtualEngines(HARDWARE, MHZ, instances=3), arrivals)
    for j in range(3):
        mine = arrivals[arrivals["instance"] == j].copy()
        mine["instance"] = 0
        alone = serve(VirtualEngines(HARDWARE, MHZ), mine)
        assert step_rows(alone.steps) == step_rows(together.steps[together.steps["instance"] == j])


def test_the_least_loaded_instance_is_asked():
    arrivals = trace(40, 2)
    arrivals["output"] = np.where(np.arange(40) % 2, 1, 3000)  # taken in turn, all long ones would meet at one instance
    arrivals["instance"] = LEAST_LOADED
    served = serve(VirtualEngines(HARDWARE, MHZ, instances=2), arrivals)
    long = np.bincount(served.done["instance"][arrivals["output"] > 1], minlength=2)
    assert abs(long[0] - long[1]) <= 1


def test_leakage_makes_a_warm_gpu_draw_more_and_nothing_slower():
    import dataclasses

    profile = HARDWARE.profile
    leaky = dataclasses.replace(profile, thermal=dataclasses.replace(profile.thermal, leakage_per_c=0.002))
    arrivals = trace(300, 4)
    cold, warm = (serve(VirtualEngines(Hardware(p, 8), MHZ), arrivals).steps for p in (profile, leaky))
    assert np.array_equal(cold["end_ns"], warm["end_ns"]), "below the power cap"
    assert np.all(cold["heat"] == 1)
    assert np.allclose(warm["gpu_w"], cold["gpu_w"] * warm["heat"])
    assert warm["heat"][-1] > warm["heat"][0]


def test_a_step_beyond_the_power_cap_says_so_and_its_clock_is_lower():
    hardware = Hardware(HARDWARE.profile, 2)
    arrivals = trace(200, 2)
    steps = serve(VirtualEngines(hardware, 1980), arrivals).steps
    capped = steps[steps["capped"]]
    assert 0 < len(capped) < len(steps)
    assert capped["gpu_w"] == pytest.approx(hardware.profile.power.cap_w)
    assert np.all(capped["clock_mhz"] < hardware.profile.time.sustained_mhz)
    assert np.all(steps[~steps["capped"]]["clock_mhz"] == hardware.profile.time.sustained_mhz)
