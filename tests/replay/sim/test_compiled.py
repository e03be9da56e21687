"""Cached machine code is never that of other sources."""

import shutil
import subprocess
import sys

from replay.sim import compiled

FILES = {
    "__init__.py": "",
    "numbers.py": "FACTOR = 3\n",
    "inner.py": "from little.compiled import inlined\nfrom little.numbers import FACTOR\n\n\n"
    "@inlined\ndef times(x):\n    return FACTOR * x\n",
    "outer.py": "from little.compiled import compiled\nfrom little.inner import times\n\n\n"
    "@compiled\ndef add_one(x):\n    return times(x) + 1\n",
}
ASK = "from little.outer import add_one; print(add_one(2), sum(add_one.stats.cache_hits.values()))"


def test_a_change_in_any_file_reaches_the_compiled_functions_of_all(tmp_path):
    package = tmp_path / "little"
    package.mkdir()
    shutil.copy(compiled.__file__, package / "compiled.py")
    for name, text in FILES.items():
        (package / name).write_text(text)

    def ask():
        done = subprocess.run([sys.executable, "-c", ASK], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert ask() == "7 0"
    assert ask() == "7 1", "from the cache"
    (package / "numbers.py").write_text("FACTOR = 5\n")
    assert ask() == "11 0"
    assert ask() == "11 1"
