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
"""Pushing to the Hub and loading from it, over the real client and HTTP, against the server of `hub_server.py`.

A process costs seconds, so each of the few here does many things and prints what came of them, and the tests look at
that, and at what the server holds.
"""

import json
import shutil
import threading
from pathlib import Path

import pytest
from hub_server import OWNER_TOKEN, READER_TOKEN, HubServer
from parts import picture, run_python

from moellava import load_pretrained_model, push
from moellava.configuration.checkpoint_moellava import is_weight_file


STRAY = ("notes.txt", "train.py", "optimizer.pt", ".gitignore", "pictures/other.png")
CARD = """---
license: mit
---
# My model

![What it sees](pictures/shown.png) and <img width="9" src="pictures/too.png"> and ![elsewhere](https://a.org/b.png)
"""


@pytest.fixture(scope="module")
def server():
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory) -> Path:
    """A checkpoint with a card, in a folder where other things lie too."""
    folder = tmp_path_factory.mktemp("hub") / "checkpoint"
    config = {
        "model_name_or_path": str(parts.language_model("llama")),
        "mm_vision_tower": str(parts.vision_tower("clip")),
    }
    load_pretrained_model(config, device="cpu").model.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "pictures").mkdir()
    for name in ("shown.png", "too.png", "other.png"):
        picture(1).save(folder / "pictures" / name)
    (folder / "runs" / "first").mkdir(parents=True)
    for name in (*(name for name in STRAY if "/" not in name), "runs/first/events", "runs/first/config.json"):
        (folder / name).write_text("not part of it")
    return folder


def last_line(output: str) -> dict:
    return json.loads(output.splitlines()[-1])


def weights(server: HubServer, name: str, revision: str = "main") -> set[str]:
    return {file for file in server.files(name, revision) if is_weight_file(file)}


# ---------------------------------------------------------------------------------------------------------------------
# push
# ---------------------------------------------------------------------------------------------------------------------

PUSHES = """
import dataclasses, json, os, signal, time, urllib.request
from pathlib import Path
from huggingface_hub import HfApi
from huggingface_hub.utils import logging as hub_logging
from safetensors.torch import load_file, save_file
from moellava.hub import push

FOLDER = Path({folder!r})
hub_logging.set_verbosity_error()
results = {{}}


def attempt(step, repository, **options):
    try:
        results[step] = dataclasses.asdict(push(FOLDER, repository, **options))
    except Exception as error:
        results[step] = {{"error": type(error).__name__, "text": str(error)}}
    return results[step]


def faults(**planned):
    data = json.dumps(planned).encode() if planned else None
    with urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/faults", data=data) as answer:
        return json.load(answer)


def new_weights(number):
    path = FOLDER / "model.safetensors"
    save_file(load_file(path), path, metadata={{"format": "pt", "number": str(number)}})


attempt("first", "me/model", commit_message="The first", commit_description="Of many")
attempt("again", "me/model")
attempt("sharded", "me/model", max_shard_size="200KB")
attempt("sharded again", "me/model", max_shard_size="200KB")
attempt("whole", "me/model")
attempt("pull request", "me/model", create_pr=True, max_shard_size="200KB")
attempt("branch", "me/model", revision="for/sharded", max_shard_size="200KB")
attempt("pull request of nothing", "me/model", create_pr=True)
attempt("pull request against no branch", "me/model", create_pr=True, revision="missing")
attempt("private", "me/private", private=True)
attempt("private again", "me/private", private=True)
attempt("private where it is public", "me/model", private=True)
attempt("without a token", "me/private", token=False)
attempt("another's token", "me/model", token={reader!r}, revision="for/sharded")
attempt("no id", "me/no/id")

hub = HfApi()
for number, fault in enumerate({faults!r}):
    new_weights(number)
    head = hub.model_info("me/private").sha
    faults(**fault)
    failed = attempt(f"fault {{number}}", "me/private")
    failed["kept"] = hub.model_info("me/private").sha == head
    attempt(f"after fault {{number}}", "me/private")

# A process that is killed in the middle of an upload.
new_weights("killed")
head = hub.model_info("me/private").sha
faults(pattern="PUT /large/.*/3$", status=-2)
child = os.fork()
if child == 0:
    push(FOLDER, "me/private")
    os._exit(0)
while faults():  # until it has happened
    time.sleep(0.01)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
results["killed"] = {{"kept": hub.model_info("me/private").sha == head}}
attempt("after the kill", "me/private")
print(json.dumps(results))
"""

# What happens, to which request (see `hub_server.Fault`); what `push` raises, or nothing; and what it says.
FAULTS = [
    (r"POST .*/commit/", 401, "PermissionError", "the Hub answered 401: a fault that was asked for"),
    (r"POST .*/commit/", 429, "OSError", "Wait for some minutes, then push again."),
    (r"POST .*/commit/", 412, "OSError", "Somebody else has pushed in the meantime: push again."),
    (r"POST .*/commit/", 500, "OSError", "or holds the whole commit where only the answer to it was lost. Push again"),
    (r"POST .*/commit/", 0, "ConnectionError", "(the connection to the Hub failed: "),
    (r"PUT /large/.*/3$", 403, "PermissionError", "the Hub answered 403"),
    (r"GET /api/models/me/private$", 404, None, ""),
]


@pytest.fixture(scope="module")
def pushed(server, checkpoint, tmp_path_factory):
    home = tmp_path_factory.mktemp("pusher")
    folder = Path(shutil.copytree(checkpoint, home / "checkpoint"))
    faults = [{"pattern": pattern, "status": status} for pattern, status, *_ in FAULTS]
    code = PUSHES.format(folder=str(folder), reader=READER_TOKEN, faults=faults)
    return last_line(run_python(code, block_moellava=False, env=server.environment(home)))


def test_x(pushed, server):
    for name, result in pushed.items():
        if "files" in result: result["files"] = len(result["files"])
        print(name, result)
    for n, r in server.repositories.items():
        print(n, r.refs, [c.summary for c in r.commits.values()])
    assert 0
