"""A run in virtual time leaves the run directory of a run in wall time, whole or not at all."""

import json
import os
import signal
import time
from functools import partial

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from analysis.energy import attribute
from replay.judge import judge
from replay.live import QuietProgress
from replay.plan import RunOptions
from replay.rundir import Run
from replay.sim.hardware import Hardware, Work, load_profile
from replay.source import TraceSource
from replay.tables import TABLES
from replay.virtual import run as module
from replay.virtual.node import NodePower
from tracegen.errors import GpuError, ReplayError, TraceError
from tracegen.schema import TRACE, file_metadata, read_trace
from tracegen.synthesize import synthesize

S = 1_000_000_000
KEYS = {
    "requests": ["request_id"],
    "steps": ["instance", "step"],
    "segments": ["instance", "first_step", "request_id"],
    "power": ["t_ns", "gpu"],
    "trace": ["request_id"],
    "truth": ["request_id"],
}


class Heard(QuietProgress):
    """Keeps what is said."""

    def __init__(self):
        self.said, self.statuses = [], []

    def say(self, message):
        self.said.append(message)

    def status(self, message):
        self.statuses.append(message)


def chat(rate=1.0, seconds=60, seed=1):
    return synthesize("chat", rate, seconds * S, seed)[0]


def tables(run):
    return {name: run.scan(name).collect().sort(keys) for name, keys in KEYS.items() if run.has(name)}


@pytest.fixture(scope="module")
def small(virtual_run, tmp_path_factory):
    """A minute of chat at TP 2 and 1200 MHz, with truth."""
    return virtual_run(tmp_path_factory.mktemp("small") / "run", chat(), freq_mhz=1200, truth=None, seed=5)


def test_the_directory_is_that_of_a_run_in_wall_time(small, sim_run):
    of_wall = Run.open(sim_run)
    assert small.manifest["state"] == "complete"
    assert small.simulated
    assert small.manifest["clock"] == "virtual"
    assert not {path.name for path in small.path.iterdir() if path.name.startswith(".")}
    for name in ("requests", "steps", "segments", "power", "truth"):
        virtual, wall = small.scan(name).collect(), of_wall.scan(name).collect()
        assert virtual.schema == wall.schema, name
        assert virtual.height > 0
        nulls = [column for column in wall.columns if wall[column].null_count() == 0 < virtual[column].null_count()]
        assert nulls == ([] if name != "requests" else ["http_status"]), name
    missing = of_wall.manifest.keys() - small.manifest.keys()
    assert missing <= {"schema_version"}
    assert small.manifest["instances"][0].keys() >= of_wall.manifest["instances"][0].keys() - {"command"}
    assert [gpu.keys() for gpu in small.manifest["gpus"]] == [gpu.keys() for gpu in of_wall.manifest["gpus"]]
    assert [v["name"] for v in small.manifest["verdicts"]] == [v["name"] for v in of_wall.manifest["verdicts"]]


def test_verdicts_are_those_of_the_written_tables(small):
    found = {v["name"]: v for v in small.manifest["verdicts"]}
    for expected in judge(small.path, small.manifest, [0]):
        verdict = found[expected.name]
        if expected.name in {"dispatch_lag", "loop_stall"}:
            assert verdict["ok"] is None
            assert "virtual time" in verdict["why"]
            continue
        assert verdict["ok"] == expected.ok, expected.name
        if expected.value is None:
            assert verdict["value"] is None
        else:
            assert verdict["value"] == pytest.approx(expected.value, rel=1e-6, abs=2e-4)
        if expected.name != "counter_agrees":  # begins a reading later
            assert verdict["why"] == expected.why
    assert found["steps_complete"]["ok"]
    assert found["counter_agrees"]["ok"]
    assert found["clocks_held"]["ok"]


