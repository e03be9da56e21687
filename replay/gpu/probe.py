"""Find out how a GPU's power sensors behave: how often they update, over what window, how late.

Sensors differ by model, driver and card ("Part-time Power Measurements", Yang et al., SC'24), and what is attributed to
requests rests on their windows. A probe polls as fast as the driver answers, first at idle, then while a load goes on
and off at random times, and fits what the sensors showed to what the load did (`replay.gpu.sensor_fit`).
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl

from replay.clock import NS_PER_MS, NS_PER_S, now_ns
from replay.gpu.base import GpuInfo, Gpus, open_gpus
from replay.gpu.baseline import idle_power_w
from replay.gpu.load import CudaLoad, Load
from replay.gpu.sensor_fit import Changes, Floats, Ints, find_changes, find_period, fit_window
from replay.gpu.sensor_profiles import Behaviour, CounterBehaviour, SensorProfile, save_profile
from tracegen.errors import GpuError

_PAUSE_S = 0.0005  # between polls: lets the loading thread have its turn
_WARM_UP_NS = 500 * NS_PER_MS  # clocks rise from idle to full in that
_SWITCH_NS = (60 * NS_PER_MS, 400 * NS_PER_MS)  # of on and off times: around the periods and windows that are known
_TAIL_S = 1.5  # so that the longest averages have fallen back when watching ends
_NO_LOAD = "not measured without load"
_ABSENT = "the driver tells none"


@dataclass(frozen=True)
class Polls:
    """Readings of one GPU, in the order they were taken (n,); NaN where the driver told nothing."""

    begin_ns: Ints  # before and after each read
    end_ns: Ints
    instant_mw: Floats
    average_mw: Floats
    energy_mj: Floats

    def changes(self, value: Floats, from_ns: int = 0, until_ns: int = 2**63 - 1) -> Changes:
        """Where `value`, one of these sensors, changed between two times."""
        inside = (self.begin_ns >= from_ns) & (self.end_ns <= until_ns)
        return find_changes(self.begin_ns[inside], self.end_ns[inside], value[inside])


def probe_gpus(
    spec: str = "nvml",
    indices: Sequence[int] | None = None,
    *,
    with_load: bool = True,
    idle_s: float = 5.0,
    seconds: float = 20.0,
    output: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[tuple[SensorProfile, Path]]:
    """Probe GPUs one after the other (all of `spec` for None), and write each profile to `output` or where runs look.

    Raises `GpuError` when a GPU, or with load CUDA, cannot be reached, and when a profile cannot be written.
    """
    with contextlib.closing(open_gpus(spec)) as gpus:
        indices = [device.gpu for device in gpus.devices()] if indices is None else indices
        infos = [_info(gpus, gpu) for gpu in indices]
        if output is not None and len(infos) != 1:
            raise GpuError(
                f"{output}: one file holds one GPU's profile; choose a GPU with --gpus, for example --gpus 0"
            )
        found = []
        for info in infos:
            with CudaLoad(info.uuid) if with_load else contextlib.nullcontext() as load:
                profile = probe(gpus, info.gpu, load, idle_s=idle_s, seconds=seconds, say=say)
            found.append((profile, save_profile(profile, output)))
        return found


def probe(
    gpus: Gpus,
    gpu: int,
    load: Load | None,
    *,
    idle_s: float = 5.0,
    seconds: float = 20.0,
    say: Callable[[str], None] = lambda _: None,
    seed: int = 0,
) -> SensorProfile:
    """How the sensors of `gpu` behave, watched for `idle_s` at rest and for `seconds` while `load` goes on and off.

    Without `load` windows and lags stay None. `seed`: of the on and off times. Raises `GpuError` when the GPU cannot be
    read, is split (MIG), or the load fails.
    """
    info = _info(gpus, gpu)
    state = gpus.state(gpu)
    if state.mig:
        raise GpuError(
            f"GPU {gpu} is split into MIG instances, and its sensors measure the whole card; probe it undivided"
        )
    with _polling(gpus, gpu) as (record, polling):
        say(f"GPU {gpu}: idle for {idle_s:g} s")
        start_ns = now_ns()
        _sleep(polling, idle_s)
        rest_ns = now_ns()
        say(f"GPU {gpu}: {'watched' if load is None else 'load on and off'} for {seconds:g} s")
        if load is None:
            switches_ns = np.empty((0, 2), np.int64)
            _sleep(polling, seconds)
        else:
            switches_ns = _square_wave(load, polling, seconds, np.random.default_rng(seed))
            _sleep(polling, _TAIL_S)
    profile = evaluate(record(), info, (start_ns, rest_ns), switches_ns)
    if state.processes:
        pids = ", ".join(str(process.pid) for process in state.processes)
        why = f"other processes compute on this GPU ({pids}), so it was not at rest"
        profile = replace(profile, idle_power_w={}, reasons={**profile.reasons, "idle": why})
    return profile


def evaluate(polls: Polls, info: GpuInfo, idle_ns: tuple[int, int], switches_ns: Ints) -> SensorProfile:
    """The profile that `polls` tell of.

    `idle_ns` from and until when the GPU was at rest; `switches_ns` (m, 2) when load went on and off, the first time
    as a warm-up that is not fitted; empty without load.
    """
    reasons: dict[str, str] = {}
    read_ns = polls.end_ns - polls.begin_ns
    instant = _behaviour(polls, polls.instant_mw, switches_ns, "instant", None, reasons)
    # Power follows load as instant power has shown; an average alone cannot tell that from a lag.
    average = _behaviour(polls, polls.average_mw, switches_ns, "average", instant.rise_ns, reasons)
    counter = _counter(polls, reasons)
    idle_w = idle_power_w(_table(polls), 0, *idle_ns)
    for source in ("instant", "counter"):  # the average stands in where both are missing
        if source not in idle_w:
            reasons[f"idle by {source}"] = "too few updates at rest"
    ratio, error = _counter_over(polls, polls.instant_mw, "instant", reasons)
    return SensorProfile(
        uuid=info.uuid,
        name=info.name,
        probed=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=float(polls.end_ns[-1] - polls.begin_ns[0]) / NS_PER_S,
        polls=polls.begin_ns.size,
        read_ns=round(float(np.median(read_ns))),
        read_p99_ns=round(float(np.quantile(read_ns, 0.99))),
        instant=instant,
        average=average,
        counter=counter,
        idle_power_w=idle_w,
        counter_over_instant=ratio,
        counter_over_instant_se=error,
        counter_over_average=_counter_over(polls, polls.average_mw, "average", reasons)[0],
        reasons=reasons,
    )


def _behaviour(
    polls: Polls, value_mw: Floats, switches_ns: Ints, name: str, rise_ns: int | None, reasons: dict[str, str]
) -> Behaviour:
    """Period, window and lag of one power sensor; `reasons` gets why one is missing."""
    if not np.isfinite(value_mw).any():
        reasons[name] = _ABSENT
        return Behaviour()
    result = Behaviour()
    period = find_period(polls.changes(value_mw))
    if isinstance(period, str):
        reasons[f"{name} period"] = period
    else:
        result = replace(result, period_ns=round(period.period_ns), period_spread_ns=round(period.spread_ns))
    if len(switches_ns) < 2:
        reasons[f"{name} window and lag"] = _NO_LOAD
        return result
    # Before the warm-up has ended power was that of an idle card, which is lower than that of a waiting one.
    changes = polls.changes(value_mw, int(switches_ns[0, 1]), int(switches_ns[-1, 1]) + NS_PER_S)
    fit = fit_window(changes, switches_ns, None if rise_ns is None else rise_ns / NS_PER_S)
    if isinstance(fit, str):
        reasons[f"{name} window and lag"] = fit
        return result
    # Somewhere within a read the driver takes the value: a uniform error that the fit cannot see.
    read_s = float(np.median(polls.end_ns - polls.begin_ns)) / NS_PER_S
    return replace(
        result,
        window_ns=round(fit.window_s * NS_PER_S),
        window_se_ns=round(fit.window_se_s * NS_PER_S),
        lag_ns=round(fit.lag_s * NS_PER_S),
        lag_se_ns=round(float(np.hypot(fit.lag_se_s, read_s / np.sqrt(12))) * NS_PER_S),
        rise_ns=round(fit.rise_s * NS_PER_S),
        off_w=fit.low / 1e3,
        on_w=fit.high / 1e3,
        r2=fit.r2,
    )


def _counter(polls: Polls, reasons: dict[str, str]) -> CounterBehaviour:
    """How often the energy counter counts, and in what."""
    known = polls.energy_mj[np.isfinite(polls.energy_mj)]
    if not known.size:
        reasons["counter"] = _ABSENT
        return CounterBehaviour()
    steps_mj = np.diff(known).astype(np.int64)
    steps_mj = steps_mj[steps_mj > 0]
    if not steps_mj.size:
        reasons["counter"] = "it does not move"
        return CounterBehaviour()
    result = CounterBehaviour(resolution_mj=int(np.gcd.reduce(steps_mj)), smallest_step_mj=int(steps_mj.min()))
    period = find_period(polls.changes(polls.energy_mj))
    if isinstance(period, str):
        reasons["counter period"] = period
        return result
    return replace(result, period_ns=round(period.period_ns), period_spread_ns=round(period.spread_ns))


def _counter_over(
    polls: Polls, value_mw: Floats, name: str, reasons: dict[str, str]
) -> tuple[float | None, float | None]:
    """Energy by the counter over the integral of samples, between the counter's first and last change; its error.

    The error is that of a mean over independent updates: what a sensor that sees a part of the time must be allowed.
    """
    known = np.isfinite(value_mw) & np.isfinite(polls.energy_mj)
    t_ns, value_mw, energy_mj = polls.end_ns[known], value_mw[known], polls.energy_mj[known]
    new = np.flatnonzero(np.diff(energy_mj) != 0) + 1
    if new.size < 2:
        return None, None  # why is told with the counter, or with the sensor
    if np.any(np.diff(energy_mj) < 0):
        reasons[f"counter over {name}"] = "the counter decreased"
        return None, None
    first, last = new[0], new[-1]
    integral_mj = float((value_mw[first:last] * np.diff(t_ns[first : last + 1])).sum()) / NS_PER_S
    if integral_mj <= 0:
        reasons[f"counter over {name}"] = "the samples add up to nothing"
        return None, None
    ratio = float(energy_mj[last] - energy_mj[first]) / integral_mj
    updates_mw = find_changes(t_ns, t_ns, value_mw).value
    if updates_mw.size < 2:
        return ratio, None
    return ratio, ratio * float(updates_mw.std() / updates_mw.mean() / np.sqrt(updates_mw.size))


def _table(polls: Polls) -> pl.DataFrame:
    """The polls as `idle_power_w` reads them: all of GPU 0, undated."""
    return pl.DataFrame(
        {
            "t_ns": (polls.begin_ns + polls.end_ns) // 2,
            "sensor_ns": pl.Series([None] * polls.begin_ns.size, dtype=pl.Int64),
            "gpu": np.zeros(polls.begin_ns.size, np.uint16),
            "power_instant_mw": pl.Series(polls.instant_mw, nan_to_null=True),
            "power_average_mw": pl.Series(polls.average_mw, nan_to_null=True),
            "energy_mj": pl.Series(polls.energy_mj, nan_to_null=True).cast(pl.Int64),
        }
    )


@contextlib.contextmanager
def _polling(gpus: Gpus, gpu: int) -> Iterator[tuple[Callable[[], Polls], Future[None]]]:
    """Poll `gpu` in a thread while this lasts; how to get the polls afterwards, and the thread's future.

    Raises what reading raised, also in place of an error that came of it.
    """
    rows: list[tuple[int, int, int | None, int | None, int | None]] = []
    stop = threading.Event()

    def poll() -> None:
        while not stop.is_set():
            begin_ns = now_ns()
            reading = gpus.read(gpu)
            rows.append((begin_ns, now_ns(), reading.power_instant_mw, reading.power_average_mw, reading.energy_mj))
            time.sleep(_PAUSE_S)

    def record() -> Polls:
        times = np.array([row[:2] for row in rows], np.int64)
        values = np.array([row[2:] for row in rows], np.float64)
        return Polls(times[:, 0], times[:, 1], values[:, 0], values[:, 1], values[:, 2])

    with ThreadPoolExecutor(1, "sensors") as pool:
        polling = pool.submit(poll)
        try:
            yield record, polling
        finally:
            stop.set()
        polling.result()


def _sleep(polling: Future[None], seconds: float) -> None:
    """Sleep; shorter when polling has failed. Raises what it raised."""
    with contextlib.suppress(TimeoutError):
        polling.result(seconds)


def _square_wave(load: Load, polling: Future[None], seconds: float, rng: np.random.Generator) -> Ints:
    """Load on and off at random times for `seconds`, after a warm-up; when (m, 2) it was on."""
    switches_ns = [load.burn(_WARM_UP_NS)]
    end_ns = now_ns() + seconds * NS_PER_S
    while now_ns() < end_ns:
        _sleep(polling, rng.uniform(*_SWITCH_NS) / NS_PER_S)
        switches_ns.append(load.burn(round(rng.uniform(*_SWITCH_NS))))
    return np.array(switches_ns, np.int64)


def _info(gpus: Gpus, gpu: int) -> GpuInfo:
    """Who `gpu` is. Raises `GpuError` when there is none."""
    devices = gpus.devices()
    for device in devices:
        if device.gpu == gpu:
            return device
    raise GpuError(f"GPU {gpu} does not exist; this host has {', '.join(str(d.gpu) for d in devices)}")
