"""The compiled scheduler one step at a time: requests as objects, steps as lists. No I/O and no clock.

The rules are in `replay.sim.core`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from replay.sim.core import add, complete, drop, schedule
from replay.sim.hardware import Work
from replay.sim.state import DECODE, FINISHED, NO_TOKEN, REQUEST, Limits, make_core, widened
from replay.steps import Kind

_ROWS = 64  # of the table of requests at first; it doubles when it is full


class Request:
    """One request and how far it has come; compared by identity."""

    __slots__ = ("cached_tokens", "generated_tokens", "keys", "output_tokens", "priority", "prompt_tokens",
                 "request_id", "row")  # fmt: skip

    def __init__(
        self,
        request_id: int | None,
        prompt_tokens: int,
        output_tokens: int,
        *,
        keys: Sequence[int] = (),
        priority: int = 0,
    ) -> None:
        """`request_id` None: warm-up or a foreign client's. `keys`: of the contents of its first blocks.

        `output_tokens` are wanted: the simulated model never ends a text by itself.
        """
        self.request_id, self.prompt_tokens, self.output_tokens = request_id, prompt_tokens, output_tokens
        self.keys, self.priority = keys, priority
        self.generated_tokens = 0
        self.cached_tokens = 0  # of the prompt, found in the prefix cache when it was first admitted
        self.row = -1  # in the scheduler's table while it is there

    @property
    def finished(self) -> bool:
        """Whether all wanted tokens have been generated."""
        return self.generated_tokens >= self.output_tokens


class Scheduled(NamedTuple):
    """A request's part in one step."""

    request: Request
    kind: Kind
    tokens: int
    context_tokens: int  # computed before this step


class Batch(NamedTuple):
    """One step: who is in it, and its totals."""

    parts: list[Scheduled]
    work: Work[float]
    waiting: int
    kv_usage: float  # fraction of blocks in use, this step's included


class Scheduler:
    """The queues and KV blocks of one engine instance."""

    def __init__(self, limits: Limits) -> None:
        """An engine without requests; each of a request's `keys` stands for one block."""
        self.limits = limits
        self._core = make_core(limits, np.zeros(_ROWS, REQUEST), np.zeros(_ROWS, np.uint64), limits.block_tokens)
        self._by_row: list[Request | None] = [None] * _ROWS
        self._free_rows = list(range(_ROWS))
        self._keys_end = 0
        self._number = 0

    @property
    def running(self) -> int:
        """Requests that hold KV blocks."""
        return int(self._core.state["running"][0])

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return int(self._core.state["waiting"][0])

    @property
    def preemptions(self) -> int:
        """Preemptions since the start."""
        return int(self._core.state["preemptions"][0])

    @property
    def kv_usage(self) -> float:
        """Fraction of KV blocks in use."""
        blocks = int(self._core.state["blocks"][0])
        return 1.0 - int(self._core.pool.free[0]) / blocks if blocks else 1.0

    def fits(self, prompt_tokens: int, output_tokens: int) -> bool:
        """Whether a request of this size can ever run; its last token is never written to the cache."""
        needed = -(-(prompt_tokens + output_tokens - 1) // self.limits.block_tokens)
        return needed <= int(self._core.state["blocks"][0])

    def add(self, request: Request) -> None:
        """Queue `request`. Raises `ValueError` when it could never run (see `fits`)."""
        if not self.fits(request.prompt_tokens, request.output_tokens):
            capacity_tokens = int(self._core.state["blocks"][0]) * self.limits.block_tokens
            raise ValueError(
                f"a request of {request.prompt_tokens} + {request.output_tokens} tokens exceeds the KV cache of "
                f"{capacity_tokens} tokens"
            )
        if not self._free_rows:
            self._add_rows()
        request.row = self._free_rows.pop()
        self._by_row[request.row] = request
        self._core = widened(self._core, request.prompt_tokens + request.output_tokens)
        self._number += 1
        row = self._core.requests[request.row]
        row["number"], row["prompt"], row["output"] = self._number, request.prompt_tokens, request.output_tokens
        row["priority"] = request.priority
        row["keys_at"], row["keys_count"] = self._store_keys(request), len(request.keys)
        add(self._core, request.row)

    def abort(self, request: Request) -> None:
        """Drop `request`, wherever it is, and free its blocks; one that has left already is no error."""
        if request.row >= 0:
            drop(self._core, request.row)
            self._forget(request)

    def schedule(self) -> Batch:
        """Form the next step; empty when nothing can run, which means that nothing is queued."""
        schedule(self._core)
        state = self._core.state[0]
        columns = (self._core.parts[: state["parts"]][name].tolist() for name in ("row", "kind", "tokens", "context"))
        parts = []
        for row, kind, tokens, context in zip(*columns, strict=True):
            request = self._by_row[row]
            assert request is not None
            parts.append(Scheduled(request, "decode" if kind == DECODE else "prefill", tokens, context))
        work = Work(
            float(state["prefill_tokens"]),
            float(state["decode_tokens"]),
            float(state["context_tokens"]),
            int(state["attention_twice"]) / 2,
        )
        return Batch(parts, work, self.waiting, self.kv_usage)

    def complete(self) -> list[Request]:
        """Advance past the step; the requests that got a token, `finished` ones already gone from the engine.

        Requests aborted since `schedule` are passed over.
        """
        complete(self._core)
        parts = self._core.parts[: self._core.state["parts"][0]]
        got_token = []
        for row in parts["row"][(parts["row"] >= 0) & (parts["yields"] != NO_TOKEN)].tolist():
            request = self._by_row[row]
            assert request is not None
            request.generated_tokens += 1
            if request.generated_tokens == 1:
                request.cached_tokens = int(self._core.requests["cached"][row])
            got_token.append(request)
            if self._core.requests["place"][row] == FINISHED:
                self._forget(request)
        return got_token

    def _forget(self, request: Request) -> None:
        self._by_row[request.row] = None
        self._free_rows.append(request.row)
        request.row = -1

    def _add_rows(self) -> None:
        old = self._core.requests
        self._core = self._core._replace(requests=np.concatenate([old, np.zeros_like(old)]))
        self._by_row += [None] * old.size
        self._free_rows = list(range(old.size, 2 * old.size))

    def _store_keys(self, request: Request) -> int:
        """Where the keys of `request` now begin; those of requests that have left make room."""
        count = len(request.keys)
        if self._keys_end + count > self._core.keys.size:
            here = [r for r in self._by_row if r is not None and r is not request and len(r.keys)]
            needed = count + sum(len(r.keys) for r in here)
            keys = np.zeros(max(self._core.keys.size, 2 * needed), np.uint64)
            self._keys_end = 0
            for other in here:
                at = self._core.requests["keys_at"][other.row]
                self._core.requests["keys_at"][other.row] = self._keys_end
                keys[self._keys_end : self._keys_end + len(other.keys)] = self._core.keys[at : at + len(other.keys)]
                self._keys_end += len(other.keys)
            self._core = self._core._replace(keys=keys)
        start = self._keys_end
        self._core.keys[start : start + count] = request.keys
        self._keys_end += count
        return start
