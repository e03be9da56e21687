import json

import numpy as np
import pytest

from tracegen.errors import TraceError

MS = 10**6


def lines(stamps, **changes):
    """A Mooncake file with requests at `stamps` (ms)."""
    rows = [
        {"timestamp": t, "input_length": 600 + k, "output_length": 52, "hash_ids": [0, k + 1]}
        for k, t in enumerate(stamps)
    ]
    return "".join(json.dumps(row | changes) + "\n" for row in rows)


def test_hash_ids_become_prefix_hashes_of_512_tokens(import_file):
    frame, report = import_file(lines([27_482, 30_535, 30_535]))
    assert report.format == "mooncake"
    assert frame["prefix_hashes"].to_list() == [[0, 1], [0, 2], [0, 3]]
    assert frame["arrival_ns"].to_list() == [0, 3053 * MS, 3053 * MS]
    assert frame["input_tokens"].to_list() == [600, 601, 602]
    assert report.metadata["block_tokens"] == 512
    assert "seed" not in report.metadata
    assert report.metadata["source"]["first_arrival"] == "27482"


# On the grid as published: a stamp lies up to 3 ms off it, on either side.
GRID = sorted(3000 * point + off for point in range(1, 400) for off in (-1, 0, 0, 1, 3))


def test_dequantized_requests_are_spread_evenly_over_their_three_seconds(import_file):
    frame, report = import_file(lines([0, *GRID]), dequantize=True, seed=7)
    at_ns = frame["arrival_ns"].to_numpy()
    assert (np.diff(at_ns) >= 0).all()
    assert frame["input_tokens"].to_list() == list(range(600, 600 + frame.height))  # in the file's order
    # Relative to the first request, which itself was moved within its 3 s.
    origin_ms = 3000 * np.round(np.array([0, *GRID]) / 3000)
    moved_s = (at_ns / 1e6 - origin_ms) / 1e3
    spread_s = moved_s - moved_s.min()
    assert 2.9 < spread_s.max() < 3.0
    assert abs(np.mean(spread_s) - 1.5) < 0.1
    assert report.metadata["seed"] == 7
    assert report.metadata["parameters"]["dequantize"] is True
    assert report.remarks == ["arrivals are spread evenly over the source's grid of 3 s, by seed 7"]
    assert report.metadata["source"]["remarks"] == report.remarks


def test_dequantized_times_depend_on_the_seed_alone(import_file, monkeypatch):
    first, _ = import_file(lines(GRID), dequantize=True, seed=7)
    other, _ = import_file(lines(GRID), dequantize=True, seed=8)
    assert not first.equals(other)
    monkeypatch.setattr("tracegen.sources.BLOCK_BYTES", 500)
    monkeypatch.setattr("tracegen.sources._START_BYTES", 500)
    parts, _ = import_file(lines(GRID), dequantize=True, seed=7)
    assert parts.equals(first)


def test_what_is_not_on_the_grid_is_not_spread(import_file):
    with pytest.raises(TraceError, match="line 3: timestamp 3004 is not on a grid of 3 s; import it without --deq"):
        import_file(lines([0, 3003, 3004]), dequantize=True)


def test_rows_from_the_second_on_may_miss_nothing(import_file):
    with pytest.raises(TraceError, match=r"line 2: is no such row \(Object missing required field `hash_ids`\)"):
        import_file(lines([0]) + '{"timestamp": 0, "input_length": 1, "output_length": 1}\n')


def test_reasons_are_the_same_for_the_same_fault(import_file):
    row = {"timestamp": 0, "input_length": 1, "output_length": 1}
    bad = [json.dumps(row | {"hash_ids": hashes}) for hashes in (["x"], [1, "x"], [1, 2, "x"])]
    _, report = import_file("\n".join([*bad, bad[0][:-3], bad[0][:-9], lines([0])]), skip_bad=True, format="mooncake")
    assert report.dropped == {
        "is no such row (Expected `int`, got `str` - at `$.hash_ids[]`)": 3,
        "is no such row (Input data was truncated)": 2,
    }
