"""How long a step of the simulated engine takes and what power it draws: a node of GPUs serving one model.

A step is known by its `Work` alone. Its time is a soft maximum of arithmetic and memory traffic, plus
synchronisation and launch; its power is idle power plus terms in the activity of both. When a GPU would exceed
its power cap, its clock falls until it does not, and the step takes longer. The formulas are in `replay.sim.physics`,
every constant lives in `profiles/` beside its source; `docs/simulator.md` says what the model was compared with.

All methods take one step (floats) or many (arrays of one shape).
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from replay.sim.physics import Constants, FloatArray, Response, Thermal, at_lock, idle_w, many_steps, step
from replay.sim.profile import Profile, load_profile
from replay.sim.state import Limits
from tracegen.errors import ReplayError

__all__ = ["FloatArray", "Hardware", "Profile", "Work", "load_profile"]

Values = TypeVar("Values", float, FloatArray)


class Work(NamedTuple, Generic[Values]):
    """What a step does, totals over its requests: each a float or an array of one shape, as in `steps.parquet`."""

    prefill_tokens: Values
    decode_tokens: Values
    context_tokens: Values  # sum of the contexts that decode reads
    prefill_attention: Values  # sum over prefill chunks of chunk x (tokens before it + chunk / 2)


@dataclass(frozen=True)
class Hardware:
    """One tensor-parallel group of `tp` GPUs of `profile`.

    Raises `ReplayError` when the model cannot be cut that way or does not fit.
    """

    profile: Profile
    tp: int

    def __post_init__(self) -> None:
        """Refuse a group that cannot exist."""
        possible = self.profile.tp_sizes()
        if self.tp not in possible:
            use = f"use one of {', '.join(map(str, possible))}" if possible else "it fits at no size"
            raise ReplayError(f"{self.profile.name} cannot run at tensor parallelism {self.tp}; {use}")

    @cached_property
    def kv_tokens(self) -> int:
        """Capacity of the group's KV cache in tokens, whole blocks."""
        return self.profile.kv_tokens(self.tp)

    @property
    def limits(self) -> Limits:
        """What the scheduler of this group's engine keeps to."""
        profile = self.profile
        return Limits(
            self.kv_tokens,
            profile.block_tokens,
            profile.max_num_seqs,
            profile.max_num_batched_tokens,
            profile.enable_prefix_caching,
            priority=profile.scheduling_policy == "priority",
        )

    @cached_property
    def constants(self) -> Constants:
        """The compiled formulas' constants for this group."""
        model, time, power, tp = self.profile.model, self.profile.time, self.profile.power, self.tp
        flops_per_s = tp * time.peak_flops * time.compute_efficiency
        bytes_per_s = tp * time.memory_bytes_per_s * time.memory_efficiency
        # Ring all-reduce of 2-byte activations, twice a layer: each GPU sends 2 (n - 1) / n of them.
        reduced_bytes = 2 * (tp - 1) / tp * 2 * model.layers * 2 * model.hidden_size
        return Constants(
            flops_token_s=2 * model.layer_parameters / flops_per_s,
            flops_attention_s=4 * model.layers * model.attention_size / flops_per_s,
            weights_s=model.step_bytes / bytes_per_s,
            kv_token_s=model.kv_bytes_per_token / bytes_per_s,
            exchange_token_s=reduced_bytes / time.link_bytes_per_s,
            sync_s=model.layers * time.sync_layer_s * (1 if tp > 1 else 1 - time.sync_reduce_share),
            launch_s=time.launch_s,
            sequence_s=time.sequence_s,
            boost_mhz=float(time.boost_mhz),
            sustained_mhz=float(time.sustained_mhz),
            knee=time.traffic_knee_mhz / time.boost_mhz,
            knee_sharpness=float(time.traffic_knee_sharpness),
            overlap_sharpness=float(time.overlap_sharpness),
            **{name: float(value) for name, value in asdict(power).items()},
        )

    @cached_property
    def thermal(self) -> Thermal:
        """How the group's GPUs warm up."""
        return Thermal(**{name: float(value) for name, value in asdict(self.profile.thermal).items()})

    def run_step(self, work: Work[float], clock_mhz: float, hot: float = 1.0, cap_w: float | None = None) -> Response:
        """One step with the clock locked to `clock_mhz`.

        `hot` multiplies the power: what leakage adds. `cap_w`: another power cap of a GPU than the profile's.
        """
        c = self.constants if cap_w is None else self.constants._replace(cap_w=float(cap_w))
        found: Response = step(c, at_lock(c, float(clock_mhz)), hot, *map(float, work))
        return found

    def step_s(self, work: Work[Values], clock_mhz: float | Values) -> Values:
        """Duration of a step, s, with the clock locked to `clock_mhz`."""
        return self._respond(work, clock_mhz, 1.0)[0]

    def step_w(self, work: Work[Values], clock_mhz: float | Values) -> Values:
        """Mean power of the whole group during a step, W."""
        return self.tp * self._respond(work, clock_mhz, 1.0)[1]

    def step_j(self, work: Work[Values], clock_mhz: float | Values, hot: float | Values = 1.0) -> Values:
        """Energy of the whole group during a step, J: power, times `hot` below the cap, x duration."""
        duration_s, gpu_w, _ = self._respond(work, clock_mhz, hot)
        return duration_s * (self.tp * gpu_w)

    def idle_w(self, clock_mhz: float, *, loaded: bool = True) -> float:
        """Power of one GPU that does nothing, W, with the model in its memory or without."""
        return float(idle_w(self.constants, float(clock_mhz))) if loaded else float(self.profile.power.idle_unloaded_w)

    def effective_mhz(self, work: Work[Values], clock_mhz: float | Values) -> Values:
        """The clock that a step really runs at, MHz: the lock, unless load or the power cap hold it lower."""
        return self._respond(work, clock_mhz, 1.0)[2]

    def _respond(
        self, work: Work[Values], clock_mhz: float | Values, hot: float | Values
    ) -> tuple[Values, Values, Values]:
        """Duration, s, power of one GPU, W, and the clock that was held, MHz."""
        arrays = np.broadcast_arrays(*work, clock_mhz, hot)
        flat = np.stack([array.reshape(-1) for array in arrays]).astype(float)
        out = np.empty((3, flat.shape[1]))
        if out.size:
            many_steps(self.constants, flat[:4], flat[4], flat[5], out)
        found: Any = out.reshape(3, *arrays[0].shape) if arrays[0].shape else (float(row[0]) for row in out)
        duration_s, gpu_w, held_mhz = found
        return duration_s, gpu_w, held_mhz
