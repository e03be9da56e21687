"""Each verdict, true and false and without an answer, on tables made by hand, read in batches of any size."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay import judge as judge_module
from replay import sums, verdicts
from replay.judge import judge
from replay.meters import Gauge
from replay.rundir import PartWriter, Run
from replay.sums import Backlog, Errors, Lag, Lookup, Quantiles, Steps, Tokens, add_up
from replay.tables import POWER, REQUESTS, SEGMENTS, STEPS, TABLES

MS = 1_000_000
S = 1_000_000_000


def requests(count=10, **columns):
    """`count` good requests of 100 + 5 tokens, one a second; columns replaced by keyword."""
    base = {
        "request_id": range(count),
        "instance": [0] * count,
        "scheduled_ns": [i * S for i in range(count)],
        "sent_ns": [i * S + MS for i in range(count)],
        "first_token_ns": [i * S + 100 * MS for i in range(count)],
        "input_tokens": [100] * count,
        "output_tokens": [5] * count,
        "output_tokens_wanted": [5] * count,
        "status": ["ok"] * count,
    }
    blank = {name: [None] * count for name in REQUESTS}
    return pl.DataFrame({**blank, **base, **columns}, schema=REQUESTS)


def trace(count=10, inputs=100):
    return pl.DataFrame({"request_id": range(count), "input_tokens": [inputs] * count}).cast(
        {"request_id": pl.UInt64, "input_tokens": pl.UInt32}
    )


def power(gpu=0, seconds=10, period_ms=25, watts=100.0, **columns):
    """Readings of a GPU at constant power; columns replaced by keyword."""
    t_ns = list(range(0, seconds * S + 1, period_ms * MS))
    base = {
        "t_ns": t_ns,
        "gpu": [gpu] * len(t_ns),
        "power_instant_mw": [round(watts * 1e3)] * len(t_ns),
        "energy_mj": [round(watts * t / 1e6) for t in t_ns],
        "sm_clock_mhz": [1200] * len(t_ns),
    }
    blank = {name: [None] * len(t_ns) for name in POWER}
    return pl.DataFrame({**blank, **base, **columns}, schema=POWER)


def shown(total, frame, rows=7):
    """`total`, after it was shown `frame` in batches of so many rows."""
    add_up([total], lambda columns: frame.select(columns).iter_slices(rows))
    return total


def dispatch_lag(frame):
    return shown(Lag(), frame).verdict()


def error_rate(frame, planned):
    return shown(Errors(), frame).verdict(planned)


def saturated(frame, *, capped=False):
    return shown(Backlog(capped=capped), frame).verdict()


def clocks_held(frame, gpus, locked_mhz, held_mhz=None):
    return shown(Gauge(gpus, [(0, 10 * S)], locked_mhz, held_mhz), frame).clocks()


def sensor_alive(frame, gpus, start_ns, end_ns):
    return shown(Gauge(gpus, [(start_ns, end_ns)], None), frame.sort("t_ns")).coverage()


def counter_agrees(frame, gpus, start_ns, end_ns):
    return shown(Gauge(gpus, [(start_ns, end_ns)], None), frame.sort("t_ns")).counter()


def write(run_dir, **tables):
    """The folder, with these tables in place of those of the same name; each of two parts."""
    for name, frame in tables.items():
        for path in run_dir.glob(f"{name}.parquet/*"):
            path.unlink()
        writer = PartWriter(run_dir, name)
        blank = frame.with_columns(pl.lit(None, dtype).alias(n) for n, dtype in TABLES[name].items() if n not in frame)
        for half in (blank[: frame.height // 2], blank[frame.height // 2 :]):
            writer.append(half)
    return run_dir


@pytest.fixture
def compare(tmp_path):
    """The tokens of requests beside those of a trace and of segments."""

    def tokens(requests, trace, segments=None):
        write(tmp_path, trace=trace, **({} if segments is None else {"segments": segments}))
        about = ("request_id", "first_step", "last_step", "tokens_per_step")
        steps = None if segments is None else Lookup(tmp_path, "segments", about)
        return shown(Tokens(Lookup(tmp_path, "trace", ("request_id", "input_tokens")), steps), requests)

    return tokens


def test_dispatch_lag_is_the_p99_of_send_minus_schedule():
    late = [0] * 980 + [30 * MS] * 20
    good = dispatch_lag(requests())
    assert (good.ok, good.value) == (True, 1.0)
    frame = requests(1000)
    bad = dispatch_lag(frame.with_columns(sent_ns=frame["scheduled_ns"] + pl.Series(late)))
    assert (bad.ok, bad.value) == (False, 30.0)
    assert "max 30.00 ms" in bad.why
    nothing = dispatch_lag(requests(3, sent_ns=[None] * 3))
    assert (nothing.ok, nothing.value, nothing.why) == (False, None, "no request was sent")


def test_loop_stall_is_the_worst_delay():
    assert verdicts.loop_stall([0, 5 * MS]).ok is True
    bad = verdicts.loop_stall([0, 250 * MS, 0])
    assert (bad.ok, bad.value) == (False, 250.0)
    assert verdicts.loop_stall([]).ok is None


def test_open_loop_is_closed_by_any_cap():
    assert verdicts.open_loop(None, None).ok is True
    bad = verdicts.open_loop(4, 2.5)
    assert (bad.ok, bad.why) == (False, "closed by cap: --max-concurrency 4, --max-rate 2.5")


def test_error_rate_says_what_a_server_said_most_often():
    rows = requests(3, status=["http_error"] * 3).with_columns(
        http_status=pl.Series([500, 429, 500], dtype=pl.UInt16), error=pl.Series(["boom", None, "boom"])
    )
    assert error_rate(rows, 3).why == "0 of 3 requests ok: 3 http_error (500 boom)"


def test_error_rate_counts_what_was_not_answered_in_full_and_names_it():
    assert error_rate(requests(), 10).ok is True
    bad = error_rate(requests(3, status=["ok", "timeout", "timeout"]), 5)
    assert (bad.ok, bad.value, bad.why) == (False, 0.8, "1 of 5 requests ok: 2 timeout, 2 not sent")


def test_one_request_is_no_plural_and_none_is_no_share():
    assert error_rate(requests(1), 1).why == "1 of 1 request ok"
    assert verdicts.lengths(0, 1).why == "0 of 1 request differ from the trace in input or output tokens"
    assert error_rate(requests(0), 0).ok is None


@pytest.mark.parametrize(("lost", "ok"), [(1, True), (2, False)])
def test_one_request_in_a_hundred_may_fail(lost, ok):
    assert error_rate(requests(100, status=["ok"] * (100 - lost) + ["http_error"] * lost), 100).ok is ok


def anchors(*unix_ahead_s):
    """The manifest's anchors, ten seconds apart, with the wall clock ahead by so much."""
    return [{"monotonic_ns": 10 * i * S, "unix_ns": round((10 * i + s) * S)} for i, s in enumerate(unix_ahead_s)]


