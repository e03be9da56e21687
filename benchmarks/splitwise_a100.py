"""Compare the simulated DGX-A100 (and, for scale, the DGX-H100) with Splitwise's measured step times.

    python benchmarks/splitwise_a100.py

Published: Patel et al., "Splitwise", ISCA'24, data/perf_model.csv of the repository Mutinifni/splitwise-sim: medians
of the rows of llama2-70b with 128 output tokens; prefill of one prompt, decode with prompts of 512 tokens. Its vLLM
is of 2023 and was started without chunked prefill.
"""

from replay.sim.hardware import Hardware, Work, load_profile
from tracegen.console import print_table, say

# ms by prompt tokens, batch 1
PREFILL_MS = {
    "dgx-a100": {
        2: {512: 196.9, 1024: 377.1, 2048: 688.1, 4096: 1485.3, 8192: 2990.2},
        4: {512: 127.0, 1024: 227.1, 2048: 403.3, 4096: 965.2, 8192: 2278.5},
        8: {512: 94.3, 1024: 154.5, 2048: 274.2, 4096: 661.2, 8192: 1549.8},
    },
    "dgx-h100": {
        2: {512: 83.8, 1024: 158.0, 2048: 310.3, 4096: 642.7, 8192: 1339.8},
        4: {512: 59.6, 1024: 105.6, 2048: 200.7, 4096: 463.5, 8192: 953.6},
        8: {512: 53.4, 1024: 77.9, 2048: 136.8, 4096: 390.3, 8192: 844.9},
    },
}
# ms by batch
TBT_MS = {
    "dgx-a100": {
        2: {1: 54.9, 2: 59.9, 4: 60.5, 8: 61.7, 16: 65.5, 32: 72.2},
        4: {1: 45.0, 2: 45.0, 4: 45.1, 8: 45.8, 16: 48.5, 32: 52.3, 64: 72.9},
        8: {1: 44.9, 2: 44.6, 4: 45.8, 8: 46.5, 16: 50.4, 32: 53.0, 64: 71.6},
    },
    "dgx-h100": {
        2: {1: 37.0, 2: 37.4, 4: 40.0, 8: 40.4, 16: 42.0, 32: 52.3},
        4: {1: 29.7, 2: 30.0, 4: 29.9, 8: 31.4, 16: 32.8, 32: 36.9, 64: 52.4},
        8: {1: 29.8, 2: 30.3, 4: 31.8, 8: 32.5, 16: 34.2, 32: 38.6, 64: 50.2},
    },
}
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 128


def prefill(tokens: int) -> Work[float]:
    """One prompt in one step."""
    return Work(float(tokens), 0.0, 0.0, tokens**2 / 2)


def decode(batch: int) -> Work[float]:
    """The middle one of the decode steps."""
    return Work(0.0, float(batch), batch * (PROMPT_TOKENS + OUTPUT_TOKENS / 2), 0.0)


def main() -> None:
    """Print one table for each node."""
    for node, by_tp in PREFILL_MS.items():
        profile, rows = load_profile(node, "llama-2-70b"), []
        for tp, published in by_tp.items():
            hardware = Hardware(profile, tp)
            steps = [(f"TP{tp} prefill, {n} tokens", ms, prefill(n)) for n, ms in published.items()]
            steps += [(f"TP{tp} decode, batch {batch}", ms, decode(batch)) for batch, ms in TBT_MS[node][tp].items()]
            for name, ms, work in steps:
                found_ms = 1e3 * hardware.step_s(work, profile.clocks_mhz.max)
                watts = hardware.step_w(work, profile.clocks_mhz.max) / tp
                rows.append([name, f"{ms:.1f}", f"{found_ms:.1f}", f"{found_ms / ms - 1:+.1%}", f"{watts:.0f}"])
        say(f"{profile.name}, {profile.clocks_mhz.max} MHz")
        print_table(("step", "published ms", "simulated ms", "error", "W per GPU"), rows)
        say()


if __name__ == "__main__":
    main()
