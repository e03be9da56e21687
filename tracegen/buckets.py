"""Size buckets: which cell of the grid of input and output lengths a request falls in.

Thresholds follow DynamoLLM (Stojkovic et al., HPCA 2025, arXiv:2408.00741): input Short < 256 ≤ Medium < 1024 ≤ Long
≤ 8192, output Short < 100 ≤ Medium < 350 ≤ Long. The first letter is the input's, the second the output's; an input
beyond the grid is `X`.
"""

import polars as pl

INPUT_EDGES = (256, 1024, 8192)
OUTPUT_EDGES = (100, 350)
BUCKETS = ("SS", "SM", "SL", "MS", "MM", "ML", "LS", "LM", "LL", "XS", "XM", "XL")


def bucket_expr(
    input_tokens: pl.Expr,
    output_tokens: pl.Expr,
    input_edges: tuple[int, int, int] = INPUT_EDGES,
    output_edges: tuple[int, int] = OUTPUT_EDGES,
) -> pl.Expr:
    """One of `BUCKETS` as String for each row; null where either length is null.

    `input_edges` are the first Medium, the first Long and the last Long input length in tokens; `output_edges` the
    first Medium and the first Long output length.
    """
    medium_in, long_in, last_in = input_edges
    medium_out, long_out = output_edges
    first = (
        pl.when(input_tokens < medium_in)
        .then(pl.lit("S"))
        .when(input_tokens < long_in)
        .then(pl.lit("M"))
        .when(input_tokens <= last_in)
        .then(pl.lit("L"))
        .when(input_tokens > last_in)
        .then(pl.lit("X"))
    )
    second = (
        pl.when(output_tokens < medium_out)
        .then(pl.lit("S"))
        .when(output_tokens < long_out)
        .then(pl.lit("M"))
        .when(output_tokens >= long_out)
        .then(pl.lit("L"))
    )
    return pl.concat_str(first, second)