def test_one_host_has_one_clock_whatever_becomes_of_the_wall_clock():
    host = {"host": "a", "offset_ns": 0, "offset_error_ns": 0}
    steady, stepped = (verdicts.clock_offset([host], anchors(*ahead)) for ahead in [(5, 5.001), (5, 3605, 3605)])
    assert (steady.ok, steady.value, steady.why) == (True, 0.0, "all times are of one host's clock")
    assert (stepped.ok, stepped.value) == (True, 0.0)
    assert stepped.why.endswith("; the wall clock was set by +3,600.00 s meanwhile, which no figure depends on")


@pytest.mark.parametrize(("error_ns", "ok"), [(MS, True), (MS + 1, False)])
def test_clocks_of_several_hosts_must_be_known_to_each_other(error_ns, ok):
    hosts = [
        {"host": name, "offset_ns": 7 * S, "offset_error_ns": error} for name, error in [("a", 0), ("b", error_ns)]
    ]
    verdict = verdicts.clock_offset(hosts, [])
    assert (verdict.ok, verdict.value) == (ok, error_ns / MS)
    assert verdict.why.startswith("2 hosts' clocks, to 1.00")


def test_a_run_is_valid_when_it_is_complete_and_no_verdict_is_against_it():
    good, open_, bad = (verdicts.Verdict(str(ok), ok, None, None, "why") for ok in (True, None, False))
    assert verdicts.validity("complete", [good, open_]) == {"valid": True, "invalid_because": []}
    assert verdicts.validity("complete", [good, bad]) == {"valid": False, "invalid_because": ["False: why"]}
    failed = verdicts.validity("failed", [good], "the server ended")
    assert failed == {"valid": False, "invalid_because": ["the run failed: the server ended"]}


