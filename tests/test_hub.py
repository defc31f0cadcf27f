# SPDX-License-Identifier: Apache-2.0
"""Pushing to the Hub and loading from it, over the real client and HTTP, against the server of `hub_server.py`.

A process costs seconds, so each of the few here does many things and prints what came of them, and the tests look at
that, and at what the server holds.
"""

import io
import json
import shutil
import textwrap
import threading
from pathlib import Path

import PIL.Image
import pytest
from hub_server import OWNER_TOKEN, READER_TOKEN, Blob, Fault, HubServer, Repository
from huggingface_hub import save_torch_state_dict
from older import write_older, write_tower
from parts import picture, run_python
from safetensors.torch import load_file

from moellava import load_pretrained_model, push
from moellava.hub.pushing import checkpoint_files
from moellava.reading.sources import Source
from moellava.saving.weight_names import is_weight_file


STRAY = ("notes.txt", "train.py", "optimizer.pt", ".gitignore", "pictures/other.png")
CARD_ON_THE_HUB = "---\nlicense: mit\n---\n# Written on the Hub\n"
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
        exif = PIL.Image.Exif()
        exif[0x013B] = "PRIVATE"  # the artist
        picture(1).save(folder / "pictures" / name, exif=exif)
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
import dataclasses, json, os, resource, signal, time, urllib.request
from pathlib import Path
from huggingface_hub import HfApi
from huggingface_hub.utils import logging as hub_logging
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from moellava.cli import app
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

for step, options in (("command", []), ("command without leave", ["--token", {reader!r}])):
    ran = CliRunner().invoke(app, ["push", str(FOLDER), "me/command", "--private", "--json", *options])
    results[step] = {{"code": ran.exit_code, "out": ran.stdout, "said": ran.stderr}}

own_card = (FOLDER / "README.md").read_text()
(FOLDER / "README.md").unlink()
attempt("new card", "me/cards")
attempt("new card again", "me/cards")
hub = HfApi()
hub.upload_file(path_or_fileobj={card!r}.encode(), path_in_repo="README.md", repo_id="me/cards")
for name in ("mlx/model.safetensors.index.json", "model.fp16.safetensors"):
    hub.upload_file(path_or_fileobj=b"{{}}", path_in_repo=name, repo_id="me/cards")
attempt("card of the Hub", "me/cards")
(FOLDER / "README.md").write_text(own_card)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, unlimited[1]))
attempt("no room", "me/model", max_shard_size="200KB")
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

for number, fault in enumerate({faults!r}):
    new_weights(number)
    head = hub.model_info("me/private").sha
    faults(**fault)
    failed = attempt(f"fault {{number}}", "me/private")
    failed["kept"] = hub.model_info("me/private").sha == head
    attempt(f"after fault {{number}}", "me/private")

# The answer to the commit is lost, which has been made.
new_weights("lost")
head = hub.model_info("me/private").sha
faults(pattern="POST .*/commit/", status=-1)
lost = attempt("lost", "me/private")
lost["kept"] = hub.model_info("me/private").sha == head
attempt("after the loss", "me/private")

# What the client tries again by itself: an error and a dropped connection while parts are uploaded.
new_weights("retried")
faults(pattern="PUT /large/.*/2$", status=500)
faults(pattern="PUT /large/.*/4$", status=0)
attempt("retried", "me/private")

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
    (r"PUT /large/.*/9$", 400, "OSError", "the Hub answered 400"),
    (r"GET /api/models/me/private$", 404, "OSError", "Check the names of the repository and of the revision."),
]


@pytest.fixture(scope="module")
def pushed(server, checkpoint, tmp_path_factory):
    home = tmp_path_factory.mktemp("pusher")
    folder = Path(shutil.copytree(checkpoint, home / "checkpoint"))
    faults = [{"pattern": pattern, "status": status} for pattern, status, *_ in FAULTS]
    code = PUSHES.format(folder=str(folder), reader=READER_TOKEN, card=CARD_ON_THE_HUB, faults=faults)
    return last_line(run_python(code, block_moellava=False, env=server.environment(home)))


