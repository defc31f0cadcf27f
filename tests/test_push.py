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
"""`model.push_to_hub`: everything that a checkpoint needs arrives in one commit, over the real client and HTTP."""

import base64
import hashlib
import http.server
import json
import re
import threading

import pytest
from parts import picture, run_python


class HubStub(http.server.ThreadingHTTPServer):
    """The part of the Hub's protocol that a push of small files takes: create, preupload, commit, resolve."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: list[dict] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers the client's requests."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: object):
        self._answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub, path = self.server, self.path.partition("?")[0]
        if path == "/api/repos/create":
            request = json.loads(body)
            name = "/".join(part for part in (request.get("organization"), request["name"]) if part)
            hub.repositories.setdefault(name, {})
            self._json({"url": f"{hub.url}/{name}", "id": name, "name": name})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = json.loads(body)["files"]
            answer = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
            self._json({"files": answer})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            hub.repositories[match[1]].update(files)
            hub.commits.append({"repository": match[1], "files": sorted(files), "header": lines[0]["value"]})
            oid = "0" * 39 + str(len(hub.commits))
            self._json({"commitUrl": f"{hub.url}/{match[1]}/commit/{oid}", "commitOid": oid, "success": True})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        else:
            self._answer(404)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            if match[1] in self.server.repositories:
                names = self.server.repositories[match[1]]
                siblings = [{"rfilename": name} for name in names]
                self._json({"id": match[1], "sha": "0" * 40, "siblings": siblings, "private": False, "tags": []})
            else:
                self._answer(404, X_Error_Code="RepoNotFound")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            content = self.server.repositories.get(match[1], {}).get(match[3])
            if content is None:
                self._answer(404, X_Error_Code="EntryNotFound")
            else:
                etag = hashlib.sha256(content).hexdigest()
                self._answer(200, content, ETag=f'"{etag}"', X_Repo_Commit="0" * 40)
        else:
            self._answer(404)


@pytest.fixture
def hub_stub():
    server = HubStub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


PUSH = """
from moellava import load_pretrained_model
model, image_processor, tokenizer, context_len = load_pretrained_model({config!r}, device="cpu")
model.push_to_hub("me/my-model", token="hf_test")
"""

LOAD = """
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor
model = AutoModelForCausalLM.from_pretrained("me/my-model", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("me/my-model", trust_remote_code=True)
inputs = processor(images=Image.open({picture!r}), text="<image> what?", return_tensors="pt")
print("TOKENS", model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist())
"""


def test_a_push_is_one_commit_that_loads_elsewhere(parts, hub_stub, tmp_path):
    picture(3).save(tmp_path / "picture.png")
    config = {
        "model_name_or_path": str(parts.language_model("llama")),
        "mm_vision_tower": str(parts.vision_tower("clip")),
    }
    online = {
        "HF_ENDPOINT": hub_stub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    run_python(PUSH.format(config=config), block_moellava=False, env={**online, "HF_HOME": str(tmp_path / "pusher")})

    assert len(hub_stub.commits) == 1
    files = hub_stub.commits[0]["files"]
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer_config.json"} <= set(files)
    assert {"moellava_entry.py", "modeling_moellava.py", "processing_moellava.py"} <= set(files)

    answer = run_python(
        LOAD.format(picture=str(tmp_path / "picture.png")), env={**online, "HF_HOME": str(tmp_path / "loader")}
    )
    assert "TOKENS [" in answer
