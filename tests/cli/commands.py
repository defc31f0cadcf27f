# SPDX-License-Identifier: Apache-2.0
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
