# SPDX-License-Identifier: Apache-2.0
"""Shell completion, by the protocol that the shells speak, and in bash itself."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import SCRIPT


ENVIRONMENT = {
    **os.environ,
    "PATH": os.pathsep.join([str(Path(SCRIPT).parent), os.environ["PATH"]]),
    # Or --show-completion would ask which shell the tests run in, instead of taking the one that is named.
    "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
}

# What is typed, and what it is completed to.
CASES = [
    ("moellava a", ["ask", "assemble"]),
    ("moellava data ", ["check"]),
    ("moellava ask --dt", ["--dtype"]),
    ("moellava ask --dtype b", ["bfloat16"]),
    ("moellava convert --dtype float", ["float16", "float32"]),
    ("moellava assemble --projector p", ["perceiver"]),
    ("moellava upcycle --layers s", ["second_half", "sparse"]),
    ("moellava chat my-model --device c", ["cpu", "cuda"]),
]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """What `--install-completion` would add to bash."""
    done = subprocess.run(
        [SCRIPT, "--show-completion", "bash"], capture_output=True, encoding="utf-8", env=ENVIRONMENT, timeout=600
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path_factory.mktemp("completion") / "moellava.bash"
    path.write_text(done.stdout)
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash to complete in")
def test_completion_in_bash(script):
    lines = [f"source {script}", "complete -p moellava"]
    for typed, _ in CASES:
        words = " ".join(f"'{word}'" for word in typed.split(" "))
        lines.append(f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _moellava_completion moellava")
        lines.append('echo "${COMPREPLY[@]}"')
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(lines)], capture_output=True, encoding="utf-8", env=ENVIRONMENT, timeout=1200
    )
    registered, *completed = done.stdout.splitlines()
    # Where nothing of ours fits, as for pictures and folders, bash completes names of files.
    assert registered == "complete -o default -F _moellava_completion moellava"
    assert [sorted(line.split()) for line in completed] == [expected for _, expected in CASES], done.stderr


@pytest.mark.parametrize(("typed", "expected"), CASES[:5])
def test_completion_as_zsh_asks(typed, expected):
    done = subprocess.run(
        [SCRIPT],
        capture_output=True,
        encoding="utf-8",
        env={**ENVIRONMENT, "_MOELLAVA_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": typed},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("_arguments '*: :((")
    offered = [line.partition('"')[2].partition('"')[0] for line in done.stdout.splitlines() if '"' in line]
    assert sorted(word for word in offered if word.startswith(expected[0][:2])) == expected