def test_a_push_is_one_commit_of_the_checkpoint_and_of_nothing_else(pushed, server, checkpoint):
    first, repository = pushed["first"], server.repositories["me/model"]
    commit = repository.commits[first["commit"]]
    assert first["changed"] and first["pull_request"] is None and first["url"] == f"{server.url}/me/model"
    assert (commit.summary, commit.description) == ("The first", "Of many")
    assert repository.commits[commit.parent].summary == "initial commit"

    assert set(commit.files) == {*first["files"], ".gitattributes"}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= set(commit.files)
    assert {"README.md", "pictures/shown.png", "pictures/too.png", "moellava_entry.py"} <= set(commit.files)
    assert set(first["left_out"]) == {*STRAY, "runs/"}
    for name in ("pictures/shown.png", "pictures/too.png"):
        sent = PIL.Image.open(io.BytesIO(commit.files[name].content))
        assert not sent.getexif() and sent.tobytes() == picture(1).tobytes()
        assert b"PRIVATE" in (checkpoint / name).read_bytes()  # nothing is changed in the folder
    for name in set(first["files"]) - {"README.md", "pictures/shown.png", "pictures/too.png"}:
        assert commit.files[name].content == (checkpoint / name).read_bytes(), name


def test_the_card_that_somebody_wrote_is_pushed_completed(pushed, server, checkpoint):
    pushed_card = server.files("me/model", pushed["first"]["commit"])["README.md"].content.decode()
    metadata, _, body = pushed_card.removeprefix("---\n").partition("---\n")
    assert body == CARD.removeprefix("---\n").partition("---\n")[2]
    assert "license: mit\n" in metadata and "library_name: transformers\n" in metadata
    assert (checkpoint / "README.md").read_text() == CARD

    new = server.files("me/cards", pushed["new card"]["commit"])["README.md"].content.decode()
    assert 'from_pretrained("me/cards"' in new and "Written on the Hub" not in new
    kept = server.files("me/cards", pushed["card of the Hub"]["commit"])["README.md"].content.decode()
    assert kept.endswith("---\n# Written on the Hub\n") and "library_name: transformers" in kept


def test_the_command(pushed, server):
    command, refused = pushed["command"], pushed["command without leave"]
    assert command["code"] == 0, command["said"]
    report = json.loads(command["out"])
    assert report["changed"] and report["commit"] == server.repositories["me/command"].refs["main"]
    assert server.repositories["me/command"].private
    assert refused["code"] == 1 and "Error: The push to me/command broke off (the Hub answered 403: " in refused["said"]


def test_an_identical_push_says_so_and_commits_nothing(pushed, server):
    for step, earlier in (("again", "first"), ("sharded again", "sharded"), ("new card again", "new card")):
        assert not pushed[step]["changed"] and pushed[step]["commit"] == pushed[earlier]["commit"]
    nothing = pushed["pull request of nothing"]
    assert not nothing["changed"] and nothing["pull_request"] is None
    assert [commit.summary for commit in server.repositories["me/model"].commits.values()][1:3] == [
        "The first", "Upload model",
    ]  # fmt: skip


def test_no_weights_of_an_earlier_push_stay(pushed, server):
    shards = {f"model-0000{n}-of-00007.safetensors" for n in range(1, 8)} | {"model.safetensors.index.json"}
    assert weights(server, "me/model", pushed["first"]["commit"]) == {"model.safetensors"}
    assert weights(server, "me/model", pushed["sharded"]["commit"]) == shards
    assert pushed["sharded"]["deleted"] == ["model.safetensors"] and pushed["sharded again"]["deleted"] == []
    assert weights(server, "me/model", pushed["whole"]["commit"]) == {"model.safetensors"}
    assert set(pushed["whole"]["deleted"]) == shards
    assert pushed["card of the Hub"]["deleted"] == ["model.fp16.safetensors"]
    assert "mlx/model.safetensors.index.json" in server.files("me/cards")


def test_branches_and_pull_requests(pushed, server):
    repository = server.repositories["me/model"]
    assert pushed["pull request"]["pull_request"] == f"{server.url}/me/model/discussions/1"
    assert repository.refs["main"] == pushed["whole"]["commit"]
    assert repository.refs["refs/pr/1"] == pushed["pull request"]["commit"]
    assert repository.refs["for/sharded"] == pushed["branch"]["commit"]
    assert repository.at("for/sharded").parent == repository.refs["main"]
    missing = pushed["pull request against no branch"]
    assert missing["error"] == "OSError" and "the Hub answered 404" in missing["text"]
    assert "missing" not in repository.refs


