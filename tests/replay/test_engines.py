"""Engines: a server that somebody else runs, vLLM launched, and what is said when either does not answer."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from aiohttp import web

from replay.engines.attach import AttachedEngine
from replay.engines.process import check_port, free_port
from replay.engines.vllm import VllmEngine, VllmLaunch, check_arguments, check_version, inspect_vllm, take_secrets
from replay.rundir import Run
from tracegen.errors import ReplayError


def quiet(message):
    pass


def ask(model=None, *, status=200, body=b"", path="/v1/models", suffix=""):
    """What an engine attached to a server with this answer finds, and that server's URL."""

    async def main():
        async def answer(request):
            return web.Response(status=status, body=body)

        app = web.Application()
        app.add_routes([web.get(path, answer)])
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
            async with AttachedEngine(url + suffix, model, 5.0) as engine:
                assert engine.alive()
                return await engine.ready(), url
        finally:
            await runner.cleanup()

    return asyncio.run(main())


def models(*names, **card):
    return json.dumps({"data": [{"id": name, **card} for name in names]}).encode()


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_only_model_is_taken_with_its_context(suffix):
    served, url = ask(body=models("llama", max_model_len=4096), suffix=suffix)
    assert (served.model, served.max_model_len, served.base_url) == ("llama", 4096, url)


def test_a_named_model_is_taken_among_several_and_its_context_may_be_unknown():
    served, _ = ask("b", body=models("a", "b"))
    assert (served.model, served.max_model_len) == ("b", None)


@pytest.mark.parametrize(
    ("model", "answer", "message"),
    [
        (None, {"body": models("a", "b")}, "serves several models; choose with --model: a, b"),
        ("c", {"body": models("a", "b")}, "has no model 'c'; choose with --model: a, b"),
        (None, {"body": models()}, "it lists none"),
        (None, {"body": b"<html>hello</html>"}, "answers no list of models; is this an OpenAI-compatible server?"),
        (None, {"body": b"[1, 2]"}, "answers no list of models"),
        (None, {"body": b'{"data": [{"name": "a"}]}'}, "answers no list of models"),
        (None, {"body": b"\xff\xfe"}, "answers no list of models"),
        (None, {"status": 401}, "wants an API key (HTTP 401); set OPENAI_API_KEY"),
        (None, {"status": 500}, "/v1/models answers HTTP 500"),
        (None, {"path": "/other"}, "/v1/models answers HTTP 404; is this an OpenAI-compatible server?"),
    ],
)
def test_a_server_that_cannot_be_used_is_one_clear_line(model, answer, message):
    with pytest.raises(ReplayError) as caught:
        ask(model, **answer)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{port}", "http://no.such.host.invalid:8000", "http://", "http://a:b:c"]
)
def test_an_unreachable_server_is_one_clear_line(url):
    url = url.format(port=free_port())

    async def main():
        async with AttachedEngine(url, None, 5.0) as engine:
            await engine.ready()

    with pytest.raises(
        ReplayError, match=r"cannot be reached \(.+\); is the server running, and is this its address\?"
    ):
        asyncio.run(main())


def test_something_that_is_no_http_server_is_one_clear_line():
    async def main():
        async def greet(reader, writer):
            writer.write(b"220 mail ready\r\n")
            await reader.read(100)
            writer.close()

        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with AttachedEngine(url, None, 5.0) as engine:
                await engine.ready()

    with pytest.raises(ReplayError, match="cannot be reached"):
        asyncio.run(main())


def test_a_port_that_is_taken_is_refused_before_anything_is_started():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ReplayError, match=f"--port {port}: Address already in use; choose another"):
            check_port(port)
    with pytest.raises(ReplayError, match="--port 99999: "):
        check_port(99999)
    check_port(free_port())


@pytest.fixture
def vllm(vllm_package, tmp_path, monkeypatch):
    """A launched fake vLLM: what `ready` gave, its last words are in the log."""
    monkeypatch.setenv("PYTHONPATH", str(vllm_package))
    monkeypatch.setenv("FAKE_VLLM_LOG", str(tmp_path / "started.json"))

    def launch(
        mode="", timeout_s=30.0, python=None, uuids=("GPU-a", "GPU-b"), arguments=("--max-model-len=4096",), steps=None
    ):
        monkeypatch.setenv("FAKE_VLLM_MODE", mode)

        async def main():
            start = VllmLaunch("org/model", 2, uuids, free_port(), python, arguments, tmp_path / "log", steps)
            engine = VllmEngine(start, timeout_s, quiet)
            async with engine:
                served = await engine.ready()
                assert engine.alive()
            assert not engine.alive()
            return served

        return asyncio.run(main())

    return launch


