"""What cannot be run is said before anything is started; what was left open is filled in."""

import math
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay import plan as plan_module
from replay.engines.vllm import DEFAULT_MODEL
from replay.plan import RunOptions, make_plan
from replay.router import LEAST_LOADED, Router
from replay.source import TraceSource, clipped
from tracegen.errors import GpuError, ReplayError, TraceError, WattraceError

URL = "http://127.0.0.1:9"


@pytest.fixture
def trace(make_trace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_trace(tmp_path / "my trace.parquet", [(0, 10, 5), (1000, 20, 5), (2000, 30, 5)])


def sent(plan):
    return pl.concat(plan.source.batches())


class Driver:
    def close(self):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tgi"}, "--engine tgi: use auto, sim, vllm, or a server's URL"),
        ({"tp": 0}, "--tp 0: must be above 0"),
        ({"tp": -2}, "--tp -2: must be above 0"),
        ({"gpus": (0, 0), "tp": 2}, "--gpus 0,0: names a GPU twice"),
        ({"gpus": (0, 1, 2), "tp": 2}, "--tp 2 needs 2 GPUs, but --gpus names 3"),
        ({"gpus": ()}, "--tp 2 needs 2 GPUs, but --gpus names 0"),
        ({"engine": URL, "freq_mhz": 1200}, "--freq with a URL needs --gpus"),
        ({"overlong": "cut"}, "--overlong cut: use one of refuse, drop, clip"),
        ({"max_concurrency": 0}, "--max-concurrency 0: must be above 0"),
        ({"max_rate_rps": 0.0}, "--max-rate 0: must be above 0"),
        ({"max_rate_rps": math.nan}, "--max-rate nan: must be above 0"),
        ({"max_rate_rps": math.inf}, "--max-rate inf: must be above 0"),
        ({"request_timeout_s": -1.0}, "--request-timeout-sec -1: must be above 0"),
        ({"ready_timeout_s": 0.0}, "--ready-check-timeout-sec 0: must be above 0"),
        ({"num_prompts": 0}, "--num-prompts 0: must be above 0"),
        ({"seed": -1}, "--seed -1: must not be negative"),
        ({"duration_ns": 0}, "no request arrives within --duration"),
        ({"hardware": "abacus"}, "--hardware abacus: use dgx-a100, dgx-h100, dgx-h200, or a TOML file"),
        ({"engine": URL, "hardware": "dgx-h100"}, "--hardware dgx-h100: only the simulated engine chooses"),
        ({"engine": "http:///v1"}, "--engine http:///v1: names no host, such as http://localhost:8000"),
        ({"engine": "sim", "endpoint": "chat"}, "--endpoint chat: the simulated engine answers completions only"),
        ({"model": "gpt"}, "--model gpt: the simulated engine knows llama-2-13b, "),
        ({"replicas": 0}, "--replicas 0: must be above 0"),
        ({"replicas": 2, "tp": 2, "gpus": (0, 1)}, "--tp 2 and --replicas 2 need 4 GPUs, but --gpus names 2"),
        ({"engine": URL, "replicas": 2}, "--replicas with a URL"),
        ({"engine": URL, "vllm_args": ("--seed=1",)}, "--vllm-arg is for a server that replay launches"),
        ({"engine": URL, "port": 8000}, "--port is for a server that replay launches"),
        ({"power_cap_w": 900.0}, "--power-cap 900: a simulated NVIDIA H100 80GB HBM3 takes "),
        ({"engine": URL, "power_cap_w": 300.0}, "--power-cap with a URL needs --gpus"),
        ({"power_cap_w": 0.0}, "--power-cap 0: must be above 0"),
        ({"power": "meter"}, "--power meter: use one of nvml, csv:FILE, prometheus:URL"),
        ({"power": "csv:a.csv"}, "--power csv:a.csv: a simulated engine draws simulated power only"),
        ({"engine": URL, "power": "csv:a.csv"}, "--power csv:a.csv needs --gpus"),
        ({"engine": URL, "gpus": (0,), "power": "csv:a.csv", "freq_mhz": 900}, "--freq needs --power nvml"),
        ({"steps": Path("steps")}, "--steps is where an attached server logs its steps"),
        ({"vllm_args": ("--gpu-memory-utilization=0.1",)}, "holds no KV cache at this utilization"),
        ({"num_warmups": -1}, "--num-warmups -1: must not be negative"),
    ],
)
def test_a_wrong_option_is_one_clear_line(trace, options, message):
    with pytest.raises(WattraceError) as caught:
        make_plan(RunOptions(trace, **{"engine": "sim", **options}))
    assert isinstance(caught.value, ReplayError)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_trace_is_a_trace_error(tmp_path):
    with pytest.raises(TraceError, match="no such file"):
        make_plan(RunOptions(tmp_path / "none.parquet", engine="sim"))


