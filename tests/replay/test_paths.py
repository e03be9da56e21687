"""Whole loads over both paths: each request is accounted for once, at its time, whatever the server does."""

import asyncio
import errno
import json
import os
import re
import threading
import time
from collections import Counter
from itertools import pairwise

import polars as pl
import pytest

from replay.stamps import ArrivalClock
from replay.timerfd import now_ns
from replay.workload import CHAT

MS = 1_000_000
BOTH = pytest.mark.parametrize("kind", ["fast", "general"])
DONE = b"data: [DONE]\n\n"


def event(completion, *, finish=None, prompt=3, chat=False):
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    said = {"delta": {"content": " a"}} if chat else {"text": " a"}
    return b"data: " + json.dumps({"choices": [{"finish_reason": finish, **said}], "usage": usage}).encode() + b"\n\n"


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


class Server:
    """Answers each request by `script(number of the request, its body)`: pieces to write, None to break off there."""

    def __init__(self, script):
        self.script, self.heads, self.bodies, self.connections = script, [], [], 0
        self.url = ""

    async def _serve(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", head)[1]))
                self.heads.append(head)
                self.bodies.append(json.loads(body))
                number = int(re.search(rb"(?i)x-request-id: .*?(\d+)\r", head)[1])
                for piece in self.script(number, self.bodies[-1]):
                    if piece is None:
                        writer.transport.abort()
                        return
                    if isinstance(piece, float):
                        await asyncio.sleep(piece)
                    else:
                        writer.write(piece)
                        await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass  # the client is done, or the test
        finally:
            writer.close()

    def __enter__(self):
        started, self._stop = threading.Event(), None

        async def main():
            handlers = set()

            async def handle(reader, writer):
                handlers.add(asyncio.current_task())
                await self._serve(reader, writer)

            server = await asyncio.start_server(handle, "127.0.0.1", 0, limit=2**22)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            stop, loop = asyncio.Event(), asyncio.get_running_loop()
            self._stop = lambda: loop.call_soon_threadsafe(stop.set)
            started.set()
            async with server:
                await stop.wait()
            await asyncio.sleep(0.01)  # who was let in at the last moment is handled too
            for handler in handlers:
                handler.cancel()
            await asyncio.gather(*handlers, return_exceptions=True)
            await asyncio.sleep(0)  # what was closed is closed now

        self._thread = threading.Thread(target=lambda: asyncio.run(main()))
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *_):
        self._stop()
        self._thread.join()


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def good(tokens=3, pause_s=0.0, **form):
    """A whole answer, chunk by chunk."""
    yield HEAD
    for count in range(1, tokens + 1):
        if pause_s:
            yield pause_s
        yield chunk(event(count, finish="length" if count == tokens else None, **form))
    yield chunk(DONE) + b"0\r\n\r\n"


FAULTS = {
    0: ("stream_error", lambda: [HEAD, chunk(event(1)), 0.02, None]),  # drops after a token
    1: ("http_error", lambda: [b"HTTP/1.1 503 No\r\nContent-Length: 4\r\n\r\nbusy"]),
    2: ("timeout", lambda: [HEAD, chunk(event(1)), 3600.0]),  # stalls
    3: ("stream_error", lambda: [HEAD, chunk(event(1)), 0.02, chunk(event(2))[:20], 0.02, None]),  # cut in a chunk
    4: ("ok", lambda: [HEAD, *(chunk(event(i, finish="length" if i == 3 else None)) for i in (1, 2, 3)), b"0\r\n\r\n"]),
    5: ("connect_error", lambda: [None]),
}


