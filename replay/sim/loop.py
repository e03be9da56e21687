"""Whole traces on the simulated engine, compiled: the loop behind `replay.sim.virtual`.

A step starts where the one before ended, or when a request arrives at an idle instance, and a request joins the first
step that starts at or after its arrival: the very rules of the engine in wall time (`replay.sim.engine`). Between
arrivals and completions a batch only decodes, all its members by one token a step: such steps need no scheduling, only
their time and power, and blocks for those whose last one is full.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from replay.sim.blocks import Pool, Record, RecordArray, take_free
from replay.sim.compiled import compiled, inlined
from replay.sim.core import add, complete, schedule
from replay.sim.physics import AtClock, Constants, Thermal, heat, step, warmed
from replay.sim.state import DECODE, LAST_TOKEN, NO_TOKEN, NOWHERE, Core

IntArray = npt.NDArray[np.int64]
LEAST_LOADED = -1  # as an arrival's instance: the router asks the engines

ARRIVAL = np.dtype(
    [
        ("arrival_ns", np.int64),
        ("prompt", np.int32),
        ("output", np.int32),
        ("instance", np.int32),
        ("priority", np.int32),
        ("keys_at", np.int64),  # where its content keys begin in the engines' `keys`
        ("keys_count", np.int32),
    ],
    align=True,
)
STEP = np.dtype(
    [
        ("start_ns", np.int64),
        ("end_ns", np.int64),
        ("step", np.int64),
        ("context_tokens", np.int64),
        ("attention_twice", np.int64),  # twice the `prefill_attention`
        ("prefill_tokens", np.int32),
        ("decode_tokens", np.int32),
        ("instance", np.int32),
        ("requests", np.int32),
        ("waiting", np.int32),
        ("kv_usage", np.float32),
        ("gpu_w", np.float64),  # of each GPU of the group
        ("heat", np.float64),  # of it, what leakage multiplied it with
        ("clock_mhz", np.float32),  # really run at
        ("capped", np.bool_),
    ],
    align=True,
)
SEGMENT = np.dtype(
    [
        ("number", np.int64),  # the request's place in the trace
        ("first_step", np.int64),
        ("last_step", np.int64),
        ("instance", np.int32),
        ("kind", np.int32),
        ("tokens_per_step", np.int32),
        ("context_start", np.int32),
    ],
    align=True,
)
DONE = np.dtype(
    [
        ("number", np.int64),
        ("first_token_ns", np.int64),
        ("last_token_ns", np.int64),
        ("instance", np.int32),
        ("cached_tokens", np.int32),
        ("preemptions", np.int32),
    ],
    align=True,
)
LANE = np.dtype(
    [
        ("free_ns", np.int64),  # the next step may start from here on
        ("ended_ns", np.int64),  # the last one
        ("step", np.int64),  # the next one's number
        ("temperature_c", np.float64),
    ]
)
COUNTS = np.dtype([("steps", np.int64), ("segments", np.int64), ("done", np.int64), ("rows_free", np.int64)])
FED, _FULL, NO_ROWS = 0, 1, 2  # why the loop came back
_FOREVER_NS = np.iinfo(np.int64).max


class Buffers(NamedTuple):
    """What the loop writes into; `counts` says how far each is filled."""

    steps: RecordArray
    segments: RecordArray
    done: RecordArray
    counts: RecordArray  # [1]


class Machine(NamedTuple):
    """What the steps' time and power follow from."""

    constants: Constants
    at: AtClock
    thermal: Thermal
    idle_w: float
    pinned: IntArray  # [steps, 2]: when each step starts and ends, where that is known; else empty


class Lanes(NamedTuple):
    """All instances: the arrays of `Core`, stacked, and what the loop knows of each."""

    state: RecordArray  # [instances, 1]
    requests: RecordArray
    keys: npt.NDArray[np.uint64]
    blocks: RecordArray  # [instances, blocks + 1]
    slots: RecordArray
    free: IntArray  # [instances, 1]
    tables: npt.NDArray[np.int32]  # [instances, max_num_seqs, blocks of the longest request]
    spare: npt.NDArray[np.int32]
    running: npt.NDArray[np.int32]
    parts: RecordArray
    lane: RecordArray  # [instances, 1]
    rows: npt.NDArray[np.int32]  # rows of `requests` that are free


@compiled
def feed(
    lanes: Lanes, machine: Machine, buffers: Buffers, arrivals: RecordArray, at: int, number: int
) -> tuple[int, int]:
    """Serve until the arrivals from `at` on are queued; where it stopped and why."""
    counts = buffers.counts[0]
    for i in range(at, len(arrivals)):
        arrival = arrivals[i]
        if counts.rows_free == 0:
            return i, NO_ROWS
        instance = arrival.instance
        if instance == LEAST_LOADED:
            least = np.int64(_FOREVER_NS)
            for k in range(len(lanes.state)):
                j = (number + i + k) % len(lanes.state)  # of equals it is each one's turn
                if not _run(_core(lanes, j), lanes, j, machine, buffers, arrival.arrival_ns):
                    return i, _FULL
                # As vLLM's own balancer of data-parallel engines weighs them.
                load = 4 * lanes.state[j, 0].waiting + lanes.state[j, 0].running
                if load < least:
                    least, instance = load, np.int32(j)
        core = _core(lanes, instance)
        if not _run(core, lanes, instance, machine, buffers, arrival.arrival_ns):
            return i, _FULL
        _arrive(core, lanes, instance, machine, counts, arrival, number + i)
    return len(arrivals), FED


