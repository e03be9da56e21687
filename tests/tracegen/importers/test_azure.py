import gzip
import hashlib
import lzma

import pyarrow as pa
import pytest

from tracegen.errors import TraceError
from tracegen.importers.azure import HEADER, MULTIMODAL_HEADER

# In the published form of 2023: 7 decimals, CRLF, nothing behind the last row.
LINES = [
    HEADER,
    "2023-11-16 23:59:59.9999999,374,44",
    "2023-11-17 00:00:00.0000000,396,109",
    "2023-11-17 00:00:00.0000000,8193,55",
    "2023-11-17 00:00:02.1234567,1,1000",
]
TEXT = "\r\n".join(LINES)


def replaced(line, text):
    """The file's text with its line `line` (the header is 1) replaced."""
    return "\r\n".join([*LINES[: line - 1], text, *LINES[line:]])


def test_rows_come_exactly(import_file):
    frame, report = import_file(TEXT, "AzureTrace.csv", "azure")
    assert frame["arrival_ns"].to_list() == [0, 100, 100, 2_123_456_800]
    assert frame["input_tokens"].to_list() == [374, 396, 8193, 1]
    assert frame["output_tokens"].to_list() == [44, 109, 55, 1000]
    assert frame["request_id"].to_list() == [0, 1, 2, 3]
    assert frame["label"].unique().to_list() == ["AzureTrace"]
    assert report.metadata == {
        "generator": "tracegen import azure",
        "parameters": {"label": "AzureTrace", "skip_bad": False},
        "source": {
            "file": "AzureTrace.csv",
            "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
            "first_arrival": "2023-11-16 23:59:59.9999999",
            "rows_read": 4,
            "rows_dropped": 0,
            "dropped": {},
        },
    }
    assert report.summary() == {
        "requests": 4,
        "span_s": 2.1234568,
        "rate_rps": 3 / 2.1234568,
        "input_tokens": {"mean": 2241},
        "output_tokens": {"mean": 302},
    }


def zstd(content):
    return pa.Codec("zstd").compress(content, asbytes=True)


