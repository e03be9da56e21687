"""An external meter as a power source: the CSV that its logger appends to while the run goes on.

The first line names the columns. One of them is the time (`time`, `timestamp` or `t`), and there is one of power in W
for each channel: `watts` or `power_w` where there is one channel, else `gpu0_w`, `gpu1_w` and so on. Channel i is
taken for GPU i. With one channel, `energy_j` may hold the meter's own energy counter; beside several it would be
nobody's. Other columns are not looked at.

A time is ISO 8601 with its zone, or a Unix time whose unit its size tells: from 1e8 on seconds, from 1e11 on
milliseconds, from 1e14 on microseconds, from 1e17 on nanoseconds (seconds are so until the year 5138, and every other
unit since 1973). The clock of the machine that logs should be synchronised with this one's: a difference shifts power
against the requests.
"""

import csv
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path

from replay.clock import NS_PER_S
from replay.gpu.base import GpuInfo, Reading, Sensor
from tracegen.errors import GpuError

_TIMES = ("time", "timestamp", "t")
_SINGLE = ("watts", "power_w")
_CHANNEL = re.compile(r"gpu(\d+)_w")
_ENERGY = "energy_j"
_UNITS_NS = ((Decimal("1e17"), 1), (Decimal("1e14"), 1000), (Decimal("1e11"), 10**6), (Decimal("1e8"), 10**9))
_MAX_W = 4e6  # what the table's UInt32 of mW holds
_LATE_NS = 5 * NS_PER_S  # a logger that is silent for longer, and for three of its intervals, is taken to have ended
_LATE_INTERVALS = 3
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass
class _Channel:
    """One column of power: what its rows said since it was last read."""

    column: str
    watts: float | None = None  # of the newest sound row
    energy_j: float | None = None
    t_ns: int = 0  # of that row, on the meter's clock
    joules: float = 0.0  # since the row that was read last
    since_ns: int = 0  # that row's time
    error: str | None = None  # a row that could not be understood since

    def add(self, t_ns: int, watts: float, energy_j: float | None) -> None:
        """A row: `watts` is the power since the row before."""
        if self.watts is None:
            self.since_ns = t_ns
        else:
            self.joules += watts * (t_ns - self.t_ns) / NS_PER_S
        self.t_ns, self.watts, self.energy_j = t_ns, watts, energy_j

    def take(self) -> float:
        """Mean power since the row that was read last; the newest row's where there is no new one."""
        assert self.watts is not None
        span_ns = self.t_ns - self.since_ns
        mean_w = self.joules / (span_ns / NS_PER_S) if span_ns > 0 else self.watts
        self.joules, self.since_ns, self.watts = 0.0, self.t_ns, mean_w if span_ns > 0 else self.watts
        return self.watts


