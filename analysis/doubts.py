"""Every reason to doubt a run's figures, each with its size in joules: `analysis check`."""

from dataclasses import dataclass
from typing import Any

from analysis import doubts_meter, doubts_sensor, doubts_work
from analysis.evidence import DOUBT, ERROR, OK, Doubt, Evidence, gather
from replay.rundir import Run
from tracegen.console import format_si
from tracegen.errors import AnalysisError

DEFAULT_BOUND = "5%"  # as large as what the meters' gain leaves open anyway


@dataclass(frozen=True)
class Check:
    """What `check_run` found; `bound_rel` is of the measured energy."""

    run: Run
    measured_j: float | None
    scope: str | None  # whose joules these are; None without an attribution
    bound_rel: float
    doubts: tuple[Doubt, ...]
    attributed: bool
    remark: str | None  # that energy was attributed just now

    @property
    def serious(self) -> tuple[Doubt, ...]:
        """The doubts that are larger than the bound; those that are not counted or have no size are never."""
        return tuple(
            doubt
            for doubt in self.doubts
            if doubt.counted and doubt.joules is not None and doubt.joules > self.bound_rel * (self.measured_j or 0.0)
        )

    @property
    def passed(self) -> bool:
        """Whether there are figures, and nothing serious speaks against them."""
        return self.attributed and not self.serious

    def share(self, doubt: Doubt) -> float | None:
        """A doubt's joules over those measured."""
        return doubt.joules / self.measured_j if doubt.joules is not None and self.measured_j else None

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "run": self.run.name,
            "simulated": self.run.simulated,
            "measured_j": self.measured_j,
            "scope": self.scope,
            "bound_rel": self.bound_rel,
            "passed": self.passed,
            "doubts": [
                {
                    "name": doubt.name,
                    "status": doubt.status,
                    "joules": doubt.joules,
                    "joules_are": doubt.joules_are,
                    "share": self.share(doubt),
                    "serious": doubt in self.serious,
                    "counted": doubt.counted,
                    "why": doubt.why,
                    "do": doubt.do,
                }
                for doubt in self.doubts
            ],
        }


def check_run(run: Run, bound_rel: float = 0.05) -> Check:
    """Ask everything that speaks against the figures of `run`; its energy is attributed where it was not yet.

    A doubt's joules are either what the figures may be off by, or what was spent while the condition held. Doubts do
    not add up: one cause may show in several. Raises `RunError` for a table that cannot be read.
    """
    case = gather(run)
    found = [
        *doubts_work.circumstances(case),
        *(ask(case) for ask in (*doubts_work.CHECKS, *doubts_meter.CHECKS, *doubts_sensor.CHECKS)),
        *doubts_meter.throttled(case),
        *doubts_work.verdicts(case),
    ]
    order = sorted(found, key=lambda doubt: _rank(case, doubt))
    scope = case.summary.get("scope")
    return Check(run, case.measured_j, scope, bound_rel, tuple(order), not case.why, case.remark)


def parse_bound(text: str) -> float:
    """`5%` or `0.05` as a share. Raises `AnalysisError`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise AnalysisError(f"--bound '{text}': give a share of the measured energy, for example 5% or 0.05")
    return value


def _rank(case: Evidence, doubt: Doubt) -> tuple[int, float]:
    """Doubts first, the largest on top, those without a size behind them; what is fine comes last."""
    kind = [DOUBT, "unknown", OK].index(doubt.status)
    size = doubt.joules if doubt.joules is not None else -1.0
    return kind, -size


def rows_for_people(check: Check) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: one row a question that found something or has no answer."""
    rows = []
    for doubt in check.doubts:
        if _clear(doubt):
            continue
        share = check.share(doubt)
        sign = "±" if doubt.joules_are == ERROR else ""
        rows.append(
            [
                doubt.name,
                doubt.status.upper() if doubt in check.serious else doubt.status,
                "-" if doubt.joules is None else sign + format_si(doubt.joules, digits=3),
                "-" if share is None else f"{100 * share:.2f} %",
                doubt.why,
            ]
        )
    return ["", "", "J", "share", "why"], rows


def _clear(doubt: Doubt) -> bool:
    """Whether nothing at all was found."""
    return doubt.status == OK and not doubt.joules


def advice(check: Check) -> list[str]:
    """What to do about each doubt, and how the check ended."""
    clear = [doubt.name for doubt in check.doubts if _clear(doubt)]
    lines = [f"nothing found: {', '.join(clear)}", "±: the figures may be off by so much; else: joules spent in it"]
    lines += [f"{doubt.name}: {doubt.do}" for doubt in check.doubts if doubt.status == DOUBT and doubt.do]
    measured = f"{format_si(check.measured_j, ' J', 4)} measured" + (f" (scope {check.scope})" if check.scope else "")
    bound = f"{100 * check.bound_rel:g} % of the {measured}"
    if not check.attributed:
        lines.append("NOT TO BE TRUSTED: there are no figures")
    elif check.serious:
        lines.append(f"NOT TO BE TRUSTED without a look at what is larger than {bound}: ")
        lines[-1] += ", ".join(dict.fromkeys(doubt.name for doubt in check.serious))
    else:
        lines.append(f"nothing is larger than {bound}")
    return lines