@compiled
def drain(lanes: Lanes, machine: Machine, buffers: Buffers) -> bool:
    """Serve what is there; false when the buffers are full before."""
    for j in range(len(lanes.state)):  # noqa: SIM110 - compiled code has no generators
        if not _run(_core(lanes, j), lanes, j, machine, buffers, _FOREVER_NS):
            return False
    return True


@inlined
def _core(lanes: Lanes, j: int) -> Core:
    """Instance `j` as the scheduler knows it."""
    return Core(
        lanes.state[j], lanes.requests, lanes.keys, Pool(lanes.blocks[j], lanes.slots[j], lanes.free[j]),
        lanes.tables[j], lanes.spare[j], lanes.running[j], lanes.parts[j],
    )  # fmt: skip


@inlined
def _arrive(core: Core, lanes: Lanes, j: int, machine: Machine, counts: Record, arrival: Record, number: int) -> None:
    """Queue one request at instance `j`; an idle instance wakes up."""
    counts.rows_free -= 1
    row = lanes.rows[counts.rows_free]
    request = core.requests[row]
    request.number = number
    request.prompt, request.output, request.priority = arrival.prompt, arrival.output, arrival.priority
    request.keys_at, request.keys_count = arrival.keys_at, arrival.keys_count
    request.arrival_ns = arrival.arrival_ns
    request.last_step = -1
    lane = lanes.lane[j, 0]
    if core.state[0].running + core.state[0].waiting == 0 and arrival.arrival_ns > lane.free_ns:
        if machine.thermal.leakage_per_c != 0.0:
            idle_s = (arrival.arrival_ns - lane.free_ns) / 1e9
            lane.temperature_c = warmed(machine.thermal, lane.temperature_c, machine.idle_w, idle_s)
        lane.free_ns = arrival.arrival_ns
    add(core, row)


@compiled
def _run(core: Core, lanes: Lanes, j: int, machine: Machine, buffers: Buffers, until_ns: int) -> bool:
    """Run the steps of instance `j` that start before `until_ns`; false when a buffer is full before."""
    state, lane, counts = core.state[0], lanes.lane[j, 0], buffers.counts[0]
    seqs = state.max_num_seqs
    while state.running + state.waiting > 0 and lane.free_ns < until_ns:
        if (
            counts.steps >= len(buffers.steps)
            or counts.segments + 2 * seqs > len(buffers.segments)
            or counts.done + seqs > len(buffers.done)
        ):
            return False
        if (state.waiting == 0 or state.stuck) and _decode(core, lane, j, machine, buffers, until_ns):
            continue
        schedule(core)
        for i in range(state.parts):
            _extend(core, buffers, core.parts[i], lane.step, j)
        _advance(core, lane, j, machine, buffers)
        complete(core)
        _hand_out(core, lanes, j, buffers)
    return True


@inlined
def _advance(core: Core, lane: Record, j: int, machine: Machine, buffers: Buffers) -> None:
    """Let the step that `core.state` totals run: write its row, and go to its end."""
    state, counts = core.state[0], buffers.counts[0]
    hot = 1.0
    if machine.thermal.leakage_per_c != 0.0:
        hot = heat(machine.thermal, lane.temperature_c)
    found = step(
        machine.constants, machine.at, hot, float(state.prefill_tokens), float(state.decode_tokens),
        float(state.context_tokens), state.attention_twice / 2.0,
    )  # fmt: skip
    row = buffers.steps[counts.steps]
    counts.steps += 1
    row.start_ns = lane.free_ns
    row.end_ns = lane.free_ns + max(1, np.int64(np.rint(found.duration_s * 1e9)))
    next_ns = row.end_ns
    if len(machine.pinned) > 0:
        row.end_ns = machine.pinned[lane.step, 1]
        next_ns = machine.pinned[lane.step + 1, 0] if lane.step + 1 < len(machine.pinned) else _FOREVER_NS
    row.step, row.instance, row.requests, row.waiting = lane.step, j, state.parts, state.waiting
    row.prefill_tokens, row.decode_tokens = state.prefill_tokens, state.decode_tokens
    row.context_tokens, row.attention_twice = state.context_tokens, state.attention_twice
    row.kv_usage = 1.0 - core.pool.free[0] / state.blocks
    row.gpu_w, row.heat, row.clock_mhz, row.capped = found.gpu_w, hot, found.clock_mhz, found.capped
    if machine.thermal.leakage_per_c != 0.0:
        lane.temperature_c = warmed(machine.thermal, lane.temperature_c, found.gpu_w, found.duration_s)
    lane.ended_ns = row.end_ns
    lane.free_ns = next_ns
    lane.step += 1


