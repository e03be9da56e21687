"""What recording an engine step costs vLLM: the step recorder against writing every step down whole.

    python benchmarks/step_recorder.py [STEPS]

Both stand, in turns, between the same made-up engine and its scheduler, whose outputs have vLLM's fields, and write to
the same disk. In the workload a request in the batch ends, and another takes its place, every so many steps; all others
decode. Prints microseconds a step, what is left of the bare scheduler's own time taken off.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from replay.vllm_ext.wattrace_steps import StepLog, StepRecorder

BATCHES = (8, 64, 256)
LIFE = 200  # decode steps of a request
PROMPT = 500
ROUNDS = 5


@dataclass
class Output:
    """vLLM's SchedulerOutput, as far as a recorder looks at it."""

    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    scheduled_new_reqs: list[Any]
    scheduled_cached_reqs: Any
    finished_req_ids: set[str]
    scheduled_spec_decode_tokens: dict[str, list[int]] = field(default_factory=dict)


class MadeUpScheduler:
    """Hands out outputs that were made before."""

    def __init__(self, outputs: list[Output]) -> None:
        self.outputs = iter(outputs)
        self.waiting: list[Any] = []
        self.kv_cache_manager = SimpleNamespace(usage=0.5)
        ids = {i for output in outputs for i in output.num_scheduled_tokens}
        self.requests = {i: SimpleNamespace(num_tokens=PROMPT) for i in ids}

    def add_request(self, request: Any) -> None:
        """Nothing."""

    def schedule(self) -> Output:
        """The next output."""
        return next(self.outputs)

    def update_from_output(self, scheduler_output: Output, model_runner_output: Any) -> None:
        """Nothing."""


def workload(batch: int, steps: int) -> Iterator[Output]:
    """Outputs of `steps` steps with `batch` requests each."""
    computed = {f"cmpl-{i}-0-{i:08x}": PROMPT + (i * LIFE) // batch for i in range(batch)}
    starting = {i: 0 for i in computed}  # noqa: C420 - the first step starts them all
    serial, gone = batch, set[str]()
    for _ in range(steps):
        tokens = {i: PROMPT if i in starting else 1 for i in computed}
        going = [i for i in computed if i not in starting]
        cached = SimpleNamespace(req_ids=going, num_computed_tokens=[computed[i] for i in going], resumed_req_ids=set())
        new = [SimpleNamespace(req_id=i, num_computed_tokens=0) for i in starting]
        yield Output(tokens, sum(tokens.values()), new, cached, gone)
        computed = {i: max(count, PROMPT) + (i not in starting) for i, count in computed.items()}
        starting, gone = {}, {i for i, count in computed.items() if count >= PROMPT + LIFE}
        for ended in gone:
            del computed[ended]
            name = f"cmpl-{serial}-0-{serial:08x}"
            serial += 1
            computed[name] = starting[name] = 0


class WholeRecorder:
    """The plain way: each step with all its requests, as one MessagePack value."""

    def __init__(self, scheduler: Any, folder: Path) -> None:
        self._scheduler = scheduler
        self._file = os.open(folder / "whole", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._encode = msgspec.msgpack.Encoder().encode
        self._step: Any = None

    def schedule(self) -> Any:
        """Schedule, and note who is in the step."""
        start_ns = time.monotonic_ns()
        output = self._scheduler.schedule()
        cached = output.scheduled_cached_reqs
        contexts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        contexts |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        parts = [(i, n, contexts[i]) for i, n in output.num_scheduled_tokens.items()]
        self._step = (start_ns, len(self._scheduler.waiting), self._scheduler.kv_cache_manager.usage, parts)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> None:
        """Write it down."""
        os.write(self._file, self._encode((*self._step, time.monotonic_ns())))
        self._scheduler.update_from_output(scheduler_output, model_runner_output)


def step_us(recorded: Any, steps: int) -> float:
    """Mean µs of a step's two calls."""
    start_ns = time.perf_counter_ns()
    for _ in range(steps):
        recorded.update_from_output(recorded.schedule(), None)
    return (time.perf_counter_ns() - start_ns) / steps / 1e3


def main() -> None:
    """Measure and print."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    print(f"{steps} steps, median of {ROUNDS} rounds in turns; µs a step")
    print(f"{'requests a step':<18}{'step by step, whole':>21}{'step recorder':>15}{'ratio':>8}")
    for batch in BATCHES:
        times: dict[str, list[float]] = {"bare": [], "whole": [], "recorder": []}
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as folder:
                outputs = list(workload(batch, steps))
                times["bare"].append(step_us(MadeUpScheduler(outputs), steps))
                times["whole"].append(step_us(WholeRecorder(MadeUpScheduler(outputs), Path(folder)), steps))
                recorder = StepRecorder(MadeUpScheduler(outputs), StepLog(Path(folder), {}))
                times["recorder"].append(step_us(recorder, steps))
        bare, whole, ours = (float(np.median(values)) for values in times.values())
        print(f"{batch:<18}{whole - bare:>21.1f}{ours - bare:>15.1f}{(whole - bare) / (ours - bare):>8.1f}")


if __name__ == "__main__":
    main()
