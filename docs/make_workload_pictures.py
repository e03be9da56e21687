"""Draw the pictures of docs/workload.md, with its own commands: `python docs/make_workload_pictures.py docs/images`."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).with_name("workload.md")


def main() -> None:
    """Run the page's commands in a new folder, then keep the pictures that it shows."""
    images = Path(sys.argv[1])
    text = PAGE.read_text(encoding="utf-8")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            subprocess.run(["/bin/sh", "-euxc", block], cwd=folder, env=environment, check=True)
        for name in re.findall(r"\(images/(.*?)\)", text):
            shutil.copy(Path(folder) / name, images / name)
            print(f"wrote {images / name}")


if __name__ == "__main__":
    main()
