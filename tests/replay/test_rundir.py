"""The run directory: what is written is read back, in parts or whole, and what is damaged is said in one line."""

import json
import tempfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.compaction import Merge, compact
from replay.rundir import (
    MANIFEST,
    SCHEMA_VERSION,
    PartWriter,
    Run,
    has_table,
    read_manifest,
    scan_table,
    write_manifest,
)
from replay.tables import POWER, REQUESTS, SEGMENTS, STATUSES, TABLES, TRUTH
from tracegen.errors import RunError

POWER_ROW = st.tuples(
    st.integers(0, 2**62), st.none() | st.integers(0, 2**62), st.text(max_size=5), st.integers(0, 7),
    st.none() | st.integers(0, 2**32 - 1), st.none() | st.integers(0, 2**32 - 1), st.none() | st.integers(0, 2**64 - 1),
    st.none() | st.integers(0, 3000), st.none() | st.integers(0, 3000), st.none() | st.integers(0, 120),
    st.none() | st.integers(0, 100), st.none() | st.integers(0, 2**64 - 1),
)  # fmt: skip


def truth(ids):
    joules = [[float(i) + k for i in ids] for k in (3, 1, 2)]
    return pl.DataFrame([list(ids), *joules], schema=TRUTH)


def write_parts(run_dir, table, frames):
    writer = PartWriter(run_dir, table)
    for frame in frames:
        writer.append(frame)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(POWER_ROW, max_size=6), min_size=1, max_size=5))
def test_what_is_written_in_parts_is_read_back_before_and_after_compaction(parts):
    frames = [pl.DataFrame(rows, schema=POWER, orient="row") for rows in parts]
    whole = pl.concat(frames)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        write_parts(run_dir, "power", frames)
        assert has_table(run_dir, "power") == (whole.height > 0)
        if whole.height:
            assert scan_table(run_dir, "power").collect().equals(whole)
        compact(run_dir, "power")
        assert scan_table(run_dir, "power").collect().equals(whole)
        compact(run_dir, "power")  # once more changes nothing
        assert scan_table(run_dir, "power").collect().equals(whole)
        assert [path.name for path in run_dir.iterdir()] == ["power.parquet"]
        assert (run_dir / "power.parquet").is_file()


def test_compaction_sorts_and_merges(tmp_path):
    write_parts(tmp_path, "truth", [truth([3, 1]), truth([2])])
    merge = Merge(lambda frame: frame.filter(pl.col("request_id") != 2), lambda _, before: before)
    compact(tmp_path, "truth", ["request_id"], merge)
    assert scan_table(tmp_path, "truth").collect()["request_id"].to_list() == [1, 3]


def test_a_table_without_parts_becomes_an_empty_one(tmp_path):
    PartWriter(tmp_path, "segments")
    assert not has_table(tmp_path, "segments")
    compact(tmp_path, "segments")
    frame = scan_table(tmp_path, "segments").collect()
    assert (frame.height, frame.schema) == (0, SEGMENTS)
    compact(tmp_path, "steps")
    assert not has_table(tmp_path, "steps")


def test_the_half_written_part_of_a_killed_run_is_ignored(tmp_path):
    write_parts(tmp_path, "truth", [truth([1, 2])])
    (tmp_path / "truth.parquet" / ".part-000001.parquet.partial").write_bytes(b"PAR1 half")
    assert scan_table(tmp_path, "truth").collect()["request_id"].to_list() == [1, 2]
    compact(tmp_path, "truth")
    assert scan_table(tmp_path, "truth").collect()["request_id"].to_list() == [1, 2]


def test_parts_may_differ_in_optional_and_unknown_columns(tmp_path):
    blank = pl.DataFrame({name: [None] for name in REQUESTS}, schema=REQUESTS)
    with_chunks = blank.with_columns(
        pl.Series("chunk_ns", [[1, 2]], dtype=pl.List(pl.Int64)), pl.lit("x").alias("note")
    )
    write_parts(tmp_path, "requests", [blank, with_chunks])
    frame = scan_table(tmp_path, "requests").collect()
    assert frame["chunk_ns"].to_list() == [None, [1, 2]]
    assert frame["note"].to_list() == [None, "x"]


def test_writers_of_one_table_do_not_meet(tmp_path):
    PartWriter(tmp_path, "truth", prefix="b").append(truth([2]))
    PartWriter(tmp_path, "truth", prefix="a").append(truth([1]))
    assert scan_table(tmp_path, "truth").collect()["request_id"].to_list() == [1, 2]


@pytest.mark.parametrize("table", TABLES)
def test_a_missing_column_is_named_with_its_file(tmp_path, table):
    name = list(TABLES[table])[-1]
    path = tmp_path / f"{table}.parquet"
    TABLES[table].to_frame().drop(name).write_parquet(path)
    with pytest.raises(RunError) as caught:
        scan_table(tmp_path, table)
    assert f"{path}: column '{name}' is missing; a{'n' * (table == 'arrivals')} {table} table has" in str(caught.value)


