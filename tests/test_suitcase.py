# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint carries: the code of its own parts and no other, wherever it has been, and none that acts.

A checkpoint is saved where moellava is installed and where it is not, changed in between, and saved again over what is
there. Two processes without the package do all that is done there, since each costs seconds.
"""

import ast
import copy
import importlib
import io
import os
import pickle
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from kept_checkpoints import CHECKPOINTS
from parts import pictures, run_python
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from moellava import MoellavaConfig, MoellavaForCausalLM, MoellavaProcessor, load_pretrained_model, upcycle
from moellava.parts.parts_moellava import ENCODERS, PROJECTORS
from moellava.saving.export import code_of, code_of_processor, travelling_files


KEPT = sorted(path for path in (CHECKPOINTS / "0.1.0").iterdir() if path.is_dir())
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "layers": "dense"}
KINDS = ["dense", "sparse", "user"]
MADE = ["assembled", "of its config", "loaded", "by AutoModel"]
QFORMER = {"type": "qformer", "num_query_tokens": 4, "qformer_hidden_size": 32}

GATED = """\
from torch import nn

from moellava import register_projector


@register_projector("suitcase_gated")
class GatedProjector(nn.Module):
    def __init__(self, vision_hidden_size, text_hidden_size):
        super().__init__()
        self.linear = nn.Linear(vision_hidden_size, text_hidden_size)
        self.gate = nn.Linear(vision_hidden_size, text_hidden_size)

    def forward(self, features):
        return self.linear(features) * self.gate(features).sigmoid()
"""
PATCHES = """\
from torch import nn

from moellava import register_encoder

from .sizes import PATCH


@register_encoder("suitcase_patches")
class Patches(nn.Module):
    def __init__(self, image_size=32, hidden_size=24):
        super().__init__()
        self.embed = nn.Conv2d(3, hidden_size, PATCH, stride=PATCH)

    def forward(self, pixel_values):
        return self.embed(pixel_values).flatten(2).transpose(1, 2)
