"""Draw docs/images/demo.svg, the README's picture, from the runs that `make demo` left in demo/."""

from pathlib import Path

import polars as pl

from analysis.figures import buckets
from analysis.query import query
from replay.rundir import Run
from tracegen.buckets import BUCKETS

PICTURE = Path(__file__).parent / "images" / "demo.svg"
PARTS = ["prefill", "decode"]
SQL = """
    SELECT freq_mhz, bucket, avg(prefill_j) AS prefill, avg(decode_j) AS decode
    FROM requests WHERE status = 'ok' GROUP BY freq_mhz, bucket
"""


def main() -> None:
    """Draw it."""
    means = query([Run.open("demo/run-1980"), Run.open("demo/run-1200")], SQL)
    size = pl.col("bucket").replace_strict({bucket: i for i, bucket in enumerate(BUCKETS)})
    frame = (
        means.unpivot(on=PARTS, index=["freq_mhz", "bucket"], variable_name="part", value_name="joules")
        .sort(-pl.col("freq_mhz"), size)
        .select(
            pl.format("{} MHz (simulated)", "freq_mhz").alias("run"),
            pl.col("bucket").alias("group"),
            "part",
            (pl.col("part") == PARTS[1]).cast(pl.Int8).alias("rank"),
            "joules",
        )
    )
    PICTURE.parent.mkdir(exist_ok=True)
    # A ground of its own, for readers whose pages are dark.
    PICTURE.write_text(buckets(frame).replace("<svg ", '<svg style="background:#fff" ', 1), encoding="utf-8")
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
