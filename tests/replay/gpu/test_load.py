"""The load through ctypes, against a small CUDA driver library written in C (fake_cuda.c)."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from replay.gpu.load import PTX, CudaLoad
from tracegen.errors import GpuError

PTXAS = shutil.which("ptxas")
MS = 1_000_000
UUIDS = [f"GPU-ab000000-0000-0000-0000-00000000000{index}" for index in (0, 1)]  # by NVML index


@pytest.fixture
def burn(cuda_library, tmp_path):
    """Burn in a process that finds the fake driver: when it began and ended, the power it drew; or the error's text."""

    def burn(uuid, durations_ns, mode=""):
        power = tmp_path / "power"
        power.touch()
        script = f"""
import json
from replay.gpu.load import CudaLoad
from tracegen.errors import GpuError
try:
    with CudaLoad({uuid!r}) as load:
        print(json.dumps([load.burn(ns) for ns in {durations_ns}]))
except GpuError as error:
    print(json.dumps(str(error)))
"""
        path = os.pathsep.join(filter(None, [str(cuda_library), os.environ.get("LD_LIBRARY_PATH")]))
        env = {**os.environ, "LD_LIBRARY_PATH": path, "FAKE_NVML_POWER": str(power), "FAKE_CUDA_MODE": mode}
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        lines = [[int(word) for word in line.split()] for line in power.read_text().splitlines()]
        return json.loads(done.stdout), lines

    return burn


@pytest.mark.parametrize("index", [0, 1])
def test_the_gpu_that_nvml_means_is_busy_for_as_long_as_told(burn, index):
    switches, power = burn(UUIDS[index], [30 * MS, 70 * MS])
    assert {line[0] for line in power} == {index}
    power = power[2:]  # the first launch warms up
    for (start_ns, end_ns), on, off, length_ns in zip(
        switches, power[::2], power[1::2], (30 * MS, 70 * MS), strict=True
    ):
        assert off[1] - on[1] == length_ns
        # Known to the duration of a call: begun before the launch returned, ended before synchronize did.
        assert on[1] <= start_ns
        assert off[1] <= end_ns


@pytest.mark.parametrize(
    ("mode", "what"),
    [
        ("none", "cuInit failed: no CUDA-capable device is detected"),
        ("broken", "cuInit failed: initialization error"),
        ("old", "cuModuleLoadData failed: a PTX JIT compilation failed"),
        ("fails", "cuStreamSynchronize failed: unspecified launch failure"),
    ],
)
def test_what_the_driver_refuses_is_one_line(burn, mode, what):
    error, _ = burn(UUIDS[0], [MS], mode)
    assert error == f"{what}; use --no-load to measure what can be measured without load"


def test_a_gpu_hidden_from_cuda_is_named(burn):
    error, power = burn("GPU-ab000000-0000-0000-0000-000000000009", [MS])
    assert "CUDA does not see GPU-ab000000-0000-0000-0000-000000000009" in error
    assert all(uuid in error for uuid in UUIDS)
    assert "CUDA_VISIBLE_DEVICES" in error
    assert not power


def test_the_gpu_is_left_alone_until_the_first_burn(burn):
    assert burn(UUIDS[0], []) == ([], [])


def test_without_the_library_there_is_one_line(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    with pytest.raises(GpuError, match=r"libcuda\.so\.1: cannot open.*--no-load"):
        CudaLoad(UUIDS[0])


@pytest.mark.skipif(PTXAS is None, reason="needs ptxas of a CUDA toolkit")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_kernel_assembles(tmp_path, architecture):
    (tmp_path / "burn.ptx").write_text(PTX)
    argv = [PTXAS, "-arch", architecture, "-Werror", str(tmp_path / "burn.ptx"), "-o", str(tmp_path / "burn.cubin")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
