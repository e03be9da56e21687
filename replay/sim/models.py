"""What of a served model sets the work of a step: its dimensions, from a shipped file or from any `config.json`.

The shipped models (`profiles/models/NAME.toml`) are excerpts of their public `config.json`, read by the same function
as a file of the user's own. Dense decoders with gated MLPs are served. Mixtures of experts are refused: which experts
a step reads depends on its tokens' routes, which no trace tells.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from replay.engines.model_size import parameters
from tracegen.errors import ReplayError

DEFAULT_MODEL = "llama-2-70b"
_BITS = 16  # of weights, activations and the KV cache, unless the weights are quantized; vLLM casts float32 to 16 bits
_DTYPES = {None, "auto", "float16", "bfloat16", "float32", "half", "float"}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_GATED = (
    "llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "granite", "olmo", "olmo2",
    "internlm2", "cohere", "cohere2", "exaone", "glm", "glm4", "smollm3", "stablelm", "baichuan",
)  # fmt: skip
_TWO_MATRICES = ("phi", "starcoder2", "gpt_neox", "nemotron", "persimmon", "falcon", "opt", "gpt2", "bloom", "mpt")


@dataclass(frozen=True)
class ModelShape:
    """What of the served model sets its work; `step_bytes` is what each step reads of the weights."""

    parameters: float  # all weights
    layer_parameters: float  # the layers': each token passes these; embedding and output head are left out
    layers: int
    hidden_size: int
    attention_size: int  # query heads x values of a head
    heads: int
    kv_heads: int
    intermediate_size: int
    weight_bytes: float  # all weights in memory
    step_bytes: float  # without the embedding table, of which a step reads single rows
    kv_bytes_per_token: float


@dataclass(frozen=True)
class Model:
    """A model that the simulated engine can serve."""

    name: str
    shape: ModelShape
    max_model_len: int
    assumed: tuple[str, ...] = ()  # what the shape takes for granted, in words


def model_names() -> list[str]:
    """The models that come with the package."""
    return sorted(path.name.removesuffix(".toml") for path in _folder().iterdir() if path.name.endswith(".toml"))


def load_model(asked: str) -> Model:
    """The model `asked`: a shipped name, its name on Hugging Face, or a folder or file with a `config.json`.

    Raises `ReplayError` for what is none of these, and for a model that cannot be simulated.
    """
    known = _shipped_as().get(asked.lower())
    if known is not None:
        document = tomllib.loads(_folder().joinpath(f"{known}.toml").read_text(encoding="utf-8"))
        model = model_of_config(document["config"], known, f"{known}.toml")
        return Model(known, model.shape, document.get("max_model_len", model.max_model_len), model.assumed)
    path = Path(asked).expanduser()
    if path.is_dir():
        path /= "config.json"
    if path.suffix == ".json" or path.name == "config.json":
        return model_of_config(_read_config(path), asked, str(path))
    raise ReplayError(
        f"--model {asked}: the simulated engine knows {', '.join(model_names())}, and any folder or file with a "
        "Hugging Face config.json"
    )


def shipped_twin(shape: ModelShape) -> str | None:
    """The shipped model of this shape, if there is one."""
    return next((name for name in model_names() if load_model(name).shape == shape), None)


def is_model(served: str, name: str) -> bool:
    """Whether a server's name for its model is the model `name`: both are one name, alias or folder's name."""
    return _plain(served) == _plain(name)


def model_of_config(config: Mapping[str, Any], name: str, where: str) -> Model:
    """The model that a Hugging Face `config` describes; `where` it stands, for errors.

    Raises `ReplayError` that names the key for a dimension that is missing or no whole number, and for what the
    formulas do not know: mixtures of experts, compressed or linear attention, MLPs of two matrices, unclear widths.
    """
    inner = dict(config.get("text_config") or config)
    assumed = ["of a multimodal model the text decoder alone is served"] if "text_config" in config else []
    for key in ("quantization_config", "tie_word_embeddings", "torch_dtype", "dtype"):
        inner.setdefault(key, config.get(key))
    assumed += _check_kind(inner, where)
    sizes = {key: _whole(inner, key, where) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    sizes |= {key: _whole(inner, key, where) for key in ("intermediate_size", "vocab_size", "max_position_embeddings")}
    heads, hidden, layers = sizes["num_attention_heads"], sizes["hidden_size"], sizes["num_hidden_layers"]
    kv_heads = _whole(inner, "num_key_value_heads", where) if inner.get("num_key_value_heads") is not None else heads
    head_size = _whole(inner, "head_dim", where) if inner.get("head_dim") is not None else hidden // heads
    tied = inner["tie_word_embeddings"]
    if tied is None:  # transformers' own default for the family
        tied = str(inner.get("model_type", "")).startswith(("gemma", "cohere"))
    dense = {"num_key_value_heads": kv_heads, "head_dim": head_size, "tie_word_embeddings": tied}
    total, table = parameters(sizes | dense), sizes["vocab_size"] * hidden
    in_layers = total - table * (1 if tied else 2)
    layer_bits, quantized = _weight_bits(inner, where)
    weight_bytes = in_layers * layer_bits / 8 + (total - in_layers) * _BITS / 8
    shape = ModelShape(
        parameters=float(total),
        layer_parameters=float(in_layers),
        layers=layers,
        hidden_size=hidden,
        attention_size=heads * head_size,
        heads=heads,
        kv_heads=kv_heads,
        intermediate_size=sizes["intermediate_size"],
        weight_bytes=weight_bytes,
        step_bytes=weight_bytes - (0 if tied else table * _BITS / 8),
        kv_bytes_per_token=2.0 * layers * kv_heads * head_size * _BITS / 8,
    )
    return Model(name, shape, sizes["max_position_embeddings"], (*assumed, *quantized))


def _check_kind(config: Mapping[str, Any], where: str) -> list[str]:
    """What is assumed of this kind of model. Raises `ReplayError` for a kind that the formulas do not know."""
    kind = str(config.get("model_type") or "").removesuffix("_text")
    if any((config.get(key) or 1) > 1 for key in _EXPERTS):
        raise ReplayError(
            f"{where}: a mixture of experts, which is not simulated (which experts a step reads depends on its "
            "tokens); use a dense model"
        )
    if config.get("kv_lora_rank") or "linear_attention" in (config.get("layer_types") or ()):
        raise ReplayError(f"{where}: compressed or linear attention, which is not simulated; use another model")
    if kind in _TWO_MATRICES:
        raise ReplayError(f"{where}: model_type {kind} has MLPs of two matrices, which are not simulated")
    assumed = []
    if kind and kind not in _GATED:
        assumed.append(f"model_type {kind} is taken for a decoder with gated MLPs of three matrices")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        assumed.append("every layer attends to the whole context; the model's sliding window is left out")
    return assumed


def _weight_bits(config: Mapping[str, Any], where: str) -> tuple[float, list[str]]:
    """Bits a weight in the layers, and what that assumes. Raises `ReplayError` where the width is not clear."""
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "auto").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ReplayError(f"{where}: dtype {dtype} is not simulated; use a model of 16 or 32 bits")
    quantization = config.get("quantization_config")
    if not quantization:
        return _BITS, []
    method = quantization.get("quant_method")
    bits: Any = None
    if method == "fp8":
        bits = 8
    elif method in {"awq", "gptq"}:
        bits = quantization.get("bits")
    elif method == "compressed-tensors":
        groups = quantization.get("config_groups") or {}
        found = {(group.get("weights") or {}).get("num_bits") for group in groups.values()}
        bits = found.pop() if len(found) == 1 else None
    if bits not in {2, 3, 4, 8}:
        raise ReplayError(f"{where}: quantization_config {method or 'without quant_method'} tells no bits a weight")
    group_size = quantization.get("group_size") or 0
    if method in {"awq", "gptq"} and group_size > 0:
        bits += (_BITS + bits) / group_size  # a 16-bit scale and a zero point for each group
    note = f"weights of {bits:.4g} bits cost their bytes alone; their arithmetic runs at the 16-bit peak"
    return bits, [f"{note}, and embeddings keep 16 bits"]


def _whole(config: Mapping[str, Any], key: str, where: str) -> int:
    """The dimension `key`. Raises `ReplayError` when it is missing or no whole number above 0."""
    value = config.get(key)
    if value is None:
        raise ReplayError(f"{where}: lacks {key}, which the simulated engine needs")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ReplayError(f"{where}: {key} is {value!r}; it must be a whole number above 0")
    return value


def _read_config(path: Path) -> Mapping[str, Any]:
    """The JSON object in `path`. Raises `ReplayError` when there is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReplayError(f"{path}: cannot be read ({error.strerror}); name a folder with config.json") from None
    except ValueError as error:
        raise ReplayError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ReplayError(f"{path}: not a JSON object; --model needs a Hugging Face config.json")
    return config


def _plain(name: str) -> str:
    """A model's name without owner, folders and capitals; the shipped name where it is an alias."""
    path = PurePosixPath(name.lower())
    last = path.parent.name if path.name == "config.json" else path.name
    own_names = {PurePosixPath(alias).name: shipped for alias, shipped in _shipped_as().items()}
    return own_names.get(last, last)


@cache
def _shipped_as() -> dict[str, str]:
    """The shipped model's name for each name that it goes by, in small letters."""
    result: dict[str, str] = {}
    for name in model_names():
        document = tomllib.loads(_folder().joinpath(f"{name}.toml").read_text(encoding="utf-8"))
        result |= {alias.lower(): name for alias in (name, *document["aliases"])}
    return result


def _folder() -> Any:
    return files("replay.sim").joinpath("profiles", "models")
