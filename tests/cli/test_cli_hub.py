# SPDX-License-Identifier: Apache-2.0
"""What the Hub answers when something is wrong, in one sentence: from a server on this machine that answers so."""

import http.server
import json
import os
import subprocess
import threading

import pytest
from commands import SCRIPT, fails
from hub_server import Blob, HubServer, Repository
from parts import run_python


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
        timeout=1200,
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


# What the Hub answers when it is asked for sizes, after config and headers were had, and what is said: 0 is no answer.
LATER = {
    400: "The Hub refuses the request.",
    403: "Your token does not allow this: give one that does with --token, or log in anew with `hf auth login`.",
    404: "The Hub has no such file: check the names of the repository and of the revision.",
    429: "The Hub has had too many requests from here: wait for some minutes, or log in, which allows more.",
    500: "The Hub has trouble of its own: try again later.",
    0: "The Hub cannot be reached (",
}

INSPECTS = """
import json, urllib.request
from typer.testing import CliRunner
from moellava.cli import app

told = {{}}
for status in {statuses!r}:
    fault = json.dumps({{"pattern": "POST .*/paths-info/", "status": status}}).encode()
    urllib.request.urlopen(urllib.request.Request({url!r} + "/faults", fault, method="POST")).close()
    result = CliRunner().invoke(app, ["inspect", "me/model", "--cache-dir", {cache!r}])
    told[status] = [result.exit_code, result.stdout, result.stderr]
print(json.dumps(told))
"""


def test_answers_of_the_hub_to_a_later_request(checkpoint, tmp_path):
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.repositories["me/model"] = Repository("me/model", private=False)
    files = {name: Blob((checkpoint / name).read_bytes()) for name in ("config.json", "model.safetensors")}
    server.repositories["me/model"].commit("main", files, None, "files")
    try:
        code = INSPECTS.format(statuses=list(LATER), url=server.url, cache=str(tmp_path / "downloads"))
        output = run_python(code, block_moellava=False, env=server.environment(tmp_path))
    finally:
        server.shutdown()
        server.server_close()
    assert [path.name for path in (tmp_path / "downloads").glob("models--*/snapshots/*/*")] == ["config.json"]
    for status, (exit_code, stdout, stderr) in json.loads(output.splitlines()[-1]).items():
        line = stderr.splitlines()[-1]
        assert (exit_code, stdout) == (1, "") and line.startswith(f"Error: {LATER[int(status)]}"), (status, stderr)
        address = f"{server.url}/api/models/me/model/paths-info/main"
        end = f"(The Hub's answer: {status} for {address}.)"
        assert line.endswith(end if int(status) else "what was downloaded before is found with --local-files-only.")


def test_what_is_no_answer_of_the_hub(checkpoint, tmp_path):
    """Of errors without an answer, each says what it is; the tests run offline."""
    assert fails("push", checkpoint, "me/model") == (
        "Error: The Hub is not asked, since HF_HUB_OFFLINE is set: unset it.\n"
    )
    assert "me/no/id" in fails("push", checkpoint, "me/no/id")
    (tmp_path / "file").write_text("no folder")
    assert fails("space", checkpoint, tmp_path / "file" / "space") == (
        f"Error: {tmp_path / 'file' / 'space'}: Not a directory.\n"
    )


def test_a_first_answer_that_transformers_takes_for_none(hub):
    hub.status, hub.headers = 403, {}
    line = told(f"http://127.0.0.1:{hub.server_port}", "inspect", "nobody/nothing")
    assert "the Hub cannot be reached or refuses it" in line and "check the id, the connection and the token" in line


def test_no_connection():
    line = told("http://127.0.0.1:9", "inspect", "nobody/nothing")
    assert "the Hub cannot be reached or refuses it, and the local cache does not hold it" in line
