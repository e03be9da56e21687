"""Each format, each column, each damage: the row is named with its file and line, or can be told to be whole."""

import json

import pytest

from tracegen.errors import TraceError
from tracegen.importers import azure, burstgpt

LINE = 4  # the damaged one; there are rows before and behind it

WHOLE_NUMBER = {
    "letters": ("12x", "is not a whole number"),
    "negative": ("-12", "is negative"),
    "too large": ("4294967296", r"is too large \(over 4294967295\)"),
    "blank": ("", "is blank"),
    "a fraction": ("1.5", "is not a whole number"),
    "not UTF-8": (b"1\xff2", "is not a whole number"),
}
TOKENS = WHOLE_NUMBER | {"zero": ("0", "is zero")}
DATE = {
    "letters": ("2024-05-10 00:00:0x", "is not a date and time such as"),
    "cut": ("2024-05-10 00:0", "is not a date and time such as"),
    "not a date": ("2024-13-10 00:00:01", "is no such date or time"),
    "negative": ("-2024-05-10 00:00:01", "is not a date and time such as"),
    "too large": ("12024-05-10 00:00:01", "is not a date and time such as"),
    "blank": ("", "is blank"),
    "not UTF-8": (b"2024-05-10 00:00:0\xff", "is not a date and time such as"),
}
SECONDS = {
    "letters": ("1x", "is not a number of seconds"),
    "negative": ("-1", "is negative"),
    "too large": ("4611686019", "is too large"),
    "blank": ("", "is blank"),
    "not UTF-8": (b"1\xff", "is not a number of seconds"),
}
TEXT = {"blank": ("", "is blank")}
# The three counts hold each other: what is a number, and another, is told by their sum.
SUM = WHOLE_NUMBER | {"zero": ("0", None), "another number": ("123456", None)}
NO_SUM = "Total tokens is not Request tokens [+] Response tokens"

CSV = {
    "azure": (
        azure.HEADER,
        ["2024-05-10 00:00:0{k}.5,1{k},2{k}"],
        {"TIMESTAMP": DATE, "ContextTokens": TOKENS, "GeneratedTokens": TOKENS},
    ),
    "azure multimodal": (
        azure.MULTIMODAL_HEADER,
        ["2024-05-10T00:00:0{k}.5Z,{k},1{k},2{k}"],
        {"TIMESTAMP": DATE, "NumImages": WHOLE_NUMBER, "ContextTokens": TOKENS, "GeneratedTokens": TOKENS},
    ),
    "burstgpt 1": (
        burstgpt.HEADER,
        ["{k},GPT-4,10,2{k},3{k},API log"],
        {
            "Timestamp": SECONDS,
            "Model": TEXT,
            "Request tokens": SUM,
            "Response tokens": SUM,
            "Total tokens": SUM,
            "Log Type": TEXT,
        },
    ),
    "burstgpt 3": (
        burstgpt.SESSION_HEADER,
        ["{k}.0,b{k},3,GPT-4,10,2{k},3{k},API log"],
        {"Timestamp": SECONDS, "Elapsed time": SECONDS, "Model": TEXT, "Request tokens": SUM},
    ),
    "table": (
        "sent,user,prompt,answer",
        ["{k}.5,ann,1{k},2{k}"],
        {"sent": SECONDS, "prompt": TOKENS, "answer": TOKENS},
    ),
    "table of dates": (
        "prompt;answer;sent",
        ["1{k};2{k};2024-05-10T00:00:0{k}Z"],
        {"sent": DATE, "prompt": TOKENS, "answer": TOKENS},
    ),
}
MAP = {"arrival": "sent", "input": "prompt", "output": "answer"}
OPTIONS = {
    "table": {"format": "table", "map": MAP, "time_unit": "s"},
    "table of dates": {"format": "table", "map": MAP},
}
CASES = [
    (name, column, damage)
    for name, (_, _, columns) in CSV.items()
    for column, damages in columns.items()
    for damage in damages
]


def rows_of(name):
    header, (form,), columns = CSV[name]
    return header, [form.format(k=k).encode() for k in range(1, 8)], columns


def damaged(header, rows):
    """The file with its line `LINE` first in `rows`."""
    return b"\r\n".join([header.encode(), *rows])


def refused(import_file, tmp_path, content, why, **options):
    """The import stops at the line, naming it; told to skip bad rows it has all others."""
    with pytest.raises(TraceError, match=f"{tmp_path}/trace.csv: line {LINE}: {why}") as error:
        import_file(content, **options)
    line = content.splitlines()[LINE - 1].decode("utf-8", "replace")
    if "earlier" not in why:
        assert f": {line[:80]!r}; mend" in str(error.value)
    assert "\n" not in str(error.value)
    frame, report = import_file(content, skip_bad=True, **options)
    assert frame.height == 6
    assert (report.rows_read, report.rows_dropped) == (7, 1)


