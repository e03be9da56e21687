"""Simulate the sweeps behind docs/paper.md, and write that page and its pictures from their tables.

    python benchmarks/paper.py -o runs/paper            # all of it; goes on where it was cut off
    python benchmarks/paper.py --tiny -o runs/tiny --page runs/tiny/paper.md

Every figure is simulated, in virtual time.
"""

import argparse
import os
from pathlib import Path

from paper_findings import FINDINGS, slo_of
from paper_numbers import SCOPES, Book
from paper_page import page
from paper_pictures import draw
from paper_plans import TINY, Extent, sweeps

from analysis.sweep import SweepTable, load_sweep
from replay.live import open_progress
from replay.sweep.run import Asked, run_sweep
from tracegen.console import say


def simulate(extent: Extent, folder: Path, jobs: int) -> list[str]:
    """Run every sweep of `extent` below `folder`, as far as it is not there; their names."""
    plans = list(sweeps(extent, folder))
    for done, (name, plan) in enumerate(plans, 1):
        with open_progress(quiet=True) as progress:
            run_sweep(plan, folder / name, progress, Asked(jobs))
        say(f"simulated {done} of {len(plans)} sweeps: {name}, {len(plan.cells())} cells")
    return [name for name, _ in plans]


def load(folder: Path, names: list[str], jobs: int) -> Book:
    """The tables of all sweeps, of the GPUs that serve and of the whole node."""
    tables: dict[tuple[str, str], SweepTable] = {}
    for done, name in enumerate(names, 1):
        size = name.split("-")[1] if name.startswith(("size-", "node-")) else None
        slo = slo_of(size) if size else None
        for scope in reversed(SCOPES):  # energy of a node that is saved serves both
            tables[name, scope] = load_sweep(folder / name, by="label", scope=scope, slo=slo, processes=jobs)
        say(f"attributed {done} of {len(names)} sweeps: {name}")
    return Book(tables)


def write(book: Book, extent: Extent, to: Path, pictures: Path) -> None:
    """Write the page to `to` and its pictures into `pictures`."""
    findings = [finding(book, extent) for finding in FINDINGS]
    draw({size: book.tables[f"size-{size}", "gpu"] for size in extent.sizes}, extent, pictures)
    to.write_text(page(book, extent, findings, os.path.relpath(pictures, to.parent)), encoding="utf-8")


def main() -> None:
    """Simulate, attribute, write."""
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/paper"), help="folder of the sweeps")
    parser.add_argument("--page", type=Path, default=root / "docs" / "paper.md", help="the page to write")
    parser.add_argument("--tiny", action="store_true", help="the fewest cells: to see that it works")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    given = parser.parse_args()
    extent = TINY if given.tiny else Extent()
    names = simulate(extent, given.output, given.jobs)
    write(load(given.output, names, given.jobs), extent, given.page, given.page.parent / "images")
    say(f"wrote {given.page}")


if __name__ == "__main__":
    main()