def test_private_repositories_and_tokens(pushed, server):
    assert server.repositories["me/private"].private and not server.repositories["me/model"].private
    refused = pushed["private where it is public"]
    assert refused["error"] == "ValueError"
    assert refused["text"].startswith(
        "me/model exists and is public; private=True can only be had of a new repository."
    )
    for step, status in (("without a token", 401), ("another's token", 403)):
        assert pushed[step]["error"] == "PermissionError"
        assert f"the Hub answered {status}: " in pushed[step]["text"]
        assert "The repository is as it was. Log in with `hf auth login`, or give a token" in pushed[step]["text"]
    assert pushed["no id"]["error"] == "HFValidationError" and "me/no/id" in pushed["no id"]["text"]


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[f"{what} {status}" for what, status, *_ in FAULTS])
def test_a_push_that_fails_changes_nothing_and_the_next_one_succeeds(pushed, server, number):
    _, _, error, text = FAULTS[number]
    failed, after = pushed[f"fault {number}"], pushed[f"after fault {number}"]
    assert (failed["error"], failed["kept"]) == (error, True)
    assert failed["text"].startswith("The push to me/private broke off (") and text in failed["text"]
    assert after["changed"] and after["commit"] in server.repositories["me/private"].commits


def test_a_lost_answer_a_hiccup_and_a_kill(pushed, server):
    assert pushed["lost"]["error"] == "ConnectionError" and not pushed["lost"]["kept"]
    assert "or holds the whole commit where only the answer to it was lost" in pushed["lost"]["text"]
    assert not pushed["after the loss"]["changed"]
    assert pushed["retried"]["changed"]
    assert pushed["killed"]["kept"] and pushed["after the kill"]["changed"]
    assert server.repositories["me/private"].refs["main"] == pushed["after the kill"]["commit"]


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with a folder is said before anything is sent
# ---------------------------------------------------------------------------------------------------------------------


def _without(name):
    return lambda folder: (folder / name).unlink()


def _with_config(**fields):
    def change(folder):
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    return change


def _cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _sharded_without_one(folder):
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _weights_with_a_dot(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / ".secret.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, ".secret.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "error", "text"),
    [
        (shutil.rmtree, FileNotFoundError, "does not exist: expected a folder with a model"),
        (_without("config.json"), ValueError, "is no model: it has no config.json"),
        (_with_config(model_type="llama"), ValueError, "is a model of type 'llama', not a checkpoint of this package"),
        (_without("model.safetensors"), FileNotFoundError, "has no weights: expected model.safetensors or"),
        (
            _sharded_without_one,
            FileNotFoundError,
            "lacks model-00001-of-00002.safetensors, which its model",
        ),
        (_weights_with_a_dot, ValueError, "names '.secret.safetensors'; a file that begins with a dot is never sent"),
        (_cut_off, ValueError, "it is cut off or damaged. Save or download it again."),
        (_without("tools_moellava.py"), FileNotFoundError, "lacks tools_moellava.py, which its code needs."),
        (_without("moellava_entry.py"), FileNotFoundError, "lacks moellava_entry.py, which its code needs."),
        (_with_config(auto_map=None), ValueError, "names no code in the checkpoint (its auto_map is None)"),
        (
            _with_config(auto_map={"AutoConfig": "me/other--moellava_entry.MoellavaConfig"}),
            ValueError,
            "names no code in the checkpoint (its auto_map is {'AutoConfig': 'me/other--",
        ),
        (_without("processor_config.json"), ValueError, "has no processor_config.json: whoever loads it could not ask"),
        (_adapter, ValueError, "is an adapter, which is no model by itself. Push it with PEFT's push_to_hub"),
    ],
)
def test_an_incomplete_checkpoint_is_not_sent(checkpoint, tmp_path, damage, error, text):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    damage(folder)
    with pytest.raises(error) as raised:
        push(folder, "me/damaged")
    assert text in str(raised.value)