def test_lengths_are_held_against_the_trace_in_both_directions(compare):
    assert compare(requests(), trace()).lengths().ok is True
    broken = requests(3, output_tokens=[5, 4, 5], status=["ok", "length_mismatch", "ok"])
    short = compare(broken, trace(3)).lengths()
    assert (short.ok, short.value) == (False, 1.0)
    assert compare(requests(), trace(inputs=101)).lengths().value == 10.0
    assert compare(requests(2, output_tokens=[None, None]), trace(2)).lengths().ok is None
    # A request that broke off tells of the server, not of lengths.
    assert compare(requests(2, output_tokens=[5, 1], status=["ok", "timeout"]), trace(2)).lengths().ok is True


def queue(load, count=2000, seed=3):
    """An M/D/1 queue of service 0.1 s at `load`: first tokens when service ends."""
    rng = np.random.default_rng(seed)
    sent_s = np.cumsum(rng.exponential(0.1 / load, count))
    end_s, ends = 0.0, []
    for s in sent_s:
        end_s = max(end_s, s) + 0.1
        ends.append(end_s)
    ns = [(np.array(t) * 1e9).astype(np.int64) for t in (sent_s, ends)]
    return requests(count, scheduled_ns=ns[0], sent_ns=ns[0], first_token_ns=ns[1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("load", "full"), [(0.5, False), (0.8, False), (1.25, True), (2.0, True)])
def test_saturated_is_a_queue_that_grows(load, full, seed):
    verdict = saturated(queue(load, seed=seed))
    assert verdict.ok is not full
    assert verdict.why.startswith("not saturated") is not full
    if full:
        assert verdict.value == pytest.approx(1 - 1 / load, abs=0.05)


def test_a_server_that_never_answers_is_saturated_and_few_requests_tell_nothing():
    assert saturated(requests(40, first_token_ns=[None] * 40, status=["aborted"] * 40)).ok is False
    assert saturated(requests(19)).ok is None
    refused = requests(40, first_token_ns=[None] * 40, status=["http_error"] * 40)
    assert saturated(refused).ok is None, "who was refused does not wait"
    at_once = requests(40).with_columns(sent_ns=pl.int_range(40, dtype=pl.Int64) * 10_000)
    assert saturated(at_once).ok is None, "all due at one moment are sent within a millisecond"


def test_what_a_cap_holds_back_does_not_wait_in_the_server():
    held = requests(40, sent_ns=[i * S if i < 30 else (i + 60) * S for i in range(40)])
    verdict = saturated(held, capped=True)
    assert (verdict.ok, verdict.value) == (None, None)
    assert verdict.why == "not known: closed by cap, which still held back 10 requests when the last was due"


def test_an_answer_without_a_token_waits_no_longer():
    none = requests(40, first_token_ns=[None if i % 2 else i * S + 9 for i in range(40)])
    ended = none.with_columns(done_ns=pl.col("sent_ns") + 20 * MS)
    assert saturated(ended).ok is True
    whole = requests(40, first_token_ns=[None] * 40, done_ns=[i * S + 9 for i in range(40)])
    assert saturated(whole).why == "not known: no token has a time, so nobody knows who waited for one"


def test_a_share_that_rounds_to_none_has_no_sign():
    assert [verdicts.percent(share) for share in (-0.0004, 0.0, -0.0006, 0.1234)] == ["0.0%", "0.0%", "-0.1%", "12.3%"]


def test_a_burst_at_once_is_no_division_by_zero():
    at_once = requests(30, sent_ns=[S] * 30, scheduled_ns=[S] * 30, first_token_ns=[S + i for i in range(30)])
    assert saturated(at_once).ok is None


def test_clocks_held():
    assert clocks_held(power(), [0], 1200).ok is True
    assert clocks_held(power(sm_clock_mhz=[1215] * 401), [0], 1200).ok is True
    half = [1200] * 200 + [900] * 201
    bad = clocks_held(power(sm_clock_mhz=half, throttle_reasons=[0x4 | 0x20 | 0x1] * 401), [0], 1200)
    assert (bad.ok, bad.value) == (False, pytest.approx(200 / 401))
    assert bad.why.endswith("; software power cap; software thermal slowdown")
    assert (
        bad.why
        == clocks_held(power(sm_clock_mhz=half, throttle_reasons=[0x4 | 0x20 | 0x1] * 401), [0], 1200, 1200.0).why
    )
    above = clocks_held(power(sm_clock_mhz=half), [0], 1200, 1100.0)
    assert above.why.endswith("; under load this GPU holds 1100 MHz at most")
    assert above.ok is False
    assert clocks_held(power(), [0], None).ok is None
    assert clocks_held(power(), [], 1200).ok is False
    assert clocks_held(power(gpu=1), [0], 1200).ok is False
    assert clocks_held(power(sm_clock_mhz=[None] * 401), [0], 1200).ok is False


def test_sensor_alive_is_the_share_of_the_window_near_a_reading():
    assert sensor_alive(power(), [0], 0, 10 * S).ok is True
    gap = power().filter(~pl.col("t_ns").is_between(4 * S, 6 * S))
    bad = sensor_alive(gap, [0], 0, 10 * S)
    assert (bad.ok, bad.value) == (False, pytest.approx(0.795, abs=0.01))
    assert sensor_alive(power(), [0, 1], 0, 10 * S).value == 0.0, "one GPU is silent"
    assert sensor_alive(power(), [0], 0, 20 * S).value == pytest.approx(0.5)
    assert sensor_alive(power(), [], 0, S).ok is None


def test_counter_agrees_with_samples():
    good = counter_agrees(power(), [0], 0, 10 * S)
    assert (good.ok, good.value) == (True, pytest.approx(0.0, abs=1e-6))
    bad = counter_agrees(power(power_instant_mw=[120_000] * 401), [0], 0, 10 * S)
    assert (bad.ok, bad.value) == (False, pytest.approx(0.2))
    both = pl.concat([power(), power(gpu=1, watts=300.0)])
    # From the first update in the window on: that of the second poll, 25 ms after its beginning.
    assert counter_agrees(both, [0, 1], 0, 10 * S).why == "counter 3,990 J, samples 3,990 J"
    assert counter_agrees(power(energy_mj=[None] * 401), [0], 0, 10 * S).ok is None
    assert counter_agrees(power(), [], 0, S).ok is None


@pytest.mark.parametrize("start_ms", range(0, 100, 10))
def test_a_counter_that_updates_seldom_agrees_over_a_short_window_too(start_ms):
    slow = [100 * (t // (100 * MS)) * 100 for t in range(0, 10 * S + 1, 25 * MS)]  # 100 W, a step each 100 ms
    verdict = counter_agrees(power(energy_mj=slow), [0], start_ms * MS, 1050 * MS + start_ms * MS)
    assert verdict.value == pytest.approx(0.0, abs=1e-9)


def test_idle_is_measured_on_both_sides():
    known = [{"instant": 90.0}]
    assert verdicts.idle_measured(known, known).ok is True
    bad = verdicts.idle_measured([*known, {}], [{}, {}])
    assert (bad.ok, bad.value) == (False, 3.0)
    assert verdicts.idle_measured([], []).ok is None


def steps(numbers=range(20)):
    blank = {name: [0] * len(numbers) for name in STEPS}
    return pl.DataFrame({**blank, "step": list(numbers)}, schema=STEPS)


def segments(rows):
    columns = ("request_id", "first_step", "last_step", "kind", "tokens_per_step")
    table = {name: [row[i] for row in rows] for i, name in enumerate(columns)}
    return pl.DataFrame({"instance": [0] * len(rows), **table, "context_start": [0] * len(rows)}, schema=SEGMENTS)


def test_steps_complete_counts_gaps_and_tokens_in_no_step(compare):
    def complete(steps, segments, requests):
        counted, tokens = shown(Steps(), steps), compare(requests, trace(2), segments)
        return verdicts.completeness(counted.count, counted.missing, tokens.short, tokens.ok)

    whole = [(0, 0, 0, "prefill", 100), (0, 1, 4, "decode", 1), (None, 3, 9, "decode", 1)]
    good = complete(steps(), segments(whole), requests(1))
    assert (good.ok, good.value) == (True, 0.0)
    gap = complete(steps([0, 1, 2, 5]), segments(whole), requests(1))
    assert (gap.ok, gap.value) == (False, 2.0)
    short = complete(steps(), segments(whole[:1]), requests(2))
    assert (short.ok, short.value) == (False, 2.0), "one lacks its decode, one is not there at all"
    cached = complete(steps(), segments([(0, 0, 0, "prefill", 36), whole[1]]), requests(1, cached_tokens=[64]))
    assert cached.ok is True, "what the prefix cache held was not computed"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.integers(-(2**40), 2**40), st.sampled_from([0, 2**61, -(2**61)])), min_size=1, max_size=40),
    st.lists(st.floats(0, 1), min_size=1, max_size=3),
    st.integers(1, 40),
)
def test_quantiles_are_exact_whatever_the_numbers_and_however_they_are_cut(numbers, shares, rows):
    found, array = Quantiles(shares), np.array(numbers)
    while True:
        for at in range(0, array.size, rows):
            found.add(array[at : at + rows])
        if not found.again():
            break
    ordered = sorted(numbers)
    for share, value in zip(shares, found.values(), strict=True):
        at = share * (len(ordered) - 1)
        low, high = ordered[int(at)], ordered[min(int(np.ceil(at)), len(ordered) - 1)]
        assert value == low + (high - low) * (at - int(at))


