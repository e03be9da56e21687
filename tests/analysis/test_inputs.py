"""What is wrong with a run directory is said in one line, with file and column, and nothing is left behind."""

import json

import polars as pl
import pytest

from analysis.energy import attribute
from analysis.gaps import chunk_batches
from analysis.load import open_run
from replay.rundir import Run, write_manifest
from tracegen.errors import AnalysisError, RunError, WattraceError


def one_line(error: WattraceError) -> str:
    text = str(error)
    assert "\n" not in text
    return text


def cell(column: str, row: int, value: object) -> pl.Expr:
    """`column` with `value` in one row, from the end where that is negative."""
    here = pl.int_range(pl.len()) == (row if row >= 0 else pl.len() + row)
    return pl.when(here).then(pl.lit(value)).otherwise(pl.col(column)).alias(column)


def test_no_power_samples(run_of, rewrite):
    run = rewrite(run_of(), power=None)
    with pytest.raises(AnalysisError, match=r"has no power samples \(power\.parquet\)"):
        attribute(run)
    empty = rewrite(run, power=pl.DataFrame(schema=Run.open(run_of("other").path).scan("power").collect_schema()))
    with pytest.raises(AnalysisError, match=r"power\.parquet: has no rows"):
        attribute(empty)
    assert not (run.path / "energy").exists()


@pytest.mark.parametrize("state", ["starting", "running"])
def test_a_run_that_left_no_tables_is_said_to_be_unfinished(run_of, tmp_path, state):
    killed = tmp_path / "killed"
    killed.mkdir()
    write_manifest(killed, {**run_of().manifest, "state": state})
    with pytest.raises(AnalysisError, match=rf"did not finish and left no tables \(its manifest says '{state}'\)"):
        attribute(Run.open(killed))


@pytest.mark.parametrize(
    ("table", "column"),
    [("power", "energy_mj"), ("steps", "context_tokens"), ("segments", "kind"), ("requests", "sent_ns")],
)
def test_a_missing_column_is_named_with_its_file(run_of, rewrite, table, column):
    run = run_of()
    with pytest.raises(RunError) as error:
        attribute(rewrite(run, **{table: run.scan(table).drop(column).collect()}))
    assert f"{table}.parquet" in one_line(error.value)
    assert f"'{column}'" in str(error.value)


