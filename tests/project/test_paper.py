"""`make paper` in small: the page has every finding, and its figures are those of the sweeps' tables."""

import re
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

ROOT = Path(__file__).parents[2]
TITLES = 6
# Not figures of ours: measured ratios, a table's words, a clock.
PLAIN = re.compile(r"–|yes|no|none|\d\.\d\d|\d+")  # noqa: RUF001 - the page's dash


@pytest.fixture(scope="module")
def paper():
    """The scripts behind `benchmarks/paper.py`, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import paper
        import paper_findings
        import paper_numbers
        import paper_plans

        yield SimpleNamespace(
            command=paper, findings=paper_findings, numbers=paper_numbers, tiny=paper_plans.TINY, plans=paper_plans
        )


@pytest.fixture(scope="module")
def written(paper, tmp_path_factory):
    """The tiny sweeps, their book, and the page."""
    folder = tmp_path_factory.mktemp("paper")
    names = paper.command.simulate(paper.tiny, folder / "sweeps", 1)
    book = paper.command.load(folder / "sweeps", names, 1)
    paper.command.write(book, paper.tiny, folder / "paper.md", folder / "images")
    return SimpleNamespace(folder=folder, book=book, page=(folder / "paper.md").read_text(encoding="utf-8"))


def test_the_page_says_simulated_first_and_has_every_finding_with_its_verdict_and_rule(paper, written):
    title, _, first, *_ = written.page.splitlines()
    assert title == "# The paper, again"
    assert first.startswith("**SIMULATED")
    findings = [finding(written.book, paper.tiny) for finding in paper.findings.FINDINGS]
    sections = re.split(r"^## ", written.page, flags=re.MULTILINE)[1:]
    assert len(findings) == TITLES
    for number, finding in enumerate(findings, 1):
        section = next(text for text in sections if text.startswith(f"{number}. "))
        assert f"**Simulated: {finding.verdict}.**" in section
        assert "The paper: " in section
        assert "**Agrees when**" in section
        assert re.search("[Ee]cho|Consequence", section)
        for table in finding.tables:
            assert str(table) in section
    for picture in re.findall(r"\]\((images/[^)]*)\)", written.page):
        assert "<svg" in (written.folder / picture).read_text(encoding="utf-8")


def test_every_figure_on_the_page_is_found_in_the_tables_again(written):
    assert len(written.book.shown) > 100
    for shown in written.book.shown:
        cells = [values_of(written, each) for each in (shown.number.of, shown.number.to) if each is not None]
        again = cells[0].mean() if len(cells) == 1 else (cells[0].log().mean() - cells[1].log().mean())
        expected = again if len(cells) == 1 else pl.Series([again]).exp()[0]
        assert shown.number.value == pytest.approx(expected)
        assert shown.text in written.page
        first = float(re.search(r"[-+]?[\d,]*\.?\d+", shown.text).group().replace(",", ""))
        percent = "%" in shown.text
        assert first == pytest.approx(100 * (expected - 1) if percent else expected, abs=0.51, rel=0.01)


def values_of(written, cells) -> pl.Series:
    """What the sweep's table says of these cells."""
    table = written.book.tables[cells.sweep, cells.scope].cells
    return pl.Series([table.filter(pl.col("cell") == name)[cells.column].item() for name in cells.names])


def test_no_table_of_the_page_has_a_figure_that_was_not_looked_up(paper, written):
    shown = {each.text for each in written.book.shown}
    for finding in (each(written.book, paper.tiny) for each in paper.findings.FINDINGS):
        for table in finding.tables:
            for row in table.rows:
                for text in row[table.words :]:
                    figure = text.split(": ")[-1].removesuffix(" *")
                    assert figure in shown or PLAIN.fullmatch(figure) or figure.startswith("TP"), (finding.name, row)


def test_what_was_simulated_is_not_simulated_again(paper, written):
    manifests = sorted((written.folder / "sweeps").glob("*/cells/*/manifest.json"))
    before = [path.stat().st_mtime_ns for path in manifests]
    paper.command.simulate(paper.tiny, written.folder / "sweeps", 1)
    assert [path.stat().st_mtime_ns for path in manifests] == before
    assert len(before) > len(paper.tiny.sizes) * len(paper.tiny.tps) * len(paper.tiny.clocks_mhz)


@pytest.mark.parametrize(
    ("power", "tokens", "verdict"),
    [
        (0.751, 0.951, "agrees"),
        (0.849, 0.951, "agrees"),
        (0.749, 0.951, "agrees in part"),  # more than about a fifth
        (0.851, 0.951, "agrees in part"),
        (0.949, 0.951, "agrees in part"),
        (0.951, 0.999, "does not agree"),
        (0.8, 0.949, "does not agree"),  # not about the same throughput
    ],
)
def test_a_fifth_less_power_is_judged_by_the_rule_that_the_page_states(paper, power, tokens, verdict):
    assert paper.findings.economy_clock(batch_book(paper, power, tokens), paper.tiny).verdict == verdict


def test_a_saturated_repeat_leaves_no_figure(paper):
    book = batch_book(paper, 0.8, 1.0, standing="saturated")
    assert book.number("batch-1", "power_w", tp=2, freq_mhz=1605) is None
    finding = paper.findings.economy_clock(book, paper.tiny)
    assert finding.verdict == "not judged"
    assert all(set(row[2:]) == {paper.numbers.NONE} for row in finding.tables[0].rows)


def batch_book(paper, power: float, tokens: float, standing: str = "sound"):
    """A book whose batches have these ratios between the economy clock and the top one."""
    rows = [
        {
            "cell": f"tp{tp}-{mhz}MHz-r0",
            "tp": tp,
            "freq_mhz": float(mhz),
            "rate_rps": None,
            "standing": standing,
            "power_w": 1000.0 * share,
            "output_tokens_s": 500.0 * rate,
            "energy_per_request_j": 100.0,
        }
        for tp in paper.tiny.tps
        for mhz, share, rate in ((paper.plans.TOP_MHZ, 1, 1), (paper.plans.ECONOMY_MHZ, power, tokens))
    ]
    table = SimpleNamespace(cells=pl.DataFrame(rows))
    return paper.numbers.Book({(f"batch-{batch}", "gpu"): table for batch in paper.tiny.batches})


def test_the_page_of_the_project_is_one_of_the_whole_sweep():
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    assert page.splitlines()[2].startswith("**SIMULATED")
    assert "**not judged" not in page.replace("Simulated: ", "")
    for picture in re.findall(r"\]\((images/[^)]*)\)", page):
        assert (ROOT / "docs" / picture).is_file()
