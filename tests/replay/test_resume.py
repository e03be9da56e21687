"""A run that was cut short goes on: every request is on record once, and nothing that was measured is lost."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from replay import resume
from replay.gpu.sim import SimBoard, SimGpus
from replay.hold import held, hold
from replay.plan import RunOptions
from replay.resume import begin_stretch, end_stretch, resumed_options, take_up
from replay.rundir import Run, has_table, write_manifest
from replay.sim.profile import load_profile
from replay.tables import TABLES
from replay.whole import check
from tracegen.errors import ReplayError, RunError
from tracegen.schema import write_parquet

S = 1_000_000_000


@pytest.fixture
def cut_short(sim_run, tmp_path):
    """The complete run as an interruption leaves it: 10 requests have ended, one was aborted, one found no server."""
    run = Run.open(shutil.copytree(sim_run, tmp_path / "run"))
    requests = run.scan("requests").collect().sort("request_id")[:12]
    aborted = pl.col("request_id") >= 110
    why = pl.when(pl.col("request_id") > 110).then(pl.lit("connect_error")).otherwise(pl.lit("aborted"))
    rows = requests.with_columns(status=pl.when(aborted).then(why).otherwise("status"))
    write_parquet(rows.to_arrow(compat_level=pl.CompatLevel.oldest()), run.path / "requests.parquet")
    write_manifest(run.path, {**run.manifest, "state": "interrupted"})
    return Run.open(run.path)


def rows(run, table):
    """All rows of a table, in an order of their own."""
    frame = run.scan(table).collect()
    keys = [name for name in frame.columns if not frame.schema[name].is_nested()]
    return frame.sort(keys, nulls_last=True)


def test_what_is_left_is_what_has_no_ended_record(cut_short):
    before = {table: rows(cut_short, table) for table in TABLES if cut_short.has(table)}
    taken = take_up(cut_short.path)
    assert pl.concat(taken.source.batches())["request_id"].to_list() == list(range(110, 124))
    assert (taken.recorded, taken.unanswered) == (10, 2)
    assert taken.news == "going on: 10 requests on record, 14 left, 2 of them sent before and not answered"
    assert taken.first_steps == {0: before["steps"]["step"].max() + 1}
    last = before["power"].filter(pl.col("gpu") == 3).sort("t_ns")[-1]
    assert taken.counters[3] == (last["t_ns"].item(), last["energy_mj"].item())
    run = Run.open(cut_short.path)
    assert rows(run, "requests").equals(before["requests"].filter(pl.col("request_id") < 110))
    for table in ("trace", "steps", "power", "server_metrics"):
        assert rows(run, table).equals(before[table]), table
    own, were = (frame.filter(pl.col("request_id") < 110) for frame in (rows(run, "segments"), before["segments"]))
    assert own.equals(were)
    foreign = run.scan("segments").filter(pl.col("request_id").is_null()).collect()
    assert foreign.height == before["segments"].height - own.height
    assert not run.has("truth"), "it was computed for the requests as they were"


def test_parts_of_before_have_names_of_their_own(cut_short):
    take_up(cut_short.path)
    for table in ("requests", "steps", "segments", "power"):
        names = [part.name for part in (cut_short.path / f"{table}.parquet").iterdir()]
        assert names == ["before-000000.parquet"], table
    # The next stretch writes its own, and is cut short as it begins, and again when it goes on.
    one = Run.open(cut_short.path).scan("steps").collect()[:1]
    for writer, count in (("engine000", 2), ("engine000", 11)):
        for number in range(count):
            path = cut_short.path / "steps.parquet" / f"{writer}-{number:06d}.parquet"
            write_parquet(one.to_arrow(compat_level=pl.CompatLevel.oldest()), path)
        height = Run.open(cut_short.path).scan("steps").collect().height
        take_up(cut_short.path)
        assert Run.open(cut_short.path).scan("steps").collect().height == height
    names = sorted(part.name for part in (cut_short.path / "steps.parquet").iterdir())
    assert names == [f"before-{number:06d}.parquet" for number in range(14)]


def test_taking_up_again_changes_nothing_more(cut_short, monkeypatch):
    """A replay that is killed as it begins leaves what the next one needs."""
    renamed = Path.rename

    def killed(path, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        take_up(cut_short.path)
    assert not has_table(cut_short.path, "requests"), "it was killed at the worst moment"
    monkeypatch.setattr(Path, "rename", renamed)
    first = take_up(cut_short.path)
    after = {table: rows(cut_short, table) for table in TABLES if cut_short.has(table)}
    second = take_up(cut_short.path)
    assert first.remaining == second.remaining
    assert (first.recorded, first.first_steps) == (second.recorded, second.first_steps)
    assert all(rows(cut_short, table).equals(frame) for table, frame in after.items())


def test_a_run_that_was_killed_ends_with_the_last_that_is_on_record(cut_short):
    (stretch,) = cut_short.manifest["stretches"]
    manifest = {key: value for key, value in cut_short.manifest.items() if key != "measure_end_ns"}
    write_manifest(cut_short.path, {**manifest, "state": "running", "stretches": [{**stretch, "end_ns": None}]})
    (closed,) = take_up(cut_short.path).manifest["stretches"]
    assert closed["end_ns"] == cut_short.scan("steps").collect()["end_ns"].max()


def test_nothing_is_left_of_a_complete_run(sim_run, tmp_path):
    run_dir = shutil.copytree(sim_run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with pytest.raises(ReplayError, match="nothing is left to send: all 24 requests are on record"):
        take_up(run_dir)
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


@pytest.mark.parametrize("state", ["running", "finishing"])
def test_a_run_that_was_killed_while_it_was_finished_is_put_together_and_judged(sim_run, tmp_path, replay, state):
    """With parts not yet joined, one table on its way from parts to a file, and nobody who serves."""
    run = Run.open(shutil.copytree(sim_run, tmp_path / "run"))
    before = {table: rows(run, table) for table in TABLES if run.has(table)}
    take_aside(run.path)
    parts = run.path / "steps.parquet"
    parts.rename(run.path / ".steps.parts")
    (run.path / ".steps.whole.parquet").touch()
    (run.path / ".board").touch()
    ended = {"measure_end_ns", "requests", "valid", "invalid_because"} if state == "running" else {"valid"}
    manifest = {key: value for key, value in run.manifest.items() if key not in ended}
    if state == "running":
        manifest["stretches"] = [{**manifest["stretches"][0], "end_ns": None}]
    for entry in manifest["gpus"]:
        entry.pop("idle_power_after_w", None)
    write_manifest(run.path, {**manifest, "state": state, "verdicts": []})
    assert replay(Path(), resume=run.path) == run.path
    again, found = Run.open(run.path), check(run.path)
    assert [finding["why"] for finding in found["wholeness"] if finding["ok"] is False] == []
    assert again.manifest["state"] == "complete"
    assert again.manifest["requests"] == {"planned": 24, "sent": 24, "ended": 24}
    assert len(again.manifest["stretches"]) == 1, "nothing was sent"
    for table, frame in before.items():
        assert rows(again, table).equals(frame), table
    verdicts = {verdict["name"]: verdict for verdict in again.manifest["verdicts"]}
    assert verdicts["error_rate"]["ok"]
    assert verdicts["loop_stall"]["ok"] is None
    assert verdicts["idle_measured"]["why"] == "idle power is missing after the run"
    with pytest.raises(ReplayError, match="nothing is left to send"):
        take_up(run.path)


def take_aside(run_dir):
    """Make every table but the trace a folder of one part, as it is before a run is finished."""
    for path in run_dir.glob("*.parquet"):
        if path.stem == "truth":
            path.unlink()
        elif path.stem != "trace":
            part = path.rename(run_dir / "part")
            path.mkdir()
            part.rename(path / "part-000000.parquet")


def test_a_run_goes_on_with_its_own_options(cut_short):
    given = RunOptions(Path(), resume=cut_short.path, api_key="secret")
    options = resumed_options(given)
    assert (options.engine, options.tp, options.freq_mhz, options.idle_ns) == ("sim", 8, 1200, 7 * 10**8)
    assert (options.trace, options.resume) == (cut_short.path / "trace.parquet", cut_short.path)
    assert options.api_key == "secret"
    assert resumed_options(replace(given, output=cut_short.path)) == options


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tp": 2}, "--tp with --resume: a run goes on as it was begun"),
        ({"save_chunks": False}, "--save-chunks or --no-save-chunks with --resume"),
        ({"output": Path("other")}, "-o other with --resume: a run goes on in its own directory"),
    ],
)
def test_a_run_that_goes_on_cannot_be_changed(cut_short, change, why):
    with pytest.raises(ReplayError, match=why):
        resumed_options(RunOptions(Path(), resume=cut_short.path, **change))


def test_what_cannot_go_on_is_refused(cut_short, tmp_path, monkeypatch):
    def refusal(**changes):
        write_manifest(cut_short.path, {**cut_short.manifest, **changes})
        with pytest.raises(ReplayError) as error:
            resumed_options(RunOptions(Path(), resume=cut_short.path))
        return str(error.value)

    assert "a run in virtual time does not go on" in refusal(clock="virtual")
    assert "no request was due yet (state: starting)" in refusal(stretches=[], state="starting")
    (stretch,) = cut_short.manifest["stretches"]
    assert "it was booted since" in refusal(stretches=[{**stretch, "boot_id": "another"}])
    assert "do not tell how the run was asked for" in refusal_of_arguments(cut_short)
    monkeypatch.setattr(resume, "boot_id", lambda: None)
    assert "it was booted since" in refusal(stretches=[{**stretch, "boot_id": None}])
    with pytest.raises(RunError, match="no such run directory"):
        resumed_options(RunOptions(Path(), resume=tmp_path / "none"))


def test_a_run_that_had_all_its_answers_is_finished_after_another_boot_too(sim_run, cut_short):
    """What is on record then is final; one that lacks requests cannot go on, and stays as it is."""
    (stretch,) = cut_short.manifest["stretches"]
    then = {"state": "finishing", "verdicts": [], "stretches": [{**stretch, "boot_id": "another"}]}
    write_manifest(cut_short.path, {**cut_short.manifest, **then})
    resumed_options(RunOptions(Path(), resume=cut_short.path))
    with pytest.raises(ReplayError, match="it was booted since the run was cut short"):
        take_up(cut_short.path)
    assert rows(cut_short, "requests").height == 12
    whole = Run.open(sim_run).scan("requests").collect()
    first = pl.col("request_id") == pl.col("request_id").min()
    found = whole.with_columns(status=pl.when(first).then(pl.lit("connect_error")).otherwise("status"))
    write_parquet(found.to_arrow(compat_level=pl.CompatLevel.oldest()), cut_short.path / "requests.parquet")
    taken = take_up(cut_short.path)
    assert (taken.remaining.requests, taken.recorded, taken.unanswered) == (0, 24, 0)
    assert rows(cut_short, "requests").height == 24


@pytest.fixture
def not_begun(make_trace, replay, plain_server, tmp_path):
    """A run directory as a SIGKILL leaves it before the first request is due."""
    trace = make_trace(tmp_path / "trace.parquet", [(i * 50, 10, 2) for i in range(6)])
    run = Run.open(replay(trace, engine=plain_server, output=tmp_path / "run", num_prompts=4))
    for name in ("requests", "server_metrics"):
        (run.path / f"{name}.parquet").unlink(missing_ok=True)
    (run.path / ".shards").mkdir()
    (run.path / "requests.log").mkdir()
    told = {"measure_start_ns", "measure_end_ns", "stretches", "requests", "valid", "invalid_because"}
    kept = {key: value for key, value in run.manifest.items() if key not in told}
    write_manifest(run.path, {**kept, "state": "starting", "verdicts": []})
    return Run.open(run.path)


def test_a_run_that_was_killed_before_a_request_was_due_begins_anew(not_begun, replay):
    found = check(not_begun.path)
    (why,) = [finding["why"] for finding in found["wholeness"] if finding["name"] == "state"]
    assert why.endswith(f"no request was due yet: 'replay run --resume {not_begun.path}' begins it anew")
    assert replay(Path(), resume=not_begun.path) == not_begun.path
    run = Run.open(not_begun.path)
    assert run.manifest["run_id"] != not_begun.manifest["run_id"]
    assert run.manifest["state"] == "complete"
    assert run.scan("requests").collect()["status"].to_list() == ["ok"] * 4, "with the options that it was asked with"
    assert check(run.path)["whole"]


def test_nothing_is_removed_where_a_run_cannot_begin_anew(not_begun):
    before = sorted(not_begun.path.rglob("*"))
    with hold(not_begun.path), pytest.raises(ReplayError, match="another replay is still writing there"):
        resumed_options(RunOptions(Path(), resume=not_begun.path))
    Path(not_begun.manifest["arguments"]["trace"]).unlink()
    with pytest.raises(ReplayError, match=r"no request was due yet, and .* is not there to begin it anew"):
        resumed_options(RunOptions(Path(), resume=not_begun.path))
    assert sorted(not_begun.path.rglob("*")) == before


def refusal_of_arguments(run):
    write_manifest(run.path, {**run.manifest, "arguments": {"trace": 5}})
    with pytest.raises(RunError) as error:
        resumed_options(RunOptions(Path(), resume=run.path))
    return str(error.value)


def test_stretches_say_when_the_run_was_paused():
    manifest = {}
    begin_stretch(manifest, 10 * S)
    assert (manifest["state"], manifest["measure_start_ns"], manifest["stretches"][0]["end_ns"]) == (
        "running",
        10 * S,
        None,
    )
    assert "paused_s" not in manifest
    manifest |= end_stretch(manifest, 15 * S)
    begin_stretch(manifest, 22 * S)
    manifest |= end_stretch(manifest, 21 * S)
    assert (manifest["measure_start_ns"], manifest["measure_end_ns"], manifest["paused_s"]) == (10 * S, 22 * S + 1, 7.0)
    assert [(s["start_ns"], s["end_ns"]) for s in manifest["stretches"]] == [(10 * S, 15 * S), (22 * S, 22 * S + 1)]


def test_one_replay_at_a_time_has_a_run_directory(tmp_path):
    assert not held(tmp_path)
    with hold(tmp_path):
        assert held(tmp_path)
        with pytest.raises(ReplayError, match="another replay is still writing there"), hold(tmp_path):
            pytest.fail("two have it")
        assert held(tmp_path)
    assert not held(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_simulated_nodes_counters_go_on_where_they_were(tmp_path, seed):
    """The gain of a sensor of 5 % is in what was read before; it must not be there twice."""
    profile = load_profile("dgx-h100", "llama-2-70b")
    profile = replace(profile, sensor=replace(profile.sensor, gain_error_rel=0.05))
    then_ns, now_ns = 1000 * S, 1060 * S
    SimBoard.create(tmp_path / "board", profile, seed=seed, counters={2: (then_ns, 5_000_000)}).close()
    gpus = SimGpus(tmp_path / "board", now_ns=lambda: now_ns)
    gained_j = gpus.read(2).energy_mj / 1e3 - 5000
    gpus.close()
    assert gained_j == pytest.approx(profile.power.idle_unloaded_w * 60, rel=0.06)
    assert gained_j > 0


def test_a_killed_run_goes_on_to_its_end(command, make_trace, tmp_path, until, processes):
    trace = make_trace(tmp_path / "trace.parquet", [*[(i * 100, 50, 3) for i in range(8)], *[(1000, 200, 400)] * 4])
    run_dir = tmp_path / "run"
    options = ("--engine", "sim", "--tp", "8", "--freq", "1200", "--idle", "200ms")
    process = command("run", trace, *options, "-o", run_dir)
    until(lambda: has_table(run_dir, "requests") and Run.open(run_dir).scan("requests").collect().height >= 4)
    process.kill()
    process.communicate(timeout=60)
    until(lambda: not processes(run_dir))
    with hold(run_dir):
        taken = command("run", "--resume", run_dir)
        assert "another replay is still writing there" in taken.communicate(timeout=60)[1]
    killed = check(run_dir)
    assert (killed["whole"], killed["valid"]) == (False, None)
    again = command("run", "--resume", run_dir, "--json")
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "going on: " in err
    run, found = Run.open(run_dir), check(run_dir)
    assert [finding["why"] for finding in found["wholeness"] if finding["ok"] is False] == []
    requests = run.scan("requests").collect()
    assert requests["status"].unique().to_list() == ["ok"]
    assert requests["request_id"].sort().to_list() == list(range(100, 112))
    first, second = run.manifest["stretches"]
    assert run.manifest["measure_start_ns"] == first["start_ns"] < first["end_ns"] < second["start_ns"]
    assert run.manifest["measure_end_ns"] == second["end_ns"]
    assert run.manifest["paused_s"] == pytest.approx((second["start_ns"] - first["end_ns"]) / S)
    assert run.manifest["requests"] == {"planned": 12, "sent": 12, "ended": 12}
    later = requests.filter(pl.col("scheduled_ns") >= second["start_ns"]).sort("request_id")
    asked = run.scan("trace").collect().filter(pl.col("request_id").is_in(later["request_id"].implode()))
    moved = later["scheduled_ns"] - asked["arrival_ns"]
    assert moved.n_unique() == 1, "arrivals keep their distances"
    assert later["scheduled_ns"].min() == second["start_ns"]
    summary = json.loads(out)
    assert summary["requests_ok"] == 12
    power = run.scan("power").filter(pl.col("gpu") == 0).sort("t_ns").collect()
    assert (power["energy_mj"].cast(pl.Int64).diff().drop_nulls() >= 0).all(), "the node was there all the time"
    verdicts = {verdict["name"]: verdict["ok"] for verdict in run.manifest["verdicts"]}
    assert verdicts["steps_complete"]
    assert verdicts["counter_agrees"]