def zstd_stream(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKERS = [gzip.compress, lzma.compress, zstd_stream]


@pytest.mark.parametrize(
    "content",
    [
        TEXT.replace("\r\n", "\n"),
        TEXT + "\r\n",
        TEXT.replace("\r\n", "\n") + "\n",
        "\ufeff" + TEXT,
        *(pack(TEXT.encode()) for pack in PACKERS),
        zstd(TEXT.encode()),
        gzip.compress(TEXT[:60].encode()) + gzip.compress(TEXT[60:].encode()),
        lzma.compress(TEXT[:60].encode()) + lzma.compress(TEXT[60:].encode()),
        zstd_stream(TEXT[:60].encode()) + zstd_stream(TEXT[60:].encode()),
    ],
    ids=["LF", "final CRLF", "final LF", "byte-order mark", "gz", "xz", "zst", "zst block", "2 gz", "2 xz", "2 zst"],
)
def test_other_wrappings_of_the_same_rows(import_file, content):
    plain, _ = import_file(TEXT, label="x")
    frame, report = import_file(content, "wrapped", label="x")
    assert frame.equals(plain)
    raw = content.encode() if isinstance(content, str) else content
    assert report.metadata["source"]["sha256"] == hashlib.sha256(raw).hexdigest()


def test_the_label_is_the_name_without_suffixes(import_file):
    frame, _ = import_file(lzma.compress(TEXT.encode()), "conv.csv.xz")
    assert frame["label"][0] == "conv"


def test_times_of_2024_and_2023_in_one_column(import_file):
    rows = [
        "2024-05-10 00:00:00+00:00,2162,5",  # as pandas writes a fraction of zero
        "2024-05-10 00:00:00.009930+00:00,2399,6",
        "2024-05-10 00:00:00.0173351,76,15",
        "2024-05-10T00:00:00.022Z,76,15",
        "2024-05-10 02:00:00.123456789+02:00,76,15",
        "2024-05-09 19:30:00.2-04:30,76,15",
        "2024-05-10 00:00:01,1,1",
    ]
    frame, report = import_file("\n".join([HEADER, *rows, ""]))
    assert frame["arrival_ns"].to_list() == [0, 9930000, 17335100, 22000000, 123456789, 200000000, 1000000000]
    assert report.metadata["source"]["first_arrival"] == "2024-05-10 00:00:00+00:00"


def test_a_week_keeps_its_microseconds(import_file):
    rows = ["2024-05-10 00:00:00.009930+00:00,2162,5", "2024-05-16 23:59:59.929501+00:00,4725,8"]
    frame, _ = import_file("\n".join([HEADER, *rows]))
    assert frame["arrival_ns"].to_list() == [0, 604_799_919_571_000]


def test_images_of_the_multimodal_trace_are_kept(import_file):
    rows = ["2024-10-15T12:00:00.269Z,0,770,491", "2024-10-15T12:00:05.819Z,16,949,126"]
    frame, report = import_file("\n".join([MULTIMODAL_HEADER, *rows]))
    assert report.format == "azure"
    assert frame["images"].to_list() == [0, 16]
    assert frame["input_tokens"].to_list() == [770, 949]
    assert frame["arrival_ns"].to_list() == [0, 5_550_000_000]


NO_TIME = "TIMESTAMP is not a date and time such as 2023-11-16 18:15:46.6805900"
BAD_ROWS = [
    ("2023-11-17 00:00:01,12", "has too few columns"),
    ("2023-11-17 00:00:01,12,3,4", "has too many columns"),
    ("2023-11-17 00:00:01,12,-3", "GeneratedTokens is negative"),
    ("2023-11-17 00:00:01,12,3.5", "GeneratedTokens is not a whole number"),
    ("2023-11-17 00:00:01,12,٣", "GeneratedTokens is not a whole number"),
    ("2023-11-17 00:00:01,,3", "ContextTokens is blank"),
    ('2023-11-17 00:00:01,"12",3', "ContextTokens is not a whole number"),
    ("17/11/2023 00:00:01,12,3", NO_TIME),
    ("2500-11-17 00:00:01,12,3", NO_TIME),
    ("2023-11-17 00:00:60,12,3", NO_TIME),
    ("2023-11-17 00:00:01+15:00,12,3", NO_TIME),
    ("2023-11-17 00:00:01.1234567891,12,3", NO_TIME),
    ("", "is blank"),
    ("2023-02-30 00:00:01,12,3", "TIMESTAMP is no such date or time"),
    ("2023-11-17 24:00:01,12,3", "TIMESTAMP is no such date or time"),
    ("2023-11-17 00:00:01,4294967296,3", "ContextTokens is too large (over 4294967295)"),
    ("2023-11-17 00:00:01,0,3", "ContextTokens is zero"),
    ("2023-11-17 00:00:01,12,0", "GeneratedTokens is zero"),
    ("2023-11-16 23:59:59.9999998,12,3", "is earlier than a row before it"),
]


@pytest.mark.parametrize(("row", "why"), BAD_ROWS)
@pytest.mark.parametrize("line", [3, 4])
def test_a_bad_row_is_named_with_file_and_line(import_file, tmp_path, line, row, why):
    with pytest.raises(TraceError) as error:
        import_file(replaced(line, row))
    said = row.partition(",")[0] if why.startswith("is earlier") else row
    assert str(error.value).startswith(f"{tmp_path / 'trace.csv'}: line {line}: {why}: {said!r}")
    assert "--skip-bad" in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.csv"]


@pytest.mark.parametrize(("row", "why"), BAD_ROWS)
def test_bad_rows_are_dropped_and_counted_when_asked(import_file, row, why):
    frame, report = import_file(replaced(3, row), skip_bad=True)
    assert frame["input_tokens"].to_list() == [374, 8193, 1]
    assert frame["arrival_ns"].to_list() == [0, 100, 2_123_456_800]
    assert frame["request_id"].to_list() == [0, 1, 2]
    assert (report.rows_read, report.rows_dropped) == (4, 1)
    assert report.metadata["source"]["dropped"] == {why: 1}


def test_a_dropped_first_row_does_not_set_the_time(import_file):
    frame, report = import_file(replaced(2, "2023-11-16 00:00:00,0,1"), skip_bad=True)
    assert frame["arrival_ns"][0] == 0
    assert report.first_arrival == "2023-11-17 00:00:00.0000000"


def test_stray_bytes_spoil_only_their_row(import_file):
    content = TEXT.encode().replace(b"396", b"3\xff6")
    with pytest.raises(TraceError, match="line 3: ContextTokens is not a whole number"):
        import_file(content)
    assert import_file(content, skip_bad=True)[0].height == 3


@pytest.mark.parametrize("header", ["", "a,b,c", "TIMESTAMP,ContextTokens", "2023-11-16 18:15:46.6805900,374,44"])
def test_another_header_is_named(import_file, header):
    with pytest.raises(TraceError, match=f"line 1: the header is '{header}', not '{HEADER}'"):
        import_file(replaced(1, header), format="azure")


@pytest.mark.parametrize("content", [HEADER, HEADER + "\r\n"])
def test_a_file_without_rows(import_file, content):
    with pytest.raises(TraceError, match=r"no rows to import \(0 read, 0 dropped\)"):
        import_file(content)


def test_a_file_of_bad_rows_only(import_file):
    with pytest.raises(TraceError, match=r"no rows to import \(2 read, 2 dropped\)"):
        import_file(HEADER + "\nx\ny\n", skip_bad=True)


@pytest.mark.parametrize("pack", PACKERS)
def test_every_truncation_of_an_archive_is_refused(import_file, pack):
    whole = pack(TEXT.encode())
    for size in range(len(whole)):
        with pytest.raises(TraceError, match=r"truncated or damaged archive|the header is"):
            import_file(whole[:size], format="azure")


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_damaged_archive_is_refused(import_file, pack):
    whole = bytearray(pack(TEXT.encode()))
    whole[len(whole) // 2] ^= 0xFF
    with pytest.raises(TraceError, match="truncated or damaged archive"):
        import_file(bytes(whole))


def test_order_is_kept_across_a_dropped_row(import_file):
    rows = [HEADER, "2023-11-16 18:00:02,1,1", "damaged", "2023-11-16 18:00:01,2,2", "2023-11-16 18:00:03,3,3"]
    frame, report = import_file("\n".join(rows), skip_bad=True)
    assert frame["input_tokens"].to_list() == [1, 3]
    assert report.dropped == {"has too few columns": 1, "is earlier than a row before it": 1}


def test_rows_out_of_order_are_sorted_when_asked(import_file):
    rows = [HEADER, "2023-11-16 18:00:02,1,1", "2023-11-16 18:00:01,2,2", "2023-11-16 18:00:03,3,3"]
    frame, report = import_file("\n".join(rows), sort=True)
    assert frame["input_tokens"].to_list() == [2, 1, 3]
    assert frame["arrival_ns"].to_list() == [0, 10**9, 2 * 10**9]
    assert frame["request_id"].to_list() == [0, 1, 2]
    assert report.first_arrival == "2023-11-16 18:00:01"
    assert report.remarks == ["1 row stood behind a later one: sorted by time"]
    assert report.metadata["parameters"]["sort"] is True
