"""A calibration in figures: one document, printed as tables or as JSON, and written as a hardware file."""

from dataclasses import replace
from typing import Any

import polars as pl

from replay.sim.calibrate import Calibration, provenance, run_spreads
from replay.sim.fit import UNTOLD
from replay.sim.hardware import Hardware
from replay.sim.node_file import node_text
from replay.sim.points import SCHEMA, simulate_points
from replay.sim.profile import EngineModel, load_node
from replay.sim.published import BUSY_W, IDLE_W, step_times
from replay.sim.residuals import Spread, add_ratios, knees, levels, spreads, watts_per_unit
from tracegen.console import print_table, prose, say

_CLOSE_RPS = 0.5  # steps of the rate in the published sweeps


def summary(calibration: Calibration) -> dict[str, Any]:
    """Everything that is to be said, ready for JSON."""
    document: dict[str, Any] = {
        "profile": calibration.profile.name,
        "calibration": provenance(calibration),
        "constants": _constants(calibration),
    }
    if calibration.points is None:
        return document | {"runs": run_spreads(calibration)}
    points = calibration.points
    ratios = add_ratios(points)
    held_out = pl.col("held_out")
    parts = {"all": ratios, "fitted": ratios.filter(~held_out), "held_out": ratios.filter(held_out)}
    saturation = knees(points)
    document |= {
        "ratios": {name: spreads(part)[0] for name, part in parts.items() if part.height},
        "ratios_by_tp_and_clock": spreads(ratios, ("tp", "sm_clock_mhz")),
        "ttft_at_highest_clock": levels(points),
        "saturation": saturation,
        "saturation_close": sum(abs(row["measured_rps"] - row["simulated_rps"]) <= _CLOSE_RPS for row in saturation),
        "watts_per_unit_of_power": dict(zip(("p5", "median", "p95"), watts_per_unit(points), strict=True)),
        "step_times": _step_rows(calibration),
        "watts_per_gpu": _watt_rows(calibration),
    }
    if calibration.left_out:
        document["clocks_left_out"] = {
            str(mhz): spreads(add_ratios(left).filter(pl.col("sm_clock_mhz") == mhz))[0]
            for mhz, left in calibration.left_out.items()
            if add_ratios(left).filter(pl.col("sm_clock_mhz") == mhz).height
        }
    return document


def plain(value: Any) -> Any:
    """`value` with its spreads as objects, for JSON."""
    if isinstance(value, Spread):
        return value._asdict()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def _constants(calibration: Calibration) -> list[dict[str, Any]]:
    """Each fitted constant before and after, with its standard error (null where the data say nothing)."""
    if calibration.fitted is None:
        return []
    pairs = zip(calibration.fitted.constants, calibration.fitted.error_rel, strict=True)
    return [
        {
            "constant": constant.name,
            "before": constant.of(calibration.before),
            "after": constant.of(calibration.profile),
            "standard_error_rel": error if error < UNTOLD else None,
        }
        for constant, error in pairs
    ]


def _step_rows(calibration: Calibration) -> list[dict[str, Any]]:
    """Published step times beside the simulated ones."""
    profile = calibration.profile
    able = set(profile.tp_sizes())
    rows = []
    for step in step_times(profile):
        if step.tp in able:
            ms = step.simulated_ms(Hardware(profile, step.tp))
            rows.append(
                {
                    "step": step.name,
                    "fitted": step.fitted and calibration.fitted is not None,
                    "published_ms": step.published_ms,
                    "simulated_ms": ms,
                    "error": ms / step.published_ms - 1,
                }
            )
    return rows


def _watt_rows(calibration: Calibration) -> list[dict[str, Any]]:
    """Published powers of one GPU beside the simulated ones: idle with the model loaded, and busy."""
    profile = calibration.profile
    if not step_times(profile):
        return []
    pair = Hardware(profile, 2)
    idle = [("idle, loaded", mhz, watts, watts, pair.idle_w(mhz)) for mhz, watts in IDLE_W.items()]
    # What the raw logs' small inputs were is not known: short prompts here, at rates that TP2 sustains.
    settings = [(rate, 2, mhz, bucket) for mhz in BUSY_W for bucket in ("SS", "SM") for rate in (0.5, 1.0, 1.5, 2.0)]
    schema = {name: SCHEMA[name] for name in ("load_rps", "tp", "sm_clock_mhz", "bucket")}
    loaded = simulate_points(profile, pl.DataFrame(settings, schema=schema, orient="row"), calibration.data.load)
    means = dict(loaded.group_by("sm_clock_mhz").agg(pl.mean("sim_busy_w")).iter_rows())
    busy = [("busy, short prompts, TP2", mhz, low, high, means[mhz]) for mhz, (low, high) in BUSY_W.items()]
    names = ("what", "mhz", "published_low_w", "published_high_w", "simulated_w")
    return [dict(zip(names, row, strict=True)) for row in idle + busy]


