"""Every reading is kept, and each update of a sensor is dated by the polls around it."""

import asyncio
import sys
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.clock import now_ns
from replay.gpu import sampler as sampler_module
from replay.gpu.base import Reading, Sensor
from replay.gpu.sampler import Sampler, UpdateClock, _Loop
from replay.gpu.sim import SimBoard
from replay.rundir import has_table, scan_table
from replay.sim.hardware import load_profile
from tracegen.errors import GpuError

PROFILE = load_profile("dgx-h100-llama-2-70b")
MS = 1_000_000
PERIOD = 100 * MS


@given(
    st.integers(0, PERIOD - 1),
    st.lists(st.integers(5 * MS, 30 * MS), min_size=40, max_size=200),
    st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=1),
)
def test_updates_are_dated_within_a_poll_interval_though_values_stay_the_same(phase_ns, gaps_ns, values):
    """The sensor shows `values` in turn, one a period; many updates change nothing."""
    clock, t_ns, first_change_seen, dates = UpdateClock(PERIOD), 10**12, False, []
    shown = None
    for gap_ns in gaps_ns:
        t_ns += gap_ns
        update = (t_ns - phase_ns) // PERIOD
        value = values[update % len(values)]
        date_ns = clock.poll(t_ns, value)
        first_change_seen |= shown not in {None, value}
        assert (date_ns is not None) == first_change_seen
        if date_ns is not None:
            after_ns = (date_ns - phase_ns) % PERIOD
            assert after_ns < max(gaps_ns), "each date is at most a poll interval after an update"
            assert date_ns <= t_ns
            if value != shown:
                assert t_ns - date_ns < gap_ns, "a change is dated to the interval in which it was seen"
            dates.append(date_ns)
        shown = value
    assert dates == sorted(dates)


