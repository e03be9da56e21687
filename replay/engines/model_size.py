"""What a model's weights take, before a server tries to load them."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

_MIB = 2**20
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "half": 2, "float": 4, "auto": 2}


def weights_mib(model: str, arguments: Sequence[str] = ()) -> float | None:
    """MiB of weights of the model in folder `model`: of its safetensors files, else by its config.json.

    None where it cannot be known: a model that is no folder, or one that is quantized and not there. `arguments` of
    `vllm serve` may name another `--dtype` or make up the weights (`--load-format dummy`).
    """
    folder = Path(model)
    if not (folder / "config.json").is_file():
        return None
    files = list(folder.glob("*.safetensors"))
    if files:
        return sum(file.stat().st_size for file in files) / _MIB
    if any(argument.startswith(("--quantization", "-q")) for argument in arguments):
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        count = None if "quantization_config" in config else parameters(config)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return None  # a shape that is not known here is vLLM's to judge
    return None if count is None else count * _bytes(config, arguments) / _MIB


def parameters(config: dict[str, Any]) -> int:
    """The number of weights of a decoder as its `config.json` describes it: embeddings, attention, (expert) MLPs.

    Gated MLPs of three matrices, as Llama, Mistral and Qwen have them; biases and norms are left out (under 0.1 %).
    Raises `KeyError` for a config without these dimensions.
    """
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    attention = 2 * hidden * heads * head + 2 * hidden * kv_heads * head
    experts = config.get("num_local_experts") or config.get("num_experts") or 1
    width = config.get("moe_intermediate_size", config["intermediate_size"]) if experts > 1 else 0
    mlp = 3 * hidden * (experts * width if experts > 1 else config["intermediate_size"])
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return int(embeddings + layers * (attention + mlp))


def _bytes(config: dict[str, Any], arguments: Sequence[str]) -> int:
    """Bytes a weight."""
    asked = next((value for name, value in pairwise([*arguments, ""]) if name == "--dtype"), "auto")
    asked = next((a.partition("=")[2] for a in arguments if a.startswith("--dtype=")), asked)
    if asked == "auto":
        asked = str(config.get("torch_dtype") or config.get("dtype") or "auto")
    return _BYTES.get(asked, 2)