@pytest.mark.parametrize(
    ("table", "change", "words"),
    [
        ("steps", {"end_ns": pl.col("start_ns") - 1}, "step 0: end_ns is before start_ns"),
        ("steps", {"step": pl.lit(3, pl.UInt64)}, "step 3 occurs twice"),
        ("steps", {"decode_tokens": pl.lit(None, pl.UInt32)}, "'decode_tokens' has a null in row 0"),
        ("segments", {"kind": pl.lit("verify")}, "'verify' is neither prefill nor decode"),
        ("segments", {"last_step": pl.lit(None, pl.UInt64)}, "'last_step' has a null in row 0"),
        ("requests", {"request_id": pl.lit(1, pl.UInt64)}, "row 1, column 'request_id': 1 occurs twice"),
        ("requests", {"request_id": pl.lit(None, pl.UInt64)}, "'request_id' has a null in row 0"),
        ("requests", {"instance": pl.lit(7, pl.UInt16)}, "row 0, column 'instance': 7 is none of manifest.json's"),
        ("requests", {"done_ns": pl.col("sent_ns") - 1}, "row 0, column 'done_ns': is before sent_ns (request 100)"),
        ("requests", {"last_token_ns": pl.lit(5)}, "row 0, column 'last_token_ns': is before first_token_ns"),
        ("steps", {"step": pl.col("step") + 2**63}, "column 'step' is beyond 4611686018427387904"),
        ("steps", {"instance": pl.lit(7, pl.UInt16)}, "column 'instance': 7 is none of manifest.json's instances (0)"),
        ("steps", {"step": pl.col("step").reverse()}, "step 1: start_ns is before that of step 0"),
        ("segments", {"instance": pl.lit(None, pl.UInt16)}, "'instance' has a null in row 0"),
        ("segments", {"instance": pl.lit(7, pl.UInt16)}, "row 0, column 'instance': 7 is none of manifest.json's"),
        ("requests", {"done_ns": pl.col("last_token_ns") - 1}, "row 0, column 'done_ns': is before last_token_ns (req"),
        (
            "requests",
            {"status": cell("status", 9, "fine")},
            "row 9, column 'status': 'fine' is none of ok, http_error,",
        ),
        ("steps", {"instance": cell("instance", 5, None)}, "column 'instance' has a null in row 5"),
        ("steps", {"step": pl.lit(None, pl.UInt64)}, "column 'step' has a null in row 0"),
        (
            "steps",
            {"end_ns": pl.col("end_ns") + 2 * 10**9},
            "start_ns is more than 1 s before the end of the step before",
        ),
        ("steps", {"end_ns": cell("end_ns", -1, 2**62)}, "end_ns is more than an hour after start_ns"),
        (
            "steps",
            {"decode_tokens": cell("decode_tokens", 4, 2**25)},
            "step 4: column 'decode_tokens' is 33554432, more ",
        ),
        ("segments", {"tokens_per_step": cell("tokens_per_step", 6, 0)}, "row 6, column 'tokens_per_step' is 0"),
        (
            "segments",
            {"context_start": cell("context_start", 6, 2**31)},
            "row 6, column 'context_start': 2147483648 is m",
        ),
        ("power", {"gpu": pl.lit(None, pl.UInt16)}, "'gpu' has a null in row 0"),
        ("power", {"gpu": pl.lit(5, pl.UInt16)}, "has no readings of gpu 0 on node, which manifest.json gives to"),
        ("power", {"t_ns": pl.col("t_ns") + 10**15}, "has no readings within the window"),
        (
            "power",
            {"energy_mj": pl.lit(None, pl.UInt64), "power_instant_mw": pl.lit(None, pl.UInt32)},
            "gpu 0 on node: the counter has no readings, and neither power_instant_mw nor power_average_mw",
        ),
    ],
)
def test_a_wrong_table_is_named_with_what_is_wrong(run_of, rewrite, table, change, words):
    run = run_of()
    with pytest.raises(WattraceError) as error:
        attribute(rewrite(run, **{table: run.scan(table).with_columns(**change).collect()}))
    assert words in one_line(error.value)
    assert f"{table}.parquet" in str(error.value)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ({"instances": None}, "'instances' is missing or empty"),
        ({"instances": [{"host": "node"}]}, "has no key 'instance'"),
        ({"instances": [{"instance": 0, "gpus": []}]}, "instance 0 names no 'gpus'"),
        ({"measure_start_ns": 10, "measure_end_ns": 5}, "measure_end_ns is not after measure_start_ns"),
        ({"instances": [{"instance": "x", "gpus": "abc"}]}, "key 'instances[0].instance' is 'x', not a whole number"),
        ({"instances": [{"instance": 0, "gpus": ["a"]}]}, "key 'instances[0].gpus[0]' is 'a', not a whole number"),
        ({"instances": 3}, "key 'instances' is '3', not a list"),
        ({"instances": [None]}, "key 'instances[0]' is 'None', not an object"),
        ({"gpus": "none"}, "key 'gpus' is 'none', not a list"),
        ({"gpus": [{"gpu": 0, "idle_power_w": {"counter": "low"}}]}, "key 'gpus[0].idle_power_w.counter' is 'low'"),
        ({"gpus": [{"gpu": 0, "sensors": {"instant": 5}}]}, "key 'gpus[0].sensors.instant' is '5', not an object"),
        ({"hosts": 5}, "key 'hosts' is '5', not a list"),
        ({"workers": [{"worker": True}]}, "key 'workers[0].worker' is 'True', not a whole number"),
        ({"measure_start_ns": "abc"}, "key 'measure_start_ns' is 'abc', not a whole number"),
        (
            {"instances": [{"instance": 0, "gpus": [0, 0]}]},
            "key 'instances[0].gpus[1]' is 0, which is given out already",
        ),
        ({"instances": [{"instance": 0}, {"instance": 0}]}, "key 'instances[1].instance' is 0, as is another's"),
        (
            {"instances": [{"instance": 0, "gpus": [0, 1]}, {"instance": 1, "gpus": [1]}]},
            "key 'instances[1].gpus[0]' is 1, which is given out already",
        ),
        (
            {"instances": [{"instance": 0, "gpus": [-1]}]},
            "key 'instances[0].gpus[0]' is -1, not an NVML index from 0 to 65,535",
        ),
        ({"instances": [{"instance": 0, "recorder": {"missing": "x"}}]}, "key 'instances[0].recorder.missing' is 'x'"),
        (
            {"gpus": [{"gpu": 0, "idle_power_w": {"counter": -5}}]},
            "key 'gpus[0].idle_power_w.counter' is -5, not watts of one GPU",
        ),
        (
            {"gpus": [{"gpu": 0, "idle_power_after_w": {"instant": 95_000}}]},
            "key 'gpus[0].idle_power_after_w.instant' is 95,000, not watts of one GPU from 0 to 10,000",
        ),
        (
            {"gpus": [{"gpu": 0, "idle_power_w": {"counter": float("nan")}}]},
            "key 'gpus[0].idle_power_w.counter' is 'nan', not a number",
        ),
        ({"gpus": [{"host": "node"}]}, "key 'gpus[0]' has no key 'gpu', so no readings belong to it"),
        ({"gpus": [{"gpu": 1}, {"gpu": 0}, {"gpu": 1}]}, "key 'gpus[2]' is about gpu 1, as is 'gpus[0]'; keep one"),
        ({"instances": [{"instance": 0, "freq_mhz": 0}]}, "key 'instances[0].freq_mhz' is 0, not a GPU's clock in MHz"),
        ({"instances": [{"instance": 0, "freq_mhz": 1_980_000}]}, "'instances[0].freq_mhz' is 1,980,000, not a GPU's"),
        ({"instances": [{"instance": 0, "tp": 0}]}, "key 'instances[0].tp' is 0, not a number of GPUs from 1"),
        (
            {"hosts": [{"host": "a", "offset_error_ns": -3}]},
            "key 'hosts[0].offset_error_ns' is -3, not a stretch of ns",
        ),
        ({"hosts": [{"host": "a"}, {"host": "a"}]}, "key 'hosts[1]' is about host a, as is 'hosts[0]'; keep one"),
        (
            {"measure_start_ns": 10**400},
            "key 'measure_start_ns' is 10,000,000,000,",
        ),
        ({"clock_anchors": "noon"}, "key 'clock_anchors' is 'noon', not a list"),
        ({"verdicts": ["bad"]}, "key 'verdicts[0]' is 'bad', not an object"),
        ({"schema_version": "2.0"}, "is newer than this program's"),
    ],
)
def test_a_wrong_manifest_is_named_with_its_key(run_of, rewrite, manifest, words):
    run = run_of()
    document = {k: v for k, v in {**run.manifest, **manifest}.items() if v is not None}
    (run.path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(WattraceError) as error:
        attribute(Run.open(run.path))
    assert words in one_line(error.value)
    assert "manifest.json" in str(error.value)


def test_the_manifest_is_checked_where_a_run_is_opened(run_of):
    run = run_of()
    (run.path / "manifest.json").write_text(json.dumps({**run.manifest, "instances": ["a"]}))
    with pytest.raises(RunError, match=r"key 'instances\[0\]'"):
        open_run(run.path)


def test_no_request_has_more_tokens_than_its_model_takes_but_others_may_be_summed_up(run_of, rewrite):
    run = run_of()
    instances = [{**run.manifest["instances"][0], "max_model_len": 300}]
    with pytest.raises(
        RunError, match=r"segments\.parquet: row \d+, column 'tokens_per_step': \d+ is more than the 300 of"
    ):
        attribute(rewrite(run, {"instances": instances}))
    segments = run.scan("segments").with_columns(
        pl.when((pl.col("tokens_per_step") <= 300) & (pl.col("context_start") <= 300)).then("request_id")
    )
    assert attribute(rewrite(run, segments=segments.collect())).summary["other_j"] > 0


def test_steps_that_were_lost_at_the_beginning_are_said(run_of, rewrite):
    run = run_of()
    early = run.scan("segments").collect()["first_step"] < 20
    notes = attribute(rewrite(run, steps=run.scan("steps").collect()[20:])).summary["notes"]
    assert f"{early.sum()} segments begin before the first engine step recorded and were cut there" in notes


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ({"chunk_tokens": [[1, 1], [1]]}, "column 'chunk_tokens' has 1 values, chunk_ns 2 (request 101)"),
        ({"chunk_ns": [[5, 7], [9, 8]]}, "column 'chunk_ns' goes back in time (request 101)"),
    ],
)
def test_times_of_chunks_that_cannot_be_are_named_with_their_request(run_of, rewrite, chunks, words):
    run = run_of()
    columns = {"chunk_ns": [[5, 7], [8, 9]], "chunk_tokens": [[1, 1], [1, 1]]}
    told = {name: pl.Series(name, values) for name, values in (columns | chunks).items()}
    requests = run.scan("requests").collect()[:2].with_columns(**told)
    with pytest.raises(RunError) as error:
        list(chunk_batches(rewrite(run, requests=requests)))
    assert words in one_line(error.value)
    assert "requests.parquet" in str(error.value)


