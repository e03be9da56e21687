"""What the simulated engine counts, in vLLM's names and Prometheus's text format."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

# Bucket bounds in seconds as in vLLM 0.2x (vllm/v1/metrics/loggers.py).
_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_ITL_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
_E2E_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip


class Histogram:
    """Observations in seconds, counted by bucket."""

    def __init__(self, bounds_s: Sequence[float]) -> None:
        """`bounds_s`: upper bounds, ascending; what lies beyond the last is counted as infinite."""
        self._bounds_s = bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self._bounds_s, seconds)] += 1
        self._sum_s += seconds

    def samples(self) -> Iterator[tuple[str, str, float]]:
        """(suffix, extra label, value) of each sample; buckets are cumulative."""
        total = 0
        for bound, count in zip((*self._bounds_s, "+Inf"), self._counts, strict=True):
            total += count
            yield "_bucket", f',le="{bound}"', total
        yield "_sum", "", self._sum_s
        yield "_count", "", total


@dataclass
class Metrics:
    """Counters and histograms of one engine; times are the engine's own."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    succeeded: int = 0
    ttft: Histogram = field(default_factory=lambda: Histogram(_TTFT_S))
    inter_token: Histogram = field(default_factory=lambda: Histogram(_ITL_S))
    e2e: Histogram = field(default_factory=lambda: Histogram(_E2E_S))
    engine_lag_max_s: float = 0.0  # how far the loop was behind the engine's time, at worst


def render(metrics: Metrics, gauges: Mapping[str, float], preemptions: int, model: str) -> str:
    """The exposition of `metrics` and of the engine's present `gauges` (by vLLM's names without prefix)."""
    escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    labels = f'engine="0",model_name="{escaped}"'
    lines: list[str] = []

    def add(name: str, kind: str, samples: Iterator[tuple[str, str, float]]) -> None:
        lines.append(f"# TYPE {name} {kind}")
        lines.extend(f"{name}{suffix}{{{labels}{extra}}} {value}" for suffix, extra, value in samples)

    for name, value in gauges.items():
        add(f"vllm:{name}", "gauge", iter([("", "", value)]))
    for name, count in (
        ("prompt_tokens", metrics.prompt_tokens),
        ("generation_tokens", metrics.generation_tokens),
        ("num_preemptions", preemptions),
    ):
        add(f"vllm:{name}_total", "counter", iter([("", "", count)]))
    add("vllm:request_success_total", "counter", iter([("", ',finished_reason="length"', metrics.succeeded)]))
    add("vllm:time_to_first_token_seconds", "histogram", metrics.ttft.samples())
    add("vllm:inter_token_latency_seconds", "histogram", metrics.inter_token.samples())
    add("vllm:e2e_request_latency_seconds", "histogram", metrics.e2e.samples())
    add("simulated:engine_lag_seconds_max", "gauge", iter([("", "", metrics.engine_lag_max_s)]))
    return "\n".join(lines) + "\n"
