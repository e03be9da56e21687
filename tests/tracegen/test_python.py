"""Everything that the commands do is one documented function: the page's table names them all."""

import importlib
import inspect
import re
from pathlib import Path

import typer

from tracegen.cli import app

PAGE = (Path(__file__).parents[2] / "docs" / "tracegen.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([a-z ]+)` \| (`tracegen\..*) \|$", PAGE.split("## Everything in Python", 1)[1], re.MULTILINE)


def test_each_command_has_a_function():
    assert {command.split()[0] for command, _ in ROWS} == set(typer.main.get_command(app).commands)


def test_each_function_is_there_and_documented():
    names = [name for _, functions in ROWS for name in re.findall(r"`([\w.]+)`", functions)]
    assert len(names) == len(set(names)) > len(ROWS)
    for name in names:
        module, _, function = name.rpartition(".")
        found = getattr(importlib.import_module(module), function)
        assert inspect.isfunction(found), name
        assert len(inspect.getdoc(found) or "") > 40, name
