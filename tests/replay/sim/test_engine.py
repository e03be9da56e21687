"""The engine's own time is ideal, however late its loop runs."""

import asyncio
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from replay.finish import merge_segments
from replay.gpu.sim import SimBoard, SimGpus
from replay.rundir import has_table, scan_table
from replay.sim.engine import Engine
from replay.sim.hardware import Hardware, Work, load_profile
from replay.sim.scheduler import Request, Scheduler
from replay.sim.virtual import VirtualEngines, arrivals_of, serve
from replay.steps import SIM_STEP, StepWriter

PROFILE = load_profile()
HARDWARE = Hardware(PROFILE, 2)
GPUS = (4, 5)
MS = 1_000_000
START_NS = 1_000_000 * MS


@dataclass
class World:
    """Time that jumps, and things that happen in it while the engine sleeps."""

    late_ns: int = 0  # how late each sleep returns
    now_ns: int = START_NS
    events: list = field(default_factory=list)  # (time, action), ascending

    async def sleep_until_ns(self, when_ns):
        wake_ns = max(self.now_ns, when_ns + self.late_ns)
        while self.events and self.events[0][0] <= wake_ns:
            self.now_ns, action = self.events.pop(0)
            action()
        self.now_ns = wake_ns
        await asyncio.sleep(0)


def run(tmp_path, world, script, hardware=HARDWARE):
    """Run the engine under `script(engine, board)`; what that returns, the board's changes by GPU, the steps."""

    async def session():
        with SimBoard.create(tmp_path / "board", PROFILE, now_ns=lambda: world.now_ns) as board:
            recorder = StepWriter(tmp_path, 0, extra=SIM_STEP)
            scheduler = Scheduler(hardware.limits)
            sleep, now = world.sleep_until_ns, lambda: world.now_ns
            engine = Engine(scheduler, hardware, board, GPUS, recorder, sleep_until_ns=sleep, now_ns=now)
            engine.load()
            async with asyncio.TaskGroup() as group:
                running = group.create_task(engine.run())
                result = await script(engine, board)
                engine.stop()
                await running
            recorder.write(recorder.take())
            changes = {gpu: dict(history(board, gpu)) for gpu in (*GPUS, 0)}
            return result, changes

    result, changes = asyncio.run(session())
    return result, changes, scan_table(tmp_path, "steps").collect() if has_table(tmp_path, "steps") else None


def history(board, gpu):
    """(time, watts from then on) of every change on the board."""
    changes = board.history(gpu, START_NS - 10_000 * MS)
    return zip(changes.t_ns.tolist(), changes.watts.tolist(), strict=True)


async def drain(stream):
    count = 1
    while not await stream.tokens.get():
        count += 1
    return count


def work(row):
    return Work(row["prefill_tokens"], row["decode_tokens"], row["context_tokens"], row["prefill_attention"])


@pytest.mark.parametrize("late_ns", [0, 3 * MS, 250 * MS])
def test_steps_last_what_the_hardware_says_however_late_the_loop_is(tmp_path, late_ns):
    world = World(late_ns)

    async def script(engine, board):
        return await asyncio.gather(*(drain(engine.submit(Request(i, 400, 30 + i))) for i in range(3)))

    counts, changes, steps = run(tmp_path, world, script)
    assert counts == [30, 31, 32]
    assert steps["start_ns"].to_list() == [START_NS, *steps["end_ns"].to_list()[:-1]], "no gap while there is work"
    for row in steps.iter_rows(named=True):
        assert row["end_ns"] - row["start_ns"] == round(HARDWARE.step_s(work(row), 1980) * 1e9)
        for gpu in GPUS:
            assert changes[gpu][row["start_ns"]] == pytest.approx(HARDWARE.step_w(work(row), 1980) / 2)


