"""Attribute a run's measured energy to its requests and size buckets, and compare runs.

What the commands do, in Python, on `run = replay.rundir.Run.open(PATH)`:

- `analysis.energy.attribute(run)`: joules of each request; `analysis.saved.save` keeps them in the run's `energy/`.
- `analysis.added.added_energy(run, request_ids)`: what a set of requests added to the meter, by the run's own model.
- `analysis.evaluate.evaluate(run)`: the error against a simulated run's ground truth.
- `analysis.saved.ensure_energy(run)`: what is kept, or computed now; the functions below take it.
- `analysis.buckets.bucket_table(run, energy.requests)`: requests by size or label.
- `analysis.serving.serving(run, energy, question)`: latencies, rates, goodput and power, also by time window.
- `analysis.compare.compare(a, b, energy_a, energy_b)`, `analysis.compare.compare_arms(a, b)` for repeated runs.
- `analysis.sweep.load_sweep(dir)` and `analysis.recommend.recommend(table, wanted)`: a sweep, and its best setting.
- `analysis.top.top(run, energy)`: who cost most.
- `analysis.report.write_report(runs, energies, path, title)`.

And over many runs at once, `runs = analysis.open_runs("runs/*")`: `runs.requests()`, `runs.steps()`, `runs.sql(TEXT)`
and more are LazyFrames with columns that tell the runs apart (docs/queries.md).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.tables import Runs, open_runs

__all__ = ["Runs", "open_runs"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are used: `analysis --help` needs none of what they need."""
    if name in __all__:
        from analysis import tables

        return getattr(tables, name)
    raise AttributeError(f"module 'analysis' has no attribute '{name}'")
