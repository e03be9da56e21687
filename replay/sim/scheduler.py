"""Which request does what in each engine step: continuous batching after vLLM V1, without I/O and without a clock.

Requests wait and run in order of arrival. Each step has a budget of tokens. Running requests take theirs first: one
token to decode, or the next chunk of their prompt. Waiting requests follow while budget, the cap on running requests
and free KV blocks last. A running request that finds no free block takes those of the request admitted last, which
goes back to the front of the queue and later computes all its tokens anew (preemption by recomputation).
There is no prefix cache.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from replay.sim.hardware import Work
from replay.steps import Kind, totals


@dataclass(eq=False, slots=True)
class Request:
    """One request and how far it has come; compared by identity."""

    request_id: int | None  # None: warm-up or a foreign client's
    prompt_tokens: int
    output_tokens: int  # wanted; the simulated model never ends a text by itself
    generated_tokens: int = 0
    computed_tokens: int = 0  # tokens whose keys and values are in the cache
    prefill_until_tokens: int = field(init=False)  # up to here computing counts as prefill
    blocks: int = 0  # KV blocks held

    def __post_init__(self) -> None:
        """A new request has its prompt to prefill."""
        self.prefill_until_tokens = self.prompt_tokens

    @property
    def total_tokens(self) -> int:
        """Tokens that exist: the prompt and what has been generated."""
        return self.prompt_tokens + self.generated_tokens

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

    def __init__(self, *, kv_tokens: int, block_tokens: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        """`kv_tokens`: capacity of the KV cache; what does not fill a block of `block_tokens` is lost."""
        self._block_tokens = block_tokens
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._blocks = kv_tokens // block_tokens
        self._free_blocks = self._blocks
        self._running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self.preemptions = 0

    @property
    def running(self) -> int:
        """Requests that hold KV blocks."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Fraction of KV blocks in use."""
        return 1.0 - self._free_blocks / self._blocks if self._blocks else 1.0

    def fits(self, prompt_tokens: int, output_tokens: int) -> bool:
        """Whether a request of this size can ever run; its last token is never written to the cache."""
        return self._blocks_for(prompt_tokens + output_tokens - 1) <= self._blocks

    def add(self, request: Request) -> None:
        """Queue `request`. Raises `ValueError` when it could never run (see `fits`)."""
        if not self.fits(request.prompt_tokens, request.output_tokens):
            raise ValueError(
                f"a request of {request.prompt_tokens} + {request.output_tokens} tokens exceeds the KV cache of "
                f"{self._blocks * self._block_tokens} tokens"
            )
        self._waiting.append(request)

    def abort(self, request: Request) -> None:
        """Drop `request`, wherever it is, and free its blocks; one that has left already is no error."""
        if request in self._running:
            self._running.remove(request)
            self._free(request)
        elif request in self._waiting:
            self._waiting.remove(request)

    def schedule(self) -> Batch:
        """Form the next step; empty when nothing can run, which means that nothing is queued."""
        parts: list[Scheduled] = []
        budget_tokens = self._max_num_batched_tokens
        preemptions_before = self.preemptions
        index = 0
        while index < len(self._running) and budget_tokens > 0:
            request = self._running[index]
            tokens = min(request.total_tokens - request.computed_tokens, budget_tokens)
            if not self._make_room(request, tokens):
                break  # it was the last one and has preempted itself
            parts.append(_part(request, tokens))
            budget_tokens -= tokens
            index += 1
        # As in vLLM, a step that preempted admits nobody: the blocks just freed are wanted by those who run.
        if self.preemptions == preemptions_before:
            self._admit(parts, budget_tokens)
        return Batch(parts, Work(*totals(parts)), self.waiting, self.kv_usage)

    def complete(self, batch: Batch) -> list[Request]:
        """Advance past `batch`; return the requests that got a token, `finished` ones already gone from the engine.

        Requests aborted since `schedule` are passed over.
        """
        running = set(self._running)
        got_token = []
        for request, _, tokens, _ in batch.parts:
            if request not in running:
                continue
            request.computed_tokens += tokens
            if request.computed_tokens == request.total_tokens:
                request.generated_tokens += 1
                got_token.append(request)
                if request.finished:
                    self._running.remove(request)
                    self._free(request)
        return got_token

    def _admit(self, parts: list[Scheduled], budget_tokens: int) -> None:
        """Move waiting requests to the running ones, first come first served, and append their parts."""
        while self._waiting and budget_tokens > 0 and len(self._running) < self._max_num_seqs:
            request = self._waiting[0]
            tokens = min(request.total_tokens, budget_tokens)
            if not self._allocate(request, tokens):
                break
            self._running.append(self._waiting.popleft())
            parts.append(_part(request, tokens))
            budget_tokens -= tokens

    def _make_room(self, request: Request, tokens: int) -> bool:
        """Allocate blocks for `tokens` more of a running request, preempting from the end of the line as needed."""
        while not self._allocate(request, tokens):
            victim = self._running.pop()
            self._free(victim)
            victim.computed_tokens = 0
            victim.prefill_until_tokens = victim.total_tokens
            self._waiting.appendleft(victim)
            self.preemptions += 1
            if victim is request:
                return False
        return True

    def _allocate(self, request: Request, tokens: int) -> bool:
        """Take the blocks that `request` lacks for `tokens` more; all or none."""
        lacking = self._blocks_for(request.computed_tokens + tokens) - request.blocks
        if lacking > self._free_blocks:
            return False
        request.blocks += lacking
        self._free_blocks -= lacking
        return True

    def _free(self, request: Request) -> None:
        self._free_blocks += request.blocks
        request.blocks = 0

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)


def _part(request: Request, tokens: int) -> Scheduled:
    context_tokens = request.computed_tokens
    kind: Kind = "prefill" if context_tokens < request.prefill_until_tokens else "decode"
    return Scheduled(request, kind, tokens, context_tokens)
