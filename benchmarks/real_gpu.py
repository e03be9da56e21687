"""Measure a real GPU and check what wattrace says of it: one command, no second meter.

    python benchmarks/real_gpu.py --vllm-python ENV/bin/python

Probes the power sensors, launches vLLM with a model of Llama-3-8B's shape and random weights, replays a chat mix,
single requests one at a time, and the mix with an added stream; checks predictions against the meter; writes a page
and the run directories to docs/measurements/GPU/. Clocks are never touched. Runs that are complete are not repeated,
so that an interrupted measurement goes on where it stopped. `--engine sim` plays all of it on the simulated engine:
SIMULATED.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from gpu_checks import check_added, check_counter, check_recorder, check_singles, describe_run, guarded
from gpu_page import write_page

from replay.gpu.base import open_gpus
from replay.rundir import Run
from replay.source import clipped
from tracegen.durations import NS_PER_S
from tracegen.errors import ReplayError, WattraceError
from tracegen.schema import write_trace
from tracegen.synthesize import synthesize

ROOT = Path(__file__).resolve().parents[1]
EXTRA_IDS = 1_000_000  # requests of the added stream count from here
SEED = 1
MAX_SINGLE_TOKENS = 300  # answers of single requests are cut here: twenty of them in a few minutes
MAX_MODEL_LEN = 8192
SHORT_MODEL_LEN = 4096  # of the simulated Llama-2, and in trials
# Shape of Llama-3-8B (meta-llama/Meta-Llama-3-8B, config.json).
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": MAX_MODEL_LEN,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TINY = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"intermediate_size": 256, "vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 1}


@dataclass(frozen=True)
class Plan:
    """What is measured, and where it goes."""

    engine: str  # vllm | sim
    seconds: float
    rate_rps: float
    extra_rps: float
    singles: int
    mix: str
    idle_s: float
    probe_s: float
    tp: int
    gpu: int
    model: Path
    config: dict[str, Any]
    python: str | None
    max_model_len: int
    vllm_args: tuple[str, ...]
    trial: bool
    work: Path  # whole runs; kept between calls
    out: Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    try:
        measure(_parse(arguments))
    except WattraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(plan: Plan) -> Path:
    """Do all of it; the folder written. Raises a `WattraceError` where it cannot go on."""
    name = "simulated" if plan.engine == "sim" else gpu_name(plan.gpu)
    if plan.engine == "sim":
        say("SIMULATED: every figure below is computed by the simulated engine; nothing is measured")
    plan.work.mkdir(parents=True, exist_ok=True)
    say(f"[1/6] {name}: probing its power sensors")
    probed = probe(plan)
    if plan.engine == "vllm":
        write_model(plan.model, plan.config)
    base, extra = traces(plan)
    say(f"[2/6] {base.height} requests of the mix '{plan.mix}' over {plan.seconds:g} s")
    mix = replay(plan, "mix", base)
    say(f"[3/6] {plan.singles} requests, one at a time")
    singles = replay(plan, "singles", single_trace(plan, mix))
    say(f"[4/6] the mix again, with {extra.height} requests added")
    both = replay(plan, "added", pl.concat([base, extra]).sort("arrival_ns"))
    say("[5/6] checks")
    document = {
        "gpu": name,
        "simulated": mix.simulated,
        "trial": plan.trial,
        "probe": probed,
        "model": plan.config if plan.engine == "vllm" else mix.manifest["instances"][0]["model"],
        "versions": mix.manifest.get("versions") or {},
        "settings": {key: getattr(plan, key) for key in ("seconds", "rate_rps", "extra_rps", "singles", "mix", "tp")},
        "runs": {run.name: guarded(describe_run, run) for run in (mix, singles, both)},
        "singles": guarded(check_singles, mix, singles),
        "added": guarded(check_added, mix, both, extra["request_id"].to_list()),
        "counter": {run.name: guarded(check_counter, run) for run in (mix, singles, both)},
        "recorder": guarded(check_recorder, mix),
    }
    say("[6/6] writing the page")
    folder = plan.out / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    publish(plan, [mix, singles, both], folder)
    lines = write_page(folder, document)
    say("\n".join(lines))
    say(f"wrote {folder}")
    return folder


def say(text: str) -> None:
    """Progress, at once."""
    print(text, flush=True)


def gpu_name(gpu: int) -> str:
    """The card's name. Raises `GpuError` where there is no GPU."""
    gpus = open_gpus("nvml")
    try:
        names = {device.gpu: device.name for device in gpus.devices()}
    finally:
        gpus.close()
    if gpu not in names:
        raise ReplayError(f"--gpu {gpu}: this host has {len(names)} GPUs")
    return names[gpu]


