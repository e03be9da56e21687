"""What Stojkovic et al., "Towards Greener LLMs", found on a DGX-H100 with Llama-2-70B, looked for in the simulated one.

    python benchmarks/findings.py

Every figure is simulated, in virtual time; nothing in the simulator knows these findings. Requests of 467, 1010 or 4085
prompt tokens and 96, 256 or 600 output tokens stand for Short, Medium and Long, as in the authors' measurements.
"""

from typing import NamedTuple

import numpy as np

from replay.sim.hardware import Hardware, load_profile
from replay.sim.profile import Profile
from replay.sim.virtual import VirtualEngines, arrivals_of, serve
from tracegen.console import print_table, say

PROMPT_TOKENS, OUTPUT_TOKENS = {"S": 467, "M": 1010, "L": 4085}, {"S": 96, "M": 256, "L": 600}
TTFT_SLO_S = {"S": 0.25, "M": 0.4, "L": 2.0}  # short, medium, long prompts
TBT_SLO_S = 0.1
TOP_MHZ, ECONOMY_MHZ = 1980, 1605
CLOCKS_MHZ = (795, 990, 1200, 1395, 1605, 1800, 1980)
NODE_GPUS = 8
FIFTH_LESS = 0.8
LASTS_S = 300.0
NS = 1_000_000_000


class Served(NamedTuple):
    """What came of a load."""

    ttft_p99_s: float
    tbt_s: float  # mean time between tokens
    duration_s: float  # until the last token
    requests_per_s: float
    tokens_per_s: float
    power_w: float  # of the GPUs that serve
    request_j: float


def run(profile: Profile, tp: int, mhz: int, bucket: str, arrival_ns: np.ndarray, instances: int = 1) -> Served:
    """Serve requests of `bucket` on `instances` of `tp` GPUs, in turn."""
    hardware, n = Hardware(profile, tp), len(arrival_ns)
    prompt, output = PROMPT_TOKENS[bucket[0]], OUTPUT_TOKENS[bucket[1]]
    engines = VirtualEngines(hardware, mhz, instances=instances)
    served = serve(engines, arrivals_of(arrival_ns, prompt, output, np.arange(n) % instances))
    step_s = (served.steps["end_ns"] - served.steps["start_ns"]) / NS
    duration_s = served.steps["end_ns"].max() / NS
    busy_j = tp * float((step_s * served.steps["gpu_w"]).sum())
    idle_j = tp * hardware.idle_w(mhz) * (instances * duration_s - float(step_s.sum()))
    first_ns, last_ns = served.done["first_token_ns"], served.done["last_token_ns"]
    return Served(
        float(np.percentile((first_ns - arrival_ns) / NS, 99)),
        float(((last_ns - first_ns) / NS).mean() / (output - 1)),
        duration_s,
        n / duration_s,
        n * output / duration_s,
        (busy_j + idle_j) / duration_s,
        (busy_j + idle_j) / n,
    )


def poisson_ns(rate_rps: float) -> np.ndarray:
    """Poisson arrivals over `LASTS_S`; all rates share their random numbers."""
    gaps = np.random.default_rng(0).exponential(1.0, int(2 * rate_rps * LASTS_S) + 50)
    times_s = np.cumsum(gaps) / rate_rps
    return (times_s[times_s < LASTS_S] * NS).astype(np.int64)


def economy_clock(profile: Profile) -> None:
    """Finding 1: a fifth less power at about 1.6 GHz, about the same throughput at most batch sizes."""
    rows = []
    for tp in (2, 8):
        for batch in (1, 4, 16, 32, 64) if tp > 2 else (1, 4, 16, 24):  # as many as TP2 holds
            at_once = np.zeros(batch, np.int64)
            found = {mhz: run(profile, tp, mhz, "MM", at_once) for mhz in (*range(1200, TOP_MHZ, 15), TOP_MHZ)}
            slow, fast = found[ECONOMY_MHZ], found[TOP_MHZ]
            fifth_mhz = max(mhz for mhz, each in found.items() if each.power_w <= FIFTH_LESS * fast.power_w)
            fifth = found[fifth_mhz].tokens_per_s / fast.tokens_per_s - 1
            rows.append(
                [
                    f"TP{tp}, batch {batch}", f"{fast.tokens_per_s:.0f}",
                    f"{slow.tokens_per_s / fast.tokens_per_s - 1:+.1%}", f"{fast.power_w / tp:.0f}",
                    f"{slow.power_w / fast.power_w - 1:+.1%}", f"{slow.request_j / fast.request_j - 1:+.1%}",
                    f"{fifth_mhz} MHz: {fifth:+.1%}",
                ]
            )  # fmt: skip
    say(f"1. {ECONOMY_MHZ} instead of {TOP_MHZ} MHz, batches of MM requests (1010 + 256 tokens)")
    columns = (
        "",
        f"tokens/s at {TOP_MHZ}",
        f"at {ECONOMY_MHZ}",
        f"W/GPU at {TOP_MHZ}",
        f"at {ECONOMY_MHZ}",
        "energy",
        "a fifth less W at",
    )
    print_table(columns, rows)
    say()


def clock_by_length(profile: Profile) -> None:
    """Finding 2: longer inputs feel the clock more, decode less."""
    rows, alone = [], np.zeros(1, np.int64)
    for tp in (2, 8):
        for size in "SML":
            found = {mhz: run(profile, tp, mhz, f"{size}M", alone) for mhz in (795, 1200, ECONOMY_MHZ, TOP_MHZ)}
            top = found.pop(TOP_MHZ)
            ratios = [
                f"{each.ttft_p99_s / top.ttft_p99_s:.2f} / {each.tbt_s / top.tbt_s:.2f}" for each in found.values()
            ]
            rows.append(
                [
                    f"TP{tp}, {PROMPT_TOKENS[size]} tokens",
                    f"{1e3 * top.ttft_p99_s:.0f} / {1e3 * top.tbt_s:.1f}",
                    *ratios,
                ]
            )
    say("2. TTFT / TBT of a request alone: ms at 1980 MHz, then ratios to that")
    print_table(("", f"{TOP_MHZ} MHz", "795 MHz", "1200 MHz", f"{ECONOMY_MHZ} MHz"), rows)
    say()


