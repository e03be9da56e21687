"""ShareGPT conversations as published: one JSON array, or JSON Lines, of conversations of messages.

Format (ShareGPT_V3_unfiltered_cleaned_split.json, huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered):
`{"id": ..., "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}`; `messages` of
`role` and `content` are read too. Each answer is a request: its input is all that was said before it, its output the
answer. Tokens are those of each message by itself, without a chat template.

There are no times. Conversations start as a Poisson process of the rate that is asked for. A later turn is due when
the turn before has been answered and thought about, by the rule of synthesized sessions (`tracegen.sessions`).
"""

from collections.abc import Iterator
from itertools import accumulate, islice
from typing import Any

import numpy as np
import polars as pl

from tracegen.durations import NS_PER_S
from tracegen.importers.base import BATCH, Batches, Format, Options, Report
from tracegen.importers.jsonvalues import json_values
from tracegen.importers.texts import Count, PoissonTimes, check_options, remark_times, token_counter
from tracegen.sessions import ASSUMED_NS_A_TOKEN, Structure
from tracegen.sources import Source
from tracegen.streams import random_stream

NAME = "sharegpt"
NO_ANSWER = "a conversation without an answer to anything"
EMPTY = "an empty answer, or an answer to nothing"
NO_CONVERSATION = "is no conversation of messages with from and value, or role and content"
_ANSWERING = {"gpt", "chatgpt", "bing", "bard", "assistant"}  # in the published file, and in OpenAI's form
_CONVERSATIONS = 256  # whose messages are tokenized together
_SCHEMA = pl.Schema(
    {
        **BATCH,
        "session_id": pl.UInt64(),
        "think_ns": pl.Int64(),
        "_turn": pl.Int64(),
    }
)


def _recognises(start: bytes) -> bool:
    return start.lstrip()[:1] in {b"[", b"{"} and b'"conversations"' in start and b'"value"' in start


def _read(source: Source, options: Options) -> Batches:
    check_options(source, options, NAME, tokenizer=True)
    assert options.rate_rps is not None  # checked above
    assert options.tokenizer is not None
    count = token_counter(options.tokenizer)
    starts = PoissonTimes(options.rate_rps, options.seed)
    thinking = random_stream(options.seed, "think times of texts")
    values, first = json_values(source), 0
    while group := list(islice(values, _CONVERSATIONS)):
        rows = list(_requests(group, first, count, starts, thinking))
        first += len(group)
        yield pl.DataFrame(rows, schema=_SCHEMA, orient="row")


def _requests(
    group: list[tuple[int, Any]], first: int, count: Count, starts: PoissonTimes, thinking: np.random.Generator
) -> Iterator[tuple[Any, ...]]:
    """The rows of some conversations, numbered from `first`; each takes a start and think times, usable or not."""
    structure = Structure()
    starts_ns = starts.next(len(group))  # numbers are drawn for each, so that one that is left out moves no other
    messages = [_messages(value) for _, value in group]
    tokens = iter(count([text for found in messages for _, text in found or []]))
    for number, ((line, value), found, start_ns) in enumerate(zip(group, messages, starts_ns.tolist(), strict=True)):
        if found is None or not any(answers for answers, _ in found[1:]):
            why = NO_CONVERSATION if found is None else NO_ANSWER
            for _ in found or []:
                next(tokens)
            yield line, str(value)[:200], "", why, None, None, None, None, None, 0
            continue
        counted = list(islice(tokens, len(found)))
        said = list(accumulate(counted, initial=0))
        thoughts_ns = structure.think_s * NS_PER_S * thinking.lognormal(0, structure.think_sigma, len(found))
        due_ns, turn = start_ns, 0
        for k, (answers, text) in enumerate(found):
            if not answers:
                continue
            think_ns = int(thoughts_ns[k]) if turn else None
            at_ns = due_ns + (think_ns or 0)
            empty = None if said[k] and counted[k] else EMPTY
            yield line, text[:200], "", empty, at_ns, said[k], counted[k], first + number, think_ns, turn
            if empty is None:
                due_ns, turn = at_ns + counted[k] * ASSUMED_NS_A_TOKEN, turn + 1


def _messages(value: Any) -> list[tuple[bool, str]] | None:
    """A conversation's messages: whether each answers, and its text; null for what is none."""
    found = value.get("conversations", value.get("messages")) if isinstance(value, dict) else None
    if not isinstance(found, list):
        return None
    messages: list[tuple[bool, str]] = []
    for message in found:
        if not isinstance(message, dict):
            return None
        role, text = message.get("from", message.get("role")), message.get("value", message.get("content"))
        if not (isinstance(role, str) and isinstance(text, str)):
            return None
        messages.append((role in _ANSWERING, text))
    return messages


def _link(batches: Batches, options: Options, source: Source, report: Report) -> Batches:
    """Add each turn's parent, the request before it in its conversation. Memory: 16 bytes for each conversation."""
    last: dict[int, int] = {}
    for batch in remark_times(batches, options, source, report):
        parents: list[int | None] = []
        for request, session, turn in batch.select("request_id", "session_id", "_turn").iter_rows():
            parents.append(last.get(session) if turn else None)
            last[session] = request
        yield batch.drop("_turn").with_columns(parent_id=pl.Series(parents, dtype=pl.UInt64))


FORMAT = Format(
    name=NAME,
    title="ShareGPT conversations (JSON)",
    recognises=_recognises,
    read=_read,
    in_order=False,
    expected=frozenset({NO_ANSWER, EMPTY}),
    stage=_link,
    metadata={"arrivals": "Poisson starts of conversations, made: the source has no times"},
)
