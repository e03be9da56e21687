"""The scheduler keeps vLLM's rules, whatever arrives."""

from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from replay.sim.scheduler import Request, Scheduler

BLOCK_TOKENS = 4


@dataclass
class Tally:
    """What the batches gave one request."""

    prefill: int = 0
    decode: int = 0
    received: int = 0
    lost: int = 0  # computed, then thrown away by a preemption
    from_prefill: int = 0  # tokens that came out of a prefill's last chunk


def drive(scheduler, arrivals, aborts=(), on_batch=None):
    """Run until nothing is queued; `arrivals`: (step, prompt, output) by step, `aborts`: (step, index)."""
    requests = [Request(i, prompt, output) for i, (_, prompt, output) in enumerate(arrivals)]
    tallies = {request: Tally() for request in requests}
    pending = [(step, request) for (step, _, _), request in zip(arrivals, requests, strict=True)]
    step = 0
    while pending or scheduler.running or scheduler.waiting:
        while pending and pending[0][0] <= step:
            scheduler.add(pending.pop(0)[1])
        if not scheduler.running + scheduler.waiting:
            step += 1
            continue
        computed = {request: request.computed_tokens for request in requests}
        batch = scheduler.schedule()
        for request in requests:
            tallies[request].lost += max(0, computed[request] - request.computed_tokens)
        if on_batch:
            on_batch(batch)
        for at, index in aborts:
            if at == step:
                pending = [(due, request) for due, request in pending if request is not requests[index]]
                scheduler.abort(requests[index])
        kinds = {part.request: part.kind for part in batch.parts}
        for request, kind, tokens, _ in batch.parts:
            setattr(tallies[request], kind, getattr(tallies[request], kind) + tokens)
        for request in scheduler.complete(batch):
            tallies[request].received += 1
            tallies[request].from_prefill += kinds[request] == "prefill"
        step += 1
        # The first in line always advances, so no request can wait longer than all tokens before it.
        assert step <= 50 + sum(2 * (prompt + output) for _, prompt, output in arrivals), "starved"
    return tallies


@st.composite
def workloads(draw):
    blocks = draw(st.integers(2, 12))
    capacity = blocks * BLOCK_TOKENS
    sizes = st.integers(1, capacity).flatmap(
        lambda prompt: st.tuples(st.integers(0, 30), st.just(prompt), st.integers(1, capacity - prompt + 1))
    )
    arrivals = sorted(draw(st.lists(sizes, min_size=1, max_size=8)), key=lambda arrival: arrival[0])
    scheduler = Scheduler(
        kv_tokens=capacity + draw(st.integers(0, BLOCK_TOKENS - 1)),
        block_tokens=BLOCK_TOKENS,
        max_num_seqs=draw(st.integers(1, 5)),
        max_num_batched_tokens=draw(st.integers(1, 20)),
    )
    return scheduler, arrivals


@settings(max_examples=150, deadline=None)
@given(workloads())
def test_every_request_gets_its_tokens_and_no_step_breaks_a_limit(workload):
    scheduler, arrivals = workload

    def check(batch):
        parts = [part.request for part in batch.parts]
        assert parts, "nothing runs although something is queued"
        assert len(set(parts)) == len(parts)
        assert sum(part.tokens for part in batch.parts) <= scheduler._max_num_batched_tokens
        assert all(part.tokens >= 1 for part in batch.parts)
        assert len(scheduler._running) <= scheduler._max_num_seqs
        held = [request.blocks for request in scheduler._running]
        assert scheduler._free_blocks >= 0
        assert sum(held) + scheduler._free_blocks == scheduler._blocks
        assert all(request.blocks == 0 for request in scheduler._waiting)
        assert batch.kv_usage == pytest.approx(sum(held) / scheduler._blocks)
        for request, _, tokens, context in batch.parts:
            assert request.blocks * BLOCK_TOKENS >= context + tokens
        line = [request.request_id for request in [*scheduler._running, *scheduler._waiting]]
        assert line == sorted(line), "not first come, first served"
        assert batch.waiting == len(scheduler._waiting)

    tallies = drive(scheduler, arrivals, on_batch=check)
    for (_, prompt, output), tally in zip(arrivals, tallies.values(), strict=True):
        assert tally.received == output
        assert tally.decode + tally.from_prefill == output
        assert tally.prefill + tally.decode == prompt + output - 1 + tally.lost
        if not tally.lost:
            assert (tally.prefill, tally.decode) == (prompt, output - 1)
    assert scheduler.kv_usage == 0
    assert bool(scheduler.preemptions) == any(tally.lost for tally in tallies.values())


