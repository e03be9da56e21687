import contextlib
import json
import tempfile
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracegen.errors import TraceError
from tracegen.schema import (
    SCHEMA_VERSION,
    TRACE,
    TRACE_OPTIONAL,
    check_trace,
    file_sha256,
    read_metadata,
    read_trace,
    read_trace_parts,
    save_trace,
    write_trace,
)

UINT32 = st.integers(1, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)


@st.composite
def traces(draw):
    """Any valid trace, optional and unknown columns included."""
    n = draw(st.integers(1, 20))

    def column(values, **kwargs):
        return draw(st.lists(values, min_size=n, max_size=n, **kwargs))

    frame = pl.DataFrame(
        {
            "request_id": column(UINT64, unique=True),
            "arrival_ns": sorted(column(st.integers(0, 2**63 - 1))),
            "input_tokens": column(UINT32),
            "output_tokens": column(UINT32),
        },
        schema=TRACE,
    )
    optional = {
        "client_id": st.none() | UINT64,
        "session_id": st.none() | UINT64,
        "parent_id": st.none() | UINT64,
        "think_ns": st.none() | st.integers(0, 2**63 - 1),
        "model": st.none() | st.text(st.characters(codec="utf-8")),
        "label": st.none() | st.text(st.characters(codec="utf-8")),
        "prefix_hashes": st.lists(UINT64, max_size=3),
        "priority": st.none() | st.integers(-(2**31), 2**31 - 1),
    }
    for name in draw(st.sets(st.sampled_from(list(optional)))):
        frame = frame.with_columns(pl.Series(name, column(optional[name]), dtype=TRACE_OPTIONAL[name]))
    if draw(st.booleans()):
        frame = frame.with_columns(pl.Series("note", column(st.text("ab", max_size=2)), dtype=pl.String))
    return frame


