"""What of vLLM's command line the simulated engine knows: the options that change which request is in which step."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from replay.sim.profile import Profile
from tracegen.errors import ReplayError


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ReplayError(f"--vllm-arg for the simulated engine: {message}")


def _parser() -> _Parser:
    parser = _Parser(prog="", add_help=False, allow_abbrev=False)
    for name in ("--max-num-seqs", "--max-num-batched-tokens", "--max-model-len"):
        parser.add_argument(name, type=int)
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
    parser.add_argument("--scheduling-policy", choices=("fcfs", "priority"))
    return parser


def capped(profile: Profile, power_cap_w: float | None) -> Profile:
    """`profile` with this power cap, W, on each GPU. Raises `ReplayError` for one that its GPUs do not take."""
    if power_cap_w is None:
        return profile
    low, high = profile.power_caps_w
    if not low <= power_cap_w <= high:
        raise ReplayError(f"--power-cap {power_cap_w:g}: a simulated {profile.gpu_name} takes {low:g} to {high:g} W")
    return replace(profile, power=replace(profile.power, cap_w=power_cap_w))


def with_arguments(profile: Profile, arguments: Sequence[str]) -> Profile:
    """`profile` as `vllm serve` with these `arguments` would run it.

    Raises `ReplayError` for an argument that the simulated engine does not know, and for a value that cannot be.
    """
    found = {name: value for name, value in vars(_parse(arguments)).items() if value is not None}
    for name, value in found.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
            raise ReplayError(f"--vllm-arg --{name.replace('_', '-')} {value}: must be above 0")
    if (utilization := found.pop("gpu_memory_utilization", None)) is not None:
        if utilization > 1:
            raise ReplayError(f"--vllm-arg --gpu-memory-utilization {utilization}: is a share, at most 1")
        found["memory"] = replace(profile.memory, utilization=utilization)
    served = replace(profile, **found)
    if utilization is not None and not served.kv_tokens(profile.gpus_per_node):
        raise ReplayError(
            f"--vllm-arg --gpu-memory-utilization {utilization}: {profile.name} holds no KV cache at this utilization, "
            "on any number of its GPUs; give more"
        )
    return served


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    # `--vllm-arg "--max-num-seqs 64"` comes as one word.
    words = [word for argument in arguments for word in argument.split()]
    known, unknown = _parser().parse_known_args(words)
    if unknown:
        names = ", ".join(action.option_strings[0] for action in _parser()._actions)  # noqa: SLF001 - no other way
        raise ReplayError(f"--vllm-arg {unknown[0]}: the simulated engine knows {names} only")
    return known
