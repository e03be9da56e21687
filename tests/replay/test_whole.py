"""`replay check`: what a run lacks is named, what is whole is said to be, and nothing is changed."""

import json
import shutil
import sys

import polars as pl
import pytest

import replay.cli
from replay.rundir import Run, write_manifest
from replay.tables import TABLES
from replay.whole import check, good, lines
from tracegen.schema import write_parquet

S = 1_000_000_000


@pytest.fixture(scope="module")
def in_virtual_time(sim_run, virtual_run, tmp_path_factory):
    """The directory of the same trace's run in virtual time, with all that such a run can have."""
    path = tmp_path_factory.mktemp("virtual") / "run"
    return virtual_run(path, sim_run / "trace.parquet", truth=True, tp=8).path


@pytest.fixture
def copy(sim_run, tmp_path):
    """A copy of the complete run, to be damaged."""
    return Run.open(shutil.copytree(sim_run, tmp_path / "run"))


def rewrite(run, table, change):
    frame = change(run.scan(table).collect())
    write_parquet(frame.to_arrow(compat_level=pl.CompatLevel.oldest()), run.path / f"{table}.parquet")


def told(run, of="wholeness"):
    """What stands against the run: name and why."""
    return {finding["name"]: finding["why"] for finding in check(run.path)[of] if finding["ok"] is False}


def test_a_complete_run_is_whole_and_says_how_to_repeat_it(sim_run):
    found = check(sim_run)
    assert found["whole"]
    assert found["reproducible"]
    assert all(finding["ok"] for finding in found["wholeness"])
    options = "--engine sim --tp 8 --freq 1200 --idle 700ms --metadata why=test"
    source = Run.open(sim_run).manifest["arguments"]["trace"]
    assert found["commands"] == [f"replay run {source} {options} -o {sim_run}-again"]
    shown = lines(found)
    assert shown[0] == f"SIMULATED  {sim_run}"
    assert "  ok    requests   24 of 24 requests on record, each once" in shown


def test_a_flipped_byte_is_found_in_any_column_and_nothing_is_changed(copy):
    path = copy.path / "power.parquet"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    before = {path.name: path.read_bytes() for path in copy.path.iterdir()}
    assert str(path) in told(copy)["tables"]
    assert {path.name: path.read_bytes() for path in copy.path.iterdir()} == before


def test_requests_that_are_missing_doubled_or_foreign_are_named(copy):
    def change(frame):
        foreign = frame[:1].with_columns(request_id=pl.lit(9999, pl.UInt64))
        return pl.concat([frame[4:], frame[10:12], foreign])

    rewrite(copy, "requests", change)
    why = told(copy)["requests"]
    assert why.startswith("20 of 24 requests on record; 4 without a record (request_id 100, 101, 102, ...)")
    assert "2 on record more than once (request_id 110, 111)" in why
    assert why.endswith("1 on record that the trace lacks (request_id 9999)")


def test_seconds_without_power_are_those_of_the_gpu_that_was_read_worst(copy):
    start_ns = copy.manifest["measure_start_ns"]
    silent = (pl.col("gpu") == 3) & pl.col("t_ns").is_between(start_ns + S, start_ns + 3 * S)
    rewrite(copy, "power", lambda frame: frame.filter(~silent))
    assert told(copy)["power"].startswith("2.")
    assert told(copy)["power"].endswith(" s without a reading on GPU 3")
    rewrite(copy, "power", lambda frame: frame.filter(pl.col("gpu") != 5))
    lasted = (copy.manifest["measure_end_ns"] - start_ns) / S
    assert told(copy)["power"] == f"{lasted:.1f} of {lasted:.1f} s without a reading on GPU 5"
    shutil.rmtree(copy.path / "power.parquet", ignore_errors=True)
    (copy.path / "power.parquet").unlink(missing_ok=True)
    assert told(copy)["power"] == "no power was read"


def test_engine_steps_that_are_missing_are_counted(copy):
    rewrite(copy, "steps", lambda frame: frame.filter(~pl.col("step").is_in([3, 4])))
    assert told(copy)["steps"].endswith(" engine steps, 2 missing")


