"""Nodes and models of the simulated engine: what ships is whole and scales as it must; what is wrong is one line."""

import json
import re
import tomllib
from importlib.resources import files

import pytest

from replay.sim.hardware import Hardware, Work, load_profile
from replay.sim.models import is_model, load_model, model_names
from replay.sim.profile import combinations, constants, hardware_names, load_node, parse_node, profile_of_constants
from tracegen.errors import ReplayError

PREFILL = Work(2048.0, 0.0, 0.0, 2048**2 / 2)
DECODE = Work(0.0, 16.0, 16 * 1024.0, 0.0)

# The public config.json of each shipped model (huggingface.co/NAME/blob/main/config.json): hidden_size,
# num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size, vocab_size, head_dim; and the billions
# of weights that its model card gives.
CONFIGS = {
    "meta-llama/Llama-2-7b-hf": (4096, 32, 32, 32, 11008, 32000, None, 6.74),
    "meta-llama/Llama-2-13b-hf": (5120, 40, 40, 40, 13824, 32000, None, 13.02),
    "meta-llama/Llama-2-70b-hf": (8192, 80, 64, 8, 28672, 32000, None, 68.98),
    "meta-llama/Meta-Llama-3-8B": (4096, 32, 32, 8, 14336, 128256, None, 8.03),
    "meta-llama/Meta-Llama-3-70B": (8192, 80, 64, 8, 28672, 128256, None, 70.55),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 28, 28, 4, 18944, 152064, None, 7.61),
    "Qwen/Qwen2.5-72B-Instruct": (8192, 80, 64, 8, 29568, 152064, None, 72.7),
    "Qwen/Qwen3-8B": (4096, 36, 32, 8, 12288, 151936, 128, 8.19),
    "Qwen/Qwen3-32B": (5120, 64, 64, 8, 25600, 151936, 128, 32.76),
}
KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "vocab_size", "head_dim",
)  # fmt: skip


def config(name="Qwen/Qwen3-8B", **changes):
    found = dict(zip(KEYS, CONFIGS[name][:-1], strict=True))
    rest = {"model_type": "qwen3", "max_position_embeddings": 4096, "tie_word_embeddings": False, "dtype": "bfloat16"}
    return {key: value for key, value in (found | rest | changes).items() if value is not None}


@pytest.fixture
def write_config(tmp_path):
    def write(content):
        (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path)

    return write


@pytest.fixture
def node_document():
    return tomllib.loads(files("replay.sim").joinpath("profiles", "nodes", "dgx-h100.toml").read_text("utf-8"))


def step_s(tp, work, hardware="dgx-h100", model="llama-2-70b"):
    profile = load_profile(hardware, model)
    return Hardware(profile, tp).step_s(work, profile.clocks_mhz.max)


def test_every_shipped_combination_runs_at_each_size_it_names():
    for row in combinations():
        profile = load_profile(row["hardware"], row["model"])
        assert row["tp_sizes"]
        for tp in row["tp_sizes"]:
            hardware = Hardware(profile, tp)
            assert hardware.kv_tokens >= profile.max_model_len
            assert 0 < hardware.step_s(DECODE, profile.clocks_mhz.max) < 1
            assert hardware.step_w(PREFILL, profile.clocks_mhz.max) <= tp * profile.power.cap_w * (1 + 1e-9)


def test_only_the_measured_combination_is_calibrated_and_assumes_nothing():
    for row in combinations():
        calibrated = (row["hardware"], row["model"]) == ("dgx-h100", "llama-2-70b")
        assert row["calibrated"] == calibrated
        assert bool(row["assumed"]) != calibrated


def test_what_is_carried_over_is_said():
    (line,) = load_profile("dgx-h100", "Qwen/Qwen3-8B").assumed
    assert line.startswith("uncalibrated: constants fitted to llama-2-70b on dgx-h100, ")
    assert line.endswith(" carried over to qwen3-8b")
    for hardware in ("dgx-a100", "dgx-h200"):
        assert load_profile(hardware).assumed[0] == f"uncalibrated: {hardware} was not calibrated as a whole"
        assert len(load_profile(hardware).assumed) > 1