def command(plan: Plan, *arguments: str) -> str:
    """What a command of `replay` prints. Raises `ReplayError` with its last words where it fails."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    argv = [sys.executable, "-m", "replay.cli", *arguments]
    done = subprocess.run(argv, cwd=plan.work, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise ReplayError(f"replay {arguments[0]} ended with {done.returncode}: {words.removeprefix('error: ')}")
    return done.stdout


def probe(plan: Plan) -> dict[str, Any]:
    """What `replay probe` says of the GPU, its lines as they are, or why it says nothing or not all."""
    if plan.engine == "sim":
        return {"lines": None, "why": "a simulated GPU's sensors are known, not probed"}
    kept, why = plan.work / "probe.txt", None
    if not kept.is_file():
        options = ["probe", "--gpus", str(plan.gpu), "--seconds", f"{plan.probe_s:g}", "--idle", f"{plan.idle_s:g}s"]
        try:
            text = command(plan, *options)
        except ReplayError as error:
            why = str(error)
            say(f"  {why}; again without load")
            try:
                text = command(plan, *options, "--no-load")
            except ReplayError as again:
                return {"lines": None, "why": str(again)}
        kept.write_text(text, encoding="utf-8")
    lines = [line for line in kept.read_text(encoding="utf-8").splitlines() if line and not line.startswith("wrote")]
    say("\n".join(f"  {line}" for line in lines))
    return {"lines": lines, "why": why}


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """A model folder without weights: config.json, and a tokenizer with a word for every id."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {f"w{i}": i for i in range(config["vocab_size"])}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w2"},
    }
    special = {"bos_token": f"w{config['bos_token_id']}", "eos_token": f"w{config['eos_token_id']}"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w2", **special}
    documents = {"config.json": config, "tokenizer.json": tokenizer, "tokenizer_config.json": settings}
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document), encoding="utf-8")


def traces(plan: Plan) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The mix, and the stream that is added to it: of the same mix, with arrivals of its own."""
    duration_ns = round(plan.seconds * NS_PER_S)
    base, _ = synthesize(plan.mix, plan.rate_rps, duration_ns, SEED)
    extra, _ = synthesize(plan.mix, plan.extra_rps, duration_ns, SEED + 1)
    return _clip(plan, base), _clip(plan, extra.with_columns(pl.col("request_id") + EXTRA_IDS))


def _clip(plan: Plan, trace: pl.DataFrame) -> pl.DataFrame:
    """`trace` within the model's context."""
    return clipped(trace, plan.max_model_len)


def single_trace(plan: Plan, mix: Run) -> pl.DataFrame:
    """Requests of the mix's sizes so far apart that each has ended, by the mix's pace, before the next is due."""
    needed_ns = round(4 * (plan.singles + 10) / plan.rate_rps * NS_PER_S)
    frame, _ = synthesize(plan.mix, plan.rate_rps, needed_ns, SEED + 2)
    if frame.height < plan.singles:
        raise ReplayError(f"--singles {plan.singles}: the mix gave only {frame.height} requests; ask for fewer")
    frame = frame.head(plan.singles).with_columns(pl.col("output_tokens").clip(2, MAX_SINGLE_TOKENS))
    done = mix.scan("requests").filter(pl.col("output_tokens") > 1).collect()
    tpot_s = ((done["last_token_ns"] - done["first_token_ns"]) / (done["output_tokens"] - 1)).median()
    ttft_s = (done["first_token_ns"] - done["sent_ns"]).median()
    if not isinstance(tpot_s, float) or not isinstance(ttft_s, float):
        raise ReplayError(f"{mix.path}: no request was answered, so the next measurement cannot be planned")
    frame = _clip(plan, frame)
    lasting_ns = frame["output_tokens"].cast(pl.Int64) * math.ceil(1.3 * tpot_s) + round(3 * ttft_s) + 2 * NS_PER_S
    return frame.with_columns(arrival_ns=lasting_ns.cum_sum() - lasting_ns)