def test_requests_are_the_traces_and_every_token_has_its_time(small):
    requests, trace = small.scan("requests").collect(), small.scan("trace").collect()
    start_ns = small.manifest["measure_start_ns"]
    assert requests["request_id"].to_list() == trace["request_id"].to_list()
    assert (requests["sent_ns"] - start_ns).to_list() == trace["arrival_ns"].to_list()
    assert requests["output_tokens"].to_list() == trace["output_tokens"].to_list()
    ends_ns = set(small.scan("steps").collect()["end_ns"].to_list())
    for row in requests.iter_rows(named=True):
        times_ns = row["chunk_ns"]
        assert len(times_ns) == row["output_tokens"] == sum(row["chunk_tokens"])
        assert (times_ns[0], times_ns[-1]) == (row["first_token_ns"], row["last_token_ns"])
        assert times_ns == sorted(set(times_ns))
        assert ends_ns.issuperset(times_ns)
    assert small.manifest["measure_end_ns"] == requests["done_ns"].max()


def test_tokens_are_timed_through_preemptions(virtual_run, tmp_path):
    crowd = pl.DataFrame({"arrival_ns": [0] * 40, "input_tokens": [900] * 40, "output_tokens": [700] * 40})
    crowd = crowd.with_row_index("request_id")
    run = virtual_run(tmp_path / "run", crowd)
    assert run.manifest["preemptions"] > 0
    for row in run.scan("requests").collect().iter_rows(named=True):
        times_ns = row["chunk_ns"]
        assert len(times_ns) == row["output_tokens"]
        assert (times_ns[0], times_ns[-1]) == (row["first_token_ns"], row["last_token_ns"])
        assert times_ns == sorted(set(times_ns))


def test_the_counters_count_what_steps_and_pauses_draw(small):
    hardware = Hardware(load_profile(), 2)
    steps = small.scan("steps").collect()
    parts = ("prefill_tokens", "decode_tokens", "context_tokens", "prefill_attention")
    work = Work(*(steps[name].cast(pl.Float64).to_numpy() for name in parts))
    start_ns, end_ns = small.manifest["measure_start_ns"], small.manifest["measure_end_ns"]
    busy_s = float((steps["end_ns"] - steps["start_ns"]).sum()) / S
    drawn_j = hardware.step_j(work, 1200.0).sum() + 2 * hardware.idle_w(1200) * ((end_ns - start_ns) / S - busy_s)
    measured = attribute(small).summary
    assert measured["measured_j"] == pytest.approx(drawn_j, rel=1e-3)
    truth_j = small.scan("truth").collect()["energy_j"].sum()
    assert truth_j == pytest.approx(hardware.step_j(work, 1200.0).sum(), rel=1e-6)


def test_all_gpus_of_the_node_are_sampled_and_idle_ones_draw_what_they_do_unloaded(small):
    hardware = Hardware(load_profile(), 2)
    for entry in small.manifest["gpus"]:
        idle_w = hardware.idle_w(1200, loaded=entry["gpu"] < 2)
        for key in ("idle_power_w", "idle_power_after_w"):
            assert entry[key]["counter"] == pytest.approx(idle_w, rel=1e-3)
            assert entry[key]["instant"] == pytest.approx(idle_w, rel=0.02)
    power = small.scan("power").collect()
    spare = power.filter(pl.col("gpu") >= 2)
    assert spare["utilization"].max() == 0
    assert spare["sm_clock_mhz"].unique().to_list() == [1980]
    serving = power.filter(pl.col("gpu") < 2)
    assert serving["utilization"].max() == 100
    assert serving["sm_clock_mhz"].unique().to_list() == [1200]
    for readings in power.partition_by("gpu"):
        assert readings["t_ns"].diff().drop_nulls().unique().to_list() == [100_000_000]
        assert readings["t_ns"].min() <= small.manifest["measure_start_ns"] - 2 * S
        assert readings["t_ns"].max() >= small.manifest["measure_end_ns"] + 2 * S


@pytest.mark.parametrize("router", ["session", "round-robin", "least-loaded"])
def test_how_it_is_cut_into_pieces_changes_no_row(virtual_run, tmp_path, monkeypatch, router):
    trace = chat(3.0, 40)
    options = {"tp": 2, "replicas": 3, "router": router, "truth": True}
    blocks = partial(NodePower, block_updates=16)
    with monkeypatch.context() as patch:
        patch.setattr(module, "NodePower", blocks)
        whole = tables(virtual_run(tmp_path / "whole", trace, **options))
    monkeypatch.setattr(module, "TraceSource", partial(TraceSource, batch_rows=7))
    monkeypatch.setattr(module, "NodePower", blocks)
    monkeypatch.setattr(module, "VirtualEngines", partial(module.VirtualEngines, buffer_steps=300))
    cut = tables(virtual_run(tmp_path / "cut", trace, **options))
    for name in KEYS:
        assert_frame_equal(cut[name], whole[name])
    instances = whole["requests"]["instance"]
    assert set(instances.to_list()) == {0, 1, 2}
    if router == "round-robin":
        assert instances.to_list() == [i % 3 for i in range(trace.height)]


def test_the_same_seed_writes_the_same_bytes(virtual_run, tmp_path):
    trace = chat(1.0, 20)
    runs = [virtual_run(tmp_path / str(i), trace, seed=seed) for i, seed in enumerate((3, 3, 4))]
    for name in ("trace", "requests", "steps", "segments", "power"):
        written = [(run.path / f"{name}.parquet").read_bytes() for run in runs]
        assert written[0] == written[1]
        assert (written[0] == written[2]) == (name != "power")


def test_large_runs_leave_out_truth_and_token_times(virtual_run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TRUTH_REQUESTS", 10)
    monkeypatch.setattr(module, "CHUNK_TOKENS", 100)
    run = virtual_run(tmp_path / "run", chat(1.0, 20), truth=None)
    assert not run.has("truth")
    assert "chunk_ns" not in run.scan("requests").collect_schema()
    assert set(run.scan("requests").collect_schema()) == set(TABLES["requests"])
    assert virtual_run(tmp_path / "asked", chat(1.0, 20), truth=True).has("truth")


def test_a_shared_prefix_is_computed_once(virtual_run, make_trace, tmp_path):
    hashes = pl.Series([[1, 2, 3], [1, 2, 4], [9, 2, 3], None], dtype=pl.List(pl.UInt64))
    rows = [(i * 3000, 1600, 5) for i in range(4)]
    trace = make_trace(tmp_path / "t.parquet", rows, {"block_tokens": 512}, prefix_hashes=hashes)
    run = virtual_run(tmp_path / "run", trace)
    assert run.scan("requests").collect()["cached_tokens"].to_list() == [0, 1024, 0, 0]
    assert {v["name"]: v["ok"] for v in run.manifest["verdicts"]}["steps_complete"]


def test_a_full_disk_is_one_clear_line(virtual_run, tmp_path, monkeypatch):
    class Full(module.Judge):
        def requests(self, columns, rows):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "Judge", Full)
    with pytest.raises(ReplayError, match=r"cannot be written \(No space left on device\); free some space first$"):
        virtual_run(tmp_path / "run", chat(1.0, 20))
    assert not (tmp_path / "run").exists()


def test_only_a_whole_run_can_be_seen(virtual_run, tmp_path, monkeypatch):
    seen = []

    class Spy(module.Judge):
        def requests(self, columns, rows):
            seen.extend(path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith("."))
            assert json.loads((tmp_path / "run" / "manifest.json").read_text())["state"] == "running"
            super().requests(columns, rows)

    monkeypatch.setattr(module, "Judge", Spy)
    virtual_run(tmp_path / "run", chat(1.0, 20))
    assert set(seen) == {"manifest.json"}


