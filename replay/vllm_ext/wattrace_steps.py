"""The step recorder: which requests were in each step of vLLM's engine, written down as it runs.

`vllm serve MODEL --scheduler-cls wattrace_steps.scheduler`, with this file's folder on PYTHONPATH and WATTRACE_STEPS
naming a folder, makes vLLM's own scheduler and writes what it decides into a log there; `replay vllm-args` prints all
of it. Without WATTRACE_STEPS nothing is recorded. It runs in vLLM's Python, so it needs vLLM and msgspec alone, which
vLLM brings.

The scheduler is the one place that sees a step together with its requests. vLLM does not promise its interface, so
the recorder works for the versions from `OLDEST` up to `NEWEST` alone; with another, or should it ever fail, vLLM
serves on unrecorded and the log says why.

Log: a file is a run of frames, each a length (4 bytes, little-endian) and a MessagePack value. The first is a map that
describes the engine. A step is the list `[step, start_ns, end_ns, waiting, kv_usage, cost_ns, body, news, ended]`:

- `step` counts from 0; steps without tokens are none. Times are CLOCK_MONOTONIC. With async scheduling two steps are in
  flight at once; a step begins when it is scheduled, or when the one before it ends if that is later.
- `cost_ns`: what recording took of the engine's time since the last frame.
- `body`: `[numbers, tokens, contexts]`, parallel lists: a request's number, its tokens in this step, and the tokens
  that it had computed before. Null: the requests and tokens of the step before, whose contexts have grown by them.
- `news`: `[number, engine request id, prefill_until]` of requests that start or start again. A context below
  `prefill_until` (prompt, and what had been generated before a preemption) is prefill, beyond it decode.
- `ended`: numbers of requests that are gone.

The list `[engine request id, arrival_ns]` says when the scheduler got a request; it comes before the step that starts
it. Format 1 had none.

A map `{"failed": why}` ends the log early. Files are cut at 64 MiB; each begins with all that is needed to read it.
"""

import os
import re
import struct
import time
from pathlib import Path
from typing import Any

import msgspec

FORMAT = 2
OLDEST, NEWEST = (0, 14), (0, 33)  # vLLM versions whose scheduler was read (0.14, 0.17, 0.20, 0.26, 0.33) or run (0.32)
FILE_BYTES = 64 * 2**20
FILES = 16  # kept of one engine: a server that runs for ever must not fill the disk

_now_ns = time.monotonic_ns
_frame_length = struct.Struct("<I")
_encode = msgspec.msgpack.Encoder().encode


def scheduler(*args: Any, **kwargs: Any) -> Any:
    """Make the scheduler that vLLM itself would use, recorded where WATTRACE_STEPS names a folder."""
    # Only vLLM's own processes have it.
    from vllm import __version__
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    base = AsyncScheduler if getattr(config.scheduler_config, "async_scheduling", False) else Scheduler
    made = base(*args, **kwargs)
    if folder := os.environ.get("WATTRACE_STEPS"):
        settings = {
            "vllm": __version__,
            "scheduler": base.__name__,
            "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
            "data_parallel_rank": getattr(config.parallel_config, "data_parallel_rank", 0),
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "policy": str(config.scheduler_config.policy),
            "enable_prefix_caching": config.cache_config.enable_prefix_caching,
            "block_size": config.cache_config.block_size,
            "num_gpu_blocks": config.cache_config.num_gpu_blocks,
        }
        record(made, StepLog(Path(folder), settings), unsupported(__version__))
    return made


