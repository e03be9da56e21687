"""From the recorder inside an engine to steps and segments: nothing lost, nothing of others taken for ours."""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.rundir import scan_table
from replay.steplog import StepFollower, StepLogDecoder, StepLogReader, summary
from replay.steps import StepWriter
from replay.vllm_ext import wattrace_steps
from replay.vllm_ext.wattrace_steps import StepLog, record, unsupported
from tracegen.errors import ReplayError


class Engine:
    """A scheduler by script, with the fields of vLLM's that the recorder looks at."""

    def __init__(self):
        self.waiting = []
        self.kv_cache_manager = SimpleNamespace(usage=0.25)
        self.requests = {}
        self.computed = {}
        self.truth = []
        self.ended = set()

    def add(self, engine_id, prompt):
        self.add_request(SimpleNamespace(request_id=engine_id, num_tokens=prompt))

    def add_request(self, request):
        self.requests[request.request_id] = request

    def schedule(self, tokens, resumed=()):
        """A step with `tokens` by engine id; ids not seen before are new."""
        for i in resumed:
            self.computed[i] = 0
        new = [i for i in tokens if i not in self.computed]
        contexts = {i: self.computed.get(i, 0) for i in tokens}
        going = [i for i in tokens if i not in new]
        output = SimpleNamespace(
            num_scheduled_tokens=dict(tokens), total_num_scheduled_tokens=sum(tokens.values()),
            scheduled_new_reqs=[SimpleNamespace(req_id=i, num_computed_tokens=0) for i in new],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=going, num_computed_tokens=[contexts[i] for i in going], resumed_req_ids=set(resumed)
            ),
            finished_req_ids=self.ended, scheduled_spec_decode_tokens={},
        )  # fmt: skip
        self.ended = set()
        for i, count in tokens.items():
            self.computed[i] = contexts[i] + count
        if tokens:
            self.truth.append({i: (count, contexts[i]) for i, count in tokens.items()})
        return output

    def update_from_output(self, scheduler_output, model_runner_output):
        for i in scheduler_output.num_scheduled_tokens:
            self.requests[i].num_tokens = max(self.requests[i].num_tokens, self.computed[i] + 1)

    def step(self, tokens, resumed=()):
        self.update_from_output(self.schedule(tokens, resumed), None)

    def end(self, i):
        self.ended.add(i)
        del self.computed[i]


@pytest.fixture
def engine(tmp_path):
    """An engine that is recorded into tmp_path / "log"."""
    engine = Engine()
    record(engine, StepLog(tmp_path / "log", {"vllm": "0.32.0"}), None)
    return engine


RUN = "0a1b2c3d"


def decode(log, run_dir, since_ns=0):
    """The log in tables: (steps, segments, decoder)."""
    writer = StepWriter(run_dir, 0)
    decoder = StepLogDecoder(writer, since_ns, RUN)
    for frame in StepLogReader(log).frames():
        decoder.feed(frame)
    writer.write(writer.take())
    return scan_table(run_dir, "steps").collect(), scan_table(run_dir, "segments").collect(), decoder


def parts(segments, steps):
    """What each step did: by request id, (tokens, context)."""
    seen = [{} for _ in range(steps.height)]
    for row in segments.iter_rows(named=True):
        for step in range(row["first_step"], row["last_step"] + 1):
            context = row["context_start"] + row["tokens_per_step"] * (step - row["first_step"])
            seen[step][row["request_id"]] = (row["tokens_per_step"], context)
    return seen


def name(i):
    return f"cmpl-{RUN}-{i}-0-{i:08x}"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sequence_of_steps_comes_out_as_it_went_in(tmp_path_factory, data):
    """Requests that start, wait a step, are preempted and start again, and end; files of any length."""
    folder = tmp_path_factory.mktemp("any")
    engine, log = Engine(), StepLog(folder / "log", {})
    monkey = pytest.MonkeyPatch()
    monkey.setattr(wattrace_steps, "FILE_BYTES", data.draw(st.sampled_from([200, 2000, 2**20])))
    monkey.setattr(wattrace_steps, "FILES", 10**6)
    try:
        record(engine, log, None)
        alive = {}
        for serial in range(data.draw(st.integers(1, 40))):
            if data.draw(st.booleans()) or not alive:
                alive[name(serial)] = engine.add(name(serial), data.draw(st.integers(1, 30)))
            chosen = data.draw(st.lists(st.sampled_from(sorted(alive)), unique=True, max_size=4))
            known = [i for i in chosen if i in engine.computed]
            resumed = data.draw(st.lists(st.sampled_from(known), unique=True, max_size=1)) if known else []
            tokens = {i: data.draw(st.integers(1, 9)) for i in chosen}
            for _ in range(data.draw(st.integers(1, 4))):
                engine.step(tokens, resumed)
                resumed = []
            ending = (
                data.draw(st.lists(st.sampled_from(sorted(engine.computed)), max_size=1)) if engine.computed else []
            )
            for i in ending:
                engine.end(i)
                del alive[i]
    finally:
        monkey.undo()
    if not engine.truth:
        return
    steps, segments, decoder = decode(folder / "log", folder)
    expected = [{int(i.split("-")[2]): part for i, part in step.items()} for step in engine.truth]
    assert parts(segments, steps) == expected
    assert (decoder.missing, decoder.failed) == (0, None)
    assert steps["requests"].to_list() == [len(step) for step in expected]
    arrivals = dict(scan_table(folder, "arrivals").select("request_id", "arrival_ns").collect().iter_rows())
    starts = (
        segments.group_by("request_id")
        .agg(pl.col("first_step").min())
        .join(steps.select("step", "start_ns"), left_on="first_step", right_on="step")
    )
    assert all(arrivals[i] <= start_ns for i, start_ns in starts.select("request_id", "start_ns").iter_rows())
    assert list(arrivals.values()) == sorted(arrivals.values()), "in their order"


def test_generated_tokens_computed_anew_are_prefill(engine, tmp_path):
    engine.add(name(7), 10)
    for tokens in (6, 4, 1, 1):
        engine.step({name(7): tokens})
    engine.step({name(7): 8}, resumed=[name(7)])  # 10 of the prompt, 3 generated: 13 to compute
    for tokens in (5, 1):
        engine.step({name(7): tokens})
    _, segments, _ = decode(tmp_path / "log", tmp_path)
    assert segments.select("kind", "first_step", "last_step", "tokens_per_step", "context_start").rows() == [
        ("prefill", 0, 0, 6, 0), ("prefill", 1, 1, 4, 6), ("decode", 2, 3, 1, 10),
        ("prefill", 4, 4, 8, 0), ("prefill", 5, 5, 5, 8), ("decode", 6, 6, 1, 13),
    ]  # fmt: skip


def test_undisturbed_decoding_is_one_row_and_few_bytes(engine, tmp_path):
    engine.add(name(1), 4)
    engine.step({name(1): 4})
    engine.step({name(1): 1})
    size = sum(path.stat().st_size for path in (tmp_path / "log").iterdir())
    for _ in range(500):
        engine.step({name(1): 1})
    grown = sum(path.stat().st_size for path in (tmp_path / "log").iterdir()) - size
    assert grown < 500 * 60
    _, segments, _ = decode(tmp_path / "log", tmp_path)
    assert segments.height == 2


def test_only_our_numbers_are_ours(engine, tmp_path):
    """Warm-ups, other clients' and other runs' ids, a number too large for the column, an id sent twice."""
    ids = {
        "cmpl-warmup-0-0-0a0b0c0d": None, f"chatcmpl-{RUN}-5-0-0a0b0c0d": None, "cmpl-5-0-11223344": None,
        "cmpl-ffffffff-5-0-11223344": None, f"cmpl-{RUN}-{2**64}-0-11223344": None,
        f"cmpl-{RUN}-{2**64 - 1}-0-11223344": 2**64 - 1, f"cmpl-{RUN}-5-0": 5, f"cmpl-{RUN}-5-0-99999999": None,
    }  # fmt: skip
    for step, i in enumerate(ids):
        engine.add(i, step + 1)
        engine.step({i: step + 1})
    _, segments, _ = decode(tmp_path / "log", tmp_path)
    assert segments.sort("first_step")["request_id"].to_list() == list(ids.values())
    assert scan_table(tmp_path, "arrivals").collect()["request_id"].to_list() == list(ids.values())


