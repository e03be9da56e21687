"""What each request of a run cost in energy: `attribute` computes it, `write_energy` keeps it in the run's `energy/`.

Per engine instance: the energy curve of its GPUs, idle power, a step model, prices, conservation block by block, and
running sums over segments; all of it slab by slab, so that memory does not grow with a run's length but by requests
and segments. The truth table of a simulated run is never read here.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl

from analysis.accounts import account, fit_run, slabs_of, timelines_of
from analysis.load import RunData, load_run
from analysis.memory import kept_for_reuse
from analysis.meters import Meters
from analysis.slabs import RunSlabs, Slab
from analysis.split import DEFAULT_METHOD, MARGINAL, METHOD_NAMES
from analysis.steps import Bools
from analysis.summary import RECORDS, InstanceEnergy, summarize
from analysis.tally import Bill, Tally
from analysis.timeline import GpuTimeline
from replay.rundir import Run
from tracegen.console import format_si
from tracegen.errors import AnalysisError
from tracegen.schema import write_parquet

ENERGY_DIR = "energy"
SUMMARY = "summary.json"
THREADS = 2  # that price and share, beside those that read ahead and put everything in order
AHEAD = 4  # slabs of an instance that are worked on or wait to be added up
PARTS_AHEAD = 3  # stretches of time whose slabs are ready or made ready

_Part = list[tuple[Slab, list[GpuTimeline]]]  # an instance's slab of a stretch of time, and what its meters say


@dataclass(frozen=True)
class Energy:
    """A run accounted for."""

    run: Run
    requests: pl.DataFrame  # request_id, energy_j, prefill_j, decode_j, shared_j, energy_se_j
    instances: tuple[InstanceEnergy, ...]
    summary: dict[str, Any]


def attribute(run: Run, method: str = DEFAULT_METHOD, scope: str = "gpu") -> Energy:
    """Share the measured energy of `run` out to its requests.

    `requests` has one row a row of requests.parquet: `energy_j = prefill_j + decode_j`, of which `shared_j` was shared
    equally, and the standard error `energy_se_j`; null where nothing is known of a request's work.
    Σ energy_j + idle_j + other_j = measured_j to 1e-9, with every method.

    Raises `AnalysisError` for an unknown method or a run without power, `RunError` for a broken table.
    """
    return attribute_methods(run, [method], scope)[method]


def attribute_methods(
    run: Run,
    methods: Sequence[str],
    scope: str = "gpu",
    progress: Callable[[float], None] = lambda _: None,
    **options: int,
) -> dict[str, Energy]:
    """`attribute` by several methods at the price of reading and fitting once.

    `progress` is told the part that is done; `options` are those of `RunSlabs`.
    """
    for method in methods:
        if method not in METHOD_NAMES:
            raise AnalysisError(f"method '{method}' is unknown; use one of {', '.join(METHOD_NAMES)}")
    data = load_run(run, scope)
    slabs, remarks = slabs_of(data, **options)
    data = replace(data, notes=(*data.notes, *remarks))
    meters = [Meters(data, instance) for instance in data.instances]
    with kept_for_reuse(), ExitStack() as beside:
        parts: Iterable[_Part]
        if slabs.count > 1:
            sample = slabs.sample()
            # The first are made ready while the model is fitted.
            parts = beside.enter_context(_Ahead(_metered(data, slabs, meters), PARTS_AHEAD))
        else:
            parts = list(_metered(data, slabs, meters))
            sample = [[slab for slab, _ in part] for part in parts]
        fitted = fit_run(data, sample)
        rows = [slabs.rows_of(instance) for instance in data.instances]
        tallies = {
            m: [Tally(data, i, fit, m, mine) for i, fit, mine in zip(data.instances, fitted, rows, strict=True)]
            for m in methods
        }

        def work_out(i: int, slab: Slab, lines: list[GpuTimeline]) -> list[Bill]:
            known = account(data, slab, fitted[i], lines)
            return [tallies[method][i].bill(known) for method in methods]

        with _InOrder(THREADS, AHEAD) as threads:
            for done, part in enumerate(parts):
                for i, (slab, lines) in enumerate(part):
                    threads.put(partial(work_out, i, slab, lines), partial(_settle, [tallies[m][i] for m in methods]))
                progress((done + 1) / slabs.count)
    data = replace(data, notes=(*data.notes, *(note for meter in meters for note in meter.notes())))
    return {m: _energy(data, tallies.pop(m), meters, m) for m in methods}


def _metered(data: RunData, slabs: RunSlabs, meters: Sequence[Meters]) -> Iterator[_Part]:
    """The slabs of each instance in order of time, with what their meters say; `meters` gather it."""
    for part in slabs:
        told = []
        for meter, slab in zip(meters, part, strict=True):
            lines = timelines_of(data, slab, meter.known())
            meter.add(slab, lines)
            told.append((slab, lines))
        yield told


def _settle(tallies: Sequence[Tally], bills: Sequence[Bill]) -> None:
    """Add each method's bill to its tally."""
    for tally, bill in zip(tallies, bills, strict=True):
        tally.add(bill)


