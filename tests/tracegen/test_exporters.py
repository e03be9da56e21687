import json

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tracegen.cli import app
from tracegen.errors import TraceError
from tracegen.exporters import EXPORTS, Blocks, export_trace
from tracegen.importers.base import Options
from tracegen.importers.run import import_trace
from tracegen.prefixes import hit_rate
from tracegen.schema import read_trace, write_trace

# How each format is read back: by its own importer, or by the one for any table.
MAP = {"arrival": "timestamp", "input": "input_length", "output": "output_length"}
BACK = {
    "mooncake": ("mooncake", Options()),
    "azure": ("azure", Options()),
    "aiperf": ("table", Options(map=MAP, time_unit="ms")),
    "vllm-bench": ("table", Options(map=MAP, time_unit="s")),
}
META = {"block_tokens": 512}
TOKENS = st.integers(1, 5000)
ROWS = st.lists(st.tuples(st.integers(0, 10**15), TOKENS, TOKENS), min_size=1, max_size=30)


def trace(rows, **columns):
    at, inputs, outputs = zip(*sorted(rows), strict=True)
    schema = {"arrival_ns": pl.Int64, "input_tokens": pl.UInt32, "output_tokens": pl.UInt32}
    frame = pl.DataFrame(
        {"arrival_ns": at, "input_tokens": inputs, "output_tokens": outputs, **columns}, schema_overrides=schema
    )
    return frame.with_columns(request_id=pl.int_range(len(at), dtype=pl.UInt64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


def there_and_back(frame, form, folder, **metadata):
    """The trace after an export and an import, and the report."""
    write_trace(frame, folder / "trace.parquet", metadata)
    report = export_trace(folder / "trace.parquet", folder / "out", format=form, force=True)
    name, options = BACK[form]
    import_trace(folder / "out", folder / "back.parquet", format=name, options=options, force=True)
    return read_trace(folder / "back.parquet"), report


@pytest.mark.parametrize("form", EXPORTS)
@given(rows=ROWS)
@settings(max_examples=25, deadline=None)
def test_what_is_exported_comes_back_to_the_formats_resolution(folder, form, rows):
    frame = trace(rows)
    back, report = there_and_back(frame, form, folder)
    step_ns = EXPORTS[form].resolution_ns
    rounded = (frame["arrival_ns"] + step_ns // 2) // step_ns * step_ns
    assert back["arrival_ns"].to_list() == (rounded - rounded[0]).to_list()
    lengths = ["input_tokens", "output_tokens"]
    assert back.select(lengths).equals(frame.select(lengths))
    assert report.rows == frame.height


@pytest.mark.parametrize(
    ("block_tokens", "form"), [(512, "mooncake"), (128, "mooncake"), (1024, "mooncake"), (48, "aiperf")]
)
@given(sizes=st.lists(st.tuples(TOKENS, st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_prompts_share_as_many_blocks_as_before(folder, block_tokens, form, sizes):
    # A prompt is a family's: its first blocks are those of the family, as far as `shared` goes, the rest its own.
    hashes = []
    for k, (tokens, shared, family) in enumerate(sizes):
        blocks = -(-tokens // block_tokens)
        hashes.append([10**18 * (family + 1) + j if j < shared else 10**9 * (k + 1) + j for j in range(blocks)])
    frame = trace([(k, tokens, 1) for k, (tokens, _, _) in enumerate(sizes)], prefix_hashes=hashes)
    back, _ = there_and_back(frame, form, folder, block_tokens=block_tokens)
    lines = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    size = 512 if form == "mooncake" else block_tokens
    for line, tokens in zip(lines, frame["input_tokens"], strict=True):
        assert len(line["hash_ids"]) == -(-tokens // size)  # what AIPerf and vLLM make prompts from
    assert sorted({each for line in lines for each in line["hash_ids"]}) == list(
        range(len({each for line in lines for each in line["hash_ids"]}))
    )
    sizes_of = {}
    for line, tokens in zip(lines, frame["input_tokens"], strict=True):
        for k, each in enumerate(line["hash_ids"]):  # AIPerf refuses a file where one has two
            assert sizes_of.setdefault(each, min(size, tokens - k * size)) == min(size, tokens - k * size)
    if form == "mooncake":
        # Blocks of another size share what whole blocks of both sizes do.
        for k, mine in enumerate(hashes):
            for j, other in enumerate(hashes[:k]):
                tokens = common(mine, other) * block_tokens
                limit = min(sizes[k][0], sizes[j][0])
                same = common(lines[k]["hash_ids"], lines[j]["hash_ids"])
                assert same >= min(tokens, limit) // 512
                assert same <= -(-tokens // 512)
        assert back["prefix_hashes"].to_list() == [line["hash_ids"] for line in lines]


def common(one, other):
    """How many leading elements are the same."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_blocks_without_hashes_are_like_no_other():
    blocks = Blocks(16, 16)
    assert blocks.of(40, [7, 9]) == [0, 1, 2]
    assert blocks.of(40, [7, 9]) == [0, 1, 3]
    assert blocks.of(33, None) == [4, 5, 6]
    assert blocks.of(16, [9, 7, 7]) == [1]


def test_hit_rate_of_a_trace_with_mooncakes_blocks_stays(folder):
    frame = trace([(0, 1536, 1), (1, 1536, 1), (2, 1024, 1)], prefix_hashes=[[1, 2, 3], [1, 2, 9], [1, 8]])
    back, _ = there_and_back(frame, "mooncake", folder, block_tokens=512)
    assert hit_rate(back, 512) == hit_rate(frame, 512) == 3 / 8


def test_the_formats_are_as_their_readers_want_them(tmp_path):
    frame = trace([(0, 600, 5), (1_234_567_890, 16, 1)], prefix_hashes=[[5, 6], [5]], client_id=[1, 2])
    write_trace(frame, tmp_path / "t.parquet", {"block_tokens": 512})
    written = {}
    for form in EXPORTS:
        report = export_trace(
            tmp_path / "t.parquet", tmp_path / form, format=form, origin="2026-01-05T12:00:00.680590+02:00"
        )
        written[form] = (tmp_path / form).read_text().splitlines()
        assert "client_id" in report.left_out
    assert written == {
        "mooncake": [
            '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}',
            '{"timestamp": 1235, "input_length": 16, "output_length": 1, "hash_ids": [2]}',
        ],
        "azure": [
            "TIMESTAMP,ContextTokens,GeneratedTokens",
            "2026-01-05 10:00:00.6805900,600,5",
            "2026-01-05 10:00:01.9151579,16,1",
        ],
        "aiperf": [
            '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}',
            '{"timestamp": 1234.56789, "input_length": 16, "output_length": 1, "hash_ids": [2]}',
        ],
        "vllm-bench": [
            '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}',
            '{"timestamp": 1.23456789, "input_length": 16, "output_length": 1, "hash_ids": [2]}',
        ],
    }


def test_aiperf_gets_no_hash_ids_where_the_trace_has_none_and_vllm_does(tmp_path):
    write_trace(trace([(0, 40, 5)]), tmp_path / "t.parquet", {})
    export_trace(tmp_path / "t.parquet", tmp_path / "a", format="aiperf")
    assert "hash_ids" not in (tmp_path / "a").read_text()
    report = export_trace(tmp_path / "t.parquet", tmp_path / "v", format="vllm-bench")
    assert '"hash_ids": [0, 1, 2]' in (tmp_path / "v").read_text()
    assert "--timed-trace-chunk-hash-size 16 --num-prompts 1" in report.run_with
    assert report.remarks == ["hash ids are made: no two blocks of prompts are the same"]


def test_what_cannot_be_exported_is_told(tmp_path):
    write_trace(trace([(0, 100, 5)], prefix_hashes=[[1]]), tmp_path / "t.parquet", {"block_tokens": 100})
    with pytest.raises(TraceError, match="blocks of 100 tokens, which do not make up Mooncake's 512"):
        export_trace(tmp_path / "t.parquet", tmp_path / "out", format="mooncake")
    with pytest.raises(TraceError, match="no format 'csv' to export to; the formats are mooncake, azure"):
        export_trace(tmp_path / "t.parquet", tmp_path / "out", format="csv")
    with pytest.raises(TraceError, match="--origin noon: is not a date and time"):
        export_trace(tmp_path / "t.parquet", tmp_path / "out", format="azure", origin="noon")
    (tmp_path / "out").write_text("mine")
    with pytest.raises(TraceError, match="exists; choose another output"):
        export_trace(tmp_path / "t.parquet", tmp_path / "out", format="azure")
    with pytest.raises(TraceError, match="cannot be written"):
        export_trace(tmp_path / "t.parquet", tmp_path / "out" / "x", format="azure")
    assert (tmp_path / "out").read_text() == "mine"


def test_the_command_says_what_was_left_out_and_how_to_run_it(tmp_path):
    write_trace(trace([(0, 40, 5)], label=["chat"]), tmp_path / "t.parquet", {})
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(app, ["export", str(tmp_path / "t.parquet"), "--format", "aiperf", "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "1 request" in result.output
    assert "left out: label" in result.output
    assert f"aiperf profile --model MODEL --input-file {out} --custom-dataset-type mooncake_trace" in result.output


@pytest.mark.parametrize("form", EXPORTS)
def test_parts_make_the_same_file_as_the_whole(form, tmp_path, monkeypatch):
    hashes = [[k % 3, 10 + k % 5, 100 + k] for k in range(20)]
    write_trace(trace([(k, 1500, 3) for k in range(20)], prefix_hashes=hashes), tmp_path / "t.parquet", META)
    whole = export_trace(tmp_path / "t.parquet", tmp_path / "whole", format=form)
    monkeypatch.setattr("tracegen.exporters._PART_ROWS", 7)
    monkeypatch.setattr("tracegen.exporters._LIST_ROWS", 2)
    parts = export_trace(tmp_path / "t.parquet", tmp_path / "parts", format=form)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert parts.rows == whole.rows == 20


def test_a_bad_row_in_a_later_part_leaves_no_file(tmp_path, monkeypatch):
    frame = trace([(k, 10, 1) for k in range(9)]).with_columns(arrival_ns=pl.Series([0, 1, 2, 3, 4, 5, 3, 4, 5]))
    frame.write_parquet(tmp_path / "t.parquet")
    monkeypatch.setattr("tracegen.exporters._PART_ROWS", 3)
    with pytest.raises(TraceError, match="row 6, column 'arrival_ns': 3 is earlier than the row before"):
        export_trace(tmp_path / "t.parquet", tmp_path / "out", format="azure")
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]
