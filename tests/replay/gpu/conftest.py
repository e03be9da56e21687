"""What the tests of replay.gpu share: a CUDA driver library."""

import pytest


@pytest.fixture(scope="session")
def cuda_library(build_library):
    """The folder of a libcuda.so.1 with two GPUs (fake_cuda.c)."""
    return build_library("fake_cuda.c", "libcuda.so.1")