class _Ahead:
    """Goes through `items` in a thread of its own, ahead of who takes them."""

    def __init__(self, items: Iterator[_Part], most: int) -> None:
        """`most`: items that may wait."""
        self._thread, self._items = ThreadPoolExecutor(1), items
        self._waiting = deque(self._thread.submit(next, items, None) for _ in range(most))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[_Part]:
        while (item := self._waiting.popleft().result()) is not None:
            self._waiting.append(self._thread.submit(next, self._items, None))
            yield item


class _InOrder:
    """Threads for work that may be done in any order, whose results are taken in the order of the work."""

    def __init__(self, threads: int, ahead: int) -> None:
        """`ahead`: results that may wait."""
        self._pool, self._ahead = ThreadPoolExecutor(threads), ahead
        self._waiting: deque[tuple[Future[Any], Callable[[Any], None]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._take(0)
        self._pool.shutdown(cancel_futures=True)

    def put(self, work: Callable[[], Any], take: Callable[[Any], None]) -> None:
        """Have `work` done; its result will be given to `take` here, as soon as too many wait or at the end."""
        self._waiting.append((self._pool.submit(work), take))
        self._take(self._ahead)

    def _take(self, left: int) -> None:
        while len(self._waiting) > left:
            future, take = self._waiting.popleft()
            take(future.result())


def _energy(data: RunData, tallies: list[Tally], meters: list[Meters], method: str) -> Energy:
    """The run's table and summary from its instances."""
    count = data.requests.height
    sums = {name: np.zeros(count) for name in ("prefill_j", "decode_j", "shared_j", "variance")}
    seen = np.zeros(count, dtype=bool)
    parts: list[InstanceEnergy] = []
    while tallies:  # let go of one by one: each holds seven sums a request
        tally, meter = tallies.pop(0), meters[len(parts)]
        mine = tally.requests()
        for name, whole in sums.items():
            whole[mine.rows] += getattr(mine, name)
        seen[mine.rows] |= mine.seen
        parts.append(tally.total(meter))
    unknown = _unknown(data, parts, seen)
    prefill_j, decode_j = sums.pop("prefill_j"), sums.pop("decode_j")
    columns = {
        "energy_j": prefill_j + decode_j,
        "prefill_j": prefill_j,
        "decode_j": decode_j,
        "shared_j": sums.pop("shared_j"),
        "energy_se_j": np.sqrt(sums.pop("variance")),
    }
    frame = pl.DataFrame({"request_id": data.requests["request_id"], **columns})
    if unknown.any():
        frame = frame.with_columns(pl.when(~pl.Series(unknown)).then(pl.exclude("request_id")).name.keep())
    summary = summarize(data, parts, frame, method, int(unknown.sum()))
    if method == MARGINAL:
        left = format_si(summary["other_j"], " J", 4)
        summary["notes"].append(
            f"other ({left}) has what no single request adds to a step: marginal costs do not add up"
        )
    return Energy(data.run, frame, tuple(parts), summary)


def _unknown(data: RunData, parts: list[InstanceEnergy], seen: Bools) -> Bools:
    """Requests of whose work nothing is known: null, not zero.

    With step records a request in no step did no work, which is a measured zero, unless it got tokens: then its record
    was lost. Without step records nothing is known of a request that left no trace in time.
    """
    recorded = [p.instance for p in parts if p.membership == RECORDS]
    got_tokens = pl.col("first_token_s").is_not_null() | (pl.col("status") == "ok")
    idle_for_sure = data.requests.select(pl.col("instance").is_in(recorded) & ~got_tokens).to_series().fill_null(False)
    return np.asarray(~seen & ~idle_for_sure.to_numpy())


def write_energy(energy: Energy, tables: Mapping[str, pl.DataFrame]) -> Path:
    """Keep an attribution as `energy/` in its run directory: `tables` by name, then summary.json; returns the folder.

    Everything is written beside and renamed into place, the summary last: who finds it finds all of it.
    Raises `AnalysisError` where the file system refuses.
    """
    folder = energy.run.path / ENERGY_DIR
    partial = folder / f".{SUMMARY}.partial"
    try:
        folder.mkdir(exist_ok=True)
        (folder / SUMMARY).unlink(missing_ok=True)  # while tables change there is no summary
        for name, frame in tables.items():
            write_parquet(frame.to_arrow(compat_level=pl.CompatLevel.oldest()), folder / f"{name}.parquet")
        try:
            partial.write_text(json.dumps(energy.summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            partial.replace(folder / SUMMARY)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise AnalysisError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return folder