def test_a_checkpoint_that_lies_in_shards_is_sent_with_their_index(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(weights, folder, max_shard_size="200KB")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of another save")
    shards = {path.name for path in folder.glob("model-*-of-0000[3-9].safetensors")}
    files = set(checkpoint_files(Source(folder)))
    assert len(shards) > 2
    assert {name for name in files if is_weight_file(name)} == {*shards, "model.safetensors.index.json"}
    assert files - shards - {"model.safetensors.index.json"} == {*checkpoint_files(Source(checkpoint))} - {
        "model.safetensors"
    }


# ---------------------------------------------------------------------------------------------------------------------
# What may be published
# ---------------------------------------------------------------------------------------------------------------------

LICENCE = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software"
SHOWN = """# Mine

![key](id_rsa) ![data](patients.csv) ![there](sub/../patients.csv) <img src='.env'> <img alt="" src=".hidden/scan.png">
![fake](fake.png) ![program](program.png) ![drawing](drawing.svg) ![out](../outside.png) ![abs](@/outside.png)
![token](.cache/huggingface/token) ![x](trainer_state.json) ![with blank](my%20scan.png) ![fine](figures/scan.webp)
"""
STAYS = (
    "id_rsa", "patients.csv", ".env", ".hidden/scan.png", "fake.png", "program.png", "drawing.svg", "LICENSE.key",
    "LICENSE.pem", "LICENSE_KEY.txt", "LICENSE", "COPYING", "NOTICE_OF_TERMINATION.txt", ".cache/huggingface/token",
    "trainer_state.json", "training_args.bin", "tokenizer_secrets.json", "additional_chat_templates/notes.txt",
    "run.py", "figures/other.webp", ".README.md", "optimizer.safetensors",
)  # fmt: skip
GOES = ("LICENSE.txt", "LICENSE-MIT", "LICENCE.md", "notice", "USE_POLICY.md", "my scan.png", "figures/scan.webp")


@pytest.fixture
def crowded(checkpoint, tmp_path) -> Path:
    """A checkpoint among whatever people keep in such a folder."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    (folder / "README.md").write_text(SHOWN.replace("@", str(tmp_path)))
    for name in STAYS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("PRIVATE KEY of a license")
    for path in (tmp_path / "outside.png", folder / ".hidden/scan.png", folder / "figures/other.webp"):
        picture(1).save(path)
    (folder / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    (folder / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "COPYING").write_bytes(b"\x89\xff license")
    for name in GOES:
        if name.endswith((".png", ".webp")):
            picture(1).save(folder / name)
        else:
            (folder / name).write_text(LICENCE)
    return folder


def test_files_are_chosen_by_what_they_are(crowded, checkpoint):
    files = set(checkpoint_files(Source(crowded)))
    assert files.isdisjoint(STAYS)
    shown = {"pictures/shown.png", "pictures/too.png"}
    assert files == {*checkpoint_files(Source(checkpoint)), *GOES} - shown
    assert not any(name.startswith(("/", ".")) for name in files)


@pytest.mark.parametrize(
    "include, more",
    [
        (["patients.csv"], {"patients.csv"}),
        (["./patients.csv", "run.py"], {"patients.csv", "run.py"}),
        (["runs"], {"runs/first/config.json", "runs/first/events"}),
        (["runs/"], {"runs/first/config.json", "runs/first/events"}),
        (["*.webp", "*.csv"], {"figures/other.webp", "patients.csv"}),
        (["train*.bin"], {"training_args.bin"}),
    ],
)
def test_more_is_sent_by_name(crowded, include, more):
    files = set(checkpoint_files(Source(crowded)))
    assert set(checkpoint_files(Source(crowded), include)) - files == more


@pytest.mark.parametrize(
    "pattern", [".env", ".*", "*token", ".cache/*", ".hidden/", "missing", "../outside.png", "/etc/passwd", ""]
)
def test_what_begins_with_a_dot_or_is_not_there_cannot_be_included(crowded, pattern):
    with pytest.raises(ValueError, match="has no such file to send.* What begins with a dot is never sent"):
        push(crowded, "me/nothing", include=pattern)
    everything = set(checkpoint_files(Source(crowded), ["*"]))
    assert {"patients.csv", "id_rsa"} <= everything and not any(
        part.startswith(".") for name in everything for part in name.split("/")
    )


@pytest.mark.parametrize("name", ["figures/scan.webp", "LICENSE.txt", "patients.csv", "README.md", "tokenizer.json"])
def test_no_link_out_of_the_folder_is_sent_or_followed(crowded, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_text("PRIVATE")
    (crowded / name).unlink()
    (crowded / name).symlink_to(secret)
    with pytest.raises(ValueError, match=f"is a link to {secret}, outside of the checkpoint. Nothing was sent"):
        push(crowded, "me/nothing", include="patients.csv")


def test_a_linked_folder_is_not_entered(crowded, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    picture(1).save(tmp_path / "elsewhere" / "scan.png")
    (crowded / "linked").symlink_to(tmp_path / "elsewhere")
    (crowded / "README.md").write_text("![x](linked/scan.png)")
    assert not any(name.startswith("linked") for name in checkpoint_files(Source(crowded), ["*"]))


def test_what_is_left_out_is_listed(crowded, server, tmp_path):
    code = """
    from typer.testing import CliRunner
    from moellava.cli import app
    ran = CliRunner().invoke(app, ["push", {folder!r}, "me/crowded", "--include", "*.csv", "--include", "run.py"])
    print(ran.output)
    print(ran.exit_code)
    """
    code = textwrap.dedent(code).format(folder=str(crowded))
    said = run_python(code, block_moellava=False, env=server.environment(tmp_path))
    assert said.splitlines()[-1] == "0", said
    assert "Not sent, since it is no part of the checkpoint: .README.md, .cache/, .env, .gitignore, .hidden/" in said
    sent = set(server.files("me/crowded")) - {".gitattributes"}
    assert {"patients.csv", "run.py", *GOES} <= sent
    assert sent.isdisjoint({*STAYS} - {"patients.csv", "run.py"})
    for name in {*STAYS} - {"patients.csv", "run.py"}:
        assert name in said or f"{name.partition('/')[0]}/" in said


def test_a_hub_id_is_no_checkpoint_to_push(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder 'me/model': expected a checkpoint that was saved"):
        push("me/model", "me/copy")


def test_offline_nothing_is_pushed(checkpoint):
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        push(checkpoint, "me/model")


# ---------------------------------------------------------------------------------------------------------------------
# push_to_hub of model and processor
# ---------------------------------------------------------------------------------------------------------------------

OWN_PROJECTOR = """
from torch import nn
from moellava import register_projector


@register_projector("gated_on_the_hub")
class GatedProjector(nn.Module):
    def __init__(self, vision_hidden_size, text_hidden_size):
        super().__init__()
        self.linear = nn.Linear(vision_hidden_size, text_hidden_size)

    def forward(self, x):
        return self.linear(x)
"""

# Folders of the repository's name, and of the save, in which a user keeps more.
PRIVATE = """
from pathlib import Path
for folder in {folders!r}:
    for name in ("patients.csv", "LICENSE.key", ".env", ".cache/huggingface/token", "sub/id_rsa"):
        (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_text("PRIVATE: not for the Hub")
    (Path(folder) / "README.md").write_text("![x](patients.csv) <img src='.env'> ![x](sub/id_rsa)")
"""
MODEL = """
import json, logging, os, sys
os.chdir({home!r})
sys.path.insert(0, {home!r})
import gated_projector
from moellava import load_pretrained_model

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("huggingface_hub").addHandler(handler)
model = load_pretrained_model({config!r}, projector_type="gated_on_the_hub", device="cpu").model
first = model.push_to_hub(
    "me/own", private=True, commit_message="My own", commit_description="In one", tags=["own"], token={owner!r}
)
again = model.push_to_hub("me/own", token={owner!r})
model.processor.push_to_hub("me/own", token={owner!r})
model.processor.push_to_hub("me/processor", token={owner!r}, private=True)
model.save_pretrained(
    {home!r} + "/saved", push_to_hub=True, repo_id="me/own", token={owner!r}, max_shard_size="200KB", revision="sharded"
)
asked = model.push_to_hub("me/own", token={owner!r}, create_pr=True, max_shard_size="200KB")
print(json.dumps({{"first": first.oid, "again": again.oid, "asked": asked.oid, "pr": asked.pr_url, "said": said}}))
"""


@pytest.fixture(scope="module")
def model_pushed(server, parts, tmp_path_factory):
    home = tmp_path_factory.mktemp("model")
    (home / "gated_projector.py").write_text(OWN_PROJECTOR)
    config = {
        "model_name_or_path": str(parts.language_model("llama")),
        "mm_vision_tower": str(parts.vision_tower("clip")),
    }
    code = PRIVATE.format(folders=[str(home / name) for name in ("own", "processor", "saved", "me/own")])
    code += MODEL.format(home=str(home), config=config, owner=OWNER_TOKEN)
    return last_line(run_python(code, block_moellava=False, env=server.environment(home, token=None)))


def test_a_model_pushes_itself_its_processor_and_its_own_parts_in_one_commit(model_pushed, server):
    repository = server.repositories["me/own"]
    assert repository.private
    commit = repository.commits[model_pushed["first"]]
    assert (commit.summary, commit.description) == ("My own", "In one")
    assert repository.commits[commit.parent].summary == "initial commit"
    names = {"model.safetensors", "processor_config.json", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert names | {"moellava_entry.py", "moellava_custom.py", "custom_gated_projector.py"} <= set(commit.files)
    assert b"- own" in commit.files["README.md"].content


def test_a_model_that_is_pushed_again_commits_nothing_and_says_so(model_pushed, server):
    assert model_pushed["again"] == model_pushed["first"] == server.repositories["me/own"].refs["main"]
    assert any(text.startswith("No files have been modified since last commit") for text in model_pushed["said"])


def test_a_processor_pushed_alone_keeps_the_parts_of_the_model(model_pushed, server):
    assert b"GatedProjector" in server.files("me/own")["moellava_custom.py"].content
    alone = set(server.files("me/processor"))
    assert {"processor_config.json", "moellava_entry.py", "processing_moellava.py"} <= alone
    assert alone.isdisjoint({"moellava_custom.py", "modeling_moellava.py", "parts_moellava.py"})
    assert weights(server, "me/processor") == set()


def test_a_model_in_shards_leaves_no_single_file_beside_them(model_pushed, server):
    repository = server.repositories["me/own"]
    assert repository.refs["refs/pr/1"] == model_pushed["asked"] and model_pushed["pr"].endswith("/discussions/1")
    for revision in ("sharded", "refs/pr/1"):
        assert "model.safetensors.index.json" in weights(server, "me/own", revision)
        assert "model.safetensors" not in weights(server, "me/own", revision)


# ---------------------------------------------------------------------------------------------------------------------
# Loading by id
# ---------------------------------------------------------------------------------------------------------------------

LOAD = """
import json, resource
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline

picture = Image.open({picture!r})
result = {{}}


def answer(name, auto=AutoModelForImageTextToText, **options):
    model = auto.from_pretrained(name, trust_remote_code=True, **options)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, **options)
    inputs = processor(images=picture, text="<image> what?", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
    return model, processor, tokens


def failure(name, **options):
    try:
        answer(name, **options)
    except Exception as error:
        return {{"os_error": isinstance(error, OSError), "text": str(error)}}
    return None


if {online!r}:
    # The disk takes no file of more than 600 kB, and then it does again.
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, unlimited[1]))
    result["full"] = failure("me/model")
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    result["local"] = answer({checkpoint!r})[2]
    result["no token"] = failure("me/own")
