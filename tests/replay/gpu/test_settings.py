"""Clocks and power caps are set for as long as the settings last, and given back on every way out."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.gpu import settings
from replay.gpu.base import GpuState
from replay.gpu.settings import GpuSettings, check_power_cap, hold, nearest_clock, restore
from replay.gpu.sim import SimBoard
from replay.sim.hardware import load_profile
from tracegen.errors import GpuError

PROFILE = load_profile()


class Fake:
    """GPUs by their supported clocks; `locked` and `limits_w` are how they stand, `calls` what they were told."""

    def __init__(self, supported, *, limits_w=None, refuse=()):
        self.supported, self.refuse, self.locked, self.calls = supported, refuse, {}, []
        self.limits_w = limits_w or dict.fromkeys(supported, 700.0)
        self.closed = False

    def supported_clocks_mhz(self, gpu):
        return self.supported[gpu]

    def state(self, gpu):
        limit_w = self.limits_w[gpu]
        return GpuState(False, None, None, (), limit_w, 700.0, None if limit_w is None else (200.0, 700.0))

    def lock_clock(self, gpu, mhz):
        self._told("lock", gpu, mhz)
        self.locked[gpu] = mhz

    def unlock_clock(self, gpu):
        self._told("unlock", gpu)
        del self.locked[gpu]

    def set_power_limit(self, gpu, watts):
        self._told("cap", gpu, watts)
        self.limits_w[gpu] = watts

    def close(self):
        self.closed = True

    def _told(self, *call):
        self.calls.append(call)
        if call[:2] in self.refuse or call in self.refuse:
            raise GpuError(f"GPU {call[1]} is lost")


@given(st.sets(st.integers(100, 3000), min_size=1), st.integers(0, 4000))
def test_the_nearest_clock_is_supported_and_none_is_nearer(supported, mhz):
    gpus = Fake({0: sorted(supported)})
    if not min(supported) <= mhz <= max(supported):
        with pytest.raises(GpuError, match=f"--freq {mhz}: GPU 0 supports SM clocks from {min(supported)} to"):
            nearest_clock(gpus, [0], mhz)
        return
    nearest = nearest_clock(gpus, [0], mhz)
    assert nearest in supported
    assert abs(nearest - mhz) == min(abs(clock - mhz) for clock in supported)


def test_of_two_equally_near_it_is_the_lower_and_every_card_is_asked():
    assert nearest_clock(Fake({0: [1200, 1210]}), [0], 1205) == 1200
    with pytest.raises(GpuError, match="--freq 1500: GPU 1 supports SM clocks from 210 to 1410 MHz; choose one"):
        nearest_clock(Fake({0: [210, 1980], 1: [210, 1410]}), [0, 1], 1500)
    with pytest.raises(GpuError, match="GPU 0 lists no supported SM clocks; run without --freq"):
        nearest_clock(Fake({0: []}), [0], 1200)


@given(st.floats(0, 1000))
def test_a_cap_is_refused_with_the_range_unless_it_lies_in_it(watts):
    gpus = Fake({0: [], 1: []})
    if 200 <= watts <= 700:
        check_power_cap(gpus, [0, 1], watts)
        return
    with pytest.raises(GpuError, match=r"^--power-cap \S+: GPU 0 takes 200 to 700 W; choose a cap in this range$"):
        check_power_cap(gpus, [0, 1], watts)


def test_a_card_without_power_limits_takes_no_cap():
    with pytest.raises(GpuError, match="--power-cap 400: GPU 1 takes no power cap; run without --power-cap"):
        check_power_cap(Fake({0: [], 1: []}, limits_w={0: 700.0, 1: None}), [0, 1], 400)


@pytest.fixture
def holding(monkeypatch, capfd):
    """Run `hold` on `gpus`; what it said, its error, and how the GPUs stood meanwhile."""

    def holding(gpus, indices, mhz, watts):
        monkeypatch.setattr(settings, "open_gpus", lambda _: gpus)
        meanwhile, error = [], None
        try:
            hold("any", indices, mhz, watts, lambda: meanwhile.append((dict(gpus.locked), dict(gpus.limits_w))))
        except GpuError as refused:
            error = str(refused)
        said = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        return said, error, meanwhile

    return holding


def test_clock_and_cap_are_set_and_what_was_there_before_is_restored(holding):
    gpus = Fake({0: [1200], 1: [1200]}, limits_w={0: 700.0, 1: 450.5})
    said, error, meanwhile = holding(gpus, [0, 1], 1200, 400.0)
    assert said == [{"mhz": 1200, "power_cap_w": 400.0, "limits_w": {"0": 700.0, "1": 450.5}}]
    assert error is None
    assert meanwhile == [({0: 1200, 1: 1200}, {0: 400.0, 1: 400.0})]
    assert (gpus.locked, gpus.limits_w, gpus.closed) == ({}, {0: 700.0, 1: 450.5}, True)


@pytest.mark.parametrize(("mhz", "watts", "told"), [(1200, None, {"lock", "unlock"}), (None, 400.0, {"cap"})])
def test_what_is_not_asked_for_is_not_touched(holding, mhz, watts, told):
    gpus = Fake({0: [1200]})
    assert holding(gpus, [0], mhz, watts)[1] is None
    assert {call[0] for call in gpus.calls} == told


@pytest.mark.parametrize("refused", [("lock", 0), ("lock", 1), ("cap", 0), ("cap", 1)])
def test_if_one_is_refused_what_was_set_is_given_back(holding, refused):
    gpus = Fake({0: [1200], 1: [1200]}, limits_w={0: 600.0, 1: 500.0}, refuse=[refused])
    said, error, meanwhile = holding(gpus, [0, 1], 1200, 400.0)
    assert (said, error, meanwhile) == ([], f"GPU {refused[1]} is lost", [])
    assert (gpus.locked, gpus.limits_w, gpus.closed) == ({}, {0: 600.0, 1: 500.0}, True)


def test_a_cap_out_of_range_is_an_error_before_anything_is_changed(holding):
    gpus = Fake({0: [1200]})
    said, error, _ = holding(gpus, [0], 1200, 701.0)
    assert (said, gpus.calls, gpus.closed) == ([], [], True)
    assert "GPU 0 takes 200 to 700 W" in error


def test_one_gpu_that_refuses_does_not_keep_the_others_set(holding):
    gpus = Fake({gpu: [1200] for gpu in range(3)}, refuse=[("unlock", 1), ("cap", 1, 700.0)])
    said, error, _ = holding(gpus, [0, 1, 2], 1200, 400.0)
    assert said == [{"mhz": 1200, "power_cap_w": 400.0, "limits_w": {"0": 700.0, "1": 700.0, "2": 700.0}}]
    assert (gpus.locked, gpus.limits_w) == ({1: 1200}, {0: 700.0, 1: 400.0, 2: 700.0})
    assert "the clock of GPU 1 is not given back: GPU 1 is lost" in error
    assert "the power limit of GPU 1 is not given back: GPU 1 is lost" in error


def test_restoring_goes_on_past_whatever_refuses(monkeypatch):
    gpus = Fake({0: [1200], 1: [1200]}, limits_w={0: 400.0, 1: 400.0}, refuse=[("unlock", 0)])
    gpus.locked = {0: 1200, 1: 1200}
    monkeypatch.setattr(settings, "open_gpus", lambda _: gpus)
    error = restore("any", [0, 1], 1200, {0: 700.0, 1: 450.5})
    assert error == "the clock of GPU 0 is not given back: GPU 0 is lost"
    assert (gpus.locked, gpus.limits_w, gpus.closed) == ({0: 1200}, {0: 700.0, 1: 450.5}, True)


def test_restoring_without_a_driver_says_what_is_not_given_back(tmp_path):
    error = restore(f"sim:{tmp_path / 'none'}", [0], 1200, {})
    assert error.startswith("clocks and power limits are not given back: ")
    assert "no simulated board" in error


@pytest.fixture
def board(tmp_path):
    with SimBoard.create(tmp_path / "board", PROFILE) as board:
        yield board


def locked(board):
    return [board.clock_mhz(gpu) for gpu in range(8)]


FREE = [1980] * 8


def test_clocks_are_locked_inside_and_free_outside(board, tmp_path):
    async def main():
        async with GpuSettings(f"sim:{tmp_path / 'board'}", [1, 3], 1200) as held:
            assert locked(board) == [1980, 1200, 1980, 1200, 1980, 1980, 1980, 1980]
        return held.not_restored

    assert asyncio.run(main()) is None
    assert locked(board) == FREE


def test_an_error_inside_gives_them_back(board, tmp_path):
    async def main():
        async with GpuSettings(f"sim:{tmp_path / 'board'}", [0], 1200):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())
    assert locked(board) == FREE


@pytest.mark.parametrize(
    ("gpus", "mhz", "watts", "message"),
    [
        ([0, 9], 1200, None, "GPU 9 does not exist"),
        ([0], 1201, None, "GPU 0 cannot be locked to 1201 MHz"),
        ([0], 1200, 50.0, "--power-cap 50"),
    ],
)
def test_a_refused_setting_is_an_error_and_leaves_nothing_changed(board, tmp_path, gpus, mhz, watts, message):
    async def main():
        async with GpuSettings(f"sim:{tmp_path / 'board'}", gpus, mhz, watts):
            raise AssertionError("set")

    with pytest.raises(GpuError, match=message):
        asyncio.run(main())
    assert locked(board) == FREE


def test_a_simulated_gpus_cap_is_held_inside_and_given_back(board, tmp_path):
    async def main():
        async with GpuSettings(f"sim:{tmp_path / 'board'}", [1], None, 400.0):
            return [board.cap_w(gpu) for gpu in range(3)]

    assert asyncio.run(main()) == [700, 400, 700]
    assert board.cap_w(1) == 700


def test_a_missing_driver_is_an_error(tmp_path):
    with pytest.raises(GpuError, match="no simulated board"):
        asyncio.run(GpuSettings(f"sim:{tmp_path / 'none'}", [0], 1200).__aenter__())


@pytest.fixture
def parent(driver):
    """A process that holds GPUs 0 and 1 of the fake driver at 1200 MHz and 400 W, and has said so."""
    script = textwrap.dedent("""
        import asyncio
        from replay.gpu.settings import GpuSettings
        async def main():
            async with GpuSettings("nvml", [0, 1], 1200, 400.0) as held:
                print(held._holder.process.pid, flush=True)
                await asyncio.get_running_loop().run_in_executor(None, input)
        asyncio.run(main())
    """)
    argv = [sys.executable, "-c", script]
    process = subprocess.Popen(
        argv, env=driver(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    process.holder = int(process.stdout.readline())
    yield process
    process.kill()
    process.communicate()


SET = {"0": "1200", "1": "1200", "0 W": "400", "1 W": "400"}
RESTORED = {"0": "0", "1": "0", "0 W": "700", "1 W": "700"}


@pytest.fixture
def driver_state(tmp_path):
    """What was last written to each setting of the fake driver."""

    def read():
        log = tmp_path / "clocks.log"
        return dict(line.rsplit(" ", 1) for line in log.read_text().splitlines()) if log.exists() else {}

    return read


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("way", ["end", "kill", "interrupt", "terminate"])
def test_the_driver_gets_both_back_however_the_parent_ends(parent, driver_state, until, way):
    assert driver_state() == SET
    if way == "end":
        parent.stdin.write("\n")
        parent.stdin.flush()
    else:
        parent.send_signal({"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}[way])
        parent.stdin.close()  # an interrupted parent still waits for its thread that reads
        parent.stdin = None
    until(lambda: driver_state() == RESTORED)
    until(lambda: not alive(parent.holder))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ending_the_holder_itself_gives_them_back(parent, driver_state, until, number):
    os.kill(parent.holder, number)
    until(lambda: driver_state() == RESTORED)


def test_a_holder_that_is_killed_is_made_up_for_at_the_end(parent, driver_state, until):
    """Nobody restores at once; the replayer does when the run ends."""
    os.kill(parent.holder, signal.SIGKILL)
    until(lambda: not alive(parent.holder))
    assert driver_state() == SET
    parent.stdin.write("\n")
    parent.stdin.flush()
    until(lambda: driver_state() == RESTORED)


def held_by_nvml(env, settings_text):
    """Enter and leave `GpuSettings("nvml", ...)` in a process of its own; its last line: the error, or what is left."""
    script = textwrap.dedent(f"""
        import asyncio
        from replay.gpu.settings import GpuSettings
        from tracegen.errors import GpuError
        async def main():
            async with GpuSettings("nvml", {settings_text}) as held:
                pass
            print(held.not_restored)
        try:
            asyncio.run(main())
        except GpuError as error:
            print("error:", error)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    return line


