"""Queries over many runs: which runs a path names, what is read of them, where they may lie, where analysis runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import polars as pl
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

import analysis
from analysis.energy import attribute
from analysis.places import mix_of
from analysis.query import format_of, plan, query, save_result
from analysis.requests import request_table
from analysis.scan import scan
from analysis.tables import IDENTITY, QUERY_TABLES, Runs, open_runs
from replay.rundir import PartWriter, Run, write_manifest
from tracegen.errors import AnalysisError, RunError
from tracegen.schema import write_trace

SETTINGS = "SELECT run, mix, tp, freq, count(*) AS n FROM trace GROUP BY run, mix, tp, freq ORDER BY run"


@pytest.fixture
def two(run_of, tmp_path):
    """Two runs in a folder `runs` beside what is no run; the folder."""
    for name in ("a", "b"):
        run_of(f"runs/{name}", duration_s=10.0)
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "readme.txt").touch()
    return tmp_path / "runs"


@pytest.fixture
def store(two, tmp_path, monkeypatch):
    """The two runs behind `memory://bucket/runs`, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.put(str(two), "/bucket/runs", recursive=True)
    yield files
    files.rm("/bucket", recursive=True)


def names(paths, notes=None):
    return [Path(f.where).name for f in open_runs(*paths, note=(notes if notes is not None else []).append).found]


def test_a_folder_a_pattern_and_its_matches_name_the_same_runs_once(two):
    for paths in ([two], [two / "*"], sorted(two.iterdir()), [two.parent / "**"], [two / "a", two / "[ab]", two]):
        assert names(paths) == ["a", "b"]


