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
"""Parts that were never trained are named wherever a model is loaded or shown, until they are trained."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moellava import load_pretrained_model, train, upcycle
from moellava.cli import app
from moellava.inspecting import inspect_checkpoint
from moellava.loading import read_processor
from moellava.sources import Source


WARNING = "Never trained: multi_modal_projector"


@pytest.fixture(scope="module")
def untrained(parts, tmp_path_factory):
    """A checkpoint that was assembled and saved."""
    folder = tmp_path_factory.mktemp("untrained") / "model"
    tower = parts.vision_tower("clip")
    load_pretrained_model(parts.language_model("llama"), mm_vision_tower=tower, device="cpu").model.save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Four rows to train on."""
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    talk = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "Red."}]
    (folder / "rows.json").write_text(json.dumps([{"image": "red.png", "conversations": talk}] * 4), encoding="utf-8")
    return folder / "rows.json"


def settings(model, rows, out, **fields):
    given = {"model": str(model), "data": str(rows), "output_dir": str(out), "stage": "align", "use_cpu": True}
    return {
        **given,
        "image_folder": str(rows.parent),
        "disable_tqdm": True,
        "max_steps": 1,
        "report_to": "none",
        **fields,
    }


def said(path):
    return json.loads((path / "config.json").read_text(encoding="utf-8"))["untrained_parts"]


def inputs_of(model):
    picture = Image.new("RGB", (32, 32), "red")
    text = f"{model.processor.image_token} What is shown?"
    inputs = model.processor(images=picture, text=text, return_tensors="pt")
    return {**inputs, "labels": inputs["input_ids"]}


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "Never trained" in record.getMessage()]


def test_a_new_projector_is_named_by_everything_that_loads_or_shows_the_model(untrained, caplog):
    assert said(untrained) == ["multi_modal_projector"]
    model = load_pretrained_model(untrained, device="cpu").model
    (warning,) = warnings_of(caplog)
    assert warning.startswith(WARNING) and "Train the model first, or load trained weights." in warning
    assert model.config.untrained_parts == ["multi_modal_projector"]

    assert inspect_checkpoint(untrained).untrained_parts == ["multi_modal_projector"]
    shown = run("inspect", untrained)
    assert "multi_modal_projector: the weights are random" in shown.stdout
    card = (untrained / "README.md").read_text(encoding="utf-8")
    assert "**The projector needs training.**" in card


def test_asking_says_on_standard_error_that_the_projector_was_never_trained(untrained, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "scan.png")
    asked = run("ask", untrained, tmp_path / "scan.png", "What is shown?", "--device", "cpu", "--max-new-tokens", 2)
    assert asked.exit_code == 0 and asked.stderr.count("Never trained") == 1 and "Never trained" not in asked.stdout
    talked = run("chat", untrained, "--device", "cpu", "--max-new-tokens", 2, stdin="Hello\n")
    assert WARNING in talked.stderr


