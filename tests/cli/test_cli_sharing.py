# SPDX-License-Identifier: Apache-2.0
"""`moellava card` and `moellava push`: to a Hub on this machine."""

import json
import os
import shutil
import subprocess
import threading

import pytest
from commands import SCRIPT, fails, run


pytest.importorskip("moellava.hub_cards.writing", reason="cards are not there")
hub_server = pytest.importorskip("hub_server", reason="pushing is not there")


def test_card(checkpoint, tmp_path):
    result = run("card", checkpoint, "--repo-id", "me/my-model")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("---\n")
    assert 'model="me/my-model"' in result.stdout

    result = run("card", checkpoint, "--out", tmp_path / "README.md", "--json")
    assert json.loads(result.stdout)["pipeline_tag"] == "image-text-to-text"
    assert "pipeline_tag: image-text-to-text" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_card_of_the_users_own_is_completed(checkpoint, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    assert run("card", checkpoint, "--out", tmp_path / "README.md").exit_code == 0
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: mit\nlibrary_name: transformers\n")
    assert card.endswith("---\nMine.\n")


def test_the_card_of_what_is_no_checkpoint(parts, tmp_path):
    assert "absent" in fails("card", tmp_path / "absent")
    assert "a model of type 'llama'" in fails("card", parts.language_model("llama"))


def test_space(checkpoint, tmp_path):
    result = run("space", checkpoint, tmp_path / "space", "--repo-id", "me/my-model")
    assert result.exit_code == 0, result.stderr
    files = [str(tmp_path / "space" / name) for name in ("app.py", "requirements.txt", "README.md")]
    assert result.stdout.splitlines() == files
    assert "me/my-model" in (tmp_path / "space" / "app.py").read_text(encoding="utf-8")
    (tmp_path / "space" / "app.py").write_text("mine")
    assert "has app.py already" in fails("space", checkpoint, tmp_path / "space", "--repo-id", "me/my-model")


@pytest.fixture(scope="module")
def server():
    server = hub_server.HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(server, *arguments, token=hub_server.OWNER_TOKEN):
    return run_with_hub(server, "push", *arguments, token=token)


def run_with_hub(server, *arguments, token=hub_server.OWNER_TOKEN):
    """Runs the command line with that Hub, whose address is read when a process starts."""
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": token,
    }
    return subprocess.run(
        [SCRIPT, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        timeout=1200,
        env={**os.environ, **environment},
    )


def test_push(server, checkpoint):
    done = push(server, checkpoint, "me/my-model", "--private", "--commit-message", "First", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["changed"] is True
    repository = server.repositories["me/my-model"]
    assert repository.private
    assert told["commit"] == repository.refs["main"]
    assert repository.at("main").summary == "First"
    assert {"config.json", "model.safetensors", "modeling_moellava.py"} <= set(repository.at("main").files)

    done = push(server, checkpoint, "me/my-model")
    assert (done.returncode, done.stdout) == (0, f"http://127.0.0.1:{server.server_port}/me/my-model\n")
    assert "nothing was committed" in done.stderr


@pytest.mark.parametrize("command", [("card",), ("space", "space")])
def test_card_and_space_of_a_private_repository(server, checkpoint, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert push(server, checkpoint, "me/hidden", "--private", "--revision", "v2").returncode == 0
    name, *out = command
    options = "--revision", "v2", "--token", hub_server.OWNER_TOKEN, "--cache-dir", tmp_path / "cache"
    done = run_with_hub(server, name, "me/hidden", *out, *options, token="hf_nobody")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("---\n") if name == "card" else (tmp_path / "space" / "app.py").is_file()
    assert (tmp_path / "cache" / "models--me--hidden").is_dir()


def test_push_what_may_not_be_pushed(server, checkpoint, tmp_path):
    assert "does not exist" in fails("push", tmp_path / "absent", "me/my-model")
    incomplete = shutil.copytree(checkpoint, tmp_path / "incomplete")
    (incomplete / "modeling_moellava.py").unlink()
    assert "modeling_moellava.py" in fails("push", incomplete, "me/my-model")
    done = push(server, checkpoint, "me/other", token="hf_nobody")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("Error: The push to me/other broke off (the Hub answered 403")
