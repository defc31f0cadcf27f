# SPDX-License-Identifier: Apache-2.0
"""Parts that were never trained are named wherever a model is loaded or shown, until they are trained."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainingArguments,
)
from typer.testing import CliRunner

from moellava import convert, load_pretrained_model, train, upcycle
from moellava.cli import app
from moellava.hub.pushing import checkpoint_files
from moellava.inspecting import inspect_checkpoint
from moellava.reading.processor import read_processor
from moellava.reading.sources import Source


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
    assert caplog.text.count("Never trained") == caplog.text.count("not trained by the stage instruct either") == 1
    caplog.clear()
    assert said(frozen.checkpoint) == ["multi_modal_projector"]
    report = train(settings(untrained, rows, tmp_path / "trained", save_steps=1))
    assert "Never trained" not in caplog.text  # of what the stage is there to train
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


def trainer_of(model, folder, **fields):
    """transformers' own trainer, on two equal rows."""
    row = {name: value[0] for name, value in inputs_of(model).items()}
    arguments = TrainingArguments(
        str(folder),
        max_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **fields,
    )
    rows = [row, row]
    return Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows,
        data_collator=lambda batch: {name: torch.stack([row[name] for row in batch]) for name in batch[0]},
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("fields", [{}, {"gradient_checkpointing": True}, {"label_smoothing_factor": 0.1}], ids=str)
def test_transformers_trainer_clears_it(untrained, tmp_path, fields):
    trainer = trainer_of(load_pretrained_model(untrained, device="cpu").model, tmp_path, **fields)
    trainer.evaluate()
    trainer.save_model(tmp_path / "before")
    trainer.train()
    trainer.save_model(tmp_path / "after")
    assert (said(tmp_path / "before"), said(tmp_path / "after")) == (["multi_modal_projector"], [])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_trl_clears_it_whose_losses_leave_the_models_own_forward_out(untrained, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = load_pretrained_model(untrained, device="cpu").model
    talk = [{"role": "user", "content": "What is shown?"}, {"role": "assistant", "content": "Red."}]
    rows = [{"messages": talk, "images": [Image.new("RGB", (32, 32), "red")]}] * 2
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_length=None
    )
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=model.processor
    )
    assert model.config.untrained_parts == ["multi_modal_projector"]
    trainer.train()
    assert model.config.untrained_parts == []


def test_the_body_alone_and_features_that_are_given_clear_it(untrained):
    body = AutoModel.from_pretrained(untrained).train()
    model = load_pretrained_model(untrained, device="cpu").model
    inputs = inputs_of(model)
    labels, pixels = inputs.pop("labels"), inputs["pixel_values"]
    body(**inputs)
    assert body.config.untrained_parts == []
    model.train()
    with torch.no_grad():
        features = model.get_image_features(pixels)
    model(inputs["input_ids"], mm_encoder_outputs={"image": features}, labels=labels)
    assert model.config.untrained_parts == ["multi_modal_projector"]  # encoded without gradients
    model(inputs["input_ids"], mm_encoder_outputs={"image": model.get_image_features(pixels)}, labels=labels)
    assert model.config.untrained_parts == []


def test_peft_clears_what_is_saved_beside_an_adapter(untrained, tmp_path):
    peft = pytest.importorskip("peft")
    model = load_pretrained_model(untrained, device="cpu").model
    row = inputs_of(model)
    adapters = {"target_modules": r".*language_model.*q_proj", "r": 2}
    without = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**adapters))
    without.train()(**row).loss.backward()
    assert without.get_base_model().config.untrained_parts == ["multi_modal_projector"]
    beside = peft.get_peft_model(model, peft.LoraConfig(**adapters, modules_to_save=["multi_modal_projector"]))
    beside.train()(**row).loss.backward()
    assert model.config.untrained_parts == []
    beside.save_pretrained(tmp_path)
    assert load_pretrained_model(tmp_path, model_base=untrained, device="cpu").model.config.untrained_parts == []


def test_converted_weights_are_no_reason_to_warn_and_a_tower_of_another_width_is(parts, untrained, tmp_path, caplog):
    convert(parts.llava_hf("clip"), tmp_path / "converted")
    assert not said(tmp_path / "converted")
    load_pretrained_model(tmp_path / "converted", device="cpu")
    assert not warnings_of(caplog)
    other = load_pretrained_model(
        tmp_path / "converted", mm_vision_tower=parts.vision_tower("siglip"), device="cpu"
    ).model
    assert other.config.untrained_parts == ["multi_modal_projector"] and warnings_of(caplog)


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
    assert any("multi_modal_projector never trained" in text and 'role="note"' in text for text in shown)


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


