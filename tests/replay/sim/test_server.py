"""The simulated engine over HTTP: vLLM's API, exact tokens, and a record that agrees with what was received."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import aiohttp
import polars as pl
import pytest

from replay.gpu.sim import SimBoard
from replay.rundir import scan_table
from replay.sim.api import ApiError, parse_completion
from replay.sim.hardware import Hardware, Work, load_profile
from replay.sim.server import Settings, _parse_gpus, serve
from tracegen.errors import ReplayError

PROFILE = load_profile()
MODEL = "llama"
GPUS = (2, 3, 4, 5)


def arguments(folder, *more):
    files = ["--board", str(folder / "board"), "--record", str(folder / "run")]
    gpus = ["--tp", "4", "--gpus", ",".join(map(str, GPUS))]
    name = ["--served-model-name", MODEL]
    return [sys.executable, "-m", "replay.sim.server", *files, *gpus, "--port", "0", *name, *more]


@contextmanager
def started(folder, *more):
    """A server process with its `url`; killed at the end if it still runs."""
    process = subprocess.Popen(arguments(folder, *more), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("SIMULATED engine: llama on 4 x NVIDIA H100")
        yield SimpleNamespace(process=process, url=line.split()[-1], folder=folder)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with started(tmp_path_factory.mktemp("server")) as server:
        yield server


def talk(conversation):
    """Run `conversation(session)`."""

    async def main():
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            return await conversation(session)

    return asyncio.run(main())


async def complete(session, url, request_id=None, **body):
    headers = {} if request_id is None else {"X-Request-Id": str(request_id)}
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
        if not body.get("stream"):
            return answer.status, await answer.json()
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        events = (await answer.text()).strip().split("\n\n")
        assert all(event.startswith("data: ") for event in events)
        assert events.pop() == "data: [DONE]"
        return answer.status, [json.loads(event.removeprefix("data: ")) for event in events]


async def gauges(session, url):
    async with session.get(f"{url}/metrics") as answer:
        samples = re.findall(r"^(\S+)\{(.*)\} (\S+)$", await answer.text(), re.MULTILINE)
        return {name: float(value) for name, labels, value in samples if f'model_name="{MODEL}"' in labels}


async def gauges_when(session, url, wanted):
    """The metrics once `wanted(metrics)` holds."""
    for _ in range(400):
        metrics = await gauges(session, url)
        if wanted(metrics):
            return metrics
        await asyncio.sleep(0.05)
    raise AssertionError(f"never: {metrics}")


def test_streams_carry_exact_counts(server):
    async def conversation(session):
        options = {"include_usage": True, "continuous_usage_stats": True}
        return await asyncio.gather(*(
            complete(session, server.url, 100 + i, prompt=[1] * (10 + i), max_tokens=5 + i, stream=True, model=MODEL,
                     stream_options=options, ignore_eos=True, min_tokens=5 + i, temperature=0.0)
            for i in range(4)
        ))  # fmt: skip

    for i, (status, events) in enumerate(talk(conversation)):
        *tokens, closing = events
        assert status == 200
        assert {event["id"] for event in events} == {f"cmpl-{100 + i}"}
        assert {event["model"] for event in events} == {MODEL}
        assert [event["usage"]["completion_tokens"] for event in tokens] == list(range(1, 6 + i))
        assert {event["usage"]["prompt_tokens"] for event in events} == {10 + i}
        assert [event["choices"][0]["finish_reason"] for event in tokens] == [None] * (4 + i) + ["length"]
        assert len({event["choices"][0]["text"] for event in tokens}) == 5 + i
        assert closing["choices"] == []
        assert closing["usage"] == {
            "prompt_tokens": 10 + i, "completion_tokens": 5 + i, "total_tokens": 15 + 2 * i,
            "prompt_tokens_details": {"cached_tokens": 0},
        }  # fmt: skip


def test_a_beginning_that_was_there_before_is_not_computed_again(server):
    async def conversation(session):
        body = {"prompt": [*range(100, 200)], "max_tokens": 2}
        first = await complete(session, server.url, **body)
        again = await complete(session, server.url, **body)
        other = await complete(session, server.url, prompt=[*range(100, 150), *range(50)], max_tokens=2)
        return [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for _, answer in (first, again, other)]

    assert talk(conversation) == [0, 96, 48], "whole blocks of 16 tokens, and always one token is computed"


def test_usage_comes_only_when_asked_for(server):
    async def conversation(session):
        body = {"prompt": "a b c", "max_tokens": 3, "stream": True}
        _, plain = await complete(session, server.url, 200, **body)
        _, closing = await complete(session, server.url, 201, **body, stream_options={"include_usage": True})
        return plain, closing

    plain, closing = talk(conversation)
    assert ["usage" in event for event in plain] == [False] * 3
    assert ["usage" in event for event in closing] == [False] * 3 + [True]


def test_a_whole_answer_without_an_integer_id(server):
    async def conversation(session):
        return await complete(session, server.url, "abc", prompt="one two  three", max_tokens=4)

    status, answer = talk(conversation)
    assert (status, answer["id"], answer["object"]) == (200, "cmpl-abc", "text_completion")
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 4)
    (choice,) = answer["choices"]
    assert (choice["finish_reason"], len(choice["text"].split())) == ("length", 4)


def test_refusals_have_vllms_form(server):
    async def conversation(session):
        too_long = await complete(session, server.url, prompt=[1] * 16000, max_tokens=385)
        unknown = await complete(session, server.url, prompt="a", model="other")
        async with session.post(f"{server.url}/v1/completions", data=b"{nonsense") as answer:
            return too_long, unknown, (answer.status, await answer.json())

    for status, answer in (refusals := talk(conversation)):
        assert answer.keys() == {"error"}
        assert answer["error"].keys() == {"message", "type", "param", "code"}
        assert answer["error"]["code"] == status
    assert [(status, answer["error"]["type"]) for status, answer in refusals] == [
        (400, "BadRequestError"),
        (404, "NotFoundError"),
        (400, "BadRequestError"),
    ]
    assert "maximum context length is 16384 tokens" in refusals[0][1]["error"]["message"]
    assert "`other` does not exist" in refusals[1][1]["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "missing required field `prompt`"),
        ({"prompt": []}, "prompt must not be empty"),
        ({"prompt": " "}, "prompt must not be empty"),
        ({"prompt": [[]]}, "prompt must not be empty"),
        ({"prompt": [1, "a"]}, "a text or a list of token ids"),
        ({"prompt": [[1], [2]]}, "must be one prompt"),
        ({"prompt": [1, -1]}, "none of them negative"),
        ({"prompt": [1], "max_tokens": 1, "priority": 3}, "Priority scheduling is not enabled"),
        ({"prompt": "a", "n": 2}, "n must be 1"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"prompt": "a", "max_tokens": 3, "min_tokens": 4}, "max_tokens=3, got 4"),
        ({"prompt": "a", "max_tokens": "many"}, r"Expected `int \| null`"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "Stream options"),
        ({"prompt": [1] * 9, "max_tokens": 8}, "9 \\+ 8 tokens exceed the whole KV cache"),
    ],
)
def test_bad_requests_say_what_is_wrong(body, message):
    with pytest.raises(ApiError, match=message) as refused:
        parse_completion(json.dumps(body).encode(), MODEL, PROFILE, lambda prompt, output: prompt + output <= 16)
    assert refused.value.status == 400


@pytest.mark.parametrize(("prompt", "tokens"), [([5, 6], 2), ([[5, 6, 7]], 3), ("a b", 2), (["a b c d"], 4)], ids=str)
def test_prompts_come_in_four_shapes(prompt, tokens):
    accepted = parse_completion(json.dumps({"prompt": prompt}).encode(), MODEL, PROFILE, lambda *_: True)
    assert (accepted.prompt_tokens, accepted.output_tokens) == (tokens, 16)


def test_a_client_that_goes_away_frees_its_cache(server):
    async def conversation(session):
        body = {"prompt": [1] * 3000, "max_tokens": 9000, "stream": True}
        async with session.post(f"{server.url}/v1/completions", json=body) as answer:
            await answer.content.readany()
            during = await gauges(session, server.url)
            answer.close()
        whole = asyncio.create_task(complete(session, server.url, prompt=[1] * 3000, max_tokens=9000))
        await gauges_when(session, server.url, lambda metrics: metrics["vllm:kv_cache_usage_perc"] > 0)
        whole.cancel()
        return during, await gauges_when(session, server.url, lambda m: m["vllm:num_requests_running"] == 0)

    during, after = talk(conversation)
    assert during["vllm:num_requests_running"] == 1
    assert during["vllm:kv_cache_usage_perc"] > 0
    assert after["vllm:kv_cache_usage_perc"] == 0


def test_the_other_endpoints(server):
    async def conversation(session):
        answers = [await session.get(server.url + path) for path in ("/v1/models", "/version", "/health")]
        return [(answer.status, await answer.text()) for answer in answers]

    models, version, health = talk(conversation)
    (card,) = json.loads(models[1])["data"]
    assert (card["id"], card["max_model_len"]) == (MODEL, 16384)
    assert "simulated" in json.loads(version[1])["version"]
    assert health == (200, "")


def test_metrics_count_what_was_served(server):
    async def conversation(session):
        before = await gauges(session, server.url)
        await complete(session, server.url, 300, prompt=[1] * 40, max_tokens=6)
        async with session.get(f"{server.url}/metrics") as answer:
            text = await answer.text()
        return before, await gauges(session, server.url), text

    before, after, text = talk(conversation)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["vllm:prompt_tokens_total"] == 40
    assert grown["vllm:generation_tokens_total"] == 6
    assert grown["vllm:request_success_total"] == 1
    assert grown["vllm:time_to_first_token_seconds_count"] == 1
    assert grown["vllm:inter_token_latency_seconds_count"] == 5
    assert grown["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(
        grown["vllm:time_to_first_token_seconds_sum"] + grown["vllm:inter_token_latency_seconds_sum"]
    )
    assert after["vllm:num_preemptions_total"] == 0
    assert f'vllm:time_to_first_token_seconds_bucket{{engine="0",model_name="{MODEL}",le="+Inf"}}' in text


def test_the_record_agrees_with_what_was_received_and_the_board_with_the_record(tmp_path):
    sizes = {7: (300, 12), 8: (9000, 3), 9: (20, 25), None: (50, 4)}

    async def conversation(session, url):
        async def one(request_id, prompt, output):
            _, answer = await complete(session, url, request_id, prompt=[prompt] * prompt, max_tokens=output)
            return answer["usage"]["completion_tokens"]

        counts = await asyncio.gather(*(one(key, *size) for key, size in sizes.items()))
        await asyncio.sleep(0.3)  # an idle gap
        return [*counts, await one(10, 5, 5)]

    with started(tmp_path) as server:
        counts = talk(lambda session: conversation(session, server.url))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
    assert counts == [12, 3, 25, 4, 5]
    steps = scan_table(tmp_path / "run", "steps").collect()
    tokens = (
        scan_table(tmp_path / "run", "segments")
        .with_columns(tokens=pl.col("tokens_per_step") * (pl.col("last_step") - pl.col("first_step") + 1))
        .group_by("request_id")
        .agg(*(pl.col("tokens").filter(kind=kind).sum().alias(kind) for kind in ("prefill", "decode")))
        .collect()
    )
    expected = {key: (prompt, output - 1) for key, (prompt, output) in {**sizes, 10: (5, 5)}.items()}
    assert {row[0]: row[1:] for row in tokens.iter_rows()} == expected
    assert steps["prefill_tokens"].sum() == tokens["prefill"].sum()
    assert steps["decode_tokens"].sum() == tokens["decode"].sum()
    check_energy(tmp_path / "board", steps)


def check_energy(path, steps):
    """The board's energy over the record is the steps' power times duration, and idle power between them."""
    hardware = Hardware(PROFILE, 4)
    start_ns, end_ns = steps["start_ns"].min(), steps["end_ns"].max()
    busy_j, busy_ns = 0.0, 0
    for row in steps.iter_rows(named=True):
        # The table keeps whole tokens squared; one chunk's half is below the tolerance.
        work = Work(row["prefill_tokens"], row["decode_tokens"], row["context_tokens"], row["prefill_attention"])
        duration_ns = row["end_ns"] - row["start_ns"]
        busy_j += hardware.step_w(work, row["clock_mhz"]) / 4 * duration_ns / 1e9
        busy_ns += duration_ns
    idle_ns = end_ns - start_ns - busy_ns
    assert idle_ns >= 0.3e9
    with SimBoard(path) as board:
        for gpu in GPUS:
            energy_j = board.energy_j(gpu, end_ns) - board.energy_j(gpu, start_ns)
            assert energy_j == pytest.approx(busy_j + hardware.idle_w(1980) * idle_ns / 1e9, rel=1e-7)
        unloaded_j = board.energy_j(0, end_ns) - board.energy_j(0, start_ns)
        assert unloaded_j == pytest.approx(hardware.idle_w(1980, loaded=False) * (end_ns - start_ns) / 1e9, rel=1e-9)


def test_a_killed_server_leaves_what_it_had_flushed(tmp_path):
    async def conversation(session, url):
        body = {"prompt": [1] * 50, "max_tokens": 9000, "stream": True}
        async with session.post(f"{url}/v1/completions", json=body, headers={"X-Request-Id": "1"}) as answer:
            while not list((tmp_path / "run").glob("s*.parquet/*-000001.parquet")):
                await answer.content.readany()

    with started(tmp_path) as server:
        talk(lambda session: conversation(session, server.url))
        server.process.kill()
        server.process.wait()
    steps = scan_table(tmp_path / "run", "steps").collect()
    segments = scan_table(tmp_path / "run", "segments").collect()
    # Parts of steps are written before those of segments, so the last one may lack its partner.
    whole = steps.filter(pl.col("step") <= segments["last_step"].max())
    assert whole.height > 10
    assert (segments["last_step"] - segments["first_step"] + 1).sum() == whole["requests"].sum()


@pytest.mark.parametrize("how", ["stdin", "SIGINT"])
def test_the_server_ends_when_told(tmp_path, how):
    more = ["--exit-with-parent"] if how == "stdin" else []
    with started(tmp_path, *more) as server:
        if how == "stdin":
            server.process.stdin.close()
            server.process.stdin = None
        else:
            server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0


def test_an_open_stream_does_not_hold_up_the_end(tmp_path):
    async def conversation(session, server):
        body = {"prompt": [1] * 50, "max_tokens": 9000, "stream": True}
        async with session.post(f"{server.url}/v1/completions", json=body) as answer:
            await answer.content.readany()
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(aiohttp.ClientPayloadError):  # cut off, not ended as if it were whole
                await answer.read()

    with started(tmp_path) as server:
        talk(lambda session: conversation(session, server))
        assert server.process.wait(20) == 0
    assert scan_table(tmp_path / "run", "steps").collect().height >= 1


def test_a_port_in_use_is_one_line_and_leaves_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        argv = arguments(tmp_path, "--port", str(port))
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: cannot listen on 127.0.0.1 port {port}: Address already in use; choose another --port or --host\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        ((0, 1, 1, 2), "--tp 4 needs 4 different GPUs; --gpus names 0,1,1,2"),
        ((0, 1, 2), "--tp 4 needs 4 different GPUs; --gpus names 0,1,2"),
        ((0, 1, 2, 9), "GPU 9 does not exist; the simulated node has GPUs 0 to 7"),
    ],
)
def test_wrong_gpus_are_refused_before_anything_is_recorded(tmp_path, gpus, message):
    settings = Settings(PROFILE, 4, gpus, tmp_path / "board", tmp_path / "run", MODEL, port=0)
    with pytest.raises(ReplayError, match=message):
        asyncio.run(serve(settings))
    assert not (tmp_path / "run").exists()


def test_gpus_are_a_list_of_numbers():
    assert _parse_gpus("0, 3,5") == (0, 3, 5)
    assert _parse_gpus("") == ()
    with pytest.raises(ReplayError, match="--gpus 0,x: give GPU indices separated by commas"):
        _parse_gpus("0,x")
