"""Attribute a run's measured energy to its requests and size buckets, and compare runs.

What the commands do, in Python, on `run = replay.rundir.Run.open(PATH)`:

- `analysis.energy.attribute(run)`: joules of each request; `analysis.saved.save` keeps them in the run's `energy/`.
- `analysis.added.added_energy(run, request_ids)`: what a set of requests added to the meter, by the run's own model.
- `analysis.evaluate.evaluate(run)`: the error against a simulated run's ground truth.
- `analysis.saved.ensure_energy(run)`: what is kept, or computed now; the functions below take it.
- `analysis.buckets.bucket_table(run, energy.requests)`, `analysis.compare.compare(a, b, energy_a, energy_b)`.
- `analysis.query.query(runs, sql)`, `analysis.report.write_report(runs, energies, path, title)`.
"""
