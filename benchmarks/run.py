"""Run the benchmarks that need nothing but this machine: `make bench`. `make demo` first, for the run directories."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    """Run them one after the other; the worst exit code."""
    run = Path("demo/run-1200")
    if not run.is_dir():
        print("demo/run-1200 is missing: run 'make demo' first", file=sys.stderr)
        return 2
    jobs = [
        ["timer.py"],
        ["attribution.py", str(run)],
        ["step_recorder.py"],
        ["imports.py"],
        ["synth.py", "5"],
        ["sim_server.py", "100", "200"],
    ]
    codes = []
    for name, *arguments in jobs:
        print(f"\n== {name} {' '.join(arguments)}", flush=True)
        codes.append(subprocess.run([sys.executable, HERE / name, *arguments], check=False).returncode)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
