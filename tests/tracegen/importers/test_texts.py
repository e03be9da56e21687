import json
import sys
import types
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tracegen.errors import TraceError
from tracegen.importers.formats import FORMATS

# In the published form: one array; beginnings of answers to nothing and empty answers occur there.
CHATS = [
    {"id": "a", "conversations": [{"from": "human", "value": "one two three"}, {"from": "gpt", "value": "four five"}]},
    {
        "id": "b",
        "conversations": [
            {"from": "gpt", "value": "an answer to nothing"},
            {"from": "human", "value": "go on"},
            {"from": "gpt", "value": "six words of an answer here"},
            {"from": "human", "value": "and"},
            {"from": "gpt", "value": ""},
            {"from": "human", "value": "more"},
            {"from": "gpt", "value": "end"},
        ],
    },
    {"id": "c", "conversations": [{"from": "human", "value": "silence"}]},
    {"id": "d", "conversations": []},
    {"id": "e", "messages": [{"role": "user", "content": "hi ho"}, {"role": "assistant", "content": "ho"}]},
]


class Words:
    """A tokenizer at the package's boundary: words are tokens."""

    @staticmethod
    def from_file(path):
        if "broken" in Path(path).read_text():
            raise Exception("expected value at line 1 column 1")  # noqa: TRY002 - the package's own habit
        return Words()

    @staticmethod
    def encode_batch_fast(texts, *, add_special_tokens):
        assert not add_special_tokens
        return [text.split() for text in texts]


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A folder with a tokenizer.json, and the package that reads it."""
    module = types.ModuleType("tokenizers")
    module.Tokenizer = Words
    monkeypatch.setitem(sys.modules, "tokenizers", module)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return str(tmp_path / "model")


def test_each_answer_is_a_request_with_all_before_it_as_input(import_file, words):
    frame, report = import_file(json.dumps(CHATS), "chats.json", "sharegpt", rate_rps=0.001, tokenizer=words)
    rows = frame.sort("session_id", "arrival_ns")
    assert rows.select("session_id", "input_tokens", "output_tokens").rows() == [
        (0, 3, 2),
        (1, 6, 6),
        (1, 14, 1),
        (4, 2, 1),
    ]
    assert report.dropped == {
        "an empty answer, or an answer to nothing": 2,
        "a conversation without an answer to anything": 2,
    }
    assert report.metadata["seed"] == 1
    assert report.metadata["arrivals"] == "Poisson starts of conversations, made: the source has no times"
    assert "the source has no times: Poisson arrivals, 0.001/s, by seed 1" in report.remarks


def test_turns_follow_each_other_as_in_synthesized_sessions(import_file, words):
    frame, _ = import_file(json.dumps(CHATS), "chats.json", "sharegpt", rate_rps=0.001, tokenizer=words)
    first, second = frame.filter(pl.col("session_id") == 1).rows(named=True)
    assert (first["parent_id"], first["think_ns"]) == (None, None)
    assert second["parent_id"] == first["request_id"]
    # 37 ms a token of the answer before (tracegen.sessions), and the time to think.
    assert second["arrival_ns"] - first["arrival_ns"] == 6 * 37_000_000 + second["think_ns"]


def test_lines_of_conversations_and_an_array_over_many_lines_are_the_same(import_file, words):
    options = {"rate_rps": 0.001, "tokenizer": words}
    frames = [
        import_file(text, "chats.json", "sharegpt", **options)[0]
        for text in (json.dumps(CHATS), json.dumps(CHATS, indent=2), "\n".join(map(json.dumps, CHATS)))
    ]
    assert frames[0].equals(frames[1])
    assert frames[0].equals(frames[2])


def test_starts_are_a_poisson_process_of_the_rate(import_file, words):
    chats = json.dumps(CHATS[:1] * 4000)
    frame, _ = import_file(chats, "chats.json", "sharegpt", rate_rps=5.0, tokenizer=words, seed=3)
    gaps = frame["arrival_ns"].diff().drop_nulls().to_numpy() / 1e9
    # Deviations of a mean and of a CV of 4,000 exponential gaps are 1.6 %: six of them.
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(1, rel=0.1)


def test_where_pieces_end_does_not_matter(import_file, words, monkeypatch):
    text = json.dumps(CHATS * 40, indent=1, ensure_ascii=False).replace("hi ho", "hé 😀")
    whole, _ = import_file(text, "chats.json", "sharegpt", rate_rps=1.0, tokenizer=words)
    pieces = np.random.default_rng(1).integers(1, 40, 10_000).cumsum()

    def chunks(source):
        data, start = source.start + source._stream.read(1 << 30), 0
        for end in [*pieces[pieces < len(data)].tolist(), len(data)]:
            yield data[start:end]
            start = end

    monkeypatch.setattr("tracegen.sources.Source.chunks", chunks)
    cut, _ = import_file(text, "chats.json", "sharegpt", rate_rps=1.0, tokenizer=words)
    assert cut.equals(whole)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[\n{"conversations": [{"from": "human"}]}\n]', "line 2: is no conversation of messages"),
        ('[\n{"conversations": "text"}]', "line 2: is no conversation of messages"),
        ("[\n7\n]", "line 2: is no conversation of messages"),
        (json.dumps(CHATS, indent=0).replace('"from": "human"', '"from" "human"', 1), "is not JSON"),
        (json.dumps(CHATS)[:200], "is not JSON"),
        (json.dumps(CHATS)[:-1], "line 1: the file ends within an array; fetch it again"),
    ],
)
def test_a_damaged_conversation_is_named_with_its_line(import_file, words, text, said):
    with pytest.raises(TraceError) as raised:
        import_file(text, "chats.json", "sharegpt", rate_rps=1.0, tokenizer=words)
    assert said in str(raised.value)


PROMPTS = '{"prompt": "one two", "output_tokens": 7}\n{"prompt": [5, 6, 7], "output_tokens": 1}\n'


def test_prompts_are_requests_in_the_files_order(import_file, words):
    frame, report = import_file(PROMPTS, "prompts.jsonl", "vllm-bench", rate_rps=2.0, tokenizer=words)
    assert frame.select("input_tokens", "output_tokens").rows() == [(2, 7), (3, 1)]
    assert report.metadata["parameters"]["rate_rps"] == 2.0
    assert frame["arrival_ns"][0] == 0


def test_token_ids_need_no_tokenizer(import_file):
    frame, _ = import_file(PROMPTS.splitlines()[1], "prompts.jsonl", "vllm-bench", rate_rps=2.0)
    assert frame["input_tokens"].to_list() == [3]
    with pytest.raises(TraceError, match="has texts, whose tokens a tokenizer counts"):
        import_file(PROMPTS, "prompts.jsonl", "vllm-bench", rate_rps=2.0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "one"}', "line 2: is no such row (Object missing required field `output_tokens`)"),
        ('{"prompt": "one", "output_tokens": 0}', "line 2: is no such row"),
        ('{"prompt": "", "output_tokens": 3}', "line 2: prompt has no token"),
        ('{"prompt": [], "output_tokens": 3}', "line 2: is no such row"),
        ("", "line 2: is blank"),
    ],
)
def test_a_damaged_prompt_is_named_with_its_line_or_dropped(import_file, words, line, said):
    text = PROMPTS.replace("\n", f"\n{line}\n", 1)
    with pytest.raises(TraceError) as raised:
        import_file(text, "prompts.jsonl", "vllm-bench", rate_rps=2.0, tokenizer=words)
    assert said in str(raised.value)
    frame, _ = import_file(text, "prompts.jsonl", "vllm-bench", rate_rps=2.0, tokenizer=words, skip_bad=True)
    assert frame["input_tokens"].to_list() == [2, 3]


@pytest.mark.parametrize("name", ["sharegpt", "vllm-bench"])
def test_what_is_missing_is_asked_for(import_file, words, name):
    text = json.dumps(CHATS) if name == "sharegpt" else PROMPTS
    with pytest.raises(TraceError, match=f"has no times; say 'tracegen import {name} --rate N'"):
        import_file(text, "texts.json", name, tokenizer=words)
    with pytest.raises(TraceError, match=f"has no times; say 'tracegen import {name} --rate N'"):
        import_file(text, "texts.json", "auto", tokenizer=words)
    with pytest.raises(TraceError, match="--rate -1: is not a positive number"):
        import_file(text, "texts.json", name, tokenizer=words, rate_rps=-1.0)
    with pytest.raises(TraceError, match=r"nowhere: has no tokenizer\.json"):
        import_file(text, "texts.json", name, tokenizer="nowhere", rate_rps=1.0)


def test_a_tokenizer_that_cannot_be_read_is_told(import_file, words, tmp_path, monkeypatch):
    (tmp_path / "model" / "tokenizer.json").write_text("broken")
    with pytest.raises(TraceError, match=r"tokenizer\.json: is no tokenizer\.json \(expected value at line 1"):
        import_file(PROMPTS, "texts.json", "vllm-bench", tokenizer=words, rate_rps=1.0)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TraceError, match=r"pip install 'wattrace\[tokenizer\]'"):
        import_file(PROMPTS, "texts.json", "vllm-bench", tokenizer=words, rate_rps=1.0)


def test_the_real_package_counts(tmp_path, import_file):
    tokenizers = pytest.importorskip("tokenizers", reason="the extra 'tokenizer' is not installed")
    real = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    real.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    real.save(str(tmp_path / "tokenizer.json"))
    frame, _ = import_file(PROMPTS, "p.jsonl", "vllm-bench", rate_rps=2.0, tokenizer=str(tmp_path))
    assert frame["input_tokens"].to_list() == [2, 3]


def test_formats_of_texts_are_known():
    assert {"sharegpt", "vllm-bench", "otel"} <= FORMATS.keys()