def hardware_file(calibration: Calibration) -> str:
    """The text of a hardware file with the fitted constants; the rest is as in the hardware they started from."""
    profile, document = calibration.profile, summary(calibration)
    node = load_node(profile.hardware)
    engine = EngineModel(profile.max_num_seqs, profile.max_num_batched_tokens, profile.block_tokens)
    fitted = replace(
        node, engine=engine, memory=profile.memory, time=profile.time, power=profile.power, sensor=profile.sensor,
        thermal=profile.thermal,
    )  # fmt: skip
    remarks = {}
    for row in document["constants"]:
        section, key = row["constant"].split(".")
        error = row["standard_error_rel"]
        as_before = f"as in {profile.hardware}: not told by the data"
        remarks[section, key] = as_before if error is None else f"[fitted] standard error {error:.1%}"
    held_out = document.get("ratios", {}).get("held_out")
    left: dict[str, float] = {}
    for name in ("power", "ttft"):
        if held_out and held_out[name]:
            left |= {f"held_out_{name}_ratio_median": held_out[name].median_abs}
            left |= {f"held_out_{name}_ratio_p95": held_out[name].p95_abs}
    for row in document.get("runs", []):
        for name in ("step", "window"):
            if row["held_out"] and row[name]:
                left.setdefault(f"held_out_{name}_median", row[name].median_abs)
    heading = (
        f"{profile.gpu_name}, calibrated by `replay sim calibrate`, starting from {profile.hardware}.\n"
        "[fitted]: fitted to what [calibration] names; everything else is as it was there."
        + ("\nThat was simulated: nothing here was measured." if document["calibration"].get("simulated") else "")
    )
    return node_text(fitted, document["calibration"] | left, remarks, heading)


def print_calibration(calibration: Calibration) -> None:
    """Print the document's tables."""
    document = summary(calibration)
    if document["constants"]:
        say("Fitted constants")
        print_table(
            ("constant", "before", "after", "standard error"),
            [
                [
                    row["constant"], f"{row['before']:.4g}", f"{row['after']:.4g}",
                    "not told" if row["standard_error_rel"] is None else f"{row['standard_error_rel']:.1%}",
                ]
                for row in document["constants"]
            ],
        )  # fmt: skip
        say()
    if document["calibration"].get("simulated"):
        prose(["SIMULATED: what was compared with are runs of a simulated engine, no measurements", ""])
    if "runs" in document:
        _print_runs(document)
    else:
        _print_points(document)


def _print_runs(document: dict[str, Any]) -> None:
    prose(["Runs: errors of step durations and of sensor windows, median and p95 of their size"])
    print_table(
        ("run", "part", "steps", "", "windows", ""),
        [
            [row["run"], "held out" if row["held_out"] else "fitted", *_cells(row["step"]), *_cells(row["window"])]
            for row in document["runs"]
        ],
        left=2,
    )


def _cells(spread: Spread | None) -> list[str]:
    return ["-", "-"] if spread is None else [f"{spread.median_abs:.1%}", f"{spread.p95_abs:.1%}"]


def _print_points(document: dict[str, Any]) -> None:
    groups = [({"part": name.replace("_", " ")}, row) for name, row in document["ratios"].items()]
    _print_spreads("Ratios to the highest clock, points below saturation", groups)
    rows = document["ratios_by_tp_and_clock"]
    _print_spreads("By TP and clock", [({"TP": row["tp"], "MHz": row["sm_clock_mhz"]}, row) for row in rows])
    left_out = document.get("clocks_left_out", {})
    if left_out:
        _print_spreads("Each clock, by a fit without it", [({"MHz": mhz}, row) for mhz, row in left_out.items()])
    if document["step_times"]:
        say("Step times")
        print_table(
            ("step", "published ms", "simulated ms", "error"),
            [
                [row["step"], f"{row['published_ms']:.1f}", f"{row['simulated_ms']:.1f}", f"{row['error']:+.1%}"]
                for row in document["step_times"]
            ],
        )
        say()
    if document["watts_per_gpu"]:
        say("Power of one GPU, W")
        print_table(
            ("", "MHz", "published", "simulated"),
            [
                [
                    row["what"], str(row["mhz"]),
                    "-".join(f"{watts:.0f}" for watts in sorted({row["published_low_w"], row["published_high_w"]})),
                    f"{row['simulated_w']:.0f}",
                ]
                for row in document["watts_per_gpu"]
            ],
        )  # fmt: skip
        say()
    rows, of = document["ttft_at_highest_clock"], f"of {len(document['saturation'])} cells"
    close = f"{document['saturation_close']} {of} within {_CLOSE_RPS} requests/s"
    prose(
        [
            "P99 TTFT at the highest clock, simulated over measured - 1: median, and median and p95 of its size",
            *(f"  TP{row['tp']}: {row['ttft'].median:+.1%}, {', '.join(_cells(row['ttft']))}" for row in rows),
            "",
            f"Highest rate sustained at the highest clock: {close}",
        ]
    )
    print_table(
        ("cell", "measured", "simulated"),
        [
            [
                f"TP{row['tp']} {row['bucket']}", f"{'>= ' if row['ended'] else ''}{row['measured_rps']:g}",
                f"{row['simulated_rps']:g}",
            ]
            for row in document["saturation"]
        ],
    )  # fmt: skip
    watts = document["watts_per_unit_of_power"]
    said = f"simulated W for one unit of power: {watts['median']:.2f} (p5 {watts['p5']:.2f}, p95 {watts['p95']:.2f})"
    prose(["", said])


def _print_spreads(title: str, groups: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    prose([title])
    if not groups:
        prose(["  none: no point below saturation has one at the highest clock of the same TP, bucket and rate", ""])
        return
    columns = ("points", "power measured", "simulated", "error", "p95", "TTFT measured", "simulated", "error", "p95")
    rows = []
    for keys, row in groups:
        cells = [str(value) for value in keys.values()] + [str(row["power"].points)]
        for name in ("power", "ttft"):
            cells += [f"{row[f'{name}_measured']:.3f}", f"{row[f'{name}_simulated']:.3f}", *_cells(row[name])]
        rows.append(cells)
    print_table((*groups[0][0], *columns), rows, left=len(groups[0][0]))
    say()