result["whole"] = answer("me/model", AutoModelForCausalLM)[2]
result["branch"] = answer("me/model", revision="for/sharded")[2]
result["commit"] = answer("me/model", revision={first!r})[2]
ask = pipeline("image-text-to-text", model="me/model", trust_remote_code=True)
question = [{{"type": "image", "image": picture}}, {{"type": "text", "text": "what?"}}]
result["pipeline"] = ask(text=[{{"role": "user", "content": question}}], max_new_tokens=4)[0]["generated_text"][-1]
model, processor, result["own"] = answer("me/own", token={reader!r})
if {online!r}:
    model.push_to_hub("me/copy", token={owner!r})
    processor.push_to_hub("me/copy", token={owner!r})
    model.push_to_hub("me/copy", token={owner!r}, max_shard_size="200KB")
    result["copy"] = answer("me/copy")[2]
print(json.dumps(result))
"""


def a_shard(server):
    return server.files("me/model", "for/sharded")["model-00003-of-00007.safetensors"]


@pytest.fixture(scope="module")
def loaded(server, pushed, model_pushed, checkpoint, tmp_path_factory):
    """What a process that has only transformers gets from a Hub that it has never seen, and the next one offline."""
    home = tmp_path_factory.mktemp("loader")
    picture(3).save(home / "picture.png")
    names = {"checkpoint": str(checkpoint), "first": pushed["first"]["commit"], "picture": str(home / "picture.png")}
    names |= {"reader": READER_TOKEN, "owner": OWNER_TOKEN}
    environment = server.environment(home, token=None)
    server.faults.append(Fault(f"GET /large/{a_shard(server).sha256}", -3))
    private = PRIVATE.format(folders=["copy"])
    online = last_line(run_python(private + LOAD.format(online=True, **names), env=environment))
    seen = len(server.requests)
    environment |= {"HF_HUB_OFFLINE": "1"}
    offline = last_line(run_python(LOAD.format(online=False, **names), env=environment))
    assert len(server.requests) == seen
    return online, offline


def test_loading_by_id_without_the_package(loaded):
    online, _ = loaded
    assert online["whole"] == online["branch"] == online["commit"] == online["local"]
    assert online["pipeline"]["role"] == "assistant"
    assert len(online["own"]) == 4


def test_a_private_repository_needs_the_token(loaded):
    online, _ = loaded
    assert online["no token"]["os_error"] and "me/own" in online["no token"]["text"]


def test_loading_offline_from_a_warm_cache(loaded):
    online, offline = loaded
    assert offline == {name: online[name] for name in ("whole", "branch", "commit", "pipeline", "own")}


def test_a_full_disk_leaves_a_cache_that_can_be_used(loaded, pushed):
    online, _ = loaded
    assert online["full"]["os_error"] and "File too large" in online["full"]["text"]
    assert online["whole"] == online["local"]
    assert pushed["no room"]["error"] == "OSError"
    assert pushed["no room"]["text"].startswith("The shards of ")
    assert (
        "Free space there, or set TMPDIR to a folder on a larger disk. Nothing was sent." in pushed["no room"]["text"]
    )


def test_a_download_that_breaks_off_is_taken_up_again(loaded, server):
    online, _ = loaded
    assert server.requests.count(f"GET /large/{a_shard(server).sha256}") >= 2
    assert online["branch"] == online["local"]


def test_a_model_loaded_from_the_hub_can_be_pushed_without_the_package(loaded, server):
    online, _ = loaded
    assert online["copy"] == online["own"]
    assert b"GatedProjector" in server.files("me/copy")["moellava_custom.py"].content
    # transformers' own push, which takes no file of an earlier one away.
    assert "model.safetensors.index.json" in weights(server, "me/copy")


def test_nothing_of_a_users_folders_is_pushed_along(loaded, model_pushed, pushed, server):
    """By model, processor and save_pretrained(push_to_hub=True), with the package and by the checkpoint's own code."""
    for name in ("me/own", "me/processor", "me/copy"):
        repository = server.repositories[name]
        for ref in repository.refs:
            for path, file in server.files(name, ref).items():
                assert b"PRIVATE" not in file.content, (name, ref, path)
                assert path == ".gitattributes" or not path.startswith("."), path


