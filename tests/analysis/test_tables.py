"""Latency, buckets, comparison and queries against plain Polars and hand-made numbers."""

import numpy as np
import polars as pl
import pytest

from analysis.buckets import bucket_table, rows_for_people
from analysis.energy import attribute
from analysis.gaps import RELATIVE_ERROR
from analysis.query import query
from analysis.requests import request_table
from analysis.slo import Slo
from tracegen.errors import AnalysisError

EVER, NEVER = (Slo({"ttft": (ms,) * 3, "tpot": (1e9,) * 3}) for ms in (1e9, 1e-9))


def test_buckets_are_what_plain_polars_says(run_of):
    run = run_of()
    energy = attribute(run).requests
    table = bucket_table(run, energy)
    rows = request_table(run, energy)
    assert table["group"][-1] == "all"
    assert table["requests"][:-1].sum() == rows.height
    for row in table.iter_rows(named=True):
        mine = rows if row["group"] == "all" else rows.filter(pl.col("bucket") == row["group"])
        assert row["requests"] == mine.height
        assert row["ttft_ms_p90"] == pytest.approx(mine["ttft_ms"].quantile(0.9, "linear"))
        assert row["energy_per_request_j"] == pytest.approx(mine["energy_j"].mean())
        assert row["energy_per_output_token_j"] == pytest.approx(mine["energy_j"].sum() / mine["output_tokens"].sum())
        assert row["energy_per_input_token_prefill_j"] == pytest.approx(
            mine["prefill_j"].sum() / mine["input_tokens"].sum()
        )
        assert row["prefill_share"] + row["decode_share"] == pytest.approx(1)
    weighted = (table["energy_per_request_j"] * table["requests"])[:-1].sum()
    assert weighted == pytest.approx(energy["energy_j"].sum())


def test_bucket_goes_by_the_trace_and_by_what_was_served(run_of, rewrite):
    run = run_of()
    trace = run.scan("trace").with_columns(pl.lit(9000, pl.UInt32).alias("input_tokens"), pl.lit("mine").alias("label"))
    requests = run.scan("requests").with_columns(pl.lit(400, pl.UInt32).alias("output_tokens"))
    run = rewrite(run, trace=trace.collect(), requests=requests.collect())
    assert request_table(run)["bucket"].unique().to_list() == ["XL"]
    assert bucket_table(run, None, by="label")["group"].to_list() == ["mine", "all"]
    assert request_table(rewrite(run, trace=None))["bucket"].str.tail(1).unique().to_list() == ["L"]


def test_chunk_times_make_tbt_a_matter_of_tokens(run_of, rewrite):
    run = run_of()
    assert bucket_table(run, None)["tbt_source"].unique().to_list() == ["requests"]
    chunks = pl.concat_list("first_token_ns", "last_token_ns").alias("chunk_ns")
    counts = pl.concat_list(pl.lit(1, pl.UInt16), (pl.col("output_tokens") - 1).cast(pl.UInt16)).alias("chunk_tokens")
    run = rewrite(run, requests=run.scan("requests").with_columns(chunks, counts).collect())
    table = bucket_table(run, None)
    assert table["tbt_source"].unique().to_list() == ["tokens"]
    rows = request_table(run)
    repeated = np.repeat(rows["tpot_ms"].to_numpy(), rows["output_tokens"].to_numpy() - 1)
    assert table["tbt_ms_p50"][-1] == pytest.approx(np.quantile(repeated, 0.5), rel=RELATIVE_ERROR)


def test_slo_counts_failures_as_missed_and_x_as_long(run_of, rewrite):
    run = run_of()
    whole = bucket_table(run, None, slo=EVER)
    assert whole["slo_attainment"].to_list() == [1.0] * whole.height
    assert bucket_table(run, None, slo=NEVER)["slo_attainment"][-1] == 0.0
    status = pl.when(pl.col("request_id") % 2 == 0).then(pl.lit("timeout")).otherwise("status").alias("status")
    failed = rewrite(run, requests=run.scan("requests").with_columns(status).collect())
    share = bucket_table(failed, None, slo=EVER)["slo_attainment"][-1]
    assert share == pytest.approx((request_table(failed)["status"] == "ok").mean())
    headings, cells = rows_for_people(bucket_table(failed, None))
    assert len(headings) == len(cells[0])
    ok = (request_table(failed)["status"] == "ok").sum()
    assert cells[-1][1] == f"{ok} ok of {request_table(failed).height}"


def failing(run, rewrite, status="aborted"):
    """`run` with every second request failed after a quick first token, without a count of its tokens."""
    odd = pl.col("request_id") % 2 == 1
    quick = pl.when(odd).then(pl.col("sent_ns") + 1).otherwise
    requests = run.scan("requests").with_columns(
        pl.when(odd).then(pl.lit(status)).otherwise("status").alias("status"),
        pl.when(~odd).then("output_tokens").alias("output_tokens"),
        quick("first_token_ns").alias("first_token_ns"),
        quick("last_token_ns").alias("last_token_ns"),
    )
    return rewrite(run, requests=requests.collect())


