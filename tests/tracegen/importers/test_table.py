import datetime as dt
import gzip
import io

import polars as pl
import pytest

from tracegen.errors import TraceError
from tracegen.importers.columns import ID, clock
from tracegen.importers.table import parse_map

MAP = {"arrival": "ts", "input": "in", "output": "out"}
S = 10**9


def table(import_file, content, name="log.csv", columns=MAP, **options):
    return import_file(content, name, "table", map=columns, **options)


@pytest.mark.parametrize(
    ("unit", "stamps", "arrivals"),
    [
        ("s", ["1715472000", "1715472000.5", "1715472001.123456789"], [0, 500_000_000, 1_123_456_789]),
        ("ms", ["0", "0.25", "17.5"], [0, 250_000, 17_500_000]),
        ("us", ["1", "2.5", "30000000"], [0, 1500, 29_999_999_000]),
        ("ns", ["7", "8", "4611686018427387904"], [0, 1, 4611686018427387897]),
        ("iso", ["2024-05-10T00:00:00Z", "2024-05-10 00:00:00.5", "2024-05-10 02:00:01+02:00"], [0, S // 2, S]),
        (None, ["2024-05-10T00:00:00Z", "2024-05-10 00:00:00.5", "2024-05-10 02:00:01+02:00"], [0, S // 2, S]),
    ],
)
def test_times_of_every_unit_are_exact(import_file, unit, stamps, arrivals):
    csv = "ts,in,out\n" + "".join(f"{t},1,2\n" for t in stamps)
    assert table(import_file, csv, time_unit=unit)[0]["arrival_ns"].to_list() == arrivals
    numbers = unit not in {"iso", None}
    rows = "".join(f'{{"ts": {t if numbers else repr(t)}, "in": 1, "out": 2}}\n'.replace("'", '"') for t in stamps)
    assert table(import_file, rows, "log.jsonl", time_unit=unit)[0]["arrival_ns"].to_list() == arrivals


def test_numbers_of_an_unknown_unit_are_not_guessed(import_file):
    with pytest.raises(
        TraceError, match=r"arrivals such as 17\.5 are numbers of what\? say --time-unit s, ms, us or ns"
    ):
        table(import_file, "ts,in,out\n17.5,1,2\n")
    with pytest.raises(TraceError, match="--time-unit h: is none of s, ms, us, ns, iso"):
        table(import_file, "ts,in,out\n17.5,1,2\n", time_unit="h")


def test_all_columns_that_a_map_knows(import_file):
    everything = MAP | {"client": "user", "session": "chat", "label": "kind", "model": "llm"}
    csv = "x,ts,in,out,user,chat,kind,llm\n,0,1,2,ann,17,a,big\n,1,1,2,,17,,\n,2,1,2,ann,bob,b,small\n"
    frame, report = table(import_file, csv, columns=everything, time_unit="s", label="mine")
    clients = frame["client_id"].to_list()
    assert clients[0] == clients[2] is not None
    assert clients[1] is None
    assert frame["session_id"].to_list()[:2] == [17, 17]
    assert frame["session_id"].to_list()[2] > 1 << 32
    assert frame["label"].to_list() == ["a", "mine", "b"]
    assert frame["model"].to_list() == ["big", None, "small"]
    assert "x" not in frame.columns
    assert report.metadata["parameters"] == {
        "label": "mine",
        "skip_bad": False,
        "map": everything,
        "time_unit": "s",
    }


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_are_seen_in_the_header(import_file, separator):
    csv = "ts,in,out\r\n0,1,2\r\n1,3,4\r\n".replace(",", separator)
    assert table(import_file, csv, time_unit="s")[0]["input_tokens"].to_list() == [1, 3]


def test_quoted_fields_may_hold_commas_quotes_and_line_ends(import_file):
    csv = 'prompt,ts,in,out\nplain,0,1,2\n"a, ""b""\nc",1,3,4\n"",2,"5",6\nlast,x,7,8\n'
    with pytest.raises(TraceError, match=r"line 6: ts is not a number of seconds: 'last,x,7,8'"):
        table(import_file, csv, time_unit="s")
    frame, report = table(import_file, csv, time_unit="s", skip_bad=True)
    assert frame["input_tokens"].to_list() == [1, 3, 5]
    assert report.rows_read == 4


def test_a_quote_that_does_not_close_spoils_its_row(import_file):
    csv = 'ts,in,out\n0,1,2\n1,"3"4,5\n2,6,7\n'
    with pytest.raises(TraceError, match=r"line 3: is not a row of CSV"):
        table(import_file, csv, time_unit="s")
    assert table(import_file, csv, time_unit="s", skip_bad=True)[0]["input_tokens"].to_list() == [1, 6]


def test_numbers_as_tables_with_gaps_have_them(import_file):
    assert table(import_file, "ts,in,out\n0, 12.0 ,2.\n", time_unit="s")[0]["input_tokens"].to_list() == [12]


def test_json_may_be_nested(import_file):
    rows = (
        '{"ts": "2024-05-10T00:00:00Z", "usage": {"in": 12, "out": 3}}\n'
        '{"ts": "2024-05-10T00:00:01Z", "usage": {"in": 13, "out": 4.0}}\n'
    )
    frame, _ = table(import_file, rows, columns=MAP | {"input": "usage.in", "output": "usage.out"})
    assert frame["input_tokens"].to_list() == [12, 13]
    assert frame["output_tokens"].to_list() == [3, 4]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
def test_parquet_with_dates(import_file, pack, unit, zone):
    at = [dt.datetime(2024, 5, 10, 12, 0, 0, 5000, tzinfo=dt.UTC), dt.datetime(2024, 5, 10, 12, 0, 1, tzinfo=dt.UTC)]
    times = pl.Series(at).dt.cast_time_unit(unit)
    times = times.dt.convert_time_zone(zone) if zone else times.dt.replace_time_zone(None)
    file = io.BytesIO()
    pl.DataFrame({"ts": times, "in": [1, 2], "out": [3.0, 4.0]}).write_parquet(file)
    frame, report = table(import_file, pack(file.getvalue()), "log.parquet")
    assert frame["arrival_ns"].to_list() == [0, 995_000_000]
    assert frame["output_tokens"].to_list() == [3, 4]
    assert report.first_arrival == "2024-05-10 12:00:00.005000000"


def test_a_bad_row_of_parquet_is_named_by_its_number_from_zero(import_file):
    file = io.BytesIO()
    pl.DataFrame({"ts": [0.5, 1.0, 2.0], "in": [1, None, 2], "out": [3, 4, 5]}).write_parquet(file)
    with pytest.raises(TraceError, match=r"log.parquet: row 1: in is blank"):
        table(import_file, file.getvalue(), "log.parquet", time_unit="s")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a,in,out\n0,1,2\n", "there is no column 'ts'; the file has a, in, out"),
        ("ts,in,in,out\n0,1,2,3\n", "line 1: column 'in' occurs twice"),
        ('{"a": 0, "in": 1, "out": 2}\n', "there is no column 'ts'; the file has a, in, out"),
        (b"PAR1 and no more", "not a readable Parquet file"),
    ],
)
def test_columns_that_are_not_there(import_file, content, says):
    with pytest.raises(TraceError, match=says):
        table(import_file, content, time_unit="s")


def test_a_map_is_needed(import_file):
    with pytest.raises(TraceError, match="which columns\\? say --map"):
        import_file("ts,in,out\n0,1,2\n", format="table")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("arrival=a,input=b", "output=COLUMN is missing"),
        ("arrival=a,input=b,output=c,user=d", "'user=d' is no KEY=COLUMN; the keys are arrival, input, output, client"),
        ("arrival=a,input=b,output", "'output=' is no KEY=COLUMN"),
        ("arrival=a,input=b,output=c,input=d", "a key occurs twice"),
    ],
)
def test_maps_that_are_none(text, says):
    with pytest.raises(TraceError, match=says):
        parse_map(text)


def test_a_map_as_typed():
    assert parse_map("arrival=ts, input=in,output=out") == MAP


def test_ids_of_text_are_the_same_everywhere_and_numbers_themselves():
    ids = ID.parse(pl.Series(["ann", "17", None, "", "ann", "bob"])).to_list()
    # The first 8 bytes of BLAKE2b, so the same in each file, process and machine.
    assert ids[:5] == [0x8D3ADF6ABF23F3A5, 17, None, None, 0x8D3ADF6ABF23F3A5]
    assert ids[5] not in ids[:5]


def test_digits_beyond_the_nanosecond_are_cut():
    assert clock("s").parse(pl.Series(["0.1234567899"])).to_list() == [123_456_789]
