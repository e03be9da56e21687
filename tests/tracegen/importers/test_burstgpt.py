import pytest

from tracegen.errors import TraceError
from tracegen.importers.burstgpt import FAILED, HEADER, NO_RESPONSE, SESSION_HEADER

S = 10**9
# In the published forms of version 1 and of version 3 (release 2.0).
FIRST = f"""{HEADER}
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,0,0,0,Conversation log
45,GPT-4,417,276,693,API log
46,GPT-4,417,0,417,API log
118,ChatGPT,1360,647,2007,Conversation log
"""
A, B = "1722ac82-0a46-4bf0-aa08-89794e7a2b3f", "d5983bf9-4b48-497b-892b-a58995247443"
THIRD = f"""{SESSION_HEADER}
19440110.0,{A},43,GPT-4,906,446,1352,Conversation log
19440161.0,{B},2,ChatGPT,36,29,65,Conversation log
19440162.5,,8,GPT-4,264,171,435,API log
19440163.0,{B},5,ChatGPT,100,29,129,Conversation log
19440163.0,,8,GPT-4,264,171,435,API log
19440164.5,{B},5,ChatGPT,150,29,179,Conversation log
19440254.0,{A},3,GPT-4,1500,163,1663,Conversation log"""


def test_failures_are_dropped_and_counted_unasked(import_file):
    frame, report = import_file(FIRST)
    assert report.format == "burstgpt"
    assert frame["arrival_ns"].to_list() == [0, 40 * S, 113 * S]
    assert frame["input_tokens"].to_list() == [472, 417, 1360]
    assert frame["model"].to_list() == ["ChatGPT", "GPT-4", "ChatGPT"]
    assert frame["log_type"].to_list() == ["Conversation log", "API log", "Conversation log"]
    assert report.dropped == report.metadata["source"]["dropped"] == {FAILED: 1, NO_RESPONSE: 1}
    assert "session_id" not in frame.columns


def test_sessions_have_parents_and_think_times(import_file):
    frame, _ = import_file(THIRD)
    sessions = frame["session_id"].to_list()
    assert sessions[0] == sessions[6] != sessions[1] == sessions[3] == sessions[5]
    assert sessions[2] is sessions[4] is None
    assert frame["parent_id"].to_list() == [None, None, None, 1, None, 3, 0]
    # From the parent's end (arrival + elapsed); the sixth was sent before its parent's answer was whole.
    assert frame["think_ns"].to_list() == [None, None, None, 0, None, None, 101 * S]
    assert frame["elapsed_ns"].to_list()[:2] == [43 * S, 2 * S]
    assert frame["arrival_ns"].to_list()[:3] == [0, 51 * S, 52_500_000_000]


def test_sessions_do_not_depend_on_where_blocks_end(import_file, monkeypatch):
    rows = [f"{k}.0,{(A, B, '')[k % 3]},1,GPT-4,9,1,10,API log" for k in range(300)]
    text = "\n".join([SESSION_HEADER, *rows])
    whole, _ = import_file(text)
    monkeypatch.setattr("tracegen.sources.BLOCK_BYTES", 700)
    monkeypatch.setattr("tracegen.sources._START_BYTES", 700)
    monkeypatch.setattr("tracegen.importers.sorting.RUN_BYTES", 1)
    parts, _ = import_file(text)
    assert parts.equals(whole)
    assert whole["parent_id"].drop_nulls().to_list() == [k - 3 for k in range(300) if k % 3 < 2 and k > 2]


def test_rows_that_are_not_in_order_are_sorted_and_counted(import_file):
    lines = FIRST.splitlines()
    frame, report = import_file("\n".join([lines[0], lines[5], lines[3], lines[1]]))
    assert frame["input_tokens"].to_list() == [472, 417, 1360]
    assert report.remarks == ["2 rows stood behind a later one: sorted by time"]


def test_another_header_is_named(import_file):
    with pytest.raises(TraceError, match=rf"line 1: the header is 'a,b', not '{HEADER}' or '{SESSION_HEADER}'"):
        import_file("a,b\n1,2\n", format="burstgpt")