def test_a_killed_run_says_what_it_lacks(copy):
    keep = {k: v for k, v in copy.manifest.items() if k not in {"measure_end_ns", "requests", "stretches"}}
    write_manifest(copy.path, {**keep, "state": "running", "verdicts": []})
    requests = copy.scan("requests").collect().sort("done_ns")
    for table, rows in (("requests", requests[:10]), ("steps", copy.scan("steps").collect())):
        (copy.path / f"{table}.parquet").unlink()
        write_parquet(
            rows.to_arrow(compat_level=pl.CompatLevel.oldest()), copy.path / f"{table}.parquet" / "part-000000.parquet"
        )
    (copy.path / ".board").touch()
    found = check(copy.path)
    assert (found["whole"], found["valid"], good(found)) == (False, None, False)
    said = {finding["name"]: finding for finding in found["wholeness"]}
    assert said["state"]["why"].startswith("running: it was killed; ")
    assert f"replay run --resume {copy.path}" in said["state"]["why"]
    assert "14 without a record" in said["requests"]["why"]
    assert "14 of them due before the last moment on record" in said["requests"]["why"]
    assert said["power"]["ok"], "power was read until the last moment on record"
    assert said["left_over"]["why"] == "still in parts: requests.parquet, steps.parquet; left over: .board"
    assert "valid: not judged, the run has not ended" in lines(found)


@pytest.mark.parametrize("clock", ["wall", "virtual"])
@pytest.mark.parametrize("table", sorted(TABLES))
def test_a_table_that_was_cut_off_is_named_and_the_others_are_judged(sim_run, in_virtual_time, tmp_path, table, clock):
    run = sim_run if clock == "wall" else in_virtual_time
    copy = Run.open(shutil.copytree(run, tmp_path / "run"))
    path = copy.path / f"{table}.parquet"
    if not path.exists():  # of a run without a warm-up
        shutil.copy(copy.path / "requests.parquet", path)
    path.write_bytes(path.read_bytes()[:-100])
    found = check(copy.path)
    assert not good(found)
    (said,) = [finding for finding in found["wholeness"] if finding["name"] == "tables"]
    assert said["ok"] is False
    article = "an" if table == "arrivals" else "a"
    assert said["why"].startswith(f"{path}: not readable as {article} {table} table (")
    assert "seed" in {finding["name"] for finding in found["reproducibility"]}


def test_what_a_complete_run_should_have_removed_is_a_fault(copy):
    (copy.path / ".requests.whole.parquet").touch()
    assert told(copy) == {"left_over": "left over: .requests.whole.parquet"}


def test_a_trace_that_is_gone_or_another_is_replaced_by_the_runs_own(copy, tmp_path):
    gone = tmp_path / "gone.parquet"
    write_manifest(copy.path, {**copy.manifest, "arguments": {**copy.manifest["arguments"], "trace": str(gone)}})
    for there, what in ((False, "not there"), (True, "another file now")):
        if there:
            shutil.copy(copy.path / "truth.parquet", gone)
        found = check(copy.path)
        (trace,) = [finding for finding in found["reproducibility"] if finding["name"] == "trace"]
        assert trace["ok"]
        assert trace["why"].startswith(f"{gone} is {what}; the run's own trace.parquet")
        assert found["commands"][0].startswith(f"replay run {copy.path / 'trace.parquet'} --engine sim")
    (copy.path / "trace.parquet").unlink()
    found = check(copy.path)
    assert not found["reproducible"]
    assert found["commands"] == []


def test_a_simulator_with_other_constants_cannot_repeat_a_run(copy):
    profile = copy.manifest["simulated_profile"]
    profile["constants"]["time"]["sustained_mhz"] += 1
    write_manifest(copy.path, copy.manifest)
    assert told(copy, "reproducibility") == {
        "simulator": "its constants have changed since; the manifest has those of then"
    }


def test_the_command_tells_by_its_exit_status(copy, capsys, monkeypatch):
    def status(*arguments):
        monkeypatch.setattr(sys, "argv", ["replay", "check", str(copy.path), *arguments])
        with pytest.raises(SystemExit) as stop:
            replay.cli.main()
        return stop.value.code, capsys.readouterr().out

    valid = {"verdicts": [{"name": "a", "ok": True, "value": None, "bound": None, "why": "w"}]}
    write_manifest(copy.path, {**copy.manifest, **valid})
    assert status()[0] == 0
    invalid = {"verdicts": [{"name": "a", "ok": False, "value": 2, "bound": 1, "why": "too much"}]}
    write_manifest(copy.path, {**copy.manifest, **invalid})
    code, out = status("--json")
    assert code == 1
    assert (json.loads(out)["valid"], json.loads(out)["invalid_because"]) == (False, ["a: too much"])
    assert "valid: NO\n  FAIL  a: too much" in status()[1]
