import json

import pytest


def lines(*rows):
    """A Qwen-Bailian file: rows of chat, parent, timestamp."""
    return "".join(
        json.dumps(
            {
                "chat_id": chat,
                "parent_chat_id": parent,
                "timestamp": t_s,
                "input_length": 521,
                "output_length": 132,
                "type": "text",
                "turn": 1 if parent < 0 else 2,
                "hash_ids": [1089, 1090, chat],
            }
        )
        + "\n"
        for chat, parent, t_s in rows
    )


def test_parent_chats_become_sessions(import_file):
    frame, report = import_file(lines((159, -1, 61.114), (7, -1, 61.2), (160, 159, 62.5), (161, 160, 70.001)))
    assert report.format == "bailian"
    assert frame["session_id"].to_list() == [159, 7, 159, 159]
    assert frame["parent_id"].to_list() == [None, None, 0, 2]
    assert frame["arrival_ns"].to_list() == [0, 86_000_000, 1_386_000_000, 8_887_000_000]
    assert frame["type"].to_list() == ["text"] * 4
    assert frame["turn"].to_list() == [1, 1, 2, 2]
    assert frame["prefix_hashes"].to_list()[0] == [1089, 1090, 159]
    assert report.metadata["block_tokens"] == 16
    assert report.remarks == []


def test_turns_whose_first_is_not_in_the_file_are_one_session_still(import_file):
    frame, report = import_file(lines((5, 3, 0.0), (6, 3, 1.0), (8, 6, 2.0), (9, -1, 3.0)))
    assert frame["session_id"].to_list() == [3, 3, 3, 9]
    assert frame["parent_id"].to_list() == [None, None, 1, None]
    assert report.remarks == ["2 turns with a parent that is not in the trace before: parent_id is null"]


@pytest.mark.parametrize("run_bytes", [1, 1 << 20])
def test_sessions_are_linked_in_order_of_time(import_file, monkeypatch, run_bytes):
    monkeypatch.setattr("tracegen.importers.sorting.RUN_BYTES", run_bytes)
    frame, report = import_file(lines((160, 159, 62.5), (159, -1, 61.114)))
    assert frame["session_id"].to_list() == [159, 159]
    assert frame["parent_id"].to_list() == [None, 0]
    assert report.rows_sorted == 1


def test_what_may_be_left_out(import_file):
    row = {"chat_id": 1, "parent_chat_id": -1, "timestamp": 0, "input_length": 2, "output_length": 3, "hash_ids": [4]}
    frame, _ = import_file(json.dumps(row))
    assert frame["type"].to_list() == [None]
