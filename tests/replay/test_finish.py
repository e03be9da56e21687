"""Segments that flushes cut are joined again, and only those."""

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay import compaction
from replay.compaction import compact
from replay.finish import _MERGED, _SORT, merge_segments
from replay.rundir import PartWriter, scan_table
from replay.tables import SEGMENTS

ORDER = ["instance", "request_id", "first_step", "kind", "tokens_per_step", "context_start", "last_step"]


def frame(rows):
    return pl.DataFrame(rows, schema=SEGMENTS, orient="row")


@st.composite
def whole_segments(draw):
    """Segments as an engine that never flushed writes them: no two of a request go on from one to the other."""
    rows = []
    for request_id in draw(st.lists(st.integers(1, 50) | st.none(), min_size=1, max_size=5, unique=True)):
        step, context = draw(st.integers(0, 30)), 0
        for _ in range(draw(st.integers(1, 4))):
            kind, tokens = draw(st.sampled_from([("prefill", 64), ("prefill", 512), ("decode", 1)]))
            length = draw(st.integers(1, 40))
            rows.append((0, request_id, step, step + length - 1, kind, tokens, context))
            step += length + draw(st.integers(1, 3))  # it was not in these steps
            context += tokens * length
    return rows


def cut(row, at):
    """`row` in two, the second beginning `at` steps later."""
    instance, request_id, first, last, kind, tokens, context = row
    left = (instance, request_id, first, first + at - 1, kind, tokens, context)
    return left, (instance, request_id, first + at, last, kind, tokens, context + tokens * at)


@settings(deadline=None)
@given(whole_segments(), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=30))
def test_segments_cut_anywhere_are_given_back_whole(rows, cuts):
    pieces = list(rows)
    for which, where in cuts:
        row = pieces.pop(which % len(pieces))
        length = row[3] - row[2] + 1
        pieces += [row] if row[1] is None or length == 1 else cut(row, 1 + where % (length - 1))
    merged = merge_segments(frame(pieces))
    assert merged.schema == SEGMENTS
    assert merged.sort(ORDER).equals(frame(rows).sort(ORDER))


@settings(deadline=None, max_examples=40)
@given(
    whole_segments(), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=20), st.integers(1, 9)
)
def test_a_table_put_together_from_parts_is_the_one_made_of_all_rows_at_once(tmp_path_factory, rows, cuts, size):
    """Whatever a recorder flushed when: of a request of many steps too, which goes on from part to part."""
    pieces = list(rows)
    for which, where in cuts:
        row = pieces.pop(which % len(pieces))
        length = row[3] - row[2] + 1
        pieces += [row] if row[1] is None or length == 1 else cut(row, 1 + where % (length - 1))
    flushed = frame(pieces).sort("last_step", "first_step", "request_id")
    run_dir = tmp_path_factory.mktemp("run")
    writer = PartWriter(run_dir, "segments")
    for part in flushed.iter_slices(size):
        writer.append(part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "_GROUP_BYTES", 1)
        compact(run_dir, "segments", _SORT["segments"], _MERGED["segments"])
    whole = scan_table(run_dir, "segments").collect()
    assert whole.sort(ORDER).equals(frame(rows).sort(ORDER))
    assert whole.select("first_step").to_series().is_sorted()


def test_of_long_requests_only_those_rows_are_held_that_may_go_on(tmp_path, monkeypatch):
    """A thousand parts of requests that end soon: what is put together at once does not grow with them."""
    concat, most = compaction._concat, {}

    def spy(frames):
        rows = concat(frames)
        most[parts] = max(most.get(parts, 0), rows.height)
        return rows

    monkeypatch.setattr(compaction, "_concat", spy)
    monkeypatch.setattr(compaction, "_GROUP_BYTES", 400)
    for parts in (30, 120):
        writer = PartWriter(tmp_path / str(parts), "segments")
        for number in range(parts):  # each request begins in one part and ends in the next
            old = (0, number, 10 * number, 10 * number + 4, "decode", 1, 9)
            new = (0, number + 1, 10 * number + 5, 10 * number + 9, "decode", 1, 4)
            writer.append(frame([old, new] if number else [new]))
        compact(tmp_path / str(parts), "segments", _SORT["segments"], _MERGED["segments"])
    assert max(most.values()) < 20


def test_what_does_not_go_on_is_not_joined():
    rows = [
        (0, 1, 0, 4, "decode", 1, 100),
        (0, 1, 5, 9, "decode", 1, 106),  # the context jumped: a token was rejected or recomputed
        (0, 1, 10, 10, "prefill", 1, 111),  # another kind
        (0, 1, 11, 12, "prefill", 2, 112),  # another pace
        (1, 1, 13, 14, "prefill", 2, 116),  # another instance
        (0, 2, 13, 14, "prefill", 2, 116),  # another request
    ]
    assert merge_segments(frame(rows)).sort(ORDER).equals(frame(rows).sort(ORDER))


def test_foreign_rows_stay_as_they_are():
    rows = [(0, None, 0, 4, "decode", 1, 100), (0, None, 5, 9, "decode", 1, 105), (0, 3, 0, 1, "prefill", 8, 0)]
    assert merge_segments(frame(rows)).sort(ORDER).equals(frame(rows).sort(ORDER))


def test_no_segments_are_none():
    assert merge_segments(frame([])).equals(frame([]))