def test_the_block_size_of_prefix_hashes_comes_from_the_trace(make_trace, tmp_path, trace):
    hashes = pl.Series([[1, 2], [1]], dtype=pl.List(pl.UInt64))
    shared = make_trace(tmp_path / "b.parquet", [(0, 40, 5), (1, 40, 5)], {"block_tokens": 16}, prefix_hashes=hashes)
    assert make_plan(RunOptions(shared, engine="sim")).block_tokens == 16
    assert make_plan(RunOptions(trace, engine="sim")).block_tokens == 0


@pytest.mark.parametrize("priorities", [[0, 5], [-1, None]])
def test_priorities_need_a_server_that_schedules_by_them(make_trace, tmp_path, monkeypatch, priorities):
    monkeypatch.setattr(plan_module, "open_gpus", lambda spec: Driver())
    monkeypatch.setattr(plan_module, "vllm_installed", lambda: True)
    monkeypatch.setattr(plan_module, "inspect_vllm", lambda python: {"vllm": "0.32.0"})
    column = pl.Series(priorities, dtype=pl.Int32)
    trace = make_trace(tmp_path / "p.parquet", [(0, 10, 5), (1, 10, 5)], priority=column)
    for engine in ("sim", "vllm"):
        for arguments in ((), ("--scheduling-policy=fcfs",)):
            with pytest.raises(ReplayError, match="add --vllm-arg=--scheduling-policy=priority, or drop the column"):
                make_plan(RunOptions(trace, engine=engine, vllm_args=arguments))
        for arguments in (("--scheduling-policy=priority",), ("--scheduling-policy", "priority")):
            assert make_plan(RunOptions(trace, engine=engine, vllm_args=arguments)).engine == engine
    assert make_plan(RunOptions(trace, engine="vllm", vllm_args=("--config", "my.yaml"))).engine == "vllm"
    assert make_plan(RunOptions(trace, engine=URL)).engine == "url"


@pytest.mark.parametrize("priorities", [[0, 0], [None, 0]])
def test_the_default_priority_needs_nothing(make_trace, tmp_path, priorities):
    column = pl.Series(priorities, dtype=pl.Int32)
    trace = make_trace(tmp_path / "p.parquet", [(0, 10, 5), (1, 10, 5)], priority=column)
    assert sent(make_plan(RunOptions(trace, engine="sim")))["priority"].to_list() == priorities


@pytest.mark.parametrize("content", ["file", "folder"])
def test_a_run_is_never_written_over(trace, tmp_path, content):
    output = tmp_path / "run"
    if content == "file":
        output.write_text("precious")
    else:
        output.mkdir()
        (output / "precious").write_text("")
    with pytest.raises(ReplayError, match=r"run: exists already; a run is never overwritten, give another -o"):
        make_plan(RunOptions(trace, engine="sim", output=output))


def test_an_empty_folder_may_be_filled(trace, tmp_path):
    (tmp_path / "run").mkdir()
    assert make_plan(RunOptions(trace, engine="sim", output=tmp_path / "run")).run_dir == tmp_path / "run"


def test_the_run_directory_tells_what_was_run_and_is_new(trace):
    options = RunOptions(trace, engine="sim", tp=4, freq_mhz=1200)
    first = make_plan(options).run_dir
    assert str(first).startswith("runs/my-trace-sim-tp4-1200MHz-20")
    first.mkdir(parents=True)
    second = make_plan(options).run_dir
    assert not second.exists()
    assert "-unlocked-" in make_plan(RunOptions(trace, engine="sim")).run_dir.name


@pytest.mark.parametrize(
    ("options", "tp", "gpus"),
    [
        ({"engine": "sim"}, 2, (0, 1)),
        ({"engine": "sim", "tp": 8}, 8, tuple(range(8))),
        ({"engine": "sim", "gpus": (4, 5, 6, 7)}, 4, (4, 5, 6, 7)),
        ({"engine": URL}, 1, ()),
        ({"engine": URL, "tp": 4}, 4, ()),
        ({"engine": URL, "gpus": (2, 3)}, 2, (2, 3)),
        ({"engine": "sim", "replicas": 3}, 2, tuple(range(6))),
        ({"engine": "sim", "replicas": 2, "gpus": (7, 6, 1, 0)}, 2, (7, 6, 1, 0)),
    ],
)
def test_tp_and_gpus_fill_each_other_in(trace, options, tp, gpus):
    plan = make_plan(RunOptions(trace, **options))
    assert (plan.tp, plan.gpus) == (tp, gpus)


