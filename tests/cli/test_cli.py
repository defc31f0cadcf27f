# SPDX-License-Identifier: Apache-2.0
"""The command line as a whole: help, completion, errors, exit codes."""

import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from commands import SCRIPT, fails, run, run_process

from moellava.cli import app


def leaves(group=None, prefix=()):
    """Every command of the command line, as it is typed."""
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, (*prefix, name))
        else:
            yield (*prefix, name)


COMMANDS = sorted(leaves())


def test_help_and_version_import_nothing_heavy():
    code = f"""
import sys
from moellava.cli import app
for arguments in {[["--help"], *([*command, "--help"] for command in COMMANDS), ["--version"]]}:
    app(arguments, standalone_mode=False)
heavy = {{"torch", "transformers", "numpy", "PIL", "huggingface_hub", "safetensors", "gradio"}}
print("HEAVY", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=1200)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    assert "moellava 0.1.0" in done.stdout


@pytest.mark.parametrize("module", [False, True])
def test_the_script_and_the_module_are_the_same(module):
    done = run_process("--version", module=module)
    assert (done.returncode, done.stdout, done.stderr) == (0, "moellava 0.1.0\n", "")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_examples(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"moellava {' '.join(command)} " in f"{result.stdout.partition('Examples:')[2]} "


def test_the_document_has_every_command():
    text = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    table = text.partition("| command |")[2].partition("\n\n")[0]
    assert sorted(tuple(name.split()) for name in re.findall(r"^\| `([\w ]+)` \|", table, re.MULTILINE)) == COMMANDS


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["ask", "model"],
        ["ask", "model", "scan.png", "What?", "--max-new-tokens", "0"],
        ["ask", "model", "scan.png", "What?", "--dtype", "float17"],
        ["ask", "model", "scan.png", " "],
        ["chat", "model", "--temperature", "-1"],
        ["data", "nothing"],
        ["evaluate", "model", "questions.json", "--batch-size", "0"],
        ["evaluate", "me/model", "questions.json", "--card"],
        ["push", "model"],
        ["train", "recipe.yaml", "--set", "learning_rate"],
        ["web", "model", "--port", "70000"],
        ["inspect"],
        ["inspect", "model", "--nothing"],
        ["assemble", "--out", "folder"],
        ["assemble", "--language-model", "model"],
        ["assemble", "--language-model", "model", "--out", "folder", "--projector-field", "hidden_size"],
        ["assemble", "--language-model", "model", "--out", "folder", "--vision-feature-layer", "last"],
        ["assemble", "--language-model", "model", "--out", "folder", "--image-aspect-ratio", "wide"],
        ["assemble", "--config", "nothing.json", "--out", "folder"],
        ["upcycle", "model", "folder", "--max-shard-size", "5XB"],
        ["convert", "model", "folder", "--max-shard-size", "0GB"],
        ["push", "model", "me/model", "--max-shard-size", "-5GB"],
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = fails(*arguments, code=2)
    assert "Usage: " in message
    assert os.listdir(tmp_path) == []


def test_errors_are_one_sentence_and_debug_shows_where(tmp_path):
    (tmp_path / "parts.json").write_text("{")
    arguments = ["assemble", "--config", tmp_path / "parts.json", "--out", tmp_path / "model"]
    done = run_process(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: {tmp_path / 'parts.json'} is no valid JSON (")
    assert len(done.stderr.splitlines()) == 1

    for with_debug in ([*arguments, "--debug"], ["--debug", *arguments]):
        done = run_process(*with_debug)
        assert (done.returncode, done.stdout) == (1, "")
        assert "Traceback (most recent call last)" in done.stderr
        assert "ValueError: " in done.stderr.splitlines()[-1]


def test_ctrl_c_ends_with_130(tmp_path):
    pipe = tmp_path / "parts.json"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [SCRIPT, "assemble", "--config", pipe, "--out", tmp_path / "model"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    with pipe.open("w"):  # returns when the command reads it, and keeps it waiting
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 130
    assert stdout == ""
    assert "Traceback" not in stderr


def test_logging_is_as_before(checkpoint, scans):
    package, models = logging.getLogger("moellava"), logging.getLogger("transformers.modeling_utils")
    before = (package.level, list(package.handlers), list(models.filters))
    assert run("ask", checkpoint, scans / "first.png", "What?", "--max-new-tokens", 1, "--verbose").exit_code == 0
    assert (package.level, list(package.handlers), list(models.filters)) == before
