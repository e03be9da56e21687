"""Scrape a server's `/metrics` once a second into `server_metrics.parquet`."""

import asyncio
import re
from functools import partial
from pathlib import Path

import aiohttp
import polars as pl

from replay.clock import NS_PER_S, now_ns
from replay.records import finish_in_thread
from replay.rundir import PartWriter
from replay.tables import SERVER_METRICS

_PERIOD_S = 1.0
# name{labels} value, as in the Prometheus text format; comments and timestamps are not needed here.
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)", re.MULTILINE)
_SKIPPED = (
    "_bucket",
    "_created",
)  # histograms' cells: many rows, little said that requests.parquet does not say better


def parse_metrics(text: str) -> list[tuple[str, str, float]]:
    """(name, labels, value) of each sample in a Prometheus text exposition, but for histogram cells."""
    rows = []
    for name, labels, value in _SAMPLE.findall(text):
        if not name.endswith(_SKIPPED):
            try:
                rows.append((name, labels, float(value)))
            except ValueError:
                continue
    return rows


async def scrape(session: aiohttp.ClientSession, base_url: str, run_dir: Path, instance: int) -> None:
    """Scrape until cancelled; a server without metrics leaves no table."""
    writer = PartWriter(run_dir, "server_metrics", prefix=f"engine{instance:03d}")
    while True:
        t_ns = now_ns()
        try:
            async with session.get(f"{base_url}/metrics", timeout=aiohttp.ClientTimeout(total=5)) as answer:
                rows = parse_metrics(await answer.text(errors="replace")) if answer.status == 200 else []
        except (aiohttp.ClientError, OSError, TimeoutError):
            rows = []
        if rows:
            frame = pl.DataFrame(rows, schema=["name", "labels", "value"], orient="row").select(
                pl.lit(t_ns).alias("t_ns"), pl.lit(instance, pl.UInt16).alias("instance"), pl.all()
            )
            await finish_in_thread(partial(writer.append, frame.select(list(SERVER_METRICS))))
        await asyncio.sleep(max(0.0, _PERIOD_S - (now_ns() - t_ns) / NS_PER_S))