def test_what_was_before_is_left_out_and_its_requests_are_not_ours(engine, tmp_path):
    engine.add(name(1), 3)
    engine.step({name(1): 3})
    since_ns = wattrace_steps._now_ns()
    engine.step({name(1): 1})
    engine.add(name(2), 3)
    engine.step({name(1): 1, name(2): 3})
    steps, segments, _ = decode(tmp_path / "log", tmp_path, since_ns)
    assert steps["step"].to_list() == [0, 1]
    assert parts(segments, steps) == [{None: (1, 3)}, {None: (1, 4), 2: (3, 0)}]
    assert scan_table(tmp_path, "arrivals").collect()["request_id"].to_list() == [2]


def test_a_torn_end_waits_and_a_new_file_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(wattrace_steps, "FILE_BYTES", 900)
    engine = Engine()
    record(engine, StepLog(tmp_path / "log", {}), None)
    reader = StepLogReader(tmp_path / "log")
    assert len(list(reader.frames())) == 1
    engine.add(name(1), 100)
    for _ in range(10):
        engine.step({name(1): 10})
    (path,) = (tmp_path / "log").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    got = len(list(reader.frames()))
    assert got == 10, "the arrival and nine steps"
    path.write_bytes(whole)
    for tokens in (1, 2, 1, 2, 1, 2, 1, 2, 1, 2):
        engine.step({name(1): tokens})
    assert len(list((tmp_path / "log").iterdir())) > 1
    rest = [frame for frame in reader.frames() if isinstance(frame, list)]
    assert [frame[0] for frame in rest] == list(range(9, 20))


def test_old_files_go_and_a_reader_that_missed_them_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(wattrace_steps, "FILE_BYTES", 100)
    monkeypatch.setattr(wattrace_steps, "FILES", 2)
    engine = Engine()
    record(engine, StepLog(tmp_path / "log", {}), None)
    late = StepLogReader(tmp_path / "log")
    list(late.frames())
    engine.add(name(1), 100)
    for tokens in range(1, 30):
        engine.step({name(1): tokens})
    assert len(list((tmp_path / "log").iterdir())) <= 3
    with pytest.raises(ReplayError, match="removed before it was read"):
        list(late.frames())
    steps, _, decoder = decode(tmp_path / "log", tmp_path)
    assert decoder.missing == 0, "who comes later begins with what is there"
    assert 0 < steps.height < 29


def test_steps_that_are_missing_leave_a_gap(tmp_path):
    decoder = StepLogDecoder(StepWriter(tmp_path, 0), 0, RUN)
    step = [0, 10, 20, 0, 0.5, 1000, [[0], [4], [0]], [[0, name(3), 4]], []]
    decoder.feed(step)
    decoder.feed([3, 30, 40, 0, 0.5, 1000, [[0], [1], [4]], [], []])
    writer = decoder._writer
    writer.write(writer.take())
    assert scan_table(tmp_path, "steps").collect()["step"].to_list() == [0, 3]
    assert summary(decoder)["missing"] == 2


def test_an_error_in_recording_never_reaches_the_engine(engine, tmp_path):
    engine.add(name(1), 3)
    engine.step({name(1): 3})
    engine.kv_cache_manager = None  # as if a new vLLM had changed
    for _ in range(3):
        engine.step({name(1): 1})
    assert len(engine.truth) == 4
    steps, _, decoder = decode(tmp_path / "log", tmp_path)
    assert steps.height == 1
    assert decoder.failed.startswith("AttributeError: ")


@pytest.mark.parametrize("version", ["0.13.2", "0.34.0", "1.0", "dev"])
def test_a_version_that_is_not_known_is_served_unrecorded_and_says_why(tmp_path, version):
    engine = Engine()
    record(engine, StepLog(tmp_path / "log", {}), unsupported(version))
    engine.add(name(1), 3)
    engine.step({name(1): 3})
    frames = list(StepLogReader(tmp_path / "log").frames())
    assert len(frames) == 2
    assert version in frames[1]["failed"]


