"""Draw joules per request by size: `python docs/make_picture.py docs/images/demo.svg demo/run-1830 demo/run-1200`."""

import sys
from pathlib import Path

import polars as pl

from analysis.figures import buckets
from analysis.query import query
from replay.rundir import Run
from tracegen.buckets import BUCKETS

PARTS = ["prefill", "decode"]
SQL = """
    SELECT freq_mhz, engine, bucket, avg(prefill_j) AS prefill, avg(decode_j) AS decode
    FROM requests WHERE status = 'ok' GROUP BY freq_mhz, engine, bucket
"""


def main() -> None:
    """Draw it."""
    picture, *runs = map(Path, sys.argv[1:])
    means = query([Run.open(path) for path in runs], SQL)
    size = pl.col("bucket").replace_strict({bucket: i for i, bucket in enumerate(BUCKETS)})
    frame = (
        means.unpivot(on=PARTS, index=["freq_mhz", "engine", "bucket"], variable_name="part", value_name="joules")
        .sort(-pl.col("freq_mhz"), size)
        .select(
            pl.format("{} MHz ({})", "freq_mhz", "engine").alias("run"),
            pl.col("bucket").alias("group"),
            "part",
            (pl.col("part") == PARTS[1]).cast(pl.Int8).alias("rank"),
            "joules",
        )
    )
    picture.parent.mkdir(exist_ok=True)
    # A ground of its own, for readers whose pages are dark.
    title = f"joules per request by size, {' and '.join(frame['run'].unique(maintain_order=True))}"
    drawn = buckets(frame, title).replace("<svg ", '<svg style="background:#fff" ', 1)
    picture.write_text(drawn, encoding="utf-8")
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
