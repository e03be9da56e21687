"""The page of one measured GPU, made from the checks' document alone: what is not in there is not on the page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHECKS = "checks.json"
PAGE = "README.md"


def write_page(folder: Path, document: dict[str, Any]) -> list[str]:
    """Write checks.json and README.md into `folder`, the page last; the findings in a few lines."""
    text = json.dumps(document, indent=1, allow_nan=False, default=str)
    (folder / CHECKS).write_text(text + "\n", encoding="utf-8")
    partial = folder / f".{PAGE}.partial"
    partial.write_text("\n".join(page(document)) + "\n", encoding="utf-8")
    partial.replace(folder / PAGE)
    return findings(document)


def findings(document: dict[str, Any]) -> list[str]:
    """What the checks found, a line each."""
    singles, added, recorder = document["singles"], document["added"], document["recorder"]
    mark = "SIMULATED: " if document["simulated"] else "TRIAL: " if document["trial"] else ""
    lines = []
    if singles.get("ratio"):
        ratio, wide = singles["ratio"], singles["ratio_wide"]
        lines.append(
            f"requests run alone, predicted from the mix: {ratio['median']:.3f} of the measured joules in the median, "
            f"{ratio['p10']:.3f} to {ratio['p90']:.3f} for the middle 80 % of {singles['requests']} requests "
            f"({wide['median']:.3f}, {wide['p10']:.3f} to {wide['p90']:.3f} with half a second on either side)"
        )
    else:
        lines.append(f"requests run alone: not compared ({singles['why']})")
    if added.get("ratio") is not None:
        lines.append(
            f"added stream: {_kj(added['predicted_j'])} predicted, {_kj(added['measured_difference_j'])} measured, "
            f"ratio {added['ratio']:.3f}; the two runs' idle powers alone differ by {_kj(added['idle_drift_j'])}"
        )
    else:
        lines.append(f"added stream: not compared ({added['why']})")
    for name, counter in document["counter"].items():
        off = counter.get("samples_over_counter_rel")
        said = f"{100 * off:+.2f} %" if off is not None else f"not compared ({counter['why']})"
        lines.append(f"power samples against the energy counter, {name}: {said}")
    if recorder.get("overhead_us_mean") is not None:
        lines.append(
            f"step recorder: {recorder['overhead_us_mean']:.0f} µs a step, {100 * recorder['overhead_rel']:.2f} % of "
            f"the median step of {recorder['step_us_median'] / 1e3:.1f} ms"
        )
    else:
        lines.append(f"step recorder: cost not known ({recorder['why']})")
    return [mark + line for line in lines]


def page(document: dict[str, Any]) -> list[str]:
    """The lines of README.md."""
    settings = document["settings"]
    lines = [f"# {document['gpu']}", ""]
    made = "Made by `benchmarks/real_gpu.py` from the run directories beside this page"
    if document["simulated"]:
        lines += ["**SIMULATED: every figure on this page is computed by the simulated engine, none is measured.**"]
        lines += ["", f"{made}."]
    else:
        lines += [f"{made}; [what each check means](../README.md)."]
    if document["trial"]:
        lines += [
            "",
            "**A trial of the command: a tiny model and seconds of load. Its figures say nothing of the GPU.**",
        ]
    what = (
        f"Mix `{settings['mix']}`: {settings['rate_rps']:g} requests/s for {settings['seconds']:g} s; "
        f"{settings['singles']} requests one at a time; the mix with {settings['extra_rps']:g} requests/s added. "
        f"TP {settings['tp']}, clocks as the driver sets them."
    )
    lines += ["", "## What was checked", "", *(f"- {line}" for line in findings(document))]
    lines += ["", "## What was run", "", what, "", _model(document["model"]), ""]
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    lines += [f"Versions: {versions}", ""] if versions else []
    lines += _runs(document["runs"])
    lines += _buckets(document["runs"].get("mix") or {})
    lines += _singles(document["singles"])
    lines += _added(document["added"])
    lines += ["## Power sensors", "", *_probe(document["probe"]), ""]
    return lines + _verdicts(document["runs"])


def _model(model: Any) -> str:
    """What was served."""
    if isinstance(model, str):
        return f"Model: {model}."
    return (
        f"Model: Llama of hidden size {model['hidden_size']}, {model['num_hidden_layers']} layers, "
        f"{model['num_attention_heads']} heads ({model['num_key_value_heads']} for keys and values), vocabulary "
        f"{model['vocab_size']:,}, bf16, with **random weights**. A step's time is that of a trained model of this "
        "shape; power depends on the data too, and random weights are not trained ones."
    )


def _runs(runs: dict[str, Any]) -> list[str]:
    """Where the joules went, a column a run."""
    known = {name: run for name, run in runs.items() if not run["why"]}
    lines = ["## Where the joules went", ""]
    lines += [f"`{name}`: {run['why']}" for name, run in runs.items() if run["why"]]
    if not known:
        return [*lines, ""]

    def row(title: str, cells: Sequence[str]) -> str:
        return f"| {title} | " + " | ".join(cells) + " |"

    lines += [row("", list(known)), "|---" * (len(known) + 1) + "|"]
    lines.append(row("window, s", [f"{run['seconds']:.1f}" for run in known.values()]))
    lines.append(row("requests", [str(run["requests"]) for run in known.values()]))
    names = {
        "measured_j": "measured",
        "prefill_j": "prefill",
        "decode_j": "decode",
        "idle_j": "idle",
        "other_j": "other",
        "marginal_attributed_j": "attributed by `marginal`",
    }
    for key, title in names.items():
        lines.append(row(f"{title}, kJ", [f"{run[key] / 1e3:.3f}" for run in known.values()]))
    for key, title in (("energy_per_request_j", "J a request"), ("marginal_per_request_j", "J a request, `marginal`")):
        lines.append(row(title, [_number(run[key], ".1f") for run in known.values()]))
    for when in ("before", "after"):
        lines.append(row(f"idle power {when}, W", [_idle(run["idle_power_w"], when) for run in known.values()]))
    fits = [run["fit"][0] for run in known.values()]
    lines.append(row("model", [str(fit["model"]) for fit in fits]))
    for key, title in (
        ("duration_rel_rms", "residual of step times"),
        ("power_rel_rms", "residual of sensor windows"),
        ("block_misfit_rel", "misfit between blocks"),
    ):
        lines.append(row(title, [_percent(fit[key]) for fit in fits]))
    notes = [f"- `{name}`: {note}" for name, run in known.items() for note in run["notes"]]
    return [*lines, "", *notes, *([""] if notes else [])]


def _buckets(run: dict[str, Any]) -> list[str]:
    """Joules by size of the mix's requests."""
    if not run.get("buckets"):
        return []
    lines = ["## Joules a request, by size (input, then output)", ""]
    lines += ["| bucket | requests | J | prefill | decode | `marginal` |", "|---|---|---|---|---|---|"]
    for b in run["buckets"]:
        cells = [_number(b[key], ".1f") for key in ("energy_j", "prefill_j", "decode_j", "marginal_j")]
        lines.append(f"| {b['bucket']} | {b['requests']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _singles(singles: dict[str, Any]) -> list[str]:
    """Each request that ran alone."""
    if not singles.get("table"):
        return []
    lines = ["## Requests run alone", ""]
    lines += [
        "| input | output | s | predicted s | measured J | with margins | predicted J | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in singles["table"]:
        lines.append(
            f"| {r['input_tokens']} | {r['output_tokens']} | {r['seconds']:.3f} | {r['predicted_s']:.3f} | "
            f"{r['measured_j']:.1f} | {r['measured_wide_j']:.1f} | {r['predicted_j']:.1f} | {r['ratio']:.3f} |"
        )
    return [*lines, ""]


def _added(added: dict[str, Any]) -> list[str]:
    """The added stream's balance."""
    if "measured_alone_j" not in added:
        return []
    rows = {
        "mix alone, measured": added["measured_alone_j"],
        "mix and stream, measured": added["measured_both_j"],
        "difference, measured": added["measured_difference_j"],
        "difference, predicted": added["predicted_j"],
        "predicted if steps stayed as they were": added["steps_as_they_were_j"],
        "difference of idle power over the window": added["idle_drift_j"],
    }
    lines = ["## Added stream", "", f"{added['requests_added']} requests, windows of {added['seconds']:.1f} s.", ""]
    lines += ["| | kJ |", "|---|---|", *(f"| {name} | {_number(v, '.3f', 1e-3)} |" for name, v in rows.items())]
    return [*lines, ""]


def _probe(probe: dict[str, Any]) -> list[str]:
    """What `replay probe` printed."""
    if not probe["lines"]:
        return [f"Not probed: {probe['why']}."]
    partly = ["", f"Only in part: {probe['why']}."] if probe["why"] else []
    return ["```text", *probe["lines"], "```", *partly]


def _verdicts(runs: dict[str, Any]) -> list[str]:
    """What each run says against itself."""
    lines = ["## Verdicts", ""]
    for name, run in runs.items():
        verdicts = run.get("verdicts") or []
        failed = [f"{v['name']} ({v.get('why') or 'failed'})" for v in verdicts if v["ok"] is False]
        said = "; ".join(failed) if failed else f"none of {len(verdicts)} failed" if verdicts else "none given"
        lines.append(f"- `{name}`: {said}")
    return lines


def _idle(gpus: Sequence[dict[str, Any]], when: str) -> str:
    """Idle power of the group by its best source."""
    each = [g[when] or {} for g in gpus]
    for source in ("counter", "instant", "average"):
        if each and all(e.get(source) is not None for e in each):
            return f"{sum(e[source] for e in each):.1f} ({source})"
    return "-"


def _kj(joules: float) -> str:
    return f"{joules / 1e3:.2f} kJ"


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
