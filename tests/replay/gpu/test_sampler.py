"""Every reading is kept, and each update of a sensor is dated by the polls around it."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.clock import now_ns
from replay.gpu import sampler as sampler_module
from replay.gpu.base import GpuInfo, Reading, Sensor
from replay.gpu.rapl import CpuReading
from replay.gpu.sampler import Sampler, UpdateClock, _Loop
from replay.gpu.sim import SimBoard
from replay.rundir import has_table, scan_table
from replay.sim.hardware import load_profile
from replay.tables import CPU_ENERGY
from tracegen.errors import GpuError

PROFILE = load_profile()
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


def sample(spec, run_dir, *, at_least_ms=0, until=lambda status: True, **options):
    """Sample GPUs 0 and 1 for `at_least_ms` and until `until(status)` holds; the last status and the table."""

    async def main():
        async with Sampler(spec, [0, 1], run_dir, "here", **options) as sampler:
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
        assert frame["temperature_c"].null_count() == 0


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


class Clock:
    """Time that passes only where the loop waits or a driver is slow."""

    def __init__(self):
        self.t_ns = 10**12

    def __call__(self):
        return self.t_ns

    def wait_until(self, end_ns):
        """The loop's wait for its stdin, which closes at `end_ns`."""

        def closed(until_ns):
            self.t_ns = max(self.t_ns, until_ns)
            return self.t_ns >= end_ns

        return closed


class Failing:
    """GPUs of which some cannot be read at some times: `gone(gpu, t_ns)`; saying so takes `slow_ns`."""

    def __init__(self, clock, gone, slow_ns=0):
        self.clock, self.gone, self.slow_ns = clock, gone, slow_ns

    def devices(self):
        return [GpuInfo(gpu, f"GPU-{gpu}", "Card") for gpu in range(8)]

    def sensors(self, gpu):
        return {"instant": Sensor(PERIOD, 25 * MS, 0)}

    def read(self, gpu):
        if self.gone(gpu, self.clock.t_ns):
            self.clock.t_ns += self.slow_ns
            raise GpuError(f"GPU {gpu} is lost")
        shown = self.clock.t_ns // PERIOD
        return Reading(100_000 + shown % 1000, None, shown, 1200, None, None, None, 1 << gpu)


@pytest.fixture
def loop(tmp_path, monkeypatch, capfd):
    """Run the loop in made-up time for `ms`: its power table, and its status messages."""

    def run(gone, indices, *, ms, slow_ns=0, cpu=None):
        clock = Clock()
        monkeypatch.setattr(sampler_module, "now_ns", clock)
        monkeypatch.setattr(sampler_module, "parent_left", clock.wait_until(clock.t_ns + ms * MS))
        _Loop(Failing(clock, gone, slow_ns), indices, tmp_path, "here", cpu).run()
        statuses = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        return scan_table(tmp_path, "power").collect(), statuses

    return run


def test_a_gpu_that_is_lost_gets_rows_without_values_and_the_others_are_read_on(loop):
    power, statuses = loop(lambda gpu, t_ns: gpu == 4 and t_ns > 10**12 + 2000 * MS, [4, 5], ms=9000)
    lost = power.filter(pl.col("gpu") == 4, pl.col("t_ns") > 10**12 + 2000 * MS)
    assert lost.height >= 6, "it is tried again"
    readings = lost.drop("t_ns", "host", "gpu")
    assert sum(readings.null_count().row(0)) == lost.height * readings.width
    before = power.filter(pl.col("gpu") == 4, pl.col("t_ns") <= 10**12 + 2000 * MS)
    assert before["power_instant_mw"].null_count() == 0
    other = power.filter(pl.col("gpu") == 5)
    assert other["power_instant_mw"].null_count() == 0
    assert other["t_ns"].diff().max() < PERIOD / 4
    assert statuses[1]["lost"] == {}
    assert statuses[-1]["lost"] == {"4": "GPU 4 is lost"}
    assert statuses[-1]["watts"]["4"] is None, "an old figure is not shown as the present one"
    assert statuses[-1]["watts"]["5"] is not None


