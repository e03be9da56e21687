"""The open loop: in order, never early, never waiting for an answer; and the clock under it."""

import asyncio

import pytest
import uvloop

from replay import workload as workload_module
from replay.clock import NS_PER_MS, SleepTimer, now_ns
from replay.dispatch import StallMeter, dispatch
from replay.shards import NONE, Row
from replay.workload import Config, Workload


def workload(due_ns, epoch_ns=0):
    """Requests 0, 1, ... due then."""
    rows = [Row(i, at_ns, NONE, 0, 4, 4, 0, 0, 0) for i, at_ns in enumerate(due_ns)]
    work = Workload(Config(run_dir="", base_urls=["http://x"], model="m", salt=1), rows)
    work.begin(epoch_ns)
    return work


LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])


def run(coroutine, loop=asyncio.new_event_loop):
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(coroutine)


@LOOPS
def test_a_sleep_is_never_early(loop):
    async def main():
        with SleepTimer() as timer:
            for delay_ns in (0, 1, 50_000, 999_999, NS_PER_MS, 3 * NS_PER_MS, -5):
                due_ns = now_ns() + delay_ns
                await timer.sleep_until_ns(due_ns)
                assert now_ns() >= due_ns

    run(main(), loop)


def test_an_expiry_that_was_seen_too_late_wakes_nobody():
    async def main():
        with SleepTimer() as timer:
            sleeper = asyncio.create_task(timer.sleep_until_ns(now_ns() + 10**12))
            await asyncio.sleep(0)
            timer._expired()  # as when the loop saw the timer ready before it was armed anew
            await asyncio.sleep(0)
            assert not sleeper.done()
            sleeper.cancel()

    run(main())


def test_a_past_time_still_gives_the_loop_its_turn():
    async def main():
        turns = []
        task = asyncio.create_task(asyncio.sleep(0))
        task.add_done_callback(turns.append)
        with SleepTimer() as timer:
            for _ in range(3):
                await timer.sleep_until_ns(0)
        assert turns

    run(main())


@LOOPS
def test_all_are_sent_once_in_order_and_never_early_though_nobody_answers(loop):
    sent = []

    async def main():
        never = asyncio.Event()
        # A burst, then one each 2 ms, then a burst.
        work = workload([max(0, min(i, 60) - 20) * 2 * NS_PER_MS for i in range(100)], now_ns() + 20 * NS_PER_MS)

        async def send(job):
            sent.append((job.row.request_id, now_ns() - job.record.scheduled_ns))
            if len(sent) == 100:
                never.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(dispatch(work, send))
        await never.wait()  # all 100 are out, none has ended
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main(), loop)
    assert [i for i, _ in sent] == list(range(100))
    assert min(late_ns for _, late_ns in sent) >= 0


def test_requests_are_made_ahead_in_bounded_numbers(monkeypatch):
    monkeypatch.setattr(workload_module, "_AHEAD", 8)
    work, sent, ahead = workload([i * 10 * NS_PER_MS for i in range(30)], now_ns() + 50 * NS_PER_MS), [], []

    async def send(job):
        assert job.body, "it was made"
        sent.append(job)
        ahead.append(len(work._ready))

    run(dispatch(work, send))
    assert len(sent) == 30
    assert 2 <= max(ahead) <= 8


def test_it_returns_when_the_last_has_ended():
    ended = []

    async def send(job):
        await asyncio.sleep(0.02 * (3 - job.row.request_id))
        ended.append(job.row.request_id)

    run(dispatch(workload([0, 0, 0]), send))
    assert sorted(ended) == [0, 1, 2]


@pytest.mark.parametrize("failing", [0, 4])
def test_a_bug_in_a_task_comes_out_and_cancels_the_others(failing):
    cancelled = []

    async def send(job):
        if job.row.request_id == failing:
            await asyncio.sleep(0.001)
            raise ZeroDivisionError
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(job.row.request_id)
            raise

    due_ns = [now_ns()] * 5 if failing else [now_ns(), *[now_ns() + 10**12] * 4]
    with pytest.raises(ExceptionGroup) as caught:
        run(dispatch(workload(due_ns), send))
    assert [type(error) for error in caught.value.exceptions] == [ZeroDivisionError]
    assert sorted(cancelled) == ([0, 1, 2, 3] if failing else []), "after the last was sent, too"


def test_the_stall_meter_sees_a_blocked_loop():
    async def main():
        meter = StallMeter(5 * NS_PER_MS)
        task = asyncio.create_task(meter.run())
        while not meter.worst_ns:
            await asyncio.sleep(0.001)
        blocked_until_ns = now_ns() + 80 * NS_PER_MS
        while now_ns() < blocked_until_ns:
            pass
        await asyncio.sleep(0.05)
        task.cancel()
        return meter.worst_ns

    assert run(main()) >= 60 * NS_PER_MS