@pytest.mark.parametrize(
    ("hardware", "model", "sizes"),
    [
        ("dgx-h100", "llama-2-70b", (2, 4, 8)),  # 138 GB do not fit into 80
        ("dgx-h200", "llama-2-70b", (2, 4, 8)),  # nor, with the engine's share of 0.9, into 141
        ("dgx-h100", "qwen2.5-72b", (4, 8)),  # 2 x 73 GB leave no room for one request
        ("dgx-h100", "qwen2.5-7b", (1, 2, 4)),  # four KV heads
        ("dgx-h100", "llama-2-13b", (1, 2, 4, 8)),  # 40 heads, but an MLP that five do not divide
        ("dgx-h100", "qwen3-32b", (2, 4, 8)),
        ("dgx-h200", "qwen3-32b", (1, 2, 4, 8)),
    ],
)
def test_sizes_that_hold_the_model(hardware, model, sizes):
    assert load_profile(hardware, model).tp_sizes() == sizes


@pytest.mark.parametrize("work", [PREFILL, DECODE])
def test_more_layers_take_longer_and_more_gpus_less(work):
    by_model = [step_s(4, work, model=model) for model in ("llama-2-7b", "llama-2-13b", "llama-2-70b")]
    assert by_model == sorted(by_model)
    for model in model_names():
        by_tp = [step_s(tp, work, model=model) for tp in load_profile("dgx-h100", model).tp_sizes()]
        assert by_tp == sorted(by_tp, reverse=True)


def test_faster_memory_speeds_decode_up_and_prefill_hardly():
    assert 1.2 < step_s(2, DECODE) / step_s(2, DECODE, "dgx-h200") < 4.8 / 3.35
    assert step_s(2, PREFILL) / step_s(2, PREFILL, "dgx-h200") == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("work", [PREFILL, DECODE])
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_an_a100_is_slower_at_equal_size(tp, work):
    assert step_s(tp, work, "dgx-a100") > 1.3 * step_s(tp, work)


def test_a_single_gpu_waits_for_no_all_reduce():
    profile = load_profile("dgx-h100", "llama-3-8b")
    alone, pair = Hardware(profile, 1).constants, Hardware(profile, 2).constants
    assert alone.exchange_token_s == 0
    assert alone.sync_s == pytest.approx((1 - profile.time.sync_reduce_share) * pair.sync_s)
    assert pair.sync_s == pytest.approx(32 / 80 * Hardware(load_profile(), 2).constants.sync_s)


# Splitwise (Patel et al., ISCA'24), perf_model.csv of Mutinifni/splitwise-sim, Llama-2-70B, medians; all in
# benchmarks/splitwise_a100.py.
@pytest.mark.parametrize(
    ("work", "published_ms"),
    [
        (Work(512.0, 0.0, 0.0, 512**2 / 2), 196.9),
        (PREFILL, 688.1),
        (Work(8192.0, 0.0, 0.0, 8192**2 / 2), 2990.2),
        (Work(0.0, 1.0, 576.0, 0.0), 54.9),
        (Work(0.0, 16.0, 16 * 576.0, 0.0), 65.5),
        (Work(0.0, 32.0, 32 * 576.0, 0.0), 72.2),
    ],
)
def test_an_a100_at_tp2_agrees_with_splitwise(work, published_ms):
    assert 1e3 * step_s(2, work, "dgx-a100") == pytest.approx(published_ms, rel=0.15)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_public_config_gives_the_shipped_shape(name, write_config):
    shipped = load_model(name)
    assert shipped.name in model_names()
    own = load_model(write_config(config(name)))
    assert own.shape == shipped.shape
    assert own.shape.parameters == pytest.approx(CONFIGS[name][-1] * 1e9, rel=2e-3)
    assert load_model(name.upper()) == shipped


