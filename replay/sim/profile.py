"""The constants of the simulated engine: one kind of node serving one model.

A node's constants live in a TOML file, each beside its source: `profiles/nodes/NAME.toml`, or a file of the user's own
in the same format, as `replay sim calibrate` writes it. `replay.sim.models` knows the models. What was not measured
for a combination is said in `Profile.assumed`.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from replay.sim.models import DEFAULT_MODEL, ModelShape, load_model, model_names, shipped_twin
from replay.sim.node_values import check_values
from tracegen.errors import ReplayError

DEFAULT_HARDWARE = "dgx-h100"


class ClockRange(NamedTuple):
    """The SM clocks a GPU can be locked to, in MHz: `min`, `min + step`, ..., `max`."""

    min: int
    max: int
    step: int


@dataclass(frozen=True)
class EngineModel:
    """The engine's own limits, as its defaults are on this hardware."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_tokens: int


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
    sync_layer_s: float  # per layer at `boost_mhz`: small kernels and the latency of all-reduces; follows the clock
    sync_reduce_share: float  # the all-reduces' share of it, which a single GPU does not have
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
    memory_w: float
    compute_w: float
    memory_exponent: float
    compute_exponent: float
    voltage_rise: float  # of the square of the cores' voltage, from its floor to its ceiling, over the floor's
    voltage_mhz: float  # the middle of that ramp
    voltage_width_mhz: float

    @property
    def caps_w(self) -> tuple[float, float]:
        """The lowest and the highest power cap of a GPU: above what it draws in a step without work, and its own."""
        return float(math.ceil(self.idle_unloaded_w + self.idle_loaded_w + self.awake_w)), float(self.cap_w)


@dataclass(frozen=True)
class SensorModel:
    """How the simulated power sensors behave."""

    period_ns: int
    window_ns: int
    lag_ns: int
    average_window_ns: int
    noise_rel: float
    phases_ns: tuple[int, ...]  # when, within a period, each GPU's sensor updates
    gain_error_rel: float = 0.0  # each board shows up to this share more or less than it draws, always the same


@dataclass(frozen=True)
class ThermalModel:
    """How a GPU warms up and what that costs: a first-order lag to `ambient_c + resistance_c_per_w` x power.

    `leakage_per_c` is the share that each degree above `reference_c` adds to the power; 0 turns leakage off.
    """

    ambient_c: float = 25.0
    resistance_c_per_w: float = 0.05
    time_constant_s: float = 20.0
    leakage_per_c: float = 0.0
    reference_c: float = 50.0


@dataclass(frozen=True)
class Node:
    """A kind of node, as its file describes it."""

    gpu_name: str
    gpus_per_node: int
    memory_clock_mhz: int
    clocks_mhz: ClockRange
    engine: EngineModel
    memory: MemoryModel
    time: TimeModel
    power: PowerModel
    sensor: SensorModel
    thermal: ThermalModel = ThermalModel()
    assumed: tuple[str, ...] = ()  # what is carried over from other hardware, in words
    calibrated_on: tuple[str, ...] = ()  # the models whose measurements the constants were fitted to
    simulated: bool = False  # whether those were no measurements but simulated runs


