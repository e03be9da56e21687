import json
import re
import threading
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracegen.errors import TraceError
from tracegen.importers.ahead import ahead
from tracegen.importers.azure import HEADER
from tracegen.importers.base import Options
from tracegen.importers.burstgpt import HEADER as BURST_HEADER
from tracegen.importers.formats import FORMATS, find_format
from tracegen.importers.run import import_trace
from tracegen.importers.sorting import sort_batches
from tracegen.schema import read_metadata, read_trace

ROWS = [f"2024-05-10 00:{k // 60:02}:{k % 60:02}.5,{k + 1},7" for k in range(600)]
TEXT = "\n".join([HEADER, *ROWS])
MOONCAKE = {"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [0]}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (TEXT, "azure"),
        (f"{BURST_HEADER}\r\n5,GPT-4,1,2,3,API log\r\n", "burstgpt"),
        (json.dumps(MOONCAKE), "mooncake"),
        (json.dumps(MOONCAKE | {"chat_id": 1, "parent_chat_id": -1}), "bailian"),
    ],
)
def test_a_format_is_recognised_by_its_content(import_file, content, name):
    assert import_file(content, "no.suffix.that.helps")[1].format == name


@pytest.mark.parametrize("content", ["", "a,b,c\n1,2,3\n", '{"a": 1}\n', "\x00\x01", "[1, 2]", b"PAR1"])
def test_an_unknown_format_is_told_with_those_known(import_file, content):
    with pytest.raises(TraceError) as error:
        import_file(content)
    for name in FORMATS:
        assert name in str(error.value)
    assert "import table FILE --map" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_could_be_two_formats_is_not_guessed(import_file, monkeypatch):
    twin = find_format("azure")
    monkeypatch.setitem(FORMATS, "twin", type(twin)(**(vars(twin) | {"name": "twin"})))
    with pytest.raises(TraceError, match="could be azure or twin; say which with 'tracegen import FORMAT'"):
        import_file(TEXT)


def test_a_format_that_there_is_not(import_file):
    with pytest.raises(TraceError, match="there is no format 'azur'; the formats are azure, burstgpt"):
        import_file(TEXT, format="azur")


def test_the_result_does_not_depend_on_blocks_or_row_groups(import_file, monkeypatch):
    whole, report = import_file(TEXT)
    monkeypatch.setattr("tracegen.sources.BLOCK_BYTES", 100)
    monkeypatch.setattr("tracegen.sources._START_BYTES", 100)
    monkeypatch.setattr("tracegen.importers.run.ROW_GROUP_ROWS", 7)
    parts, same = import_file(TEXT)
    assert parts.equals(whole)
    assert same == report


def test_bad_rows_are_told_by_their_line_in_every_block(import_file, monkeypatch):
    monkeypatch.setattr("tracegen.sources.BLOCK_BYTES", 100)
    monkeypatch.setattr("tracegen.sources._START_BYTES", 100)
    for line in (2, 3, 300, 601):
        lines = TEXT.split("\n")
        lines[line - 1] = "x,1,1"
        with pytest.raises(TraceError, match=f": line {line}: TIMESTAMP is not a date"):
            import_file("\n".join(lines))
    lines = TEXT.split("\n")
    lines[400] = ROWS[0]  # a row of the first block
    with pytest.raises(TraceError, match=r": line 401: is earlier than a row before it"):
        import_file("\n".join(lines))