OURS = """
import json, resource
from PIL import Image
from moellava import inspect_checkpoint, load_pretrained_model

picture = Image.open({picture!r})
result = {{}}


def answer(name, **options):
    model = load_pretrained_model(name, device="cpu", **options).model
    inputs = model.processor(images=picture, text="<image> what?", return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist()


# The disk takes no file of more than 600 kB, and then it does again.
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, unlimited[1]))
try:
    answer("me/private", token={reader!r})
except OSError as error:
    result["full"] = str(error)
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
result["private"] = answer("me/private", token={reader!r})
result["sharded"] = answer("me/model", revision="for/sharded")
result["own"] = answer("me/own", revision="sharded", token={reader!r}, trust_remote_code=True)
result["cached"] = answer("me/private", local_files_only=True)
summary = inspect_checkpoint("me/model", revision="for/sharded")
result["inspected"] = [summary.parameters.total, summary.bytes.disk]
for step, name, options in (
    ("no token", "me/processor", {{}}), ("wrong revision", "me/model", {{"revision": "missing"}}),
):
    try:
        load_pretrained_model(name, device="cpu", **options)
    except OSError as error:
        result[step] = str(error)
print(json.dumps(result))
"""


def test_load_pretrained_model_by_id(server, loaded, checkpoint, tmp_path):
    picture(3).save(tmp_path / "picture.png")
    code = OURS.format(picture=str(tmp_path / "picture.png"), reader=READER_TOKEN)
    result = last_line(run_python(code, block_moellava=False, env=server.environment(tmp_path, token=None)))
    online, _ = loaded
    assert result["private"] == result["sharded"] == result["cached"] == online["local"]
    assert result["own"] == online["own"]
    assert server.ranges  # headers are fetched, not whole files
    total, size = result["inspected"]
    assert total > 100_000
    assert size == sum(
        len(blob.content) for name, blob in server.files("me/model", "for/sharded").items() if blob.is_large
    )
    assert "me/processor" in result["no token"] and "missing" in result["wrong revision"]
    assert result["full"].startswith("model.safetensors of me/private cannot be stored in ")
    assert "(File too large). Free space there, or set HF_HOME or cache_dir to a folder" in result["full"]


