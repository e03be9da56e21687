"""What is due in the warm-up is sent and on record, and no figure has it; the rest adds up as in every run."""

import shutil
from pathlib import Path

import polars as pl
import pytest

from analysis.energy import attribute
from analysis.saved import RunEnergy
from analysis.serving import serving
from replay.judge import judge
from replay.live import PlainProgress
from replay.records import RecordStore, left_over, recover
from replay.reqlog import RequestLog
from replay.resume import begin_stretch, end_stretch, take_up
from replay.rundir import Run, scan_table, write_manifest
from replay.show import lines
from replay.stream import Record
from replay.summary import measured, summarize
from replay.verdicts import validity
from replay.whole import check
from tracegen.schema import write_parquet

S = 1_000_000_000
EARLY_NS = 1_000 * 1_000_000  # 8 of the 24 requests, one each 130 ms
NO_ENERGY = RunEnergy(None, None, None)


def write(run, table, frame):
    write_parquet(frame.to_arrow(compat_level=pl.CompatLevel.oldest()), run.path / f"{table}.parquet")


@pytest.fixture
def warmed(sim_run, tmp_path):
    """The complete run, as if it had been asked for with a warm-up of one second."""
    run = Run.open(shutil.copytree(sim_run, tmp_path / "run"))
    start_ns = run.manifest["measure_start_ns"] + EARLY_NS
    requests = run.scan("requests").collect()
    early = pl.col("scheduled_ns") < start_ns
    write(run, "warmup", requests.filter(early))
    write(run, "requests", requests.filter(~early))
    arguments = {**run.manifest["arguments"], "warmup_ns": EARLY_NS}
    write_manifest(run.path, {**run.manifest, "measure_start_ns": start_ns, "arguments": arguments})
    return Run.open(run.path)


def test_no_figure_has_the_warm_up_and_check_knows_each_request(warmed, sim_run):
    summary, whole, found = summarize(warmed.path), summarize(sim_run), check(warmed.path)
    assert (summary["requests_planned"], summary["requests_ok"], summary["warmup_requests"]) == (16, 16, 8)
    assert summary["seconds"] == pytest.approx(whole["seconds"] - 1)
    assert summary["energy_j"] < whole["energy_j"]
    late = warmed.scan("requests").collect()
    assert summary["output_tokens"] == late["output_tokens"].sum()
    assert summary["ttft_ms"]["p50"] == pytest.approx((late["first_token_ns"] - late["sent_ns"]).median() / 1e6)
    text = lines(summary)
    assert "warmup  8 requests due in the first 1 s, in none of the figures" in text
    assert [finding["why"] for finding in found["wholeness"] if finding["ok"] is False] == []
    assert any("24 of 24 requests on record, each once, 8 in the warm-up" in f["why"] for f in found["wholeness"])
    assert "--warmup 1s" in found["commands"][-1]


def test_what_a_cap_held_back_until_after_the_warm_up_is_counted_and_said(warmed):
    start_ns = warmed.manifest["measure_start_ns"]
    early = warmed.scan("warmup").collect().sort("scheduled_ns").with_row_index("n")
    held_back = pl.when(pl.col("n") >= 5).then(start_ns + 7).otherwise("sent_ns")
    write(warmed, "warmup", early.with_columns(sent_ns=held_back).drop("n"))
    assert summarize(warmed.path)["warmup_held_back"] is None, "no cap was asked for"
    arguments = {**warmed.manifest["arguments"], "max_concurrency": 3}
    write_manifest(warmed.path, {**warmed.manifest, "arguments": arguments})
    summary = summarize(warmed.path)
    assert summary["warmup_held_back"] == 3
    (said,) = [line for line in lines(summary) if line.startswith("warmup")]
    assert said.endswith("; the cap sent 3 of them only after it, before those that are measured")


def test_verdicts_are_on_what_was_measured(warmed):
    broken = pl.when(pl.col("request_id") < 106).then(pl.lit("http_error")).otherwise("status").alias("status")
    write(warmed, "warmup", warmed.scan("warmup").with_columns(broken).collect())
    (said,) = [verdict for verdict in judge(warmed.path, warmed.manifest, [0]) if verdict.name == "error_rate"]
    assert (said.ok, said.why) == (True, "16 of 16 requests ok")