@BOTH
def test_faults_at_a_fifth_of_the_requests_leave_each_on_record_once(send_rows, kind):
    def script(number, _):
        place = number - 42
        return FAULTS[place // 5 % 6][1]() if place % 5 == 0 else good()

    with Server(script) as server:
        rows = send_rows(kind, server.url, [(i, 3, 3) for i in range(300)], request_timeout_s=2.0).run()
    assert sorted(row.request_id for row in rows) == list(range(42, 342))
    expected = Counter(FAULTS[i // 5 % 6][0] if i % 5 == 0 else "ok" for i in range(300))
    assert Counter(row.status for row in rows) == expected
    assert all(row.output_tokens == row.output_tokens_wanted for row in rows if row.status == "ok")
    assert all(row.done_ns >= row.sent_ns >= row.scheduled_ns for row in rows)


@BOTH
def test_a_line_without_an_end_ends_its_answer_and_nobody_elses(send_rows, kind):
    """Of 1 MiB it is still an event; nothing is read of what comes behind that."""

    def script(number, _):
        if number == 42:
            return [HEAD, chunk(b"data: "), *[chunk(b"x" * 2**16)] * 80, 3600.0]
        if number == 43:
            spaces = 2**20 - len(event(2).rstrip())
            return [HEAD, chunk(event(1)), chunk(event(2).rstrip() + b" " * spaces + b"\n\n"), *list(good())[3:]]
        return good()

    with Server(script) as server:
        rows = send_rows(kind, server.url, [(i, 3, 3) for i in range(11)], request_timeout_s=20.0).run()
    first, second, *others = sorted(rows, key=lambda row: row.request_id)
    assert (first.status, first.error) == ("stream_error", "a line of more than 1 MiB")
    assert (second.status, second.output_tokens, list(second.chunk_tokens)) == ("ok", 3, [1, 1, 1])
    assert {row.status for row in others} == {"ok"}


@BOTH
def test_connections_are_used_again(send_rows, kind):
    with Server(lambda *_: good()) as server:
        rows = send_rows(kind, server.url, [(40 * i, 3, 3) for i in range(10)]).run()
    assert {row.status for row in rows} == {"ok"}
    assert server.connections < 10


@BOTH
def test_a_connection_that_the_server_gave_up_fails_no_request(send_rows, kind):
    def script(number, _):
        yield from good()
        yield 0.05
        yield None

    with Server(script) as server:
        rows = send_rows(kind, server.url, [(45 * i, 3, 3) for i in range(20)]).run()
    assert Counter(row.status for row in rows) == {"ok": 20}


def test_a_request_that_meets_a_broken_connection_is_sent_again_on_a_new_one(send_rows):
    """The server closes it just when the request comes: no byte of an answer has come, so that nothing was done."""
    with Server(lambda number, _: [None] if number == 43 and len(server.heads) == 2 else good()) as server:
        rows = send_rows("fast", server.url, [(0, 3, 3), (100, 3, 3)]).run()
    assert [row.status for row in rows] == ["ok", "ok"]
    assert [b"X-Request-Id: 43" in head for head in server.heads] == [False, True, True]


@BOTH
def test_who_finds_nobody_where_a_server_had_answered_says_that_it_went_away(send_rows, kind, until):
    rows = []
    with Server(lambda *_: good()) as server:
        sending = send_rows(kind, server.url, [(0, 3, 3), (1500, 3, 3), (1510, 3, 3)])
        thread = threading.Thread(target=lambda: rows.extend(sending.run()))
        thread.start()
        until(lambda: sending.path.tally.ended)
    thread.join()
    assert [row.status for row in rows] == ["ok", "connect_error", "connect_error"]
    assert [row.error for row in rows[1:]] == ["the server went away: Connection refused"] * 2
    assert sending.path.tally.gone == 2
    never = send_rows(kind, server.url, [(0, 3, 3)])
    assert not never.run()[0].error.startswith("the server went away"), "it never was there"
    assert never.path.tally.gone == 0


@BOTH
def test_a_prompt_larger_than_the_kernels_buffers_arrives_whole(send_rows, kind):
    with Server(lambda _, body: good(prompt=len(body["prompt"]))) as server:
        (row,) = send_rows(kind, server.url, [(0, 2_000_000, 3)]).run()
    assert (row.status, row.input_tokens) == ("ok", 2_000_000)


@BOTH
def test_what_is_in_flight_at_the_end_is_aborted_and_what_was_not_due_is_not_there(send_rows, kind):
    with Server(lambda *_: [HEAD, chunk(event(1)), 3600.0]) as server:
        sending = send_rows(kind, server.url, [(0, 3, 3), (10, 3, 3), (3_600_000, 3, 3)])
        thread = threading.Timer(0.4, sending.stop)
        thread.start()
        rows = sending.run()
        thread.join()
    assert [(row.status, row.done_ns, row.output_tokens) for row in rows] == [("aborted", None, 1)] * 2
    assert (sending.path.tally.sent, sending.path.tally.ended) == (2, 2)


@BOTH
def test_a_cap_holds_back_after_the_schedule_and_leaves_what_it_held_unsent(send_rows, kind):
    with Server(lambda *_: good(pause_s=0.02)) as server:
        rows = send_rows(kind, server.url, [(0, 3, 3)] * 4, max_concurrency=1).run()
        assert {row.scheduled_ns for row in rows} == {rows[0].scheduled_ns}
        assert all(after.sent_ns >= before.done_ns for before, after in pairwise(rows))
    with Server(lambda *_: [HEAD, 3600.0]) as server:
        sending = send_rows(kind, server.url, [(0, 3, 3)] * 3, max_concurrency=1)
        thread = threading.Timer(0.3, sending.stop)
        thread.start()
        rows = sending.run()
        thread.join()
    assert sorted((row.status, row.sent_ns is None) for row in rows) == [("aborted", False), *[("aborted", True)] * 2]


@BOTH
def test_the_least_loaded_instance_gets_the_request(send_rows, kind):
    with Server(lambda *_: good(pause_s=0.3)) as slow, Server(lambda *_: good()) as quick:
        rows = send_rows(kind, [slow.url, quick.url], [(i * 20, 3, 3) for i in range(6)], routes=[-1] * 6).run()
    assert Counter(row.instance for row in rows)[1] >= 3
    assert {row.status for row in rows} == {"ok"}


@BOTH
def test_a_turn_leaves_its_think_time_after_the_turn_before_ended(send_rows, kind):
    columns = {
        "session_id": pl.Series([1, 1], dtype=pl.UInt64),
        "parent_id": pl.Series([None, 42], dtype=pl.UInt64),
        "think_ns": pl.Series([None, 30 * MS]),
    }
    with Server(lambda *_: good(pause_s=0.03)) as server:
        first, second = send_rows(kind, server.url, [(0, 3, 3), (1, 3, 3)], columns=columns, think_time=True).run()
    assert 0 <= second.scheduled_ns - first.done_ns - 30 * MS < (1 if kind == "fast" else 100 * MS)
    assert second.sent_ns >= second.scheduled_ns


@BOTH
def test_a_chat_is_asked_in_words_and_its_opening_role_is_no_token(send_rows, kind):
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}

    def script(*_):
        yield HEAD + chunk(b"data: " + json.dumps(role).encode() + b"\n\n")
        yield 0.05
        yield from list(good(chat=True))[1:]

    with Server(script) as server:
        (row,) = send_rows(kind, server.url, [(0, 20, 3)], endpoint=CHAT).run()
    assert server.heads[0].startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert len(server.bodies[0]["messages"][0]["content"].split()) == 20
    assert (row.status, list(row.chunk_tokens)) == ("ok", [1, 1, 1])
    assert row.first_token_ns - row.headers_ns >= 40 * MS


@BOTH
def test_an_answer_that_is_not_streamed_has_counts_and_no_token_times(send_rows, kind):
    usage = {"prompt_tokens": 3, "completion_tokens": 3}
    body = json.dumps({"choices": [{"text": "abc", "finish_reason": "length"}], "usage": usage}).encode()
    with Server(lambda *_: [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)]) as server:
        (row,) = send_rows(kind, server.url, [(0, 3, 3)], stream=False).run()
    assert server.bodies[0]["stream"] is False
    assert (row.status, row.output_tokens, row.first_token_ns, row.chunk_tokens) == ("ok", 3, None, None)


@BOTH
def test_the_key_and_the_runs_own_names_go_with_each_request(send_rows, kind):
    with Server(lambda *_: good()) as server:
        send_rows(kind, server.url, [(0, 3, 3)], api_key="secret", name_prefix="ab12").run()
    (head,) = server.heads
    assert b"authorization: bearer secret\r\n" in head.lower()
    assert b"x-request-id: ab12-42\r\n" in head.lower()


def test_a_wall_clock_set_by_an_hour_mid_run_changes_nothing(send_rows):
    class Wall:
        ahead_ns = 0

        def __call__(self):
            return time.time_ns() + self.ahead_ns

    wall = Wall()
    with Server(lambda *_: good(pause_s=0.01)) as server:
        sending = send_rows("fast", server.url, [(i * 10, 3, 3) for i in range(40)])
        sending.path.clock = ArrivalClock(wall)

        def jump(*_):
            wall.ahead_ns += 3600 * 10**9

        # The kernel's own stamps cannot be moved here: only what they are compared with is, and so they are moved too.
        arrival_ns = ArrivalClock.arrival_ns
        sending.path.clock.arrival_ns = lambda ancillary: (
            None if (at := arrival_ns(sending.path.clock, ancillary)) is None else at + wall.ahead_ns
        )
        timer = threading.Timer(0.2, jump)
        timer.start()
        rows = sending.run()
        timer.join()
    assert sending.path.clock.steps == 1
    assert {row.status for row in rows} == {"ok"}
    for row in rows:
        times = [row.sent_ns, row.headers_ns, row.first_token_ns, *row.chunk_ns, row.last_token_ns, row.done_ns]
        assert times == sorted(times)
        assert row.done_ns - row.sent_ns < 10**10


def test_tokens_are_timed_by_the_kernel_not_by_when_they_were_read(kernel_stamps, send_rows):
    """The loop is held up for 80 ms after each token: with times of reading, gaps would be as long."""
    with Server(lambda *_: good(tokens=4, pause_s=0.02)) as server:
        sending = send_rows("fast", server.url, [(0, 3, 4)])
        take = sending.path._take

        def slow(*arguments):
            take(*arguments)
            time.sleep(0.08)

        sending.path._take = slow
        (row,) = sending.run()
    assert row.chunk_ns[-1] - row.chunk_ns[0] < 3 * 80 * MS
    assert sending.path.tally.reading.counts


def test_a_process_without_files_left_says_so_on_the_requests_that_it_cost(send_rows, monkeypatch):
    with Server(lambda *_: good(pause_s=0.05)) as server:
        sending = send_rows("fast", server.url, [(0, 3, 3)] * 8)
        opened = sending.path._pool.servers[0]

        def refuse():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr(opened, "open", refuse)
        monkeypatch.setattr(opened, "_idle", opened._idle[:3])
        rows = sending.run()
    assert Counter(row.status for row in rows) == {"ok": 3, "connect_error": 5}
    assert {row.error for row in rows if row.status != "ok"} == {"OSError: [Errno 24] Too many open files"}


def test_a_request_is_never_early(send_rows):
    with Server(lambda *_: good()) as server:
        rows = send_rows("fast", server.url, [(i // 2 * 3, 3, 3) for i in range(60)]).run(now_ns() + 50 * MS)
    assert min(row.sent_ns - row.scheduled_ns for row in rows) >= 0
