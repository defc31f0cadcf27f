# SPDX-License-Identifier: Apache-2.0
"""Runs mypy over what is public: `moellava` itself, its configs, loading, and what loading reads a request by.

In this repository some rooms of the package lie beside it (`setup.py`). They are laid out as they are installed first,
by links, and what is found is reported at its place here. `typed_use.py` is checked along with them: a user's lines,
and wrong ones among them, which mypy has to find. What is checked, and how, is in `pyproject.toml`.

Usage: python .ci/typecheck.py
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "types"
ROOMS = ("configuration", "modeling", "parts", "processing", "hub_cards")


def lay_out(work: Path) -> None:
    """Links the package into a folder, as it is installed, and the lines of a user."""
    shutil.rmtree(work / "moellava", ignore_errors=True)
    (work / "moellava").mkdir(parents=True)
    for source in (*(ROOT / "moellava").iterdir(), *(ROOT / room for room in ROOMS)):
        (work / "moellava" / source.name).symlink_to(source)
    (work / "typed_use.py").unlink(missing_ok=True)
    (work / "typed_use.py").symlink_to(ROOT / ".ci" / "typed_use.py")


def main() -> int:
    lay_out(WORK)
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"]
    # mypy keeps what it has read in the folder it runs in, and is quicker the next time.
    done = subprocess.run(command, cwd=WORK, env=os.environ | {"MYPYPATH": ""}, stdout=subprocess.PIPE, text=True)
    rooms = "|".join(ROOMS)
    output = re.sub(rf"^moellava/(?=(?:{rooms})/)", "", done.stdout, flags=re.MULTILINE)
    output = re.sub(r"^(?=typed_use\.py:)", ".ci/", output, flags=re.MULTILINE)
    print(f"mypy: {output.rstrip()}" if done.returncode == 0 else output.rstrip())
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
