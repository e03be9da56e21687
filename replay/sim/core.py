"""Continuous batching after vLLM V1, compiled: which request does what in each engine step.

`replay.sim.scheduler` is its face for one step at a time, `replay.sim.virtual` runs whole traces on it.

Requests wait and run in order of arrival, or of priority. Each step has a budget of tokens. Running requests take
theirs first: one token to decode, or the next chunk of their prompt. Waiting requests follow while budget, the cap on
running requests and free KV blocks last; what the prefix cache holds of them is not computed again, and none is
admitted for whose tokens there is no room as a whole. A running request that finds no free block takes those of the
request admitted last (or of the lowest priority), which goes back to the front of the queue and later computes its
tokens anew (preemption by recomputation).
"""

import numpy as np

from replay.sim.blocks import Record, find, hold, mix, name, release, take_free
from replay.sim.compiled import compiled, inlined
from replay.sim.state import (
    DECODE,
    FINISHED,
    LAST_TOKEN,
    NO_TOKEN,
    NOWHERE,
    PREFILL,
    RUNNING,
    TOKEN,
    WAITING,
    Core,
)


@compiled
def add(core: Core, row: int) -> None:
    """Queue the request of `row`."""
    state, request = core.state[0], core.requests[row]
    request.order = state.arrivals
    state.arrivals += 1
    request.generated = request.computed = request.preemptions = request.held = request.named = 0
    request.prefill_until = request.prompt
    request.cached = request.first_step = -1
    _enqueue(core, row, False)
    state.stuck = 0


@compiled
def drop(core: Core, row: int) -> None:
    """Take a request out, wherever it is, and free its blocks; one that has left already is no error."""
    state, request = core.state[0], core.requests[row]
    if request.place == WAITING:
        _dequeue(core, row)
    elif request.place == RUNNING:
        _leave(core, _index(core, row))
        _free(core, row)
        for i in range(state.parts):
            if core.parts[i].row == row:
                core.parts[i].row = -1
    request.place = NOWHERE
    state.stuck = 0


@compiled
def schedule(core: Core) -> None:
    """Form the next step: `parts` and the totals in `state`; no parts only when nothing is queued."""
    state = core.state[0]
    before = state.preemptions - 1
    state.parts = 0
    # A request of low priority may preempt itself and end the step before it has begun.
    while state.parts == 0 and state.preemptions != before:
        before = state.preemptions
        _form(core)
    _total(core)


@inlined
def _form(core: Core) -> None:
    """Form a step; without parts when the first in line had to preempt itself, or nothing is queued."""
    state, requests = core.state[0], core.requests
    budget = state.budget_tokens
    state.parts = 0
    preemptions = state.preemptions
    index = 0
    while index < state.running and budget > 0:
        row = core.running[index]
        request = requests[row]
        tokens = min(request.prompt + request.generated - request.computed, budget)
        while not _grow(core, request, tokens):
            victim = _victim(core)
            if victim < index:
                index -= 1
            out = core.running[victim]
            budget += _take_back(core, out)
            _preempt(core, victim)
            if out == row:
                row = -1
                break
        if row < 0:
            break  # it was the one to go itself
        _append(core, row, tokens)
        budget -= tokens
        index += 1
    # As in vLLM, a step that preempted admits nobody: the blocks just freed are wanted by those who run.
    state.stuck = 0
    if state.preemptions == preemptions:
        _admit(core, budget)


@compiled
def complete(core: Core) -> int:
    """Advance past the step; each part then says what it `yields`. How many requests have finished.

    Requests dropped since `schedule` are passed over.
    """
    state, requests = core.state[0], core.requests
    finished = 0
    for i in range(state.parts):
        part = core.parts[i]
        part.yields = NO_TOKEN
        if part.row < 0:
            continue
        request = requests[part.row]
        request.computed += part.tokens
        if request.computed < request.prompt + request.generated:
            continue
        request.generated += 1
        part.yields = TOKEN
        if request.generated >= request.output:
            part.yields = LAST_TOKEN
            _free(core, part.row)
            request.place = FINISHED
            finished += 1
    if finished:
        kept = 0
        for i in range(state.running):
            row = core.running[i]
            if requests[row].place == RUNNING:
                core.running[kept] = row
                kept += 1
        state.running = kept
        state.stuck = 0
    return finished


