"""`replay clocks`: how the GPUs run, and giving them back; on the fake driver through the real pynvml."""

from functools import partial

import pytest

from replay.gpu import clocks
from replay.gpu.sim import SimBoard, SimGpus
from replay.sim.hardware import load_profile


@pytest.fixture
def ask(ask):
    """The value of `expression` on the GPUs of the fake driver."""
    return partial(ask, imports="from replay.gpu.clocks import reset, show")


def test_show_tells_of_every_gpu_how_it_runs(ask, tmp_path):
    (tmp_path / "clocks.log").write_text("1 1200\n1 W 500\n")
    free, held = ask("show(gpus)", processes="1:4294967:1024")
    power_w = held.pop("power_w")
    assert 150 <= power_w <= 156
    assert held == {
        "gpu": 1,
        "uuid": "GPU-fake-1",
        "name": "NVIDIA H100 80GB HBM3",
        "error": None,
        "sm_clock_mhz": 1200,
        "sm_clock_lowest_mhz": 210,
        "sm_clock_highest_mhz": 1980,
        "mem_clock_mhz": 2619,
        "throttled_by": [],
        "power_limit_w": 500,
        "power_limit_default_w": 700,
        "power_limit_range_w": [200, 700],
        "temperature_c": 41,
        "utilization": 55,
        "mig": False,
        "processes": [{"pid": 4294967, "name": "fake-4294967", "memory_mib": 1024}],
    }
    assert (free["sm_clock_mhz"], free["power_limit_w"], free["processes"]) == (1980, 700, [])


def test_show_names_what_throttles(ask, tmp_path):
    (tmp_path / "clocks.log").write_text("0 1200\n")
    held = ask("show(gpus)", "throttled")[0]
    assert (held["sm_clock_mhz"], held["throttled_by"]) == (1050, ["software power cap"])


def test_show_tells_what_a_driver_does_not_tell_as_null(ask):
    entry = ask("show(gpus)", "bare")[0]
    told = {key: value for key, value in entry.items() if value is not None}
    assert told == {"gpu": 0, "uuid": "GPU-fake-0", "name": "NVIDIA Nothing", "mig": False, "processes": []}


@pytest.fixture
def lose(tmp_path):
    """What takes GPU 0 off the bus while the GPUs are open, as a setting and an expression."""
    power = tmp_path / "power"
    power.touch()
    return {"power": power}, f"open({str(power)!r}, 'w').write('0 1 -1\\n')"


def test_show_goes_on_past_a_gpu_that_is_lost(ask, lose):
    settings, lose_it = lose
    lost, alive = ask(f"[{lose_it}, show(gpus)][1]", **settings)
    assert lost["error"].startswith("GPU 0: ")
    assert "GPU is lost" in lost["error"]
    assert lost.keys() == alive.keys()
    assert [key for key, value in lost.items() if value is not None] == ["gpu", "uuid", "name", "error"]
    assert (alive["error"], alive["sm_clock_mhz"]) == (None, 1980)


def test_reset_unlocks_and_restores_the_default_limit(ask, tmp_path):
    (tmp_path / "clocks.log").write_text("0 1200\n1 1410\n1 W 500\n")
    done, refused = ask("reset(gpus, [0, 1])")
    assert done == [
        "GPU 0: the SM clock is the driver's",
        "GPU 0: the power limit is the default, 700 W",
        "GPU 1: the SM clock is the driver's",
        "GPU 1: the power limit is the default again, 700 W (it was 500 W)",
    ]
    assert refused == []
    assert (tmp_path / "clocks.log").read_text().splitlines()[3:] == ["0 0", "1 0", "1 W 700"]


def test_reset_touches_only_the_gpus_that_are_named(ask, tmp_path):
    ask("reset(gpus, [1])")
    assert (tmp_path / "clocks.log").read_text() == "1 0\n"


def test_reset_goes_on_past_a_gpu_that_is_lost_and_tells_of_it(ask, lose, tmp_path):
    settings, lose_it = lose
    done, refused = ask(f"[{lose_it}, reset(gpus, [0, 1])][1]", **settings)
    assert refused[0].startswith("GPU 0: nvmlDeviceResetGpuLockedClocks failed: GPU is lost")
    assert {line[:6] for line in refused} == {"GPU 0:"}
    assert [line[:6] for line in done] == ["GPU 1:", "GPU 1:"]
    assert (tmp_path / "clocks.log").read_text() == "1 0\n"


def test_reset_without_permission_changes_nothing_and_names_every_gpu(ask, tmp_path):
    (tmp_path / "clocks.log").write_text("0 W 500\n")
    done, refused = ask("reset(gpus, [0, 1])", "denied")
    assert done == ["GPU 1: the power limit is the default, 700 W"]
    assert [line.partition(": changing ")[0] for line in refused] == [
        "GPU 0: the driver refused nvmlDeviceResetGpuLockedClocks",
        "GPU 0: the driver refused nvmlDeviceSetPowerManagementLimit",
        "GPU 1: the driver refused nvmlDeviceResetGpuLockedClocks",
    ]
    assert (tmp_path / "clocks.log").read_text() == "0 W 500\n"


def test_a_card_without_power_limits_is_reset_all_the_same(ask):
    assert ask("reset(gpus, [0])", "bare")[0][-1] == "GPU 0: it has no power limit that could be changed"


def test_the_simulated_gpus_are_shown_and_reset_too(tmp_path):
    with SimBoard.create(tmp_path / "board", load_profile()) as board:
        gpus = SimGpus(tmp_path / "board")
        board.lock_clock(2, 1200)
        shown = clocks.show(gpus)
        assert [entry["sm_clock_mhz"] for entry in shown] == [1980, 1980, 1200, 1980, 1980, 1980, 1980, 1980]
        assert shown[2]["name"].startswith("Simulated ")
        done, refused = clocks.reset(gpus, [2])
        assert (done[0], refused) == ("GPU 2: the SM clock is the driver's", [])
        assert board.clock_mhz(2) == 1980
        gpus.close()
