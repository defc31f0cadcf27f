# SPDX-License-Identifier: Apache-2.0
"""The Space of a checkpoint: what it is made of, and that its page answers where the package is not installed."""

import importlib.metadata
import json

import pytest
from huggingface_hub.repocard import metadata_load
from parts import picture, run_python

from moellava import load_pretrained_model
from moellava.hub_cards import render_space
from moellava.hub_cards.spaces import GRADIO_VERSION


# Imports the Space's app.py, asks over HTTP as a browser does, and prints what comes.
ASK = """
import importlib.util, json, os, threading
from gradio_client import Client, handle_file
spec = importlib.util.spec_from_file_location("app", os.environ["SPACE_APP"])
app = importlib.util.module_from_spec(spec)
spec.loader.exec_module(app)
histories, template = [], app.processor.apply_chat_template
app.processor.apply_chat_template = lambda turns, **options: histories.append(turns) or template(turns, **options)
_, url, _ = app.page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
client = Client(url, verbose=False)
pieces = list(client.submit({"text": "What is shown?", "files": [handle_file("picture.png")]}, api_name="/chat"))
second = client.predict({"text": "And here?", "files": [handle_file("picture.png")]}, api_name="/chat")
# As the page itself keeps a turn.
kept = [{"type": "file", "file": {"path": "picture.png"}}, {"type": "text", "text": "What?"}]
assert app.as_turn({"role": "user", "content": kept})["content"] == app.as_content("What?", ["picture.png"])
# A page that is closed ends its answer: the thread that computes it does not live on.
app.MAX_NEW_TOKENS, outputs, generate = 1500, [], app.model.generate
app.model.generate = lambda **options: outputs.append(generate(**options))
answer = app.answer({"text": "What?", "files": []}, [])
next(answer)
thread = [thread for thread in threading.enumerate() if "(generate)" in thread.name][-1]
answer.close()
thread.join(timeout=1200)
app.model.generate = generate
try:
    client.predict({"text": " ", "files": []}, api_name="/chat")
    refused = ""
except Exception as error:
    refused = str(error)
turns = [[turn["role"], [part["type"] for part in turn["content"]]] for turn in histories[1]]
told = {"pieces": pieces, "second": second, "turns": turns, "refused": refused}
print(json.dumps(told | {"is_alive": thread.is_alive(), "tokens": outputs[0].shape[1]}))
app.page.close(verbose=False)
"""


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "my-model"
    vision = parts.vision_tower("clip")
    load_pretrained_model(parts.language_model("llama"), mm_vision_tower=vision, device="cpu").model.save_pretrained(
        folder
    )
    return folder


def test_the_page_answers_without_the_package(checkpoint, tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'moellava[web]'")
    render_space(checkpoint, tmp_path / "space")
    picture(0).save(tmp_path / "picture.png")
    env = {
        "SPACE_APP": str(tmp_path / "space" / "app.py"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(tmp_path / "uploads"),
        "MAX_NEW_TOKENS": "6",
    }
    told = json.loads(run_python(ASK, cwd=tmp_path, env=env).splitlines()[-1])
    pieces = told["pieces"]
    assert len(pieces) > 1, "it streams"
    assert all(later.startswith(earlier) for earlier, later in zip(pieces, pieces[1:], strict=False))
    assert told["second"]
    asked = ["user", ["image", "text"]]
    assert told["turns"] == [asked, ["assistant", ["text"]], asked]
    assert "Write a question" in told["refused"]
    assert not told["is_alive"] and told["tokens"] < 1500


def test_what_a_space_holds(checkpoint, tmp_path):
    files = render_space(checkpoint, tmp_path / "space", repo_id="me/my-model")
    assert [path.name for path in files] == ["app.py", "requirements.txt", "README.md"]
    assert metadata_load(tmp_path / "space" / "README.md") == {
        "title": "my-model", "sdk": "gradio", "sdk_version": GRADIO_VERSION, "app_file": "app.py",
        "models": ["me/my-model"], "pinned": False,
    }  # fmt: skip
    app, requirements, _ = (path.read_text(encoding="utf-8") for path in files)
    assert 'os.environ.get("MODEL_ID", "me/my-model")' in app and str(checkpoint) not in app
    assert "moellava" not in requirements and "bitsandbytes" not in requirements
    assert "transformers>=5.19,<6" in requirements.split()
    # Of a folder, its path: the page runs here.
    local = render_space(checkpoint, tmp_path / "local")
    assert str(checkpoint) in local[0].read_text(encoding="utf-8")
    assert "models" not in metadata_load(local[2])


def test_a_space_does_not_overwrite_what_was_changed(checkpoint, tmp_path):
    app = render_space(checkpoint, tmp_path)[0]
    assert render_space(checkpoint, tmp_path)[0] == app
    app.write_text("mine")
    with pytest.raises(FileExistsError, match=r"has app\.py already"):
        render_space(checkpoint, tmp_path)
    assert app.read_text() == "mine"


def test_a_name_is_no_code(checkpoint, tmp_path):
    name = 'me/"""); raise SystemExit #'
    app = render_space(checkpoint, tmp_path, repo_id=name)[0].read_text(encoding="utf-8")
    compile(app, "app.py", "exec")
    assert json.dumps(name) in app


def test_the_version_of_gradio_is_the_tested_one():
    pytest.importorskip("gradio", reason="it is in the extra 'web'")
    assert importlib.metadata.version("gradio") == GRADIO_VERSION
