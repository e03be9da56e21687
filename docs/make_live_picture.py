"""Draw what a terminal shows of a run: `python docs/make_live_picture.py docs/images/live.svg`.

It replays two minutes of the chat mix on the simulated engine and exports the picture as it stood near the end.
"""

import asyncio
import io
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from replay.dashboard import WIDTH, History, render
from replay.live import QuietProgress, Snapshot
from replay.plan import RunOptions
from replay.session import run
from tracegen.schema import write_trace
from tracegen.synthesize import synthesize

_RATE_RPS, _LASTS_NS = 3.0, 130 * 10**9


class Kept(QuietProgress):
    """Keeps the state of the run, until no more requests are due."""

    def __init__(self) -> None:
        self.history = History()
        self.latest: Snapshot | None = None

    def update(self, snapshot: Snapshot) -> None:
        """The run's state."""
        if snapshot.elapsed_ns < snapshot.planned_ns:
            self.latest = snapshot
            self.history.add(snapshot)


def main() -> None:
    """Draw it."""
    picture, kept = Path(sys.argv[1]), Kept()
    with tempfile.TemporaryDirectory() as folder:
        trace, metadata = synthesize("chat", _RATE_RPS, _LASTS_NS, 4)
        path = Path(folder) / "chat.parquet"
        write_trace(trace, path, metadata)
        options = RunOptions(path, engine="sim", tp=8, freq_mhz=1200, output=Path(folder) / "run", truth=False)
        asyncio.run(run(options, kept))
    assert kept.latest is not None
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(render(kept.latest, kept.history))
    picture.write_text(console.export_svg(title="replay run chat.parquet --tp 8 --freq 1200"), encoding="utf-8")
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