@compiled
def _decode(core: Core, lane: Record, j: int, machine: Machine, buffers: Buffers, until_ns: int) -> bool:
    """Run the steps up to the next completion in which all running requests decode; false when there is none.

    It ends before a completion, before an arrival, and before a step that lacks blocks.
    """
    state, counts, requests = core.state[0], buffers.counts[0], core.requests
    n = state.running
    if n == 0 or n > state.budget_tokens:
        return False
    steps = np.int64(_FOREVER_NS)
    context = np.int64(0)
    for i in range(n):
        request = requests[core.running[i]]
        if request.prompt + request.generated - request.computed != 1 or request.computed < request.prefill_until:
            return False
        steps = min(steps, np.int64(request.output - request.generated - 1))
        context += request.computed
    steps = min(steps, len(buffers.steps) - counts.steps)
    if steps <= 0:
        return False
    groups = _group(core)
    state.parts = state.decode_tokens = n
    state.prefill_tokens = state.attention_twice = 0
    first = lane.step
    done = 0
    while done < steps and lane.free_ns < until_ns and _take_blocks(core, groups, done):
        state.context_tokens = context + done * n
        _advance(core, lane, j, machine, buffers)
        done += 1
    if done == 0:
        return False
    for i in range(n):
        request = requests[core.running[i]]
        if request.kind != DECODE or request.last_step != first - 1:
            _close(buffers, request, j)
            request.first_step, request.kind = first, DECODE
            request.tokens_per_step, request.context_start = 1, request.computed
        request.last_step = first + done - 1
        request.computed += done
        request.generated += done
    return True


@inlined
def _group(core: Core) -> npt.NDArray[np.int64]:
    """Sort the running requests by how many tokens fit their last blocks; where each such group begins, and the end.

    The sorted rows stand in `core.parts`, in order of admission within a group.
    """
    state, requests = core.state[0], core.requests
    begins = np.zeros(state.block_tokens + 2, np.int64)
    for i in range(state.running):
        request = requests[core.running[i]]
        begins[request.held * state.block_tokens - request.computed + 2] += 1
    for k in range(2, len(begins)):
        begins[k] += begins[k - 1]
    for i in range(state.running):
        request = requests[core.running[i]]
        group = request.held * state.block_tokens - request.computed + 1
        core.parts[begins[group]].row = core.running[i]
        begins[group] += 1
    return begins


@inlined
def _take_blocks(core: Core, groups: npt.NDArray[np.int64], done: int) -> bool:
    """Take a block for each running request whose last one is full after `done` tokens; all or none."""
    group = done % core.state[0].block_tokens
    if groups[group + 1] - groups[group] > core.pool.free[0]:
        return False
    for i in range(groups[group], groups[group + 1]):
        request = core.requests[core.parts[i].row]
        take_free(core.pool, core.tables[request.table], request.held, 1)
        request.held += 1
    return True


@inlined
def _extend(core: Core, buffers: Buffers, part: Record, number: int, j: int) -> None:
    """Let a request's segment go on with its part in step `number`, or begin another."""
    request = core.requests[part.row]
    if (
        request.first_step >= 0
        and number == request.last_step + 1
        and part.kind == request.kind
        and part.tokens == request.tokens_per_step
        and part.context == request.context_start + part.tokens * (number - request.first_step)
    ):
        request.last_step = number
        return
    _close(buffers, request, j)
    request.first_step = request.last_step = number
    request.kind, request.tokens_per_step, request.context_start = part.kind, part.tokens, part.context


@inlined
def _close(buffers: Buffers, request: Record, j: int) -> None:
    """Write a request's segment, if it has one."""
    if request.first_step < 0:
        return
    row = buffers.segments[buffers.counts[0].segments]
    buffers.counts[0].segments += 1
    row.number, row.instance, row.kind = np.int64(request.number), j, request.kind
    row.first_step, row.last_step = request.first_step, request.last_step
    row.tokens_per_step, row.context_start = request.tokens_per_step, request.context_start
    request.first_step = -1


@inlined
def _hand_out(core: Core, lanes: Lanes, j: int, buffers: Buffers) -> None:
    """Note the tokens that the step made, and let those go that have all of theirs."""
    end_ns, counts = lanes.lane[j, 0].ended_ns, buffers.counts[0]
    for i in range(core.state[0].parts):
        part = core.parts[i]
        if part.yields == NO_TOKEN:
            continue
        request = core.requests[part.row]
        if request.generated == 1:
            request.first_token_ns = end_ns
        if part.yields != LAST_TOKEN:
            continue
        _close(buffers, request, j)
        row = buffers.done[counts.done]
        counts.done += 1
        row.number, row.instance = np.int64(request.number), j
        row.first_token_ns, row.last_token_ns = request.first_token_ns, end_ns
        row.cached_tokens, row.preemptions = request.cached, request.preemptions
        request.place = NOWHERE
        lanes.rows[counts.rows_free] = part.row
        counts.rows_free += 1