def test_the_same_source_gives_the_same_bytes(file, tmp_path):
    for name in ("a", "b"):
        import_trace(file, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("limit", [1, 7, 600])
@pytest.mark.parametrize("block_bytes", [100, 1 << 20])
def test_a_limit_takes_the_first_rows(import_file, monkeypatch, limit, block_bytes):
    monkeypatch.setattr("tracegen.sources.BLOCK_BYTES", block_bytes)
    monkeypatch.setattr("tracegen.sources._START_BYTES", block_bytes)
    whole, full = import_file(TEXT)
    # A bad row behind the last that is wanted is not looked at.
    content = "\n".join([HEADER, "x", *ROWS[:limit], "y", *ROWS[limit:]])
    frame, report = import_file(content, limit=limit, skip_bad=True)
    assert frame.equals(whole.head(limit))
    assert (report.rows_read, report.dropped) == (limit + 1, {"has too few columns": 1})
    assert report.metadata["parameters"]["limit"] == limit
    assert report.metadata["source"]["sha256"] != full.metadata["source"]["sha256"] is not None


def test_a_limit_of_nothing(import_file):
    with pytest.raises(TraceError, match="--limit 0: is less than one row"):
        import_file(TEXT, limit=0)


def test_nothing_is_overwritten_that_cannot_be_made_again(file, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TraceError, match="exists and is no trace made here"):
        import_trace(file, tmp_path / "notes.txt")
    with pytest.raises(TraceError, match="is the input itself"):
        import_trace(file, file)
    assert (file.read_text(), (tmp_path / "notes.txt").read_text()) == (TEXT, "mine")
    import_trace(file, tmp_path / "notes.txt", force=True)
    assert read_trace(tmp_path / "notes.txt").height == 600


def test_a_failed_import_leaves_the_trace_that_was_there(file, tmp_path):
    import_trace(file, tmp_path / "out.parquet")
    before = (tmp_path / "out.parquet").read_bytes()
    file.write_text(TEXT + "\nbad")
    with pytest.raises(TraceError, match="line 602"):
        import_trace(file, tmp_path / "out.parquet")
    assert (tmp_path / "out.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "trace.csv"]


def test_the_output_is_named_by_the_label(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(import_trace("trace.csv").output) == "trace.parquet"
    assert str(import_trace("trace.csv", options=Options(label="mine")).output) == "mine.parquet"
    assert read_metadata("mine.parquet")["parameters"]["label"] == "mine"


def test_progress_is_told_of(file, tmp_path):
    seen = []
    import_trace(
        file, tmp_path / "o", on_progress=lambda report, source: seen.append((report.rows_read, source.size_bytes))
    )
    assert seen[-1] == (600, file.stat().st_size)


@given(
    st.lists(st.integers(0, 20), max_size=60),
    st.integers(1, 9),
    st.sampled_from([1, 50, 1 << 20]),
    st.sampled_from([1, 200, 1 << 20]),
)
def test_sorting_by_runs_is_a_stable_sort(times, batch_rows, part_bytes, run_bytes):
    rows = pl.DataFrame(
        {"_time_ns": times, "_line": range(len(times)), "hashes": [[t] * (t % 3) for t in times]},
        schema={"_time_ns": pl.Int64, "_line": pl.Int64, "hashes": pl.List(pl.UInt64)},
    )
    found = list(sort_batches(rows.iter_slices(batch_rows), run_bytes, part_bytes)) if times else []
    expected = rows.sort("_time_ns", maintain_order=True)
    assert pl.concat([rows.clear(), *found]).equals(expected)


def test_sorting_holds_a_part_of_each_run_only(monkeypatch):
    monkeypatch.setattr("tracegen.importers.sorting.BATCH_BYTES", 1)
    rows = pl.DataFrame({"_time_ns": list(range(1000)) * 10, "_line": range(10_000)})
    parts = list(sort_batches(rows.iter_slices(1000), 16_000, 1600))  # ten runs of 16 bytes a row
    assert max(part.height for part in parts) <= 10 * 100
    assert pl.concat(parts)["_time_ns"].is_sorted()


def test_work_ahead_is_the_same_work():
    assert list(ahead(k for k in range(100))) == list(range(100))


def test_what_raises_ahead_raises_where_it_is_used():
    def items():
        yield 1
        raise TraceError("line 2")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(TraceError, match="line 2"):
        next(found)


def test_closing_ends_the_work_ahead():
    closed = threading.Event()

    def items():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    before = threading.active_count()
    found = ahead(items())
    assert next(found) == 1
    found.close()
    assert closed.is_set()
    assert threading.active_count() == before


DOCS = Path(__file__).parents[3] / "docs" / "tracegen.md"


def test_the_page_tells_the_truth(tmp_path, monkeypatch, capsys):
    page = DOCS.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    rows = [HEADER, ROWS[0], "2023-11-16 18:00:01,0,20", ROWS[1]]
    Path("conv.csv").write_text("\n".join(rows), encoding="utf-8")
    (example,) = re.findall(r"```python\n(from tracegen.importers.*?)```", page, re.DOTALL)
    exec(example, {})
    assert capsys.readouterr().out == "2 {'ContextTokens is zero': 1}\n"
    with pytest.raises(TraceError) as error:
        import_trace("conv.csv")
    assert f"```text\nerror: {error.value}\n```" in page