"""


def code_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.py")}


def bytes_of_code(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.py")}


def imported_from_the_entry(folder: Path) -> set[str]:
    """The files that are reached from the entry, as transformers finds them: every relative import, late ones too."""
    reached, waiting = set(), ["moellava_entry"]
    while waiting:
        name = f"{waiting.pop()}.py"
        if name in reached:
            continue
        reached.add(name)
        for node in ast.walk(ast.parse((folder / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, (name, ast.unparse(node))
                waiting += [node.module] if node.module else [alias.name for alias in node.names]
    return reached


def assert_packed(folder: Path, model: MoellavaForCausalLM) -> None:
    """The code in a folder is that of the model, each file reached from the entry, and no other is there."""
    assert code_in(folder) == imported_from_the_entry(folder) == set(code_of(model.config))
    for name, source in code_of(model.config).items():
        assert (folder / name).read_text(encoding="utf-8") == source, name


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


@pytest.fixture(scope="module")
def question():
    """The inputs of every model here: all have 32 x 32 pictures."""

    def ask(processor) -> dict[str, torch.Tensor]:
        return dict(processor(images=pictures(1), text="<image> What is it?", return_tensors="pt"))

    return ask


@pytest.fixture(scope="module")
def user_parts(tmp_path_factory):
    """A projector in a file of its own, and an encoder in a package with a second file."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "suitcase_gated.py").write_text(GATED)
    (folder / "suitcase_kit").mkdir()
    (folder / "suitcase_kit" / "__init__.py").touch()
    (folder / "suitcase_kit" / "sizes.py").write_text("PATCH = 8\n")
    (folder / "suitcase_kit" / "patches.py").write_text(PATCHES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for table in (ENCODERS, PROJECTORS):
            for entries in ("_classes", "_answers"):
                patch.setattr(table, entries, dict(getattr(table, entries)))
        for name in ("suitcase_gated", "suitcase_kit.patches"):
            importlib.import_module(name)
        yield
        for name in [name for name in sys.modules if name.startswith("suitcase_")]:
            del sys.modules[name]


def assembled(parts, name: str) -> MoellavaForCausalLM:
    """A new model of a kind, with its processor."""
    sources = {
        "dense": (parts.language_model("llama"), parts.vision_tower("clip_vision"), {"projector_type": "mlp"}),
        "sparse": (
            parts.language_model("qwen2"),
            parts.vision_tower("siglip_vision"),
            {"projector_config": QFORMER, "moe_config": MOE},
        ),
        "user": (
            parts.language_model("llama"),
            None,
            {"encoder_type": "suitcase_patches", "projector_type": "suitcase_gated"},
        ),
    }
    language_model, tower, fields = sources[name]
    if tower is not None:
        fields["mm_vision_tower"] = tower
    return load_pretrained_model(language_model, device="cpu", **fields).model


@pytest.fixture(scope="module")
def models(parts, user_parts) -> dict[str, MoellavaForCausalLM]:
    """A model of every kind, shared."""
    return {name: assembled(parts, name) for name in KINDS}


# ---------------------------------------------------------------------------------------------------------------------
# What travels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "carried"),
    [
        ("dense", {"clip_encoder", "mlp_projector", "vision_encoder"}),
        (
            "sparse",
            {"siglip_encoder", "vision_encoder", "qformer_projector", "sparse_layers", "moe_block", "experts"},
        ),
        ("user", {"user_encoder", "user_projector", "vision_encoder"}),
    ],
)
def test_a_checkpoint_holds_the_code_of_its_parts_and_no_other(models, tmp_path, name, carried):
    model = models[name]
    model.save_pretrained(tmp_path)
    assert_packed(tmp_path, model)
    names = {"clip", "siglip", "vit", "dinov2", "auto", "biomedclip"}
    optional = {f"{part}_encoder" for part in names} | {f"{part}_projector" for part in PROJECTORS.names()}
    optional |= {"sparse_layers", "moe_block", "experts", "modular_experts", "quantised", "user_encoder_config"}
    optional |= {"user_encoder", "user_projector", "legacy_encoder", "older_qformer_projector", "attention_parts"}
    held = {file.removesuffix("_moellava.py") for file in code_in(tmp_path)}
    expected = carried | {"dense": set(), "sparse": {"attention_parts"}, "user": {"user_encoder_config"}}[name]
    assert held & (optional | {"vision_encoder"}) == expected
    is_custom = {file for file in code_in(tmp_path) if file.startswith(("custom_", "moellava_"))}
    own = {"custom_suitcase_gated.py", "custom_patches.py", "custom_sizes.py", "moellava_api.py", "moellava_custom.py"}
    assert is_custom == {"moellava_entry.py"} | (own if name == "user" else set())


def test_every_file_that_may_travel_is_needed_by_some_part():
    """Of what is not reached by a config, a model or a processor, every file belongs to a part of the table."""
    table = "parts_moellava.py"
    folder = {name: path.read_text(encoding="utf-8") for name, path in travelling_files().items()}
    reached, waiting = set(), ["configuration_moellava", "modeling_moellava", "processing_moellava"]
    while waiting:
        name = f"{waiting.pop()}.py"
        if name not in reached:
            reached.add(name)
            imports = [node for node in ast.walk(ast.parse(folder[name])) if isinstance(node, ast.ImportFrom)]
            waiting += [node.module.rpartition(".")[2] for node in imports if node.level]
    assert table in reached
    user = {"user_encoder_moellava.py", "user_projector_moellava.py", "legacy_encoder_moellava.py"}
    assert set(folder) - reached - user == {"user_parts_moellava.py"} - reached


# What a model has no need to do, by the name that is called, imported or taken from a module.
ACTS = {
    "CDLL", "rmtree", "urlopen", "create_commit", "CommitOperation", "CommitOperationAdd", "CommitOperationCopy",
    "CommitOperationDelete", "delete_file", "delete_folder", "upload_file", "upload_folder", "import_module",
    "__import__", "unparse", "NodeTransformer", "NodeVisitor", "unlink", "rmdir", "removedirs", "renameat2", "system",
    "Popen", "spec_from_file_location", "exec_module",
}  # fmt: skip
CALLED = {"exec", "eval", "compile"}
MODULES = {
    "ast", "ctypes", "importlib", "runpy", "socket", "subprocess", "tokenize", "urllib", "http",
    "requests", "httpx", "huggingface_hub",
}  # fmt: skip
# The checks of a config's fields, and what is raised where one is wrong.
HARMLESS = {"huggingface_hub.dataclasses", "huggingface_hub.errors"}


