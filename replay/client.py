"""Send one completion request, stamp what comes back, and keep the record.

Tokens are counted by the server's usage, not by chunks: one chunk may carry several tokens. Times are taken when the
bytes are read; the bytes are parsed after.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

import aiohttp
import msgspec

from replay.clock import now_ns

_ERROR_CHARS = 300  # of a server's error body: enough to tell, small enough for a table cell
_DATA = b"data:"
_DONE = b"[DONE]"
_MAX_CHUNK_TOKENS = 2**16 - 1  # what a cell of chunk_tokens holds

_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]  # what a cell of a token column holds


class _PromptDetails(msgspec.Struct):
    cached_tokens: _Count | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


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
    chunk_ns: list[int] = field(default_factory=list)
    chunk_tokens: list[int] | None = field(default_factory=list)


class _Stream:
    """Parses one response's server-sent events into its record."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._rest = b""
        self.done = False
        self.finished = False
        self.error: str | None = None

    def feed(self, data: bytes, at_ns: int) -> None:
        """Take `data`, read at `at_ns`; an event cut in two waits for its rest."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(_DATA):
                payload = line[len(_DATA) :].strip()
                if payload == _DONE:
                    self.done = True
                else:
                    self._event(payload, at_ns)

    def _event(self, payload: bytes, at_ns: int) -> None:
        try:
            chunk = _decode(payload)
        except msgspec.DecodeError:
            self.error = f"not a completion chunk: {_shorten(payload)}"
            return
        if chunk.error is not None:
            self.error = _shorten(msgspec.json.encode(chunk.error))
            return
        record, tokens = self._record, None
        if chunk.usage is not None:
            tokens = self._count(chunk.usage)
        text = any(choice.text for choice in chunk.choices)
        self.finished |= any(choice.finish_reason for choice in chunk.choices)
        # A chunk bears tokens when usage grew; a server that sends usage only at the end shows text instead.
        # The closing usage chunk has no choices: it repeats a count, or reveals it too late to be a token time.
        counted = tokens is not None and record.chunk_tokens is not None
        if not (chunk.choices and (tokens if counted else text)):
            return
        if record.first_token_ns is None:
            record.first_token_ns = at_ns
        record.last_token_ns = at_ns
        record.chunk_ns.append(at_ns)
        if tokens is None or record.chunk_tokens is None or tokens > _MAX_CHUNK_TOKENS:
            record.chunk_tokens = None
        else:
            record.chunk_tokens.append(tokens)

    def _count(self, usage: _Usage) -> int | None:
        """Take the counts of `usage`; the output tokens that it adds, None where it does not say."""
        record = self._record
        if usage.prompt_tokens is not None:
            record.input_tokens = usage.prompt_tokens
        if usage.prompt_tokens_details is not None and usage.prompt_tokens_details.cached_tokens is not None:
            record.cached_tokens = usage.prompt_tokens_details.cached_tokens
        if usage.completion_tokens is None:
            return None
        added = max(0, usage.completion_tokens - (record.output_tokens or 0))
        record.output_tokens = usage.completion_tokens
        return added


def _shorten(body: bytes) -> str:
    """An error body as one short line."""
    return " ".join(body.decode("utf-8", "replace").split())[:_ERROR_CHARS]


class CompletionsClient:
    """Sends to one instance's `/v1/completions` through a shared aiohttp session."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, timeout_s: float | None) -> None:
        """`timeout_s` bounds a whole request; None waits for ever."""
        self._session = session
        self._url = f"{base_url}/v1/completions"
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def send(self, record: Record, body: bytes, name: str | None = None) -> None:
        """Send `body`, read the stream to its end and fill `record`.

        `name` goes with it as its id where that is not the record's own. Server and network errors become the record's
        status; cancelling leaves it `aborted`.
        """
        headers = {"Content-Type": "application/json", "X-Request-Id": name or str(record.request_id)}
        record.sent_ns = now_ns()
        try:
            async with self._session.post(self._url, data=body, headers=headers, timeout=self._timeout) as response:
                record.headers_ns = now_ns()
                record.http_status = response.status
                if response.status != 200:
                    record.error = _shorten(await response.read())
                    record.status = "http_error"
                else:
                    await self._read(response, record)
        except TimeoutError as error:  # the operating system's too, which has words of its own
            record.status, record.error = "timeout", str(error) or f"no end within {self._timeout.total} s"
        except (aiohttp.ClientError, OSError) as error:
            record.status = "connect_error" if record.headers_ns is None else "stream_error"
            record.error = _shorten(f"{type(error).__name__}: {error}".encode())
        finally:
            if record.status != "aborted":
                record.done_ns = now_ns()

    @staticmethod
    async def _read(response: aiohttp.ClientResponse, record: Record) -> None:
        """Read the event stream and judge how it ended."""
        stream = _Stream(record)
        while data := await response.content.readany():
            stream.feed(data, now_ns())
        if stream.error is not None:
            record.status, record.error = "stream_error", stream.error
        elif not (stream.done or stream.finished):
            record.status, record.error = "stream_error", "the stream ended without a finish reason or [DONE]"
        elif record.output_tokens is not None and record.output_tokens != record.output_tokens_wanted:
            record.status = "length_mismatch"
            record.error = f"{record.output_tokens} output tokens, {record.output_tokens_wanted} wanted"
        else:
            record.status = "ok"
