"""Prompts of exact length: lists of token ids, salted so that nothing hits the prefix cache by accident."""

from collections.abc import Sequence
from hashlib import shake_128

import msgspec

# Ids that every vocabulary has, all of four digits: two bytes, each of two decimal digits, are written as they are. A
# thousand symbols make a repeated 16-token block as good as impossible.
FIRST_ID, LAST_ID = 1000, 1999
# 256 random bytes choose a pair of digits. 256 is no multiple of 10 or 100: some are drawn 26 times where others are 25
# times (3 times where others are 2 times).
_HIGH = bytes(0x10 + byte % 10 for byte in range(256))
_LOW = bytes(byte % 100 // 10 << 4 | byte % 10 for byte in range(256))
# Words that are one token, blank included, in the vocabularies of GPT, Llama and Qwen; how a chat's template and
# another vocabulary split them is not in our hands, so that a chat's input length is as near as it can be, not exact.
_COMMON = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name president team minute idea kid body information back parent face others
level office door health person art war history party result change morning reason research girl guy moment air teacher
force education foot boy age policy music market sense nation plan college interest death experience effect use class
control care field development role effort rate heart drug show
""".split()  # noqa: SIM905 - words are easier to read without their quotes
_WORDS = [f" {_COMMON[byte % len(_COMMON)]}" for byte in range(256)]


def prompt_ids(
    salt: int, request_id: int, input_tokens: int, prefix_hashes: Sequence[int] = (), block_tokens: int = 0
) -> list[int]:
    """`input_tokens` token ids.

    Blocks named in `prefix_hashes` (each of `block_tokens`) depend on `salt` and the hash alone, so requests that
    share hashes share a prefix within a run; all other ids depend on `salt` and `request_id`.
    """
    drawn = _blocks(salt, request_id, input_tokens, prefix_hashes, block_tokens)
    return [int(drawn[at : at + 2].hex()) for at in range(0, len(drawn), 2)]


def prompt_json(
    salt: int, request_id: int, input_tokens: int, prefix_hashes: Sequence[int] = (), block_tokens: int = 0
) -> bytes:
    """`prompt_ids` as JSON, made without the numbers: some hundred times as fast."""
    return f"[{_blocks(salt, request_id, input_tokens, prefix_hashes, block_tokens).hex(',', 2)}]".encode()


def prompt_text(
    salt: int, request_id: int, input_tokens: int, prefix_hashes: Sequence[int] = (), block_tokens: int = 0
) -> str:
    """As many common English words as `prompt_ids` has ids, shared alike; for chats, which take text alone."""
    ids = _blocks(salt, request_id, input_tokens, prefix_hashes, block_tokens)
    return "".join([_WORDS[high * 7 + low & 255] for high, low in zip(ids[::2], ids[1::2], strict=True)])


def _blocks(salt: int, request_id: int, count: int, hashes: Sequence[int], block_tokens: int) -> bytes:
    """`count` ids, each as two bytes of two decimal digits."""
    blocks = [_draw(salt, 1, key, block_tokens) for key in hashes]
    left = count - len(blocks) * block_tokens
    if left > 0:
        blocks.append(_draw(salt, 0, request_id, left))
    return b"".join(blocks)[: 2 * count]


def _draw(salt: int, kind: int, key: int, count: int) -> bytes:
    """`count` ids from a stream of its own for (salt, kind, key)."""
    seed = salt.to_bytes(8, "little") + kind.to_bytes(1, "little") + key.to_bytes(8, "little")
    drawn = shake_128(seed).digest(2 * count)
    ids = bytearray(2 * count)
    ids[0::2], ids[1::2] = drawn[:count].translate(_HIGH), drawn[count:].translate(_LOW)
    return bytes(ids)


def completion_body(
    model: str,
    prompt: bytes | str,
    output_tokens: int,
    *,
    exact: bool = True,
    priority: int = 0,
    stream: bool = True,
) -> bytes:
    """The JSON body of a request for exactly `output_tokens`.

    `prompt`: the token ids as JSON, for `/v1/completions`, or a text, for `/v1/chat/completions`. `exact` adds vLLM's
    `ignore_eos` and `min_tokens`, which other servers may refuse. A `priority` of 0 is the server's own default and
    left out: another one vLLM refuses unless it schedules by priority.
    """
    asked: dict[str, object]
    if isinstance(prompt, bytes):
        asked = {"model": model, "prompt": msgspec.Raw(prompt), "max_tokens": output_tokens}
    else:
        messages = [{"role": "user", "content": prompt}]
        # `max_tokens` is what older servers of chats know; OpenAI's newest models alone refuse it.
        asked = {"model": model, "messages": messages, "max_tokens": output_tokens}
    asked |= {"temperature": 0.0, "stream": stream}
    if stream:
        asked["stream_options"] = {"include_usage": True}
    if exact:
        asked |= {"ignore_eos": True, "min_tokens": output_tokens}
        if stream:
            asked["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    if priority:
        asked["priority"] = priority
    return msgspec.json.encode(asked)