def acts_in(source: str) -> list[str]:
    """What a file does that a model has no need to do, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names if alias.name in ACTS]
            if node.level == 0 and node.module.partition(".")[0] in MODULES and node.module not in HARMLESS:
                names.append(node.module)
        elif isinstance(node, ast.Attribute) and node.attr in ACTS:
            names = [node.attr]
        elif isinstance(node, ast.Name) and node.id in ACTS:
            names = [node.id]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLED:
            names = [node.func.id]
        found += [f"{node.lineno}: {name}" for name in names]
    return found


def test_what_acts_is_found():
    assert acts_in("import ctypes.util") == ["1: ctypes.util"]
    assert acts_in("from urllib.request import urlopen") == ["1: urlopen", "1: urllib.request"]
    assert acts_in("import shutil\nshutil.rmtree('x')") == ["2: rmtree"]
    assert acts_in("__import__('x')") == ["1: __import__"] and acts_in("exec('y')") == ["1: exec"]
    assert acts_in("from importlib import import_module") == ["1: import_module", "1: importlib"]
    assert acts_in("model.eval()\nre.compile('x')\ntorch.compile(model)") == []


@pytest.mark.parametrize("name", sorted(travelling_files()))
def test_no_file_that_may_travel_acts(name):
    assert acts_in(travelling_files()[name].read_text(encoding="utf-8")) == []


def test_no_file_that_is_written_for_a_checkpoint_acts(models):
    for model in models.values():
        for name, source in code_of(model.config).items():
            assert acts_in(source) == [], name


# ---------------------------------------------------------------------------------------------------------------------
# Between the two worlds
# ---------------------------------------------------------------------------------------------------------------------

# Loads every checkpoint of a folder by its own code, asks it, pickles it, and saves it: elsewhere, over itself, and
# over one of another kind.
ELSEWHERE = """
import io, pickle, shutil
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

source, target = Path({source!r}), Path({target!r})
trusted = {{"trust_remote_code": True}}
folders = sorted(path for path in source.iterdir() if path.is_dir())
for folder in folders:
    expected = torch.load(source / f"{{folder.name}}.pt")

    def load(place):
        model = AutoModelForImageTextToText.from_pretrained(place, **trusted)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        return model

    def check(place):
        model = load(place)
        with torch.no_grad():
            logits = model(**expected["inputs"]).logits
        torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)
        return model

    processor = AutoProcessor.from_pretrained(folder, **trusted)

    # Pickled before its first pass: loaded, and fresh.
    model = load(folder)
    again = pickle.loads(pickle.dumps(model))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    config = AutoConfig.from_pretrained(folder, **trusted)
    fresh = AutoModelForImageTextToText.from_config(config, **trusted)
    pickle.loads(pickle.dumps(fresh))
    torch.save(fresh, io.BytesIO())
    model = check(folder)

    # Elsewhere, the processor first in one place and last in the other.
    model.save_pretrained(target / "moved" / folder.name)
    processor.save_pretrained(target / "moved" / folder.name)
    processor.save_pretrained(target / "processor" / folder.name)
    alone = sorted(path.name for path in (target / "processor" / folder.name).glob("*.py"))
    assert "moellava_entry.py" in alone and "processing_moellava.py" in alone
    AutoProcessor.from_pretrained(target / "processor" / folder.name, **trusted)
    model.save_pretrained(target / "processor" / folder.name)
    check(target / "processor" / folder.name)

    # Over itself, whose files its weights are mapped from.
    shutil.copytree(folder, target / "over" / folder.name)
    model = check(target / "over" / folder.name)
    model.save_pretrained(target / "over" / folder.name)
    check(target / "over" / folder.name)

    # Over every other kind: what is read then is this one.
    shutil.copytree(folders[0], target / "other" / folder.name)
    model.save_pretrained(target / "other" / folder.name)
    processor.save_pretrained(target / "other" / folder.name)
    check(target / "other" / folder.name)
    AutoProcessor.from_pretrained(target / "other" / folder.name, **trusted)
