"""Prompts have exact lengths, and share what they are told to share and nothing else."""

import json

from hypothesis import given
from hypothesis import strategies as st

from replay.prompts import FIRST_ID, LAST_ID, completion_body, prompt_ids, prompt_json, prompt_text

SALTS = st.integers(0, 2**64 - 1)
IDS = st.integers(0, 2**64 - 1)
BLOCK = 16


@given(SALTS, IDS, st.integers(1, 3000), st.lists(IDS, max_size=5), st.sampled_from([1, 16, 512]))
def test_the_length_is_exact_and_ids_are_in_every_vocabulary(salt, request_id, tokens, hashes, block):
    ids = prompt_ids(salt, request_id, tokens, hashes, block)
    assert len(ids) == tokens
    assert all(isinstance(i, int) and FIRST_ID <= i <= LAST_ID for i in ids)
    assert ids == prompt_ids(salt, request_id, tokens, hashes, block)
    assert ids == json.loads(prompt_json(salt, request_id, tokens, hashes, block))
    assert len(prompt_text(salt, request_id, tokens, hashes, block).split()) == tokens


@given(SALTS, IDS, SALTS, IDS)
def test_another_run_or_request_differs_in_the_first_block(salt, request_id, other_salt, other_id):
    first = prompt_ids(salt, request_id, 64)[:BLOCK]
    same = (salt, request_id) == (other_salt, other_id)
    assert (first == prompt_ids(other_salt, other_id, 64)[:BLOCK]) == same


@given(SALTS, st.lists(IDS, min_size=1, max_size=4), st.lists(IDS, max_size=3), st.lists(IDS, max_size=3))
def test_requests_share_the_blocks_of_their_shared_hashes_only(salt, shared, left, right):
    a, b = [*shared, *left], [*shared, *right]
    first = prompt_ids(salt, 1, len(a) * BLOCK + 20, a, BLOCK)
    second = prompt_ids(salt, 2, len(b) * BLOCK + 20, b, BLOCK)
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        block = slice(i * BLOCK, (i + 1) * BLOCK)
        assert (first[block] == second[block]) == (x == y)
    assert first[len(a) * BLOCK :] != second[len(b) * BLOCK :], "the rest is each request's own"
    assert first[:BLOCK] != prompt_ids(salt ^ 1, 1, BLOCK, a, BLOCK), "hashes are shared within a run only"


def test_a_hash_is_no_request_id():
    assert prompt_ids(5, 7, 16, [9], 16) != prompt_ids(5, 9, 16)


def test_the_body_asks_for_exact_lengths_of_vllm_and_for_nothing_special_elsewhere():
    body = json.loads(completion_body("m", b"[20,21]", 9))
    assert (body["model"], body["prompt"], body["max_tokens"], body["min_tokens"]) == ("m", [20, 21], 9, 9)
    assert (body["ignore_eos"], body["stream"]) == (True, True)
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    plain = json.loads(completion_body("m", b"[20,21]", 9, exact=False))
    assert plain["stream_options"] == {"include_usage": True}
    assert {"ignore_eos", "min_tokens"}.isdisjoint(plain)
    assert plain["max_tokens"] == 9


def test_the_body_has_a_priority_but_not_the_servers_own_default():
    assert json.loads(completion_body("m", b"[20]", 9, priority=-3))["priority"] == -3
    assert json.loads(completion_body("m", b"[20]", 9, exact=False, priority=2))["priority"] == 2
    assert "priority" not in json.loads(completion_body("m", b"[20]", 9, priority=0))


def test_a_chat_asks_with_one_message_and_shares_blocks_as_ids_do():
    body = json.loads(completion_body("m", prompt_text(1, 2, 3), 9))
    assert body["messages"] == [{"role": "user", "content": prompt_text(1, 2, 3)}]
    assert "prompt" not in body
    first, second = (prompt_text(1, request, 64, [7, 8], BLOCK).split() for request in (1, 2))
    assert first[: 2 * BLOCK] == second[: 2 * BLOCK]
    assert first[2 * BLOCK :] != second[2 * BLOCK :]


def test_without_a_stream_nothing_of_streams_is_asked():
    body = json.loads(completion_body("m", b"[20]", 9, stream=False))
    assert body["stream"] is False
    assert "stream_options" not in body
    assert body["min_tokens"] == 9