PARTS_BY_ID = """
import json, sys
sys.path.insert(0, {folder!r})
import torch
import encoder_of_an_older_shape
from moellava import inspect_checkpoint, load_pretrained_model


def logits(name, **options):
    model = load_pretrained_model(name, device="cpu", **options).model
    with torch.no_grad():
        return model(input_ids=torch.tensor([[17, 203, 45]])).logits[0, -1, :9].tolist()


def features(name, **options):
    options |= {{"encoder_type": "older_shape", "mm_vision_tower": name}}
    model = load_pretrained_model({language!r}, device="cpu", **options).model
    with torch.no_grad():
        encoded = model.model.encoder.encode(model.model.vision_tower, torch.ones(1, 3, 32, 32))
        return encoded.last_hidden_state[0, 0, :9].tolist()


result = {{
    "older": [logits({older!r}), logits("me/older", token={reader!r})],
    "tower": [features({tower!r}), features("me/tower", token={reader!r})],
}}
for name in ("me/bins", "me/damaged"):
    try:
        inspect_checkpoint(name)
    except ValueError as error:
        result[name] = str(error)
print(json.dumps(result))
"""

ENCODER = """
from transformers import AutoImageProcessor, AutoModel
from moellava import register_encoder


@register_encoder("older_shape")
class Encoder:
    def __init__(self, path, config=None):
        self.path, self.is_loaded = path, False

    def load_model(self):
        self.model = AutoModel.from_pretrained(self.path)
        self.image_processor = AutoImageProcessor.from_pretrained(self.path)
        self.is_loaded = True

    def forward(self, images):
        return self.model(images).last_hidden_state
"""


