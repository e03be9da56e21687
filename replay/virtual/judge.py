"""The verdicts of a run in virtual time, added up while its tables are written.

They are those of `replay.finish.judge`; what cannot go wrong without sockets is null, with the reason.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from replay import verdicts
from replay.sim.sensors import Ints
from replay.sim.virtual import Output
from replay.verdicts import CLOCK_TOLERANCE_MHZ, LAG_BOUND_MS, SENSOR_GAP_NS, STALL_BOUND_MS, Verdict
from replay.virtual.node import Block
from replay.virtual.source import Survey
from replay.virtual.tables import Columns

_NOT_SENT = "virtual time: requests are handed over at their time, not sent"


@dataclass
class _Meter:
    """What the readings of one GPU add up to, from the first in the window on."""

    last_ns: int
    first_mj: int = -1
    last_mj: int = 0
    sampled_j: float = 0.0
    unread_ns: int = 0

    def add(self, t_ns: Ints, power_mw: Ints, energy_mj: Ints) -> None:
        """Readings in order of time."""
        spans_ns = np.diff(t_ns, prepend=self.last_ns)
        self.unread_ns += int(spans_ns[spans_ns > SENSOR_GAP_NS].sum())
        if self.first_mj < 0:
            self.first_mj = int(energy_mj[0])
            spans_ns[0] = 0
        self.sampled_j += float((power_mw * spans_ns).sum()) / 1e12
        self.last_ns, self.last_mj = int(t_ns[-1]), int(energy_mj[-1])


class Judge:
    """Takes what is written, and judges it in the end."""

    def __init__(
        self, survey: Survey, gpus: Sequence[int], locked_mhz: int | None, zero_ns: int, held_mhz: float | None = None
    ) -> None:
        """`gpus` serve, their clock locked to `locked_mhz`; the trace begins, and with it the run, at `zero_ns`.

        `held_mhz`: the highest clock that they hold under load.
        """
        self._survey, self._locked_mhz, self._zero_ns, self._held_mhz = survey, locked_mhz, zero_ns, held_mhz
        self._at_ns = verdicts.backlog_grid_ns(survey.first_ns, survey.last_ns)
        self._waiting = np.zeros(self._at_ns.size, np.int64)
        self._ok = self._wrong = self._short = 0
        self._steps = self._gaps = 0
        self._next_step: dict[int, int] = defaultdict(int)
        self._off = self._readings = self._reasons = 0
        self._meters = {gpu: _Meter(zero_ns) for gpu in gpus}

    def output(self, output: Output) -> None:
        """Take steps that were written."""
        for instance in np.unique(output.steps["instance"]).tolist():
            numbers = output.steps["step"][output.steps["instance"] == instance]
            self._gaps += int(numbers[-1]) + 1 - self._next_step[instance] - numbers.size
            self._next_step[instance] = int(numbers[-1]) + 1
            self._steps += numbers.size

    def requests(self, columns: Columns, rows: int) -> None:
        """Take requests that were written; `scheduled_tokens` went through the engine for each."""
        self._ok += rows
        self._wrong += int((columns["output_tokens"] != columns["output_tokens_wanted"]).sum())
        # A request's last output token is never scheduled.
        need = columns["input_tokens"].astype(np.int64) + columns["output_tokens"] - 1 - columns["cached_tokens"]
        self._short += int((columns["scheduled_tokens"] < need).sum())
        for name, sign in (("sent_ns", 1), ("first_token_ns", -1)):
            times_ns = np.sort(columns[name] - self._zero_ns)
            self._waiting += sign * np.searchsorted(times_ns, self._at_ns, "right")

    def power(self, block: Block, end_ns: int | None = None) -> None:
        """Take readings that were written; those after `end_ns` do not belong to the run."""
        shown = block.readings
        inside = shown.sensor_ns >= self._zero_ns
        if end_ns is not None:
            inside &= shown.sensor_ns <= end_ns
        for gpu, meter in self._meters.items():
            mine = inside & (block.gpu == gpu)
            if not mine.any():
                continue
            meter.add(shown.sensor_ns[mine], shown.power_instant_mw[mine], shown.energy_mj[mine])
            if self._locked_mhz is not None:
                off = np.abs(shown.sm_clock_mhz[mine] - self._locked_mhz) > CLOCK_TOLERANCE_MHZ
                self._off += int(off.sum())
                self._readings += off.size
                self._reasons |= int(np.bitwise_or.reduce(shown.throttle_reasons[mine]))

    def verdicts(self, end_ns: int, entries: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """Every verdict on the run that ended at `end_ns`; `entries` are the serving GPUs' in the manifest."""
        meters, lasted_ns = self._meters.values(), max(1, end_ns - self._zero_ns)
        unread_ns = [m.unread_ns + (end_ns - m.last_ns) * (end_ns - m.last_ns > SENSOR_GAP_NS) for m in meters]
        before, after = ([entry.get(key, {}) for entry in entries] for key in ("idle_power_w", "idle_power_after_w"))
        counter_j = sum(meter.last_mj - max(0, meter.first_mj) for meter in meters) / 1e3
        return [
            verdicts.errors(self._ok, self._survey.requests, []),
            verdicts.open_loop(None, None),
            Verdict("dispatch_lag", None, None, LAG_BOUND_MS, _NOT_SENT),
            Verdict("loop_stall", None, None, STALL_BOUND_MS, _NOT_SENT),
            verdicts.clock_offset([], []),
            verdicts.lengths(self._wrong, self._ok),
            verdicts.saturation(self._survey.requests, self._at_ns, self._waiting),
            verdicts.completeness(self._steps, self._gaps, self._short, self._ok),
            self._clocks(),
            verdicts.coverage(1 - max(unread_ns) / lasted_ns),
            verdicts.counter(counter_j, sum(meter.sampled_j for meter in meters)),
            verdicts.idle_measured(before, after),
        ]

    def _clocks(self) -> Verdict:
        if self._locked_mhz is None or not self._readings:
            return verdicts.clocks_held(None, (), self._locked_mhz)
        return verdicts.clocks(self._locked_mhz, self._off, self._readings, self._reasons, self._held_mhz)