def test_of_too_many_words_the_commonest_is_still_told(monkeypatch):
    monkeypatch.setattr(sums, "_MOST_TEXTS", 10)
    said = [f"request {i} refused" if i % 2 else "busy" for i in range(400)]
    rows = requests(400, status=["http_error"] * 400).with_columns(error=pl.Series(said))
    total = shown(Errors(), rows)
    assert total.verdict(400).why == "0 of 400 requests ok: 400 http_error (busy)"
    assert len(total._said["http_error"]) <= 10


FORKS = st.sampled_from(["ok", "ok", "ok", "length_mismatch", "timeout", "http_error", "aborted"])


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(FORKS, st.integers(0, 3), st.booleans()), min_size=1, max_size=60), st.data())
def test_no_cut_into_batches_changes_a_verdict(tmp_path_factory, drawn, data):
    """Of a run of three stretches with a silent sensor, lost tokens, a wrong clock and unsent requests."""
    count = len(drawn)
    status, fewer, timed = ([row[i] for row in drawn] for i in range(3))
    late = data.draw(st.lists(st.integers(-5 * MS, 40 * MS), min_size=count, max_size=count))
    sent = [i * S // 4 + late[i] for i in range(count)]
    ids = data.draw(st.permutations(range(count)))
    frame = requests(
        count, request_id=ids, status=status, sent_ns=sent, output_tokens=[5 - f for f in fewer],
        scheduled_ns=[i * S // 4 for i in range(count)], done_ns=[s + 60 * MS for s in sent],
        first_token_ns=[s + 50 * MS if t else None for s, t in zip(sent, timed, strict=True)],
    )  # fmt: skip
    rows = [(i, i, i, "prefill", 100) for i in range(count)] + [(i, i + 1, i + 3, "decode", 1) for i in range(count)]
    unread = data.draw(st.integers(0, 16))
    readings = pl.concat([power(0, 16, 250), power(1, 16, 250, 80.0)]).sort("t_ns", "gpu")
    readings = readings.filter(~pl.col("t_ns").is_between(unread * S, (unread + 1) * S))
    run_dir = write(
        tmp_path_factory.mktemp("run"),
        requests=frame, trace=trace(count + 3), steps=steps(range(count + 3)), segments=segments(rows), power=readings,
    )  # fmt: skip
    ends = [(0, 5 * S), (6 * S, 9 * S), (9 * S, 16 * S)][: data.draw(st.integers(1, 3))]
    manifest = {
        "measure_start_ns": 0, "stretches": [{"start_ns": a, "end_ns": b} for a, b in ends], "hosts": [],
        "clock_anchors": [], "instances": [{"gpus": [0, 1], "freq_mhz": 1205}], "simulated_profile": None,
        "arguments": {"max_concurrency": data.draw(st.sampled_from([None, 4])), "max_rate_rps": None},
        "gpus": [{"gpu": gpu, "idle_power_w": {"instant": 9.0}} for gpu in (0, 1)],
    }  # fmt: skip
    judged = []
    for height, joined in ((1000, 1000), (data.draw(st.integers(3, 30)), data.draw(st.integers(1, 30)))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sums, "_JOINED_ROWS", joined)

            def batches(path, table, columns, height=height):
                return Run(path, {}).scan(table, columns).collect().iter_slices(height)

            patch.setattr(judge_module, "table_batches", batches)
            judged.append(judge(run_dir, manifest, [0]))
    for whole, cut in zip(*judged, strict=True):
        assert (cut.name, cut.ok, cut.why) == (whole.name, whole.ok, whole.why)
        assert (cut.value is None) is (whole.value is None)
        assert (cut.value or 0.0) == pytest.approx(whole.value or 0.0, rel=1e-9, abs=1e-9)
    assert {verdict.name for verdict in judged[0] if verdict.ok is None} <= {"saturated", "lengths_exact"}
