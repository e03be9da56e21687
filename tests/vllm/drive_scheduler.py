"""Drive vLLM's own scheduler without a model, recorded, and say what a worker would have computed. Run by its Python.

`drive_scheduler.py MODEL_FOLDER FOLDER SETTINGS`: SETTINGS is a JSON list of objects with `name` (the recorder logs
into that folder under FOLDER), `asynchronous` (two steps in flight, as on a GPU), `drafts` (speculative tokens a step,
of which a random number is rejected), `blocks` of 16 tokens, `budget` tokens a step and a `seed`. Writes
FOLDER/NAME.json: the steps as the worker sees them, for each request its number of tokens and the tokens that were
valid before; what each request generated, had cached and how often it was preempted.
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
REQUESTS = 24


def make_scheduler(settings):
    """vLLM's scheduler, as its engine makes it."""
    config = VllmConfig(
        model_config=ModelConfig(model=model, dtype="float16", seed=0, skip_tokenizer_init=True),
        cache_config=CacheConfig(block_size=BLOCK, gpu_memory_utilization=0.9, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_num_seqs=8,
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


def drive(settings):
    """Run the workload of `settings` to its end."""
    os.environ["WATTRACE_STEPS"] = str(folder / settings["name"])
    rng = random.Random(settings["seed"])
    scheduler = make_scheduler(settings)
    hasher = get_request_block_hasher(BLOCK, sha256)
    shared = [rng.randrange(2000) for _ in range(64)]
    requests, waiting = {}, []
    for i in range(REQUESTS):
        prompt = (shared if rng.random() < 0.4 else []) + [rng.randrange(2000) for _ in range(rng.randint(1, 150))]
        sampling = SamplingParams(max_tokens=rng.randint(1, 60), ignore_eos=True)
        request = Request(
            request_id=f"cmpl-0a1b2c3d-{i}-0-{i:08x}", prompt_token_ids=prompt, sampling_params=sampling,
            pooling_params=None, block_hasher=hasher,
        )  # fmt: skip
        requests[request.request_id] = request
        waiting.append((rng.randint(0, 60), request))
    waiting.sort(key=lambda pair: pair[0])
    valid, cached, preemptions, done = {}, {}, dict.fromkeys(requests, 0), []
    flying = deque()
    tick = 0
    while waiting or scheduler.has_requests() or flying:
        while waiting and waiting[0][0] <= tick:
            scheduler.add_request(waiting.pop(0)[1])
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
        tick += 1
        in_flight = 2 if settings["asynchronous"] and (waiting or scheduler.has_requests()) else 1
        while len(flying) >= in_flight and flying:
            execute(scheduler, *flying.popleft(), valid, done, rng, settings)
            if tick > 100_000:
                raise SystemExit("it never ends")
    seen = {
        "steps": done,
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
