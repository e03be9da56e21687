"""How long a step of the simulated engine takes and what power it draws: a node of GPUs serving one model.

A step is known by its `Work` alone. Its time is a soft maximum of arithmetic and memory traffic, plus
synchronisation and launch; its power is idle power plus terms in the activity of both. When a GPU would exceed
its power cap, its clock falls until it does not, and the step takes longer. Every constant lives in
`profiles/NAME.toml` beside its source; `docs/simulator.md` says what the model was compared with.

All functions take one step (floats) or many (arrays of one shape).
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from tracegen.errors import ReplayError

FloatArray = npt.NDArray[np.float64]
Values = TypeVar("Values", float, FloatArray)

_CAP_ITERATIONS = 5  # secant steps; the capped power is then the cap to rounding


class Work(NamedTuple, Generic[Values]):
    """What a step does, totals over its requests: each a float or an array of one shape, as in `steps.parquet`."""

    prefill_tokens: Values
    decode_tokens: Values
    context_tokens: Values  # sum of the contexts that decode reads
    prefill_attention: Values  # sum over prefill chunks of chunk x (tokens before it + chunk / 2)


class ClockRange(NamedTuple):
    """The SM clocks a GPU can be locked to, in MHz: `min`, `min + step`, ..., `max`."""

    min: int
    max: int
    step: int


@dataclass(frozen=True)
class ModelShape:
    """What of the served model sets its work."""

    parameters: float
    layers: int
    hidden_size: int
    kv_heads: int
    weight_bytes: float
    kv_bytes_per_token: float


@dataclass(frozen=True)
class MemoryModel:
    """How much of a GPU's memory the engine uses."""

    gpu_bytes: float
    utilization: float
    reserve_bytes: float  # activations, graphs, communication buffers; per GPU


@dataclass(frozen=True)
class TimeModel:
    """Constants of the step time; see `Hardware.step_s`."""

    peak_flops: float  # per GPU at `boost_mhz`
    boost_mhz: float
    sustained_mhz: float  # the highest clock held under load, whatever the lock
    compute_efficiency: float
    memory_bytes_per_s: float  # per GPU
    memory_efficiency: float
    traffic_knee_mhz: float  # below it, traffic to memory and between GPUs slows with the clock
    traffic_knee_sharpness: float
    overlap_sharpness: float
    link_bytes_per_s: float  # all-reduce, per GPU
    sync_s: float  # per step at `boost_mhz`: small kernels and the latency of all-reduces; follows the clock
    launch_s: float  # per step: the CPU's part
    sequence_s: float  # per decode token: scheduling and sampling


@dataclass(frozen=True)
class PowerModel:
    """Constants of the power of one GPU; see `Hardware.step_w`."""

    cap_w: float
    idle_unloaded_w: float
    idle_loaded_w: float  # added by a loaded model at `boost_mhz`
    idle_exponent: float
    awake_w: float
    core_w: float
    core_clock_exponent: float
    memory_w: float
    compute_w: float
    memory_exponent: float
    compute_exponent: float
    compute_clock_exponent: float


@dataclass(frozen=True)
class SensorModel:
    """How the simulated power sensors behave."""

    period_ns: int
    window_ns: int
    lag_ns: int
    average_window_ns: int
    noise_rel: float
    phases_ns: tuple[int, ...]  # when, within a period, each GPU's sensor updates


@dataclass(frozen=True)
class Profile:
    """One kind of node serving one model."""

    name: str
    gpu_name: str
    gpus_per_node: int
    memory_clock_mhz: int
    clocks_mhz: ClockRange
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_tokens: int
    model: ModelShape
    memory: MemoryModel
    time: TimeModel
    power: PowerModel
    sensor: SensorModel


def profile_names() -> list[str]:
    """The profiles that come with the package."""
    return sorted(path.name.removesuffix(".toml") for path in _profiles().iterdir() if path.name.endswith(".toml"))


def load_profile(name: str) -> Profile:
    """The profile `name`. Raises `ReplayError` when there is none of that name."""
    if name not in profile_names():
        raise ReplayError(f"no simulated hardware '{name}'; there is {', '.join(profile_names())}")
    return _parse_profile(name, tomllib.loads(_profiles().joinpath(f"{name}.toml").read_text(encoding="utf-8")))


