import gzip
import hashlib
import lzma

import pytest

from tracegen.errors import TraceError
from tracegen.importers.azure import HEADER, import_azure

# In the published form: 7 decimals, CRLF, nothing behind the last row.
LINES = [
    HEADER,
    "2023-11-16 23:59:59.9999999,374,44",
    "2023-11-17 00:00:00.0000000,396,109",
    "2023-11-17 00:00:00.0000000,8193,55",
    "2023-11-17 00:00:02.1234567,1,1000",
]
TEXT = "\r\n".join(LINES)


@pytest.fixture
def azure_file(tmp_path):
    """Write a file of the given bytes or text."""

    def write(content, name="AzureTrace.csv"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def replaced(line, text):
    """The file's text with its line `line` (the header is 1) replaced."""
    return "\r\n".join([*LINES[: line - 1], text, *LINES[line:]])


def test_rows_come_exactly(azure_file):
    path = azure_file(TEXT)
    frame, metadata = import_azure(path)
    assert frame["arrival_ns"].to_list() == [0, 100, 100, 2_123_456_800]
    assert frame["input_tokens"].to_list() == [374, 396, 8193, 1]
    assert frame["output_tokens"].to_list() == [44, 109, 55, 1000]
    assert frame["request_id"].to_list() == [0, 1, 2, 3]
    assert frame["label"].unique().to_list() == ["AzureTrace"]
    assert metadata == {
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


@pytest.mark.parametrize(
    "content",
    [
        TEXT.replace("\r\n", "\n"),
        TEXT + "\r\n",
        TEXT.replace("\r\n", "\n") + "\n",
        "\ufeff" + TEXT,
        gzip.compress(TEXT.encode()),
        lzma.compress(TEXT.encode()),
    ],
    ids=["LF", "final CRLF", "final LF", "byte-order mark", "gz", "xz"],
)
def test_other_wrappings_of_the_same_rows(azure_file, content):
    plain, _ = import_azure(azure_file(TEXT, "plain.csv"), label="x")
    frame, metadata = import_azure(azure_file(content, "wrapped"), label="x")
    assert frame.equals(plain)
    assert metadata["source"]["sha256"] == hashlib.sha256(azure_file(content).read_bytes()).hexdigest()


def test_the_label_is_the_name_without_suffixes(azure_file):
    frame, _ = import_azure(azure_file(lzma.compress(TEXT.encode()), "conv.csv.xz"))
    assert frame["label"][0] == "conv"


BAD_ROWS = [
    ("2023-11-17 00:00:01,12", "not a row of TIMESTAMP,ContextTokens,GeneratedTokens"),
    ("2023-11-17 00:00:01,12,3,4", "not a row of"),
    ("2023-11-17 00:00:01,12,-3", "not a row of"),
    ("2023-11-17 00:00:01,12,3.5", "not a row of"),
    ("2023-11-17 00:00:01,12,٣", "not a row of"),
    ("17/11/2023 00:00:01,12,3", "not a row of"),
    ("2500-11-17 00:00:01,12,3", "not a row of"),
    ("", "not a row of"),
    ("2023-02-30 00:00:01,12,3", "no such date or time"),
    ("2023-11-17 24:00:01,12,3", "no such date or time"),
    ("2023-11-17 00:00:01,4294967296,3", "a token count is too large"),
    ("2023-11-17 00:00:01,0,3", "a token count is zero"),
    ("2023-11-17 00:00:01,12,0", "a token count is zero"),
    ("2023-11-16 23:59:59.9999998,12,3", "is earlier than a row before it"),
]


@pytest.mark.parametrize(("row", "why"), BAD_ROWS)
@pytest.mark.parametrize("line", [3, 4])
def test_a_bad_row_is_named_with_file_and_line(azure_file, line, row, why):
    path = azure_file(replaced(line, row))
    with pytest.raises(TraceError) as error:
        import_azure(path)
    assert str(error.value).startswith(f"{path}: line {line}: {why}")
    assert "--skip-bad" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("row", "why"), BAD_ROWS)
def test_bad_rows_are_dropped_and_counted_when_asked(azure_file, row, why):
    frame, metadata = import_azure(azure_file(replaced(3, row)), skip_bad=True)
    assert frame["input_tokens"].to_list() == [374, 8193, 1]
    assert frame["arrival_ns"].to_list() == [0, 100, 2_123_456_800]
    assert frame["request_id"].to_list() == [0, 1, 2]
    source = metadata["source"]
    assert (source["rows_read"], source["rows_dropped"]) == (4, 1)
    ((reason, count),) = source["dropped"].items()
    assert reason.startswith(why)
    assert count == 1


def test_a_dropped_first_row_does_not_set_the_time(azure_file):
    frame, metadata = import_azure(azure_file(replaced(2, "2023-11-16 00:00:00,0,1")), skip_bad=True)
    assert frame["arrival_ns"][0] == 0
    assert metadata["source"]["first_arrival"] == "2023-11-17 00:00:00.0000000"


def test_stray_bytes_spoil_only_their_row(azure_file):
    content = TEXT.encode().replace(b"396", b"3\xff6")
    with pytest.raises(TraceError, match="line 3: not a row of"):
        import_azure(azure_file(content))
    assert import_azure(azure_file(content), skip_bad=True)[0].height == 3


@pytest.mark.parametrize("header", ["", "a,b,c", "TIMESTAMP,ContextTokens", "2023-11-16 18:15:46.6805900,374,44"])
def test_another_header_is_named(azure_file, header):
    path = azure_file(replaced(1, header))
    with pytest.raises(TraceError, match=f"line 1: the header is '{header}', not '{HEADER}'"):
        import_azure(path)


@pytest.mark.parametrize("content", [HEADER, HEADER + "\r\n"])
def test_a_file_without_rows(azure_file, content):
    with pytest.raises(TraceError, match=r"no rows to import \(0 read, 0 dropped\)"):
        import_azure(azure_file(content))


def test_a_file_of_bad_rows_only(azure_file):
    with pytest.raises(TraceError, match=r"no rows to import \(2 read, 2 dropped\)"):
        import_azure(azure_file(HEADER + "\nx\ny\n"), skip_bad=True)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_every_truncation_of_an_archive_is_refused(azure_file, pack):
    whole = pack(TEXT.encode())
    for size in range(len(whole)):
        with pytest.raises(TraceError, match=r"truncated or damaged archive|the header is"):
            import_azure(azure_file(whole[:size]))


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_damaged_archive_is_refused(azure_file, pack):
    whole = bytearray(pack(TEXT.encode()))
    whole[len(whole) // 2] ^= 0xFF
    with pytest.raises(TraceError, match="truncated or damaged archive"):
        import_azure(azure_file(bytes(whole)))


def test_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(TraceError, match="no such file"):
        import_azure(tmp_path / "none.csv")
    with pytest.raises(TraceError, match="cannot be read"):
        import_azure(tmp_path)


def test_order_is_kept_across_a_dropped_row(azure_file):
    rows = [HEADER, "2023-11-16 18:00:02,1,1", "damaged", "2023-11-16 18:00:01,2,2", "2023-11-16 18:00:03,3,3"]
    frame, metadata = import_azure(azure_file("\n".join(rows)), skip_bad=True)
    assert frame["input_tokens"].to_list() == [1, 3]
    assert metadata["source"]["dropped"].keys() == {f"not a row of {HEADER}", "is earlier than a row before it"}