@dataclass(frozen=True)
class Profile:
    """One kind of node serving one model."""

    hardware: str  # as it was asked for: a name or a file
    model_name: str
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
    thermal: ThermalModel = ThermalModel()
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"  # or priority
    calibrated: bool = False
    assumed: tuple[str, ...] = ()  # what was not measured for this node and model, in words

    @property
    def name(self) -> str:
        """The combination, in words."""
        return f"{self.model_name} on {self.hardware}"

    @property
    def power_caps_w(self) -> tuple[float, float]:
        """The lowest and the highest power cap of a GPU; see `PowerModel.caps_w`."""
        return self.power.caps_w

    def kv_tokens(self, tp: int) -> int:
        """Tokens that fit in the memory that weights leave on `tp` GPUs, in whole blocks."""
        memory, model = self.memory, self.model
        free = tp * (memory.gpu_bytes * memory.utilization - memory.reserve_bytes) - model.weight_bytes
        return max(0, int(free / model.kv_bytes_per_token) // self.block_tokens * self.block_tokens)

    def tp_sizes(self) -> tuple[int, ...]:
        """The tensor-parallel sizes that cut the model evenly and hold it with one request of full length."""
        model = self.model
        return tuple(
            tp
            for tp in range(1, self.gpus_per_node + 1)
            if not any(size % tp for size in (model.heads, model.kv_heads, model.intermediate_size))
            and self.kv_tokens(tp) >= self.max_model_len
        )


def hardware_names() -> list[str]:
    """The kinds of nodes that come with the package."""
    return sorted(path.name.removesuffix(".toml") for path in _folder().iterdir() if path.name.endswith(".toml"))


def load_profile(hardware: str = DEFAULT_HARDWARE, model: str = DEFAULT_MODEL) -> Profile:
    """The constants for `model` (see `load_model`) on `hardware`, a shipped name or a TOML file.

    Raises `ReplayError` for hardware or a model that is not known, cannot be read or makes no sense.
    """
    node, served = load_node(hardware), load_model(model)
    hardware = hardware.lower() if hardware.lower() in hardware_names() else hardware
    fits = not {served.name, shipped_twin(served.shape)}.isdisjoint(node.calibrated_on)
    calibrated = fits and not node.simulated
    assumed = [*node.assumed, *served.assumed]
    if node.simulated:
        assumed.insert(0, f"uncalibrated: the constants of {hardware} were fitted to simulated runs")
    if not fits and node.calibrated_on:
        fitted = ", ".join(node.calibrated_on)
        assumed.insert(
            0,
            f"uncalibrated: constants fitted to {fitted} on {hardware}, the CPU's part of each step included, are "
            f"carried over to {served.name}",
        )
    elif not fits:
        assumed.insert(0, f"uncalibrated: {hardware} was not calibrated as a whole")
    return Profile(
        hardware=hardware,
        model_name=served.name,
        gpu_name=node.gpu_name,
        gpus_per_node=node.gpus_per_node,
        memory_clock_mhz=node.memory_clock_mhz,
        clocks_mhz=node.clocks_mhz,
        max_model_len=served.max_model_len,
        **asdict(node.engine),
        model=served.shape,
        memory=node.memory,
        time=node.time,
        power=node.power,
        sensor=node.sensor,
        thermal=node.thermal,
        calibrated=calibrated,
        assumed=tuple(assumed),
    )


def load_node(hardware: str) -> Node:
    """The node `hardware`, a shipped name or a TOML file. Raises `ReplayError` when it cannot be had."""
    if hardware.lower() in hardware_names():
        text = _folder().joinpath(f"{hardware.lower()}.toml").read_text(encoding="utf-8")
    elif hardware.endswith(".toml"):
        try:
            text = Path(hardware).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ReplayError(f"--hardware {hardware}: cannot be read ({why})") from None
    else:
        raise ReplayError(
            f"--hardware {hardware}: use {', '.join(hardware_names())}, or a TOML file in the format of theirs"
        )
    try:
        return parse_node(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ReplayError) as error:
        raise ReplayError(f"--hardware {hardware}: {error}") from None


def parse_node(document: Mapping[str, Any]) -> Node:
    """The node that a hardware file's parsed `document` describes.

    `[calibration]` names in `models` what the constants were fitted to, in `simulated` whether those runs were
    simulated, and may say anything else besides. Raises `ReplayError` that names the key for one that is unknown,
    missing, of the wrong type or without sense.
    """
    calibration = document.get("calibration", {"models": []})
    _check_keys("[calibration]", calibration, None, required=("models",))
    simulated = calibration.get("simulated", False)
    if not isinstance(simulated, bool):
        raise ReplayError(f"[calibration] simulated = {simulated!r}: must be true or false")
    flat = {**document, "calibrated_on": calibration["models"], "simulated": simulated}
    flat.pop("calibration", None)
    _check_keys("the file", flat, Node)
    for section in _sections():
        if section.name in flat:
            _check_keys(f"[{section.name}]", flat[section.name], section.type)
    _check_keys("clocks_mhz", flat["clocks_mhz"], None, required=ClockRange._fields)
    try:
        flat["clocks_mhz"] = [flat["clocks_mhz"][key] for key in ClockRange._fields]
        node = msgspec.convert(flat, Node)
    except msgspec.ValidationError as error:
        raise ReplayError(str(error).replace("`$.", "`")) from None
    check_values(node)
    return node


def combinations() -> list[dict[str, Any]]:
    """What comes with the package, each node with each model: the sizes that fit, and what is assumed."""
    profiles = [load_profile(hardware, model) for hardware in hardware_names() for model in model_names()]
    return [
        {
            "hardware": profile.hardware,
            "model": profile.model_name,
            "tp_sizes": list(profile.tp_sizes()),
            "weights_gb": profile.model.weight_bytes / 1e9,
            "max_model_len": profile.max_model_len,
            "calibrated": profile.calibrated,
            "assumed": list(profile.assumed),
        }
        for profile in profiles
    ]


def constants(profile: Profile) -> dict[str, Any]:
    """Everything that `profile` is, ready for JSON, so that a run can be computed again when files have changed."""
    return asdict(profile)


def profile_of_constants(document: Mapping[str, Any]) -> Profile:
    """The profile that `constants` wrote down. Raises `ReplayError` when it is none."""
    try:
        return msgspec.convert(document, Profile)
    except msgspec.ValidationError as error:
        raise ReplayError(f"not a simulated profile: {error}") from None


def _sections() -> list[Any]:
    """The tables of a hardware file."""
    return [field for field in fields(Node) if hasattr(field.type, "__dataclass_fields__")]


def _check_keys(where: str, table: Any, kind: Any, *, required: tuple[str, ...] = ()) -> None:
    """Raise `ReplayError` unless `table` has the keys of the dataclass `kind`, or those `required`, and no others."""
    if not isinstance(table, Mapping):
        raise ReplayError(f"{where} must be a table")
    known = fields(kind) if kind is not None else ()
    needed = set(required) | {field.name for field in known if _needed(field)}
    missing = sorted(needed - set(table))
    if missing:
        raise ReplayError(f"{where} lacks {', '.join(missing)}")
    unknown = sorted(set(table) - {field.name for field in known}) if kind is not None else []
    if unknown:
        raise ReplayError(f"{where} has unknown keys: {', '.join(unknown)}")


def _needed(field: Any) -> bool:
    """Whether a dataclass field has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def _folder() -> Any:
    return files("replay.sim").joinpath("profiles", "nodes")
