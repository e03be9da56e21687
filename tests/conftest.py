"""What all tests share: fake driver libraries built from C, and looking at processes."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", settings(), deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

COMPILER = shutil.which("cc")
SOURCES = Path(__file__).parent / "replay" / "gpu"
FAKE_VLLM = Path(__file__).parent / "replay" / "fake_vllm.py"


@pytest.fixture(scope="session")
def build_library(tmp_path_factory):
    """Build one of the C sources in replay/gpu as a shared library and return its folder, for LD_LIBRARY_PATH."""

    def build(source, name):
        if COMPILER is None or not sys.platform.startswith("linux"):
            pytest.skip("needs Linux and a C compiler")
        folder = tmp_path_factory.mktemp("library")
        flags = ["-shared", "-fPIC", "-O1", "-o", str(folder / name)]
        subprocess.run([COMPILER, *flags, str(SOURCES / source)], check=True)
        return folder

    return build


@pytest.fixture(scope="session")
def nvml_library(build_library):
    """The folder of a libnvidia-ml.so.1 whose GPUs do as they are told (replay/gpu/fake_nvml.c)."""
    return build_library("fake_nvml.c", "libnvidia-ml.so.1")


@pytest.fixture
def driver(nvml_library, tmp_path):
    """The environment in which that library is found, by its mode and other settings (`gpus=8`: FAKE_NVML_GPUS).

    The loader reads it when a process starts.
    """

    def driver(mode="", **settings):
        path = os.pathsep.join(filter(None, [str(nvml_library), os.environ.get("LD_LIBRARY_PATH")]))
        log = tmp_path / "clocks.log"
        return {
            **os.environ, "LD_LIBRARY_PATH": path, "FAKE_NVML_MODE": mode, "FAKE_NVML_LOG": str(log),
            **{f"FAKE_NVML_{name.upper()}": str(value) for name, value in settings.items()},
        }  # fmt: skip

    return driver


@pytest.fixture(scope="session")
def processes():
    """The ids of living processes whose command line names `marker`."""

    def find(marker):
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    words = (entry / "cmdline").read_bytes()
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if str(marker).encode() in words and state != "Z":
                    found.append(int(entry.name))
        return found

    return find


@pytest.fixture(scope="session")
def until():
    """Poll `condition` until it holds and return what it gave; a test that waits in vain fails."""

    def until(condition, timeout_s=30.0):
        end_s = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < end_s, "never"
            time.sleep(0.02)
        return value

    return until


@pytest.fixture(scope="session")
def virtual_run():
    """Serve a trace (frame or file) in virtual time into a run directory; the run, opened."""

    def virtual_run(path, trace, **options):
        from replay.live import QuietProgress
        from replay.plan import RunOptions
        from replay.rundir import Run
        from replay.virtual.run import run_virtual
        from tracegen.schema import write_trace

        if not isinstance(trace, Path):
            frame, trace = trace, path.with_name(f"{path.name}.trace.parquet")
            write_trace(frame, trace, {"generator": "test"})
        asked = {"tp": 2, "freq_mhz": 1980, "idle_ns": 2 * 10**9, "truth": False, **options}
        return Run.open(run_virtual(RunOptions(trace, virtual=True, output=path, **asked), QuietProgress()))

    return virtual_run


@pytest.fixture(scope="session")
def terminal():
    """What a terminal of so many columns shows while `do` prints to it: its lines, without styles."""

    def shown(do, columns=80):
        termios = pytest.importorskip("termios")
        ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (24, columns))
        parts = []

        def read():
            with contextlib.suppress(OSError):  # the other end was closed
                while part := os.read(ours, 4096):
                    parts.append(part)

        reader = threading.Thread(target=read)
        reader.start()
        with os.fdopen(theirs, "w", encoding="utf-8") as screen, contextlib.redirect_stdout(screen):
            do()
        reader.join()
        os.close(ours)
        return re.sub(r"\x1b\[\d*m", "", b"".join(parts).decode()).split("\r\n")

    return shown


@pytest.fixture
def vllm_package(tmp_path):
    """A folder with a package `vllm` that serves (replay/fake_vllm.py), for PYTHONPATH."""
    package = tmp_path / "site" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    shutil.copy(FAKE_VLLM, package / "main.py")
    described = tmp_path / "site" / "vllm-0.32.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    return tmp_path / "site"