def write_frames(folder, *frames):
    folder.mkdir()
    data = b"".join(len(f).to_bytes(4, "little") + f for f in map(msgspec.msgpack.encode, frames))
    (folder / "00000000000000000001-7-000000.steps").write_bytes(data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"wattrace_steps": 3}, "the step log has format 3, this program reads 1 to 2; restart vLLM"),
        (
            {"wattrace_steps": 1, "boot_id": "another"},
            "the step log was written on another host, or before this one started",
        ),
    ],
)
def test_a_log_that_cannot_be_read_rightly_is_refused(tmp_path, header, message):
    write_frames(tmp_path / "log", header)
    with pytest.raises(ReplayError, match=message):
        decode(tmp_path / "log", tmp_path)
    with pytest.raises(ReplayError, match=r"none: no step log; start vLLM with what 'replay vllm-args"):
        StepLogReader(tmp_path / "none")


def test_a_log_of_format_1_has_no_arrivals(tmp_path):
    header = {"wattrace_steps": 1, "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip()}
    write_frames(tmp_path / "log", header, [0, 10, 20, 0, 0.5, 1000, [[0], [4], [0]], [[0, name(3), 4]], []])
    steps, segments, _ = decode(tmp_path / "log", tmp_path)
    assert (steps.height, segments["request_id"].to_list()) == (1, [3])
    assert not (tmp_path / "arrivals.parquet").exists()


def follow(log, run_dir):
    argv = [sys.executable, "-m", "replay.steplog", str(log), str(run_dir), "4", "0", RUN, "0"]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_follower_writes_as_it_goes_and_to_the_end_when_its_parent_is_gone(engine, tmp_path, until):
    with follow(tmp_path / "log", tmp_path) as process:
        assert json.loads(process.stdout.readline())["steps"] == 0
        engine.add(name(1), 3)
        engine.step({name(1): 3})
        until(lambda: list(tmp_path.glob("steps.parquet/*-*.parquet")))
        engine.step({name(1): 1})
        process.stdin.close()
        said = json.loads(process.stdout.readline())
        assert process.wait(20) == 0
    steps = scan_table(tmp_path, "steps").collect()
    assert (steps.height, steps["instance"].unique().to_list()) == (2, [4])
    assert (said["steps"], said["engine"]["vllm"], said["engine"]["pid"]) == (2, "0.32.0", os.getpid())
    assert said["overhead_us_mean"] > 0
    assert scan_table(tmp_path, "segments").filter(pl.col("kind") == "decode").collect().height == 1


def test_the_follower_says_why_there_is_nothing_to_follow(tmp_path):
    with follow(tmp_path / "none", tmp_path) as process:
        said = json.loads(process.stdout.readline())
        process.stdin.close()
        assert process.wait(20) == 0
    assert "no step log" in said["error"]
    write_frames(tmp_path / "log", {"failed": "vLLM 9.9 is newer"})
    with follow(tmp_path / "log", tmp_path) as process:
        assert json.loads(process.stdout.readline()) == {"error": "vLLM 9.9 is newer"}
        process.stdin.close()
        process.wait(20)


def test_what_is_no_log_is_refused(tmp_path):
    for content, message in ((bytes(200), "is no step log"), (b"", "its newest .* file is no step log")):
        folder = tmp_path / str(len(content))
        folder.mkdir()
        (folder / "a-1-000000.steps").write_bytes(content)
        with follow(folder, tmp_path) as process:
            said = json.loads(process.stdout.readline())
            process.stdin.close()
            process.wait(20)
        assert re.search(message, said["error"]), said


def test_a_follower_that_is_killed_is_made_up_for(engine, tmp_path, until):
    engine.add(name(1), 3)
    engine.step({name(1): 3})

    async def main():
        async with StepFollower(tmp_path / "log", tmp_path, 4, 0, RUN, 7) as follower:
            while not list(tmp_path.glob("steps.parquet/*-*.parquet")):
                await asyncio.sleep(0.05)
            follower._child.process.kill()
            await asyncio.sleep(0.2)
            engine.step({name(1): 1})
        return follower

    follower = asyncio.run(main())
    assert (follower.error, follower.summary["steps"]) == (None, 2)
    assert scan_table(tmp_path, "steps").collect()["step"].to_list() == [7, 8], "as it was told to number them"
    assert scan_table(tmp_path, "segments").collect().height == 2