def release(version: str) -> tuple[int, int] | None:
    """Major and minor number of `version`, as `OLDEST` and `NEWEST` are; None where it is no version number."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return None if match is None else (int(match[1]), int(match[2]))


def unsupported(version: str) -> str | None:
    """Why the recorder does not work with vLLM `version`; None where it does."""
    found = release(version)
    if found is None:
        return f"vLLM calls itself '{version}', which is no version number"
    if OLDEST <= found <= NEWEST:
        return None
    ends = "{}.{} to {}.{}".format(*OLDEST, *NEWEST)
    return f"vLLM {version} is {'older' if found < OLDEST else 'newer'} than what the step recorder knows ({ends})"


def record(scheduler: Any, log: "StepLog", why_not: str | None) -> None:
    """Record `scheduler` into `log` from now on, unless `why_not` says why that cannot be."""
    if why_not is not None:
        log.write({"failed": why_not})
        return
    recorder = StepRecorder(scheduler, log)
    scheduler.add_request = recorder.add_request
    scheduler.schedule = recorder.schedule
    scheduler.update_from_output = recorder.update_from_output


class StepLog:
    """The files of one engine's log."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Make `folder` where it is missing, and begin the first file with `settings`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._stem = folder / f"{_now_ns():020d}-{os.getpid()}"
        boot_id = Path("/proc/sys/kernel/random/boot_id")
        self._header = {
            "wattrace_steps": FORMAT,
            "pid": os.getpid(),
            "boot_id": boot_id.read_text().strip() if boot_id.exists() else None,
            **settings,
        }
        self._count = 0
        self._file = -1
        self._size = 0
        self.next_file({})

    def next_file(self, state: dict[str, Any]) -> None:
        """Go on in a new file, which begins with `state`; the oldest goes when there are many."""
        path = Path(f"{self._stem}-{self._count:06d}.steps")
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        if self._file >= 0:
            os.close(self._file)
            Path(f"{self._stem}-{self._count - FILES:06d}.steps").unlink(missing_ok=True)
        self._file, self._size = file, 0
        self._count += 1
        self.write(self._header | state)

    @property
    def full(self) -> bool:
        """Whether it is time for the next file."""
        return self._size >= FILE_BYTES

    def write(self, value: Any) -> None:
        """Append one frame. A write to the page cache takes microseconds, and who reads the log sees it at once."""
        payload = _encode(value)
        frame = _frame_length.pack(len(payload)) + payload
        if os.write(self._file, frame) != len(frame):
            raise OSError("the disk is full")
        self._size += len(frame)


class _Flight:
    """A step that has been scheduled and has not ended."""

    __slots__ = ("body", "ended", "ids", "kv_usage", "news", "output", "start_ns", "waiting")

    def __init__(self, output: Any, start_ns: int, waiting: int, kv_usage: float) -> None:
        self.output = output  # kept so that its id stays its own
        self.start_ns, self.waiting, self.kv_usage = start_ns, waiting, kv_usage
        self.ids: list[str] = []  # of the requests in `body`
        self.body: tuple[list[int], list[int], list[int]] | None = None
        self.news: list[tuple[int, str, int]] = []
        self.ended: list[int] = []