def test_vllm_is_launched_on_the_chosen_gpus_with_its_arguments(vllm, tmp_path):
    served = vllm()
    started = json.loads((tmp_path / "started.json").read_text())
    port = served.base_url.rpartition(":")[2]
    assert started["argv"] == [
        "serve", "org/model", "--host", "127.0.0.1", "--port", port, "--tensor-parallel-size", "2",
        "--enable-request-id-headers", "--enable-prompt-tokens-details", "--max-model-len=4096",
    ]  # fmt: skip
    assert started["env"] == {
        "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b", "VLLM_NO_USAGE_STATS": "1", "WATTRACE_STEPS": None,
        "VLLM_API_KEY": None,
    }  # fmt: skip
    assert (served.model, served.max_model_len) == ("org/model", 4096)


def test_a_recorded_vllm_finds_the_recorder_and_still_its_own_packages(vllm, tmp_path, vllm_package):
    vllm(steps=tmp_path / "steps")
    started = json.loads((tmp_path / "started.json").read_text())
    assert started["argv"][started["argv"].index("--scheduler-cls") + 1] == "wattrace_steps.scheduler"
    assert started["env"]["WATTRACE_STEPS"] == str(tmp_path / "steps")
    recorder, *rest = started["path"].split(os.pathsep)
    assert (Path(recorder) / "wattrace_steps.py").is_file()
    assert rest == [str(vllm_package)]


def test_versions_are_those_of_the_environment_that_serves(vllm_package, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(vllm_package))
    found = inspect_vllm(None)
    assert found["vllm"] == "0.32.0"
    assert found["msgspec"] == version("msgspec")
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(ReplayError, match=r"has no vLLM; 'pip install wattrace\[vllm\]' there"):
        inspect_vllm(None)
    for python in ("/no/python", shutil.which("true")):
        with pytest.raises(ReplayError, match="is no Python that can be run"):
            inspect_vllm(python)


def test_versions_that_the_recorder_does_not_know():
    assert check_version("0.32.0", record_steps=True) is None
    assert check_version("0.32.1.dev3+cpu", record_steps=True) is None
    assert "newer than what the step recorder knows (0.14 to 0.33)" in check_version("1.2.0", record_steps=True)
    assert check_version("1.2.0", record_steps=False) is None
    with pytest.raises(ReplayError, match=r"vLLM 0.9.2 is older .*; upgrade vLLM, or .* --no-record-steps"):
        check_version("0.9.2", record_steps=True)
    assert check_version("0.9.2", record_steps=False) is None
    assert "no version number" in check_version("unknown", record_steps=True)


@pytest.mark.parametrize(
    "argument", ["--port=1", "--tensor-parallel-size", "--tensor-para=2", "--data_parallel_size=2", "--scheduler-cls"]
)
def test_arguments_that_replay_gives_itself_are_refused(argument):
    with pytest.raises(ReplayError, match=f"--vllm-arg {argument}: replay sets .* itself; "):
        check_arguments(["--max-model-len=9", argument])
    check_arguments(["--max-model-len=9", "--portable", "--tokenizer", "x y"])
    with pytest.raises(ReplayError, match=r"--vllm-arg '--api-key ...': two words in one") as caught:
        check_arguments(["--api-key s3cret"])
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("secret", [["--api-key=s3=cret"], ["--api-key", "s3=cret"], ["--api-k=s3=cret"]])
def test_keys_go_through_the_environment_and_are_not_written_down(vllm, tmp_path, secret):
    assert take_secrets(["a", *secret, "--port", "1"]) == (["a", "--port", "1"], {"VLLM_API_KEY": "s3=cret"})
    assert take_secrets(["--hf-token"]) == ([], {"HF_TOKEN": ""})
    served = vllm(arguments=("--max-model-len=4096", *secret))
    assert served.api_key == "s3=cret"
    assert "s3=cret" not in repr(served)
    started = json.loads((tmp_path / "started.json").read_text())
    assert started["env"]["VLLM_API_KEY"] == "s3=cret"
    assert "s3=cret" not in str(started["argv"])


