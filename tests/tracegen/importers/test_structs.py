import json
from unittest.mock import patch

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracegen.importers import bailian, mooncake, structs
from tracegen.importers.structs import struct_rows
from tracegen.sources import Source

GOOD = {"timestamp": 27, "input_length": 600, "output_length": 5, "hash_ids": [0, 2**63 - 1]}
CHAT = {**GOOD, "timestamp": 61.114, "chat_id": 4, "parent_chat_id": -1, "type": "text", "turn": 1}
ODD = [
    "",
    "  ",
    "{}",
    "[1]",
    "null",
    json.dumps(GOOD | {"more": {"a": [1]}}),
    json.dumps(GOOD | {"input_length": 0}),
    json.dumps(GOOD | {"input_length": 2**32}),
    json.dumps(GOOD | {"timestamp": -1}),
    json.dumps(GOOD | {"timestamp": "27"}),
    json.dumps(GOOD | {"timestamp": 27.5}),
    json.dumps(GOOD | {"timestamp": True}),
    json.dumps(GOOD | {"hash_ids": None}),
    json.dumps(GOOD | {"hash_ids": []}),
    json.dumps(GOOD | {"hash_ids": [1, None]}),
    json.dumps(GOOD | {"hash_ids": [2**63]}),
    json.dumps(CHAT | {"type": None, "turn": None}),
    json.dumps(CHAT | {"type": "täxt"}, ensure_ascii=False),
    json.dumps(CHAT | {"timestamp": 10**300}),
    json.dumps(CHAT | {"parent_chat_id": -2}),
    json.dumps(CHAT)[:-3],
    json.dumps(GOOD) + "," + json.dumps(GOOD),
    json.dumps(GOOD) + json.dumps(GOOD) + "\n",
    json.dumps(GOOD).replace(", ", ",\n", 1) + json.dumps(GOOD),
    json.dumps(GOOD) + "\r",
    '{"timestamp": 01}',
    '{"timestamp": NaN}',
]


@pytest.mark.parametrize("row", [mooncake.Row, bailian.Row])
@given(st.lists(st.sampled_from([*ODD, *[json.dumps(GOOD), json.dumps(CHAT)] * 10]), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_blocks_at_once_are_what_lines_one_by_one_are(tmp_path_factory, row, lines):
    path = tmp_path_factory.mktemp("structs") / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = read(path, row)
    with patch.object(structs, "_clean_rows", lambda *_: None):
        slow = read(path, row)
    assert found.columns == slow.columns
    assert found.drop("_text").equals(slow.drop("_text"))
    assert found.filter(pl.col("_why").is_not_null()).equals(slow.filter(pl.col("_why").is_not_null()))


def read(path, row):
    with Source(path) as source:
        frames = list(struct_rows(source, row))
    return pl.concat(frames).select(pl.all().exclude("_line", "_text", "_why"), "_line", "_text", "_why")


def test_a_clean_block_is_read_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(CHAT)] * 5) + "\n", encoding="utf-8")
    with patch.object(structs, "json_rows_of", lambda *_: pytest.fail("line by line")):
        rows = read(path, bailian.Row)
    assert rows["_line"].to_list() == [1, 2, 3, 4, 5]
    assert rows["hash_ids"].to_list() == [[0, 2**63 - 1]] * 5
    assert rows["timestamp"].to_list() == [61.114] * 5
