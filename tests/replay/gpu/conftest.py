"""What the tests of replay.gpu share: a CUDA driver library, and asking the GPUs of the fake driver."""

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def cuda_library(build_library):
    """The folder of a libcuda.so.1 with two GPUs (fake_cuda.c)."""
    return build_library("fake_cuda.c", "libcuda.so.1")


@pytest.fixture
def ask(driver):
    """Run `expression` on open GPUs in a process that finds the fake driver; its value, or the error's text."""

    def ask(expression, mode="", *, imports="", **settings):
        script = f"""
import json
from dataclasses import asdict
from replay.gpu.base import open_gpus
from tracegen.errors import GpuError
{imports}
try:
    gpus = open_gpus("nvml")
    print(json.dumps({expression}))
    gpus.close()
except GpuError as error:
    print(json.dumps(str(error)))
"""
        argv = [sys.executable, "-c", script]
        done = subprocess.run(
            argv, env=driver(mode, **settings), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask
