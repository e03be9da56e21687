import io
import json
import lzma
import tarfile

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from tracegen.cli import app
from tracegen.errors import TraceError
from tracegen.importers.run import import_trace
from tracegen.importers.servegen import import_servegen
from tracegen.importers.servegen_pool import read_pool
from tracegen.schema import read_metadata, read_trace

STEP_S = 600
STEP_NS = STEP_S * 10**9
HOUR_NS = 3600 * 10**9
NOTHING = {"input_tokens": "{}", "output_tokens": "{}"}
# Two clients for twelve hours, in the published form: one even and steady, one bursty that stops after six hours.
FILES = {
    "chunk-0-trace.csv": "".join(f"{STEP_S * k},2.5,0.8,Gamma,1.5,0.26\n" for k in range(72)),
    "chunk-0-dataset.json": json.dumps(
        {
            "0": {"input_tokens": "{10: 0.5, 30: 0.5}", "output_tokens": "{100: 0.25, 200: 0.75}"},
            "21600": {"input_tokens": "{1000: 1.0}", "output_tokens": "{7: 1.0}"},
        }
    ),
    "chunk-7-trace.csv": "".join(
        f"{STEP_S * k},{'0.5,2.5,Weibull,0.46,0.9' if k < 36 else '0,0,,0,0'}\n" for k in range(72)
    ),
    "chunk-7-dataset.json": json.dumps(
        {"0": {"input_tokens": "{4000: 1.0}", "output_tokens": "{1: 0.5, 3: 0.5}"}, "21600": NOTHING}
    ),
}


@pytest.fixture
def pool(tmp_path):
    """A folder with the files above, some replaced; None leaves one out."""

    def make(**replaced):
        folder = tmp_path / "pool"
        folder.mkdir(exist_ok=True)
        for name, content in {
            **FILES,
            **{f"chunk-{key.replace('_', '-', 1)}": v for key, v in replaced.items()},
        }.items():
            if content is not None:
                (folder / name).write_text(content)
        return folder

    return make


@pytest.fixture
def drawn(pool, tmp_path):
    def run(source=None, **options):
        report = import_servegen(source or pool(), tmp_path / "out.parquet", force=True, **options)
        return read_trace(tmp_path / "out.parquet"), report

    return run


def test_rates_of_each_client_come_back(drawn):
    frame, report = drawn(seed=3)
    counts = dict(frame.group_by("client_id").len().iter_rows())
    # A renewal process of n expected points has a variance near n·CV² (Cox 1962, section 4.2): six deviations.
    for client, expected, cv in ((0, 2.5 * 43200, 0.8), (7, 0.5 * 21600, 2.5)):
        assert abs(counts[client] - expected) < 6 * cv * expected**0.5
    assert report.rows == frame.height
    assert report.metadata["source"]["expected_requests"] == 2.5 * 43200 + 0.5 * 21600


def test_bursts_and_families_come_back(drawn):
    frame, _ = drawn(seed=4)
    for client, cv in ((0, 0.8), (7, 2.5)):
        gaps = frame.filter(pl.col("client_id") == client)["arrival_ns"].diff().drop_nulls().to_numpy()
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_lengths_are_those_of_the_client_at_that_hour(drawn):
    frame, _ = drawn()
    early = pl.col("arrival_ns") < 6 * HOUR_NS
    steady = frame.filter(pl.col("client_id") == 0)
    assert set(steady.filter(early)["input_tokens"]) == {10, 30}
    assert steady.filter(early)["output_tokens"].mean() == pytest.approx(175, rel=0.01)
    assert set(steady.filter(~early)["input_tokens"]) == {1000}
    assert set(steady.filter(~early)["output_tokens"]) == {7}
    assert set(frame.filter(pl.col("client_id") == 7)["output_tokens"]) == {1, 3}


def test_input_and_output_of_a_client_are_independent(drawn):
    frame, _ = drawn(duration_ns=6 * HOUR_NS)
    steady = frame.filter(pl.col("client_id") == 0)
    shares = steady.group_by("input_tokens", "output_tokens").len().sort("input_tokens", "output_tokens")["len"]
    assert (shares / steady.height).to_list() == pytest.approx([0.125, 0.375, 0.125, 0.375], abs=0.01)


