"""The six findings of Stojkovic et al., looked for in the sweeps' tables; `paper.md.j2` has the words around them.

Each function's docstring says when it agrees. These rules were written before the sweeps were run, with the paper's
number where it gives one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from paper_numbers import NONE, SCOPES, Book, Number, ratio
from paper_plans import ECONOMY_MHZ, MEASURED_CAPS, NODE_GPUS, OUTPUT_TOKENS, PROMPT_TOKENS, TOP_MHZ, Extent

from analysis.objectives import Wanted
from analysis.recommend import ALONE, CLEAR, recommend
from analysis.slo import Slo
from analysis.sweep import SweepTable
from replay.sim.hardware import load_profile

AGREES, PARTLY, NOT, OPEN = "agrees", "agrees in part", "does not agree", "not judged"
TTFT_SLO_MS, TBT_SLO_MS = {"S": 250, "M": 400, "L": 2000}, 100  # by prompt; as the same authors' DynamoLLM has them
SHOWN_MHZ = (1395, ECONOMY_MHZ)  # where the author's points have a fifth less power, and where the paper does
LESS_POWER, ABOUT = 0.2, 0.05  # a fifth less power, and what is about that; also of throughput that is "about the same"


@dataclass(frozen=True)
class Table:
    """A table of the page, all but whose first `words` columns are figures."""

    columns: tuple[str, ...]
    rows: list[list[str]]
    words: int = 2

    def __str__(self) -> str:
        """In Markdown."""
        marks = ["---" if i < self.words else "---:" for i in range(len(self.columns))]
        lines = (" | ".join(cells) for cells in (self.columns, *self.rows))
        head, *rows = (f"| {line} |" for line in lines)
        return "\n".join([head, f"|{'|'.join(marks)}|", *rows])


@dataclass(frozen=True)
class Finding:
    """What was found: whether it agrees, tables, and by name what the words around them are to say in figures."""

    name: str
    verdict: str
    tables: Sequence[Table]
    figures: dict[str, str] = field(default_factory=dict)


def slo_of(size: str) -> Slo:
    """The objectives of requests of `size`."""
    return Slo({"ttft": (float(TTFT_SLO_MS[size[0]]),) * 3, "tpot": (float(TBT_SLO_MS),) * 3})


def keeps(book: Book, sweep: str, size: str, **setting: float | None) -> bool:
    """Whether P99 TTFT and mean TBT keep to the objectives."""
    ttft, tbt = (book.number(sweep, column, **setting) for column in ("ttft_p99_ms", "tbt_mean_ms"))
    return bool(ttft and tbt and ttft.value <= TTFT_SLO_MS[size[0]] and tbt.value <= TBT_SLO_MS)


def _most(true: Sequence[bool]) -> bool:
    return sum(true) > len(true) / 2


def economy_clock(book: Book, extent: Extent) -> Finding:
    """A fifth less power at 1.6 instead of 2 GHz, about the same throughput at most batch sizes.

    Agrees where most settings have `LESS_POWER` less power within `ABOUT`, and throughput within `ABOUT` of that at the
    top clock; in part where most have at least `ABOUT` less power with that throughput.
    """
    others = [mhz for mhz in extent.batch_clocks_mhz if mhz in SHOWN_MHZ]
    columns = {"power_w": "power", "output_tokens_s": "tokens/s", "energy_per_request_j": "J/request"}
    rows, met, less = [], [], []
    for tp in extent.tps:
        for batch in extent.batches:
            texts = []
            for mhz in others:
                power, tokens, energy = (
                    ratio(*(book.number(f"batch-{batch}", name, tp=tp, freq_mhz=f) for f in (mhz, TOP_MHZ)))
                    for name in columns
                )
                texts += [book.change(each) for each in (power, tokens, energy)]
                if mhz == ECONOMY_MHZ and power is not None and tokens is not None:
                    same = tokens.value >= 1 - ABOUT
                    met.append(same and abs(1 - power.value - LESS_POWER) <= ABOUT)
                    less.append(same and 1 - power.value >= ABOUT)
            rows.append([f"TP{tp}", str(batch), *texts])
    heads = tuple(f"{what} at {mhz}" for mhz in others for what in columns.values())
    verdict = OPEN if not met else AGREES if _most(met) else PARTLY if _most(less) else NOT
    figures = {"met": book.count(sum(met), len(met)), "less": book.count(sum(less), len(less))}
    return Finding("economy", verdict, [Table(("", "batch", *heads), rows)], figures | _upper(book, extent))


def _upper(book: Book, extent: Extent) -> dict[str, str]:
    """How much less power the clock below the top one takes, at one and the same load."""
    size = "MM" if "MM" in extent.sizes else extent.sizes[0]
    nearly, at = extent.clocks_mhz[-2], {"rate_rps": extent.low_rps(size)}
    changes = []
    for tp in extent.tps:
        found = ratio(*(book.number(f"size-{size}", "power_w", tp=tp, freq_mhz=f, **at) for f in (nearly, TOP_MHZ)))
        changes.append(f"{book.change(found)} at TP{tp}")
    return {"nearly_mhz": str(nearly), "nearly": ", ".join(changes)}


def clock_by_length(book: Book, extent: Extent) -> Finding:
    """Longer inputs feel the clock more, decode less.

    Agrees where at every TP the ratio of median TTFTs, lowest to top clock, grows from short to medium to long prompts
    (means over outputs), and that of TBT is smaller at every size; in part where the first holds at a TP, or the second
    at most sizes.
    """
    rows, longer, decode = [], [], []
    for tp in extent.tps:
        of_prompts: dict[str, list[float]] = {}
        for size in extent.sizes:
            at = {"tp": tp, "rate_rps": extent.low_rps(size)}
            ttft, tbt, e2e = (
                ratio(*(book.number(f"size-{size}", c, freq_mhz=f, **at) for f in (extent.clocks_mhz[0], TOP_MHZ)))
                for c in ("ttft_p50_ms", "tbt_mean_ms", "e2e_mean_ms")
            )
            rows.append([f"TP{tp}", size, *(book.show(each, "{:.2f}", interval=True) for each in (ttft, tbt, e2e))])
            if ttft is not None and tbt is not None:
                of_prompts.setdefault(size[0], []).append(ttft.value)
                decode.append(tbt.value < ttft.value)
        means = [sum(values) / len(values) for values in of_prompts.values()]
        longer.append(len(means) > 1 and all(a < b for a, b in pairwise(means)))
    verdict = AGREES if all(longer) and all(decode) else PARTLY if any(longer) or _most(decode) else NOT
    held = [f"TP{tp}" for tp, true in zip(extent.tps, longer, strict=True) if true]
    figures = {
        "decode": book.count(sum(decode), len(decode)),
        "longer": book.count(len(held), len(longer)),
        "held": ", ".join(held),
    }
    columns = ("", "size", "TTFT", "TBT", "E2E")
    tables = [Table(columns, rows), Table(columns[:-1], _alone(book, extent))]
    return Finding("length", verdict if decode else OPEN, tables, figures)


def _alone(book: Book, extent: Extent) -> list[list[str]]:
    """How the lowest clock lengthens TTFT and TBT of a request that waits for no other."""
    rows = []
    for tp in extent.tps:
        for size in extent.alone:
            found = (
                ratio(*(book.number(f"alone-{size}", c, tp=tp, freq_mhz=f) for f in (extent.clocks_mhz[0], TOP_MHZ)))
                for c in ("ttft_p50_ms", "tbt_mean_ms")
            )
            rows.append([f"TP{tp}", size, *(book.show(each, "{:.2f}") for each in found)])
    return rows


def parallelism(book: Book, extent: Extent) -> Finding:
    """TP lowers TTFT and TBT, with diminishing returns.

    Agrees where median TTFT and mean TBT of every size fall with each doubling of TP, by a smaller factor each time; in
    part where all fall, or most do by less.
    """
    rows, lower, fewer = [], [], []
    for size in extent.sizes:
        at = {"freq_mhz": TOP_MHZ, "rate_rps": extent.low_rps(size)}
        for name, column in (("TTFT, ms", "ttft_p50_ms"), ("TBT, ms", "tbt_mean_ms")):
            found = [book.number(f"size-{size}", column, tp=tp, **at) for tp in extent.tps]
            gains = [ratio(a, b) for a, b in pairwise(found)]
            known = [gain.value for gain in gains if gain is not None]
            if len(known) == len(gains):
                lower.append(min(known) > 1)
                fewer.append(all(a > b for a, b in pairwise(known)))
            texts = [book.show(each, "{:,.1f}") for each in found]
            rows.append([size, name, *texts, *(book.show(gain, "{:.2f}", interval=True) for gain in gains)])
    verdict = AGREES if all(lower) and all(fewer) else PARTLY if all(lower) or _most(fewer) else NOT
    columns = ("size", "", *(f"TP{tp}" for tp in extent.tps), *(f"TP{a} / TP{b}" for a, b in pairwise(extent.tps)))
    figures = {"lower": book.count(sum(lower), len(lower)), "fewer": book.count(sum(fewer), len(fewer))}
    judged = bool(lower) and len(extent.tps) > 2  # of one step nothing diminishes
    return Finding("parallelism", verdict if judged else OPEN, [Table(columns, rows)], figures)


def cheapest_parallelism(book: Book, extent: Extent) -> Finding:
    """The smallest TP is often cheapest per request; TP8 can win at medium load with the whole node held.

    Agrees where of the TPs that keep the objectives the smallest takes the fewest joules of the GPUs that serve for
    most sizes at the low load; and at some load above the lowest one TP8 takes fewer joules of the node than the node
    filled with any smaller TP, by intervals that leave out zero. In part where one of these holds.
    """
    rows: list[list[str]] = []
    small: dict[str, list[bool]] = {scope: [] for scope in SCOPES}
    for size in extent.sizes:
        name, at = f"size-{size}", {"freq_mhz": TOP_MHZ, "rate_rps": extent.low_rps(size)}
        rows.append([size, f"{at['rate_rps']:g}"])
        for scope in SCOPES:
            found = {tp: book.number(name, "energy_per_request_j", scope, tp=tp, **at) for tp in extent.tps}
            kept = {tp: n.value for tp, n in found.items() if n and keeps(book, name, size, tp=tp, **at)}
            best = min(kept, key=kept.__getitem__, default=None)
            small[scope].append(best == extent.tps[0])
            rows[-1] += [book.show(n) + ("" if tp in kept or n is None else " *") for tp, n in found.items()]
            rows[-1].append(NONE if best is None else f"TP{best}")
    node, wins = _node_filled(book, extent)
    both = [_most(small["gpu"]), any(wins)]
    names, filled = (
        tuple(form.format(tp=tp, n=NODE_GPUS // tp) for tp in extent.tps) for form in ("TP{tp}", "{n} x TP{tp}")
    )
    tables = [
        Table(("size", "requests/s", *names, "cheapest", *(f"node, {n}" for n in names), "cheapest"), rows),
        Table(("size", "requests/s", *filled, *(f"TP{extent.tps[-1]} against {name}" for name in filled[:-1])), node),
    ]
    figures = {scope: book.count(sum(true), len(true)) for scope, true in small.items()}
    figures["wins"] = book.count(sum(wins), len(wins))
    return Finding("cheapest", AGREES if all(both) else PARTLY if any(both) else NOT, tables, figures)


def _node_filled(book: Book, extent: Extent) -> tuple[list[list[str]], list[bool]]:
    """Joules of the whole node by load, and whether the largest TP wins at each above the lowest."""
    rows, wins = [], []
    for size, rates in extent.node_rates_rps:
        for rate_rps in rates:
            found: dict[int, Number | None] = {}
            texts = []
            for tp in extent.tps:
                name, at = f"node-{size}-tp{tp}", {"tp": tp, "rate_rps": rate_rps}
                found[tp] = book.number(name, "energy_per_request_j", "node", **at)
                late = found[tp] is not None and not keeps(book, name, size, **at)
                texts.append(book.show(found[tp], interval=True) + (" *" if late else ""))
            *smaller, largest = found.values()
            against = [ratio(largest, each) for each in smaller]
            if rate_rps > rates[0]:
                wins.append(all(each is not None and each.high is not None and each.high < 1 for each in against))
            rows.append([size, f"{rate_rps:g}", *texts, *(book.change(each, interval=True) for each in against)])
    return rows, wins


def batches(book: Book, extent: Extent) -> Finding:
    """Larger batches raise throughput and miss TTFT SLOs.

    Agrees where at every TP tokens/s rise with every larger batch, and P99 TTFT keeps its objective at the smallest and
    misses it at the largest; in part where either holds at some TP.
    """
    rows, more, missed, slo_ms = [], [], [], TTFT_SLO_MS["M"]
    forms = {"output_tokens_s": "{:,.0f}", "ttft_p99_ms": "{:,.0f}", "tbt_mean_ms": "{:.1f}"}
    for tp in extent.tps:
        tokens, late = [], []
        for batch in extent.batches:
            found = {
                name: book.number(f"batch-{batch}", name, tp=tp, freq_mhz=TOP_MHZ)
                for name in (*forms, "energy_per_request_j")
            }
            tokens += [n.value for n in (found["output_tokens_s"],) if n]
            late += [n.value for n in (found["ttft_p99_ms"],) if n]
            texts = [book.show(n, forms.get(name, "{:,.0f}")) for name, n in found.items()]
            ttft = found["ttft_p99_ms"]
            texts.insert(2, NONE if ttft is None else "yes" if ttft.value <= slo_ms else "no")
            rows.append([f"TP{tp}", str(batch), *texts])
        more.append(len(tokens) > 1 and all(a < b for a, b in pairwise(tokens)))
        missed.append(len(late) > 1 and late[0] <= slo_ms < late[-1])
    verdict = AGREES if all(more) and all(missed) else PARTLY if any(more) or any(missed) else NOT
    columns = ("", "batch", "tokens/s", "P99 TTFT, ms", "kept", "TBT, ms", "J/request")
    figures = {"more": book.count(sum(more), len(more)), "missed": book.count(sum(missed), len(missed))}
    tokens_held = load_profile("dgx-h100", "llama-2-70b").kv_tokens(extent.tps[0])
    figures["held"] = str(tokens_held // (PROMPT_TOKENS["M"] + OUTPUT_TOKENS["M"]))
    return Finding("batches", verdict, [Table(columns, rows), _caps(book, extent)], figures)


def _caps(book: Book, extent: Extent) -> Table:
    """Run time and energy by batch cap relative to the largest, measured and simulated."""
    largest, tp, rows = max(extent.caps), extent.tps[0], []
    for cap in extent.caps:
        texts = []
        for column, mine, top in zip(
            ("duration_s", "energy_j"), MEASURED_CAPS[cap], MEASURED_CAPS[largest], strict=True
        ):
            ours = ratio(*(book.number("caps", column, tp=tp, batch_cap=each) for each in (cap, largest)))
            texts += [f"{mine / top:.2f}", book.show(ours, "{:.2f}")]
        rows.append([str(cap), *texts])
    return Table(("cap", "run time measured", "simulated", "energy measured", "simulated"), rows, words=1)


def three_optima(book: Book, extent: Extent) -> Finding:
    """The best settings for power, for energy and for performance are three different ones.

    Agrees where for most batch sizes least mean power, fewest joules a request and shortest mean E2E latency are found
    at three different settings; in part where for some. Under a load that is served whole the first two are one by
    arithmetic, watts being joules a request times the rate, so that loads are shown and not judged.
    """
    batched, loaded, three, same = [], [], [], []
    for batch in extent.batches:
        best = _best(book, f"batch-{batch}")
        if None not in best.values():
            three.append(len({n.of.names for n in best.values() if n}) == len(best))
        batched.append(["MM", str(batch), *_bests(book, best)])
    for size in extent.sizes:
        low = extent.low_rps(size)
        best = _best(book, f"size-{size}", rate_rps=low)
        power, energy, _ = best.values()
        same.append(power is not None and energy is not None and power.of.names == energy.of.names)
        loaded.append([size, f"{low:g}", *_bests(book, best), _answer(book.tables[f"size-{size}", "gpu"], low, size)])
    verdict = OPEN if not three else AGREES if _most(three) else PARTLY if any(three) else NOT
    columns = ("least power", "fewest joules", "fastest")
    tables = [
        Table(("size", "batch", *columns), batched, 5),
        Table(("size", "requests/s", *columns, "fewest joules within the objectives"), loaded, 6),
    ]
    figures = {"three": book.count(sum(three), len(three)), "same": book.count(sum(same), len(same))}
    return Finding("optima", verdict, tables, figures)


BEST = {"power_w": "{:,.0f} W", "energy_per_request_j": "{:,.0f} J", "e2e_mean_ms": "{:,.0f} ms"}


def _best(book: Book, sweep: str, **at: float) -> dict[str, Number | None]:
    """The least power, joules and latency over all TPs and clocks of a sweep."""
    cells = book.tables[sweep, "gpu"].cells
    settings = list(cells.select("tp", "freq_mhz").unique(maintain_order=True).iter_rows(named=True))
    best: dict[str, Number | None] = {}
    for column in BEST:
        found = [book.number(sweep, column, **setting, **at) for setting in settings]
        best[column] = min((n for n in found if n is not None), key=lambda n: n.value, default=None)
    return best


def _bests(book: Book, best: dict[str, Number | None]) -> list[str]:
    return [f"{_setting(n)}: {book.show(n, BEST[column])}" if n else NONE for column, n in best.items()]


def _setting(number: Number) -> str:
    """TP and clock, from a cell's name."""
    tp, clock = number.of.names[0].split("-")[:2]
    return f"{tp.upper()} {clock.removesuffix('MHz')} MHz"


def _answer(table: SweepTable, rate_rps: float, size: str) -> str:
    """What `analysis recommend` says of energy."""
    (answer,) = recommend(table, Wanted(slo_of(size)), rate_rps=rate_rps).answers
    if answer.best is None:
        return "none keeps them"
    return answer.best.name + {CLEAR: "", ALONE: " (no other keeps them)"}.get(answer.verdict, f" ({answer.verdict})")


FINDINGS: Sequence[Callable[[Book, Extent], Finding]] = (
    economy_clock,
    clock_by_length,
    parallelism,
    cheapest_parallelism,
    batches,
    three_optima,
)