def _parse_profile(name: str, document: Mapping[str, Any]) -> Profile:
    """The profile that a profile file's parsed `document` describes."""
    sensor = {**document["sensor"], "phases_ns": tuple(document["sensor"]["phases_ns"])}
    return Profile(
        name=name,
        gpu_name=document["gpu_name"],
        gpus_per_node=document["gpus_per_node"],
        memory_clock_mhz=document["memory_clock_mhz"],
        clocks_mhz=ClockRange(**document["clocks_mhz"]),
        **document["engine"],
        model=ModelShape(**document["model"]),
        memory=MemoryModel(**document["memory"]),
        time=TimeModel(**document["time"]),
        power=PowerModel(**document["power"]),
        sensor=SensorModel(**sensor),
    )


def _profiles() -> Any:
    return files("replay.sim").joinpath("profiles")


@dataclass(frozen=True)
class Hardware:
    """One tensor-parallel group of `tp` GPUs of `profile`.

    Raises `ReplayError` when the model cannot be cut that way or does not fit.
    """

    profile: Profile
    tp: int

    def __post_init__(self) -> None:
        """Refuse a group that cannot exist."""
        profile = self.profile
        possible = [
            str(tp)
            for tp in range(1, profile.gpus_per_node + 1)
            if profile.model.kv_heads % tp == 0 and _kv_tokens(profile, tp) >= profile.max_model_len
        ]
        if str(self.tp) not in possible:
            raise ReplayError(
                f"{profile.name} cannot run at tensor parallelism {self.tp}; use one of {', '.join(possible)}"
            )

    @cached_property
    def kv_tokens(self) -> int:
        """Capacity of the group's KV cache in tokens, whole blocks."""
        return _kv_tokens(self.profile, self.tp)

    def step_s(self, work: Work[Values], clock_mhz: float | Values) -> Values:
        """Duration of a step, s, with the clock locked to `clock_mhz`."""
        return self._state(work, clock_mhz)[0]

    def step_w(self, work: Work[Values], clock_mhz: float | Values) -> Values:
        """Mean power of the whole group during a step, W."""
        return self._state(work, clock_mhz)[1]

    def step_j(self, work: Work[Values], clock_mhz: float | Values) -> Values:
        """Energy of the whole group during a step, J: power x duration."""
        duration_s, power_w = self._state(work, clock_mhz)
        return duration_s * power_w

    def idle_w(self, clock_mhz: float, *, loaded: bool = True) -> float:
        """Power of one GPU that does nothing, W, with the model in its memory or without."""
        power = self.profile.power
        if not loaded:
            return power.idle_unloaded_w
        return float(_idle_w(power, min(clock_mhz, self.profile.time.sustained_mhz) / self.profile.time.boost_mhz))

    def effective_mhz(self, work: Work[Values], clock_mhz: float | Values) -> Values:
        """The clock that a step really runs at, MHz: the lock, unless load or the power cap hold it lower."""
        return self._clock_fraction(_demand(self.profile, self.tp, work), clock_mhz) * self.profile.time.boost_mhz

    def _state(self, work: Work[Values], clock_mhz: float | Values) -> tuple[Values, Values]:
        """Duration, s, and power of the group, W."""
        demand = _demand(self.profile, self.tp, work)
        x = self._clock_fraction(demand, clock_mhz)
        duration_s, power_w = _respond(self.profile, demand, x)
        return duration_s, self.tp * power_w

    def _clock_fraction(self, demand: "_Demand[Values]", clock_mhz: float | Values) -> Values:
        """The step's clock as a fraction of the boost clock: the highest one allowed that keeps the power cap."""
        time, cap_w = self.profile.time, self.profile.power.cap_w
        high: Values = np.minimum(clock_mhz, time.sustained_mhz) / time.boost_mhz
        power_w = _respond(self.profile, demand, high)[1]
        over = np.asarray(power_w > cap_w)
        if not over.any():
            return high
        if over.ndim == 0:
            return _solve_cap(self.profile, demand, high, power_w)
        # Few steps reach the cap: solve for these alone.
        solved: Any = np.broadcast_to(high, over.shape).copy()
        capped: _Demand[Any] = _Demand(*(np.broadcast_to(part, over.shape)[over] for part in demand))
        solved[over] = _solve_cap(self.profile, capped, solved[over], np.asarray(power_w)[over])
        fraction: Values = solved
        return fraction