def put(server: HubServer, name: str, files: dict[str, bytes], private: bool = False) -> None:
    """A repository with some files."""
    server.repositories[name] = Repository(name, private)
    server.repositories[name].commit("main", {path: Blob(content) for path, content in files.items()}, None, "files")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_parts_and_older_checkpoints_by_id(server, parts, checkpoint, tmp_path):
    """A class of the older builder's shape knows no options of the Hub: it is given the folder that was downloaded."""
    older = write_older(tmp_path / "older", "phi", tower_folder=write_tower(tmp_path / "clip"), moe={}).folder
    tower, config = parts.vision_tower("dinov2"), (checkpoint / "config.json").read_bytes()
    put(server, "me/older", files_of(older), private=True)
    put(server, "me/tower", files_of(tower), private=True)
    put(server, "me/bins", {"config.json": config, "pytorch_model.bin": b"no header"})
    put(server, "me/damaged", {"config.json": config, "model.safetensors": b"\xff" * 100})
    (tmp_path / "encoder_of_an_older_shape.py").write_text(ENCODER, encoding="utf-8")
    names = {"folder": tmp_path, "language": parts.language_model("llama"), "older": older, "tower": tower}
    code = PARTS_BY_ID.format(reader=READER_TOKEN, **{key: str(path) for key, path in names.items()})
    environment = server.environment(tmp_path / "home", token=None)
    result = last_line(run_python(code, block_moellava=False, env=environment))
    for local, by_id in (result["older"], result["tower"]):
        assert local == by_id
    assert result["me/bins"].startswith("me/bins has no safetensors weights, whose headers could be read. Download")
    assert result["me/damaged"].startswith("The weights of me/damaged are damaged: ")
