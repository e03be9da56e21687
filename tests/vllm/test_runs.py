"""The whole job against real vLLM, on the CPU, with a tiny model and the fake GPU driver."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter

import polars as pl
import pytest

from analysis.energy import attribute
from analysis.split import METHODS
from replay.engines.process import free_port
from replay.rundir import Run
from tracegen.schema import TRACE, write_trace

READY_S = 240
# As a GPU's host would be asked; what vLLM's CPU workers need besides is in the environment.
SERVE = [
    "--served-model-name=tiny", "--load-format=dummy", "--dtype=bfloat16", "--max-model-len=4096", "--enforce-eager",
]  # fmt: skip
CHUNK = 256  # tokens a step: longer prompts are prefilled in several


def command(name, *arguments, env, **options):
    """Start `python -m NAME.cli ARGUMENTS`."""
    argv = [sys.executable, "-m", f"{name}.cli", *map(str, arguments)]
    return subprocess.Popen(argv, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def replay_run(*arguments, env, timeout_s=400):
    """`replay run ARGUMENTS` to its end; its output."""
    with command("replay", "run", *arguments, env=env) as process:
        out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, err[-2000:]
    return out + err


def make_trace(path, rows, **columns):
    """A trace of (arrival ms, input tokens, output tokens)."""
    data = {
        "request_id": range(100, 100 + len(rows)),
        "arrival_ns": [row[0] * 1_000_000 for row in rows],
        "input_tokens": [row[1] for row in rows],
        "output_tokens": [row[2] for row in rows],
    }
    frame = pl.DataFrame(data, schema=TRACE).with_columns(**columns)
    write_trace(frame, path, {"generator": "test", **({"block_tokens": 128} if columns else {})})
    return path


def token_sums(run):
    """Per request what it asked for, and the tokens of its segments by kind."""
    tokens = (pl.col("last_step") - pl.col("first_step") + 1) * pl.col("tokens_per_step")
    segments = run.scan("segments").with_columns(tokens=tokens).collect()
    sums = Counter()
    for request_id, kind, count in segments.select("request_id", "kind", "tokens").iter_rows():
        sums[request_id, kind] += count
    requests = run.scan("requests").collect()
    return [
        (row["input_tokens"] - (row["cached_tokens"] or 0), sums[row["request_id"], "prefill"],
         row["output_tokens"] - 1, sums[row["request_id"], "decode"])
        for row in requests.iter_rows(named=True)
    ]  # fmt: skip


def assert_steps_add_up(run):
    """Every step's totals are those of its segments."""
    segments, steps = run.scan("segments").collect(), run.scan("steps").collect()
    unrolled = segments.with_columns(pl.int_ranges("first_step", pl.col("last_step") + 1).alias("step")).explode("step")
    kinds = {
        kind: pl.col("tokens_per_step").filter(pl.col("kind") == kind).sum().cast(pl.Int64).alias(f"{kind}_tokens")
        for kind in ("prefill", "decode")
    }
    grouped = unrolled.group_by("step").agg(*kinds.values(), requests=pl.len().cast(pl.Int64)).sort("step")
    columns = ["prefill_tokens", "decode_tokens", "requests"]
    assert grouped.select(columns).rows() == steps.select(pl.col(columns).cast(pl.Int64)).rows()
    assert (steps["start_ns"][1:] >= steps["end_ns"][:-1]).all()


def verdicts(run):
    return {verdict["name"]: verdict["ok"] for verdict in run.manifest["verdicts"]}


