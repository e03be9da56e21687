import duckdb
import polars as pl
import pyarrow.parquet as pq
import pytest

from tracegen.errors import TraceError
from tracegen.schema import read_metadata, read_trace
from tracegen.writer import TraceWriter, written_whole

METADATA = {"generator": "test", "block_tokens": 4}


def write(path, metadata, *parts):
    with TraceWriter(path, metadata) as writer:
        for part in parts:
            writer.write(part)
            assert path.name not in [entry.name for entry in path.parent.iterdir()] or path.read_text() == "before"
        writer.add_metadata({"known_at_the_end": 0.5})
    return writer


def test_parts_become_one_trace(tmp_path, make_frame):
    parents = pl.Series([None, 0, None, 2], dtype=pl.UInt64)
    whole = make_frame([5, 6, 6, 9], parent_id=parents, label=["a", "b", "a", "a"])
    path = tmp_path / "new" / "t.parquet"
    writer = write(path, METADATA, whole[:1], whole[1:3], whole[3:])
    assert read_trace(path).equals(whole.select(read_trace(path).columns))
    assert read_metadata(path) == {"schema_version": "1.0", **METADATA, "known_at_the_end": 0.5}
    assert (writer.rows, writer.first_ns, writer.last_ns) == (4, 5, 9)
    assert (writer.input_tokens, writer.output_tokens) == (whole["input_tokens"].sum(), whole["output_tokens"].sum())
    assert pq.ParquetFile(path).metadata.num_row_groups == 3
    assert [entry.name for entry in path.parent.iterdir()] == ["t.parquet"]


def test_polars_and_duckdb_read_it(tmp_path, make_frame):
    """The differences of rising columns are an encoding that other readers must know, too."""
    path = tmp_path / "t.parquet"
    write(path, METADATA, make_frame(range(0, 10**6, 1000)))
    assert pl.read_parquet(path)["arrival_ns"].to_list() == list(range(0, 10**6, 1000))
    sums = duckdb.connect().execute("select sum(arrival_ns), max(request_id) from read_parquet(?)", [str(path)])
    assert sums.fetchone() == (499_500_000, 999)


def test_a_broken_rule_leaves_what_was_there(tmp_path, make_frame):
    path = tmp_path / "t.parquet"
    path.write_text("before")
    with pytest.raises(TraceError, match=r"t.parquet: row 3, column 'arrival_ns': is earlier than the row before"):
        write(path, METADATA, make_frame([1, 2, 5]), make_frame([4, 6]))
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.parquet"]


def test_blocks_without_their_size_are_refused(tmp_path, make_frame):
    with pytest.raises(TraceError, match="block_tokens in its file metadata is None"):
        write(tmp_path / "t.parquet", {}, make_frame(prefix_hashes=[[1], [2], [3]]))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_is_named(tmp_path, make_frame):
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match="cannot be written"):
        write(tmp_path / "file" / "t.parquet", {}, make_frame())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_is_whole_or_what_it_was_before(tmp_path, error):
    path = tmp_path / "new" / "p.svg"
    with written_whole(path) as partial:
        partial.write_text("first")
        assert partial.suffix == ".svg"
        assert not path.exists()

    def write_half():
        with written_whole(path) as partial:
            partial.write_text("half of the sec")
            raise error

    with pytest.raises(TraceError if isinstance(error, OSError) else type(error)):
        write_half()
    assert path.read_text() == "first"
    assert [entry.name for entry in path.parent.iterdir()] == ["p.svg"]