def test_a_part_of_the_time_is_a_part_of_the_whole(drawn):
    whole, _ = drawn(seed=9)
    part, report = drawn(seed=9, start_ns=STEP_NS * 5 // 2, duration_ns=3 * STEP_NS)
    inside = pl.col("arrival_ns").is_between(STEP_NS * 5 // 2, STEP_NS * 11 // 2 - 1)
    again = whole.filter(inside).with_columns(pl.col("arrival_ns") - STEP_NS * 5 // 2)
    assert part.drop("request_id").equals(again.drop("request_id"))
    assert part["request_id"].to_list() == list(range(part.height))
    assert report.metadata["parameters"]["start_s"] == 1500


def test_rate_is_one_factor_for_all_clients(drawn):
    frame, report = drawn(rate_rps=12, duration_ns=6 * HOUR_NS, seed=2)
    assert report.metadata["parameters"]["rate_factor"] == pytest.approx(4)
    assert frame.height == pytest.approx(12 * 21600, rel=0.02)
    assert (frame["client_id"] == 7).mean() == pytest.approx(1 / 6, rel=0.1)


def test_the_same_seed_gives_the_same_bytes_from_a_folder_and_its_archive(pool, tmp_path):
    folder = pool()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(folder, arcname="data/pool")
    (tmp_path / "pool.tar.xz").write_bytes(lzma.compress(packed.getvalue()))
    with pytest.raises(TraceError, match="a ServeGen pool is read by 'tracegen import servegen'"):
        import_trace(tmp_path / "pool.tar.xz", tmp_path / "out.parquet")
    frames = []
    for source in (folder, tmp_path / "pool.tar.xz"):
        import_servegen(source, tmp_path / "out.parquet", duration_ns=HOUR_NS, seed=5, force=True)
        once = (tmp_path / "out.parquet").read_bytes()
        import_servegen(source, tmp_path / "out.parquet", duration_ns=HOUR_NS, seed=5, force=True)
        assert (tmp_path / "out.parquet").read_bytes() == once
        frames.append(read_trace(tmp_path / "out.parquet"))
    assert frames[0].equals(frames[1])
    assert read_metadata(tmp_path / "out.parquet")["seed"] == 5


def test_clients_without_lengths_are_left_out_and_counted(pool, drawn):
    frame, report = drawn(pool(**{"7_dataset.json": json.dumps({"0": NOTHING})}), duration_ns=6 * HOUR_NS)
    assert set(frame["client_id"]) == {0}
    assert any("1 client without lengths is left out, with 16.7% of the requests" in text for text in report.remarks)


def test_lengths_do_not_depend_on_the_time_that_is_asked_for(pool):
    windows = {"0": "{}", "21600": "{5: 1}", "43200": "{}", "64800": "{9: 1}"}
    lengths = json.dumps({start: {"input_tokens": found, "output_tokens": found} for start, found in windows.items()})
    folder = pool(**{"7_dataset.json": lengths})
    whole = read_pool(folder).clients[7]
    for start_h in range(24):
        part = read_pool(folder, start_h * HOUR_NS, (start_h + 1) * HOUR_NS).clients[7]
        for at_s in (start_h * 3600, start_h * 3600 + 3000):
            assert part.lengths_at(at_s)[0].tokens.tolist() == whole.lengths_at(at_s)[0].tokens.tolist()
    assert whole.lengths_at(0)[0].tokens.tolist() == [5]


def test_a_stretch_without_lengths_of_its_own_takes_those_before_it(pool, drawn):
    rates = FILES["chunk-7-trace.csv"].replace("0,0,,0,0", "0.5,1,Gamma,1,2")
    frame, _ = drawn(pool(**{"7_trace.csv": rates}), start_ns=6 * HOUR_NS)
    assert set(frame.filter(pl.col("client_id") == 7)["input_tokens"]) == {4000}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("0_trace.csv", "0,1,1,Gamma,1,1\n600,x,1,Gamma,1,1\n", "chunk-0-trace.csv: line 2: rate 'x' is not a number"),
        ("0_trace.csv", "0,1,1,Gamma,1,1\n600,-1,1,Gamma,1,1\n", "line 2: rate '-1' is not a number of zero or more"),
        ("0_trace.csv", "0,1,1,Gamma,1,1\n600,nan,1,Gamma,1,1\n", "line 2: rate 'nan'"),
        ("0_trace.csv", "0,1,1,Gamma,1,1\n600,1,1,Pareto,1,1\n", "line 2: family 'Pareto' is none of Gamma, Weibull"),
        ("0_trace.csv", "0,1,1,Gamma,1,1\n600,1,99,Gamma,1,1\n", "line 2: CV 99 is not within 0.05 to 30"),
        ("0_trace.csv", "0,1,1,Gamma,1,1\n600,1\n", "line 2: has 2 columns"),
        ("0_trace.csv", "0,1,1,Gamma,1,1\n600,0,0,,0,0\n900,0,0,,0,0\n", "line 3: time 900 is not a later multiple"),
        ("0_trace.csv", "0,0,0,,0,0\n600,0,0,,0,0\n600,0,0,,0,0\n", "line 3: time 600 is not a later multiple of 600"),
        ("7_dataset.json", "{", "chunk-7-dataset.json: is not JSON of lengths"),
        ("7_dataset.json", '{"0": {"input_tokens": "{4: x}"}}', "key 0, input_tokens: is not lengths"),
        ("7_dataset.json", '{"0": {"input_tokens": "{4: -1}"}}', "key 0, input_tokens: 4:  -1 is no length"),
        ("7_dataset.json", '{"0": {"input_tokens": "{4.5: 1}"}}', "4.5:  1 is no length with its probability"),
    ],
)
def test_a_damaged_file_is_named_with_its_place(pool, drawn, name, content, said):
    with pytest.raises(TraceError, match="pool: chunk-") as raised:
        drawn(pool(**{name: content}))
    assert said in str(raised.value)


def test_what_is_no_pool_is_told(tmp_path, drawn):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TraceError, match=r"has no chunk-N-trace\.csv; a ServeGen pool is a folder"):
        drawn(tmp_path / "empty")
    (tmp_path / "text").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" * 40)
    with pytest.raises(TraceError, match="is neither a folder nor a tar archive of a pool"):
        drawn(tmp_path / "text")
    with pytest.raises(TraceError, match="no such file"):
        drawn(tmp_path / "nowhere")