def test_nothing_that_is_sent_says_where_it_was_made(parts, tmp_path, monkeypatch):
    home = tmp_path / "patients-of-ward-7"
    for part in (parts.language_model("llama"), parts.vision_tower("clip")):
        shutil.copytree(part, home / "kept" / part.name)
    Image.new("RGB", (32, 32), "red").save(home / "kept" / "red.png")
    talk = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "Red."}]
    (home / "kept" / "rows.json").write_text(json.dumps([{"image": "red.png", "conversations": talk}]))
    monkeypatch.chdir(home)
    language, tower = (
        home / "kept" / part.name for part in (parts.language_model("llama"), parts.vision_tower("clip"))
    )
    load_pretrained_model(language, mm_vision_tower=tower, device="cpu").model.save_pretrained("kept/model")
    report = train(settings("kept/model", Path("kept/rows.json"), Path("kept/out"), save_steps=1))
    upcycle(report.checkpoint, 2, 2, layers="dense").save_pretrained("kept/sparse")
    AutoModelForImageTextToText.from_pretrained("kept/sparse").save_pretrained("kept/again")
    AutoProcessor.from_pretrained("kept/sparse").save_pretrained("kept/again")
    for folder in ("kept/model", report.checkpoint, "kept/out/align/checkpoint-1", "kept/sparse", "kept/again"):
        sent = checkpoint_files(Source(folder))
        assert {"config.json", "tokenizer.json", "model.safetensors", "processor_config.json"} <= set(sent)
        for name in sent:
            content = (home / folder / name).read_bytes()
            assert not any(word in content for word in (b"ward-7", b"kept/", str(tmp_path).encode())), name
    said = json.loads((home / "kept/again/config.json").read_text(encoding="utf-8"))["parts"]
    assert (said["language_model"], said["vision_tower"]) == (language.name, tower.name)


def test_a_folder_named_as_a_hub_id_is_still_the_tower_of_the_checkpoint(parts, tmp_path, monkeypatch, caplog):
    tower = parts.vision_tower("clip")
    shutil.copytree(tower, tmp_path / "towers" / "clip")
    monkeypatch.chdir(tmp_path)
    model = load_pretrained_model(parts.language_model("llama"), mm_vision_tower="towers/clip", device="cpu").model
    assert model.config.parts["vision_tower"] == "towers/clip"  # no more than what a Hub id looks like
    model.save_pretrained("model")
    for recorded in ("clip", "towers/clip"):
        config = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))
        config["parts"]["vision_tower"] = recorded
        (tmp_path / "model/config.json").write_text(json.dumps(config), encoding="utf-8")
        caplog.clear()
        again = load_pretrained_model("model", mm_vision_tower="towers/clip", device="cpu").model
        name = "model.multi_modal_projector.linear_1.weight"
        assert again.state_dict()[name].equal(model.state_dict()[name])
        assert not any("takes its place" in record.getMessage() for record in caplog.records)


def test_records_of_all_stages_are_kept(untrained, rows, tmp_path):
    moe = {"num_experts": 2, "num_experts_per_tok": 1}
    stages = [{"stage": "align"}, {"stage": "instruct", "max_steps": 2}, {"stage": "moe", "moe": moe}]
    recipe = {name: value for name, value in settings(untrained, rows, tmp_path).items() if name != "stage"}
    report = train(recipe | {"stages": stages})
    config = json.loads((report.checkpoint / "config.json").read_text(encoding="utf-8"))
    records = config["parts"]["training"]
    assert [(record["stage"], record["steps"]) for record in records] == [("align", 1), ("instruct", 2), ("moe", 1)]
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


def test_a_published_language_model_stays_as_large_as_it_was(smollm2, parts, rows, tmp_path):
    model = load_pretrained_model(smollm2, mm_vision_tower=parts.vision_tower("clip"), device="cpu").model
    model.save_pretrained(tmp_path / "model")
    report = train(settings(tmp_path / "model", rows, tmp_path / "out", max_steps=2))
    before, after = Source(smollm2).tensors(), Source(report.checkpoint).tensors()
    for name, tensor in before.items():
        kept = after[name.replace("model.", "model.language_model.", 1)][: len(tensor)]  # the image token adds a row
        assert kept.dtype == torch.bfloat16 and kept.equal(tensor), name
    size = (report.checkpoint / "model.safetensors").stat().st_size
    assert size < 1.01 * (smollm2 / "model.safetensors").stat().st_size


def test_a_model_in_float32_stays_in_it(untrained, rows, tmp_path):
    report = train(settings(untrained, rows, tmp_path))
    assert {tensor.dtype for tensor in Source(report.checkpoint).tensors().values()} == {torch.float32}
