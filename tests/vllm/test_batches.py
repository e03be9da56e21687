"""The simulated scheduler against vLLM's own: the same requests at the same steps make the same batches."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from replay.engines.vllm import RECORDER_FOLDER
from replay.sim.hardware import Hardware
from replay.sim.profile import load_profile
from replay.sim.scheduler import Request, Scheduler
from replay.sim.state import Limits
from replay.sim.virtual import VirtualEngines, arrivals_of, serve

DRIVER = Path(__file__).parent / "drive_scheduler.py"
BLOCK = 16  # the driver's
STEP_NS = 10

# Roomy and tight caches, chunked prefill, fewer slots than requests, with and without prefix cache.
SETTINGS = [
    {"name": f"{policy}-{blocks}-{budget}-{seed}", "asynchronous": False, "drafts": 0, "policy": policy,
     "blocks": blocks, "budget": budget, "seqs": seqs, "caching": caching, "requests": 60, "seed": seed}
    for policy in ("fcfs", "priority") for blocks in (2000, 48, 23)
    for budget, seqs, caching in ((64, 8, True), (256, 3, True), (17, 6, True), (300, 8, False))
    for seed in (1, 2, 3)
]  # fmt: skip
# A slot for everyone, so that nothing but asynchronous scheduling itself makes a difference.
ROOMY = [
    {"name": f"roomy-{asynchronous}-{seed}", "asynchronous": asynchronous, "drafts": 0, "blocks": 2000,
     "budget": 256, "seqs": 64, "requests": 60, "seed": seed}
    for asynchronous in (False, True) for seed in (1, 2, 3)
]  # fmt: skip


@pytest.fixture(scope="module")
def driven(vllm_python, tiny_model, offline, tmp_path_factory):
    """What the driver saw, by name; one process does them all, for importing vLLM takes long."""
    folder = tmp_path_factory.mktemp("driven")
    argv = [vllm_python, str(DRIVER), str(tiny_model), str(folder), json.dumps(SETTINGS + ROOMY)]
    env = offline | {"PYTHONPATH": str(RECORDER_FOLDER)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def limits_of(settings):
    return Limits(
        kv_tokens=(settings["blocks"] - 1) * BLOCK,  # one of vLLM's blocks stands for none
        block_tokens=BLOCK,
        max_num_seqs=settings["seqs"],
        max_num_batched_tokens=settings["budget"],
        enable_prefix_caching=settings["caching"],
        priority=settings["policy"] == "priority",
    )


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["name"])
def test_the_same_arrivals_make_the_same_batches_step_for_step(driven, settings):
    """Who is in each step, in which order, with how many tokens, after how many; what the cache had; preemptions."""
    seen = driven[settings["name"]]
    arrivals = seen["arrivals"]
    scheduler = Scheduler(limits_of(settings))
    requests = [
        Request(i, a["prompt"], a["output"], keys=a["blocks"], priority=a["priority"]) for i, a in enumerate(arrivals)
    ]
    added = 0
    for number, step in enumerate(seen["steps"]):
        while added < len(requests) and arrivals[added]["at"] <= number:
            scheduler.add(requests[added])
            added += 1
        parts = scheduler.schedule().parts
        mine = [(arrivals[p.request.request_id]["id"], p.tokens, p.context_tokens) for p in parts]
        assert mine == [(name, *part) for name, part in step.items()], f"step {number} of {len(seen['steps'])}"
        scheduler.complete()
    assert all(request.finished for request in requests)
    assert {a["id"]: r.cached_tokens for a, r in zip(arrivals, requests, strict=True)} == seen["cached"]
    assert scheduler.preemptions == sum(seen["preemptions"].values())
    tight = settings["blocks"] == 23 and settings["seqs"] > 3
    assert scheduler.preemptions > 0 or not tight, "the workload is what its name says"
    assert any(seen["cached"].values()) == settings["caching"]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["name"])
def test_virtual_time_at_the_same_step_times_makes_the_same_batches(driven, settings):
    seen = driven[settings["name"]]
    columns = {key: [a[key] for a in seen["arrivals"]] for key in ("at", "prompt", "output", "priority", "blocks")}
    arrivals = arrivals_of(np.array(columns["at"]) * STEP_NS, columns["prompt"], columns["output"])
    arrivals["priority"] = columns["priority"]
    arrivals["keys_count"] = [len(blocks) for blocks in columns["blocks"]]
    arrivals["keys_at"] = np.cumsum(arrivals["keys_count"]) - arrivals["keys_count"]
    keys = np.array([0, *(key for blocks in columns["blocks"] for key in blocks)], np.uint64)[1:]
    start_ns = np.arange(len(seen["steps"])) * STEP_NS
    engines = VirtualEngines(
        Hardware(load_profile(), 8), 1980, limits=limits_of(settings), keys=keys if keys.size else None,
        key_tokens=BLOCK, pinned=np.stack([start_ns, start_ns + STEP_NS], axis=1),
    )  # fmt: skip
    served = serve(engines, arrivals)
    steps = [{} for _ in seen["steps"]]
    for s in served.segments:
        for k in range(int(s["last_step"] - s["first_step"]) + 1):
            name = seen["arrivals"][s["number"]]["id"]
            steps[s["first_step"] + k][name] = [s["tokens_per_step"], s["context_start"] + k * s["tokens_per_step"]]
    assert steps == seen["steps"]
    assert dict(zip((a["id"] for a in seen["arrivals"]), served.done["cached_tokens"], strict=True)) == seen["cached"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_asynchronous_scheduling_costs_an_arrival_one_step_and_nothing_else(driven, seed):
    """What docs/simulator.md says of the difference: vLLM then forms a step before it has seen the one before end."""
    waits = []
    for asynchronous in (False, True):
        seen = driven[f"roomy-{asynchronous}-{seed}"]
        waits.append({a["id"]: seen["first_tokens"][a["id"]] - a["at"] for a in seen["arrivals"]})
    later = [waits[1][name] - waits[0][name] for name in waits[0]]
    assert set(later) == {0, 1}
    assert later.count(0) <= 4, "only who finds an idle engine"
