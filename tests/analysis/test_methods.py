"""What the choice of method moves, and what it must not."""

import json

import pytest

from analysis.methods import bucket_rows, compare_methods, method_rows
from analysis.requests import request_table
from analysis.split import METHOD_NAMES

SMALL = {"duration_s": 20.0}


@pytest.fixture(scope="module")
def found(_made):
    from analysis.load import open_run

    return compare_methods(open_run(_made(**SMALL)))


def test_every_method_shares_the_same_joules_out(found):
    assert [document["method"] for document in found.methods] == list(METHOD_NAMES)
    for document in found.methods:
        total_j = document["attributed_j"] + document["idle_j"] + document["other_j"]
        assert total_j == pytest.approx(found.methods[0]["measured_j"], rel=1e-9)
        assert abs(document["residual_rel"]) < 1e-9


def test_the_default_does_not_differ_from_itself_and_others_do(found):
    by_name = {document["method"]: document for document in found.methods}
    usual = by_name[found.default]
    assert (usual["moved_median_rel"], usual["moved_p99_rel"]) == (0, 0)
    assert usual["rank_correlation"] == pytest.approx(1)
    assert by_name["equal-time"]["moved_median_rel"] > 0.05
    assert found.buckets[f"{found.default}_rel"].abs().max() == 0


def test_the_truth_of_a_simulated_run_judges_each_method_and_equal_time_is_worse(found):
    errors = {d["method"]: d["simulated_truth"]["median_rel"] for d in found.methods if "simulated_truth" in d}
    assert {"shapley", "equal-time", "tokens"} <= set(errors)
    assert errors["shapley"] < errors["equal-time"]


def test_buckets_add_up_to_all_requests_and_are_ranked_once_each(found):
    *rows, whole = found.buckets.to_dicts()
    assert whole["bucket"] == "all"
    assert sum(row["requests"] for row in rows) == whole["requests"] == request_table(found.run).height
    for name in METHOD_NAMES:
        weighted_j = sum(row["requests"] * row[f"{name}_j"] for row in rows)
        assert weighted_j == pytest.approx(whole["requests"] * whole[f"{name}_j"], rel=1e-9)
        assert sorted(row[f"{name}_rank"] for row in rows) == list(range(1, len(rows) + 1))
        assert whole[f"{name}_rank"] is None


def test_tables_and_json_have_every_method(found):
    headings, rows = bucket_rows(found)
    assert {len(row) for row in rows} == {len(headings)}
    headings, rows = method_rows(found)
    assert [row[0] for row in rows] == list(METHOD_NAMES)
    assert any("SIMULATED" in heading for heading in headings)
    json.dumps(found.document(), allow_nan=False)


def test_a_run_without_requests_or_truth_has_no_differences_and_no_judge(run_of, rewrite):
    run = run_of(**SMALL)
    found = compare_methods(rewrite(run, requests=run.scan("requests").collect().clear(), truth=None))
    assert {document["requests"] for document in found.methods} == {0}
    assert {document["moved_median_rel"] for document in found.methods} == {None}
    assert not any("SIMULATED" in heading for heading in method_rows(found)[0])
    assert bucket_rows(found)[1][0][1] == "0"
