"""What one request's answer says, and the record that is kept of it.

Tokens are counted by the server's usage, not by chunks: one chunk may carry several tokens. Where usage comes at the
end only, it may prove that each chunk bore one.
"""

import errno
import os
from array import array
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

GONE = "the server went away"  # what the error of a request that found nobody any more begins with
_NOBODY = {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ETIMEDOUT}
_ERROR_CHARS = 300  # of a server's error body: enough to tell, small enough for a table cell
_LINE_BYTES = 1 << 20  # of one line of a stream: events have some 100 bytes, those of 128 KB must work
_DATA = b"data:"
_DATA_SPACE = b"data: "
_DONE = b"[DONE]"
_MAX_CHUNK_TOKENS = 2**16 - 1  # what a cell of chunk_tokens holds

_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]  # what a cell of a token column holds


class _PromptDetails(msgspec.Struct):
    cached_tokens: _Count | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None  # what vLLM calls the thoughts of a model that thinks aloud
    reasoning: str | None = None  # the same, as later versions call it


class _Choice(msgspec.Struct):
    text: str | None = None  # of completions
    delta: _Message | None = None  # of streamed chats
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


# Typed decoding of such a chunk takes 0.4 µs: less than to search its bytes for the count.
_decode = msgspec.json.Decoder(_Chunk).decode


def _times() -> "array[int]":
    return array("q")


def _counts() -> "array[int] | None":
    return array("H")


@dataclass(slots=True, eq=False)  # a request is itself, whatever its figures
class Record:
    """One row of `requests.parquet`, filled as the request goes on; times that were never reached stay None."""

    request_id: int
    instance: int
    scheduled_ns: int
    output_tokens_wanted: int
    sent_ns: int | None = None
    headers_ns: int | None = None
    first_token_ns: int | None = None
    last_token_ns: int | None = None
    done_ns: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    status: str = "aborted"
    http_status: int | None = None
    error: str | None = None
    worker: int = 0
    chunk_ns: "array[int]" = field(default_factory=_times)
    chunk_tokens: "array[int] | None" = field(default_factory=_counts)
    by_chunks: bool = False  # whether chunk_tokens are ones because usage proved it at the end; not in the table


class LongLineError(Exception):
    """A stream that has a line of more than 1 MiB: no server's event is as long."""

    def __init__(self) -> None:
        super().__init__("a line of more than 1 MiB")


class EventStream:
    """Parses one response's server-sent events into its record."""

    __slots__ = ("_record", "_rest", "_rest_bytes", "done", "error", "finished")

    def __init__(self, record: Record) -> None:
        self._record = record
        self._rest: list[bytes] = []  # pieces of the line that has not ended, put together when it has
        self._rest_bytes = 0
        self.done = False
        self.finished = False
        self.error: str | None = None

    def feed(self, data: bytes, at_ns: int) -> None:
        """Take `data`, which came at `at_ns`; an event cut in two waits for its rest.

        Raises `LongLineError` for a line of more than 1 MiB: nothing more is to be taken then.
        """
        # One whole event is what servers send at a time.
        if data.find(b"\n") == len(data) - 2 and data.startswith(_DATA_SPACE) and not self._rest:
            self._line(data[6:-2], at_ns)
            return
        first, *others = data.split(b"\n")
        if others:
            *lines, last = b"".join([*self._rest, first]), *others
            for line in lines:
                if len(line) > _LINE_BYTES:
                    raise LongLineError
                if line.startswith(_DATA):
                    self._line(line[len(_DATA) :].strip(), at_ns)
            self._rest, self._rest_bytes = [], 0
        else:
            last = first
        if last:
            self._rest.append(last)
            self._rest_bytes += len(last)
            if self._rest_bytes > _LINE_BYTES:
                raise LongLineError

    def _line(self, payload: bytes, at_ns: int) -> None:
        if payload == _DONE:
            self.done = True
            return
        try:
            chunk = _decode(payload)
        except msgspec.DecodeError:
            if payload.strip() == _DONE:
                self.done = True
            else:
                self.error = f"not a completion chunk: {shorten(payload)}"
            return
        if chunk.error is not None:
            self.error = shorten(msgspec.json.encode(chunk.error))
            return
        record = self._record
        tokens = None if chunk.usage is None else _count(record, chunk.usage)
        text = False
        for choice in chunk.choices:
            if choice.finish_reason is not None:
                self.finished = self.finished or choice.finish_reason != ""
            text = text or bool(choice.text) or (choice.delta is not None and _says(choice.delta))
        # A chunk bears tokens when usage grew; a server that sends usage only at the end shows text instead.
        # The closing usage chunk has no choices: it repeats a count, or reveals it too late to be a token time.
        counts = record.chunk_tokens
        if not ((text if tokens is None or counts is None else tokens) and chunk.choices):
            return
        if record.first_token_ns is None:
            record.first_token_ns = at_ns
        record.last_token_ns = at_ns
        record.chunk_ns.append(at_ns)
        if tokens is None or counts is None or tokens > _MAX_CHUNK_TOKENS:
            record.chunk_tokens = None
        else:
            counts.append(tokens)

    def judge(self) -> None:
        """Enter the status of an answer that has come to its end."""
        record = self._record
        if self.error is not None:
            record.status, record.error = "stream_error", self.error
        elif not (self.done or self.finished):
            record.status, record.error = "stream_error", "the stream ended without a finish reason or [DONE]"
        else:
            if record.chunk_tokens is None and len(record.chunk_ns) == record.output_tokens:
                # As many chunks with text as tokens: each bore one.
                record.chunk_tokens, record.by_chunks = array("H", [1]) * len(record.chunk_ns), True
            _judge_length(record)