def test_a_request_that_failed_is_not_fast_and_its_joules_are_no_tokens(run_of, rewrite):
    run = failing(run_of(), rewrite)
    energy = attribute(run)
    whole = bucket_table(run, energy.requests).row(-1, named=True)
    served = request_table(run, energy.requests).filter(pl.col("status") == "ok")
    assert whole["ttft_ms_p50"] == pytest.approx(served["ttft_ms"].quantile(0.5, "linear"))
    assert whole["e2el_ms_p90"] == pytest.approx(served["e2el_ms"].quantile(0.9, "linear"))
    assert whole["tbt_ms_p50"] == pytest.approx(served["tpot_ms"].quantile(0.5, "linear"))
    assert whole["energy_per_request_j"] == pytest.approx(served["energy_j"].mean())
    joules, tokens = served["energy_j"].sum(), served["output_tokens"].sum()
    assert whole["energy_per_output_token_j"] == pytest.approx(joules / tokens)
    assert energy.summary["energy_per_request_j"] == pytest.approx(served["energy_j"].mean())
    failed = energy.requests.height - served.height
    assert any(
        f"{failed} of {energy.requests.height} requests were not ok ({failed} aborted)" in n
        for n in energy.summary["notes"]
    )


def test_an_answer_of_another_length_is_an_answer_and_unknown_tokens_take_their_joules_along(run_of, rewrite):
    run = failing(run_of(), rewrite, status="length_mismatch")
    energy = attribute(run).requests
    whole = bucket_table(run, energy).row(-1, named=True)
    rows = request_table(run, energy)
    assert whole["requests_with_energy"] == rows.height
    counted = rows.drop_nulls("output_tokens")
    assert whole["energy_per_output_token_j"] == pytest.approx(
        counted["energy_j"].sum() / counted["output_tokens"].sum()
    )


def test_queries_answer_as_plain_polars_does(run_of):
    run = run_of()
    energy = attribute(run).requests
    answer = query(
        [run], "SELECT bucket, avg(energy_j) AS mean_j, count(*) AS n FROM requests GROUP BY bucket ORDER BY bucket"
    )
    rows = (
        request_table(run, energy).group_by("bucket").agg(mean_j=pl.col("energy_j").mean(), n=pl.len()).sort("bucket")
    )
    np.testing.assert_allclose(answer["mean_j"].to_numpy(), rows["mean_j"].to_numpy())
    assert answer["n"].to_list() == rows["n"].to_list()
    steps = run.scan("steps").collect()
    assert query([run], "SELECT count(*) AS n FROM steps")["n"].to_list() == [steps.height]
    assert query([run], "SELECT max(energy_mj) AS e FROM power WHERE gpu = 1")["e"][0] > 0


def test_several_runs_are_one_table_with_their_settings(run_of, rewrite):
    a, b = run_of("a"), run_of("b", seed=3)
    b = rewrite(b, {"instances": [{**b.manifest["instances"][0], "freq_mhz": 1200}]}, truth=None)
    notes = []
    settings = "run, engine, tp, freq_mhz"
    sql = f"SELECT {settings}, count(energy_j) AS n FROM requests GROUP BY {settings} ORDER BY run"
    answer = query([a, b], sql, notes.append)
    assert answer.rows() == [
        ("a", "simulated", 2, 1980, request_table(a).height),
        ("b", "simulated", 2, 1200, request_table(b).height),
    ]
    assert len(notes) == 2
    assert query([a, b], "SELECT DISTINCT run FROM truth")["run"].to_list() == ["a"]
    runs = query([a, b], "SELECT run, measured_j FROM runs ORDER BY run", notes.append)
    assert runs["measured_j"].min() > 0
    assert len(notes) == 2


def test_a_query_without_energy_still_has_latencies(run_of, rewrite):
    run = rewrite(run_of(), power=None)
    notes = []
    answer = query([run], "SELECT avg(ttft_ms) AS t, avg(energy_j) AS e FROM requests", notes.append)
    assert answer["t"][0] > 0
    assert answer["e"][0] is None
    assert "has no power samples" in notes[0]


def test_what_only_looks_like_reading_files_is_answered(run_of):
    run = run_of()
    sql = "-- read_csv(\n(SELECT 'read_csv(' AS name, count(*) AS n FROM steps)"
    assert query([run], sql)["name"].to_list() == ["read_csv("]
    assert "segments" in query([run], "SHOW TABLES")["name"].to_list()


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT nope FROM requests", "column 'nope' is not there; requests has request_id"),
        ("SELECT * FROM nope", "table 'nope': there is no such table; tables are requests, energy"),
        ("SELECT * FROM server_metrics", "table 'server_metrics': no run given has it"),
        ("SELEC 1", "'SELEC' is not answered, only SELECT, WITH, SHOW"),
        ("SELECT (1", "sql parser error"),
        ("DROP TABLE requests", "'DROP' is not answered"),
        ("/* SELECT */ truncate TABLE requests", "'truncate' is not answered"),
        ("SELECT * FROM read_csv('/etc/hostname')", "read_csv would read a file"),
        ("WITH a AS (SELECT * FROM \"READ_PARQUET\" ('x')) SELECT * FROM a", "READ_PARQUET would read a file"),
        ("", "the query is empty"),
        ("SELECT nope(energy_j) FROM requests", "unsupported function"),
    ],
)
def test_a_bad_query_is_one_line(run_of, sql, words):
    with pytest.raises(AnalysisError) as error:
        query([run_of()], sql)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