@pytest.mark.parametrize("recorded", [True, False])
def test_energy_adds_up_and_the_warm_up_is_other(warmed, recorded):
    """Requests of the warm-up that were still served when it was over are nobody's of those that were measured."""
    if not recorded:
        for table in ("steps", "segments", "arrivals", "truth"):
            (warmed.path / f"{table}.parquet").unlink()
    energy = attribute(warmed)
    summary = energy.summary
    total_j = sum(summary[key] for key in ("attributed_j", "idle_j", "other_j"))
    assert total_j == pytest.approx(summary["measured_j"], rel=1e-9)
    assert summary["requests"] == energy.requests.height == 16
    assert summary["other_j"] > 0.01 * summary["measured_j"]
    assert summary["window"]["start_ns"] == warmed.manifest["measure_start_ns"]
    (note,) = [note for note in summary["notes"] if "of other are" in note]
    assert note.endswith("of the trace that were due in the warm-up")
    (warmed.path / "warmup.parquet").unlink()
    without = attribute(warmed).summary
    if not recorded:  # client times alone tell who was there
        assert without["other_j"] < summary["other_j"]


def test_latencies_and_rates_are_of_the_measured_window(warmed):
    answer = serving(warmed, NO_ENERGY)
    assert answer.window_ns == (warmed.manifest["measure_start_ns"], warmed.manifest["measure_end_ns"])
    assert (answer.whole["requests"], answer.whole["ok"]) == (16, 16)


def record(request_id, due_ns):
    return Record(request_id, 0, due_ns, 3, sent_ns=due_ns, done_ns=due_ns + 9, status="ok", output_tokens=3)


def test_records_go_to_the_table_that_their_due_time_says(tmp_path):
    """Also those that only the log has when everything is killed; none is in both tables, none in neither."""
    log = RequestLog(tmp_path, 0, save_chunks=True)
    for row in (record(1, 10), record(2, 99), record(3, 100), record(4, 200)):
        log.add(row)
    log.write()
    write_manifest(tmp_path, {"state": "running", "measure_start_ns": 100, "arguments": {}})
    assert left_over(tmp_path) == 4
    assert recover(tmp_path) == 4
    run = Run.open(tmp_path)
    assert run.scan("warmup").collect()["request_id"].to_list() == [1, 2]
    assert run.scan("requests").collect()["request_id"].to_list() == [3, 4]
    assert left_over(tmp_path) == 0


def test_a_log_whose_warm_up_was_stored_before_a_kill_is_stored_once(tmp_path):
    log = RequestLog(tmp_path, 0, save_chunks=True)
    for row in (record(1, 10), record(2, 200)):
        log.add(row)
    log.write()
    log.close()
    (path,) = (tmp_path / "requests.log").iterdir()
    kept = path.read_bytes()
    store = RecordStore(tmp_path, measure_start_ns=100)
    assert store.store() == 2
    (tmp_path / "requests.parquet" / f"{path.stem}.parquet").unlink()
    path.write_bytes(kept)
    assert store.store() == 1
    ids = [scan_table(tmp_path, table).collect()["request_id"].to_list() for table in ("warmup", "requests")]
    assert ids == [[1], [2]]


def test_a_run_that_was_cut_short_in_its_warm_up_warms_up_again():
    manifest = {}
    assert begin_stretch(manifest, 10 * S, 15 * S) == 15 * S
    assert measured(manifest, 14 * S) == [], "it was killed"
    manifest["stretches"][0]["end_ns"] = 14 * S
    assert begin_stretch(manifest, 100 * S, 103 * S) == 103 * S
    manifest |= end_stretch(manifest, 110 * S)
    assert (manifest["measure_start_ns"], manifest["measure_end_ns"]) == (103 * S, 110 * S)
    assert manifest["paused_s"] == 0.0, "the pause is not in the window"
    assert measured(manifest, None) == [(103 * S, 110 * S)]


def test_a_run_that_was_cut_short_behind_its_warm_up_goes_on_being_measured():
    manifest = {}
    begin_stretch(manifest, 10 * S, 15 * S)
    manifest |= end_stretch(manifest, 20 * S)
    assert begin_stretch(manifest, 100 * S, 95 * S) == 15 * S
    manifest |= end_stretch(manifest, 110 * S)
    assert measured(manifest, None) == [(15 * S, 20 * S), (100 * S, 110 * S)]
    assert manifest["paused_s"] == 80.0


def test_a_run_that_ends_in_its_warm_up_has_an_empty_window(warmed):
    manifest = {}
    begin_stretch(manifest, 10 * S, 15 * S)
    manifest |= end_stretch(manifest, 14 * S)
    assert manifest["measure_start_ns"] == manifest["measure_end_ns"] == 14 * S
    assert measured(manifest, None) == []
    start_ns = warmed.manifest["measure_start_ns"] - EARLY_NS
    everything = pl.concat([warmed.scan(table).collect() for table in ("requests", "warmup")])
    write(warmed, "warmup", everything)
    write(warmed, "requests", everything.clear())
    empty = {
        **warmed.manifest,
        "state": "interrupted",
        "measure_start_ns": start_ns + S,
        "measure_end_ns": start_ns + S,
    }
    empty["stretches"] = [{**warmed.manifest["stretches"][0], "start_ns": start_ns, "end_ns": start_ns + S}]
    judged = judge(warmed.path, empty, [0])
    write_manifest(warmed.path, {**empty, "verdicts": [vars(verdict) for verdict in judged]})
    assert validity("interrupted", judged)["valid"] is False
    text = lines(summarize(warmed.path))
    assert text[0] == "SIMULATED  interrupted: 0 of 0 requests ok, its warm-up was not over"
    assert "energy  not measured: its warm-up was not over" in text