def test_a_gpu_that_comes_back_is_read_again_within_a_second(loop):
    away_ns = (10**12 + 1000 * MS, 10**12 + 7000 * MS)
    power, statuses = loop(lambda gpu, t_ns: away_ns[0] < t_ns < away_ns[1], [0], ms=10_000)
    t_ns = power.filter(pl.col("power_instant_mw").is_not_null())["t_ns"]
    back_ns = t_ns.filter(t_ns > away_ns[1]).min()
    assert back_ns - away_ns[1] <= 1100 * MS
    after = power.filter(pl.col("t_ns") >= back_ns)
    assert after["power_instant_mw"].null_count() == 0
    assert after["t_ns"].diff().max() < PERIOD / 4, "at the old rate"
    assert after["sensor_ns"].null_count() == 0
    assert statuses[-1]["lost"] == {}


def test_one_failed_poll_costs_no_more_than_the_next_one(loop):
    power, _ = loop(lambda gpu, t_ns: 0 <= t_ns - 10**12 - 1000 * MS < 23 * MS, [0], ms=3000)
    assert power["power_instant_mw"].null_count() == 1
    assert power.drop_nulls("power_instant_mw")["t_ns"].diff().max() < PERIOD


def test_a_driver_that_is_slow_to_say_that_a_gpu_is_gone_holds_up_the_others_rarely(loop):
    power, _ = loop(lambda gpu, t_ns: gpu == 1 and t_ns > 10**12 + MS, [0, 1], ms=20_000, slow_ns=200 * MS)
    other_ns = power.filter(pl.col("gpu") == 0)["t_ns"].diff().drop_nulls()
    assert (other_ns > PERIOD).sum() <= 25, "once a second"
    assert other_ns.median() < PERIOD / 4


@pytest.mark.parametrize("indices", [[4, 5], [5, 4]])
def test_a_gpu_that_cannot_be_read_at_first_is_an_error(loop, indices):
    with pytest.raises(GpuError, match="GPU 4 is lost"):
        loop(lambda gpu, t_ns: gpu == 4, indices, ms=1000)


def test_the_status_tells_the_latest_throttle_reasons(loop, make_board, tmp_path):
    _, statuses = loop(lambda gpu, t_ns: False, [2, 3], ms=1000)
    assert statuses[-1]["throttle_reasons"] == {"2": 4, "3": 8}
    status, _ = sample(make_board(0.01), tmp_path / "run")
    assert status.throttle_reasons == {0: 1, 1: 1}, "idle"
    assert status.lost == {}


class Counting:
    """A CPU of two domains that draws 50 W; its memory's counter cannot be read."""

    def read(self):
        t_ns = sampler_module.now_ns()
        return [CpuReading(t_ns, "package-0", t_ns // 20), CpuReading(t_ns, "dram-0", None)]


def test_cpu_energy_is_read_ten_times_a_second(loop, tmp_path):
    loop(lambda gpu, t_ns: False, [0], ms=5000, cpu=Counting())
    cpu = scan_table(tmp_path, "cpu_energy").collect()
    assert cpu.schema == CPU_ENERGY
    package = cpu.filter(pl.col("domain") == "package-0")
    assert package.height == pytest.approx(50, abs=1)
    assert (package["energy_uj"] == package["t_ns"] // 20).all()
    assert cpu.filter(pl.col("domain") == "dram-0")["energy_uj"].null_count() == package.height
    assert cpu["host"].unique().to_list() == ["here"]


def test_the_process_reads_the_cpus_where_it_is_told_to(make_board, tmp_path):
    folder = tmp_path / "powercap" / "intel-rapl:0"
    folder.mkdir(parents=True)
    for name, text in {"name": "package-0", "energy_uj": "7000", "max_energy_range_uj": "100000"}.items():
        (folder / name).write_text(text + "\n")
    sample(make_board(0.0), tmp_path / "without")
    assert not has_table(tmp_path / "without", "cpu_energy")
    sample(make_board(0.0), tmp_path / "with", with_cpu=True, powercap=tmp_path / "powercap")
    cpu = scan_table(tmp_path / "with", "cpu_energy").collect()
    assert cpu["energy_uj"].unique().to_list() == [7000]
    with pytest.raises(GpuError, match="no CPU energy counters"):
        sample(make_board(0.0), tmp_path / "none", with_cpu=True, powercap=tmp_path)
    assert not has_table(tmp_path / "none", "power")