class _Demand(NamedTuple, Generic[Values]):
    """The parts of a step's time at the boost clock, s."""

    compute_s: Values  # arithmetic
    memory_s: Values  # HBM traffic
    exchange_s: Values  # moving activations between the GPUs
    launch_s: Values  # the CPU's part


def _demand(profile: Profile, tp: int, work: Work[Values]) -> _Demand[Values]:
    """What `work` asks of each of `tp` GPUs; no work still asks for the pass over the weights."""
    model, time = profile.model, profile.time
    tokens = work.prefill_tokens + work.decode_tokens
    attended = work.prefill_attention + work.context_tokens
    flops = 2 * model.parameters * tokens + 4 * model.layers * model.hidden_size * attended
    moved = model.weight_bytes + model.kv_bytes_per_token * (work.context_tokens + tokens)
    # Ring all-reduce of 2-byte activations, twice a layer: each GPU sends 2 (n - 1) / n of them.
    reduced = 2 * (tp - 1) / tp * 2 * model.layers * 2 * model.hidden_size * tokens
    return _Demand(
        flops / (tp * time.peak_flops * time.compute_efficiency),
        moved / (tp * time.memory_bytes_per_s * time.memory_efficiency),
        reduced / time.link_bytes_per_s,
        time.launch_s + time.sequence_s * work.decode_tokens,
    )


def _respond(profile: Profile, demand: _Demand[Values], x: Values) -> tuple[Values, Values]:
    """Duration of a step, s, and power of one GPU, W, at `x` of the boost clock, without the cap."""
    time, power = profile.time, profile.power
    q, p = time.traffic_knee_sharpness, time.overlap_sharpness
    knee = time.traffic_knee_mhz / time.boost_mhz
    slower = (1 + (knee / x) ** q) ** (1 / q)  # 1 above the knee, knee / x below
    compute_s, memory_s, exchange_s = demand.compute_s / x, demand.memory_s * slower, demand.exchange_s * slower
    overlapped_s = (compute_s**p + memory_s**p) ** (1 / p)
    duration_s: Values = overlapped_s + exchange_s + time.sync_s / x + demand.launch_s
    core_w = power.awake_w + power.core_w * x**power.core_clock_exponent
    compute_w = power.compute_w * x**power.compute_clock_exponent * (compute_s / duration_s) ** power.compute_exponent
    memory_w = power.memory_w * (demand.memory_s / duration_s) ** power.memory_exponent
    total_w: Values = _idle_w(power, x) + core_w + compute_w + memory_w
    return duration_s, total_w


def _idle_w(power: PowerModel, x: Values) -> Values:
    """Power of one loaded GPU that does nothing, W, at `x` of the boost clock."""
    total_w: Values = power.idle_unloaded_w + power.idle_loaded_w * x**power.idle_exponent
    return total_w


def _solve_cap(profile: Profile, demand: _Demand[Values], high: Values, power_high: Values) -> Values:
    """The clock fraction at which one GPU draws its cap, where at `high` it draws `power_high`, W, above the cap.

    Power grows with the clock nearly as a power law, so a secant in log-log converges in a few steps.
    """
    target = np.log(profile.power.cap_w)
    x0, y0 = np.log(high), np.log(power_high) - target
    x1 = x0 - y0  # as if power were proportional to the clock
    for _ in range(_CAP_ITERATIONS):
        y1 = np.log(_respond(profile, demand, np.exp(x1))[1]) - target
        # Where both ordinates agree to the last bit the root is reached, and any slope will do.
        slope = (y1 - y0) / np.where(x1 == x0, 1.0, x1 - x0)
        x0, y0, x1 = x1, y1, x1 - y1 / np.where(y1 == y0, 1.0, slope)
    fraction: Values = np.exp(x1)
    return fraction


def _kv_tokens(profile: Profile, tp: int) -> int:
    """Tokens that fit in the memory that weights leave on `tp` GPUs, in whole blocks."""
    memory, model = profile.memory, profile.model
    free = tp * (memory.gpu_bytes * memory.utilization - memory.reserve_bytes) - model.weight_bytes
    return max(0, int(free / model.kv_bytes_per_token) // profile.block_tokens * profile.block_tokens)