def test_vllm_that_dies_while_starting_is_quoted(vllm):
    with pytest.raises(
        ReplayError, match=r"^vLLM ended while starting; its last words: RuntimeError: CUDA out of memory$"
    ):
        vllm("die")


def test_vllm_that_is_never_ready_is_ended(vllm, processes, tmp_path):
    with pytest.raises(ReplayError, match=r"vLLM was not ready within 0.5 s \(--ready-check-timeout-sec\)"):
        vllm("slow", timeout_s=0.5, arguments=(f"--download-dir={tmp_path}",))
    assert processes(tmp_path) == []


def test_a_python_that_is_not_there_is_quoted(vllm):
    with pytest.raises(ReplayError, match=r"vLLM ended while starting; its last words: .*No such file.*/no/python"):
        vllm(python="/no/python")


@pytest.fixture
def as_typed(driver, vllm_package, make_trace, tmp_path):
    """`replay run trace.parquet ...` on a machine with two GPUs, a driver and vLLM."""
    make_trace(tmp_path / "trace.parquet", [(i * 20, 30, 3) for i in range(10)])

    def run(*arguments, mode="", gpu_mode="", gpu_settings=None):
        env = driver(gpu_mode, **(gpu_settings or {})) | {
            "PYTHONPATH": str(vllm_package), "FAKE_VLLM_MODE": mode, "FAKE_VLLM_LOG": str(tmp_path / "started.json")
        }  # fmt: skip
        argv = [sys.executable, "-m", "replay.cli", "run", "trace.parquet", *arguments]
        return subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    return run


def test_a_run_as_typed_takes_gpu_and_vllm_where_they_are(as_typed, tmp_path):
    done = as_typed("--tp", "2", "--freq", "1200", "--idle", "700ms")
    assert done.returncode == 0, done.stderr
    first = done.stderr.splitlines()[0]
    assert first == "engine: vllm (GPU and vLLM found); Qwen/Qwen3-8B; TP 2 on GPUs 0,1; 1200 MHz"
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("trace-vllm-tp2-1200MHz-")
    assert f"wrote runs/{folder.name}" in done.stdout
    manifest = Run.open(folder).manifest
    assert (manifest["engine"], manifest["state"], manifest["instances"][0]["model"]) == (
        "vllm",
        "complete",
        "Qwen/Qwen3-8B",
    )
    assert manifest["requests"] == {"planned": 10, "sent": 10, "ended": 10}
    assert manifest["versions"]["nvidia driver"] == "999.1.fake"
    assert manifest["versions"]["engine vllm"] == "0.32.0"
    started = json.loads((tmp_path / "started.json").read_text())
    assert started["env"]["CUDA_VISIBLE_DEVICES"] == "GPU-fake-0,GPU-fake-1"
    assert sorted((tmp_path / "clocks.log").read_text().splitlines()) == ["0 0", "0 1200", "1 0", "1 1200"]


def test_vllm_that_fails_leaves_its_log_and_the_clocks_free(as_typed, tmp_path):
    done = as_typed("--freq", "1200", "-o", "run", mode="die")
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert error == (
        "error: vLLM ended while starting; its last words: RuntimeError: CUDA out of memory; "
        "the whole log is in run.server.log"
    )
    assert "Loading weights" in (tmp_path / "run.server.log").read_text()
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "clocks.log").read_text() == "0 1200\n0 0\n"


def test_no_permission_is_said_before_vllm_is_launched(as_typed, tmp_path):
    done = as_typed("--freq", "1200", "-o", "run", gpu_mode="denied")
    assert done.returncode == 2
    assert "needs root or CAP_SYS_ADMIN" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "started.json").exists()
    assert not (tmp_path / "run").exists()


