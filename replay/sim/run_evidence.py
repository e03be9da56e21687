"""A profile held against run directories: each step's duration, and each power reading's window over the steps in it.

No simulation is needed: what every step did is on record, so its duration and power follow from the formulas alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.sparse import csr_array

from replay.rundir import Run, has_table, scan_table
from replay.sim.arguments import capped
from replay.sim.hardware import Hardware, Work
from replay.sim.models import is_model
from replay.sim.physics import FloatArray
from replay.sim.profile import Profile
from tracegen.errors import ReplayError

IntArray = npt.NDArray[np.int64]
_STEP, _WINDOW = 0.05, 0.04  # what a good fit is expected to leave of a step's duration, of a window's power
_MOST_STEPS, _MOST_WINDOWS = 20_000, 20_000  # of one instance; more are thinned out evenly
_BLOCK_NS = 2_000_000_000  # held out together: neighbouring steps and windows are alike
_LEAST_STEPS = 20
_SIMULATED = "Simulated "  # how the names of simulated GPUs begin


class Windows(NamedTuple):
    """What one GPU's sensor showed: mean power over [start, end]."""

    start_ns: IntArray
    end_ns: IntArray
    watts: FloatArray

    def where(self, mask: npt.NDArray[np.bool_]) -> "Windows":
        """Those that `mask` picks."""
        return Windows(self.start_ns[mask], self.end_ns[mask], self.watts[mask])


