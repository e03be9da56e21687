"""How late does a sleep end: replay's timerfd against asyncio's own timer, which load generators use.

    python benchmarks/timer.py [SLEEPS]

Both run in turns within one event loop (uvloop, as replay has it), on the same random intervals, while the machine
does whatever it does. Prints microseconds and the ratio.
"""

import asyncio
import sys

import numpy as np
import uvloop

from replay.clock import NS_PER_S, SleepTimer, now_ns

MEAN_NS = 3_000_000


async def measure(sleeps: int) -> dict[str, list[int]]:
    """Lateness of each sleep, ns, by way of sleeping."""
    late: dict[str, list[int]] = {"asyncio.sleep": [], "timerfd": []}
    with SleepTimer() as timer:
        for interval in np.random.default_rng(0).exponential(MEAN_NS, sleeps).astype(int):
            for name, results in late.items():
                due_ns = now_ns() + int(interval)
                if name == "timerfd":
                    await timer.sleep_until_ns(due_ns)
                else:
                    await asyncio.sleep((due_ns - now_ns()) / NS_PER_S)
                results.append(now_ns() - due_ns)
    return late


def main() -> None:
    """Measure and print."""
    sleeps = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    late = uvloop.run(measure(sleeps))
    print(f"{sleeps} sleeps of {MEAN_NS / 1e6:g} ms on average, in turns; lateness in µs")
    print(f"{'':<14}{'p50':>9}{'p99':>9}{'|p50|':>9}{'early':>8}")
    medians = {}
    for name, values in late.items():
        microseconds = np.array(values) / 1e3
        medians[name] = float(np.median(np.abs(microseconds)))
        p50, p99 = np.quantile(microseconds, [0.5, 0.99])
        print(f"{name:<14}{p50:>9.0f}{p99:>9.0f}{medians[name]:>9.0f}{(microseconds < 0).mean():>8.1%}")
    print(f"median error: asyncio.sleep / timerfd = {medians['asyncio.sleep'] / medians['timerfd']:.1f}")


if __name__ == "__main__":
    main()
