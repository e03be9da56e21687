"""Drive vLLM's own scheduler without a model, recorded, and say what a worker would have computed. Run by its Python.

`drive_scheduler.py MODEL_FOLDER FOLDER SETTINGS`: SETTINGS is a JSON list of objects with `name` (the recorder logs
into that folder under FOLDER), `asynchronous` (two steps in flight, as on a GPU), `drafts` (speculative tokens a step,
of which a random number is rejected), `blocks` of 16 tokens, `budget` tokens a step, a `seed` and, if wanted, `policy`,
`seqs` (the most that run at once), `caching` of prefixes and the number of `requests`. Writes FOLDER/NAME.json: the
steps as the worker sees them, for each request its number of tokens and the tokens that were valid before, in vLLM's
order; the requests in order of arrival, each with the number of steps done before it, hashes of its prompt's blocks
and when it got its first token; what each request generated, had cached and how often it was preempted.
"""

import json
import os
import random
import sys
from collections import deque
from pathlib import Path

model, folder = sys.argv[1], Path(sys.argv[2])

import torch  # noqa: E402
import wattrace_steps  # noqa: E402
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec  # noqa: E402
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput  # noqa: E402
from vllm.v1.request import Request  # noqa: E402
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402

BLOCK = 16


def make_scheduler(settings):
    """vLLM's scheduler, as its engine makes it."""
    config = VllmConfig(
        model_config=ModelConfig(model=model, dtype="float16", seed=0, skip_tokenizer_init=True),
        cache_config=CacheConfig(
            block_size=BLOCK, gpu_memory_utilization=0.9, enable_prefix_caching=settings.get("caching", True)
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=settings.get("seqs", 8),
            policy=settings.get("policy", "fcfs"),
            max_num_batched_tokens=settings["budget"],
            max_model_len=4096,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
        ),
    )
    config.scheduler_config.async_scheduling = settings["asynchronous"]
    config.cache_config.num_gpu_blocks = settings["blocks"]
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    kv_cache = KVCacheConfig(
        num_blocks=settings["blocks"], kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    made = wattrace_steps.scheduler(
        vllm_config=config,
        kv_cache_config=kv_cache,
        structured_output_manager=StructuredOutputManager(config),
        include_finished_set=False,
        log_stats=True,
        block_size=BLOCK,
        hash_block_size=BLOCK,
    )
    made.num_spec_tokens = made.num_lookahead_tokens = settings["drafts"]
    if hasattr(made, "_spec_token_placeholders"):
        made._spec_token_placeholders = [-1] * settings["drafts"]
    return made


def make_requests(settings, rng):
    """(step, request) in order of arrival; many prompts begin alike, some are the same up to their length."""
    hasher = get_request_block_hasher(BLOCK, sha256) if settings.get("caching", True) else None
    shared, further = [[rng.randrange(2000) for _ in range(64)] for _ in range(2)]
    waiting = []
    for i in range(settings.get("requests", 24)):
        start = (shared + rng.choice([further, []])) if rng.random() < 0.4 else []
        prompt = start + [rng.randrange(2000) for _ in range(rng.randint(1, 150))]
        if start and rng.random() < 0.3:
            prompt = start[: rng.randint(1, len(start))]
        arrival = {"id": f"cmpl-0a1b2c3d-{i}-0-{i:08x}", "prompt": prompt, "output": rng.randint(1, 60)}
        waiting.append((rng.randint(0, 60), rng.randrange(3), arrival))
    waiting.sort(key=lambda row: row[0])
    by_priority = settings.get("policy") == "priority"
    return [
        (step, Request(
            request_id=arrival["id"], prompt_token_ids=arrival["prompt"], pooling_params=None, block_hasher=hasher,
            sampling_params=SamplingParams(max_tokens=arrival["output"], ignore_eos=True),
            priority=priority if by_priority else 0, arrival_time=float(order),
        ))
        for order, (step, priority, arrival) in enumerate(waiting)
    ]  # fmt: skip


def describe(request, steps_done):
    """An arriving request for the record: numbers alone."""
    keys = request.block_hashes[: request.num_prompt_tokens // BLOCK]
    return {
        "id": request.request_id,
        "at": steps_done,
        "prompt": request.num_prompt_tokens,
        "output": request.max_tokens,
        "priority": request.priority,
        "blocks": [int.from_bytes(key[:8], "big") for key in keys],
    }


def drive(settings):
    """Run the workload of `settings` to its end."""
    os.environ["WATTRACE_STEPS"] = str(folder / settings["name"])
    rng = random.Random(settings["seed"])
    scheduler = make_scheduler(settings)
    waiting = make_requests(settings, rng)
    requests = {request.request_id: request for _, request in waiting}
    valid, cached, preemptions, done, arrivals = {}, {}, dict.fromkeys(requests, 0), [], []
    firsts = {}
    flying = deque()
    now = 0  # steps that have ended, and rounds without any
    while waiting or scheduler.has_requests() or flying:
        while waiting and waiting[0][0] <= now:
            request = waiting.pop(0)[1]
            arrivals.append(describe(request, len(done)))
            scheduler.add_request(request)
        output = scheduler.schedule()
        resumed = set(output.scheduled_cached_reqs.resumed_req_ids)
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        contexts = zip(
            output.scheduled_cached_reqs.req_ids, output.scheduled_cached_reqs.num_computed_tokens, strict=True
        )
        starts |= {i: context for i, context in contexts if i in resumed}
        for i, context in starts.items():
            preemptions[i] += i in cached
            cached.setdefault(i, context)
        flying.append((output, starts))
        in_flight = 2 if settings["asynchronous"] and (waiting or scheduler.has_requests()) else 1
        while len(flying) >= in_flight and flying:
            execute(scheduler, *flying.popleft(), valid, done, rng, settings)
            now += 1
            for i, request in requests.items():
                if request.num_output_tokens:
                    firsts.setdefault(i, len(done))
            if now > 100_000:
                raise SystemExit("it never ends")
    seen = {
        "steps": done,
        "arrivals": arrivals,
        "first_tokens": firsts,
        "generated": {i: r.num_output_tokens for i, r in requests.items()},
        "prompts": {i: r.num_prompt_tokens for i, r in requests.items()},
        "cached": cached,
        "preemptions": preemptions,
    }
    (folder / f"{settings['name']}.json").write_text(json.dumps(seen))


def execute(scheduler, output, starts, valid, done, rng, settings):
    """What a worker does with a step: compute its tokens after those that are valid, and sample."""
    if output.total_num_scheduled_tokens:
        step, ids, sampled, drafts = {}, [], [], []
        for i, tokens in output.num_scheduled_tokens.items():
            if i in starts:
                valid[i] = starts[i]
            step[i] = [tokens, valid[i]]
            proposed = len(output.scheduled_spec_decode_tokens.get(i, ()))
            accepted = rng.randint(0, proposed)
            valid[i] += tokens - (proposed - accepted)
            request = scheduler.requests.get(i)
            known = request.num_tokens if request is not None else 0
            ids.append(i)
            finished_prefill = request is not None and valid[i] >= known
            sampled.append([rng.randrange(2000) for _ in range(1 + accepted)] if finished_prefill else [])
            drafts.append([rng.randrange(2000) for _ in range(settings["drafts"])])
        done.append(step)
    else:
        ids, sampled, drafts = [], [], []
    scheduler.update_from_output(
        output,
        ModelRunnerOutput(
            req_ids=ids, req_id_to_index={i: at for at, i in enumerate(ids)}, sampled_token_ids=sampled,
            logprobs=None, prompt_logprobs_dict={}, pooler_output=[],
        ),
    )  # fmt: skip
    if settings["drafts"] and not settings["asynchronous"]:
        scheduler.update_draft_token_ids(DraftTokenIds(ids, drafts))


init_none_hash(sha256)
for chosen in json.loads(sys.argv[3]):
    drive(chosen)
