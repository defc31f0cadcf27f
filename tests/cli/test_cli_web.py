# SPDX-License-Identifier: Apache-2.0
"""`moellava web`: the page is there until Ctrl-C."""

import signal
import subprocess
import urllib.request

import pytest
from commands import SCRIPT, fails


pytest.importorskip("moellava.web", reason="the page is not there")
pytest.importorskip("gradio", reason="the extra web is not installed")


def test_the_page_is_served_until_ctrl_c(checkpoint):
    process = subprocess.Popen(
        [SCRIPT, "web", checkpoint, "--port", "0", "--no-browser", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        address = next(line for line in process.stderr if line.startswith("The page is at ")).split()[4]
        with urllib.request.urlopen(address, timeout=600) as page:
            assert page.status == 200
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in stderr


def test_what_cannot_be_served(parts, tmp_path):
    assert "does not exist" in fails("web", tmp_path / "absent", "--no-browser")
    assert "is a model of type 'llama'" in fails("web", parts.language_model("llama"), "--no-browser")