def metric(url, name):
    """The sum of a metric's samples as the server tells it."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        found = re.findall(rf"^vllm:{name}(?:{{.*}})? (\S+)$", answer.read().decode(), re.MULTILINE)
    return sum(map(float, found))


class Server:
    """A vLLM that somebody else runs, started with what `replay vllm-args` prints."""

    def __init__(self, folder, model, python, env, *arguments):
        self.steps, self.log = folder / "steps", folder / "log"
        self.url = f"http://127.0.0.1:{free_port()}"
        shown = command("replay", "vllm-args", model, "--steps", self.steps, env=env).communicate()[0]
        words = shlex.split(shown)
        at = words.index("vllm")
        extra = dict(word.split("=", 1) for word in words[1:at])
        argv = [python, "-m", "vllm.entrypoints.cli.main", *words[at + 1 :], *SERVE, *arguments]
        argv += ["--port", self.url.rpartition(":")[2]]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(argv, env=env | extra, stdout=log, stderr=log, start_new_session=True)

    def ready(self):
        end_s = time.monotonic() + READY_S
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end_s, "never ready"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return self
            time.sleep(0.3)

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_model, vllm_python, offline):
    """An attached server with chunked prefill and few blocks: 40 of 128 tokens."""
    arguments = [f"--max-num-batched-tokens={CHUNK}", "--num-gpu-blocks-override=40", "--max-num-seqs=32"]
    server = Server(tmp_path_factory.mktemp("server"), tiny_model, vllm_python, offline, *arguments)
    try:
        yield server.ready()
    finally:
        server.stop()


@pytest.fixture
def attach(server, offline, tmp_path):
    """`replay run` a trace on the attached server, with its steps."""

    def attach(trace):
        output = tmp_path / "run"
        replay_run(trace, "--engine", server.url, "--steps", server.steps, "-o", output, env=offline)
        return Run.open(output)

    return attach


def test_200_requests_have_every_token_in_a_step(attach, server, tmp_path):
    """Chunked prefill and undisturbed decoding, against the server's own count of its iterations and tokens."""
    before = {n: metric(server.url, n) for n in ("iteration_tokens_total_sum", "num_preemptions_total")}
    rows = [(45 * i, 20 + 97 * (i % 9), 2 + 3 * (i % 7)) for i in range(200)]
    run = attach(make_trace(tmp_path / "trace.parquet", rows))
    assert run.manifest["engine"] == "attached"
    assert run.manifest["instances"][0]["recorder"]["engine"]["vllm"].startswith("0.")
    assert run.scan("requests").collect()["status"].unique().to_list() == ["ok"]
    assert verdicts(run)["steps_complete"] is True
    assert metric(server.url, "num_preemptions_total") == before["num_preemptions_total"]
    for prompt, prefill, outputs, decode in token_sums(run):
        assert (prefill, decode) == (prompt, outputs)
    assert_steps_add_up(run)
    steps, segments = run.scan("steps").collect(), run.scan("segments").collect()
    assert steps["prefill_tokens"].max() <= CHUNK
    assert segments.filter(pl.col("kind") == "prefill").height > 200, "long prompts in several chunks"
    assert segments["request_id"].null_count() == 0
    # vLLM counts a prompt once it is whole, and each generated token.
    counted = metric(server.url, "iteration_tokens_total_sum") - before["iteration_tokens_total_sum"]
    requests = run.scan("requests").collect()
    assert counted == requests["input_tokens"].sum() + requests["output_tokens"].sum()
    times = requests.join(segments.group_by("request_id").agg(pl.col("first_step").min()), on="request_id")
    began = times.join(steps.select("step", "start_ns"), left_on="first_step", right_on="step")
    assert (began["sent_ns"] <= began["start_ns"]).all(), "one clock"
    assert (began["start_ns"] <= began["first_token_ns"]).all()


def test_prefix_cache_hits_are_not_prefilled(attach, server, tmp_path):
    before = metric(server.url, "prefix_cache_hits_total")
    hashes = pl.Series([[1, 2]] * 4 + [[1, 3]] * 4, dtype=pl.List(pl.UInt64))
    run = attach(make_trace(tmp_path / "t.parquet", [(700 * i, 300, 4) for i in range(8)], prefix_hashes=hashes))
    requests = run.scan("requests").collect().sort("sent_ns")
    assert requests["cached_tokens"].to_list() == [0, 256, 256, 256, 128, 256, 256, 256]
    assert metric(server.url, "prefix_cache_hits_total") - before == requests["cached_tokens"].sum()
    for prompt, prefill, outputs, decode in token_sums(run):
        assert (prefill, decode) == (prompt, outputs)
    first = run.scan("segments").filter(pl.col("kind") == "prefill").collect().group_by("request_id")
    starts = dict(first.agg(pl.col("context_start").min()).iter_rows())
    assert [starts[i] for i in requests["request_id"]] == requests["cached_tokens"].to_list()


def test_preempted_requests_show_what_they_compute_anew(attach, server, tmp_path):
    before = metric(server.url, "num_preemptions_total")
    run = attach(make_trace(tmp_path / "trace.parquet", [(5 * i, 250, 260) for i in range(24)]))
    preemptions = metric(server.url, "num_preemptions_total") - before
    assert preemptions > 0, "24 x 510 tokens do not fit into 40 x 128"
    assert verdicts(run)["steps_complete"] is True
    sums = token_sums(run)
    for prompt, prefill, outputs, decode in sums:
        assert prefill >= prompt
        assert decode <= outputs
        assert prefill + decode >= prompt + outputs
    # Who starts again computes its last token as part of a prefill, so it decodes one token less.
    assert sum(outputs - decode for _, _, outputs, decode in sums) == preemptions
    assert_steps_add_up(run)


def test_two_runs_on_one_server_do_not_see_each_others_steps(attach, server, tmp_path):
    run = attach(make_trace(tmp_path / "trace.parquet", [(30 * i, 50, 4) for i in range(5)]))
    steps = run.scan("steps").collect()
    assert steps["end_ns"].min() > run.manifest["clock_anchors"][0]["monotonic_ns"]
    assert set(run.scan("segments").collect()["request_id"]) == set(range(100, 105))


def test_a_server_that_dies_leaves_a_readable_run(server, offline, tmp_path):
    """The last test of this server: it does not outlive it."""
    trace = make_trace(tmp_path / "trace.parquet", [(100 * i, 50, 20) for i in range(100)])
    arguments = [trace, "--engine", server.url, "--steps", server.steps, "-o", tmp_path / "run"]
    with command("replay", "run", *arguments, env=offline) as process:
        end_s = time.monotonic() + 60
        while not list(tmp_path.glob("run/requests.parquet/*.parquet")):
            assert time.monotonic() < end_s, "never began"
            time.sleep(0.1)
        server.stop()
        out, err = process.communicate(timeout=120)
    assert "Traceback" not in out + err
    run = Run.open(tmp_path / "run")
    statuses = set(run.scan("requests").collect()["status"])
    assert "ok" in statuses
    assert statuses & {"connect_error", "stream_error"}
    assert run.scan("steps").collect().height > 0
    assert verdicts(run)["error_rate"] is False


def launched(tmp_path, trace, model, python, *arguments):
    """The arguments of a `replay run` that launches vLLM."""
    serve = [f"--vllm-arg={argument}" for argument in SERVE]
    engine = ["--engine", "vllm", "--model", model, "--vllm-python", python, *serve]
    return [trace, *engine, "-o", tmp_path / "run", *arguments]