@pytest.mark.parametrize(
    ("mode", "wanted", "message"),
    [
        ("denied", "[0], None, 400", "changing power limits needs root or CAP_SYS_ADMIN; run with sudo, or without"),
        ("nocap", "[0, 1], 1200, 400", "GPU 0: the driver refused nvmlDeviceSetPowerManagementLimit"),
        ("denied1", "[0, 1], 1200, 400", "GPU 1: the driver refused nvmlDeviceSetGpuLockedClocks"),
        ("denied1", "[0, 1], None, 400", "GPU 1: the driver refused nvmlDeviceSetPowerManagementLimit"),
        ("bare", "[0], None, 400", "--power-cap 400: GPU 0 takes no power cap"),
        ("", "[0, 1], 1200, 100", "--power-cap 100: GPU 0 takes 200 to 700 W"),
        ("", "[0], 1201, 400", "GPU 0: nvmlDeviceSetGpuLockedClocks failed"),
        ("lost", "[0], 1200, None", "GPU 0: nvmlDeviceSetGpuLockedClocks failed: GPU is lost: it fell off the bus"),
    ],
)  # fmt: skip
def test_what_the_driver_refuses_is_one_line_and_nothing_stays_changed(driver, driver_state, mode, wanted, message):
    line = held_by_nvml(driver(mode), wanted)
    assert line.startswith("error: ")
    assert message in line
    assert driver_state().items() <= RESTORED.items()


def test_a_gpu_that_is_lost_meanwhile_is_told_and_the_other_is_restored(driver, driver_state, tmp_path):
    power = tmp_path / "power"
    power.touch()
    script = textwrap.dedent(f"""
        import asyncio
        from pathlib import Path
        from replay.gpu.settings import GpuSettings
        async def main():
            async with GpuSettings("nvml", [0, 1], 1200, 400) as held:
                Path({str(power)!r}).write_text("0 1 -1\\n")  # off the bus, from now on
            print(held.not_restored)
        asyncio.run(main())
    """)
    argv = [sys.executable, "-c", script]
    done = subprocess.run(argv, env=driver(power=power), capture_output=True, text=True, timeout=60, check=True)
    assert "the clock of GPU 0 is not given back: GPU 0: nvmlDeviceResetGpuLockedClocks failed: " in done.stdout
    assert done.stderr == ""
    assert driver_state() == {**SET, "1": "0", "1 W": "700"}