@pytest.mark.parametrize("folder_was_there", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, None])
def test_a_run_that_ends_early_leaves_nothing(virtual_run, tmp_path, monkeypatch, number, folder_was_there):
    error = KeyboardInterrupt if number else ValueError

    class Broken(module.Judge):
        def requests(self, columns, rows):
            if number is None:
                raise ValueError
            os.kill(os.getpid(), number)
            time.sleep(5)

    monkeypatch.setattr(module, "Judge", Broken)
    if folder_was_there:
        (tmp_path / "run").mkdir()
    with pytest.raises(error):
        virtual_run(tmp_path / "run", chat(1.0, 20))
    assert (tmp_path / "run").exists() == folder_was_there
    assert not folder_was_there or not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "vllm"}, ReplayError, "--virtual with --engine vllm: only the simulated engine"),
        ({"engine": "http://localhost:1"}, ReplayError, "only the simulated engine runs in virtual time"),
        ({"max_concurrency": 3}, ReplayError, "--max-concurrency with --virtual: requests arrive at their times"),
        ({"max_rate_rps": 3.0}, ReplayError, "--max-rate with --virtual: requests arrive at their times"),
        ({"port": 8000}, ReplayError, "--port with --virtual: no server is launched"),
        ({"vllm_python": "python3"}, ReplayError, "--vllm-python with --virtual: no server is launched"),
        ({"ready_timeout_s": 30.0}, ReplayError, "--ready-check-timeout-sec with --virtual: no server is launched"),
        ({"num_warmups": 2}, ReplayError, "--num-warmups with --virtual: the simulated engine needs no warm-up"),
        ({"request_timeout_s": 9.0}, ReplayError, "--request-timeout-sec with --virtual: every request is served"),
        ({"exact": False}, ReplayError, "--no-ignore-eos with --virtual: "),
        ({"record_steps": False}, ReplayError, "--no-record-steps with --virtual: the steps are what is simulated"),
        ({"with_cpu": True}, ReplayError, "--with-cpu with --virtual: no CPU is simulated"),
        ({"allow_busy": True}, ReplayError, "--allow-busy with --virtual: nobody else uses simulated GPUs"),
        ({"idle_ns": 0}, ReplayError, "--idle 0s with --virtual: idle power costs no time there"),
        ({"router": "random"}, ReplayError, "--router random: use one of session, round-robin, least-loaded"),
        ({"freq_mhz": 5000}, GpuError, "--freq 5000"),
        ({"replicas": 5}, GpuError, "GPU 8 does not exist"),
        ({"tp": 3}, ReplayError, "tensor parallel"),
        ({"duration_ns": 1}, ReplayError, "no request arrives within --duration"),
    ],
)
def test_what_cannot_be_run_is_one_clear_line(make_trace, tmp_path, options, error, message):
    trace = make_trace(tmp_path / "t.parquet", [(1, 10, 5), (2, 10, 5)])
    asked = {"tp": 2, **options}
    with pytest.raises(error, match=message) as caught:
        module.run_virtual(RunOptions(trace, virtual=True, output=tmp_path / "run", **asked), QuietProgress())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_requests_beyond_the_models_context_are_refused_dropped_or_clipped(virtual_run, make_trace, tmp_path):
    trace = make_trace(tmp_path / "t.parquet", [(1, 10, 5), (2, 20000, 5), (3, 30, 20000), (4, 40, 5)])
    with pytest.raises(
        ReplayError, match=r"2 of 4 requests are longer .* \(request_id 101: 20000 \+ 5\); use --overlong"
    ):
        virtual_run(tmp_path / "refused", trace)
    dropped = virtual_run(tmp_path / "dropped", trace, overlong="drop")
    assert dropped.scan("requests").collect()["request_id"].to_list() == [100, 103]
    assert dropped.manifest["overlong"] == {"rule": "drop", "requests": 2}
    clipped = virtual_run(tmp_path / "clipped", trace, overlong="clip")
    limit = clipped.manifest["instances"][0]["max_model_len"]
    table = clipped.scan("requests").collect()
    assert table.select("input_tokens", "output_tokens").rows() == [(10, 5), (limit - 5, 5), (1, limit - 1), (40, 5)]
    assert clipped.scan("trace").collect()["input_tokens"].to_list() == table["input_tokens"].to_list()


def test_a_trace_in_batches_is_the_trace(tmp_path, make_trace):
    rows = [(i * 7, 10 + i, 5) for i in range(50)]
    path = make_trace(tmp_path / "t.parquet", rows, label=pl.Series([f"l{i % 3}" for i in range(50)]))
    whole = read_trace(path)
    source = TraceSource(path, num_prompts=33, duration_ns=200 * 1_000_000, batch_rows=8)
    assert_frame_equal(pl.concat(source.batches()), whole.filter(pl.col("arrival_ns") < 200 * 1_000_000).head(33))
    survey = source.survey()
    assert (survey.requests, survey.first_ns, survey.last_ns) == (29, 0, 196 * 1_000_000)
    assert survey.output_tokens == 29 * 5


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"request_id": [*range(19), 3]}, "row 19, column 'request_id': 3 occurs twice"),
        ({"arrival_ns": [*range(19), 0]}, "row 19, column 'arrival_ns': 0 is earlier"),
        ({"output_tokens": [5] * 19 + [0]}, "row 19, column 'output_tokens': 0 is zero"),
    ],
)
def test_a_broken_trace_is_refused_with_its_row_wherever_batches_end(tmp_path, columns, message):
    good = {"request_id": range(20), "arrival_ns": range(20), "input_tokens": [9] * 20, "output_tokens": [5] * 20}
    path = tmp_path / "t.parquet"
    pl.DataFrame({**good, **columns}).write_parquet(path)
    with pytest.raises(TraceError, match=message):
        TraceSource(path, batch_rows=8).survey()


