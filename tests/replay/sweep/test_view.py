"""What a sweep shows."""

from replay.live import QuietProgress
from replay.sweep.plan import Grid, SweepPlan
from replay.sweep.show import lines
from replay.sweep.state import CellState, Outcome, SweepFile
from replay.sweep.view import SweepView


def test_the_line_says_how_far_it_is_what_runs_and_what_came_last(tmp_path):
    first, second, third = SweepPlan((Grid(tp=(2,)),), mix="chat").cells()
    file = SweepFile(tmp_path, {}, [CellState(cell, cell.repeat) for cell in (first, second, third)])
    said, shown = [], []
    progress = QuietProgress()
    progress.status, progress.say = shown.append, said.append
    view = SweepView(file, progress)
    view.begin(first)
    assert shown[-1] == "0 of 3 cells done  now tp2-unlocked-r0"
    for cell, outcome in (
        (first, Outcome("complete", None, 2.0, 1234.56, 250.4)),
        (second, Outcome("failed", "no such thing")),
    ):
        file.put(outcome.on(file.cells[cell]))
        view.end(cell, outcome)
    view.begin(third)
    assert shown[-1].startswith("2 of 3 cells done")
    assert "left" in shown[-1]
    assert "now tp2-unlocked-r2" in shown[-1]
    assert said == ["tp2-unlocked-r1: failed: no such thing"]
    assert "tp2-unlocked-r0: 1,235 J/request, TTFT p99 250 ms" in shown[1]
    assert shown[-1].endswith("last tp2-unlocked-r1: failed")


def test_the_summary_counts_and_says_why(tmp_path):
    cells = [{"state": "complete", "why": None}, *[{"state": "failed", "why": "no"}] * 2]
    assert lines({"simulated": True, "state": "complete", "cells": cells}) == [
        "SIMULATED  complete: 3 cells: 2 failed, 1 complete",
        "  2 failed: no",
    ]
