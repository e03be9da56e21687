"""What a run shows while it goes on: figures that are there, and a dash for those that are not."""

import io
import re
from dataclasses import replace
from threading import Event

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from replay import live
from replay.dashboard import History, render, sparkline
from replay.live import LINE, LiveProgress, PlainProgress, QuietProgress, Snapshot, line, open_progress

MS = 1_000_000
NOTHING = Snapshot(0, 60_000 * MS, 10, 0, 0, 0, *[None] * 7)
MIDWAY = Snapshot(
    30_000 * MS, 60_000 * MS, 2000, 1500, 1400, 2, 0.2 * MS, 1.5 * MS, 80 * MS, 400 * MS, 1234.5, 2500.4, 1200,
    target_rps=50.0, sent_rps=49.96, tbt_p50_ns=39 * MS, tbt_p99_ns=61.25 * MS, joules_per_token=2.0254, simulated=True,
)  # fmt: skip


def test_what_is_not_measured_is_a_dash():
    text = "0/60 s  0/10 sent  0 in flight  0 errors  -/s  p99 lag -, TTFT -, TBT - ms  - tokens/s  - W"
    assert line(NOTHING) == text


def test_figures_carry_their_units():
    sent = "30/60 s  1,500/2,000 sent  100 in flight  2 errors  50.0/s"
    assert line(MIDWAY) == f"{sent}  p99 lag 1.5, TTFT 400, TBT 61.2 ms  1,234 tokens/s  2,500 W"
    end = replace(MIDWAY, sent=2000, elapsed_ns=61_000 * MS)
    assert line(end).startswith("all sent  2,000/2,000 sent  600 in flight")


def test_a_line_of_a_log_fits_however_large_the_run_is():
    large = replace(
        MIDWAY, elapsed_ns=604_800_000 * MS, planned_ns=604_800_000 * MS, planned=4_000_000, sent=4_000_000,
        ended=3_990_000, errors=10_000, lag_p99_ns=99.9 * MS, ttft_p99_ns=123_456 * MS, tbt_p99_ns=1_061 * MS,
        output_tokens_per_s=123_456.0, watts=25_000.0, sent_rps=1000.0,
    )  # fmt: skip
    assert len(line(large)) <= LINE


def drawn(snapshot, history):
    """The picture as lines of plain text in a terminal of 80 columns."""
    console = Console(file=io.StringIO(), width=80)
    console.print(render(snapshot, history))
    return console.file.getvalue().splitlines()


def test_the_picture_shows_every_figure_in_80_columns():
    history = History()
    for i in range(60):
        history.add(replace(MIDWAY, elapsed_ns=i * 1000 * MS, sent_rps=float(i), watts=None if i < 30 else 2000.0))
    text = drawn(MIDWAY, history)
    assert {len(line) for line in text} == {80}
    assert text[0].startswith("╭─ SIMULATED  30 of 60 s ──")
    whole = "\n".join(text)
    figures = {
        "in flight": "100", "errors": "2", "rate": "50.0 of 50.0 requests/s", "lag": "p50 0.2  p99 1.5 ms",
        "TTFT": "p50 80.0  p99 400.0 ms", "TBT": "p50 39.0  p99 61.2 ms", "output": "1,234 tokens/s",
        "power": "2,500 W", "energy": "2.03 J/token", "clock": "1,200 MHz",
    }  # fmt: skip
    for name, figure in figures.items():
        assert re.search(rf"{name} +{re.escape(figure)}", whole), name
    assert "1,400 of 2,000 ended" in whole
    assert "…" not in whole
    (rate,) = [line for line in text if "up to 58.0 requests/s" in line]
    assert "▁▁▂▂▃▃▃▄▄▄▅▅▅▆▆▇▇▇██" in rate, "means over three seconds each"
    (power,) = [line for line in text if "up to 2,000 W" in line]
    assert " " * 10 + "█" * 10 in power, "where nothing was read there is nothing"


def test_the_picture_of_a_run_that_begins_has_dashes_and_no_course():
    text = drawn(NOTHING, History())
    assert text[0].startswith("╭─ 0 of 60 s ──")
    assert not any("up to" in line for line in text)
    end = replace(MIDWAY, elapsed_ns=61_000 * MS, sent=2000)
    assert "all sent, waiting for 600 answers" in drawn(end, History())[0]


@given(st.lists(st.none() | st.floats(0, 1e12), max_size=50))
def test_a_sparkline_has_a_mark_for_each_value_and_rises_with_them(course):
    marks = sparkline(course)
    assert len(marks) == len(course)
    assert [mark == " " for mark in marks] == [value is None for value in course]
    ranked = sorted((value, mark) for value, mark in zip(course, marks, strict=True) if value is not None)
    assert [mark for _, mark in ranked] == sorted(mark for _, mark in ranked), "the marks are in order of their code"
    if any(course):
        assert max(marks) == "█"


def test_plain_lines_come_every_five_seconds_and_messages_at_once(capsys, monkeypatch):
    now = [10**12]
    monkeypatch.setattr(live, "now_ns", lambda: now[0])
    with PlainProgress() as progress:
        for _ in range(11):
            progress.update(MIDWAY)
            progress.status("waiting")
            now[0] += 1000 * MS
        progress.say("hello")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("100 in flight") == 3
    assert err.endswith("hello\n")


def test_the_picture_redraws_in_place_and_leaves_only_what_was_said():
    progress = LiveProgress()
    file = io.StringIO()
    progress._console = Console(file=file, force_terminal=True, width=100, highlight=False)
    progress._live.console = progress._console
    with progress:
        progress.status("waiting for the engine")
        drawn_all(progress)
        progress.update(MIDWAY)
        progress.say("locked 1200 MHz")
    text = file.getvalue()
    assert "waiting for the engine" in text
    assert "1,400 of 2,000 ended" in text
    assert "locked 1200 MHz" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown again"


def drawn_all(progress):
    """Wait until what was asked so far has been drawn."""
    done = Event()
    progress._actions.put(done.set)
    assert done.wait(30)


def test_a_terminal_that_stands_still_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(live, "_LEAVE_S", 0.01)
    now = [10**12]
    monkeypatch.setattr(live, "now_ns", lambda: now[0])
    goes_on, written = Event(), []

    class Still(io.StringIO):
        def write(self, text):
            assert goes_on.wait(30)
            written.append(text)
            return len(text)

    progress = LiveProgress()
    progress._live.console = progress._console = Console(file=Still(), force_terminal=True, width=80, highlight=False)
    with progress:
        for i in range(100):
            progress.update(replace(MIDWAY, ended=i))
            progress.say(f"line {i}")
            now[0] += 1000 * MS
        assert written == []
    goes_on.set()
    progress._writer.join(30)
    text = "".join(written)
    assert re.findall(r"line (\d+)\b", text) == [str(i) for i in range(100)], "what was said is not lost"
    assert re.findall(r"(\d+) of 2,000 ended", text)[-1] == "99"
    assert "50 of 2,000 ended" not in text, "pictures that came too late are not drawn"


def test_quiet_is_quiet(capsys):
    with open_progress(quiet=True) as progress:
        progress.say("a")
        progress.status("b")
        progress.update(MIDWAY)
    assert isinstance(progress, QuietProgress)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("tty", "kind"), [(True, LiveProgress), (False, PlainProgress)])
def test_progress_fits_where_it_goes(monkeypatch, tty, kind):
    monkeypatch.setattr("sys.stderr.isatty", lambda: tty, raising=False)
    assert isinstance(open_progress(quiet=False), kind)