def test_what_was_aborted_in_the_warm_up_is_sent_again_when_the_run_goes_on(warmed):
    aborted = pl.when(pl.col("request_id") > 105).then(pl.lit("aborted")).otherwise("status").alias("status")
    write(warmed, "warmup", warmed.scan("warmup").with_columns(aborted).collect())
    write(warmed, "requests", warmed.scan("requests").collect().clear())
    write_manifest(warmed.path, {**warmed.manifest, "state": "interrupted"})
    taken = take_up(warmed.path)
    assert pl.concat(taken.source.batches())["request_id"].to_list() == list(range(106, 124))
    assert (taken.recorded, taken.unanswered) == (6, 2)
    assert Run.open(warmed.path).scan("warmup").collect().height == 6


def test_a_run_is_sent_whole_and_measured_from_the_end_of_its_warm_up(make_trace, replay, plain_server, tmp_path):
    rows = [(i * 100, 20, 3) for i in range(12)]
    trace = make_trace(tmp_path / "trace.parquet", rows)
    run = Run.open(replay(trace, engine=plain_server, output=tmp_path / "run", warmup_ns=500 * 1_000_000))
    early, late = (run.scan(table).collect() for table in ("warmup", "requests"))
    assert sorted(early["request_id"]) == list(range(100, 105))
    assert late["request_id"].to_list() == list(range(105, 112))
    assert late["scheduled_ns"][0] == run.manifest["measure_start_ns"]
    assert run.manifest["stretches"][0]["start_ns"] == run.manifest["measure_start_ns"] - S // 2
    assert run.manifest["requests"] == {"planned": 12, "sent": 12, "ended": 12}
    assert Path(run.path / "warmup.parquet").is_file()
    assert check(run.path)["whole"]


def test_a_missing_table_of_the_warm_up_is_named(warmed):
    (warmed.path / "warmup.parquet").unlink()
    (said,) = [finding for finding in check(warmed.path)["wholeness"] if finding["ok"] is False]
    assert said["name"] == "requests"
    assert "8 without a record" in said["why"]
    assert "warmup.parquet, which has what was due in the warm-up, is missing" in said["why"]


def test_what_was_due_in_a_warm_up_that_is_over_is_never_measured(make_trace, replay, plain_server, tmp_path, capsys):
    """Two requests of the warm-up were in flight when the run was killed behind it: they are sent again, much later."""
    trace = make_trace(tmp_path / "trace.parquet", [(i * 100, 20, 3) for i in range(12)])
    options = {"warmup_ns": 500 * 1_000_000, "progress": PlainProgress()}
    run = Run.open(replay(trace, engine=plain_server, output=tmp_path / "run", **options))
    assert "is sent, but not measured" in capsys.readouterr().err
    lost = {"warmup": [103, 104], "requests": [110, 111]}
    for table, ids in lost.items():
        write(run, table, run.scan(table).collect().filter(~pl.col("request_id").is_in(ids)))
    write_manifest(run.path, {**run.manifest, "state": "interrupted"})
    replay(Path(), resume=run.path, progress=options["progress"])
    assert "is sent, but not measured" not in capsys.readouterr().err, "the warm-up is over"
    again = Run.open(run.path)
    early, late = (again.scan(table).collect() for table in ("warmup", "requests"))
    assert sorted(early["request_id"]) == list(range(100, 105))
    assert sorted(late["request_id"]) == list(range(105, 112))
    assert summarize(run.path)["warmup_requests"] == 5
    assert check(run.path)["whole"]


def test_what_the_log_of_a_second_stretch_has_goes_where_the_trace_says(tmp_path, make_trace):
    make_trace(tmp_path / "trace.parquet", [(0, 1, 3), (9, 1, 3), (10, 1, 3)])
    log = RequestLog(tmp_path, 0, save_chunks=True)
    for row in (record(101, 5 * S), record(102, 6 * S)):
        log.add(row)
    log.write()
    manifest = {"state": "running", "measure_start_ns": S, "arguments": {"warmup_ns": 10_000_000}}
    write_manifest(tmp_path, {**manifest, "stretches": [{"start_ns": 0, "end_ns": 2 * S}, {"start_ns": 5 * S}]})
    assert recover(tmp_path) == 2
    run = Run.open(tmp_path)
    assert run.scan("warmup").collect()["request_id"].to_list() == [101]
    assert run.scan("requests").collect()["request_id"].to_list() == [102]