def test_what_was_never_reached_and_columns_of_others_are_no_error(run_of, rewrite):
    run = run_of()
    never = [pl.lit(None, pl.Int64).alias(n) for n in ("headers_ns", "first_token_ns", "last_token_ns", "done_ns")]
    requests = run.scan("requests").with_columns(*never, status=pl.lit("timeout"), mine=pl.lit("x")).collect()
    untold = [pl.lit(None, pl.UInt32).alias(name) for name in ("waiting", "requests")]
    steps = run.scan("steps").with_columns(*untold, mine=pl.lit(1)).collect()
    known_j = attribute(run).requests["energy_j"].sum()
    assert attribute(rewrite(run, requests=requests, steps=steps)).requests["energy_j"].sum() == pytest.approx(known_j)


def test_a_segment_beyond_the_steps_is_an_error_of_a_complete_run_and_a_remark_on_a_partial_one(run_of, rewrite):
    run = run_of()
    steps = run.scan("steps").collect()
    cut = steps.head(steps.height - 40)
    beyond = run.scan("segments").collect()["last_step"] > cut["step"].max()
    with pytest.raises(RunError) as error:
        attribute(rewrite(run, steps=cut))
    assert f"segments.parquet: row {beyond.arg_max()}, column 'last_step': " in one_line(error.value)
    energy = attribute(rewrite(run, {"state": "failed"}))
    assert f"{beyond.sum()} segments reach beyond the last engine step recorded" in " ".join(energy.summary["notes"])


