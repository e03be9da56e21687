"""A command that fails prints no result: with --json stdout stays empty, and one line on stderr says why."""

import sys

import pytest
import typer

import analysis.cli
import replay.cli
import tracegen.cli

PROGRAMS = {"tracegen": tracegen.cli, "replay": replay.cli, "analysis": analysis.cli}
TAKE_NO_PATH = {"tracegen mixes", "replay vllm-args", "replay probe", "replay clocks show", "replay sim profiles"}
# What a command takes behind its first path.
MORE = {"analysis compare": ["missing/b"], "analysis query": ["select 1"], "replay sweep": ["-o", "out"]}


def commands(group, words):
    """Every command that prints JSON when it is asked to, by its words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{words} {name}")
        elif any("--json" in option.opts for option in command.params):
            yield f"{words} {name}", command


ALL = {
    words: command
    for program, module in PROGRAMS.items()
    for words, command in commands(typer.main.get_command(module.app), program)
}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """The exit code, stdout and stderr of a command."""
    monkeypatch.chdir(tmp_path)

    def run(words, *more):
        argv = [*words.split(), *more, "--json"]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            PROGRAMS[argv[0]].main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


def test_there_is_something_to_try():
    assert ALL.keys() >= TAKE_NO_PATH
    assert {words.split()[0] for words in ALL} == set(PROGRAMS)


@pytest.mark.parametrize("words", sorted(ALL.keys() - TAKE_NO_PATH))
def test_a_path_that_is_not_there_is_one_line_on_stderr(run, words):
    asked = [
        word
        for option in ALL[words].params
        if option.param_type_name == "argument" or option.required
        for word in ([max(option.opts, key=len)] if option.param_type_name == "option" else []) + ["missing/a.parquet"]
    ]
    code, out, err = run(words, *asked, *MORE.get(words, []))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "missing/a.parquet" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", sorted(ALL))
def test_an_option_that_there_is_not_is_one_line_on_stderr(run, words):
    code, out, err = run(words, "--there-is-no-such-option")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