def test_the_checkpoints_own_code_warns_too(untrained):
    script = (
        "import sys; from transformers import AutoModelForCausalLM as A\n"
        "model = A.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'moellava' not in sys.modules and model.config.untrained_parts == ['multi_modal_projector']\n"
    )
    done = subprocess.run([sys.executable, "-c", script, untrained], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr.count(WARNING) == 1, done.stderr


def test_training_the_part_clears_it_and_training_others_does_not(untrained, rows, tmp_path, caplog):
    frozen = train(settings(untrained, rows, tmp_path / "frozen", stage="instruct", freeze=["multi_modal_projector"]))
    assert said(frozen.checkpoint) == ["multi_modal_projector"]
    report = train(settings(untrained, rows, tmp_path / "trained", save_steps=1))
    assert said(report.checkpoint) == said(tmp_path / "trained" / "align" / "checkpoint-1") == []
    assert "needs training" not in (report.checkpoint / "README.md").read_text(encoding="utf-8")
    caplog.clear()
    load_pretrained_model(report.checkpoint, device="cpu")
    assert not warnings_of(caplog)


@pytest.mark.parametrize("lora", [{"projector": True}, {"projector": False}], ids=["on the projector", "elsewhere"])
def test_adapters_clear_what_they_are_put_on(untrained, rows, tmp_path, lora):
    report = train(settings(untrained, rows, tmp_path, stage="instruct", lora={"r": 2, **lora}))
    assert said(report.checkpoint) == ([] if lora["projector"] else ["multi_modal_projector"])


@pytest.mark.parametrize(
    ("prepare", "left"),
    [
        (lambda model: model.train(), []),
        (lambda model: model.eval(), ["multi_modal_projector"]),
        (lambda model: model.train().model.multi_modal_projector.requires_grad_(False), ["multi_modal_projector"]),
    ],
    ids=["trained", "asked", "frozen"],
)
def test_any_training_loop_clears_what_it_trains(untrained, prepare, left):
    model = load_pretrained_model(untrained, device="cpu").model
    prepare(model)
    text = model.processor(text="What is shown?", return_tensors="pt")
    model(**text, labels=text["input_ids"]).loss.backward()
    assert model.config.untrained_parts == ["multi_modal_projector"]  # no image has come through it
    with torch.no_grad():
        model(**inputs_of(model))
    assert model.config.untrained_parts == ["multi_modal_projector"]
    copied = copy.deepcopy(model)
    model(**inputs_of(model)).loss.backward()
    assert model.config.untrained_parts == left and copied.config.untrained_parts == ["multi_modal_projector"]


def test_upcycling_carries_it_over_and_new_routers_are_no_reason_to_warn(untrained, parts, rows, tmp_path, caplog):
    assert upcycle(untrained, 2, 2, layers="dense").config.untrained_parts == ["multi_modal_projector"]
    trained = train(settings(untrained, rows, tmp_path)).checkpoint
    caplog.clear()
    assert upcycle(trained, 2, 2, layers="dense").config.untrained_parts == []
    assert not warnings_of(caplog)


def test_loaded_weights_clear_it_and_a_part_that_starts_new_sets_it(untrained, rows, tmp_path, caplog):
    trained = train(settings(untrained, rows, tmp_path)).checkpoint
    weights = load_pretrained_model(trained, device="cpu").model.model.multi_modal_projector.state_dict()
    torch.save(weights, tmp_path / "projector.bin")
    caplog.clear()
    model = load_pretrained_model(
        untrained, projector_config={"path": str(tmp_path / "projector.bin")}, device="cpu"
    ).model
    assert model.config.untrained_parts == [] and not warnings_of(caplog)
    # Another projector in the place of a trained one.
    other = load_pretrained_model(trained, projector_type="linear", device="cpu").model
    assert other.config.untrained_parts == ["multi_modal_projector"] and len(warnings_of(caplog)) == 1


def test_a_head_that_no_file_gives_is_named(untrained, parts, tmp_path, caplog):
    model = load_pretrained_model(untrained, device="cpu").model
    model.model.save_pretrained(tmp_path)  # without the head
    caplog.clear()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.untrained_parts == ["lm_head", "multi_modal_projector"]
    assert "Never trained: lm_head and multi_modal_projector." in warnings_of(caplog)[0]


def test_the_page_has_a_banner(untrained):
    page = pytest.importorskip("moellava.web.page")
    blocks = page.build_page([str(untrained)], device="cpu")
    shown = [str(block.value) for block in blocks.blocks.values() if getattr(block, "value", None)]
    assert any("multi_modal_projector never trained" in text and 'role="alert"' in text for text in shown)


# Provenance


def test_no_saved_file_holds_a_local_path(untrained, parts, rows, tmp_path):
    roots = {str(parts.root), str(untrained.parent), str(tmp_path)}
    report = train(settings(untrained, rows, tmp_path / "out"))
    for folder in (untrained, report.checkpoint):
        for file in folder.iterdir():
            if file.suffix in (".json", ".md", ".jinja"):
                text = file.read_text(encoding="utf-8")
                assert not any(root in text for root in roots), file
    config = json.loads((report.checkpoint / "config.json").read_text(encoding="utf-8"))
    assert config["parts"]["language_model"] == "llama" and "/" not in config["parts"]["vision_tower"]


def test_records_of_all_stages_are_kept(untrained, rows, tmp_path):
    stages = [{"stage": "align"}, {"stage": "instruct", "max_steps": 2}]
    recipe = {name: value for name, value in settings(untrained, rows, tmp_path).items() if name != "stage"}
    report = train(recipe | {"stages": stages})
    config = json.loads((report.checkpoint / "config.json").read_text(encoding="utf-8"))
    records = config["parts"]["training"]
    assert [(record["stage"], record["steps"]) for record in records] == [("align", 1), ("instruct", 2)]
    card = (report.checkpoint / "README.md").read_text(encoding="utf-8")
    assert "stage `align`: 1 steps" in card and "stage `instruct`: 2 steps" in card


@pytest.fixture
def tower_named_alike(parts, tmp_path):
    """Another tower with the name and the shapes of the one that the checkpoint was made with."""
    from transformers import AutoModel

    name = parts.vision_tower("clip")
    torch.manual_seed(7)
    other = AutoModel.from_config(AutoModel.from_pretrained(name).config)
    folder = tmp_path / name.name
    folder.mkdir()
    for file in name.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    other.save_pretrained(folder)
    return folder


def test_a_folder_is_the_same_tower_by_its_weights_and_not_by_its_name(untrained, parts, tower_named_alike, caplog):
    own = load_pretrained_model(untrained, device="cpu").model
    name = "model.multi_modal_projector.linear_1.weight"
    same = load_pretrained_model(untrained, mm_vision_tower=parts.vision_tower("clip"), device="cpu").model
    assert same.state_dict()[name].equal(own.state_dict()[name])
    caplog.clear()
    other = load_pretrained_model(untrained, mm_vision_tower=tower_named_alike, device="cpu").model
    towers = (other.model.vision_tower.state_dict(), own.model.vision_tower.state_dict())
    assert towers[0].keys() == towers[1].keys()
    assert not all(tensor.equal(towers[1][key]) for key, tensor in towers[0].items())
    assert any("has other weights than the vision tower" in record.getMessage() for record in caplog.records)


# Dtypes


def test_frozen_parts_stay_in_the_dtype_that_they_had(parts, rows, tmp_path):
    tower, language = parts.vision_tower("clip"), parts.language_model("llama")
    model = load_pretrained_model(language, mm_vision_tower=tower, dtype=torch.bfloat16, device="cpu").model
    model.save_pretrained(tmp_path / "model")
    before = Source(tmp_path / "model").tensors()
    report = train(settings(tmp_path / "model", rows, tmp_path / "out", save_steps=1))
    for folder in (report.checkpoint, tmp_path / "out" / "align" / "checkpoint-1"):
        for name, tensor in Source(folder).tensors().items():
            if ".multi_modal_projector." in name:
                assert tensor.dtype == torch.float32, name
            else:
                assert tensor.dtype == torch.bfloat16 and tensor.equal(before[name]), name
        assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    assert load_pretrained_model(report.checkpoint, device="cpu").model.dtype == torch.bfloat16
    assert read_processor(Source(report.checkpoint)) is not None

    # Where the language model is trained, it is what the model is in; the tower stays as it was.
    report = train(settings(report.checkpoint, rows, tmp_path / "next", stage="instruct"))
    dtypes = {name.split(".")[1]: tensor.dtype for name, tensor in Source(report.checkpoint).tensors().items()}
    assert dtypes["vision_tower"] == torch.bfloat16 and dtypes["language_model"] == torch.float32
    assert json.loads((report.checkpoint / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"


def test_a_model_in_float32_stays_in_it(untrained, rows, tmp_path):
    report = train(settings(untrained, rows, tmp_path))
    assert {tensor.dtype for tensor in Source(report.checkpoint).tensors().values()} == {torch.float32}