def test_what_is_no_run_beside_runs_is_left_out_and_said_once(two):
    for paths in ([two / "*"], sorted(two.iterdir())):
        notes = []
        names(paths, notes)
        assert notes == [f"left out, for {two / 'notes'}, {two / 'readme.txt'} are no run directories"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("runs/nope", "no such run directory"),
        ("runs/x*", "the pattern matches nothing"),
        ("runs/n*", "no run directory there"),
        ("runs/notes", "has no manifest.json"),
        ("nope://bucket/runs", "not a URL of runs"),
        ("s3://user:secret@bucket/runs?nope=1", "not a URL of runs"),
        ("memory://nowhere/runs", "no run directory there"),
        ("memory://nowhere/*", "the pattern matches nothing"),
    ],
)
def test_what_names_no_run_is_one_line(two, monkeypatch, path, words):
    monkeypatch.chdir(two.parent)
    with pytest.raises((AnalysisError, RunError)) as error:
        open_runs(path)
    assert words in str(error.value)
    assert path.partition("?")[0].replace("user:secret@", "") in str(error.value)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_manifest_is_not_left_out(two):
    (two / "b" / "manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"manifest\.json: not valid JSON"):
        open_runs(two)


def test_the_mix_is_what_the_user_said_or_the_traces_only_label(run_of, tmp_path):
    trace = run_of(duration_s=10.0).scan("trace").collect()

    def footer(frame, parameters=None):
        path = tmp_path / "trace.parquet"
        write_trace(frame, path, {"parameters": parameters} if parameters else {})
        return pq.read_metadata(path)

    one = footer(trace.with_columns(label=pl.lit("chat")))
    assert mix_of({}, one) == "chat"
    assert mix_of({"metadata": {"mix": "july"}}, one) == "july"
    two_labels = pl.when(pl.col("request_id") > 101).then(pl.lit("chat")).otherwise(pl.lit("code"))
    assert mix_of({}, footer(trace.with_columns(label=two_labels), {"mix": "chat"})) is None
    assert mix_of({}, footer(trace.with_columns(label=pl.lit(None, pl.String)))) is None
    assert mix_of({}, footer(trace, {"mix": "code"})) == "code"
    assert mix_of({"metadata": "hand-written"}, footer(trace)) is None
    assert mix_of({}, None) is None


def test_freq_is_freq_mhz_where_it_is_asked_for_and_no_column_of_its_own_elsewhere(two):
    assert query(open_runs(two), SETTINGS).rows() == [
        (name, None, 2, 1980, Run.open(two / name).scan("trace").collect().height) for name in ("a", "b")
    ]
    assert "freq" not in query(open_runs(two), "SELECT * FROM trace").columns


def test_every_table_is_a_lazyframe_that_says_which_run(run_of):
    run = run_of(duration_s=10.0)
    runs = Runs.of([run], lambda _: None)
    for name in QUERY_TABLES:
        if name in {"arrivals", "cpu_energy", "server_metrics", "warmup"}:
            with pytest.raises(AnalysisError, match=f"'{name}': no run given has it"):
                runs.table(name)
            continue
        method = getattr(runs, name, None)
        frame = runs.table(name) if method is None else method()
        assert isinstance(frame, pl.LazyFrame)
        schema = frame.collect_schema()
        assert {column: schema[column] for column in IDENTITY} == dict(IDENTITY)
        assert frame.collect().schema == schema
    with pytest.raises(AnalysisError, match="no such table"):
        runs.table("nope")


def test_requests_are_those_of_request_table_with_their_energy(run_of):
    run = run_of(duration_s=10.0)
    lazy = Runs.of([run], lambda _: None).requests().drop(IDENTITY).collect()
    assert_frame_equal(lazy, request_table(run, attribute(run).requests), check_column_order=False)


def test_energy_joins_to_requests_trace_and_segments(two):
    runs = open_runs(two, note=lambda _: None)
    keys = ["run", "request_id"]
    energy = runs.energy().collect()
    for other in (runs.requests(), runs.trace()):
        assert energy.join(other.collect(), on=keys, how="inner").height == energy.height
    steps = runs.sql(
        "SELECT s.run, s.request_id, count(*) AS n FROM segments s JOIN steps t ON s.run = t.run AND s.instance = "
        "t.instance AND t.step BETWEEN s.first_step AND s.last_step GROUP BY s.run, s.request_id"
    ).collect()
    spans = pl.col("last_step") - pl.col("first_step") + 1
    expected = runs.segments().group_by(keys).agg(spans.sum().alias("n")).collect()
    assert_frame_equal(steps, expected, check_row_order=False, check_dtypes=False)
    assert steps.join(energy, on=keys, how="inner").height == energy.height


def test_energy_is_attributed_only_when_a_question_needs_it(two):
    notes = []
    runs = open_runs(two, note=notes.append)
    query(runs, "SELECT bucket, count(*) AS n, avg(ttft_ms) AS t FROM requests GROUP BY bucket")
    query(runs, "SELECT max(requests) AS r FROM steps")
    query(runs, "SHOW TABLES")
    assert not notes
    assert not (two / "a" / "energy").exists()
    query(runs, "SELECT sum(energy_j) AS j FROM Requests WHERE run = 'a'")
    assert (two / "a" / "energy" / "requests.parquet").is_file()


def test_only_the_columns_of_a_question_are_read(run_of, monkeypatch):
    run, read = run_of(duration_s=10.0), []
    batches = Run.batches

    def seen(self, table, columns):
        read.append((table, set(columns)))
        return batches(self, table, columns)

    monkeypatch.setattr(Run, "batches", seen)
    runs = Runs.of([run])
    query(runs, "SELECT avg(context_tokens) AS c FROM steps WHERE instance = 0")
    assert read == [("steps", {"instance", "context_tokens"})]
    read.clear()
    query(runs, "SELECT avg(ttft_ms) AS c FROM requests")
    assert not any("error" in columns for _, columns in read)


def test_a_damaged_page_is_an_error_where_it_is_read_and_only_there(run_of):
    run = run_of()
    path = run.path / "steps.parquet"
    scan(run, "steps").collect().to_arrow()
    table = pq.read_table(path)
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    meta = pq.read_metadata(path).row_group(0)
    (column,) = (c for c in map(meta.column, range(meta.num_columns)) if c.path_in_schema == "end_ns")
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    assert query([run], "SELECT max(start_ns) AS t FROM steps").height == 1
    with pytest.raises(RunError, match=r"steps\.parquet: not readable as a steps table"):
        query([run], "SELECT max(end_ns) AS t FROM steps")


def test_a_run_that_goes_on_answers_with_what_is_there(run_of, tmp_path):
    whole = run_of(duration_s=10.0).scan("steps").collect()
    going = tmp_path / "going"
    going.mkdir()
    write_manifest(going, {"state": "running", "engine": "simulated"})
    runs = open_runs(going)
    with pytest.raises(AnalysisError, match="table 'steps': no run given has it"):
        query(runs, "SELECT * FROM steps")
    writer = PartWriter(going, "steps")
    writer.append(whole.head(5).with_columns(heat=pl.lit(1.0)))
    writer.append(whole.slice(5, 7))
    steps = runs.steps().collect()
    assert steps.select(whole.columns).equals(whole.head(12))
    assert steps["heat"].null_count() == 7
    with pytest.raises(AnalysisError, match="table 'requests': no run given has it"):
        query(runs, "SELECT * FROM requests")
    row = query(runs, "SELECT state, measured_j, no_energy FROM runs").row(0)
    assert row[:2] == ("running", None)
    assert "did not finish and left no tables" in row[2]


def test_remote_runs_answer_as_they_would_here(two, store):
    sql = "SELECT run, bucket, sum(energy_j) AS j, avg(ttft_ms) AS t FROM requests GROUP BY run, bucket"
    notes = []
    for url in ("memory://bucket/runs", "memory://bucket/r*/[ab]"):
        there = query(open_runs(url, note=notes.append), sql)
        assert_frame_equal(there, query(open_runs(two, note=lambda _: None), sql), check_row_order=False)
    # Attributed here once, and kept here; what lies there is not touched.
    for name in ("a", "b"):
        assert len([n for n in notes if n.startswith(f"memory://bucket/runs/{name}: energy attributed here")]) == 1
    assert not store.exists("/bucket/runs/a/energy")


def test_of_a_remote_run_only_what_is_asked_for_is_fetched_and_only_once(two, store, tmp_path):
    sql = "SELECT count(*) AS n FROM steps"
    url = "memory://bucket/runs/a"
    count = query(open_runs(url), sql)["n"][0]
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert {name for name in kept if name.endswith("parquet")} == {"steps.parquet"}
    query(open_runs(url), sql)
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert {n: t for n, t in again.items() if n != ".fetched.json"} == {
        n: t for n, t in kept.items() if n != ".fetched.json"
    }
    fewer = pl.read_parquet(two / "a" / "steps.parquet").head(count - 3)
    fewer.write_parquet(two / "a" / "steps.parquet")
    store.put(str(two / "a" / "steps.parquet"), "/bucket/runs/a/steps.parquet")
    assert query(open_runs(url), sql)["n"][0] == count - 3
    store.rm("/bucket/runs/a/steps.parquet")
    with pytest.raises(AnalysisError, match="no run given has it"):
        query(open_runs(url), sql)


def test_a_server_that_lists_nothing_is_asked_for_the_files_that_a_run_has(two, store, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("403, Forbidden")  # as of an HTTP library: no OSError

    sql = "SELECT sum(energy_j) AS j FROM requests"
    expected = query(open_runs(two / "a", note=lambda _: None), sql)
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "find", refuse)
        assert_frame_equal(query(open_runs("memory://bucket/runs/a", note=lambda _: None), sql), expected)
        patch.setattr(type(store), "info", refuse)
        with pytest.raises(AnalysisError, match=r"memory://bucket/runs/a: cannot be read \(403, Forbidden\)"):
            open_runs("memory://bucket/runs/a")


def test_energy_kept_with_a_remote_run_is_used(two, store, tmp_path):
    runs = open_runs(two / "a", note=lambda _: None)
    energy = query(runs, "SELECT request_id, energy_j FROM energy")
    store.put(str(two / "a" / "energy"), "/bucket/runs/a/energy", recursive=True)
    notes = []
    assert_frame_equal(
        query(open_runs("memory://bucket/runs/a", note=notes.append), "SELECT request_id, energy_j FROM energy"), energy
    )
    assert not notes
    assert not list((tmp_path / "cache").rglob("power.parquet"))


def test_the_format_goes_by_the_ending_unless_it_is_named(two, tmp_path):
    answer = plan(open_runs(two), "SELECT run, step, kv_usage FROM steps")
    for suffix, read in ((".csv", pl.read_csv), (".parquet", pl.read_parquet), (".json", pl.read_json)):
        path = tmp_path / f"answer{suffix}"
        save_result(answer, path, format_of(None, path))
        assert_frame_equal(read(path), answer.collect(), check_dtypes=False)
    assert format_of("csv", tmp_path / "answer.txt") == "csv"
    assert format_of(None, None) == "table"
    with pytest.raises(AnalysisError, match=r"answer.txt: end it in .csv, .json or .parquet"):
        format_of(None, tmp_path / "answer.txt")
    assert sorted(p.name for p in tmp_path.glob("*answer*")) == ["answer.csv", "answer.json", "answer.parquet"]


def test_the_package_offers_the_api_and_imports_it_when_used():
    assert analysis.open_runs is open_runs
    code = (
        "import sys, analysis; assert 'polars' not in sys.modules; analysis.open_runs; assert 'polars' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        _ = analysis.nope


LAPTOP = """
import sys
# What others' packages need of the platform they have by now; what follows is ours.
import altair, jinja2, numba, numpy, polars, polars.io.plugins, pyarrow.fs, pyarrow.parquet, rich.console, rich.table
import scipy.optimize, scipy.stats, typer, vl_convert, asyncio, multiprocessing, concurrent.futures
import contextlib, polars.testing, subprocess, logging, tempfile, threadpoolctl
threadpoolctl.threadpool_limits = lambda *_: contextlib.nullcontext()  # it would ask Windows what is loaded
for name in ("aiohttp", "fcntl", "grp", "httptools", "pwd", "pynvml", "resource", "termios", "uvloop", "vllm"):
    sys.modules[name] = None
sys.platform = "win32"
from analysis.cli import main
sys.argv = ["analysis", *{args!r}]
main()
"""


def test_analysis_runs_without_gpu_vllm_http_or_linux(two):
    args = ["query", str(two / "a"), "SELECT count(energy_j) AS n, sum(energy_j) AS j FROM requests", "--json"]
    done = subprocess.run([sys.executable, "-c", LAPTOP.format(args=args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["n"] > 0
    assert row["j"] > 0


def test_a_run_that_may_only_be_read_is_answered_and_left_as_it_is(two, monkeypatch):
    before = sorted(p.name for p in (two / "a").iterdir())

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root, who runs some CI, may write where nobody else may
    notes = []
    runs = open_runs(two / "a", note=notes.append)
    assert query(runs, "SELECT count(energy_j) AS n FROM requests")["n"][0] > 0
    assert "not kept" in notes[0]
    assert sorted(p.name for p in (two / "a").iterdir()) == before


def test_runs_of_one_name_are_told_apart_by_their_paths(two):
    other = two.parent / "other" / "a"
    shutil.copytree(two / "a", other)
    answer = query(open_runs(two / "a", other), "SELECT DISTINCT run FROM steps ORDER BY run")
    assert answer["run"].to_list() == sorted([str(two / "a"), str(other)])


def test_requests_of_the_warm_up_are_a_table(warmed):
    run = warmed(4.0, duration_s=10.0)
    assert query([run], "SELECT count(*) AS n FROM warmup").item() == run.scan("warmup").collect().height