@inlined
def _admit(core: Core, budget: int) -> None:
    """Move waiting requests to the running ones and append their parts."""
    state, requests = core.state[0], core.requests
    while state.waiting > 0 and budget > 0:
        if state.running >= state.max_num_seqs:
            state.stuck = 1
            break
        row = state.first
        request = requests[row]
        # Its tables' row is taken for trial: the blocks that it hits are noted there.
        request.table = core.spare[state.tables_free - 1]
        hits = _hits(core, request) if state.prefix_caching else 0
        computed = hits * state.block_tokens
        total = request.prompt + request.generated
        tokens = min(total - computed, budget)
        whole = total if state.reserve_full else computed + tokens
        if not _fits(core, request, hits, whole):
            state.stuck = 1
            break
        _dequeue(core, row)
        state.tables_free -= 1
        for j in range(hits):
            hold(core.pool, core.tables[request.table, j])
        request.held = request.named = hits
        request.computed = computed
        if request.cached < 0:
            request.cached = computed
        _grow(core, request, tokens)
        request.place = RUNNING
        core.running[state.running] = row
        state.running += 1
        _append(core, row, tokens)
        budget -= tokens


@inlined
def _hits(core: Core, request: Record) -> int:
    """How many of a waiting request's blocks the cache holds, in its table; the last token is always computed."""
    state = core.state[0]
    if request.keys_count == 0 and request.preemptions == 0:
        return 0
    most = (request.prompt + request.generated - 1) // state.block_tokens
    for j in range(most):
        key = _key(core, request, j)
        block = find(core.pool, key) if key != np.uint64(0) else -1
        if block < 0:
            return j
        core.tables[request.table, j] = block
    return most


