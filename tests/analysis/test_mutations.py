"""Whatever is wrong with a run directory, `analysis energy` says so in one line, or its figures add up."""

import contextlib
import copy
import io
import json
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.cli import energy
from tracegen.errors import WattraceError

TABLES = ("requests", "steps", "segments", "power", "trace", "truth")
NEEDED = ("requests", "steps", "segments", "power", "power", "steps", "segments")  # drawn more often
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 255, 2**16, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64, -(2**63)]),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-2, 3), max_size=3),
    st.dictionaries(st.sampled_from(["gpu", "host", "instance", "counter", "instant", "x"]), st.integers(), max_size=2),
)
EXTREMES = (-1, 0, 1, 7, 255, 2**16 - 1, 2**32 - 1, 2**62, 2**63 - 1, -(2**62))
DTYPES = (pl.String(), pl.Float32(), pl.Float64(), pl.Int64(), pl.Int8(), pl.Null())


def paths_in(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where anything stands in a JSON document."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [p for key, inner in items for p in ((*path, key), *paths_in(inner, (*path, key)))]


def change_manifest(draw: Any, document: dict[str, Any]) -> None:
    """Take a key out, put a value in its place, or say an entry twice."""
    path = draw(st.sampled_from(paths_in(document)))
    holder: Any = document
    for key in path[:-1]:
        holder = holder[key]
    how = draw(st.sampled_from(["drop", "put", "put", "put", "twice"]))
    if how == "drop":
        del holder[path[-1]]
    elif how == "twice" and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[path[-1]]))
    else:
        holder[path[-1]] = draw(VALUES)


def change_column(draw: Any, frame: pl.DataFrame) -> pl.DataFrame:
    """Drop, scale, shift, retype or turn round a column, or change a cell of it."""
    name = draw(st.sampled_from(frame.columns))
    dtype, row = frame[name].dtype, draw(st.integers(0, frame.height - 1))
    here = pl.int_range(pl.len()) == row
    number = pl.col(name).cast(pl.Float64, strict=False)
    other = draw(st.sampled_from(EXTREMES))
    changed = {
        "drop": None,
        "null": pl.when(~here).then(pl.col(name)),
        "nulls": pl.lit(None, dtype),
        "cell": pl.when(here).then(pl.lit(other).cast(dtype, strict=False)).otherwise(pl.col(name)),
        "cell of Int64": pl.when(here).then(other).otherwise(pl.col(name).cast(pl.Int64, strict=False)),
        "all": pl.lit(other).cast(dtype, strict=False),
        "scale": (number * draw(st.sampled_from([-1.0, 0.0, 1e-3, 0.5, 2.0, 1e3, 1e6]))).cast(dtype, strict=False),
        "shift": (number + draw(st.sampled_from([-1e12, -1e9, -1.0, 1.0, 1e9, 1e12]))).cast(dtype, strict=False),
        "type": pl.col(name).cast(draw(st.sampled_from(DTYPES)), strict=False),
        "turn": pl.col(name).reverse(),
    }[
        draw(
            st.sampled_from(["drop", "null", "nulls", "cell", "cell of Int64", "all", "scale", "shift", "type", "turn"])
        )
    ]
    return frame.drop(name) if changed is None else frame.with_columns(changed.alias(name))


def change_rows(draw: Any, frame: pl.DataFrame) -> pl.DataFrame:
    """Swap, repeat, lose or reverse rows."""
    a, b = sorted(draw(st.integers(0, frame.height - 1)) for _ in range(2))
    return {
        "swap": frame[[*range(a), b, *range(a + 1, b), a, *range(b + 1, frame.height)] if a < b else slice(None)],
        "again": pl.concat([frame, frame[a : b + 1]]),
        "lose": pl.concat([frame[:a], frame[b:]]),
        "head": frame[:a],
        "tail": frame[b:],
        "none": frame[:0],
        "reverse": frame.reverse(),
    }[draw(st.sampled_from(["swap", "again", "lose", "head", "tail", "none", "reverse"]))]


@pytest.fixture(scope="module")
def whole(_made, tmp_path_factory) -> tuple[dict[str, pl.DataFrame], dict[str, Any], Any]:
    """A good run's tables, its manifest, and a folder for changed ones."""
    path = _made(duration_s=8.0)
    frames = {name: pl.read_parquet(path / f"{name}.parquet") for name in TABLES}
    return frames, json.loads((path / "manifest.json").read_text()), tmp_path_factory.mktemp("changed")


def change_run(draw: Any, frames: dict[str, pl.DataFrame], document: dict[str, Any]) -> dict[str, int]:
    """Change one or two things; of which files only how many bytes are left, below 0 none at all."""
    cut: dict[str, int] = {}
    for _ in range(draw(st.integers(1, 2))):
        table = draw(st.sampled_from((*TABLES, *NEEDED)))
        what = draw(st.sampled_from(["column", "column", "rows", "manifest", "file"]))
        if what == "manifest":
            change_manifest(draw, document)
        elif what == "file":
            cut[table] = draw(st.one_of(st.just(-1), st.integers(0, 20_000)))
        elif frames[table].height and frames[table].width:
            frames[table] = (change_column if what == "column" else change_rows)(draw, frames[table])
    return cut


def write(path: Any, frames: dict[str, pl.DataFrame], document: dict[str, Any], cut: dict[str, int]) -> None:
    """Make `path` a run directory of these."""
    for name, frame in frames.items():
        file = path / f"{name}.parquet"
        frame.write_parquet(file)
        if cut.get(name, 0) < 0:
            file.unlink()
        elif name in cut:
            file.write_bytes(file.read_bytes()[: cut[name]])
    (path / "manifest.json").write_text(json.dumps(document))


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_a_changed_run_is_refused_in_one_line_or_its_figures_add_up(whole, data):
    frames, document, path = dict(whole[0]), copy.deepcopy(whole[1]), whole[2]
    write(path, frames, document, change_run(data.draw, frames, document))
    printed, refused = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            energy(path, as_json=True)
    except WattraceError as error:
        refused = str(error)
    if refused:
        assert "\n" not in refused
        assert refused.startswith(str(path))  # the file, or the directory that lacks it
        return
    told = json.loads(printed.getvalue())
    requests = pl.read_parquet(path / "energy" / "requests.parquet")
    known_j = requests["energy_j"].sum() + told["idle_j"] + told["other_j"]
    assert abs(known_j - told["measured_j"]) <= 1e-9 * told["measured_j"]
    assert told["idle_j"] >= 0
    assert told["other_j"] >= -1e-9 * told["measured_j"]
    for column in ("energy_j", "prefill_j", "decode_j", "shared_j", "energy_se_j"):
        values = requests[column].drop_nulls()
        assert values.is_finite().all()
        assert (values >= 0).all(), column
