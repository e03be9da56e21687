"""The verdicts of a run in virtual time, added up while its tables are written.

They are those of `replay.judge.judge`; what cannot go wrong without sockets is null, with the reason.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from replay import verdicts
from replay.meters import Clocks, Coverage, Energy
from replay.sim.virtual import Output
from replay.source import Survey
from replay.sums import Steps, Waiting
from replay.verdicts import LAG_BOUND_MS, STALL_BOUND_MS, Verdict
from replay.virtual.node import Block
from replay.virtual.tables import Columns

_NOT_SENT = "virtual time: requests are handed over at their time, not sent"


class Judge:
    """Takes what is written, and judges it in the end."""

    def __init__(
        self, survey: Survey, gpus: Sequence[int], locked_mhz: int | None, zero_ns: int, held_mhz: float | None = None
    ) -> None:
        """`gpus` serve, their clock locked to `locked_mhz`; the trace begins, and with it the run, at `zero_ns`.

        `held_mhz`: the highest clock that they hold under load.
        """
        self._survey, self._zero_ns, self._sent = survey, zero_ns, survey.requests
        self._waiting = Waiting(verdicts.backlog_grid_ns(survey.first_ns, survey.last_ns))
        self._ok = self._wrong = self._short = 0
        self._steps, self._clocks = Steps(), Clocks(locked_mhz, held_mhz)
        self._meters = {gpu: (Coverage(zero_ns), Energy()) for gpu in gpus}

    def output(self, output: Output) -> None:
        """Take steps that were written."""
        self._steps.add(pl.DataFrame({name: output.steps[name] for name in Steps.columns}))

    def requests(self, columns: Columns, rows: int) -> None:
        """Take requests that were written; `scheduled_tokens` went through the engine for each."""
        self._ok += rows
        self._wrong += int((columns["output_tokens"] != columns["output_tokens_wanted"]).sum())
        # A request's last output token is never scheduled.
        need = columns["input_tokens"].astype(np.int64) + columns["output_tokens"] - 1 - columns["cached_tokens"]
        self._short += int((columns["scheduled_tokens"] < need).sum())
        self._waiting.add(*(columns[name] - self._zero_ns for name in ("sent_ns", "first_token_ns")))

    def stop(self, sent: int, last_ns: int) -> None:
        """Take it that only `sent` requests come, the last at `last_ns` of the trace."""
        self._sent = sent
        self._waiting.stop(last_ns)

    def power(self, block: Block, end_ns: int | None = None) -> None:
        """Take readings that were written; those after `end_ns` do not belong to the run."""
        shown = block.readings
        inside = shown.sensor_ns >= self._zero_ns
        if end_ns is not None:
            inside &= shown.sensor_ns <= end_ns
        for gpu, (coverage, energy) in self._meters.items():
            mine = inside & (block.gpu == gpu)
            t_ns = shown.sensor_ns[mine]
            coverage.add(t_ns)
            energy.add(t_ns, shown.power_instant_mw[mine], shown.energy_mj[mine])
            self._clocks.add(shown.sm_clock_mhz[mine], shown.throttle_reasons[mine])

    def verdicts(self, end_ns: int, entries: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """Every verdict on the run that ended at `end_ns`; `entries` are the serving GPUs' in the manifest."""
        covered = [coverage.end(end_ns)[0] for coverage, _ in self._meters.values()]
        energy = [meter for _, meter in self._meters.values()]
        before, after = ([entry.get(key, {}) for entry in entries] for key in ("idle_power_w", "idle_power_after_w"))
        return [
            verdicts.errors(self._ok, self._survey.requests, self._unsent()),
            verdicts.open_loop(None, None),
            Verdict("dispatch_lag", None, None, LAG_BOUND_MS, _NOT_SENT),
            Verdict("loop_stall", None, None, STALL_BOUND_MS, _NOT_SENT),
            verdicts.clock_offset([], []),
            verdicts.lengths(self._wrong, self._ok),
            verdicts.saturation(self._sent, self._waiting.at_ns, self._waiting.count),
            verdicts.completeness(self._steps.count, self._steps.missing, self._short, self._ok),
            self._clocks.verdict(),
            verdicts.coverage(min(covered)),
            verdicts.counter(sum(m.counter_j for m in energy), sum(m.sampled_j for m in energy)),
            verdicts.idle_measured(before, after),
        ]

    def _unsent(self) -> list[str]:
        unsent = self._survey.requests - self._sent
        return [f"{unsent:,} not sent"] if unsent else []
