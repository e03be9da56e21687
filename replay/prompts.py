"""Prompts of exact length: lists of token ids, salted so that nothing hits the prefix cache by accident."""

from collections.abc import Sequence

import msgspec
import numpy as np

# Ids that every vocabulary has; the first few are special tokens. 1,984 symbols make a repeated 16-token block
# as good as impossible.
FIRST_ID = 16
LAST_ID = 1999


def prompt_ids(
    salt: int, request_id: int, input_tokens: int, prefix_hashes: Sequence[int] = (), block_tokens: int = 0
) -> list[int]:
    """`input_tokens` token ids.

    Blocks named in `prefix_hashes` (each of `block_tokens`) depend on `salt` and the hash alone, so requests that
    share hashes share a prefix within a run; all other ids depend on `salt` and `request_id`.
    """
    shared = [_draw(salt, 1, h, block_tokens) for h in prefix_hashes]
    own = _draw(salt, 0, request_id, max(0, input_tokens - len(shared) * block_tokens))
    ids = np.concatenate([*shared, own])[:input_tokens]
    return ids.tolist()  # type: ignore[no-any-return]  # numpy types tolist() as Any


def _draw(salt: int, kind: int, key: int, count: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """`count` ids from a stream of its own for (salt, kind, key)."""
    rng = np.random.Generator(np.random.SFC64([salt, kind, key]))
    return rng.integers(FIRST_ID, LAST_ID + 1, size=count)


def completion_body(model: str, ids: list[int], output_tokens: int, *, exact: bool = True, priority: int = 0) -> bytes:
    """The JSON body of a streamed `/v1/completions` request for exactly `output_tokens`.

    `exact` adds vLLM's `ignore_eos` and `min_tokens`, which other servers may refuse. A `priority` of 0 is the server's
    own default and left out: another one vLLM refuses unless it schedules by priority.
    """
    body: dict[str, object] = {
        "model": model,
        "prompt": ids,
        "max_tokens": output_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if exact:
        body |= {
            "ignore_eos": True,
            "min_tokens": output_tokens,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    if priority:
        body["priority"] = priority
    return msgspec.json.encode(body)
