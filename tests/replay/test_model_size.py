"""How much memory a model's weights take, from what is known before they are loaded."""

import json

import pytest

from replay.engines.model_size import parameters, weights_mib

# Shapes and counts as their model cards state them, in billions.
LLAMA_3_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip
LLAMA_2_70B = {
    "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "intermediate_size": 28672, "vocab_size": 32000,
}  # fmt: skip
QWEN_3_0_6B = {
    "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
MIXTRAL_8X7B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8,
}  # fmt: skip
QWEN_3_30B_A3B = {
    "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "vocab_size": 151936,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "billions"),
    [(LLAMA_3_8B, 8.03), (LLAMA_2_70B, 69.0), (QWEN_3_0_6B, 0.596), (MIXTRAL_8X7B, 46.7), (QWEN_3_30B_A3B, 30.5)],
)
def test_parameters_are_those_of_the_model_card(config, billions):
    assert parameters(config) / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "bytes_each"),
    [((), 2), (("--dtype", "float32"), 4), (("--dtype=float32", "--seed=1"), 4), (("--dtype=bfloat16",), 2)],
)
def test_weights_without_files_follow_from_the_shape_and_the_type(folder, arguments, bytes_each):
    assert weights_mib(str(folder), arguments) == pytest.approx(parameters(LLAMA_3_8B) * bytes_each / 2**20)


def test_the_types_own_name_in_the_config_counts(folder):
    (folder / "config.json").write_text(json.dumps({**LLAMA_3_8B, "torch_dtype": "float32"}))
    assert weights_mib(str(folder)) == pytest.approx(parameters(LLAMA_3_8B) * 4 / 2**20)


def test_files_that_are_there_say_it_themselves(folder):
    for i in range(2):
        (folder / f"model-{i}.safetensors").write_bytes(bytes(3 * 2**19))
    assert weights_mib(str(folder), ("--quantization", "fp8")) == 3.0


@pytest.mark.parametrize("config", ["{", "[]", "{}", json.dumps({**LLAMA_3_8B, "quantization_config": {}})])
def test_what_is_not_known_is_none(folder, config):
    assert weights_mib("org/model") is None
    assert weights_mib(str(folder), ("--quantization", "fp8")) is None
    (folder / "config.json").write_text(config)
    assert weights_mib(str(folder)) is None