def test_auto_without_a_driver_simulates_and_vllm_without_one_is_an_error(trace, monkeypatch):
    def no_driver(spec):
        raise GpuError("no NVIDIA GPU can be reached (none); to run without one use --engine sim")

    monkeypatch.setattr(plan_module, "open_gpus", no_driver)
    plan = make_plan(RunOptions(trace))
    assert (plan.engine, plan.why_engine) == ("sim", "no NVIDIA GPU can be reached (none)")
    with pytest.raises(GpuError, match="--engine sim"):
        make_plan(RunOptions(trace, engine="vllm"))


def test_auto_with_a_gpu_takes_vllm_or_names_the_ways_out(trace, monkeypatch):
    monkeypatch.setattr(plan_module, "open_gpus", lambda spec: Driver())
    monkeypatch.setattr(plan_module, "vllm_installed", lambda: False)
    with pytest.raises(ReplayError, match=r"wattrace\[vllm\].*--vllm-python.*--engine sim"):
        make_plan(RunOptions(trace))
    monkeypatch.setattr(plan_module, "inspect_vllm", lambda python: {"vllm": "0.32.0", "python": python})
    elsewhere = make_plan(RunOptions(trace, vllm_python="/opt/python"))
    assert (elsewhere.engine, elsewhere.vllm_versions["python"]) == ("vllm", "/opt/python")
    monkeypatch.setattr(plan_module, "vllm_installed", lambda: True)
    plan = make_plan(RunOptions(trace))
    assert (plan.engine, plan.model, plan.tp, plan.gpus) == ("vllm", DEFAULT_MODEL, 1, (0,))
    assert (plan.no_steps, plan.warmups) == (None, 8)


def test_a_vllm_that_is_too_new_runs_without_steps_and_one_too_old_not_at_all(trace, monkeypatch):
    monkeypatch.setattr(plan_module, "open_gpus", lambda spec: Driver())
    monkeypatch.setattr(plan_module, "vllm_installed", lambda: True)
    versions = {}
    monkeypatch.setattr(plan_module, "inspect_vllm", lambda python: versions)
    versions["vllm"] = "0.99.0"
    assert "newer than what the step recorder knows" in make_plan(RunOptions(trace, engine="vllm")).no_steps
    assert "--no-record-steps" in make_plan(RunOptions(trace, engine="vllm", record_steps=False)).no_steps
    versions["vllm"] = "0.8.0"
    with pytest.raises(ReplayError, match="older than what the step recorder knows"):
        make_plan(RunOptions(trace, engine="vllm"))


def test_duration_and_num_prompts_cut_the_trace(trace):
    def ids(**options):
        return sent(make_plan(RunOptions(trace, engine="sim", **options)))["request_id"].to_list()

    assert ids() == [100, 101, 102]
    assert ids(duration_ns=2_000_000_000) == [100, 101]
    assert ids(num_prompts=1) == [100]


def test_replicas_take_gpus_in_turn(trace):
    plan = make_plan(RunOptions(trace, engine="sim", replicas=2, gpus=(7, 6, 1, 0)))
    assert plan.groups == ((7, 6), (1, 0))
    assert "-tp2x2-" in plan.run_dir.name


def test_requests_go_to_instances_in_turn_and_sessions_stay():
    frame = pl.DataFrame({"request_id": range(7)})
    assert Router("session", 3).assign(frame).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert Router("session", 1).assign(frame).tolist() == [0] * 7
    sessions = frame.with_columns(session_id=pl.Series([5, None, 5, 6, None, 6, 5], dtype=pl.UInt64))
    assert Router("session", 3).assign(sessions).tolist() == [0, 1, 0, 0, 1, 0, 0]
    assert Router("round-robin", 3).assign(sessions).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert set(Router("least-loaded", 3).assign(sessions).tolist()) == {LEAST_LOADED}


@given(
    st.lists(st.one_of(st.none(), st.integers(0, 5)), min_size=1, max_size=30),
    st.lists(st.integers(1, 10), min_size=30, max_size=30),
    st.integers(1, 4),
)
def test_batches_change_no_route(sessions, sizes, instances):
    frame = pl.DataFrame({"session_id": pl.Series(sessions, dtype=pl.UInt64)})
    router, routes, at = Router("session", instances), [], 0
    for size in sizes:
        routes += router.assign(frame[at : at + size]).tolist()
        at += size
    assert routes == Router("session", instances).assign(frame).tolist()


