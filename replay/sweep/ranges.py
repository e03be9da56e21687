"""Lists and ranges as users type them: `1,2,4`, `800:1980:200`, `800:1400:200,unlocked`."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from tracegen.errors import ReplayError

UNLOCKED = "unlocked"  # the driver's own clocks
_MOST = 10_000  # values of one range; more are a slip of the finger
Value = TypeVar("Value")


def parse_clocks(option: str, text: str) -> tuple[int | None, ...]:
    """Clocks in MHz in the order given, None for `unlocked`; a range FROM:TO:STEP has both its ends.

    A value that comes twice is kept once. Raises `ReplayError` that names `option` for anything else.
    """
    parts: list[int | None] = []
    for part in _parts(option, text):
        if part == UNLOCKED:
            parts.append(None)
        elif ":" in part:
            parts += _range(option, part)
        else:
            parts.append(_whole(option, part))
    return unique(parts)


def parse_whole(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers above 0. Raises `ReplayError` that names `option` for anything else."""
    return unique([_whole(option, part) for part in _parts(option, text)])


def parse_numbers(option: str, text: str) -> tuple[float, ...]:
    """Finite numbers above 0. Raises `ReplayError` that names `option` for anything else."""
    return unique([_number(option, part) for part in _parts(option, text)])


def unique(values: Sequence[Value]) -> tuple[Value, ...]:
    """`values` without repetitions, in their order."""
    return tuple(dict.fromkeys(values))


def _parts(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ReplayError(f"{option} '{text}': has an empty place; give values separated by commas, such as 1,2")
    return parts


def _range(option: str, text: str) -> list[int]:
    """`FROM:TO:STEP` with both ends."""
    ends = text.split(":")
    if len(ends) != 3:
        raise ReplayError(f"{option} {text}: is no range; give FROM:TO:STEP, such as 800:1980:200")
    low, high, step = (_whole(option, end) for end in ends)
    if low > high:
        raise ReplayError(f"{option} {text}: begins above its end; give FROM:TO:STEP, such as 800:1980:200")
    if (high - low) // step >= _MOST:
        raise ReplayError(f"{option} {text}: has more than {_MOST:,} values; give a wider step")
    return [*range(low, high, step), high]


def _whole(option: str, text: str) -> int:
    return _checked(option, text, int, "a whole number")


def _number(option: str, text: str) -> float:
    return _checked(option, text, float, "a number")


def _checked(option: str, text: str, kind: Callable[[str], Value], what: str) -> Value:
    try:
        value = kind(text)
    except ValueError:
        raise ReplayError(f"{option} {text}: is not {what}") from None
    if not 0 < float(value) < math.inf:  # type: ignore[arg-type]
        raise ReplayError(f"{option} {text}: must be above 0")
    return value
