"""Durations as users type them: `90`, `90s`, `5m`, `1.5h`, `2d`, `250ms`."""

import re

from tracegen.errors import TraceError

NS_PER_S = 1_000_000_000
_UNITS_NS = {"ms": 1_000_000, "s": NS_PER_S, "m": 60 * NS_PER_S, "h": 3600 * NS_PER_S, "d": 86400 * NS_PER_S}
_PATTERN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")


def parse_duration_ns(text: str, *, zero_ok: bool = False) -> int:
    """Nanoseconds of `text`; a bare number means seconds.

    Raises `TraceError` for anything else, for what int64 cannot hold (292 years), and for zero unless `zero_ok`.
    """
    match = _PATTERN.fullmatch(text.strip())
    exact_ns = float(match[1]) * _UNITS_NS[match[2] or "s"] if match else -1.0
    if not 0 <= exact_ns < 2**63 or (round(exact_ns) == 0 and not zero_ok):
        raise TraceError(f"'{text}' is not a duration: use a positive number with ms, s, m, h or d, for example 5m")
    return round(exact_ns)


def format_duration(ns: int) -> str:
    """`ns` in its largest fitting unit, for people: `5m`, `2.5h`, `320ms`."""
    for unit in ("d", "h", "m", "s"):
        if ns >= _UNITS_NS[unit]:
            return f"{ns / _UNITS_NS[unit]:.4g}{unit}"
    return f"{ns / _UNITS_NS['ms']:.4g}ms"


def exact_duration(ns: int) -> str:
    """`ns` as a command takes it, to the nanosecond (where a double holds it)."""
    whole, rest = divmod(ns, NS_PER_S)
    return f"{whole}s" if not rest else f"{ns / 1e6:.6f}".rstrip("0").rstrip(".") + "ms"