@pytest.mark.parametrize(("name", "column", "damage"), CASES)
def test_a_damaged_field_of_csv(import_file, tmp_path, name, column, damage):
    header, rows, columns = rows_of(name)
    separator = ";" if ";" in header else ","
    text, why = columns[column][damage]
    fields = rows[LINE - 2].split(separator.encode())
    fields[header.split(separator).index(column)] = text.encode() if isinstance(text, str) else text
    rows[LINE - 2] = separator.encode().join(fields)
    why = f"{column} {why}" if why else NO_SUM
    refused(import_file, tmp_path, damaged(header, rows), why, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", [name for name, (header, *_) in CSV.items() if "," in header])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda row: row[: row.rindex(b",")], "has too few columns"),
        (lambda row: row[:3], "has too few columns"),
        (lambda row: row + b",1", "has too many columns"),
        (lambda row: b"", "is blank"),
        (lambda row: b"  \t", "is blank"),
        (lambda row: bytes(30), "has too few columns"),
    ],
    ids=["cut at a comma", "cut", "a column more", "empty", "blank", "zeros"],
)
def test_a_damaged_line_of_csv(import_file, tmp_path, name, change, why):
    header, rows, _ = rows_of(name)
    rows[LINE - 2] = change(rows[LINE - 2])
    refused(import_file, tmp_path, damaged(header, rows), why, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", [name for name in CSV if name.startswith("azure")])
def test_a_row_that_is_earlier_than_one_before_it(import_file, tmp_path, name):
    header, rows, _ = rows_of(name)
    rows[LINE - 2] = rows[LINE - 2].replace(b"2024-05-10", b"2024-05-09")
    refused(import_file, tmp_path, damaged(header, rows), "is earlier than a row before it")


JSON = {
    "mooncake": {"timestamp": 3000, "input_length": 520, "output_length": 7, "hash_ids": [1, 2]},
    "bailian": {
        "chat_id": 15, "parent_chat_id": -1, "timestamp": 3.5, "input_length": 20, "output_length": 7,
        "type": "text", "turn": 1, "hash_ids": [1, 2],
    },
}  # fmt: skip
NONE = {"null": None, "text": "x", "a list": [[]], "negative": -2, "too large": 2**63, "an object": {}}
FINE = {("bailian", "type", "null"), ("bailian", "type", "text"), ("bailian", "turn", "null")}


def json_file(name, line):
    """Seven rows, the line `LINE` as given."""
    rows = [json.dumps(JSON[name] | {"chat_id": k} if name == "bailian" else JSON[name]).encode() for k in range(7)]
    rows[LINE - 1] = line
    return b"\n".join(rows)


@pytest.mark.parametrize(
    ("name", "key", "damage"),
    [
        (name, key, damage)
        for name, row in JSON.items()
        for key in row
        for damage in NONE
        if (name, key, damage) not in FINE
    ],
)
def test_a_damaged_value_of_json(import_file, tmp_path, name, key, damage):
    line = json.dumps(JSON[name] | {key: NONE[damage]}).encode()
    refused(import_file, tmp_path, json_file(name, line), rf"is no such row \(.* at `\$\.{key}(\[\])?`\)")


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("key", ["input_length", "output_length"])
@pytest.mark.parametrize("value", [0, 2**32, 1.5])
def test_a_number_of_tokens_that_is_none(import_file, tmp_path, name, key, value):
    line = json.dumps(JSON[name] | {key: value}).encode()
    refused(import_file, tmp_path, json_file(name, line), rf"is no such row \(.* at `\$\.{key}`\)")


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("key", ["timestamp", "input_length", "output_length"])
def test_a_missing_key_of_json(import_file, tmp_path, name, key):
    line = json.dumps({k: v for k, v in JSON[name].items() if k != key}).encode()
    refused(import_file, tmp_path, json_file(name, line), rf"is no such row \(Object missing required field `{key}`\)")


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda row: row[:-1], "is no such row"),
        (lambda row: row[: len(row) // 2], "is no such row"),
        (lambda row: row + b"}", "is no such row"),
        (lambda row: b"[]", "is no such row"),
        (lambda row: row.replace(b'"hash_ids"', b'"hash\xff_ids"'), "is no such row"),
        (lambda row: b"", "is blank"),
        (lambda row: b" ", "is blank"),
    ],
    ids=["cut", "half", "more", "a list", "not UTF-8", "empty", "blank"],
)
def test_a_damaged_line_of_json(import_file, tmp_path, name, change, why):
    line = change(json.dumps(JSON[name]).encode())
    refused(import_file, tmp_path, json_file(name, line), why)


def test_a_row_of_mooncake_that_is_earlier_than_one_before_it(import_file, tmp_path):
    line = json.dumps(JSON["mooncake"] | {"timestamp": 2999}).encode()
    refused(import_file, tmp_path, json_file("mooncake", line), "is earlier than a row before it")