def test_a_request_twice_in_one_step_is_named_with_its_row(run_of, rewrite):
    run = run_of()
    segments = run.scan("segments").collect()
    again = segments.row(7, named=True)
    double = pl.concat([segments, segments.slice(7, 1)])
    with pytest.raises(RunError) as error:
        attribute(rewrite(run, segments=double))
    words = (
        f"row {segments.height}, column 'first_step': request {again['request_id']} is in step {again['first_step']}"
    )
    assert words in one_line(error.value)


def test_holes_in_the_readings_are_said_once_for_all_gpus(run_of, rewrite):
    run = run_of()
    start = run.manifest["measure_start_ns"]
    outside = ~pl.col("t_ns").is_between(start + 12_000_000_000, start + 14_960_000_000)
    notes = attribute(rewrite(run, power=run.scan("power").filter(outside).collect())).summary["notes"]
    said = "no power reading for 3.0 s at 12 s, among 1 holes of more than 0.5 s"
    assert [note for note in notes if "holes" in note] == [f"gpu 0 on node, gpu 1 on node: {said}"]


@pytest.mark.parametrize(("method", "scope"), [("magic", "gpu"), ("shapley", "room")])
def test_an_unknown_method_or_scope_lists_what_there_is(run_of, method, scope):
    with pytest.raises(AnalysisError, match="use "):
        attribute(run_of(), method, scope)


def test_a_run_where_nothing_was_sent(run_of, rewrite):
    run = run_of()
    requests = run.scan("requests").collect().clear()
    tables = {"requests": requests, "steps": None, "segments": None, "truth": None}
    with pytest.raises(AnalysisError, match="no request was sent"):
        attribute(rewrite(run, {"measure_start_ns": None, "measure_end_ns": None}, **tables))
    summary = attribute(
        rewrite(run, {"measure_start_ns": 7_000_000_000_000, "measure_end_ns": 7_010_000_000_000})
    ).summary
    assert summary["idle_j"] == pytest.approx(summary["measured_j"], rel=1e-12)
    assert summary["membership"] is None


def test_idle_power_of_another_source_is_used_and_said(run_of, rewrite):
    run = run_of()
    gpus = [{**g, "idle_power_w": {"instant": 99.0}, "idle_power_after_w": None} for g in run.manifest["gpus"]]
    summary = attribute(rewrite(run, {"gpus": gpus})).summary
    assert summary["fit"][0]["idle_power_w"] == {"before": 198.0, "after": 198.0, "source": "instant"}
    assert "gpu 0 on node, gpu 1 on node: no idle power from the counter, taken from instant" in summary["notes"]


def test_hosts_and_sensors_may_be_missing(run_of, rewrite):
    run = run_of()
    plain = attribute(run).requests
    bare = {"hosts": None, "workers": None, "gpus": [{"gpu": g, "idle_power_w": {"counter": 100}} for g in (0, 1)]}
    power = run.scan("power").with_columns(
        pl.lit(None, pl.String).alias("host"), pl.lit(None, pl.Int64).alias("sensor_ns")
    )
    instances = [{"instance": 0, "gpus": [0, 1]}]
    energy = attribute(rewrite(run, {**bare, "instances": instances}, power=power.collect()))
    ratio = (energy.requests["energy_j"] / plain["energy_j"] - 1).abs()
    assert ratio.median() < 0.05
