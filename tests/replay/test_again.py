"""The command that a manifest gives is the one that made the run: it asks for the same options."""

import json
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

import replay.cli
from replay.again import OPTIONS, PLACES, options_of, replay_command
from replay.manifest import _arguments
from replay.plan import RunOptions
from tracegen.errors import ReplayError, RunError

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("C",)), min_size=1, max_size=8)
NAMES = WORDS.filter(lambda text: not text.startswith("-"))
PATHS = NAMES.map(Path).filter(lambda path: path.name)
COUNTS = st.integers(1, 10**6)
AMOUNTS = st.floats(1e-6, 1e9)
DURATIONS = st.integers(1, 10**15)
OF = {
    "trace": PATHS, "engine": NAMES, "model": NAMES, "router": NAMES, "power": NAMES, "overlong": NAMES,
    "hardware": NAMES, "vllm_python": NAMES, "steps": PATHS, "tp": COUNTS, "replicas": COUNTS, "freq_mhz": COUNTS,
    "port": COUNTS, "num_prompts": COUNTS, "max_concurrency": COUNTS, "num_warmups": st.integers(0, 99),
    "seed": st.integers(0, 99), "power_cap_w": AMOUNTS, "max_rate_rps": AMOUNTS, "ready_timeout_s": AMOUNTS,
    "request_timeout_s": AMOUNTS, "duration_ns": DURATIONS, "idle_ns": st.integers(0, 10**15),
    "gpus": st.lists(st.integers(0, 99), min_size=1).map(tuple), "vllm_args": st.lists(WORDS).map(tuple),
    "metadata": st.dictionaries(NAMES.filter(lambda text: "=" not in text), WORDS),
}  # fmt: skip


@pytest.fixture(scope="module")
def asked():
    """The options that a command line asks for."""

    found = []

    def stop(options, progress, prometheus_port):
        found.append(options)
        raise ReplayError("far enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay.cli, "_run", stop)
        command = typer.main.get_command(replay.cli.app)

        def asked(line):
            with pytest.raises(ReplayError, match="far enough"):
                command.main(shlex.split(line)[1:], standalone_mode=False)
            return found.pop()

        yield asked


def test_every_option_has_its_way_back():
    assert {field.name for field in fields(RunOptions)} == OPTIONS.keys() | PLACES


@given(st.data())
def test_the_command_line_of_a_run_asks_for_that_run(asked, data):
    some = data.draw(st.sets(st.sampled_from(sorted(OF)), max_size=6))
    options = RunOptions(Path("trace.parquet"))
    options = replace(options, **{name: data.draw(OF[name], name) for name in some})
    for name, option in OPTIONS.items():
        if isinstance(option, tuple):
            off, on = option[1] is not None, option[0] is not None
            default = getattr(options, name)
            values = [default, *[True] * on, *[False] * (off or not default)]
            options = replace(options, **{name: data.draw(st.sampled_from(values), name)})
    manifest = json.loads(json.dumps({"arguments": _arguments(replace(options, api_key="secret"))}))
    if "***" not in manifest["arguments"]["engine"] and list(options.vllm_args) == manifest["arguments"]["vllm_args"]:
        assert options_of(manifest) == options
    again = asked(replay_command(options, Path("again")))
    assert replace(again, output=None, api_key=None) == options
    assert again.output == Path("again")


def test_a_runs_own_trace_is_cut_already():
    options = RunOptions(Path("gone.parquet"), duration_ns=10**10, num_prompts=5, overlong="drop", tp=2)
    line = replay_command(options, Path("b c"), Path("a/trace.parquet"))
    assert line == "replay run a/trace.parquet --tp 2 -o 'b c'"


def test_arguments_of_another_program_are_not_guessed():
    with pytest.raises(RunError, match="have warp, which this program does not know"):
        options_of({"arguments": {"trace": "a", "warp": 9}})
    for arguments in (None, {}, {"trace": "a", "tp": "two"}):
        with pytest.raises(RunError, match="do not tell how the run was asked for"):
            options_of({"arguments": arguments})