@settings(max_examples=100, deadline=None)
@given(workloads(), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 7)), max_size=6))
def test_aborted_requests_leave_nothing_behind(workload, aborts):
    scheduler, arrivals = workload
    aborts = [(step, index) for step, index in aborts if index < len(arrivals)]
    tallies = drive(scheduler, arrivals, aborts)
    aborted = {index for _, index in aborts}
    for request, tally in tallies.items():
        wanted = request.output_tokens
        assert tally.received <= wanted if request.request_id in aborted else tally.received == wanted
    assert scheduler.kv_usage == 0


@settings(max_examples=100, deadline=None)
@given(workloads())
@example((Scheduler(kv_tokens=32, block_tokens=4, max_num_seqs=2, max_num_batched_tokens=5), [(0, 7, 2), (0, 6, 3)]))
def test_totals_are_the_sums_over_parts(workload):
    scheduler, arrivals = workload

    def check(batch):
        prefill = [(part.tokens, part.context_tokens) for part in batch.parts if part.kind == "prefill"]
        decode = [(part.tokens, part.context_tokens) for part in batch.parts if part.kind == "decode"]
        assert all(tokens == 1 for tokens, _ in decode)
        assert batch.work == (
            sum(tokens for tokens, _ in prefill),
            len(decode),
            sum(context for _, context in decode),
            sum(tokens * (context + tokens / 2) for tokens, context in prefill),
        )

    drive(scheduler, arrivals, on_batch=check)


def shapes(batch):
    return [(part.request.request_id, part.kind, part.tokens, part.context_tokens) for part in batch.parts]


def test_a_long_prompt_is_cut_into_chunks_behind_the_decodes():
    scheduler = Scheduler(kv_tokens=400, block_tokens=4, max_num_seqs=4, max_num_batched_tokens=40)
    scheduler.add(Request(0, 10, 9))
    assert [r.request_id for r in scheduler.complete(scheduler.schedule())] == [0]
    scheduler.add(Request(1, 100, 2))
    seen, got = [], []
    for _ in range(4):
        batch = scheduler.schedule()
        seen.append(shapes(batch))
        got.append([request.request_id for request in scheduler.complete(batch)])
    assert seen == [
        [(0, "decode", 1, 10), (1, "prefill", 39, 0)],
        [(0, "decode", 1, 11), (1, "prefill", 39, 39)],
        [(0, "decode", 1, 12), (1, "prefill", 22, 78)],
        [(0, "decode", 1, 13), (1, "decode", 1, 100)],
    ]
    assert got == [[0], [0], [0, 1], [0, 1]], "the last chunk yields the first token"


def test_the_request_admitted_last_is_preempted_and_computes_all_its_tokens_anew():
    scheduler = Scheduler(kv_tokens=16, block_tokens=4, max_num_seqs=4, max_num_batched_tokens=40)
    first, second = Request(0, 7, 6), Request(1, 8, 3)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.complete(scheduler.schedule())  # both prefilled, two blocks each: the cache is full
    batch = scheduler.schedule()  # the first still has room in its last block; the second needs a third block
    assert shapes(batch) == [(0, "decode", 1, 7)]
    assert (second.blocks, second.generated_tokens, scheduler.waiting, scheduler.preemptions) == (0, 1, 1, 1)
    scheduler.complete(batch)
    batch = scheduler.schedule()
    assert shapes(batch) == [(0, "decode", 1, 8)]  # the first takes a third block; one free block is too few
    while batch.parts and first.blocks:
        scheduler.complete(batch)
        batch = scheduler.schedule()
    assert shapes(batch) == [(1, "prefill", 9, 0)], "prompt and generated token"
    assert scheduler.complete(batch) == [second]
    assert second.generated_tokens == 2


def test_a_request_that_can_never_run_is_refused():
    scheduler = Scheduler(kv_tokens=16, block_tokens=4, max_num_seqs=4, max_num_batched_tokens=40)
    assert scheduler.fits(10, 7)  # the last token is never cached
    assert not scheduler.fits(10, 8)
    with pytest.raises(ValueError, match=r"10 \+ 8 tokens exceeds the KV cache of 16"):
        scheduler.add(Request(0, 10, 8))
    assert scheduler.waiting == 0