@pytest.mark.parametrize("late_ns", [0, 40 * MS])
def test_a_request_joins_only_steps_that_start_after_it_arrived(tmp_path, late_ns):
    world = World(late_ns)
    arrivals_ns = [START_NS + ms * MS for ms in (1, 90, 91, 300, 777)]

    async def script(engine, board):
        streams = [engine.submit(Request(99, 100, 60))]
        world.events = [
            (t, lambda i=i: streams.append(engine.submit(Request(i, 160 + i, 4)))) for i, t in enumerate(arrivals_ns)
        ]
        await drain(streams[0])
        return [await drain(stream) for stream in streams[1:]]

    counts, _, steps = run(tmp_path, world, script)
    assert counts == [4] * 5
    segments = scan_table(tmp_path, "segments").collect()
    for i, arrival_ns in enumerate(arrivals_ns):
        first = segments.filter(request_id=i, kind="prefill")["first_step"].min()
        start_ns = steps["start_ns"][first]
        assert start_ns >= arrival_ns
        assert first == 0 or steps["start_ns"][first - 1] < arrival_ns, "in the first step that may have it"


@pytest.mark.parametrize("leakage_per_c", [0.0, 0.002])
def test_virtual_time_gives_the_same_steps_times_and_powers(tmp_path, leakage_per_c):
    thermal = replace(PROFILE.thermal, leakage_per_c=leakage_per_c)
    hardware = Hardware(replace(PROFILE, thermal=thermal), 2)
    world = World(late_ns=2 * MS)
    rng = np.random.default_rng(3)
    arrivals = arrivals_of(
        START_NS + MS + np.cumsum(rng.exponential(400 * MS, 40)).astype(np.int64), rng.integers(1, 5000, 40),
        rng.integers(1, 60, 40),
    )  # fmt: skip

    async def script(engine, board):
        streams = []

        def submit(i):
            streams.append(engine.submit(Request(i, int(arrivals["prompt"][i]), int(arrivals["output"][i]))))

        world.events = [(int(t), lambda i=i: submit(i)) for i, t in enumerate(arrivals["arrival_ns"])]
        while len(streams) < 40 or engine.gauges()["num_requests_running"]:
            if not engine._busy and not engine._inbox and world.events:
                world.now_ns, action = world.events.pop(0)
                action()
            await asyncio.sleep(0)

    _, changes, steps = run(tmp_path, world, script, hardware)
    served = serve(VirtualEngines(hardware, 1980, start_ns=START_NS), arrivals)
    for name in ("start_ns", "end_ns", "context_tokens", "prefill_tokens", "requests", "waiting"):
        assert steps[name].to_list() == served.steps[name].tolist()
    assert steps["heat"].to_list() == pytest.approx(served.steps["heat"].tolist(), rel=1e-9)
    watts = [changes[4][start_ns] for start_ns in served.steps["start_ns"].tolist()]
    assert watts == pytest.approx(served.steps["gpu_w"].tolist(), rel=1e-9)
    segments = scan_table(tmp_path, "segments").collect()
    assert merge_segments(segments).height == len(served.segments)


def test_an_idle_engine_starts_at_the_arrival_and_draws_idle_power_between(tmp_path):
    world = World()

    async def script(engine, board):
        world.now_ns += 500 * MS
        assert await drain(engine.submit(Request(0, 100, 3))) == 3
        await asyncio.sleep(0)
        world.now_ns += 2_000 * MS
        assert await drain(engine.submit(Request(1, 100, 3))) == 3
        world.now_ns += 100 * MS
        return {gpu: board.energy_j(gpu, world.now_ns) - board.energy_j(gpu, START_NS) for gpu in (*GPUS, 0)}

    energies_j, _, steps = run(tmp_path, world, script)
    first_end_ns = steps["end_ns"][2]
    assert steps["start_ns"][0] == START_NS + 500 * MS
    assert steps["start_ns"][3] == first_end_ns + 2_000 * MS
    busy_ns = sum(row["end_ns"] - row["start_ns"] for row in steps.iter_rows(named=True))
    busy_j = sum(
        HARDWARE.step_w(work(row), 1980) * (row["end_ns"] - row["start_ns"]) / 1e9
        for row in steps.iter_rows(named=True)
    )
    assert world.now_ns - START_NS - busy_ns == 2_600 * MS
    for gpu in GPUS:
        assert energies_j[gpu] == pytest.approx(busy_j / 2 + 2.6 * HARDWARE.idle_w(1980), rel=1e-9)
    unloaded_w = HARDWARE.idle_w(1980, loaded=False)
    assert energies_j[0] == pytest.approx(unloaded_w * (world.now_ns - START_NS) / 1e9, rel=1e-9)


