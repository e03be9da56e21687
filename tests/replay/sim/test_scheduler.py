"""The scheduler keeps vLLM's rules, whatever arrives."""

from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from replay.sim.scheduler import Request, Scheduler
from replay.sim.state import Limits

BLOCK_TOKENS = 4


def held(scheduler, request):
    """KV blocks of a request."""
    return int(scheduler._core.requests["held"][request.row]) if request.row >= 0 else 0


def computed_tokens(scheduler, request):
    return int(scheduler._core.requests["computed"][request.row]) if request.row >= 0 else 0


def queued(scheduler):
    """The running requests in their order, then the waiting ones in theirs."""
    core = scheduler._core
    rows, row = [], int(core.state["first"][0])
    while row >= 0:
        rows.append(row)
        row = int(core.requests["next"][row])
    running = core.running[: scheduler.running].tolist()
    return [scheduler._by_row[row] for row in running], [scheduler._by_row[row] for row in rows]


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
        computed = {request: computed_tokens(scheduler, request) for request in requests}
        batch = scheduler.schedule()
        for request in requests:
            tallies[request].lost += max(0, computed[request] - computed_tokens(scheduler, request))
        if on_batch:
            on_batch(batch)
        for at, index in aborts:
            if at == step:
                pending = [(due, request) for due, request in pending if request is not requests[index]]
                scheduler.abort(requests[index])
        kinds = {part.request: part.kind for part in batch.parts}
        for request, kind, tokens, _ in batch.parts:
            setattr(tallies[request], kind, getattr(tallies[request], kind) + tokens)
        for request in scheduler.complete():
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
    limits = Limits(
        kv_tokens=capacity + draw(st.integers(0, BLOCK_TOKENS - 1)),
        block_tokens=BLOCK_TOKENS,
        max_num_seqs=draw(st.integers(1, 5)),
        max_num_batched_tokens=draw(st.integers(1, 20)),
        enable_prefix_caching=False,
    )
    return Scheduler(limits), arrivals


@settings(max_examples=150, deadline=None)
@given(workloads())
def test_every_request_gets_its_tokens_and_no_step_breaks_a_limit(workload):
    scheduler, arrivals = workload

    def check(batch):
        parts = [part.request for part in batch.parts]
        assert parts, "nothing runs although something is queued"
        assert len(set(parts)) == len(parts)
        assert sum(part.tokens for part in batch.parts) <= scheduler.limits.max_num_batched_tokens
        assert all(part.tokens >= 1 for part in batch.parts)
        running, waiting = queued(scheduler)
        assert len(running) <= scheduler.limits.max_num_seqs
        in_use = sum(held(scheduler, request) for request in running)
        blocks = scheduler.limits.kv_tokens // BLOCK_TOKENS
        assert batch.kv_usage == pytest.approx(in_use / blocks)
        assert in_use <= blocks
        assert all(held(scheduler, request) == 0 for request in waiting)
        for request, _, tokens, context in batch.parts:
            assert held(scheduler, request) * BLOCK_TOKENS >= context + tokens
        line = [request.request_id for request in [*running, *waiting]]
        assert line == sorted(line), "not first come, first served"
        assert batch.waiting == len(waiting)

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
@example((Scheduler(Limits(32, 4, 2, 5)), [(0, 7, 2), (0, 6, 3)]))
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
    scheduler = Scheduler(Limits(400, 4, 4, 40))
    scheduler.add(Request(0, 10, 9))
    assert [r.request_id for r in (scheduler.schedule(), scheduler.complete())[1]] == [0]
    scheduler.add(Request(1, 100, 2))
    seen, got = [], []
    for _ in range(4):
        batch = scheduler.schedule()
        seen.append(shapes(batch))
        got.append([request.request_id for request in scheduler.complete()])
    assert seen == [
        [(0, "decode", 1, 10), (1, "prefill", 39, 0)],
        [(0, "decode", 1, 11), (1, "prefill", 39, 39)],
        [(0, "decode", 1, 12), (1, "prefill", 22, 78)],
        [(0, "decode", 1, 13), (1, "decode", 1, 100)],
    ]
    assert got == [[0], [0], [0, 1], [0, 1]], "the last chunk yields the first token"