def replay(plan: Plan, name: str, trace: pl.DataFrame) -> Run:
    """Replay `trace` as run `name`, unless a complete run of the same requests is there."""
    path, file = plan.work / name, plan.work / f"{name}.parquet"
    columns = ["request_id", "input_tokens", "output_tokens"]
    if (path / "manifest.json").is_file():
        run = Run.open(path)
        if run.manifest["state"] == "complete" and run.scan("trace").select(columns).collect().equals(trace[columns]):
            say("  a complete run of these requests is there already")
            return run
        shutil.rmtree(path)
    shutil.rmtree(path, ignore_errors=True)
    write_trace(trace, file, {"generator": "benchmarks/real_gpu.py", "seed": SEED, "parameters": {"part": name}})
    options = ["--tp", str(plan.tp), "--idle", f"{plan.idle_s:g}s", "-o", name, "--no-save-chunks"]
    if plan.engine == "vllm":
        gpus = ",".join(str(plan.gpu + i) for i in range(plan.tp))
        options += ["--gpus", gpus, "--model", os.path.relpath(plan.model, plan.work)]
        options += ["--vllm-python", plan.python] if plan.python else []
        options += [f"--vllm-arg={a}" for a in ("--load-format=dummy", "--dtype=bfloat16", *plan.vllm_args)]
    command(plan, "run", file.name, "--engine", plan.engine, *options, "--quiet")
    run = Run.open(path)
    failed = [v["name"] for v in run.manifest["verdicts"] if v["ok"] is False]
    say(f"  {run.manifest['state']}" + (f"; failed verdicts: {', '.join(failed)}" if failed else ""))
    return run


def publish(plan: Plan, runs: list[Run], folder: Path) -> None:
    """Copy the runs' tables and manifests into `folder`; paths of this machine become names."""
    names = {str(plan.model): "model", str(plan.work.resolve()): "work", str(ROOT): "wattrace", str(Path.home()): "~"}
    if plan.python:
        names = {plan.python: "python", **names}
    for run in runs:
        target = folder / run.name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for table in run.path.glob("*.parquet"):
            if table.stem != "server_metrics":
                shutil.copy2(table, target)
        text = (run.path / "manifest.json").read_text(encoding="utf-8")
        for path, name in names.items():
            text = text.replace(json.dumps(path)[1:-1], name)
        partial = target / ".manifest.json.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(target / "manifest.json")


def _parse(arguments: list[str] | None) -> Plan:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["vllm", "sim"], default="vllm", help="sim: no GPU, SIMULATED")
    parser.add_argument("--seconds", type=float, default=180.0, help="length of the mix")
    parser.add_argument("--rate", type=float, help="its requests/s (vllm: 2, sim: 0.6)")
    parser.add_argument("--extra-rate", type=float, help="requests/s of the added stream (vllm: 2, sim: 0.4)")
    parser.add_argument("--singles", type=int, default=20, help="requests that run alone")
    parser.add_argument("--gpu", type=int, default=0, help="the first GPU that serves")
    parser.add_argument("--tp", type=int, help="tensor-parallel size (vllm: 1, sim: 8)")
    parser.add_argument("--model-dir", type=Path, help="where the model folder is written")
    parser.add_argument("--python", "--vllm-python", help="Python of an environment that has vLLM")
    parser.add_argument("--vllm-arg", action="append", default=[], help="argument for 'vllm serve', repeatable")
    parser.add_argument("--work", type=Path, help="where the runs are made and kept (runs/real-gpu or -sim)")
    parser.add_argument("--out", type=Path, help="where the page goes (docs/measurements; sim: the work folder)")
    parser.add_argument("--quick", action="store_true", help="everything tiny: a trial of the command itself")
    asked = parser.parse_args(arguments)
    simulated, quick = asked.engine == "sim", asked.quick
    for name in ("seconds", "rate", "extra_rate", "singles", "tp"):
        value = getattr(asked, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value:g}: must be above 0")
    work = (asked.work or ROOT / "runs" / f"real-gpu-{asked.engine}{'-quick' if quick else ''}").resolve()
    max_len = SHORT_MODEL_LEN if simulated or quick else MAX_MODEL_LEN
    # Trials and simulations are no measurements: they stay out of the documentation unless asked for.
    out = asked.out or (work / "page" if simulated or quick else ROOT / "docs" / "measurements")
    return Plan(
        engine=asked.engine,
        seconds=min(asked.seconds, 8.0) if quick else asked.seconds,
        rate_rps=asked.rate or (2.0 if not simulated or quick else 0.6),
        extra_rps=asked.extra_rate or (2.0 if not simulated or quick else 0.4),
        singles=min(asked.singles, 3) if quick else asked.singles,
        mix="code" if quick else "chat",
        idle_s=1.0 if quick else 10.0,
        probe_s=4.0 if quick else 20.0,
        tp=asked.tp or (8 if simulated else 1),
        gpu=asked.gpu,
        model=(asked.model_dir or work / "model").resolve(),
        config=LLAMA_3_8B | (TINY if quick else {}),
        python=asked.python,
        max_model_len=max_len,
        vllm_args=(f"--max-model-len={max_len}", *asked.vllm_arg),
        trial=quick,
        work=work,
        out=out.resolve(),
    )


if __name__ == "__main__":
    sys.exit(main())
