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
"""What the Hub answers when something is wrong, in one sentence: from a server on this machine that answers so."""

import http.server
import os
import subprocess
import threading

import pytest
from commands import SCRIPT


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def hub():
    """A Hub that gives the same answer to every request."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def told(endpoint, *arguments):
    """What the command line says with a Hub at another address."""
    done = subprocess.run(
        [SCRIPT, *arguments],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_nobody"},
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("Error: "))
    assert "Traceback" not in done.stderr
    return line


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "", "There is no such repository on the Hub, or it is private: check its name, and log in with"),
        (404, "RepoNotFound", "There is no such repository on the Hub, or it is private"),
        (404, "RevisionNotFound", "The repository has no such branch, tag or commit: check --revision."),
        (403, "GatedRepo", "Access to this repository has to be asked for"),
    ],
)
def test_answers_of_the_hub(hub, status, code, message):
    hub.status, hub.headers = status, {"X-Error-Code": code} if code else {}
    address = f"http://127.0.0.1:{hub.server_port}"
    line = told(address, "inspect", "nobody/nothing")
    assert line.startswith(f"Error: {message}")
    assert line.endswith(f"(The Hub's answer: {status} for {address}/nobody/nothing/resolve/main/config.json.)")
    assert "hf_nobody" not in line


def test_no_connection():
    line = told("http://127.0.0.1:9", "inspect", "nobody/nothing")
    assert "neither the Hub can be reached nor the local cache holds it" in line