def take_whole(record: Record, body: bytes, at_ns: int) -> None:
    """Enter what the answer to a request that was not streamed says, whose end came at `at_ns`.

    Its last token came with it; when the others came nobody knows.
    """
    record.chunk_tokens = None
    try:
        answer = _decode(body)
    except msgspec.DecodeError:
        record.status, record.error = "stream_error", f"not a completion: {shorten(body)}"
        return
    if answer.usage is not None:
        _count(record, answer.usage)
    if answer.error is not None:
        record.status, record.error = "stream_error", shorten(msgspec.json.encode(answer.error))
    elif not any(choice.finish_reason for choice in answer.choices):
        record.status, record.error = "stream_error", "the answer has no finish reason"
    else:
        record.last_token_ns = at_ns
        _judge_length(record)


def _says(message: _Message) -> bool:
    """Whether a part of a chat's answer has text; the opening one has a role alone."""
    return bool(message.content or message.reasoning_content or message.reasoning)


def _count(record: Record, usage: _Usage) -> int | None:
    """Take the counts of `usage`; the output tokens that it adds, None where it does not say."""
    if usage.prompt_tokens is not None:
        record.input_tokens = usage.prompt_tokens
    details, count = usage.prompt_tokens_details, usage.completion_tokens
    if details is not None and details.cached_tokens is not None:
        record.cached_tokens = details.cached_tokens
    if count is None:
        return None
    added = count - (record.output_tokens or 0)
    record.output_tokens = count
    return added if added > 0 else 0  # noqa: FURB136 - a call of max() would cost as much as all of this


def _judge_length(record: Record) -> None:
    if record.output_tokens is not None and record.output_tokens != record.output_tokens_wanted:
        record.status = "length_mismatch"
        record.error = f"{record.output_tokens} output tokens, {record.output_tokens_wanted} wanted"
    else:
        record.status = "ok"


def network_error(error: Exception, *, answered: bool) -> str:
    """`error` as a line; `answered`: whether the server had answered before, so that nobody there means it has gone."""
    number = getattr(error, "errno", None)
    if answered and number in _NOBODY:
        return f"{GONE}: {os.strerror(number)}"
    return shorten(f"{type(error).__name__}: {error}".encode())


def shorten(body: bytes) -> str:
    """An error body as one short line that a terminal can show."""
    return printable(" ".join(body.decode("utf-8", "replace").split())[:_ERROR_CHARS])[:_ERROR_CHARS]


def printable(text: str) -> str:
    """A server's words with control characters as Python's `repr` writes them: raw, they redraw a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
