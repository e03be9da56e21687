"""An HTTP/1.1 response, cut anywhere, gives the same body, and what is none is an error."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.http1 import HttpError, Response

BODY = b"data: one\n\n" * 3 + b"data: two\r\n"
HEADS = {
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "length": b"HTTP/1.1 200 OK\r\ncontent-LENGTH: %d\r\n\r\n" % len(BODY),
    "close": b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n",
}


def chunked(pieces, trailer=b"", extension=b""):
    return b"".join(b"%x%b\r\n%b\r\n" % (len(p), extension, p) for p in pieces) + b"0\r\n" + trailer + b"\r\n"


def feed(pieces):
    """The body of a response that comes in `pieces`, and the response."""
    response, body = Response(), b""
    for piece in pieces:
        body += response.feed(piece)
    return body, response


def cut(data, places):
    edges = [0, *sorted(places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


WIRE = {
    "chunked": HEADS["chunked"] + chunked([BODY[:5], BODY[5:6], BODY[6:]]),
    "extended": HEADS["chunked"] + chunked([BODY], trailer=b"X: y\r\n", extension=b";a=b"),
    "length": HEADS["length"] + BODY,
    "close": HEADS["close"] + BODY,
    "continued": b"HTTP/1.1 100 Continue\r\n\r\n" + HEADS["length"] + BODY,
}


@pytest.mark.parametrize("form", WIRE)
@given(data=st.data())
def test_a_body_comes_out_whole_however_it_is_cut(form, data):
    wire = WIRE[form]
    places = data.draw(st.sets(st.integers(1, len(wire) - 1)))
    body, response = feed(cut(wire, places))
    assert (body, response.status) == (BODY, 200)
    assert response.done == (form != "close")
    assert response.keep_alive == (form != "close")
    assert response.end() is None, "the end of the connection is no loss"
    assert response.done


@pytest.mark.parametrize("form", WIRE)
def test_every_cut_in_two_gives_the_same_and_every_end_before_the_last_byte_is_a_loss(form):
    wire = WIRE[form]
    for place in range(1, len(wire)):
        assert feed([wire[:place], wire[place:]])[0] == BODY
        _, response = feed([wire[:place]])
        lost = response.end()
        if form == "close" and response.status is not None:
            assert lost is None
        else:
            assert lost == ("before an answer" if response.status is None else "in the middle of the answer")


@pytest.mark.parametrize(
    "wire",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"220 mail ready",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        HEADS["chunked"] + b"xyz\r\n",
        HEADS["chunked"] + b"-3\r\nabc",
        HEADS["chunked"] + b"\r\n",
        HEADS["chunked"] + b"3\r\nabcd\r\n0\r\n\r\n",
        HEADS["chunked"] + b"1" * 5000,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000,
    ],
)
def test_what_is_no_response_is_an_error(wire):
    with pytest.raises(HttpError):
        feed([wire])


def test_a_connection_that_is_to_close_or_says_too_much_is_not_used_again():
    assert not feed([b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"])[1].keep_alive
    assert not feed([b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"])[1].keep_alive
    assert feed([b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n"])[1].keep_alive
    body, response = feed([HEADS["length"] + BODY + b"more"])
    assert (body, response.done, response.keep_alive) == (BODY, True, False)


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_without_a_body_ends_with_its_head(status):
    assert feed([b"HTTP/1.1 %d No\r\n\r\n" % status])[1].done
