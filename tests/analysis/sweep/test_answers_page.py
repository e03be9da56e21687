"""docs/answers.md tells the truth: its commands run, its words are those of the schedule."""

import json
import re
from pathlib import Path

from analysis.sweep import CELLS, GROUPS

PAGE = (Path(__file__).parents[3] / "docs" / "answers.md").read_text(encoding="utf-8")


def test_every_column_is_described():
    for name in {*CELLS, *GROUPS} - {"cell", "repeat"}:
        assert f"`{name}`" in PAGE, name


def test_the_answers_page_runs_as_written(sweep_dir, cli, monkeypatch, capsys):
    monkeypatch.chdir(sweep_dir.parent)
    ran = 0
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(text, "answers.md", "exec"), {})
            assert "energy_per_request_j" in capsys.readouterr().out
            continue
        for line in text.splitlines():
            command, *words = line.split()
            assert command == "analysis"
            code, out, err = cli(*words)
            assert code == 0, (line, err)
            assert "SIMULATED" in out + err or "simulated" in out, line
            ran += 1
    assert ran
    schedule = json.loads(Path("schedule.json").read_text(encoding="utf-8"))
    (rate,) = schedule["rates"]
    entry = next(iter(rate["groups"].values()))
    for name in (*schedule, *rate, *schedule["objective"], *schedule["slo"], *entry):
        assert f"`{name}`" in PAGE, name