def test_every_shipped_model_is_compared_with_its_public_config():
    assert {load_model(name).name for name in CONFIGS} == set(model_names())


def test_a_folder_with_the_calibrated_models_dimensions_is_calibrated(write_config):
    folder = write_config(config("meta-llama/Llama-2-70b-hf", model_type="llama"))
    assert load_profile("dgx-h100", folder).calibrated
    assert load_profile("dgx-h100", f"{folder}/config.json").calibrated
    assert not load_profile("dgx-h200", folder).calibrated


def test_the_text_decoder_of_a_multimodal_model(write_config):
    inner = config(dtype=None, tie_word_embeddings=None)
    folder = write_config({"text_config": inner, "torch_dtype": "bfloat16", "tie_word_embeddings": False})
    model = load_model(folder)
    assert model.shape == load_model("qwen3-8b").shape
    assert "of a multimodal model the text decoder alone is served" in model.assumed


def test_tied_embeddings_are_stored_once_and_read_as_the_output_head(write_config):
    table = 4096 * 151936
    apart = load_model("qwen3-8b").shape
    tied = load_model(write_config(config(tie_word_embeddings=True))).shape
    assert tied.parameters == apart.parameters - table
    assert tied.step_bytes == tied.weight_bytes == apart.step_bytes == apart.weight_bytes - 2 * table


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, 8),
    ],
)
def test_quantized_weights_cost_their_bits(write_config, quantization, bits):
    model, whole = load_model(write_config(config(quantization_config=quantization))), load_model("qwen3-8b").shape
    rest = 2 * (whole.parameters - whole.layer_parameters)
    assert model.shape.weight_bytes == pytest.approx(whole.layer_parameters * bits / 8 + rest)
    assert model.shape.kv_bytes_per_token == whole.kv_bytes_per_token
    assert "16-bit peak" in model.assumed[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        (config(hidden_size=None), "lacks hidden_size"),
        (config(intermediate_size=None), "lacks intermediate_size"),
        (config(vocab_size="many"), "vocab_size is 'many'; it must be a whole number above 0"),
        (config(num_key_value_heads=0), "num_key_value_heads is 0"),
        (config(num_experts=128), "a mixture of experts, which is not simulated"),
        (config(n_routed_experts=256), "a mixture of experts, which is not simulated"),
        (config(kv_lora_rank=512), "compressed or linear attention"),
        (config(layer_types=["linear_attention"]), "compressed or linear attention"),
        (config(model_type="starcoder2"), "MLPs of two matrices"),
        (config(dtype="int8"), "dtype int8 is not simulated"),
        (config(quantization_config={"quant_method": "bitsandbytes"}), "bitsandbytes tells no bits a weight"),
        (config(quantization_config={"bits": 4}), "without quant_method tells no bits a weight"),
    ],
)
def test_a_config_that_cannot_be_simulated_is_one_line_with_its_file(write_config, content, message):
    folder = write_config(content)
    with pytest.raises(ReplayError) as caught:
        load_model(folder)
    assert re.match(rf"{re.escape(folder)}/config\.json: .*{re.escape(message)}", str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", ["gpt", "Qwen/Qwen9-1B", "FOLDER", "FOLDER/config.json"])
def test_a_model_that_is_not_there_is_one_line(tmp_path, asked):
    with pytest.raises(ReplayError, match=r"config\.json") as caught:
        load_model(asked.replace("FOLDER", str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("power"), "lacks power"),
        (lambda d: d["time"].pop("sync_layer_s"), "[time] lacks sync_layer_s"),
        (lambda d: d["time"].update(sync_s=1.0), "[time] has unknown keys: sync_s"),
        (lambda d: d.update(turbo=True), "the file has unknown keys: turbo"),
        (lambda d: d["thermal"].update(humidity=1), "[thermal] has unknown keys: humidity"),
        (lambda d: d["clocks_mhz"].pop("step"), "clocks_mhz lacks step"),
        (lambda d: d["clocks_mhz"].update(step=0), "not a range of clocks"),
        (lambda d: d.update(power="700 W"), "[power] must be a table"),
        (lambda d: d["power"].update(cap_w="700 W"), "power.cap_w"),
        (lambda d: d.update(calibration="none"), "[calibration] must be a table"),
        (lambda d: d["calibration"].update(simulated="no"), "[calibration] simulated = 'no': must be true or false"),
        (lambda d: d.update(gpus_per_node=0), "gpus_per_node = 0: must be at least 1"),
        (lambda d: d.update(memory_clock_mhz=0), "memory_clock_mhz = 0: must be at least 1"),
        (lambda d: d["power"].update(cap_w=100), "[power] cap_w = 100: must be above "),
        (lambda d: d["time"].update(boost_mhz=1995), "[time] boost_mhz = 1995: must be one of clocks_mhz, 210 to 1980"),
        (lambda d: d["time"].update(boost_mhz=195), "[time] boost_mhz = 195: must be one of clocks_mhz"),
        (lambda d: d["time"].update(sustained_mhz=1831), "[time] sustained_mhz = 1831: must be one of clocks_mhz"),
        (lambda d: d["sensor"]["phases_ns"].pop(), "[sensor] phases_ns: give 8 times within period_ns"),
        (lambda d: d["calibration"].pop("models"), "[calibration] lacks models"),
        (lambda d: d["calibration"].update(models="all"), "calibrated_on"),
    ],
)
def test_a_hardware_file_without_sense_names_its_key(node_document, change, message):
    change(node_document)
    with pytest.raises(ReplayError) as caught:
        parse_node(node_document)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("served", "name", "same"),
    [
        ("meta-llama/Llama-2-70b-hf", "llama-2-70b", True),
        ("/models/Llama-2-70b-chat-hf/", "llama-2-70b", True),
        ("llama-2-70b", "/data/llama-2-70b/config.json", True),
        ("/models/mine", "elsewhere/mine", True),
        ("meta-llama/Llama-2-13b-hf", "llama-2-70b", False),
        ("mine", "llama-2-70b", False),
        ("mine", "yours", False),
    ],
)
def test_a_served_name_is_a_model_by_name_alias_or_folder(served, name, same):
    assert is_model(served, name) == is_model(name, served) == same