@pytest.mark.parametrize("time", [{"start_ns": 12 * HOUR_NS}, {"duration_ns": 13 * HOUR_NS}])
def test_a_time_that_the_pool_does_not_have_is_refused(drawn, time):
    with pytest.raises(TraceError, match="the pool has 0 to 12h; choose --start and --duration within it"):
        drawn(**time)


def test_probabilities_need_not_add_up_and_a_length_of_zero_is_left_out(pool):
    lengths = json.dumps({"0": {"input_tokens": "{0: 0.5, 8: 0.1, 9: 0.3}", "output_tokens": {"5": 0.2}}})
    client = read_pool(pool(**{"7_dataset.json": lengths})).clients[7]
    found = client.lengths_at(0)[0]
    assert found.tokens.tolist() == [8, 9]
    assert found.cumulative.tolist() == pytest.approx([0.25, 1])
    assert client.lengths_at(0)[1].draw(3, np.random.default_rng(1)).tolist() == [5, 5, 5]


def test_the_command_does_the_same(pool, tmp_path):
    words = ["import", "servegen", str(pool()), "--start", "1h", "--duration", "20m", "--rate", "6", "--seed", "2"]
    result = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "cli.parquet")])
    assert result.exit_code == 0, result.output
    assert "requests were drawn from the pool's clients" in result.output
    import_servegen(
        pool(), tmp_path / "py.parquet", start_ns=HOUR_NS, duration_ns=HOUR_NS // 3, rate_rps=6.0, seed=2, label="pool"
    )
    assert (tmp_path / "cli.parquet").read_bytes() == (tmp_path / "py.parquet").read_bytes()
