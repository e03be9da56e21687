"""What runs next: decided by what ended before in the order, however many run at once."""

from collections.abc import Iterator, Sequence

from replay.sweep.interval import tight
from replay.sweep.order import blocks_in_order
from replay.sweep.plan import Block, Cell, SweepPlan
from replay.sweep.state import CellState, SweepFile


class Course:
    """The way through the cells of a sweep."""

    def __init__(self, plan: SweepPlan, file: SweepFile) -> None:
        """`file` has the cells in their order, a block's one after the other."""
        self.plan, self.file = plan, file
        self.blocks: dict[Block, list[Cell]] = {}
        for cell in file.cells:
            self.blocks.setdefault(cell.setting.block, []).append(cell)

    def take(self, block: Block | None = None) -> Cell | None:
        """The next cell to begin (of `block`), which is `running` from now on; None while there is none.

        Cells that need not run are ended on the way, and repeats added to a block that has ended.
        """
        for cell in self._decided([block] if block else list(self.blocks)):
            self.file.put(CellState(cell, self.plan.seed + cell.repeat, "running"))
            return cell
        return None

    def left(self) -> int:
        """How many cells have not ended."""
        return sum(not state.ended for state in self.file.cells.values())

    def _decided(self, blocks: Sequence[Block]) -> Iterator[Cell]:
        """Planned cells that may begin."""
        for block in blocks:
            while True:
                for cell in self.blocks[block]:
                    if self._state(cell).state == "planned" and not self._skip(block, cell):
                        yield cell
                if not self._extend(block):
                    break

    def _skip(self, block: Block, cell: Cell) -> bool:
        """Whether `cell` need not run, or not yet, for what comes before it at a lower rate; a cell is ended then."""
        if self.plan.all_rates or cell.rate_rps is None:
            return False
        cells = self.blocks[block]
        lower = [
            self._state(other)
            for other in cells[: cells.index(cell)]
            if (other.setting, other.repeat) == (cell.setting, cell.repeat) and (other.rate_rps or 0) < cell.rate_rps
        ]
        if not all(state.ended for state in lower):
            return True
        saturated = [state.cell.rate_rps for state in lower if state.state == "saturated" and state.cell.rate_rps]
        if saturated:
            why = f"saturated at {min(saturated):.12g} requests/s already"
            self.file.put(CellState(cell, self.plan.seed + cell.repeat, "saturated", why))
        return bool(saturated)

    def _extend(self, block: Block) -> bool:
        """Add a repeat for each setting and rate of `block` that is not known well enough, once all of it has ended."""
        cells = self.blocks[block]
        if not all(self._state(cell).ended for cell in cells):
            return False
        more = [cell for cell in self._wide(block) if cell.repeat < self.plan.max_repeats]
        if not more:
            return False
        ordered = blocks_in_order(more, self.plan.seed + len(cells))[block]
        self.blocks[block] = [*cells, *ordered]
        self.file.add(CellState(cell, self.plan.seed + cell.repeat) for cell in ordered)
        self.file.write()
        return True

    def wide(self) -> int:
        """At how many settings and rates J/request is known less well than --until-ci asks."""
        return sum(len(self._wide(block)) for block in self.blocks)

    def unmeasured(self) -> bool:
        """Whether --until-ci asks for the energy of cells that ran, and none of them has one."""
        ran = [state for state in self.file.cells.values() if state.state == "complete"]
        return bool(self.plan.until_ci and ran) and all(state.energy_per_request_j is None for state in ran)

    def _wide(self, block: Block) -> list[Cell]:
        """The next repeat of each setting and rate of `block` whose interval is wider than --until-ci asks."""
        if self.plan.until_ci is None:
            return []
        points: dict[Cell, list[CellState]] = {}
        for cell in self.blocks[block]:
            points.setdefault(Cell(cell.setting, cell.rate_rps, 0), []).append(self._state(cell))
        return [
            Cell(first.setting, first.rate_rps, len(states))
            for first, states in points.items()
            if all(state.state == "complete" for state in states)
            and (known := [s.energy_per_request_j for s in states if s.energy_per_request_j is not None])
            and len(known) == len(states)
            and not tight(known, self.plan.until_ci)
        ]

    def _state(self, cell: Cell) -> CellState:
        return self.file.cells[cell]