class StepRecorder:
    """Stands between vLLM's engine and its scheduler."""

    def __init__(self, scheduler: Any, log: StepLog) -> None:
        self._scheduler, self._log = scheduler, log
        self._add, self._schedule, self._update = (
            scheduler.add_request, scheduler.schedule, scheduler.update_from_output
        )  # fmt: skip
        self._flights: dict[int, _Flight] = {}
        self._numbers: dict[str, int] = {}
        self._until: dict[str, int] = {}
        self._unwritten: set[int] = set()  # numbers whose first frame is still to come
        self._next_number = 0
        self._step = 0
        self._last_end_ns = 0
        # What the step after this one looks like if nothing changes.
        self._tokens: dict[str, int] = {}
        self._total = self._context_sum = 0
        self._steady = False
        self._ended: list[int] = []
        self._cost_ns = 0
        self._failed = False

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """`Scheduler.add_request`, observed; it is called between steps, and nothing is kept of it."""
        arrival_ns = _now_ns()
        added = self._add(request, *args, **kwargs)
        if not self._failed:
            added_ns = _now_ns()
            try:
                self._log.write((request.request_id, arrival_ns))
            except Exception as error:  # noqa: BLE001 - whatever it is, vLLM must serve on
                self._fail(error)
            self._cost_ns += _now_ns() - added_ns
        return added

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """`Scheduler.schedule`, observed."""
        start_ns = _now_ns()
        output = self._schedule(*args, **kwargs)
        if not self._failed:
            decided_ns = _now_ns()
            try:
                self._scheduled(output, start_ns)
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(error)
            self._cost_ns += _now_ns() - decided_ns
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any) -> Any:
        """`Scheduler.update_from_output`, observed: the step is done when it is called."""
        end_ns = _now_ns()
        if not self._failed:
            try:
                flight = self._flights.pop(id(scheduler_output), None)
                if scheduler_output.scheduled_spec_decode_tokens:
                    self._take_back(scheduler_output, model_runner_output)
                if flight is not None:
                    self._ends(flight, end_ns)
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(error)
            self._cost_ns += _now_ns() - end_ns
        return self._update(scheduler_output, model_runner_output, *args, **kwargs)

    def _scheduled(self, output: Any, start_ns: int) -> None:
        """Note down what `output` schedules, before the requests move on."""
        for request_id in output.finished_req_ids:
            if (number := self._numbers.pop(request_id, None)) is not None:
                self._ended.append(number)
                del self._until[request_id]
        total = output.total_num_scheduled_tokens
        if not total:
            return
        scheduler, tokens, cached = self._scheduler, output.num_scheduled_tokens, output.scheduled_cached_reqs
        flight = _Flight(output, start_ns, len(scheduler.waiting), scheduler.kv_cache_manager.usage)
        flight.ended, self._ended = self._ended, []
        context_sum = sum(cached.num_computed_tokens)
        starts = [new.req_id for new in output.scheduled_new_reqs] + list(cached.resumed_req_ids)
        # Most steps go on like the one before; then a few sums are all that it takes. Drafts may be rejected, so after
        # a step that had any the contexts are looked at one by one.
        drafts = bool(output.scheduled_spec_decode_tokens)
        goes_on = self._steady and not (starts or drafts) and context_sum == self._context_sum + self._total
        if not (goes_on and tokens == self._tokens):
            for request_id in starts:
                flight.news.append(self._start(request_id))
            new = output.scheduled_new_reqs
            ids = flight.ids = [*cached.req_ids, *[request.req_id for request in new]]
            contexts = [*cached.num_computed_tokens, *[request.num_computed_tokens for request in new]]
            # By map, whose loop is not Python's: there may be hundreds of requests.
            flight.body = (list(map(self._numbers.__getitem__, ids)), list(map(tokens.__getitem__, ids)), contexts)
            context_sum = sum(contexts)
        self._tokens, self._total, self._context_sum, self._steady = tokens, total, context_sum, not drafts
        self._flights[id(output)] = flight

    def _start(self, request_id: str) -> tuple[int, str, int]:
        """Take a request that starts, or starts again after a preemption, with all that it has generated so far."""
        number = self._numbers.get(request_id)
        if number is None:
            number = self._numbers[request_id] = self._next_number
            self._unwritten.add(number)
            self._next_number += 1
        until = self._until[request_id] = self._scheduler.requests[request_id].num_tokens
        return number, request_id, until

    def _take_back(self, output: Any, model_output: Any) -> None:
        """Correct the steps in flight, which were scheduled as if no draft of `output` would be rejected.

        A worker answers with the drafts that it accepts and one token more; with nothing while a prompt is unfinished.
        """
        rejected = {}
        for request_id, drafts in output.scheduled_spec_decode_tokens.items():
            answer = model_output.sampled_token_ids[model_output.req_id_to_index[request_id]]
            if len(answer) and len(drafts) >= len(answer):
                rejected[request_id] = len(drafts) + 1 - len(answer)
        for flight in self._flights.values() if rejected else ():
            for _, request_id, _ in flight.news:
                rejected.pop(request_id, None)  # it starts again: its contexts are its own from here on
            assert flight.body is not None  # a step after drafts is written in full
            contexts = flight.body[2]
            for at, request_id in enumerate(flight.ids):
                contexts[at] -= rejected.get(request_id, 0)

    def _ends(self, flight: _Flight, end_ns: int) -> None:
        """Write the step that has just ended."""
        start_ns = max(flight.start_ns, self._last_end_ns)
        self._last_end_ns = end_ns
        if self._log.full:
            self._turn_over(flight)
        frame = (
            self._step, start_ns, end_ns, flight.waiting, flight.kv_usage,
            self._cost_ns, flight.body, flight.news, flight.ended,
        )  # fmt: skip
        self._step += 1
        self._cost_ns = 0
        self._log.write(frame)
        self._unwritten.difference_update(number for number, _, _ in flight.news)

    def _turn_over(self, flight: _Flight) -> None:
        """Begin a new file at a step that can be read by itself; have the next one be such where this one is not."""
        if flight.body is not None:
            known = [(n, i, self._until[i]) for i, n in self._numbers.items() if n not in self._unwritten]
            self._log.next_file({"requests": known})
        else:
            self._steady = False  # the next step is written in full

    def _fail(self, error: Exception) -> None:
        """Say why recording ends, in the log where it is possible."""
        self._failed = True
        try:
            self._log.write({"failed": f"{type(error).__name__}: {error}"})
        except OSError:
            return
