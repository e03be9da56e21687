"""Follow the log of vLLM's step recorder (`replay/vllm_ext`) and write the tables steps, segments and arrivals.

`StepFollower` starts `python -m replay.steplog`, which reads what the engine appends and writes parts a second apart;
it reads to the log's end when its standard input closes, which happens on every way that replay can end.
"""

import re
import signal
import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np

from replay.child import Child, parent_left, say
from replay.clock import NS_PER_MS, NS_PER_S, now_ns
from replay.steps import Kind, Part, StepWriter, part_prefix, totals
from tracegen.errors import ReplayError, WattraceError

FORMATS = (1, 2)  # of the log; 1 says nothing of arrivals
_ARRIVAL_FIELDS = 2  # a step has more
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_POLL_NS = 200 * NS_PER_MS
_FLUSH_NS = NS_PER_S
_LENGTH = struct.Struct("<I")
# What vLLM makes of the header `X-Request-Id: 3f2a9c1d-17` (run, request): the prompt's number and, in the engine, a
# random suffix follow.
_ENGINE_ID = r"cmpl-{run}-(\d+)-\d+(?:-[0-9a-f]+)?"
_LARGEST_ID = 2**64 - 1


class StepLogReader:
    """Reads the frames of the newest engine that logs into a folder, as they come."""

    def __init__(self, folder: Path) -> None:
        """Raises `ReplayError` when `folder` has no log."""
        stems = sorted({path.name.rpartition("-")[0] for path in folder.glob("*.steps")})
        if not stems:
            raise ReplayError(
                f"{folder}: no step log; start vLLM with what 'replay vllm-args --steps {folder}' prints, on this host"
            )
        self._folder, self._stem = folder, stems[-1]
        self._path: Path | None = None
        self._offset = 0
        self._rest = b""

    def frames(self) -> Iterator[Any]:
        """What has been written whole since the last call, in order; each file begins with a map."""
        while True:
            files = sorted(self._folder.glob(f"{self._stem}-*.steps"))
            if self._path is None:
                self._path = files[0]
            yield from self._read()
            later = [path for path in files if path > self._path]
            if not later:
                return
            yield from self._read()  # what came before the writer went on to the next file
            self._path, self._offset, self._rest = later[0], 0, b""

    def _read(self) -> Iterator[Any]:
        assert self._path is not None
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            raise ReplayError(
                f"{self._path}: removed before it was read; the steps of this run are not whole"
            ) from None
        self._offset += len(data)
        data = self._rest + data
        at = 0
        while len(data) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, at)
            if len(data) - at - _LENGTH.size < length:
                break
            at += _LENGTH.size
            try:
                yield msgspec.msgpack.decode(data[at : at + length])
            except msgspec.DecodeError:
                raise ReplayError(f"{self._path}: is no step log, or it is damaged") from None
            at += length
        self._rest = data[at:]


@dataclass(eq=False, slots=True)
class _Request:
    """A request in the engine; compared by identity."""

    request_id: int | None  # null: warm-up or not ours
    prefill_until: int


class StepLogDecoder:
    """Turns frames into rows of the run directory."""

    def __init__(self, writer: StepWriter, since_ns: int, run: str) -> None:
        """Steps that ended before `since_ns` are left out; requests are ours whose ids begin with `run`."""
        self._writer, self._since_ns = writer, since_ns
        self._ours = re.compile(_ENGINE_ID.format(run=re.escape(run)))
        self._requests: dict[int, _Request] = {}
        self._engine_ids: dict[int, str] = {}  # by request id
        self._step: tuple[list[int], list[int], list[int]] = ([], [], [])
        self._next: int | None = None
        self.cost_ns = array("q")
        self.settings: dict[str, Any] | None = None
        self.failed: str | None = None
        self.missing = 0

    def feed(self, frame: Any) -> None:
        """Take one frame. Raises `ReplayError` when the log is another program's or another host's."""
        if isinstance(frame, dict):
            self._describe(frame)
            return
        if len(frame) == _ARRIVAL_FIELDS:
            engine_id, arrival_ns = frame
            if arrival_ns >= self._since_ns:
                self._writer.arrive(self._request_id(engine_id), arrival_ns)
            return
        step, start_ns, end_ns, waiting, kv_usage, cost_ns, body, news, ended = frame
        ours = end_ns >= self._since_ns
        for number, engine_id, until in news:
            self._start(number, engine_id, until, ours=ours)
        numbers, tokens, contexts = body or self._go_on()
        self._step = (numbers, tokens, contexts)
        if ours:
            if self._next is not None and step != self._next:
                self.missing += step - self._next
                self._writer.skip(step - self._next)
            self._next = step + 1
            self.cost_ns.append(cost_ns)
            parts = [self._part(*part) for part in zip(numbers, tokens, contexts, strict=True)]
            self._writer.add(start_ns, end_ns, totals(parts), parts, waiting, kv_usage)
        for number in ended:
            self._requests.pop(number, None)

    def _describe(self, frame: dict[str, Any]) -> None:
        """Take a file's first frame, or the word that recording has ended."""
        if "failed" in frame:
            self.failed = str(frame["failed"])
            return
        if frame.get("wattrace_steps") not in FORMATS:
            raise ReplayError(
                f"the step log has format {frame.get('wattrace_steps')}, this program reads {FORMATS[0]} to "
                f"{FORMATS[-1]}; restart vLLM with what this program's 'replay vllm-args' prints"
            )
        here = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else None
        if frame.get("boot_id") != here:
            raise ReplayError(
                "the step log was written on another host, or before this one started; its clock is not ours"
            )
        for number, engine_id, until in frame.pop("requests", []):
            if number not in self._requests:
                self._start(number, engine_id, until, ours=False)
        self.settings = frame

    def _start(self, number: int, engine_id: str, until: int, *, ours: bool) -> None:
        if (known := self._requests.get(number)) is not None:  # goes on after a preemption
            known.prefill_until = until
            return
        self._requests[number] = _Request(self._request_id(engine_id) if ours else None, until)

    def _request_id(self, engine_id: str) -> int | None:
        """Which of our requests the engine calls `engine_id`; None where it is not ours."""
        match = self._ours.fullmatch(engine_id)
        if match is None or int(match[1]) > _LARGEST_ID:
            return None
        # Whoever sends one of our ids again is not us.
        first = self._engine_ids.setdefault(int(match[1]), engine_id)
        return int(match[1]) if first == engine_id else None

    def _go_on(self) -> tuple[list[int], list[int], list[int]]:
        numbers, tokens, contexts = self._step
        return numbers, tokens, [context + count for context, count in zip(contexts, tokens, strict=True)]

    def _part(self, number: int, tokens: int, context: int) -> Part:
        request = self._requests.get(number)
        if request is None:  # its beginning is not in this file
            request = self._requests[number] = _Request(None, 0)
        kind: Kind = "prefill" if context < request.prefill_until else "decode"
        return request, kind, tokens, context