print(len(folders))
"""


def keep(model: MoellavaForCausalLM, inputs: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes down beside a folder what its model says."""
    torch.save({"inputs": inputs, "logits": logits_of(model, inputs)}, folder.with_name(f"{folder.name}.pt"))


def travel(source: Path, target: Path) -> None:
    folders = [path for path in source.iterdir() if path.is_dir()]
    assert run_python(ELSEWHERE.format(source=str(source), target=str(target))).split()[-1] == str(len(folders))


@pytest.fixture(scope="module")
def travelled(models, question, tmp_path_factory) -> Path:
    """`first`, as the package saved it, and `second`, as a process without it did."""
    root = tmp_path_factory.mktemp("travelled")
    for name, model in models.items():
        model.save_pretrained(root / "first" / name)
        keep(model, question(model.processor), root / "first" / name)
    travel(root / "first", root / "second")
    return root


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("place", ["moved", "processor", "over"])
def test_without_the_package_a_save_brings_the_same_code(models, travelled, place, name):
    folder = travelled / "second" / place / name
    assert_packed(folder, models[name])
    assert bytes_of_code(folder) == bytes_of_code(travelled / "first" / name)


@pytest.fixture(scope="module")
def changed(models, travelled, question, tmp_path_factory) -> Path:
    """Checkpoints that were saved without the package, then changed with it and saved into the same folder, step by
    step; of every step there is a copy."""
    root = tmp_path_factory.mktemp("changed")
    (root / "copies").mkdir()

    def save(model: MoellavaForCausalLM, folder: Path, step: str) -> None:
        model.save_pretrained(folder)
        assert_packed(folder, model)
        shutil.copytree(folder, root / "copies" / step)
        keep(model, question(model.processor), root / "copies" / step)

    dense = Path(shutil.copytree(travelled / "second" / "moved" / "dense", root / "dense"))
    save(upcycle(dense, **MOE), dense, "dense-upcycled")
    save(load_pretrained_model(dense, projector_type="perceiver", device="cpu").model, dense, "sparse-perceiver")
    save(models["dense"], dense, "dense-again")

    user = Path(shutil.copytree(travelled / "second" / "moved" / "user", root / "user"))
    save(upcycle(user, **MOE), user, "user-upcycled")
    save(load_pretrained_model(user, projector_type="mlp", device="cpu").model, user, "user-mlp")
    save(load_pretrained_model(user, projector_type="suitcase_gated", device="cpu").model, user, "user-gated-again")
    save(models["sparse"], user, "user-sparse")
    return root


def test_a_changed_checkpoint_has_the_right_code_each_time(changed, travelled):
    found = {path.name: code_in(path) for path in (changed / "copies").iterdir() if path.is_dir()}
    sparse = {"sparse_layers_moellava.py", "moe_block_moellava.py", "experts_moellava.py"}
    own = {"custom_patches.py", "custom_sizes.py", "moellava_api.py", "moellava_custom.py"}
    assert sparse | {"clip_encoder_moellava.py", "mlp_projector_moellava.py"} <= found["dense-upcycled"]
    assert "mlp_projector_moellava.py" not in found["sparse-perceiver"]
    assert sparse | {"perceiver_projector_moellava.py"} <= found["sparse-perceiver"]
    assert found["dense-again"] == code_in(travelled / "first" / "dense")
    assert own | sparse | {"custom_suitcase_gated.py"} <= found["user-upcycled"]
    assert own | {"mlp_projector_moellava.py"} <= found["user-mlp"]
    assert found["user-mlp"].isdisjoint({"custom_suitcase_gated.py", "user_projector_moellava.py"})
    assert found["user-gated-again"] == found["user-upcycled"]
    assert found["user-sparse"] == code_in(travelled / "first" / "sparse")


def test_changed_checkpoints_load_without_the_package_and_move_on(changed, travelled, question, tmp_path):
    travel(changed / "copies", tmp_path)
    for copied in (path for path in (changed / "copies").iterdir() if path.is_dir()):
        # And come back.
        again = load_pretrained_model(tmp_path / "moved" / copied.name, device="cpu").model
        assert type(again) is MoellavaForCausalLM
        assert_packed(tmp_path / "moved" / copied.name, again)
        # What was saved over another kind without the package leaves files behind, which a save with it takes away.
        over = tmp_path / "other" / copied.name
        assert code_in(over) >= set(code_of(again.config))
        again.save_pretrained(over)
        assert_packed(over, again)