@contextlib.contextmanager
def folder():
    """A new folder for each example that hypothesis tries, which the `tmp_path` fixture is not."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def names_in(where):
    return [path.name for path in where.iterdir()]


@given(traces(), st.dictionaries(st.text("abc_", min_size=1), st.none() | st.integers() | st.text(max_size=5)))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_back(frame, metadata):
    metadata = {**metadata, "block_tokens": 16}
    with folder() as tmp:
        write_trace(frame, tmp / "t.parquet", metadata)
        read = read_trace(tmp / "t.parquet")
        assert sorted(read.columns) == sorted(frame.columns)
        assert read.select(frame.columns).equals(frame)
        assert read_metadata(tmp / "t.parquet") == {"schema_version": SCHEMA_VERSION, **metadata}
        assert names_in(tmp) == ["t.parquet"]


@given(traces(), st.integers(1, 21))
@settings(max_examples=30, deadline=None)
def test_parts_are_the_whole(frame, rows):
    with folder() as tmp:
        write_trace(frame, tmp / "t.parquet", {"block_tokens": 16})
        parts = list(read_trace_parts(tmp / "t.parquet", rows))
        assert pl.concat(parts).equals(read_trace(tmp / "t.parquet"))
        assert {part.height for part in parts[:-1]} <= {rows}


def test_a_bad_row_is_counted_from_the_first_part(make_frame, tmp_path):
    frame = make_frame(range(9)).with_columns(input_tokens=pl.Series([1] * 7 + [0, 1]))
    frame.write_parquet(tmp_path / "t.parquet")
    with pytest.raises(TraceError, match="row 7, column 'input_tokens': 0 is zero"):
        list(read_trace_parts(tmp_path / "t.parquet", 3))
    frame.head(0).write_parquet(tmp_path / "none.parquet")
    with pytest.raises(TraceError, match="has no rows"):
        list(read_trace_parts(tmp_path / "none.parquet", 3))


@given(traces(), st.integers(1, 19))
@settings(max_examples=30, deadline=None)
def test_bytes_depend_on_values_alone(frame, at):
    with folder() as tmp:
        write_trace(frame, tmp / "a.parquet", {"x": 1, "y": {"p": 1, "q": 2}, "block_tokens": 16})
        in_two_pieces = pl.concat([frame[:at], frame[at:]], rechunk=False)
        write_trace(in_two_pieces, tmp / "b.parquet", {"block_tokens": 16, "y": {"q": 2, "p": 1}, "x": 1})
        assert (tmp / "a.parquet").read_bytes() == (tmp / "b.parquet").read_bytes()


@given(traces(), st.data())
@settings(max_examples=60, deadline=None)
def test_one_broken_row_is_named(frame, data):
    row = data.draw(st.integers(0, frame.height - 1))
    column, value, why = data.draw(
        st.sampled_from(
            [
                ("input_tokens", 0, "is zero"),
                ("output_tokens", 0, "is zero"),
                ("arrival_ns", -1, "is negative"),
                ("input_tokens", None, "is null"),
                ("request_id", None, "is null"),
                ("output_tokens", 2**32, "does not fit UInt32"),
            ]
        )
    )
    values = frame[column].to_list()
    values[row] = value
    broken = frame.with_columns(pl.Series(column, values, dtype=pl.Int128).cast(pl.Int128))
    with pytest.raises(TraceError, match=why) as error:
        check_trace(broken, "some.parquet")
    assert f"some.parquet: row {row}, column '{column}'" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", list(TRACE))
def test_a_missing_column_is_named(make_frame, name):
    with pytest.raises(TraceError, match=f"t: column '{name}' is missing"):
        check_trace(make_frame().drop(name), "t")


def test_a_decreasing_arrival_is_named(make_frame):
    with pytest.raises(TraceError, match=r"row 2, column 'arrival_ns': 4 is earlier than the row before"):
        check_trace(make_frame([0, 5, 4]), "t")


def test_a_repeated_id_is_named(make_frame):
    with pytest.raises(TraceError, match="row 2, column 'request_id': 7 occurs twice"):
        check_trace(make_frame(request_id=[7, 8, 7]), "t")


def test_no_rows(make_frame):
    with pytest.raises(TraceError, match="no rows"):
        check_trace(make_frame()[:0], "t")


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("input_tokens", pl.Series([1.0, 2.5, 3.0]), "row 1, column 'input_tokens': 2.5 is not a whole number"),
        ("input_tokens", pl.Series([1.0, float("nan"), 3.0]), "row 1, column 'input_tokens': nan does not fit UInt32"),
        ("input_tokens", pl.Series([1, 2, -3]), "row 2, column 'input_tokens': -3 does not fit UInt32"),
        ("input_tokens", pl.Series(["1", "2", "3"]), "column 'input_tokens' is String, not UInt32"),
        ("arrival_ns", pl.Series([0, 1, 2]).cast(pl.Duration("us")), "column 'arrival_ns' is Duration"),
        ("priority", pl.Series(["high", "low", "low"]), "column 'priority' is String, not Int32"),
        ("priority", pl.Series([0, 2**31, 1]), "row 1, column 'priority': 2147483648 does not fit Int32"),
        ("prefix_hashes", pl.Series([[1], [-2], []]), r"row 1, column 'prefix_hashes': \[-2\] does not fit"),
    ],
)
def test_values_that_would_change_are_refused(make_frame, column, values, says):
    with pytest.raises(TraceError, match=says):
        check_trace(make_frame().with_columns(**{column: values}), "t")


def test_other_types_of_the_same_value_are_taken(make_frame):
    frame = make_frame().with_columns(
        pl.col("request_id").cast(pl.Int32),
        pl.col("input_tokens").cast(pl.Float64),
        label=pl.Series(["a", "b", "a"], dtype=pl.Categorical),
        model=pl.Series([None] * 3),
        prefix_hashes=pl.Series([[], [], []]),
    )
    checked = check_trace(frame, "t")
    assert checked.schema == {**TRACE, **{n: TRACE_OPTIONAL[n] for n in ("model", "label", "prefix_hashes")}}
    assert checked["input_tokens"].to_list() == [100, 101, 102]


def test_a_missing_file_says_how_to_make_one(tmp_path):
    for read in (read_trace, read_metadata):
        with pytest.raises(TraceError, match="no such file; synthesize one"):
            read(tmp_path / "none.parquet")


def test_a_path_is_no_pattern(make_frame, tmp_path):
    odd = tmp_path / "we[i]rd" / "t*.parquet"
    write_trace(make_frame(), odd, {})
    assert read_trace(odd).height == 3


def test_a_directory_is_no_trace(tmp_path):
    with pytest.raises(TraceError, match="not a readable Parquet file"):
        read_trace(tmp_path)


def test_every_truncation_is_refused(make_frame, tmp_path):
    write_trace(make_frame(), tmp_path / "t.parquet", {"generator": "test"})
    whole = (tmp_path / "t.parquet").read_bytes()
    cut = tmp_path / "cut.parquet"
    for size in range(0, len(whole), 7):
        cut.write_bytes(whole[:size])
        with pytest.raises(TraceError, match="not a readable Parquet file") as error:
            read_trace(cut)
        assert "\n" not in str(error.value)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_damage_never_escapes_as_another_error(data):
    """Polars' own reader panics on some of these, with an exception that `except Exception` does not catch."""
    with folder() as tmp:
        path = tmp / "t.parquet"
        frame = pl.DataFrame({"request_id": [1], "arrival_ns": [0], "input_tokens": [1], "output_tokens": [1]})
        write_trace(frame.with_columns(label=pl.lit("a")), path, {"generator": "test"})
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw)
        with contextlib.suppress(TraceError):
            assert set(TRACE) <= set(read_trace(path).columns)
        with contextlib.suppress(TraceError):
            assert len(list(read_trace_parts(path, 1))) == 1
        with contextlib.suppress(TraceError):
            assert isinstance(read_metadata(path), dict)