def test_polls_narrow_the_phase():
    clock = UpdateClock(PERIOD)
    rng = np.random.default_rng(1)
    t_ns = 0
    for _ in range(400):
        t_ns += round(PERIOD / 4.35 * rng.uniform(0.9, 1.1))
        date_ns = clock.poll(t_ns, t_ns // PERIOD)
    assert date_ns % PERIOD < 4 * MS, "far below the 23 ms between two polls"


def test_a_drifting_sensor_stays_dated_within_a_poll_interval():
    for true_period in (round(PERIOD * 1.001), round(PERIOD * 0.999)):
        clock, poll_ns = UpdateClock(PERIOD), 23 * MS
        for i in range(1, 20_000):
            t_ns = i * poll_ns
            date_ns = clock.poll(t_ns, t_ns // true_period)
            if i > 10:
                off_ns = abs((date_ns + true_period // 2) % true_period - true_period // 2)
                assert off_ns <= poll_ns + 1


def test_without_a_period_only_changes_are_dated():
    clock = UpdateClock(None)
    dates = [clock.poll(t, value) for t, value in [(10, 1), (20, 1), (30, 2), (500, 2), (510, 3)]]
    assert dates == [None, None, 30, 30, 510]


@pytest.fixture
def make_board(tmp_path):
    """A simulated board, with or without sensor noise; GPU 0 draws 200 W, GPU 1 300 W."""
    boards = []

    def make(noise_rel):
        profile = replace(PROFILE, sensor=replace(PROFILE.sensor, noise_rel=noise_rel))
        board = SimBoard.create(tmp_path / "board", profile)
        boards.append(board)
        for gpu in (0, 1):
            board.set_power(gpu, now_ns() - 3 * 10**9, 200.0 + 100 * gpu)
        return f"sim:{tmp_path / 'board'}"

    yield make
    for board in boards:
        board.close()


def sample(spec, run_dir, *, at_least_ms=0, until=lambda status: True):
    """Sample GPUs 0 and 1 for `at_least_ms` and until `until(status)` holds; the last status and the table."""

    async def main():
        async with Sampler(spec, [0, 1], run_dir, "here") as sampler:
            assert sampler.alive
            enough_ns = sampler.status.t_ns + at_least_ms * MS
            for _ in range(1000):
                if sampler.status.t_ns >= enough_ns and until(sampler.status):
                    break
                await asyncio.sleep(0.02)
            else:
                raise AssertionError("never")
            last = sampler.status
        assert not sampler.alive
        return last

    return asyncio.run(main()), scan_table(run_dir, "power").collect()


def test_every_reading_is_kept_and_dated_by_the_sensors_period(make_board, tmp_path):
    status, power = sample(make_board(0.01), tmp_path / "run", at_least_ms=1500)
    assert status.watts[0] == pytest.approx(200, rel=0.1)
    assert status.watts[1] == pytest.approx(300, rel=0.1)
    assert set(status.clocks_mhz.values()) == {1980}
    for gpu in (0, 1):
        frame = power.filter(pl.col("gpu") == gpu)
        t_ns = frame["t_ns"]
        assert t_ns.is_sorted()
        assert frame.height > frame["power_instant_mw"].n_unique(), "unchanged readings are kept"
        dated = frame.drop_nulls("sensor_ns")
        assert (dated["sensor_ns"] <= dated["t_ns"]).all()
        phase_ns = PROFILE.sensor.phases_ns[gpu % len(PROFILE.sensor.phases_ns)]
        after_ns = (dated["sensor_ns"] - phase_ns + 10 * MS) % PROFILE.sensor.period_ns - 10 * MS
        assert 0 <= after_ns.median() <= t_ns.diff().median(), "dated within a poll interval of the truth"
        assert frame["energy_mj"].is_sorted()
        assert frame["host"].unique().to_list() == ["here"]
        assert frame["temperature_c"].null_count() == frame.height


def test_a_sensor_that_never_changes_is_still_read(make_board, tmp_path):
    _, power = sample(make_board(0.0), tmp_path / "run", at_least_ms=500)
    frame = power.filter(pl.col("gpu") == 1)
    assert frame.height > 1
    assert frame["power_instant_mw"].unique().to_list() == [300_000]


def test_what_was_read_since_the_last_flush_is_written_at_the_end(make_board, tmp_path):
    status, power = sample(make_board(0.01), tmp_path / "run", until=lambda s: 0 < s.written_ns < s.t_ns)
    assert power["t_ns"].max() > status.written_ns


def test_written_until_returns_when_it_is_on_disk(make_board, tmp_path):
    spec = make_board(0.01)

    async def main():
        async with Sampler(spec, [0], tmp_path / "run", "here") as sampler:
            until_ns = now_ns()
            await sampler.written_until(until_ns)
            return until_ns, scan_table(tmp_path / "run", "power").collect()["t_ns"].max()

    until_ns, written_ns = asyncio.run(main())
    assert written_ns >= until_ns - 200 * MS
    assert written_ns > 0


def test_a_missing_board_is_an_error(tmp_path):
    with pytest.raises(GpuError, match="no simulated board"):
        sample(f"sim:{tmp_path / 'none'}", tmp_path / "run")
    assert not has_table(tmp_path / "run", "power")


def test_a_sampler_that_is_cancelled_while_it_starts_leaves_no_process(tmp_path):
    async def main():
        sampler = Sampler("sim:none", [0], tmp_path, "here")
        sampler._argv = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        entering = asyncio.create_task(sampler.__aenter__())
        while sampler._reader is None:
            await asyncio.sleep(0.01)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        return sampler.alive

    assert asyncio.run(main()) is False


class Failing:
    """A GPU that falls off the bus at its third reading."""

    reads = 0

    def sensors(self, gpu):
        return {"instant": Sensor(PERIOD, 25 * MS, 0)}

    def read(self, gpu):
        self.reads += 1
        if self.reads > 2:
            raise GpuError("GPU is lost")
        return Reading(100_000 + self.reads, None, 5, 1200, None, None, None, None)


def test_a_gpu_that_is_lost_leaves_what_was_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampler_module, "_stdin_closed", lambda until_ns: False)
    with pytest.raises(GpuError, match="GPU is lost"):
        _Loop(Failing(), [4], tmp_path, "here").run()
    power = scan_table(tmp_path, "power").collect()
    assert power["gpu"].to_list() == [4, 4]
    assert power["power_instant_mw"].to_list() == [100_001, 100_002]