def test_loaded_by_its_own_code_beside_the_package(models, travelled, question, tmp_path):
    """Where its part is known to none but the checkpoint, a model runs by its own code, and saves by it."""
    with pytest.MonkeyPatch.context() as patch:
        for table in (ENCODERS, PROJECTORS):
            own = [name for name in table.names() if name.startswith("suitcase_")]
            for entries in ("_classes", "_answers"):
                kept = {name: cls for name, cls in getattr(table, entries).items() if name not in own}
                patch.setattr(table, entries, kept)
        model = load_pretrained_model(
            travelled / "second" / "moved" / "user", device="cpu", trust_remote_code=True
        ).model
        assert type(model).__module__.startswith("transformers_modules.")
        model.save_pretrained(tmp_path / "model")
    assert_packed(tmp_path / "model", models["user"])
    again = load_pretrained_model(tmp_path / "model", device="cpu").model
    inputs = question(again.processor)
    torch.testing.assert_close(logits_of(again, inputs), logits_of(models["user"], inputs), rtol=1e-5, atol=1e-5)
    upcycle(again, **MOE).save_pretrained(tmp_path / "model")
    assert "sparse_layers_moellava.py" in code_in(tmp_path / "model") == imported_from_the_entry(tmp_path / "model")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of 0.1.0
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", KEPT, ids=[path.name for path in KEPT])
def test_a_kept_checkpoint_saved_over_itself_loses_its_old_code(kept, question, tmp_path):
    folder = Path(shutil.copytree(kept, tmp_path / "model"))
    (folder / "notes.txt").write_text("mine")
    (folder / "train.py").write_text("print('mine')\n")
    model = load_pretrained_model(folder, device="cpu").model
    inputs = question(model.processor)
    expected = logits_of(model, inputs)
    before = code_in(folder)
    model.save_pretrained(folder)
    (folder / "train.py").unlink()  # the user's own stays
    assert_packed(folder, model)
    assert (folder / "notes.txt").read_text() == "mine"
    assert len(before - code_in(folder)) > 5
    again = AutoModelForImageTextToText.from_pretrained(folder)
    torch.testing.assert_close(logits_of(again, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", KEPT, ids=[path.name for path in KEPT])
def test_a_processor_or_config_saved_into_a_kept_checkpoint(kept, tmp_path):
    """A processor leaves the code that is there; a config brings the code of its model, whole."""
    folder = Path(shutil.copytree(kept, tmp_path / "model"))
    before = bytes_of_code(folder)
    MoellavaProcessor.from_pretrained(folder).save_pretrained(folder)
    assert bytes_of_code(folder) == before
    config = MoellavaConfig.from_pretrained(folder)
    config.save_pretrained(folder)
    assert code_in(folder) == set(code_of(config))


PUSHED_AGAIN = """
import json, shutil
from pathlib import Path
from huggingface_hub import HfApi
from moellava import load_pretrained_model, push

hub, root = HfApi(), Path({root!r})
commits = {{}}
for name in ("me/by-push", "me/by-model"):
    hub.create_repo(name)
    hub.upload_folder(repo_id=name, folder_path={kept!r})
    hub.upload_file(repo_id=name, path_or_fileobj=b"print('mine')", path_in_repo="train.py")
    model = load_pretrained_model(name, device="cpu").model
    if name == "me/by-push":
        model.save_pretrained(root / "saved")
        commits[name] = push(root / "saved", name).commit
    else:
        commits[name] = model.push_to_hub(name).oid
    commits[name + " processor"] = model.processor.push_to_hub(name).oid
print(json.dumps(commits))
"""


def test_a_kept_checkpoint_pushed_again_loses_its_old_code_in_the_same_commit(tmp_path):
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        code = PUSHED_AGAIN.format(root=str(tmp_path), kept=str(KEPT[0]))
        run_python(code, block_moellava=False, env=server.environment(tmp_path))
        model = load_pretrained_model(KEPT[0], device="cpu").model
        for name in ("me/by-push", "me/by-model"):
            commits = list(server.repositories[name].commits.values())
            held = [{file for file in commit.files if file.endswith(".py")} for commit in commits]
            wanted = {*code_of(model.config), "train.py"}
            assert held[-1] == wanted, name
            # One commit takes the old ones away and brings the new ones; the processor's, if it is one, leaves them.
            assert [files for files in held if files] == [
                files for files in held if files in (code_in(KEPT[0]), code_in(KEPT[0]) | {"train.py"}, wanted)
            ]
            for file, source in code_of(model.config).items():
                assert server.files(name)[file].content.decode() == source, file
    finally:
        server.shutdown()
        server.server_close()


# ---------------------------------------------------------------------------------------------------------------------
# A processor alone
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_processor_into_a_models_folder_and_a_model_into_a_processors(models, tmp_path, name):
    model = models[name]
    processor = model.processor
    model.save_pretrained(tmp_path / "model")
    before = bytes_of_code(tmp_path / "model")
    changed = copy.deepcopy(processor)
    changed.image_aspect_ratio = "square"
    changed.save_pretrained(tmp_path / "model")
    assert bytes_of_code(tmp_path / "model") == before
    assert AutoProcessor.from_pretrained(tmp_path / "model").image_aspect_ratio == "square"

    processor.save_pretrained(tmp_path / "processor")
    assert (
        code_in(tmp_path / "processor") == set(code_of_processor()) == imported_from_the_entry(tmp_path / "processor")
    )
    assert code_in(tmp_path / "processor").isdisjoint({"parts_moellava.py", "modeling_moellava.py"})
    model.processor = None
    try:
        model.save_pretrained(tmp_path / "processor")
    finally:
        model.processor = processor
    assert_packed(tmp_path / "processor", model)
    assert AutoProcessor.from_pretrained(tmp_path / "processor").image_aspect_ratio == processor.image_aspect_ratio


# ---------------------------------------------------------------------------------------------------------------------
# Pickled
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "made", ["assembled", "of its config", "loaded", "by AutoModel", "after a pass", "in training"]
)
def test_a_model_pickles(parts, models, question, tmp_path, name, made):
    """As transformers' own do before their first pass: no hook that is a closure is put on while building."""
    model, inputs = models[name], question(models[name].processor)
    if made == "assembled":
        model = assembled(parts, name)
    elif made == "of its config":
        model = MoellavaForCausalLM(copy.deepcopy(model.config))
    else:
        model.save_pretrained(tmp_path)
        cls = AutoModelForImageTextToText if made == "by AutoModel" else MoellavaForCausalLM
        model = cls.from_pretrained(tmp_path)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    # The weights of a file are mapped: the products of a matrix and a vector differ in the last bit by where it lies.
    # All of them before the first pass, with which transformers puts hooks on the modules.
    for again in (pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False), copy.deepcopy(model)):
        assert type(again) is type(model)
        assert again.config.to_dict() == model.config.to_dict()
        model.eval(), again.eval()
        torch.testing.assert_close(logits_of(again, inputs), logits_of(model, inputs), rtol=1e-5, atol=1e-5)


def test_a_config_and_a_processor_pickle(models, question):
    for model in models.values():
        assert pickle.loads(pickle.dumps(model.config)).to_dict() == model.config.to_dict()
        again = pickle.loads(pickle.dumps(model.processor))
        assert all(torch.equal(value, question(model.processor)[name]) for name, value in question(again).items())


def test_a_config_alone_brings_the_code_of_its_model(models, tmp_path):
    for name, model in models.items():
        model.config.save_pretrained(tmp_path / name)
        assert_packed(tmp_path / name, model)
        assert type(AutoConfig.from_pretrained(tmp_path / name)) is MoellavaConfig


# ---------------------------------------------------------------------------------------------------------------------
# What is imported first
# ---------------------------------------------------------------------------------------------------------------------

FIRST = """
import os, sys
import torch, transformers
import moellava

for name in {names!r}:
    child = os.fork()
    if child == 0:
        try:
            getattr(moellava, name)
            os._exit(0)
        finally:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        sys.exit(name)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_any_name_may_be_the_first_that_is_imported():
    """Whatever it imports comes upon transformers' tables of classes, which load the config and the tools, half-way."""
    run_python(FIRST.format(names=["MoellavaForCausalLM", "upcycle", "push", "evaluate"]), block_moellava=False)