def lengths(pairs):
    ids = pl.Series("request_id", range(len(pairs)), dtype=pl.UInt64)
    columns = [
        pl.Series(name, [p[i] for p in pairs], dtype=pl.UInt32)
        for i, name in enumerate(("input_tokens", "output_tokens"))
    ]
    return pl.DataFrame([ids, *columns])


PAIRS = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=20)


@given(PAIRS, st.integers(2, 400))
def test_after_clip_every_request_fits_and_is_one(pairs, limit):
    fitting = clipped(lengths(pairs), limit)
    for (i, o), row in zip(pairs, fitting.iter_rows(named=True), strict=True):
        inputs, outputs = row["input_tokens"], row["output_tokens"]
        assert 1 <= inputs <= i
        assert 1 <= outputs <= o
        assert inputs + outputs == min(limit, i + o), "clipped no further than it must be"
    assert fitting.schema == lengths(pairs).schema


@pytest.fixture
def three(make_trace, tmp_path):
    return make_trace(tmp_path / "three.parquet", [(0, 90, 10), (1, 90, 20), (2, 200, 1)])


@pytest.mark.parametrize(("limit", "left"), [(100, [100]), (110, [100, 101]), (201, [100, 101, 102])])
def test_drop_leaves_exactly_those_that_fit(three, limit, left):
    source = TraceSource(three, max_model_len=limit, overlong="drop")
    assert pl.concat(source.batches())["request_id"].to_list() == left
    assert (source.survey().requests, source.survey().changed) == (len(left), 3 - len(left))


@pytest.mark.parametrize(
    ("limit", "overlong", "message"),
    [
        (99, "drop", "every request is longer than the model's 99 tokens; nothing is left to send"),
        (
            100,
            "refuse",
            "2 of 3 requests are longer than the model's 100 tokens (request_id 101: 90 + 20); use --overl",
        ),
    ],
)
def test_requests_that_are_too_long_are_one_clear_line(three, limit, overlong, message):
    with pytest.raises(ReplayError) as caught:
        TraceSource(three, max_model_len=limit, overlong=overlong).survey()
    assert str(caught.value).startswith(message)


def test_time_may_be_stretched_and_the_rate_may_rise(make_trace, tmp_path):
    trace = make_trace(tmp_path / "trace.parquet", [(i * 100, 10, 1) for i in range(100)])
    stretched = sent(make_plan(RunOptions(trace, engine="sim", time_scale=2.5)))["arrival_ns"]
    assert stretched.to_list() == [i * 250_000_000 for i in range(100)]
    risen = sent(make_plan(RunOptions(trace, engine="sim", ramp_ns=4 * 10**9)))["arrival_ns"]
    assert risen.is_sorted()
    assert risen[0] == 0
    counts = [risen.is_between(s * 10**9, (s + 1) * 10**9, closed="left").sum() for s in range(6)]
    assert counts[:4] == pytest.approx([1.25, 3.75, 6.25, 8.75], abs=1.0), "at w of R the rate is w/R of 10 a second"
    assert counts[4:] == [10, 10]
    with pytest.raises(ReplayError, match="--time-scale 0: must be above 0"):
        make_plan(RunOptions(trace, engine="sim", time_scale=0.0))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ramp_ns": 4 * 10**9}, "--ramp 4s: the last request is due after 2.683s, before the rate is the trace's own"),
        ({"warmup_ns": 10**9}, "--warmup 1s: the last request is due after 900ms, so nothing would be measured"),
        ({"think_time": True}, "trace.parquet: no request waits for another .* --think-time would change nothing"),
        ({"virtual": True, "warmup_ns": 10**8}, "--warmup with --virtual: nothing warms up there"),
    ],
)
def test_what_would_change_nothing_or_leave_nothing_is_refused(make_trace, tmp_path, options, why):
    turns = {"parent_id": pl.Series([None] * 10, dtype=pl.UInt64), "think_ns": pl.Series([None] * 10, dtype=pl.Int64)}
    trace = make_trace(tmp_path / "trace.parquet", [(i * 100, 10, 1) for i in range(10)], **turns)
    with pytest.raises(ReplayError, match=why):
        make_plan(RunOptions(trace, engine="sim", **options))
    assert make_plan(RunOptions(trace, engine="sim", ramp_ns=10**9, warmup_ns=9 * 10**8)).survey.requests == 10
