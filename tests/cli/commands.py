# Copyright 2026 The MoELLaVA authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Runs the command line: as users do, in a process of its own, and in this one where that tells the same."""

import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from moellava.cli import app


SCRIPT = str(Path(sys.executable).parent / "moellava")


def run_process(*arguments, module=False, stdin=None, cwd=None):
    """Runs the command line in a process of its own."""
    command = [sys.executable, "-m", "moellava"] if module else [SCRIPT]
    return subprocess.run(
        [*command, *map(str, arguments)], input=stdin, capture_output=True, encoding="utf-8", cwd=cwd, timeout=3000
    )


def run(*arguments, stdin=None):
    """Runs the command line in this process."""
    return CliRunner().invoke(app, list(map(str, arguments)), input=stdin, env={"COLUMNS": "200"})


def fails(*arguments, code=1, stdin=None):
    """Runs the command line, which has to end in one sentence on standard error; returns it."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if code == 1:
        assert len([line for line in result.stderr.splitlines() if line.startswith("Error: ")]) == 1
    return result.stderr
