"""What the tests of replay.gpu share: a CUDA driver library."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = shutil.which("cc")


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory):
    """The folder of a libcuda.so.1 with two GPUs (fake_cuda.c)."""
    if COMPILER is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("cuda")
    source = Path(__file__).with_name("fake_cuda.c")
    flags = ["-shared", "-fPIC", "-O1", "-o", str(folder / "libcuda.so.1")]
    subprocess.run([COMPILER, *flags, str(source)], check=True)
    return folder