def refused(done, tmp_path):
    """The one line of a run that did not begin, and that nothing was started or changed."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert not (tmp_path / "started.json").exists()
    assert not (tmp_path / "clocks.log").exists()
    assert not (tmp_path / "run").exists()
    return errors[0]


def test_a_gpu_that_others_use_is_refused_by_name_and_taken_if_asked(as_typed, tmp_path):
    busy = {"processes": f"0:{os.getpid()}:3000"}
    error = refused(as_typed("--freq", "1200", "-o", "run", gpu_settings=busy), tmp_path)
    assert error.startswith(f"error: GPU 0 is used by process {os.getpid()} (")
    assert "3,000 MiB" in error
    assert "--allow-busy" in error
    unseen = refused(as_typed("-o", "run", gpu_settings={"used_mib": "0:9000"}), tmp_path)
    assert "a process that cannot be seen from here (9,000 MiB)" in unseen
    done = as_typed("--allow-busy", "-o", "run", "--idle", "700ms", gpu_settings=busy)
    assert done.returncode == 0, done.stderr
    assert f"WARNING: GPU 0 is used by process {os.getpid()}" in done.stderr
    assert str(os.getpid()) in Run.open(tmp_path / "run").manifest["gpus_shared_with"][0]


def test_what_cannot_serve_is_refused_before_anything_is_changed(as_typed, plain_server, tmp_path):
    assert "split into instances (MIG)" in refused(as_typed("-o", "run", gpu_mode="mig"), tmp_path)
    attached = ["--engine", plain_server, "--gpus", "0"]
    assert "split into instances (MIG)" in refused(as_typed(*attached, "-o", "run", gpu_mode="mig"), tmp_path)
    large = tmp_path / "large"
    large.mkdir()
    shape = {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 28672, "vocab_size": 128256,
    }  # fmt: skip
    (large / "config.json").write_text(json.dumps(shape))
    error = refused(as_typed("--model", str(large), "-o", "run"), tmp_path)
    assert "model does not fit: needs 131.4 GiB a GPU, GPU 0 has 79.6; use a larger --tp" in error
    for arguments, message in (
        (["--tp", "4"], "GPU 2 does not exist: this host has 2 (--tp 4, --gpus)"),
        (["--replicas", "3"], "GPU 2 does not exist: this host has 2 (--tp 1 --replicas 3, --gpus)"),
        (["--freq", "5000"], "--freq 5000: GPU 0 supports SM clocks from 210 to 1980 MHz"),
        (["--power-cap", "900"], "--power-cap 900: GPU 0 takes 200 to 700 W; choose a cap in this range"),
        (["--vllm-arg=--port=1"], "--vllm-arg --port=1: replay sets --port itself; use --port of replay run"),
        (["--vllm-python", "/no/python"], "--vllm-python /no/python: is no Python that can be run"),
    ):
        assert message in refused(as_typed(*arguments, "-o", "run"), tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "Address already in use" in refused(as_typed("--port", str(port), "-o", "run"), tmp_path)


def test_a_power_cap_is_held_for_the_run(as_typed, tmp_path):
    done = as_typed("--power-cap", "400", "-o", "run", "--idle", "700ms")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "clocks.log").read_text() == "0 W 400\n0 W 700\n"
    assert Run.open(tmp_path / "run").manifest["instances"][0]["power_cap_w"] == 400


def test_replicas_are_launched_on_gpus_and_ports_of_their_own(as_typed, tmp_path):
    done = as_typed("--replicas", "2", "-o", "run", "--idle", "700ms", "--num-warmups", "2")
    assert done.returncode == 0, done.stderr
    run = Run.open(tmp_path / "run")
    assert [i["gpus"] for i in run.manifest["instances"]] == [[0], [1]]
    ports = {i["command"][i["command"].index("--port") + 1] for i in run.manifest["instances"]}
    assert len(ports) == 2
    assert run.scan("requests").collect().sort("request_id")["instance"].to_list() == [0, 1] * 5
    assert run.manifest["warmups"] == 4
    assert "no engine steps" in done.stderr
    assert run.manifest["no_steps"] == "vLLM's step recorder wrote no log, see server.log"


def test_a_server_that_refuses_the_first_request_ends_the_run_before_it_begins(as_typed, tmp_path):
    done = as_typed("-o", "run", "--idle", "700ms", mode="refuse")
    assert done.returncode == 2
    assert "does not answer a first request (http_error 400: out of order)" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