def test_a_newer_major_version_is_refused(make_frame, tmp_path):
    write_trace(make_frame(), tmp_path / "t.parquet", {"schema_version": "2.0"})
    with pytest.raises(TraceError, match=r"schema_version 2\.0, and this program reads 1\.0"):
        read_trace(tmp_path / "t.parquet")


def test_a_foreign_parquet_file_is_read_and_has_no_metadata(make_frame, tmp_path):
    make_frame().write_parquet(tmp_path / "t.parquet")
    assert read_trace(tmp_path / "t.parquet").equals(make_frame())
    assert read_metadata(tmp_path / "t.parquet") == {}


def test_metadata_is_json_in_the_file(make_frame, tmp_path):
    write_trace(make_frame(), tmp_path / "t.parquet", {"parameters": {"b": 1, "a": 2}})
    raw = pq.read_schema(tmp_path / "t.parquet").metadata
    assert json.loads(raw[b"parameters"]) == {"a": 2, "b": 1}


def test_a_refused_frame_writes_nothing(make_frame, tmp_path):
    with pytest.raises(TraceError, match="is zero"):
        write_trace(make_frame(input_tokens=[1, 0, 1]), tmp_path / "t.parquet", {})
    assert names_in(tmp_path) == []


def test_an_output_that_cannot_be_written(make_frame, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "t.parquet", tmp_path):
        with pytest.raises(TraceError, match="cannot be written"):
            write_trace(make_frame(), path, {})


def test_a_failed_write_leaves_the_old_file(make_frame, tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    write_trace(make_frame(), path, {})
    before = path.read_bytes()

    def full(table, where, **_):
        Path(where).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(TraceError, match="No space left"):
        write_trace(make_frame([0]), path, {})
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["t.parquet"]


def test_save_overwrites_only_what_can_be_made_again(make_frame, tmp_path):
    path = tmp_path / "t.parquet"
    frame = make_frame()
    save_trace(frame, path, {"generator": "test"})
    save_trace(frame, path, {"generator": "test"})
    with pytest.raises(TraceError, match="is the input itself"):
        save_trace(frame, path, {"generator": "test"}, source=path)
    pq.write_table(pa.table({"x": [1]}), path)
    before = path.read_bytes()
    with pytest.raises(TraceError, match="no trace made here"):
        save_trace(frame, path, {"generator": "test"})
    assert path.read_bytes() == before
    save_trace(frame, path, {"generator": "test"}, force=True)
    assert read_trace(path).equals(frame)


def test_sha256_is_the_files(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
