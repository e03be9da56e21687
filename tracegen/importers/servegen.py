"""ServeGen client pools: not requests but clients, from which requests are drawn anew.

Format (README and data/ of github.com/alibaba/ServeGen, Xiang et al. 2025): a folder, or an archive of it, with two
files a client. `chunk-N-trace.csv` has no header and the columns time in seconds, requests/s, CV of gaps, their family
(Gamma, Weibull; empty without requests), and two parameters of that family, one row for each stretch of time (600 s as
published). `chunk-N-dataset.json` has for each six hours the probabilities of input and output lengths, as text
(`"{45: 0.0097, ...}"`).

What is drawn: in each stretch a renewal process of each client, in equilibrium, with the client's rate, CV and family
(the two parameters say the same as rate and CV, but for the cut at the stretch's end: they are not used); for each
request an input and an output length, **independently**: the pool has no word on how they depend. ServeGen's own
generator draws both from one uniform number, which makes the longest output follow the longest input.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tracegen.console import plural
from tracegen.durations import NS_PER_S, format_duration
from tracegen.errors import TraceError
from tracegen.importers.base import Report
from tracegen.importers.servegen_pool import FAMILIES, SIDES, Client, Pool, read_pool
from tracegen.schema import check_output
from tracegen.streams import random_stream
from tracegen.writer import TraceWriter

NAME = "servegen"
_ROWS = 1 << 18  # to a part of the file


def import_servegen(
    location: str | Path,
    output: str | Path | None = None,
    *,
    start_ns: int = 0,
    duration_ns: int | None = None,
    rate_rps: float | None = None,
    seed: int = 1,
    label: str | None = None,
    force: bool = False,
) -> Report:
    """Draw the requests of the pool at `location` (a folder, or a tar, plain or packed) into the trace `output`.

    They are those from `start_ns` of the pool's time on, for `duration_ns` (by default to its end), as many as the
    pool has, or with `rate_rps` all clients' rates times one factor, so that their mean over that time is `rate_rps`;
    CVs stay. Each row has its client's number as `client_id`. A stretch is drawn the same whichever time is asked for.
    Clients that have requests but no lengths are left out, and counted in a remark.

    Raises `TraceError` for what is no pool, a damaged file (with its line), a time that the pool does not have, and
    where no request is drawn.
    """
    pool = read_pool(location, start_ns, None if duration_ns is None else start_ns + duration_ns)
    end_ns = pool.span_ns if duration_ns is None else start_ns + duration_ns
    if not 0 <= start_ns < end_ns <= pool.span_ns:
        raise TraceError(
            f"{location}: {format_duration(start_ns)} to {format_duration(end_ns)} is asked for, and the pool has "
            f"0 to {format_duration(pool.span_ns)}; choose --start and --duration within it"
        )
    label = label or pool.name
    output = Path(output or f"{label}.parquet")
    check_output(output, force=force)
    clients, remarks = _with_lengths(pool, start_ns, end_ns)
    expected = pool.requests(start_ns, end_ns, clients)
    if not expected:
        raise TraceError(f"{location}: no client with lengths has requests in the time asked for")
    if rate_rps is not None and rate_rps <= 0:
        raise TraceError(f"--rate {rate_rps:g}: is not a positive number of requests/s")
    factor = 1.0 if rate_rps is None else rate_rps * (end_ns - start_ns) / NS_PER_S / expected
    parameters = {
        "label": label,
        "start_s": start_ns / NS_PER_S,
        "duration_s": (end_ns - start_ns) / NS_PER_S,
        "rate_rps": rate_rps,
        "rate_factor": factor,
    }
    report = Report(NAME, output, remarks=remarks)
    report.metadata = {
        "generator": f"tracegen import {NAME}",
        "parameters": parameters,
        "seed": seed,
        "source": {
            "file": pool.said,
            "sha256": pool.sha256,
            "clients": len(clients),
            "expected_requests": expected * factor,
            "lengths": "input and output drawn independently",
            "remarks": remarks,
        },
    }
    with TraceWriter(output, report.metadata) as writer:
        for frame in _parts(_draw(pool, clients, factor, start_ns, end_ns, seed)):
            numbers = pl.int_range(writer.rows, writer.rows + frame.height, dtype=pl.UInt64, eager=True)
            writer.write(frame.with_columns(request_id=numbers, label=pl.lit(label)))
        if not writer.rows:
            raise TraceError(f"{location}: no request was drawn ({expected * factor:.3g} expected); ask for more time")
        report.rows = writer.rows
        report.span_ns = writer.last_ns
        report.input_tokens, report.output_tokens = writer.input_tokens, writer.output_tokens
    return report


def _with_lengths(pool: Pool, start_ns: int, end_ns: int) -> tuple[dict[int, Client], list[str]]:
    """The clients that have lengths, in order of number, and remarks on what was left out."""
    clients = {number: pool.clients[number] for number in sorted(pool.clients) if pool.clients[number].lengths}
    everybody = pool.requests(start_ns, end_ns)
    without = everybody - pool.requests(start_ns, end_ns, clients)
    remarks = [
        "requests were drawn from the pool's clients: their rates, CVs and lengths are the pool's, their times are not"
    ]
    if without > 0:
        lost = len(pool.clients) - len(clients)
        remarks.append(
            f"{plural(lost, 'client')} without lengths {'is' if lost == 1 else 'are'} left out, with "
            f"{without / everybody:.1%} of the requests"
        )
    if pool.ignored:
        remarks.append(f"the pool has {', '.join(sorted(pool.ignored))} too, which a trace has no column for")
    return clients, remarks


def _draw(
    pool: Pool, clients: Mapping[int, Client], factor: float, start_ns: int, end_ns: int, seed: int
) -> Iterator[pl.DataFrame]:
    """The requests of each stretch, in order; three streams of random numbers for each."""
    step_ns = pool.step_s * NS_PER_S
    for step in range(int(start_ns // step_ns), min(pool.steps, int(-(-end_ns // step_ns)))):
        gaps, inputs, outputs = (random_stream(seed, f"{NAME} {what}", step) for what in ("gaps", *SIDES))
        columns: dict[str, list[Any]] = {"arrival_ns": [], "client_id": [], "input_tokens": []}
        columns["output_tokens"] = []
        for number, client in clients.items():
            stretch = client.stretches.get(step)
            if stretch is None:
                continue
            rate_rps = stretch.rate_rps * factor
            points = FAMILIES[stretch.family](rate_rps * pool.step_s, gaps, stretch.cv)
            lengths = client.lengths_at(step * pool.step_s)
            columns["arrival_ns"].append((step * step_ns + points / rate_rps * NS_PER_S).astype(np.int64))
            columns["client_id"].append(np.full(len(points), number, np.uint64))
            columns["input_tokens"].append(lengths[0].draw(len(points), inputs))
            columns["output_tokens"].append(lengths[1].draw(len(points), outputs))
        if columns["arrival_ns"]:
            rows = pl.DataFrame({name: np.concatenate(parts) for name, parts in columns.items()})
            rows = rows.filter(pl.col("arrival_ns").is_between(start_ns, end_ns - 1)).sort(
                "arrival_ns", maintain_order=True
            )
            yield rows.with_columns(pl.col("arrival_ns") - start_ns)


def _parts(frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """`frames` joined to parts of a size that suits the file."""
    held: list[pl.DataFrame] = []
    for frame in frames:
        if frame.height:
            held.append(frame)
        if sum(part.height for part in held) >= _ROWS:
            yield pl.concat(held)
            held = []
    if held:
        yield pl.concat(held)
