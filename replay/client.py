"""Send one request through aiohttp, stamp what comes back, and keep the record.

The general path: TLS, proxies, whatever aiohttp speaks. Times are taken when the bytes are read; the bytes are parsed
after.
"""

import ast
import io
import re
from typing import Any

import aiohttp

from replay.clock import now_ns
from replay.http1 import not_http
from replay.stream import EventStream, LongLineError, Record, network_error, shorten, take_whole

_LARGE_BYTES = 1 << 20
_SHOWN = re.compile(r"^\s*(b(['\"]).*\2)\s*$", re.MULTILINE)  # what aiohttp's parser could not read, as it shows it


def tell_reuse() -> aiohttp.TraceConfig:
    """What a session needs, so that a request is sent again where an idle connection broke under it."""

    async def note(_: aiohttp.ClientSession, context: Any, __: aiohttp.TraceConnectionReuseconnParams) -> None:
        context.trace_request_ctx.add("reused")

    config = aiohttp.TraceConfig()
    config.on_connection_reuseconn.append(note)
    return config


class CompletionsClient:
    """Sends to one instance's `/v1/completions` (or chats) through a shared aiohttp session."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        base_url: str,
        timeout_s: float | None,
        *,
        path: str = "/v1/completions",
        stream: bool = True,
    ) -> None:
        """`timeout_s` bounds a whole request; None waits for ever. `stream`: whether answers are streams of events."""
        self._session = session
        self._url = base_url + path
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._stream = stream
        self._answered = False  # whether the server has answered anything

    async def send(self, record: Record, body: bytes, name: str | None = None) -> None:
        """Send `body`, read the answer to its end and fill `record`.

        `name` goes with it as its id where that is not the record's own. Server and network errors become the record's
        status; cancelling leaves it `aborted`.
        """
        headers = {"Content-Type": "application/json", "X-Request-Id": name or str(record.request_id)}
        try:
            while not await self._sent(record, body, headers):
                pass
        except TimeoutError as error:  # the operating system's too, which has words of its own
            record.status, record.error = "timeout", str(error) or f"no end within {self._timeout.total} s"
        except LongLineError as error:
            record.status, record.error = "stream_error", str(error)
        except aiohttp.ClientResponseError as error:
            record.status, record.error = "http_error", _bad_head(error)
        except (aiohttp.ClientError, OSError) as error:
            record.status = "connect_error" if record.headers_ns is None else "stream_error"
            record.error = network_error(error, answered=self._answered)
        finally:
            if record.status != "aborted":
                record.done_ns = now_ns()

    async def _sent(self, record: Record, body: bytes, headers: dict[str, str]) -> bool:
        """Send once; False where an idle connection broke under it before a byte of an answer had come."""
        reused: set[str] = set()
        try:
            await self._post(record, body, headers, reused)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError):
            if not reused or record.headers_ns is not None:
                raise
            return False
        return True

    async def _post(self, record: Record, body: bytes, headers: dict[str, str], reused: set[str]) -> None:
        """Send once; `reused` gets a member where that is on a connection that was used before."""
        record.sent_ns = now_ns()
        # aiohttp warns of a large body that is bytes: it would be written in one go.
        data = body if len(body) < _LARGE_BYTES else io.BytesIO(body)
        async with self._session.post(
            self._url, data=data, headers=headers, timeout=self._timeout, trace_request_ctx=reused
        ) as response:
            record.headers_ns = now_ns()
            self._answered = True
            record.http_status = response.status
            if response.status != 200:
                error = shorten(await response.read())
                record.status, record.error = "http_error", error
            elif self._stream:
                await self._read(response, record)
            else:
                body = await response.read()
                take_whole(record, body, now_ns())

    @staticmethod
    async def _read(response: aiohttp.ClientResponse, record: Record) -> None:
        """Read the event stream and judge how it ended."""
        stream = EventStream(record)
        while data := await response.content.readany():
            stream.feed(data, now_ns())
        stream.judge()


def _bad_head(error: aiohttp.ClientResponseError) -> str:
    """What is wrong with an answer whose head cannot be read."""
    shown = _SHOWN.search(error.message)
    if shown is None or not error.message.startswith("Bad status line"):
        return shorten(error.message.encode())
    return not_http(ast.literal_eval(shown[1]))