@pytest.mark.parametrize(
    ("column", "dtype", "fits"),
    [
        ("energy_j", pl.Float32, True),
        ("energy_j", pl.Int64, True),
        ("energy_j", pl.String, False),
        ("energy_j", pl.Duration("ns"), False),
        ("request_id", pl.Int32, True),
        ("request_id", pl.Float64, False),
        ("prefill_j", pl.Null, True),
    ],
)
def test_columns_of_other_types_are_converted_without_loss_or_refused(tmp_path, column, dtype, fits):
    path = tmp_path / "truth.parquet"
    frame = TRUTH.to_frame().with_columns(pl.col(column).cast(dtype))
    frame.write_parquet(path)
    if fits:
        assert scan_table(tmp_path, "truth").collect().schema == TRUTH
    else:
        with pytest.raises(RunError, match=rf"truth.parquet: column '{column}' is .*, not "):
            scan_table(tmp_path, "truth")


def test_a_value_that_does_not_fit_is_refused(tmp_path):
    truth([1]).with_columns(pl.lit(-1, pl.Int64).alias("request_id")).write_parquet(tmp_path / "truth.parquet")
    with pytest.raises(RunError, match=r"truth.parquet.*not readable as a truth table"):
        scan_table(tmp_path, "truth")


def test_a_part_of_the_wrong_shape_is_never_written(tmp_path):
    writer = PartWriter(tmp_path, "truth")
    with pytest.raises(RunError, match="column 'decode_j' is missing"):
        writer.append(truth([1]).drop("decode_j"))
    assert list((tmp_path / "truth.parquet").iterdir()) == []


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(RunError, match=r"has no table power.parquet"):
        scan_table(tmp_path, "power")


@settings(max_examples=100)
@given(st.floats(0, 1), st.integers(0, 7), st.booleans(), st.booleans(), st.sampled_from(["running", "complete"]))
def test_a_damaged_file_is_one_error_or_left_out_of_a_run_that_goes_on(where, bit, truncate, in_parts, state):
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        write_manifest(run_dir, {"state": state})
        write_parts(run_dir, "truth", [truth(range(50)), truth(range(50, 100))])
        if not in_parts:
            compact(run_dir, "truth")
        path = run_dir / "truth.parquet"
        if in_parts:
            path /= "part-000001.parquet"
        data = bytearray(path.read_bytes())
        at = min(int(where * len(data)), len(data) - 1)
        data[at] ^= 1 << bit
        path.write_bytes(data[:at] if truncate else data)
        frame, error = None, None
        try:
            frame = scan_table(run_dir, "truth").collect()
        except RunError as caught:
            error = str(caught)
        torn = Run.open(run_dir).torn()
    # A bit of the mark at a file's end may be the one.
    assert torn == (["truth.parquet/part-000001.parquet"] if in_parts and (truncate or at >= len(data) - 4) else [])
    if torn and state == "running":
        assert frame["request_id"].to_list() == list(range(50)), "what is whole is read"
    elif error is None:
        assert not truncate, "a file that was cut short is never read"
        assert frame.schema == TRUTH
    else:
        assert error.startswith(f"{path}: ")
        assert "\n" not in error


def test_the_manifest_round_trips_and_is_replaced_whole(tmp_path):
    write_manifest(tmp_path, {"state": "running", "path": Path("a"), "x": 1.5})
    assert read_manifest(tmp_path) == {"schema_version": SCHEMA_VERSION, "state": "running", "path": "a", "x": 1.5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_manifest(tmp_path, {"x": float("nan")})
    assert read_manifest(tmp_path)["x"] == 1.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema_version": "2.0"}', "schema_version 2.0 is newer than this program's 1.0; update wattrace"),
        ('{"state": "complete"}', "has no schema_version"),
        ('{"schema_version": "v1"}', "key 'schema_version' is 'v1', not a number as \"1.0\""),
        ("[]", "has no schema_version"),
        ("{", "not valid JSON"),
        ("\x80", "not valid JSON"),
        (None, "has no manifest.json, so it is not a run directory"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError) as caught:
        Run.open(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_newer_minor_version_is_read(tmp_path):
    (tmp_path / MANIFEST).write_text('{"schema_version": "1.9", "new": 1}')
    assert read_manifest(tmp_path)["new"] == 1


def test_no_run_directory_says_how_to_get_one(tmp_path):
    with pytest.raises(RunError, match=r"none: no such run directory; 'replay run TRACE' writes one"):
        Run.open(tmp_path / "none")


def test_a_run_knows_what_it_has(sim_run):
    run = Run.open(sim_run)
    assert (run.name, run.simulated) == ("run", True)
    assert run.has("power")
    assert not run.has("energy")
    assert set(run.scan("requests").collect()["status"]) <= set(STATUSES)
    assert json.loads((sim_run / MANIFEST).read_text()) == run.manifest
