"""vLLM's JSON: what `/v1/completions` takes, refuses and answers, for the simulated engine.

Fields that would change the text but not the work (temperature, top_p, stop, seed, ...) are accepted, without effect.
The simulated model never ends a text by itself, so `ignore_eos` and `min_tokens` hold in any case.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from replay.sim.hardware import Profile

RECORD_PATH = "/wattrace/record"  # told into which run directory to record, where a server serves several runs
_DEFAULT_MAX_TOKENS = 16  # OpenAI's and vLLM's for completions
_MAX_TOKEN_ID = 2**31  # beyond any vocabulary
_WORDS = [f" word{i}" for i in range(1000)]  # the model's whole vocabulary


# A text, token ids, or a list of one of these. (One union of lists is all that msgspec can tell apart.)
_Prompt = str | list[int | str | list[int]]


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class CompletionRequest(msgspec.Struct):
    """The fields of a request that matter here; others are ignored."""

    prompt: _Prompt
    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    n: int = 1
    priority: int = 0
    stream: bool = False
    stream_options: _StreamOptions | None = None


class ApiError(Exception):
    """A refused request: an HTTP status, vLLM's error type and a message."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message

    def body(self) -> bytes:
        """The response in vLLM's form."""
        error = {"message": self.message, "type": self.kind, "param": None, "code": self.status}
        return msgspec.json.encode({"error": error})


def _bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequestError", message)


@dataclass(frozen=True)
class Completion:
    """An accepted request."""

    prompt_tokens: int
    output_tokens: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    token_ids: Sequence[int] | None  # of the prompt; None: it was a text
    priority: int


def parse_completion(body: bytes, model: str, profile: Profile, fits: Callable[[int, int], bool]) -> Completion:
    """The request in `body`. Raises `ApiError` for what `model` on `profile` does not serve.

    `fits` tells whether prompt and output tokens can ever be in the KV cache together.
    """
    try:
        request = _decode(body)
    except msgspec.DecodeError as error:  # ValidationError included
        raise _bad_request(f"invalid request body: {error}") from None
    if request.model not in {None, model}:
        raise ApiError(404, "NotFoundError", f"The model `{request.model}` does not exist.")
    if request.n != 1:
        raise _bad_request("n must be 1: the simulated engine writes one completion a request")
    if request.stream_options is not None and not request.stream:
        raise _bad_request("Stream options can only be defined when `stream=True`.")
    prompt = _only(request.prompt)
    prompt_tokens = len(prompt)
    output_tokens = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if output_tokens < 1:
        raise _bad_request(f"max_tokens must be at least 1, got {output_tokens}.")
    if request.min_tokens > output_tokens:
        raise _bad_request(
            f"min_tokens must be less than or equal to max_tokens={output_tokens}, got {request.min_tokens}."
        )
    if prompt_tokens + output_tokens > profile.max_model_len:
        raise _bad_request(
            f"This model's maximum context length is {profile.max_model_len} tokens. However, you requested "
            f"{prompt_tokens + output_tokens} tokens ({prompt_tokens} in the prompt, {output_tokens} in the "
            "completion). Please reduce the length of the prompt or completion."
        )
    if not fits(prompt_tokens, output_tokens):
        raise _bad_request(f"{prompt_tokens} + {output_tokens} tokens exceed the whole KV cache of the simulated GPUs.")
    options = request.stream_options or _StreamOptions()
    continuous = options.include_usage and options.continuous_usage_stats
    if request.priority and profile.scheduling_policy != "priority":
        raise _bad_request(f"Got priority {request.priority} but Priority scheduling is not enabled.")
    token_ids: Any = prompt if isinstance(prompt[0], int) else None
    return Completion(
        prompt_tokens, output_tokens, request.stream, options.include_usage, continuous, token_ids, request.priority
    )


_decode = msgspec.json.Decoder(CompletionRequest).decode


def _only(prompt: _Prompt) -> Sequence[int | str | list[int]]:
    """The one prompt's token ids; of a text, its words. Raises `ApiError` for none or several prompts."""
    only: str | Sequence[int | str | list[int]] = prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise _bad_request("prompt must be one prompt: the simulated engine serves one a request")
        only = prompt[0]
    if not isinstance(only, str) and not all(isinstance(token, int) and 0 <= token < _MAX_TOKEN_ID for token in only):
        raise _bad_request("prompt must be a text or a list of token ids, none of them negative")
    words = only.split() if isinstance(only, str) else only
    if not words:
        raise _bad_request("prompt must not be empty")
    return words


class Answer:
    """Writes one completion's answer. The parts of an event that do not change are made once."""

    def __init__(
        self,
        completion: Completion,
        completion_id: str,
        model: str,
        created_s: int,
        cached_tokens: Callable[[], int] = lambda: 0,
    ) -> None:
        """`created_s`: Unix time, as the API states it. `cached_tokens`: of the prompt, known with the first token."""
        self._completion, self._cached_tokens = completion, cached_tokens
        self._head = {"id": completion_id, "object": "text_completion", "created": created_s, "model": model}
        self._prefix = b"data: " + msgspec.json.encode(self._head)[:-1] + b',"choices":[{"index":0,"text":"'
        self._tokens = 0

    def event(self, *, last: bool) -> bytes:
        """The server-sent event of the next token; after the last one the closing events too."""
        word = _WORDS[self._tokens % len(_WORDS)]
        self._tokens += 1
        reason = '"length"' if last else "null"
        usage = ""
        if self._completion.continuous_usage:
            prompt_tokens = self._completion.prompt_tokens
            usage = (
                f',"usage":{{"prompt_tokens":{prompt_tokens},"total_tokens":{prompt_tokens + self._tokens}'
                f',"completion_tokens":{self._tokens}}}'
            )
        rest = f'{word}","logprobs":null,"finish_reason":{reason},"stop_reason":null}}]{usage}}}\n\n'
        return self._prefix + rest.encode() + (self._closing() if last else b"")

    def whole(self) -> bytes:
        """The answer in one JSON document, for a request that is not streamed."""
        count = self._completion.output_tokens
        text = "".join(_WORDS[i % len(_WORDS)] for i in range(count))
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "length", "stop_reason": None}
        return msgspec.json.encode({**self._head, "choices": [choice], "usage": self._usage(count)})

    def _closing(self) -> bytes:
        usage = b""
        if self._completion.include_usage:
            document = {**self._head, "choices": [], "usage": self._usage(self._tokens)}
            usage = b"data: " + msgspec.json.encode(document) + b"\n\n"
        return usage + b"data: [DONE]\n\n"

    def _usage(self, completion_tokens: int) -> dict[str, Any]:
        prompt_tokens = self._completion.prompt_tokens
        return {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens()},
        }