def summary(decoder: StepLogDecoder) -> dict[str, Any]:
    """What there is to say of a recorded engine: its settings, and what recording cost it, in microseconds a step."""
    cost_us = np.frombuffer(decoder.cost_ns, dtype=np.int64) / 1e3 if decoder.cost_ns else np.zeros(0)
    return {
        "engine": decoder.settings,
        "steps": len(cost_us),
        "missing": decoder.missing,
        "overhead_us_mean": float(cost_us.mean()) if len(cost_us) else None,
        "overhead_us_p99": float(np.quantile(cost_us, 0.99)) if len(cost_us) else None,
        "failed": decoder.failed,
    }


class StepFollower:
    """Writes an engine's steps into the run directory while this async context lasts."""

    def __init__(
        self, folder: Path, run_dir: Path, instance: int, since_ns: int, run: str, first_step: int = 0
    ) -> None:
        """`folder` is what WATTRACE_STEPS named when vLLM was started; `run` is what our requests' ids begin with.

        Steps are numbered from `first_step` on.
        """
        self._run_dir, self._instance = run_dir, instance
        self._arguments = (folder, run_dir, instance, since_ns, run, first_step)
        self._child = Child("replay.steplog", *self._arguments)
        self.summary: dict[str, Any] = {}
        self.error: str | None = None  # why there are no steps

    async def __aenter__(self) -> Self:
        """Start, and read the log's beginning; `error` says why that cannot be done."""
        self._take(await self._child.start() or {"error": "the process that follows the steps ended without a word"})
        return self

    async def __aexit__(self, *_: object) -> None:
        """Read to the log's end; all steps are written when this returns.

        The log is still there should the process have been killed: then it is read anew.
        """
        last = await self._child.stop()
        if not last and self.error is None:
            for table in ("steps", "segments", "arrivals"):
                for part in (self._run_dir / f"{table}.parquet").glob(f"{part_prefix(self._instance)}-*"):
                    part.unlink()
            self._child = Child("replay.steplog", *self._arguments)
            await self._child.start()
            last = await self._child.stop()
        for message in last or [{"error": "the process that follows the steps was killed"}]:
            self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        self.error = message.pop("error", self.error)
        self.summary |= message


def follow(folder: Path, run_dir: Path, instance: int, since_ns: int, run: str, first_step: int = 0) -> None:
    """Write steps as they come, numbered from `first_step` on, until stdin closes, then what is left."""
    reader = StepLogReader(folder)
    writer = StepWriter(run_dir, instance)
    writer.skip(first_step)
    decoder = StepLogDecoder(writer, since_ns, run)
    _feed(decoder, reader)
    if decoder.failed is not None and not decoder.cost_ns:
        raise ReplayError(decoder.failed)
    if decoder.settings is None:
        raise ReplayError(f"{folder}: its newest *.steps file is no step log; is this the folder given to vLLM?")
    say(summary(decoder))
    next_flush_ns = now_ns() + _FLUSH_NS
    open_ = True
    while open_:
        open_ = not parent_left(now_ns() + _POLL_NS)
        _feed(decoder, reader)
        if now_ns() >= next_flush_ns or not open_:
            writer.write(writer.take())
            next_flush_ns = now_ns() + _FLUSH_NS
    say(summary(decoder))


def _feed(decoder: StepLogDecoder, reader: StepLogReader) -> None:
    for frame in reader.frames():
        decoder.feed(frame)


def _main(argv: list[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # stdin tells
    folder, run_dir, instance, since_ns, run, first_step = argv
    try:
        follow(Path(folder), Path(run_dir), int(instance), int(since_ns), run, int(first_step))
    except WattraceError as error:
        say({"error": str(error)})


if __name__ == "__main__":
    _main(sys.argv[1:])
