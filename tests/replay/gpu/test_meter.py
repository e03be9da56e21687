"""A meter's log: every row's energy is in the readings, each has the meter's own time, and a bad row is named."""

import asyncio
import os
import time
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.gpu.base import open_power
from replay.gpu.meter import CsvMeter
from replay.gpu.sampler import Sampler
from replay.rundir import scan_table
from tracegen.errors import GpuError

MS = 1_000_000
WALL_NS = 1_790_000_000_000_000_000
MONOTONIC_NS = 5_000_000_000_000


class Log:
    """A log that a meter appends to, and the clocks of the machine that reads it."""

    def __init__(self, path, header="time,watts"):
        self.path, self.t_ns = path, 0  # since the beginning
        self.write(header + "\n")

    def write(self, text):
        with self.path.open("a") as file:
            file.write(text)
        self.touch()

    def touch(self):
        os.utime(self.path, ns=(WALL_NS + self.t_ns, WALL_NS + self.t_ns))

    def row(self, ms, *cells):
        self.write(",".join(map(str, [WALL_NS + ms * MS, *cells])) + "\n")

    def open(self):
        now_ns, wall_ns = (lambda zero=zero: zero + self.t_ns for zero in (MONOTONIC_NS, WALL_NS))
        return CsvMeter(str(self.path), now_ns=now_ns, wall_ns=wall_ns)


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "meter.csv")


def shown(reading):
    """Time in ms since the beginning, and W."""
    return (reading.sensor_ns - MONOTONIC_NS) // MS, reading.power_instant_mw / 1000


def test_a_reading_is_the_newest_whole_row_at_the_meters_own_time(log):
    log.row(-900, 100)
    log.row(100, 200.5)
    meter = log.open()
    assert shown(meter.read(0)) == (100, 200.5)
    log.row(200, 300)
    assert shown(meter.read(0)) == (200, 300)
    assert shown(meter.read(0)) == (200, 300), "unchanged until the next row"
    meter.close()


def test_a_torn_line_waits_for_its_end(log):
    log.row(0, 100)
    meter = log.open()
    log.write(f"{WALL_NS + 100 * MS},2")
    assert shown(meter.read(0)) == (0, 100)
    log.write("50\r")
    assert shown(meter.read(0)) == (0, 100)
    log.write("\n")
    assert shown(meter.read(0)) == (100, 250)
    meter.close()


@settings(deadline=None)  # files are written
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1000), st.booleans()), min_size=1, max_size=40))
def test_the_energy_of_all_rows_is_in_the_readings_however_rarely_they_are_taken(tmp_path_factory, rows):
    """`rows`: time since the row before, W, and whether a reading is taken after it; a value holds back."""
    log = Log(tmp_path_factory.mktemp("log") / "meter.csv")
    log.row(0, 50)
    meter = log.open()
    last_ms, _ = shown(meter.read(0))
    true_j = read_j = t_ms = 0.0
    for i, (gap_ms, watts, read) in enumerate(rows):
        t_ms += gap_ms
        true_j += watts * gap_ms / 1e3
        log.row(int(t_ms), watts)
        if read or i == len(rows) - 1:
            at_ms, mean_w = shown(meter.read(0))
            read_j += mean_w * (at_ms - last_ms) / 1e3
            last_ms = at_ms
    assert last_ms == t_ms
    assert read_j == pytest.approx(true_j, abs=1e-3 * t_ms)
    meter.close()


def test_each_channel_is_a_gpu_and_is_read_at_its_own_pace(tmp_path):
    log = Log(tmp_path / "rack.csv", "Timestamp, gpu3_w ,gpu0_w,room_c")
    log.row(0, 30, 10, 21)
    meter = log.open()
    assert [(d.gpu, d.uuid) for d in meter.devices()] == [(0, "csv:rack.csv:gpu0_w"), (3, "csv:rack.csv:gpu3_w")]
    assert "rack.csv" in meter.devices()[0].name
    assert meter.sensors(3) == {}
    log.row(100, 40, 20, 21)
    assert shown(meter.read(0)) == (100, 20)
    log.row(200, 60, 21, 21)
    assert shown(meter.read(0)) == (200, 21)
    assert shown(meter.read(3)) == (200, 50), "the mean of the two rows since it was opened"
    for ask in (meter.read, meter.sensors):
        with pytest.raises(GpuError, match=r"no channel for GPU 1, only for 0, 3"):
            ask(1)
    meter.close()