class CsvMeter:
    """The channels of a meter's log (implements `replay.gpu.base.PowerSource`).

    A reading has the newest row's power as `power_instant_mw` and its time as `sensor_ns`. Where the meter wrote
    several rows since the last reading, the power is their mean weighted by time, so that the energy of every row is
    in the readings though these are fewer. Rows from before it was opened are not read, except the last one.
    """

    def __init__(
        self, path: str, *, now_ns: Callable[[], int] = time.monotonic_ns, wall_ns: Callable[[], int] = time.time_ns
    ) -> None:
        """Open the log at `path`. Raises `GpuError` when it is not there, or lacks a column or a row."""
        self._path, self._now_ns = path, now_ns
        try:
            self._file = Path(path).open("rb")  # noqa: SIM115 - `close` closes it
        except OSError as error:
            raise GpuError(f"{path}: the meter's log cannot be opened ({error.strerror})") from None
        try:
            self._offset_ns = now_ns() - wall_ns()
            self._row, self._offset, self._interval_ns = 0, 0, 0
            # How long ago the file last grew, not how old its last row claims to be: clocks may differ.
            age_ns = max(0, wall_ns() - os.fstat(self._file.fileno()).st_mtime_ns)
            self._grown_ns = now_ns() - age_ns
            self._columns = self._header()
            self._time = self._columns.index(next(c for c in self._columns if c in _TIMES))
            self._channels = {i: _Channel(column) for i, column in sorted(self._power_columns().items())}
            self._skip_to_the_last_row()
        except BaseException:
            self._file.close()
            raise

    def devices(self) -> list[GpuInfo]:
        """A GPU for each channel."""
        name = Path(self._path).name
        return [
            GpuInfo(i, f"csv:{name}:{channel.column}", f"meter {name}, column {channel.column}")
            for i, channel in self._channels.items()
        ]

    def read(self, gpu: int) -> Reading:
        """The power of channel `gpu` since it was last read.

        Raises `GpuError` for a row that cannot be understood (the one after it is read again) and when the log has
        not grown for 5 s and three of its intervals.
        """
        channel = self._channel(gpu)
        self._take_in()
        if channel.error is not None:
            error, channel.error = channel.error, None
            raise GpuError(error)
        if channel.watts is None:
            raise GpuError(f"{self._path}: has no row yet; start the meter's logger before the run")
        silent_ns = self._now_ns() - self._grown_ns
        if silent_ns > max(_LATE_NS, _LATE_INTERVALS * self._interval_ns):
            raise GpuError(f"{self._path}: no new row for {silent_ns / NS_PER_S:.0f} s; is the meter's logger running?")
        return Reading(
            power_instant_mw=round(channel.take() * 1e3),
            energy_mj=None if channel.energy_j is None else round(channel.energy_j * 1e3),
            sensor_ns=channel.t_ns + self._offset_ns,
        )

    def sensors(self, gpu: int) -> dict[str, Sensor]:
        """Nothing: how a meter averages is not in its log."""
        self._channel(gpu)
        return {}

    def close(self) -> None:
        """Close the log."""
        self._file.close()

    def _channel(self, gpu: int) -> _Channel:
        if gpu not in self._channels:
            raise GpuError(
                f"{self._path}: has no channel for GPU {gpu}, only for {', '.join(map(str, self._channels))}"
            )
        return self._channels[gpu]

    def _header(self) -> list[str]:
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise GpuError(f"{self._path}: has no header line yet; start the meter's logger before the run")
        columns = [name.strip().lower() for name in _cells(line.decode("utf-8-sig", errors="replace"))]
        if not set(columns) & set(_TIMES):
            raise GpuError(f"{self._path}: has no column of time ({', '.join(_TIMES)}), only {', '.join(columns)}")
        self._row, self._offset = 1, len(line)
        return columns

    def _power_columns(self) -> dict[int, str]:
        """The columns of power by channel."""
        found = {int(match[1]): c for c in self._columns if (match := _CHANNEL.fullmatch(c))}
        single = [c for c in self._columns if c in _SINGLE]
        if len(single) + bool(found) != 1:
            have = f"both {single[0]} and others" if single else f"no column of power, only {', '.join(self._columns)}"
            raise GpuError(f"{self._path}: has {have}; name it watts, or gpu0_w, gpu1_w and so on")
        return found or {0: single[0]}

    def _skip_to_the_last_row(self) -> None:
        """Read the last two whole rows, which also tell how often rows come; those before are of the past."""
        rows: list[tuple[int, bytes]] = []
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            self._row, self._offset = self._row + 1, self._offset + len(line)
            rows = [*rows[-1:], (self._row, line)]
        for number, line in rows:
            for channel in self._channels.values():
                channel.error = None  # of a row that is not the last
            self._parse(number, line)

    def _take_in(self) -> None:
        """Parse the rows that are new; a last line without its end waits for it."""
        if os.fstat(self._file.fileno()).st_size < self._offset:
            raise GpuError(f"{self._path}: has become shorter while it was read; let the logger append to one file")
        self._file.seek(self._offset)
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            self._row, self._offset, self._grown_ns = self._row + 1, self._offset + len(line), self._now_ns()
            self._parse(self._row, line)

    def _parse(self, number: int, line: bytes) -> None:
        """Give a row to its channels; what cannot be understood becomes the error of those that it concerns."""
        cells = _cells(line.decode("utf-8", errors="replace"))
        row = f"{self._path}: row {number}"
        if len(cells) != len(self._columns):
            self._refuse(f"{row}: has {len(cells)} cells, not {len(self._columns)}")
            return
        try:
            t_ns = _time_ns(cells[self._time])
        except ValueError as error:
            self._refuse(f"{row}, column {self._columns[self._time]}: {error}")
            return
        for channel in self._channels.values():
            if channel.watts is not None and t_ns <= channel.t_ns:
                channel.error = (
                    f"{row}, column {self._columns[self._time]}: '{cells[self._time]}' is no later than before"
                )
                continue
            column = channel.column
            try:
                watts = _number(cells[self._columns.index(column)], _MAX_W)
                energy_j = None
                if len(self._channels) == 1 and _ENERGY in self._columns:
                    column = _ENERGY
                    energy_j = _number(cells[self._columns.index(column)], math.inf)
            except ValueError as error:
                channel.error = f"{row}, column {column}: {error}"
                continue
            self._interval_ns = t_ns - channel.t_ns if channel.watts is not None else 0
            channel.add(t_ns, watts, energy_j)

    def _refuse(self, error: str) -> None:
        for channel in self._channels.values():
            channel.error = error


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line.rstrip("\r\n")]), [])]


def _number(text: str, most: float) -> float:
    """A number from 0 to `most`. Raises `ValueError`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 <= value <= most and math.isfinite(value)):
        raise ValueError(f"'{text}' is no number from 0 on" + (f" to {most:g}" if math.isfinite(most) else ""))
    return value


def _time_ns(text: str) -> int:
    """Nanoseconds since 1970. Raises `ValueError`."""
    try:
        value = Decimal(text)
    except InvalidOperation:
        return _iso_ns(text)
    for least, unit_ns in _UNITS_NS:
        if value.is_finite() and value >= least:
            return int(value * unit_ns)
    raise ValueError(f"'{text}' is no Unix time")


def _iso_ns(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"'{text}' is neither ISO 8601 nor a Unix time") from None
    if moment.tzinfo is None:
        raise ValueError(f"'{text}' has no time zone; write it with one, such as {text}Z")
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000
