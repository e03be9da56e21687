"""The Qwen-Bailian usage traces as published: JSON Lines of chats with hash ids of 16-token blocks.

Format (README of github.com/alibaba-edu/qwen-bailian-usagetraces-anon, Wang et al., USENIX ATC 2025): `chat_id`,
`parent_chat_id` (the turn before; -1 for the first), `timestamp` in seconds from the trace's start, `input_length`,
`output_length`, `type` (text, search, image, file), `turn`, and `hash_ids`, one for each block of the prompt.
"""

from typing import Annotated

import msgspec
import polars as pl

from tracegen.console import plural
from tracegen.importers.base import Batches, Format, Options, Report, first_line
from tracegen.importers.columns import MAX_TIME_NS
from tracegen.importers.mooncake import Hash, Tokens, hashed_rows
from tracegen.sources import Source

BLOCK_TOKENS = 16
_NS_PER_S = 10**9
_KEYS = {"chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "hash_ids"}


class Row(msgspec.Struct):
    """A line of the file; kind and turn may be missing there."""

    chat_id: Hash
    parent_chat_id: Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]
    timestamp: Annotated[float, msgspec.Meta(ge=0, le=MAX_TIME_NS // _NS_PER_S)]
    input_length: Tokens
    output_length: Tokens
    hash_ids: list[Hash]
    type: str | None = None
    turn: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None


def _recognises(start: bytes) -> bool:
    """By the keys of the first object."""
    try:
        keys = msgspec.json.decode(first_line(start))
    except msgspec.MsgspecError:
        return False
    return isinstance(keys, dict) and keys.keys() >= _KEYS


def _read(source: Source, options: Options) -> Batches:
    time_ns = (pl.col("timestamp") * _NS_PER_S).round().cast(pl.Int64)
    chat, parent = pl.col("chat_id").cast(pl.UInt64).alias("_chat"), pl.col("parent_chat_id").alias("_parent_chat")
    return hashed_rows(source, Row, time_ns, chat, parent, "type", pl.col("turn").cast(pl.Int32))


def _link(batches: Batches, options: Options, source: Source, report: Report) -> Batches:
    """Turn chats into sessions: each has the id of its first chat, and a turn's parent is the request of that chat.

    A turn whose first turns are not in the file keeps the session of the earliest chat that is named. Memory: two
    numbers for each chat.
    """
    request_of: dict[int, int] = {}
    session_of: dict[int, int] = {}
    orphans = 0
    for batch in batches:
        sessions: list[int] = []
        parents: list[int | None] = []
        for request, chat, parent in batch.select("request_id", "_chat", "_parent_chat").iter_rows():
            root = chat if parent < 0 else session_of.setdefault(parent, parent)
            orphans += parent >= 0 and parent not in request_of
            session_of[chat] = root
            sessions.append(root)
            parents.append(request_of.get(parent))
            request_of[chat] = request
        yield batch.drop("_chat", "_parent_chat").with_columns(
            session_id=pl.Series(sessions, dtype=pl.UInt64), parent_id=pl.Series(parents, dtype=pl.UInt64)
        )
    if orphans:
        turns = plural(orphans, "turn")
        report.remarks.append(f"{turns} with a parent that is not in the trace before: parent_id is null")


FORMAT = Format(
    name="bailian",
    title="Qwen-Bailian usage traces with chats and hash ids (JSON Lines)",
    recognises=_recognises,
    read=_read,
    in_order=False,
    stage=_link,
    metadata={"block_tokens": BLOCK_TOKENS},
)