def parallelism(profile: Profile) -> None:
    """Finding 3: TP lowers TTFT and TBT, with diminishing returns."""
    rows, alone = [], np.zeros(1, np.int64)
    for size in "SML":
        found = {tp: run(profile, tp, TOP_MHZ, f"{size}M", alone) for tp in (2, 4, 8)}
        for name, key in (("TTFT", "ttft_p99_s"), ("TBT", "tbt_s")):
            two, four, eight = (1e3 * getattr(found[tp], key) for tp in (2, 4, 8))
            gains = (f"{two / four:.2f}x", f"{four / eight:.2f}x")
            rows.append([f"{name}, {PROMPT_TOKENS[size]} tokens", *(f"{ms:.1f}" for ms in (two, four, eight)), *gains])
    say("3. Tensor parallelism, a request alone, 1980 MHz: ms")
    print_table(("", "TP2", "TP4", "TP8", "from 2 to 4", "from 4 to 8"), rows)
    say()


def cheapest_parallelism(profile: Profile) -> None:
    """Finding 4: TP2 is often cheapest per request; with the whole node held, TP8 can win at medium load."""
    idle_w = Hardware(profile, NODE_GPUS).idle_w(TOP_MHZ, loaded=False)
    rows = []
    for bucket, rates in {"SS": (1.0, 2.0, 4.0, 8.0), "MM": (0.5, 1.0, 2.0, 3.0)}.items():
        for rate_rps in rates:
            cells, filled = {}, {}
            for tp in (2, 4, 8):
                # As few instances as keep the SLOs; the other GPUs of the node have no model.
                for instances in range(1, NODE_GPUS // tp + 1):
                    found = run(profile, tp, TOP_MHZ, bucket, poisson_ns(rate_rps), instances)
                    kept = found.ttft_p99_s <= TTFT_SLO_S[bucket[0]] and found.tbt_s <= TBT_SLO_S
                    if kept and tp not in cells:
                        spare_w = (NODE_GPUS - tp * instances) * idle_w
                        cells[tp] = (instances, found.request_j, found.request_j + spare_w / found.requests_per_s)
                filled[tp] = found.request_j  # the last one is as many instances as fit
            texts = [
                f"{cells[tp][0]} x TP{tp}: {cells[tp][1]:.0f} / {cells[tp][2]:.0f}" if tp in cells else "misses its SLO"
                for tp in (2, 4, 8)
            ]
            serving, node = (min((cell[i], f"TP{tp}") for tp, cell in cells.items())[1] for i in (1, 2))
            whole = " / ".join(f"{joules:.0f}" for joules in filled.values())
            rows.append([f"{bucket}, {rate_rps:g}/s", *texts, f"{serving}, {node}", whole])
    say(f"4. J a request, GPUs that serve / whole node, {TOP_MHZ} MHz, as few instances as keep the SLOs;")
    say("   last column: the whole node filled with 4 x TP2 / 2 x TP4 / 1 x TP8")
    print_table(("", "TP2", "TP4", "TP8", "cheapest: GPUs, node", "node filled"), rows, left=5)
    say()


def batches(profile: Profile) -> None:
    """Finding 5: larger batches raise throughput and miss TTFT SLOs."""
    rows = []
    for batch in (1, 2, 4, 8, 16, 32, 64):
        found = run(profile, NODE_GPUS, TOP_MHZ, "MM", np.zeros(batch, np.int64))
        kept = "yes" if found.ttft_p99_s <= TTFT_SLO_S["M"] else "no"
        rows.append(
            [str(batch), f"{found.tokens_per_s:.0f}", f"{1e3 * found.ttft_p99_s:.0f}", kept, f"{1e3 * found.tbt_s:.1f}"]
        )
    say("5. MM requests that come at once, TP8, 1980 MHz (SLO: TTFT 400 ms)")
    print_table(("batch", "tokens/s", "P99 TTFT ms", "within SLO", "TBT ms"), rows)
    say()


def three_optima(profile: Profile) -> None:
    """Finding 6: the best settings for power, for energy and for performance are three different ones."""
    rows = []
    for bucket, batch in (("SS", 16), ("MM", 16), ("LS", 4)):
        at_once = np.zeros(batch, np.int64)
        found = {(tp, mhz): run(profile, tp, mhz, bucket, at_once) for tp in (2, 4, 8) for mhz in CLOCKS_MHZ}
        texts = []
        for name in ("power_w", "request_j", "duration_s"):
            tp, mhz = min(found, key=lambda key, of=found, name=name: getattr(of[key], name))  # type: ignore[misc]
            best = found[tp, mhz]
            texts.append(f"TP{tp} {mhz} MHz: {best.power_w:.0f} W, {best.request_j:.0f} J, {best.duration_s:.1f} s")
        rows.append([f"{batch} x {bucket}", *texts])
    say("6. A batch at once, best of TP 2, 4, 8 at seven clocks: power of the GPUs that serve, J a request, duration")
    print_table(("", "least power", "least energy", "fastest"), rows, left=4)


def main() -> None:
    """Print one table for each finding."""
    profile = load_profile("dgx-h100", "llama-2-70b")
    for finding in (economy_clock, clock_by_length, parallelism, cheapest_parallelism, batches, three_optima):
        finding(profile)


if __name__ == "__main__":
    main()