def test_the_counter_never_falls_back_when_the_loop_is_late_to_begin(tmp_path):
    world = World()

    async def script(engine, board):
        gpus = SimGpus(tmp_path / "board", now_ns=lambda: world.now_ns)
        readings = []
        for i in range(3):
            world.now_ns += 700 * MS
            stream = engine.submit(Request(i, 3000, 2))
            for _ in range(4):
                readings.append(gpus.read(4).energy_mj)
                world.now_ns += 90 * MS  # the loop stalls: the step began, but its power is not written yet
            await drain(stream)
            readings.append(gpus.read(4).energy_mj)
        gpus.close()
        return readings

    readings, _, _ = run(tmp_path, world, script)
    assert readings == sorted(readings)
    assert len(set(readings)) > 5


def test_the_next_step_takes_up_a_changed_clock(tmp_path):
    world = World()

    async def script(engine, board):
        stream = engine.submit(Request(0, 100, 40))
        for gpu, mhz in ((4, 1200), (5, 990)):
            world.events.append((START_NS + 200 * MS, lambda gpu=gpu, mhz=mhz: board.lock_clock(gpu, mhz)))
        return await drain(stream)

    _, _, steps = run(tmp_path, world, script)
    for row in steps.iter_rows(named=True):
        # Both GPUs run at the slower one's clock.
        assert row["clock_mhz"] == (1980 if row["start_ns"] < START_NS + 200 * MS else 990)
        assert row["end_ns"] - row["start_ns"] == round(HARDWARE.step_s(work(row), row["clock_mhz"]) * 1e9)
    assert steps["clock_mhz"].n_unique() == 2


def test_an_idle_engine_takes_up_a_changed_clock_and_unloads_at_the_end(tmp_path):
    world = World()

    async def script(engine, board):
        await asyncio.sleep(0.01)  # the engine begins to wait
        world.now_ns += 100 * MS
        board.lock_clock(4, 1200)
        for _ in range(500):
            if START_NS + 100 * MS in dict(history(board, 4)):
                break
            await asyncio.sleep(0.01)
        world.now_ns += 100 * MS

    _, changes, _ = run(tmp_path, world, script)
    loaded_w = {mhz: HARDWARE.idle_w(mhz) for mhz in (1200, 1980)}
    unloaded_w = HARDWARE.idle_w(1980, loaded=False)
    before = START_NS - 10_000 * MS
    assert loaded_w[1200] < loaded_w[1980]
    assert changes[0] == {before: unloaded_w}
    assert changes[4] == {
        before: unloaded_w,
        START_NS: loaded_w[1980],
        START_NS + 100 * MS: loaded_w[1200],
        START_NS + 200 * MS: unloaded_w,
    }


def test_an_aborted_request_frees_its_cache_and_the_others_go_on(tmp_path):
    world = World()

    async def script(engine, board):
        streams = [engine.submit(Request(i, 2000, 50)) for i in range(2)]
        await streams[0].tokens.get()
        both = engine.gauges()
        engine.abort(streams[0])
        waiting = engine.submit(Request(2, 10, 5))
        engine.abort(waiting)
        one = engine.gauges()
        assert await drain(streams[1]) == 50
        engine.abort(streams[1])  # finished already
        return both, one, engine.gauges(), engine.metrics

    (both, one, none, metrics), _, _ = run(tmp_path, world, script)
    assert (both["num_requests_running"], one["num_requests_running"]) == (2, 1)
    assert one["kv_cache_usage_perc"] == pytest.approx(both["kv_cache_usage_perc"] / 2)
    assert set(none.values()) == {0}
    assert (metrics.succeeded, metrics.prompt_tokens) == (1, 4000)
    assert scan_table(tmp_path, "segments").collect()["request_id"].unique().sort().to_list() == [0, 1]


def test_stopping_amid_work_ends_the_step_under_way(tmp_path):
    world = World()

    async def script(engine, board):
        stream = engine.submit(Request(0, 100, 1000))
        for _ in range(5):
            await stream.tokens.get()

    _, changes, steps = run(tmp_path, world, script)
    assert steps.height >= 5
    end_ns = steps["end_ns"][-1]
    assert max(changes[4]) == end_ns
    assert changes[4][end_ns] == HARDWARE.idle_w(1980, loaded=False)
