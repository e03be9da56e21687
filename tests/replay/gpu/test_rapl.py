"""The CPUs' energy counters: which are read, that they only grow, and what is said where they cannot be read."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.gpu.rapl import CpuEnergy
from tracegen.errors import GpuError

RANGE_UJ = 262_143_328_850


def domain(root, folder, name, energy_uj=1000, range_uj=RANGE_UJ):
    path = root / folder
    path.mkdir(parents=True)
    for file, value in {"name": name, "energy_uj": energy_uj, "max_energy_range_uj": range_uj}.items():
        (path / file).write_text(f"{value}\n")
    return path


def test_packages_and_their_memory_are_read_and_nothing_twice(tmp_path):
    """The folders of a server with two sockets, as powercap lists them."""
    domain(tmp_path, "intel-rapl:0", "package-0", 10)
    domain(tmp_path, "intel-rapl:0:0", "core", 1)
    domain(tmp_path, "intel-rapl:0:1", "dram", 20)
    domain(tmp_path, "intel-rapl:1", "package-1", 30)
    domain(tmp_path, "intel-rapl:1:0", "uncore", 1)
    domain(tmp_path, "intel-rapl:1:1", "dram", 40)
    domain(tmp_path, "intel-rapl:2", "psys", 1)
    domain(tmp_path, "intel-rapl-mmio:0", "package-0", 1)
    (tmp_path / "intel-rapl").mkdir()
    cpu = CpuEnergy.open(tmp_path)
    assert cpu.domains == ["package-0", "dram-0", "package-1", "dram-1"]
    assert [(r.domain, r.energy_uj) for r in cpu.read()] == [
        ("package-0", 10), ("dram-0", 20), ("package-1", 30), ("dram-1", 40)
    ]  # fmt: skip


def test_the_memory_of_a_die_is_named_after_it(tmp_path):
    domain(tmp_path, "intel-rapl:3", "package-1-die-0")
    domain(tmp_path, "intel-rapl:3:0", "dram")
    assert CpuEnergy.open(tmp_path).domains == ["package-1-die-0", "dram-1-die-0"]


def test_a_reading_is_dated_between_the_calls_around_it(tmp_path):
    domain(tmp_path, "intel-rapl:0", "package-0")
    cpu = CpuEnergy.open(tmp_path)
    times = [reading.t_ns for _ in range(3) for reading in cpu.read()]
    assert times == sorted(times)


@settings(deadline=None)  # files are written
@given(st.integers(0, 99), st.lists(st.integers(0, 99), max_size=50))
def test_a_counter_that_wraps_around_goes_on_growing(tmp_path_factory, start_uj, steps_uj):
    """No step is as long as the range, so that each wrap-around shows."""
    root = tmp_path_factory.mktemp("powercap")
    path = domain(root, "intel-rapl:0", "package-0", start_uj, 100) / "energy_uj"
    cpu, true_uj = CpuEnergy.open(root), start_uj
    for step_uj in steps_uj:
        true_uj += step_uj
        path.write_text(f"{true_uj % 100}\n")
        assert cpu.read()[0].energy_uj == true_uj


def test_a_wrap_around_while_a_counter_could_not_be_read_is_counted(tmp_path):
    path = domain(tmp_path, "intel-rapl:0", "package-0", 90, 100) / "energy_uj"
    cpu = CpuEnergy.open(tmp_path)
    path.unlink()
    assert [reading.energy_uj for reading in cpu.read()] == [None]
    path.write_text("5\n")
    assert [reading.energy_uj for reading in cpu.read()] == [105]


def refused(root, words):
    with pytest.raises(GpuError, match=words) as error:
        CpuEnergy.open(root)
    assert "\n" not in str(error.value)
    assert "without --with-cpu" in str(error.value)


def test_a_machine_without_counters_says_so(tmp_path):
    refused(tmp_path / "nowhere", "no CPU energy counters")
    domain(tmp_path, "intel-rapl:0", "psys")
    refused(tmp_path, "no CPU energy counters")


def test_counters_of_root_alone_say_what_to_do(tmp_path, monkeypatch):
    path = domain(tmp_path, "intel-rapl:0", "package-0") / "energy_uj"
    path.chmod(0o400)
    if os.geteuid() == 0:  # may read everything
        real = Path.read_text

        def read_text(self, *args, **options):
            if self == path:
                raise PermissionError(13, "Permission denied", str(self))
            return real(self, *args, **options)

        monkeypatch.setattr(Path, "read_text", read_text)
    else:
        path.chmod(0)
    refused(tmp_path, rf"{path}: not readable \(needs root since CVE-2020-8694\); run as root, or 'sudo chmod o\+r'")


def test_a_counter_that_is_no_number_is_named(tmp_path):
    path = domain(tmp_path, "intel-rapl:0", "package-0", "full")
    refused(tmp_path, f"{path}/energy_uj: the energy of CPU domain package-0 is 'full'")
