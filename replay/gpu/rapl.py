"""The energy of CPUs and their memory, as Linux's powercap tells it (RAPL, "running average power limit").

Each domain is a folder under `/sys/class/powercap` with a `name`, a counter `energy_uj` and the value
`max_energy_range_uj` after which the counter starts again at zero (Linux, Documentation/power/powercap). Read are the
packages and their memory (`dram`). `core` and `uncore` are inside their package and `psys` is the whole platform, so
that each would count the same joules twice; `intel-rapl-mmio` is a second way to the same counters.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from replay.clock import now_ns
from tracegen.errors import GpuError

POWERCAP = Path("/sys/class/powercap")
_PACKAGE = re.compile(r"intel-rapl:\d+")  # AMD's counters stand under this name too
_PART = re.compile(r"(intel-rapl:\d+):\d+")
_WITHOUT = "run without --with-cpu"


@dataclass(frozen=True)
class CpuReading:
    """One poll of one domain; `energy_uj` only grows, and is None where the counter could not be read."""

    t_ns: int
    domain: str  # package-0, dram-0, ...
    energy_uj: int | None


@dataclass
class _Counter:
    """One domain's counter and how often it has wrapped around."""

    domain: str
    path: Path  # of energy_uj
    range_uj: int
    last_uj: int = 0
    wrapped_uj: int = 0

    def read(self) -> CpuReading:
        """Poll it. A counter wraps after minutes, so polls in between see each wrap-around."""
        before_ns = now_ns()
        try:
            raw_uj = int(self.path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return CpuReading(before_ns, self.domain, None)
        t_ns = (before_ns + now_ns()) // 2
        if raw_uj < self.last_uj:
            self.wrapped_uj += self.range_uj
        self.last_uj = raw_uj
        return CpuReading(t_ns, self.domain, self.wrapped_uj + raw_uj)


class CpuEnergy:
    """The energy counters of this host's CPUs."""

    def __init__(self, counters: list[_Counter]) -> None:
        self._counters = counters

    @classmethod
    def open(cls, root: Path = POWERCAP) -> Self:
        """The packages and their memory under `root`. Raises `GpuError` when there are none, or they are not ours."""
        names = {folder.name: _text(folder / "name") for folder in sorted(root.glob("intel-rapl:*"))}
        counters = []
        for folder, name in names.items():
            domain = _domain(folder, names)
            if domain is not None:
                range_uj = _number(root / folder / "max_energy_range_uj", name)
                path = root / folder / "energy_uj"
                counters.append(_Counter(domain, path, range_uj, last_uj=_number(path, name)))
        if not counters:
            raise GpuError(
                f"{root}: no CPU energy counters (intel-rapl); a virtual machine or an old CPU has none: {_WITHOUT}"
            )
        return cls(counters)

    @property
    def domains(self) -> list[str]:
        """The names of the domains: each package, then its memory."""
        return [counter.domain for counter in self._counters]

    def read(self) -> list[CpuReading]:
        """A reading of each domain, in the order of `domains`."""
        return [counter.read() for counter in self._counters]


def _domain(folder: str, names: dict[str, str]) -> str | None:
    """What the domain in `folder` is called; None for one that is part of another, or overlaps it."""
    name = names[folder]
    if _PACKAGE.fullmatch(folder):
        return name if name.startswith("package-") else None
    part = _PART.fullmatch(folder)
    if part is None or name != "dram":
        return None
    return "dram" + names.get(part[1], "package-?").removeprefix("package")


def _number(path: Path, name: str) -> int:
    text = _text(path)
    try:
        return int(text)
    except ValueError:
        raise GpuError(f"{path}: the energy of CPU domain {name} is '{text}', not a number; {_WITHOUT}") from None


def _text(path: Path) -> str:
    """The one line in `path`."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except PermissionError:
        raise GpuError(
            f"{path}: not readable (needs root since CVE-2020-8694); run as root, or 'sudo chmod o+r' it, or {_WITHOUT}"
        ) from None
    except OSError as error:
        raise GpuError(f"{path}: not readable ({error.strerror}); {_WITHOUT}") from None