def test_a_hardware_file_of_ones_own(tmp_path):
    shipped = files("replay.sim").joinpath("profiles", "nodes", "dgx-h100.toml").read_text("utf-8")
    path = tmp_path / "mine.toml"
    path.write_text(
        re.sub(r"launch_s = \S+", "launch_s = 0.0100", shipped).replace("source =", "anything_else = 965\nsource =")
    )
    mine, theirs = load_profile(str(path)), load_profile("DGX-H100")
    assert (mine.hardware, mine.time.launch_s, mine.calibrated) == (str(path), 0.01, True)
    assert (mine.power, theirs.hardware) == (theirs.power, "dgx-h100")
    path.write_text("gpu_name = \n")
    with pytest.raises(ReplayError, match=rf"--hardware {re.escape(str(path))}: .*line 1"):
        load_node(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(ReplayError, match="cannot be read"):
        load_node(str(path))


def test_unknown_hardware_names_the_known_ones():
    with pytest.raises(ReplayError, match=r"--hardware dgx-b200: use dgx-a100, dgx-h100, dgx-h200, or a TOML file"):
        load_profile("dgx-b200")


def test_a_profile_is_the_same_after_its_manifest():
    for hardware in hardware_names():
        profile = load_profile(hardware, "qwen3-8b")
        assert profile_of_constants(json.loads(json.dumps(constants(profile)))) == profile
    with pytest.raises(ReplayError, match="not a simulated profile"):
        profile_of_constants({"hardware": "dgx-h100"})