def test_the_meters_own_energy_counter_is_read_with_one_channel(tmp_path):
    log = Log(tmp_path / "meter.csv", "t,power_w,energy_j")
    log.row(0, 10, 1234.5)
    meter = log.open()
    assert meter.read(0).energy_mj == 1_234_500
    assert meter.read(0).power_average_mw is None
    meter.close()


def test_an_energy_counter_beside_several_channels_is_nobodys(tmp_path):
    log = Log(tmp_path / "meter.csv", "t,gpu0_w,gpu1_w,energy_j")
    log.row(0, 10, 20, 1234.5)
    meter = log.open()
    assert [meter.read(gpu).energy_mj for gpu in (0, 1)] == [None, None]
    meter.close()


@pytest.mark.parametrize(
    "text",
    [
        "1790000000.25",
        "1790000000250",
        "1790000000250000",
        "1790000000250000000",
        "1.79000000025e9",
        datetime.fromtimestamp(1790000000.25, UTC).isoformat(),
        datetime.fromtimestamp(1790000000.25, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        datetime.fromtimestamp(1790000000.25, timezone(timedelta(hours=-8))).isoformat(sep=" "),
    ],
)
def test_a_time_is_understood_in_every_unit(log, text):
    log.write(f"{text},1\n")
    meter = log.open()
    assert meter.read(0).sensor_ns == MONOTONIC_NS + 250 * MS
    meter.close()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{t},", "row 3, column watts: '' is no number"),
        ("{t},n/a", "row 3, column watts: 'n/a' is no number"),
        ("{t},nan", "row 3, column watts: 'nan' is no number"),
        ("{t},-3", "row 3, column watts: '-3' is no number"),
        ("{t},5e6", "row 3, column watts: '5e6' is no number"),
        ("{t}", "row 3: has 1 cells, not 2"),
        ("{t},1,2", "row 3: has 3 cells, not 2"),
        ("", "row 3: has 0 cells, not 2"),
        ("12.5,1", "row 3, column time: '12.5' is no Unix time"),
        ("noon,1", "row 3, column time: 'noon' is neither ISO 8601 nor"),
        ("2026-11-23T10:00:00,1", "row 3, column time: '2026-11-23T10:00:00' has no time zone"),
        (f"{WALL_NS},1", f"row 3, column time: '{WALL_NS}' is no later"),
    ],
)
def test_a_bad_row_is_named_once_and_the_next_is_read(log, line, words):
    log.row(0, 100)
    meter = log.open()
    log.write(line.format(t=WALL_NS + 100 * MS) + "\n")
    with pytest.raises(GpuError) as error:
        meter.read(0)
    assert str(error.value).startswith(f"{log.path}: row")
    assert words in str(error.value)
    assert shown(meter.read(0)) == (0, 100)
    log.row(200, 300)
    assert shown(meter.read(0)) == (200, 300)
    meter.close()


def test_a_bad_cell_concerns_its_channel_alone(tmp_path):
    log = Log(tmp_path / "meter.csv", "t,gpu0_w,gpu1_w")
    log.row(0, 1, 2)
    meter = log.open()
    log.row(100, "", 3)
    with pytest.raises(GpuError, match="row 3, column gpu0_w"):
        meter.read(0)
    assert shown(meter.read(1)) == (100, 3)
    meter.close()


def test_bad_rows_of_the_past_do_no_harm(log):
    log.write("nonsense\n")
    log.write("more,nonsense\n")
    log.row(0, 7)
    meter = log.open()
    assert shown(meter.read(0)) == (0, 7)
    meter.close()


