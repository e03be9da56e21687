"""What the tests against real vLLM share; without WATTRACE_VLLM_PYTHON they skip themselves."""

import json
import os
from pathlib import Path

import pytest

# No weights are loaded and nothing is fetched; the CPU build computes in eager mode at once.
SERVE = [
    "--served-model-name=tiny", "--load-format=dummy", "--dtype=bfloat16", "--max-model-len=4096", "--enforce-eager",
]  # fmt: skip

VOCABULARY = 2048  # token ids of prompts go up to 1999

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker("vllm")
            if not os.environ.get("WATTRACE_VLLM_PYTHON"):
                item.add_marker(pytest.mark.skip(reason="needs real vLLM: run 'make test-vllm'"))


@pytest.fixture(scope="session")
def vllm_python():
    """The Python of an environment that has vLLM."""
    return os.environ["WATTRACE_VLLM_PYTHON"]


@pytest.fixture(scope="session")
def offline():
    """An environment in which vLLM asks nobody for anything."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a Llama that a CPU serves at thousands of tokens a second: its shape and words, no weights."""
    folder = tmp_path_factory.mktemp("model")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
            for word, i in list(words.items())[:3]
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 8192,
    }
    for name, content in (("config", CONFIG), ("tokenizer", tokenizer), ("tokenizer_config", settings)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