def test_the_request_admitted_last_is_preempted_and_computes_anew_what_the_cache_has_lost():
    for caching, expected in ((False, [(1, "prefill", 9, 0)]), (True, [(1, "prefill", 5, 4)])):
        scheduler = Scheduler(Limits(16, 4, 4, 40, enable_prefix_caching=caching))
        first, second = Request(0, 7, 6), Request(1, 8, 3)
        scheduler.add(first)
        scheduler.add(second)
        scheduler.schedule()
        scheduler.complete()  # both prefilled, two blocks each: the cache is full
        batch = scheduler.schedule()  # the first still has room in its last block; the second needs a third block
        assert shapes(batch) == [(0, "decode", 1, 7)]
        assert (held(scheduler, second), second.generated_tokens) == (0, 1)
        assert (scheduler.waiting, scheduler.preemptions) == (1, 1)
        scheduler.complete()
        batch = scheduler.schedule()
        assert shapes(batch) == [(0, "decode", 1, 8)]  # the first takes a third block; one free block is too few
        while not first.finished:
            scheduler.complete()
            batch = scheduler.schedule()
        # Prompt and generated token; with the cache, the first of its blocks is still there, the first took the other.
        assert shapes(batch) == expected
        assert scheduler.complete() == [second]
        assert second.generated_tokens == 2


def test_a_shared_beginning_is_computed_once_and_the_last_token_always():
    scheduler = Scheduler(Limits(400, 4, 4, 100))
    scheduler.add(Request(0, 12, 2, keys=[11, 12, 13]))
    assert shapes(scheduler.schedule()) == [(0, "prefill", 12, 0)]
    scheduler.complete()
    scheduler.add(same := Request(1, 12, 1, keys=[11, 12, 13]))
    scheduler.add(other := Request(2, 12, 1, keys=[11, 99, 13]))
    assert shapes(scheduler.schedule()) == [(0, "decode", 1, 12), (1, "prefill", 4, 8), (2, "prefill", 8, 4)]
    scheduler.complete()
    assert (same.cached_tokens, other.cached_tokens) == (8, 4)
    assert scheduler.kv_usage == 0
    scheduler.add(later := Request(3, 13, 1, keys=[11, 12, 13]))
    scheduler.schedule()
    scheduler.complete()
    assert later.cached_tokens == 12, "also after all who had it have gone"


def test_the_least_recently_used_content_is_lost_first():
    scheduler = Scheduler(Limits(24, 4, 4, 100))  # six blocks
    for i, keys in enumerate(([11, 12], [21, 22], [11, 12], [31, 32], [41])):
        scheduler.add(Request(i, 4 * len(keys) + 1, 1, keys=keys))
        scheduler.schedule()
        scheduler.complete()
    cached = {}
    for first in (11, 21):
        scheduler.add(request := Request(9, 5, 1, keys=[first]))
        scheduler.schedule()
        scheduler.complete()
        cached[first] = request.cached_tokens
    assert cached == {11: 4, 21: 0}


def test_a_more_important_request_goes_first_and_the_least_important_is_preempted():
    scheduler = Scheduler(Limits(16, 4, 2, 40, priority=True))
    requests = [Request(0, 7, 6, priority=2), Request(1, 8, 3, priority=1), Request(2, 4, 2, priority=0)]
    for request in requests:
        scheduler.add(request)
    assert shapes(scheduler.schedule()) == [(2, "prefill", 4, 0), (1, "prefill", 8, 0)]
    scheduler.complete()
    order = []
    while scheduler.running + scheduler.waiting:
        scheduler.schedule()
        order += [request.request_id for request in scheduler.complete() if request.finished]
    assert order == [2, 1, 0]
    scheduler = Scheduler(Limits(16, 4, 2, 40, priority=True))
    for request in (low := Request(0, 7, 9, priority=5), high := Request(1, 7, 9, priority=0)):
        scheduler.add(request)
        scheduler.schedule()
        scheduler.complete()
    while not scheduler.preemptions:
        batch = scheduler.schedule()
        scheduler.complete()
    assert [part.request for part in batch.parts] == [high], "though the other was admitted first"
    assert held(scheduler, low) == 0


def test_a_request_that_can_never_run_is_refused():
    scheduler = Scheduler(Limits(16, 4, 4, 40))
    assert scheduler.fits(10, 7)  # the last token is never cached
    assert not scheduler.fits(10, 8)
    with pytest.raises(ValueError, match=r"10 \+ 8 tokens exceeds the KV cache of 16"):
        scheduler.add(Request(0, 10, 8))
    assert scheduler.waiting == 0
