"""Clocks are locked for as long as the lock lasts, and given back on every way out."""

import asyncio
import io
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.gpu import clocks
from replay.gpu.clocks import ClockLock, hold, nearest_clock
from replay.gpu.sim import SimBoard
from replay.sim.hardware import load_profile
from tracegen.errors import GpuError

PROFILE = load_profile("dgx-h100-llama-2-70b")


class Fake:
    """GPUs by their supported clocks; `locked` is what a driver would know."""

    def __init__(self, supported, refuse_unlock=()):
        self.supported, self.refuse_unlock, self.locked = supported, refuse_unlock, {}

    def supported_clocks_mhz(self, gpu):
        return self.supported[gpu]

    def lock_clock(self, gpu, mhz):
        if mhz not in self.supported[gpu]:
            raise GpuError(f"GPU {gpu} refuses {mhz}")
        self.locked[gpu] = mhz

    def unlock_clock(self, gpu):
        if gpu in self.refuse_unlock:
            raise GpuError(f"GPU {gpu} is lost")
        del self.locked[gpu]

    def close(self):
        self.closed = True


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


@pytest.fixture
def board(tmp_path):
    with SimBoard.create(tmp_path / "board", PROFILE) as board:
        yield board


def locked(board):
    return [board.clock_mhz(gpu) for gpu in range(8)]


FREE = [1980] * 8


def test_clocks_are_locked_inside_and_free_outside(board, tmp_path):
    async def main():
        async with ClockLock(f"sim:{tmp_path / 'board'}", [1, 3], 1200):
            return locked(board)

    assert asyncio.run(main()) == [1980, 1200, 1980, 1200, 1980, 1980, 1980, 1980]
    assert locked(board) == FREE


def test_an_error_inside_gives_them_back(board, tmp_path):
    async def main():
        async with ClockLock(f"sim:{tmp_path / 'board'}", [0], 1200):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())
    assert locked(board) == FREE


@pytest.mark.parametrize(
    ("gpus", "mhz", "message"),
    [([0, 9], 1200, "GPU 9 does not exist"), ([0], 1201, "GPU 0 cannot be locked to 1201 MHz")],
)
def test_a_refused_lock_is_an_error_and_leaves_nothing_changed(board, tmp_path, gpus, mhz, message):
    async def main():
        async with ClockLock(f"sim:{tmp_path / 'board'}", gpus, mhz):
            raise AssertionError("locked")

    with pytest.raises(GpuError, match=message):
        asyncio.run(main())
    assert locked(board) == FREE


def test_a_missing_driver_is_an_error(tmp_path):
    with pytest.raises(GpuError, match="no simulated board"):
        asyncio.run(ClockLock(f"sim:{tmp_path / 'none'}", [0], 1200).__aenter__())


def test_killing_the_parent_gives_them_back(board, tmp_path, until):
    script = f"""
import asyncio
from replay.gpu.clocks import ClockLock
async def main():
    async with ClockLock("sim:{tmp_path / "board"}", [0, 1], 1410):
        print("locked", flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "locked\n"
        assert locked(board)[:3] == [1410, 1410, 1980]
        parent.kill()
    until(lambda: locked(board) == FREE)


def test_ending_the_holder_gives_them_back(board, tmp_path):
    argv = [sys.executable, "-m", "replay.gpu.clocks", f"sim:{tmp_path / 'board'}", "0", "1200"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert json.loads(holder.stdout.readline()) == {"locked_mhz": 1200}
        assert locked(board)[0] == 1200
        holder.terminate()
        assert holder.wait(20) == 0
    assert locked(board) == FREE


def test_a_lock_that_is_cancelled_while_it_starts_leaves_no_process():
    async def main():
        lock = ClockLock("sim:none", [0], 1200)
        lock._argv = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        entering = asyncio.create_task(lock.__aenter__())
        while lock._holder is None:
            await asyncio.sleep(0.01)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        return lock._holder.returncode

    assert asyncio.run(main()) == 0


def test_one_gpu_that_refuses_does_not_keep_the_others_locked(monkeypatch, capsys):
    gpus = Fake({gpu: [1200] for gpu in range(3)}, refuse_unlock=[1])
    monkeypatch.setattr(clocks, "open_gpus", lambda spec: gpus)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(GpuError, match="GPU 1 is lost"):
        hold("any", [0, 1, 2], 1200)
    assert gpus.locked == {1: 1200}
    assert gpus.closed
    assert json.loads(capsys.readouterr().out) == {"locked_mhz": 1200}
