"""Before a server is launched: is the GPU free, whole, and large enough?"""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.gpu.base import GpuProcess, GpuState
from replay.gpu.occupancy import check_free
from replay.gpu.sim import SimBoard, SimGpus
from replay.sim.hardware import load_profile
from tracegen.errors import GpuError

GIB = 1024


class Gpus:
    """GPUs by their states."""

    def __init__(self, *states):
        self.states = states

    def state(self, gpu):
        return self.states[gpu]


def state(processes=(), *, total_mib=80 * GIB, used_mib=0, mig=False):
    return GpuState(mig, total_mib, used_mib, tuple(processes), None, None, None)


VLLM = GpuProcess(4242, "vllm serve", 61_000)
HIDDEN = GpuProcess(17, None, None)
WAY_OUT = "its energy would count as this run's; end it, choose other GPUs with --gpus, or accept it with --allow-busy"


def test_free_gpus_are_no_matter():
    assert check_free(Gpus(state(), state(used_mib=512)), [0, 1], allow_busy=False, needs_mib=80.0 * GIB - 512) == []


@pytest.mark.parametrize(
    ("busy", "text"),
    [
        (state([VLLM], used_mib=61_000), "GPU 1 is used by process 4242 (vllm serve, 61,000 MiB)"),
        (state([HIDDEN], used_mib=100), "GPU 1 is used by process 17 (it cannot be seen from here)"),
        (state([HIDDEN, VLLM]), "GPU 1 is used by process 17 (it cannot be seen from here), process 4242 (vllm"),
        (state(used_mib=513), "GPU 1 is used by a process that cannot be seen from here (513 MiB)"),
    ],
)  # fmt: skip
def test_somebody_elses_work_is_an_error_that_names_it_or_a_warning(busy, text):
    gpus = Gpus(state(), busy)
    with pytest.raises(GpuError, match=re.escape(text)) as refused:
        check_free(gpus, [0, 1], allow_busy=False, needs_mib=None)
    assert str(refused.value).endswith(WAY_OUT)
    (warning,) = check_free(gpus, [0, 1], allow_busy=True, needs_mib=None)
    assert text in warning
    assert warning.endswith("its energy counts as this run's")
    assert check_free(gpus, [0], allow_busy=False, needs_mib=None) == [], "only the GPUs that are asked for count"


def test_every_busy_gpu_is_named():
    with pytest.raises(GpuError, match=r"^GPU 0 is used by .*; GPU 1 is used by .*"):
        check_free(Gpus(state([VLLM]), state([HIDDEN])), [0, 1], allow_busy=False, needs_mib=None)


@pytest.mark.parametrize("allow_busy", [True, False])
def test_a_split_gpu_is_always_an_error(allow_busy):
    with pytest.raises(GpuError, match=r"^GPU 1 is split into instances \(MIG\), and its power sensors measure"):
        check_free(Gpus(state(), state(mig=True)), [0, 1], allow_busy, needs_mib=None)


def test_a_model_that_does_not_fit_is_an_error_also_on_busy_gpus():
    message = "^model does not fit: needs 131.4 GiB a GPU, GPU 0 has 80.0; use a larger --tp$"
    with pytest.raises(GpuError, match=message):
        check_free(Gpus(state([VLLM])), [0], allow_busy=True, needs_mib=131.4 * GIB)
    message = "^model does not fit: needs 66.0 GiB a GPU, GPU 0 has 60.0 of 80.0 free; free its memory, .* larger --tp$"
    with pytest.raises(GpuError, match=message):
        check_free(Gpus(state([VLLM], used_mib=20 * GIB)), [0], allow_busy=True, needs_mib=66.0 * GIB)


@given(st.floats(0, 200_000), st.integers(1, 100_000), st.integers(0, 100_000))
def test_it_fits_if_and_only_if_there_is_room(needs_mib, total_mib, used_mib):
    gpus = Gpus(state([VLLM], total_mib=total_mib, used_mib=used_mib))
    if needs_mib <= total_mib - used_mib:
        check_free(gpus, [0], allow_busy=True, needs_mib=needs_mib)
    elif needs_mib > min(total_mib, total_mib - used_mib):
        with pytest.raises(GpuError, match="model does not fit"):
            check_free(gpus, [0], allow_busy=True, needs_mib=needs_mib)


def test_what_a_driver_does_not_tell_stops_nothing(tmp_path):
    gpus = Gpus(state(total_mib=None, used_mib=None), state(used_mib=None))
    assert check_free(gpus, [0], allow_busy=False, needs_mib=1e6) == []
    assert check_free(gpus, [1], allow_busy=False, needs_mib=80.0 * GIB) == []
    SimBoard.create(tmp_path / "board", load_profile()).close()
    sim = SimGpus(tmp_path / "board")
    assert check_free(sim, range(8), allow_busy=False, needs_mib=1e6) == []
    sim.close()


@pytest.fixture
def checked(ask):
    """`check_free` on both GPUs of the fake driver: the warnings, or the error's text."""

    def checked(mode="", *, allow_busy=False, needs_mib=None, **settings):
        expression = f"check_free(gpus, [0, 1], {allow_busy}, {needs_mib})"
        return ask(expression, mode, imports="from replay.gpu.occupancy import check_free", **settings)

    return checked


def test_through_the_driver_a_process_is_named_as_far_as_it_can_be_seen(checked):
    me, called = os.getpid(), Path("/proc/self/cmdline").read_bytes().split(b"\0")[0].decode()
    text = checked(processes=f"0:{me}:2000,1:4194399:100,1:4194304")
    assert re.search(rf"^GPU 0 is used by process {me} \({re.escape(called)}.*, 2,000 MiB\); GPU 1 is used by ", text)
    assert "process 4194304 (it cannot be seen from here), process 4194399 (fake-4194399, 100 MiB): its energy" in text
    assert len(checked(allow_busy=True, processes=f"0:{me}:2000")) == 1


def test_through_the_driver_its_own_reservation_is_nobodys(checked):
    # The fake reserves 600 MiB of each card: counted as used, every card would be busy.
    assert checked() == []
    assert checked("old") == []
    assert checked("bare") == []
    assert "GPU 1 is used by a process that cannot be seen from here (3,000 MiB)" in checked(used_mib="1:3000")


def test_through_the_driver_mig_and_memory_are_seen(checked):
    assert checked("mig").startswith("GPU 0 is split into instances (MIG)")
    assert checked(needs_mib=90_000) == "model does not fit: needs 87.9 GiB a GPU, GPU 0 has 79.6; use a larger --tp"
    assert "GPU 1 has 20.8 of 79.6 free" in checked(needs_mib=30_000, used_mib="1:60223", allow_busy=True)


def test_an_old_driver_still_names_processes(checked):
    assert "process 4194399 (fake-4194399, 100 MiB)" in checked("old", processes="1:4194399:100")
