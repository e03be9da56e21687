"""What a run shows while it goes on: figures that are there, and a dash for those that are not."""

import io

import pytest
from rich.console import Console

from replay import live
from replay.live import LiveProgress, PlainProgress, QuietProgress, Snapshot, cells, open_progress

MS = 1_000_000
NOTHING = Snapshot(0, 60_000 * MS, 10, 0, 0, 0, *[None] * 7)
MIDWAY = Snapshot(
    30_000 * MS, 60_000 * MS, 2000, 1500, 1400, 2, 0.2 * MS, 1.5 * MS, 80 * MS, 400 * MS, 1234.5, 2500.4, 1200
)


def test_what_is_not_measured_is_a_dash():
    shown = dict(cells(NOTHING))
    assert shown == {
        "time": "0 / 60 s", "sent": "0 / 10", "in flight": "0", "errors": "0", "lag p50 / p99": "- / -",
        "TTFT p50 / p99": "- / -", "output": "-", "power": "-", "SM clock": "-",
    }  # fmt: skip


def test_figures_carry_their_units():
    shown = dict(cells(MIDWAY))
    assert (shown["time"], shown["sent"], shown["in flight"], shown["errors"]) == (
        "30 / 60 s",
        "1,500 / 2,000",
        "100",
        "2",
    )
    assert (shown["lag p50 / p99"], shown["TTFT p50 / p99"]) == ("0.2 ms / 1.5 ms", "80.0 ms / 400.0 ms")
    assert (shown["output"], shown["power"], shown["SM clock"]) == ("1,234 tokens/s", "2,500 W", "1,200 MHz")


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
    assert err.count("in flight 100") == 3
    assert err.endswith("hello\n")


def test_the_table_redraws_in_place_and_leaves_only_what_was_said():
    progress = LiveProgress()
    file = io.StringIO()
    progress._console = Console(file=file, force_terminal=True, width=100, highlight=False)
    progress._live.console = progress._console
    with progress:
        progress.status("waiting for the engine")
        progress.update(MIDWAY)
        progress.say("locked 1200 MHz")
    text = file.getvalue()
    assert "waiting for the engine" in text
    assert "1,500 / 2,000" in text
    assert "locked 1200 MHz" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown again"


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