@dataclass(frozen=True)
class RunEvidence:
    """One engine instance of a run: its steps, and the power windows of its GPUs."""

    name: str
    tp: int
    clock_mhz: float  # the lock
    cap_w: float | None  # of each GPU, where the run set one
    simulated: bool
    work: Work[FloatArray]  # of each step
    start_ns: IntArray
    end_ns: IntArray
    windows: Windows
    overlap: csr_array  # [windows, steps]: which part of a window each step fills
    use_steps: npt.NDArray[np.bool_]
    use_windows: npt.NDArray[np.bool_]

    def errors(self, profile: Profile) -> tuple[FloatArray, FloatArray]:
        """Simulated over measured - 1 of the durations of the steps, and of the power of the windows, in use."""
        if self.cap_w is not None:
            profile = replace(profile, power=replace(profile.power, cap_w=self.cap_w))
        hardware = Hardware(profile, self.tp)
        duration_s, gpu_w = (
            hardware.step_s(self.work, self.clock_mhz),
            hardware.step_w(self.work, self.clock_mhz) / self.tp,
        )
        measured_s = (self.end_ns - self.start_ns) / 1e9
        idle_w = hardware.idle_w(self.clock_mhz)
        shown_w = idle_w + self.overlap @ (gpu_w - idle_w)
        step = (duration_s / measured_s - 1)[self.use_steps]
        return step, (shown_w / self.windows.watts - 1)[self.use_windows]

    def residuals(self, profile: Profile) -> FloatArray:
        """Durations, then power; each kind weighs as if it had the number of the rarer."""
        step, window = (np.log1p(np.maximum(error, -0.999)) for error in self.errors(profile))
        if not window.size:
            return np.asarray(step / _STEP)
        rarer = min(step.size, window.size)
        return np.concatenate(
            [step / _STEP * np.sqrt(rarer / step.size), window / _WINDOW * np.sqrt(rarer / window.size)]
        )

    def near(self, _profile: Profile) -> Callable[[Profile], FloatArray]:
        """Steps on record are smooth anyway."""
        return self.residuals

    def part(self, *, held_out: bool, share: float, seed: int) -> "RunEvidence":
        """The same instance with the held-out stretches of time in use, or with all others."""
        first = int(self.start_ns[0])
        blocks = (int(self.end_ns[-1]) - first) // _BLOCK_NS + 1
        out = np.zeros(blocks, dtype=bool)
        out[np.random.default_rng(seed).permutation(blocks)[: round(share * blocks)]] = True

        def of(times_ns: IntArray) -> npt.NDArray[np.bool_]:
            block = np.clip((times_ns - first) // _BLOCK_NS, 0, blocks - 1)
            return np.asarray(out[block] == held_out)

        return replace(
            self,
            use_steps=self.use_steps & of(self.start_ns),
            use_windows=self.use_windows & of(self.windows.start_ns),
        )


def read_run(path: Path, profile: Profile) -> list[RunEvidence]:
    """The instances of the run directory `path` as evidence for `profile`.

    Raises `ReplayError` when the run has no steps, names no clock or TP size, was made on other hardware or served
    another model. A run with a power cap is held against `profile` with that cap.
    """
    run = Run.open(path)
    if not has_table(path, "steps"):
        raise ReplayError(
            f"--points {path}: has no steps.parquet; replay with --engine vllm or sim, which record steps"
        )
    steps = scan_table(path, "steps").collect()
    power = scan_table(path, "power").collect() if has_table(path, "power") else None
    found = []
    for document in run.manifest.get("instances", []):
        name = f"{run.name}, instance {document.get('instance')}"
        tp, clock_mhz = document.get("tp"), document.get("freq_mhz")
        if not tp or not clock_mhz:
            raise ReplayError(
                f"--points {path}: {name} has no TP size or locked clock in manifest.json; use --tp and --freq"
            )
        own = steps.filter((pl.col("instance") == document["instance"]) & (pl.col("end_ns") > pl.col("start_ns")))
        if own.height < _LEAST_STEPS:
            raise ReplayError(f"--points {path}: {name} has {own.height} steps; {_LEAST_STEPS} are needed")
        if tp not in profile.tp_sizes():
            raise ReplayError(f"--points {path}: {name} ran at TP {tp}, which {profile.name} cannot")
        simulated = _check_setting(f"--points {path}: {name}", run, document, profile)
        gpus = document.get("gpus") or []
        windows = [_windows(power, document.get("host"), gpu, _gpu_entry(run, document, gpu)) for gpu in gpus]
        setting = _Setting(name, int(tp), float(clock_mhz), document.get("power_cap_w"), simulated)
        found.append(_evidence(setting, own.sort("start_ns"), _joined(windows)))
    if not found:
        raise ReplayError(f"--points {path}: manifest.json names no instances")
    return found


class _Setting(NamedTuple):
    """The first fields of `RunEvidence`."""

    name: str
    tp: int
    clock_mhz: float
    cap_w: float | None
    simulated: bool


def _check_setting(where: str, run: Run, document: dict[str, Any], profile: Profile) -> bool:
    """Whether the instance was simulated. Raises `ReplayError` unless it ran the model of `profile` on its GPUs."""
    served = document.get("model")
    if not served:
        raise ReplayError(f"{where} names no model in manifest.json; only runs whose server answered can be used")
    if not is_model(str(served), profile.model_name):
        raise ReplayError(
            f"{where} served {served}, not {profile.model_name}; name what was served with --model, a folder of the "
            "same name with its config.json if it is none that comes with the simulator"
        )
    simulated = run.manifest.get("engine") == "simulated"
    for gpu in document.get("gpus") or []:
        name = _gpu_entry(run, document, gpu).get("name") or "a GPU without a name"
        simulated = simulated or name.startswith(_SIMULATED)
        if name.removeprefix(_SIMULATED) != profile.gpu_name:
            raise ReplayError(
                f"{where} ran on {name}; {profile.hardware} has {profile.gpu_name} (--hardware takes another node, or "
                "a TOML file of your own)"
            )
    try:
        capped(profile, document.get("power_cap_w"))
    except ReplayError as error:
        raise ReplayError(f"{where}: {error}") from None
    return simulated


def _gpu_entry(run: Run, document: dict[str, Any], gpu: int) -> dict[str, Any]:
    """What the manifest says of one GPU of an instance; nothing if it does not."""
    host = document.get("host")
    entries = [entry for entry in run.manifest.get("gpus") or [] if entry.get("gpu") == gpu]
    return next((dict(entry) for entry in entries if host is None or entry.get("host") == host), {})


def _evidence(setting: _Setting, steps: pl.DataFrame, windows: Windows) -> RunEvidence:
    """Steps and windows, thinned out, with how they overlap."""
    columns = ("prefill_tokens", "decode_tokens", "context_tokens", "prefill_attention")
    work = Work(*(steps[column].to_numpy().astype(float) for column in columns))
    start_ns, end_ns = steps["start_ns"].to_numpy(), steps["end_ns"].to_numpy()
    # A window that reaches beyond the steps on record may hold warm-up steps that are not.
    inside = (windows.start_ns >= start_ns[0]) & (windows.end_ns <= end_ns[-1])
    windows = windows.where(inside)
    windows = windows.where(_thinned(windows.watts.size, _MOST_WINDOWS))
    return RunEvidence(
        *setting, work, start_ns, end_ns, windows, _overlap(windows, start_ns, end_ns),
        _thinned(start_ns.size, _MOST_STEPS), np.ones(windows.watts.size, dtype=bool),
    )  # fmt: skip


def _thinned(count: int, most: int) -> npt.NDArray[np.bool_]:
    """A mask [count] with at most `most` set, evenly spread."""
    mask = np.zeros(count, dtype=bool)
    mask[:: max(1, -(-count // most))] = True
    return mask


def _overlap(windows: Windows, start_ns: IntArray, end_ns: IntArray) -> csr_array:
    """[windows, steps]: the part of each window that each step fills; steps follow each other without overlap."""
    first = np.searchsorted(end_ns, windows.start_ns, side="right")
    last = np.searchsorted(start_ns, windows.end_ns, side="left")
    counts = np.maximum(last - first, 0)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    row = np.repeat(np.arange(counts.size), counts)
    step = np.arange(indptr[-1]) - np.repeat(indptr[:-1] - first, counts)
    shared_ns = np.minimum(end_ns[step], windows.end_ns[row]) - np.maximum(start_ns[step], windows.start_ns[row])
    share = shared_ns / (windows.end_ns - windows.start_ns)[row]
    return csr_array((share, step, indptr), shape=(counts.size, start_ns.size))


def _windows(power: pl.DataFrame | None, host: Any, gpu: int, entry: dict[str, Any]) -> Windows:
    """The readings of one GPU, which the manifest's `entry` describes.

    The instant sensor's windows, else what the energy counter added between updates.
    """
    empty = Windows(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    if power is None:
        return empty
    own = power.filter(pl.col("gpu") == gpu)
    if host is not None:
        own = own.filter(pl.col("host") == host)
    instant = (entry.get("sensors") or {}).get("instant")
    if instant and instant.get("window_ns") and own["power_instant_mw"].null_count() < own.height:
        seen = own.drop_nulls(["sensor_ns", "power_instant_mw"]).unique("sensor_ns", keep="first").sort("sensor_ns")
        end_ns = seen["sensor_ns"].to_numpy() - int(instant.get("lag_ns") or 0)
        return Windows(end_ns - int(instant["window_ns"]), end_ns, seen["power_instant_mw"].to_numpy() / 1e3)
    seen = own.drop_nulls(["sensor_ns", "energy_mj"]).unique("sensor_ns", keep="first").sort("sensor_ns")
    if seen.height < 2:
        return empty
    at_ns, counted_mj = seen["sensor_ns"].to_numpy(), seen["energy_mj"].to_numpy().astype(float)
    return Windows(at_ns[:-1], at_ns[1:], np.diff(counted_mj) / 1e3 / (np.diff(at_ns) / 1e9))


def _joined(windows: Sequence[Windows]) -> Windows:
    """The windows of several GPUs in one; a reading of 0 W is none."""
    if not windows:
        return Windows(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    start_ns, end_ns, watts = (np.concatenate(columns) for columns in zip(*windows, strict=True))
    return Windows(start_ns, end_ns, watts).where(watts > 0)
