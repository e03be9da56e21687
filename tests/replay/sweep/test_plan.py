"""Plans: from files and back, their cells, their differences."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.plan import RunOptions
from replay.sweep.order import blocks_in_order
from replay.sweep.plan import Grid, SweepPlan, difference
from replay.sweep.planfile import plan_text, presentable, read_plan
from tracegen.errors import ReplayError

whole = st.integers(1, 10_000)
numbers = st.floats(1e-3, 1e5)


def values(one, *, none=True):
    """A tuple without repetitions; or None alone, as where the option is not given."""
    some = st.lists(one, min_size=1, max_size=4, unique=True).map(tuple)
    return st.one_of(st.just((None,)), some) if none else some


grids = st.builds(
    Grid,
    tp=values(whole, none=False),
    freq_mhz=st.lists(st.one_of(whole, st.none()), min_size=1, max_size=4, unique=True).map(tuple),
    rate_rps=values(numbers),
    batch_cap=values(whole),
    power_cap_w=values(numbers),
)
runs = st.builds(
    RunOptions,
    trace=st.just(Path()),
    virtual=st.booleans(),
    model=st.sampled_from([None, "a/b", 'quoted "name"']),
    gpus=st.sampled_from([None, (0,), (1, 3)]),
    idle_ns=st.integers(0, 10**12),
    vllm_args=st.sampled_from([(), ("--enforce-eager", "--max-model-len=8192")]),
    metadata=st.sampled_from([{}, {"room": "cold", "a b": "ü"}]),
    exact=st.booleans(),
)
plans = st.builds(
    SweepPlan,
    grids=st.lists(grids, min_size=1, max_size=3).map(tuple),
    mix=st.just("chat:0.7,code:0.3"),
    arrivals=st.sampled_from(["poisson", "gamma:cv=3"]),
    duration_ns=st.one_of(st.none(), st.integers(1, 10**15)),
    seed=st.integers(0, 2**40),
    repeats=st.integers(1, 4),
    until_ci=st.sampled_from([None, 0.05, 0.1]),
    all_rates=st.booleans(),
    run=runs,
)


@settings(max_examples=50)
@given(plans)
def test_a_plan_comes_back_from_its_file(plan):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.toml"
        path.write_text(plan_text(plan), encoding="utf-8")
        again = read_plan(path)
    assert difference(presentable(plan), again) is None
    assert again.cells() == plan.cells()


@settings(max_examples=50)
@given(plans)
def test_names_tell_cells_apart(plan):
    names = [cell.name for cell in plan.cells()]
    assert len(set(names)) == len(names)


@settings(max_examples=50)
@given(plans)
def test_each_cell_comes_once_in_blocks_that_the_seed_alone_orders(plan):
    cells = plan.cells()
    blocks = blocks_in_order(cells, plan.seed)
    assert sorted(c.name for block in blocks.values() for c in block) == sorted(cell.name for cell in cells)
    assert all(cell.setting.block == block for block, mine in blocks.items() for cell in mine)
    again = blocks_in_order(cells[::-1], plan.seed)
    assert list(again.items()) == list(blocks.items())


def test_another_seed_gives_another_order():
    plan = SweepPlan((Grid(tp=(2, 4, 8), freq_mhz=tuple(range(800, 1980, 100))),), mix="chat")
    orders = {tuple(map(tuple, blocks_in_order(plan.cells(), seed).values())) for seed in range(5)}
    assert len(orders) == 5


def test_a_cell_is_named_after_its_settings():
    grid = Grid(tp=(2,), freq_mhz=(1200, None), rate_rps=(0.5,), batch_cap=(32,), power_cap_w=(500.0,))
    assert [c.name for c in SweepPlan((grid,), mix="chat", repeats=1).cells()] == [
        "tp2-1200MHz-b32-500W-0.5rps-r0",
        "tp2-unlocked-b32-500W-0.5rps-r0",
    ]


def test_a_cells_run_is_asked_what_the_plan_says():
    grid = Grid(tp=(2,), freq_mhz=(1200,), batch_cap=(32,))
    plan = SweepPlan((grid,), mix="chat", seed=7, run=RunOptions(Path(), vllm_args=("--x",), truth=None))
    options = plan.options(plan.cells()[2], Path("t.parquet"), Path("out"))
    assert (options.tp, options.freq_mhz, options.seed, options.truth) == (2, 1200, 9, False)
    assert options.vllm_args == ("--x", "--max-num-seqs=32")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mix = 'chat'", r"no \[\[grid\]\]"),
        ("[[grid]]\ntp = 2", "either a trace"),
        ("mix = 'chat'\nrate = 2\n[[grid]]", "unknown key 'rate'"),
        ("mix = 'chat'\n[[grid]]\nclock = 2", "grid 1 has the unknown key 'clock'"),
        ("mix = 'chat'\n[[grid]]\nfreq = 'fast'", "grid 1, freq fast: is not a whole number"),
        ("mix = 'chat'\n[[grid]]\n[run]\ntp = 2", "table run has the unknown key 'tp'"),
        ("mix = 'chat'\n[[grid]]\n[run]\nidle = 'soon'", "run, idle 'soon' is not a duration"),
        ("mix = 'chat'\n[[grid]]\n[run]\nreplicas = 'two'", "replicas: Expected `int`"),
        ("mix = 'chat'\nrepeats = 0\n[[grid]]", "--repeats 0: must be at least 1"),
        ("mix = 'chat'\nuntil-ci = 'x'\n[[grid]]", "is no share"),
        ("mix = 'chat'\nuntil-ci = '200%'\n[[grid]]", "--until-ci"),
        ("mix = ", "is not valid TOML"),
        ("mix = 'chat'\ngrid = 3", "must be a table"),
        ("trace = 'x.parquet'\narrivals = 'gamma'\n[[grid]]", "--arrivals gamma: a trace has its own"),
    ],
)
def test_a_wrong_plan_is_refused_with_file_and_key(tmp_path, text, said):
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(ReplayError, match=said) as error:
        read_plan(path)
    assert "p.toml" in str(error.value)


def test_a_trace_beside_the_plan_is_found(tmp_path):
    (tmp_path / "x.parquet").touch()
    (tmp_path / "p.toml").write_text("trace = 'x.parquet'\n[[grid]]\n")
    assert read_plan(tmp_path / "p.toml").trace == tmp_path / "x.parquet"


def test_keys_and_passwords_are_not_written_down():
    run = RunOptions(Path(), engine="http://me:secret@host:80", api_key="secret", vllm_args=("--api-key=secret",))
    plan = SweepPlan((Grid(tp=(1,)),), mix="chat", run=run)
    assert "secret" not in plan_text(plan)


def test_the_first_difference_is_named():
    plan = SweepPlan((Grid(tp=(2,), freq_mhz=(1200, None)),), mix="chat")
    other = replace(plan, grids=(Grid(tp=(2,), freq_mhz=(1200,)),))
    assert difference(plan, plan) is None
    assert difference(plan, other) == "freq_mhz is 1200,unlocked, and was 1200"
    assert difference(plan, replace(plan, run=replace(plan.run, model="m"))) == "model is None, and was m"