@inlined
def _key(core: Core, request: Record, j: int) -> np.uint64:
    """The content key of a request's block `j`; 0 where nobody will ask for it."""
    state = core.state[0]
    end = (j + 1) * state.block_tokens
    if end <= min(request.prompt, request.keys_count * state.key_tokens):
        return mix(core.keys[request.keys_at + (end - 1) // state.key_tokens], np.uint64(j))
    if request.preemptions > 0:
        return mix(mix(request.number, np.uint64(request.order)), np.uint64(j))
    return np.uint64(0)


@inlined
def _fits(core: Core, request: Record, hits: int, tokens: int) -> bool:
    """Whether there are free blocks for `tokens` in all, of which `hits` blocks are there already."""
    state = core.state[0]
    needed = -(-tokens // state.block_tokens) - hits
    for j in range(hits):
        needed += core.pool.blocks[core.tables[request.table, j]].holders == 0
    return needed <= core.pool.free[0]


@inlined
def _grow(core: Core, request: Record, tokens: int) -> bool:
    """Take the blocks that a request lacks for `tokens` more, all or none, and name those that get full."""
    state = core.state[0]
    end = request.computed + tokens
    if end > request.held * state.block_tokens:
        lacking = -(-end // state.block_tokens) - request.held
        if lacking > core.pool.free[0]:
            return False
        take_free(core.pool, core.tables[request.table], request.held, lacking)
        request.held += lacking
    if state.prefix_caching and request.keys_count > 0:
        _name_full(core, request, end // state.block_tokens)
    return True


@inlined
def _name_full(core: Core, request: Record, full: int) -> None:
    """Name a request's first `full` blocks, as far as somebody will ask for them."""
    while request.named < full:
        key = _key(core, request, request.named)
        if key == np.uint64(0):
            break
        block = core.tables[request.table, request.named]
        if core.pool.blocks[block].key == np.uint64(0):
            name(core.pool, block, key)
        request.named += 1


@inlined
def _free(core: Core, row: int) -> None:
    """Let go of a request's blocks, the last first."""
    state, request = core.state[0], core.requests[row]
    full = request.computed // state.block_tokens if state.prefix_caching else 0
    release(core.pool, core.tables[request.table], request.held, full)
    core.spare[state.tables_free] = request.table
    state.tables_free += 1
    request.held = request.named = 0


@inlined
def _victim(core: Core) -> int:
    """Who has to go: the one admitted last, or the last to come of the lowest priority."""
    state, requests = core.state[0], core.requests
    victim = state.running - 1
    if state.by_priority:
        for i in range(state.running - 1):
            if _after(requests[core.running[i]], requests[core.running[victim]]):
                victim = i
    return victim


@inlined
def _after(one: Record, other: Record) -> bool:
    """Whether one request comes after another by priority and arrival."""
    return one.priority > other.priority or (one.priority == other.priority and one.order > other.order)


@compiled
def _preempt(core: Core, index: int) -> None:
    """Send the running request at `index` back to the queue; its full blocks can be found until they are reused."""
    state = core.state[0]
    row = core.running[index]
    request = core.requests[row]
    request.preemptions += 1
    if state.prefix_caching:
        _name_full(core, request, request.computed // state.block_tokens)
    _leave(core, index)
    _free(core, row)
    request.computed = 0
    request.prefill_until = request.prompt + request.generated
    state.preemptions += 1
    _enqueue(core, row, True)


@compiled
def _take_back(core: Core, row: int) -> int:
    """Take a request out of the step being formed; the tokens that it had there."""
    state = core.state[0]
    for i in range(state.parts):
        if core.parts[i].row == row:
            tokens = core.parts[i].tokens
            for j in range(i, state.parts - 1):
                core.parts[j] = core.parts[j + 1]
            state.parts -= 1
            return tokens
    return 0


@inlined
def _append(core: Core, row: int, tokens: int) -> None:
    """Give a request `tokens` in the step being formed."""
    state, request = core.state[0], core.requests[row]
    part = core.parts[state.parts]
    part.row = row
    part.tokens = tokens
    part.context = request.computed
    part.kind = PREFILL if request.computed < request.prefill_until else DECODE
    state.parts += 1


@inlined
def _total(core: Core) -> None:
    """Sum up the step."""
    state = core.state[0]
    prefill = decode = context = attention = 0
    for i in range(state.parts):
        part = core.parts[i]
        if part.kind == PREFILL:
            prefill += part.tokens
            attention += np.int64(part.tokens) * (2 * part.context + part.tokens)
        else:
            decode += part.tokens
            context += part.context
    state.prefill_tokens, state.decode_tokens = prefill, decode
    state.context_tokens, state.attention_twice = context, attention


@inlined
def _index(core: Core, row: int) -> int:
    """Where a running request stands among the running ones."""
    for i in range(core.state[0].running):
        if core.running[i] == row:
            return i
    return -1


@inlined
def _leave(core: Core, index: int) -> None:
    """Close the gap that a running request leaves."""
    state = core.state[0]
    for i in range(index, state.running - 1):
        core.running[i] = core.running[i + 1]
    state.running -= 1


@inlined
def _enqueue(core: Core, row: int, in_front: bool) -> None:
    """Put a request into the queue: in front, at the end, or where its priority belongs."""
    state, requests = core.state[0], core.requests
    request = requests[row]
    request.place = WAITING
    before = -1 if in_front else state.last
    if state.by_priority:
        before = state.last
        while before >= 0 and _after(requests[before], request):
            before = requests[before].previous
    after = state.first if before < 0 else requests[before].next
    request.previous, request.next = before, after
    if before < 0:
        state.first = row
    else:
        requests[before].next = row
    if after < 0:
        state.last = row
    else:
        requests[after].previous = row
    state.waiting += 1


@inlined
def _dequeue(core: Core, row: int) -> None:
    """Take a request out of the queue."""
    state, requests = core.state[0], core.requests
    before, after = requests[row].previous, requests[row].next
    if before < 0:
        state.first = after
    else:
        requests[before].next = after
    if after < 0:
        state.last = before
    else:
        requests[after].previous = before
    state.waiting -= 1