@pytest.mark.parametrize("block_tokens", [0, -16, 16.0, None])
def test_prefix_hashes_without_a_size_of_their_blocks_are_refused(tmp_path, block_tokens):
    hashes = pl.Series([[1], [2]], dtype=pl.List(pl.UInt64))
    frame = pl.DataFrame({**{name: [1, 2] for name in TRACE}, "prefix_hashes": hashes})
    path = tmp_path / "t.parquet"
    pq.write_table(frame.to_arrow().replace_schema_metadata(file_metadata({"block_tokens": block_tokens})), path)
    with pytest.raises(TraceError, match=f"has prefix_hashes, but block_tokens in its file metadata is {block_tokens}"):
        TraceSource(path).survey()


def test_first_tokens_come_in_order_of_priority_in_virtual_and_in_wall_time(make_trace, virtual_run, replay, tmp_path):
    priorities = pl.Series([0, 3, -1, None, 2, -5], dtype=pl.Int32)
    rows = [(0, 20, 40), *[(60 + i, 20, 2) for i in range(5)]]  # all but the first wait for it
    trace = make_trace(tmp_path / "t.parquet", rows, priority=priorities)
    asked = {"vllm_args": ("--scheduling-policy=priority", "--max-num-seqs=1"), "idle_ns": S // 5}
    virtual = virtual_run(tmp_path / "virtual", trace, **asked)
    wall = Run.open(replay(trace, engine="sim", tp=2, truth=False, output=tmp_path / "wall", **asked))
    for run in (virtual, wall):
        served = run.scan("requests").collect().sort("first_token_ns")
        assert served["status"].unique().to_list() == ["ok"]
        assert served["request_id"].to_list() == [100, 105, 102, 103, 104, 101]
    with pytest.raises(ReplayError, match="add --vllm-arg=--scheduling-policy=priority, or drop the column"):
        virtual_run(tmp_path / "refused", trace)
    assert not (tmp_path / "refused").exists()


def test_a_lock_above_what_is_held_under_load_is_said_before_and_after(make_trace, tmp_path):
    trace = make_trace(tmp_path / "t.parquet", [(100 * i, 200, 20) for i in range(30)])
    held = f"under load this GPU holds {load_profile().time.sustained_mhz:.0f} MHz at most"
    for freq_mhz, expected in ((1980, True), (1200, False)):
        heard = Heard()
        options = RunOptions(trace, virtual=True, tp=2, freq_mhz=freq_mhz, output=tmp_path / str(freq_mhz))
        run = Run.open(module.run_virtual(options, heard))
        assert (f"--freq {freq_mhz}: {held}" in heard.said) == expected
        assert any(status.startswith("loading the simulated engine") for status in heard.statuses)
        (why,) = [v["why"] for v in run.manifest["verdicts"] if v["name"] == "clocks_held"]
        assert (held in why) == expected
        assert why in {verdict.why for verdict in judge(run.path, run.manifest, [0])}


def test_the_command_says_simulated_and_prints_the_summary(command, make_trace, tmp_path):
    trace = make_trace(tmp_path / "t.parquet", [(1000 * i, 100, 20) for i in range(30)])
    process = command("run", trace, "--virtual", "--tp", "2", "--freq", "1400", "-o", tmp_path / "run", "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "SIMULATED in virtual time" in err
    summary = json.loads(out)
    assert summary["requests_ok"] == 30
    assert summary["simulated"]
    assert summary["energy_j"] > 0
    assert np.isfinite(summary["ttft_ms"]["p99"])
