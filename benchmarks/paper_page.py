"""docs/paper.md: the words of `paper.md.j2` around what was found."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from paper_findings import ABOUT, LESS_POWER, NOT, OPEN, PARTLY, TBT_SLO_MS, TTFT_SLO_MS, Finding, Table, keeps
from paper_numbers import Book
from paper_plans import ECONOMY_MHZ, LOWEST_RPS, OUTPUT_TOKENS, PROMPT_TOKENS, SUSTAINED_RPS, TOP_MHZ, Extent

from replay.sim.hardware import load_profile

TEMPLATE = "paper.md.j2"
LEADS = {PARTLY: "Why not altogether:", NOT: "Why not:", OPEN: "Not judged, too little was run for the rule; to know:"}


def page(book: Book, extent: Extent, findings: Sequence[Finding], pictures: str) -> str:
    """The page. `pictures`: their folder, from the page's own."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["lead"] = lambda finding: LEADS.get(finding.verdict, "To be read with it:")
    tables = [table for (_, scope), table in book.tables.items() if scope == "gpu"]
    standings: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for table in tables:
        standings.update(table.cells["standing"].cast(str).to_list())
        reasons.update(why.split(":")[0] for because in table.cells["invalid_because"].drop_nulls() for why in because)
    return environment.get_template(TEMPLATE).render(
        f={finding.name: finding for finding in findings},
        x=extent,
        cells=sum(standings.values()),
        sweeps=len(tables),
        prompts=_said(PROMPT_TOKENS),
        outputs=_said(OUTPUT_TOKENS),
        lowest_rps=LOWEST_RPS,
        economy_mhz=ECONOMY_MHZ,
        top_mhz=TOP_MHZ,
        held_mhz=f"{load_profile('dgx-h100', 'llama-2-70b').time.sustained_mhz:.0f}",
        less_power=LESS_POWER,
        about=ABOUT,
        percent=lambda share: f"{100 * share:.0f} %",
        slos="/".join(map(str, TTFT_SLO_MS.values())),
        medium_slo=TTFT_SLO_MS["M"],
        tbt_slo=TBT_SLO_MS,
        knees=_knees(book, extent) if extent.knees else None,
        standings=", ".join(f"{n} are {standing}" for standing, n in standings.most_common()),
        reasons=", ".join(f"`{name}` ({n})" for name, n in reasons.most_common()) or "nothing",
        pictures=pictures,
    )


def _said(tokens: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in tokens.items())


def _knees(book: Book, extent: Extent) -> Table:
    """What the clock does at the rates that were sustained."""
    rows = []
    for size in extent.sizes:
        for tp in extent.tps:
            rate_rps = float(SUSTAINED_RPS[tp][size])
            if rate_rps <= extent.low_rps(size):
                continue
            name, at = f"size-{size}", {"tp": tp, "rate_rps": rate_rps}
            top = [
                book.number(name, column, freq_mhz=TOP_MHZ, **at)
                for column in ("ttft_p99_ms", "power_w", "energy_per_request_j")
            ]
            kept = [mhz for mhz in extent.clocks_mhz if keeps(book, name, size, freq_mhz=mhz, **at)]
            least = [book.number(name, "energy_per_request_j", freq_mhz=mhz, **at) for mhz in kept[:1]]
            rows.append([size, f"TP{tp}", f"{rate_rps:g}", *map(book.show, top), *(map(str, kept[:1] or ["none"]))])
            rows[-1].append(book.show(least[0] if least else None))
    columns = ("size", "", "requests/s", "P99 TTFT, ms", "W", "J/request", "lowest clock, MHz", "J/request there")
    return Table(columns, rows, words=3)