def test_a_meter_that_falls_silent_is_an_error_and_not_its_last_value_for_ever(log):
    log.row(0, 100)
    meter = log.open()
    log.t_ns = 4999 * MS
    assert shown(meter.read(0)) == (0, 100)
    log.t_ns = 5001 * MS
    with pytest.raises(GpuError, match=r"no new row for 5 s; is the meter's logger running\?"):
        meter.read(0)
    log.row(4900, 80)
    log.row(5000, 90)
    assert shown(meter.read(0))[0] == 5000
    log.t_ns = 10_000 * MS
    assert shown(meter.read(0))[0] == 5000
    log.t_ns = 10_002 * MS
    with pytest.raises(GpuError, match="no new row for 5 s"):
        meter.read(0)
    meter.close()


def test_a_slow_meter_is_given_three_of_its_intervals(log):
    log.row(-10_000, 100)
    log.row(0, 100)
    meter = log.open()
    log.t_ns = 29_000 * MS
    assert shown(meter.read(0)) == (0, 100)
    log.t_ns = 31_000 * MS
    with pytest.raises(GpuError, match="no new row for 31 s"):
        meter.read(0)
    meter.close()


def test_a_log_that_ended_before_the_run_is_an_error_whatever_its_clock_says(log):
    log.row(3_600_000, 100)  # the meter's clock is an hour ahead
    log.t_ns = 60_000 * MS
    meter = log.open()
    with pytest.raises(GpuError, match="no new row for 60 s"):
        meter.read(0)
    meter.close()


def test_a_log_that_began_anew_is_an_error(log):
    log.row(0, 100)
    meter = log.open()
    log.path.write_text("time,watts\n")
    with pytest.raises(GpuError, match="has become shorter"):
        meter.read(0)
    meter.close()


def test_a_log_without_a_row_is_an_error_until_there_is_one(log):
    meter = log.open()
    with pytest.raises(GpuError, match="has no row yet"):
        meter.read(0)
    log.row(0, 5)
    assert shown(meter.read(0)) == (0, 5)
    meter.close()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be opened"),
        ("", "no header line yet"),
        ("time,watts", "no header line yet"),
        ("when,watts\n", "no column of time (time, timestamp, t), only when, watts"),
        ("time,volts\n", "no column of power, only time, volts"),
        ("time,watts,power_w\n", "both watts and others"),
        ("time,watts,gpu0_w\n", "both watts and others"),
    ],
)
def test_a_file_that_is_no_meters_log_is_one_clear_line(tmp_path, text, words):
    path = tmp_path / "meter.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(GpuError) as error:
        open_power(f"csv:{path}")
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    path = tmp_path / "meter.csv"
    path.write_text(f"\ufefftime,watts\n{time.time_ns()},5\n", encoding="utf-8")
    meter = CsvMeter(str(path))
    assert meter.read(0).power_instant_mw == 5000
    meter.close()


def test_the_sampler_keeps_what_a_live_meter_writes(tmp_path):
    """Twenty rows in a second, on the real clocks: the joules that the table holds are the meter's."""
    path = tmp_path / "meter.csv"
    path.write_text(f"time,watts\n{time.time_ns()},100\n")
    begin_ns = time.monotonic_ns()

    async def main():
        times = []
        async with Sampler(f"csv:{path}", [0], tmp_path / "run", "here") as sampler:
            for watts in range(20):
                times.append(time.time_ns())
                with path.open("a") as file:
                    file.write(f"{times[-1]},{100 + watts}\n")
                await asyncio.sleep(0.05)
            await sampler.written_until(time.monotonic_ns())
        return times

    times = asyncio.run(main())
    power = scan_table(tmp_path / "run", "power").collect().unique("sensor_ns", keep="first").sort("sensor_ns")
    assert power["sensor_ns"].is_between(begin_ns - 10**9, time.monotonic_ns()).all()
    joules = (power["power_instant_mw"] * power["sensor_ns"].diff() / 1e12).sum()
    first_ns = power["sensor_ns"][0]
    gaps_ns = [b - a for a, b in pairwise(times)]
    after_first = sum((101 + i) * gap / 1e9 for i, gap in enumerate(gaps_ns))
    head = 100 * (power["sensor_ns"][-1] - first_ns - sum(gaps_ns)) / 1e9
    assert joules == pytest.approx(after_first + head, rel=1e-3)
    assert power.filter(pl.col("gpu") != 0).is_empty()