def test_the_whole_job_at_tp_2(driver, processes, offline, tmp_path, tiny_model, vllm_python):
    """Launch, lock, warm up, measure idle power, replay, record steps, restore, attribute."""
    trace = make_trace(tmp_path / "trace.parquet", [(150 * i, 30 + 83 * (i % 8), 3 + 5 * (i % 6)) for i in range(60)])
    arguments = launched(tmp_path, trace, tiny_model, vllm_python, "--tp", 2, "--freq", 1207, "--power-cap", 500)
    secret = "--vllm-arg=--api-key=s3cret"
    # Two workers on two cores: each must be told its own.
    env = offline | driver() | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    said = replay_run(*arguments, secret, "--idle", "2s", env=env)
    assert "locking the nearest, 1200 MHz" in said
    run = Run.open(tmp_path / "run")
    manifest, (instance,) = run.manifest, run.manifest["instances"]
    assert (manifest["engine"], manifest["state"], manifest["warmups"]) == ("vllm", "complete", 8)
    assert (instance["tp"], instance["gpus"], instance["freq_mhz"]) == (2, [0, 1], 1200)
    assert (instance["power_cap_w"], instance["max_model_len"]) == (500.0, 4096)
    assert manifest["versions"]["engine vllm"].startswith("0.")
    assert manifest["versions"]["engine torch"].startswith("2.")
    assert "--tensor-parallel-size" in instance["command"]
    for path in run.path.iterdir():
        assert b"s3cret" not in path.read_bytes(), path.name
    found = verdicts(run)
    for name in ("error_rate", "lengths_exact", "steps_complete", "clocks_held", "idle_measured"):
        assert found[name] is True, name
    changes = (tmp_path / "clocks.log").read_text().splitlines()
    assert sorted(changes[:4]) == ["0 1200", "0 W 500", "1 1200", "1 W 500"]
    assert sorted(changes[4:]) == ["0 0", "0 W 700", "1 0", "1 W 700"]
    assert processes(tiny_model) == [], "nothing of vLLM is left"

    for prompt, prefill, outputs, decode in token_sums(run):
        assert (prefill, decode) == (prompt, outputs)
    assert_steps_add_up(run)
    segments, steps = run.scan("segments").collect(), run.scan("steps").collect()
    warm = segments.filter(pl.col("request_id").is_null())
    assert warm.filter(pl.col("kind") == "prefill").height >= 8
    last = steps.filter(pl.col("step") == warm["last_step"].max())["end_ns"].item()
    assert last < manifest["measure_start_ns"]
    recorder = instance["recorder"]
    assert (recorder["engine"]["tensor_parallel_size"], recorder["failed"]) == (2, None)
    assert recorder["steps"] == steps.height
    assert recorder["overhead_us_mean"] > 0
    assert not (run.path / ".steps").exists()

    for method in METHODS:
        summary = attribute(run, method=method).summary
        total_j = sum(summary[key] for key in ("attributed_j", "idle_j", "other_j"))
        assert total_j == pytest.approx(summary["measured_j"], rel=1e-9)
        assert summary["membership"] == "step records"
    seconds = (manifest["measure_end_ns"] - manifest["measure_start_ns"]) / 1e9
    assert summary["measured_j"] == pytest.approx((103 + 153) * seconds, rel=0.02), "what the fake GPUs draw"


def test_a_killed_engine_ends_the_run_with_what_there_is(driver, processes, offline, tmp_path, tiny_model, vllm_python):
    """SIGKILL of vLLM's engine core: the server ends, the run is readable, clocks and processes are free."""
    trace = make_trace(tmp_path / "trace.parquet", [(100 * i, 50, 20) for i in range(300)])
    arguments = launched(tmp_path, trace, tiny_model, vllm_python, "--freq", 1200, "--idle", "1s", "--num-warmups", 0)
    with command("replay", "run", *arguments, env=offline | driver()) as process:
        end_s = time.monotonic() + READY_S
        while not list(tmp_path.glob("run/requests.parquet/*.parquet")):
            assert process.poll() is None, process.stderr.read()[-2000:]
            assert time.monotonic() < end_s, "never began"
            time.sleep(0.1)
        (log,) = (tmp_path / "run" / ".steps" / "0").glob("*.steps")
        os.kill(int(log.name.split("-")[1]), signal.SIGKILL)  # the recorder runs in the engine core
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "Traceback" not in out + err
    run = Run.open(tmp_path / "run")
    assert run.manifest["state"] == "failed"
    requests = run.scan("requests").collect()
    assert requests.filter(pl.col("status") == "ok").height > 0
    assert requests.height < 300
    assert run.scan("steps").collect().height > 0
    assert (tmp_path / "clocks.log").read_text() == "0 1200\n0 0\n"
    assert processes(tiny_model) == []


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--max-model-len=99999999", r"max_model_len|maximum model length"),
        ("--no-such-argument", r"unrecognized arguments|no-such-argument"),
    ],
)
def test_vllm_that_refuses_is_quoted_in_one_line(driver, offline, tmp_path, tiny_model, vllm_python, argument, words):
    trace = make_trace(tmp_path / "trace.parquet", [(0, 50, 20)])
    arguments = launched(tmp_path, trace, tiny_model, vllm_python, f"--vllm-arg={argument}")
    with command("replay", "run", *arguments, env=offline | driver()) as process:
        _, err = process.communicate(timeout=200)
    assert process.returncode == 2
    error = err.splitlines()[-1]
    assert error.startswith("error: vLLM ended while starting; its last words: ")
    assert re.search(words, error), error
    assert not (tmp_path / "run").exists()
