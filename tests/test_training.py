# SPDX-License-Identifier: Apache-2.0
"""Training by recipes: the stages, their logs and checkpoints, resumed runs, adapters, and what a recipe may say."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from parts import picture, run_python
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from moellava import load_pretrained_model, train, train_router
from moellava.training import LoraRecipe, check_data, read_recipe
from moellava.training.adapters import put_adapters
from moellava.training.checkpoints import last_checkpoint
from moellava.training.data import Collator, Examples
from moellava.training.encoding import Encoder
from moellava.training.parts import PARTS, PartNames, set_trained, trained_parameters
from moellava.training.rows import open_data
from moellava.training.trainer import FirstChoices, MoellavaTrainer


ROOT = Path(__file__).resolve().parent.parent
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "layers": [1], "router_aux_loss_coef": 0.1}
# Of one run after the other: no bar, no other device, no files of a logger.
QUIET = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "dtype": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve conversations about pictures, some longer than others, and one of words alone; as LLaVA's file."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(12):
        picture(number % 3).save(folder / f"{number}.png")
        turns = [("<image>\nWhich one?", ("One.", "The second.", "Three birds.")[number % 3]), ("Sure?", "Yes.")]
        turns = turns[: 1 + number % 2]
        conversations = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        rows.append({"id": number, "image": f"{number}.png", "conversations": conversations})
    words = [{"from": "human", "value": "Only words?"}, {"from": "gpt", "value": "Yes, only words."}]
    rows.append({"id": "words", "conversations": words})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "rows.json"


@pytest.fixture(scope="module")
def settings(parts):
    """The parts of a small dense model."""
    text = {"num_hidden_layers": 2, "intermediate_size": 128, "initializer_range": 0.05}
    return {"model_path": parts.language_model("llama", overrides=text), "vision_tower": parts.vision_tower("clip")}


@pytest.fixture(scope="module")
def dense(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "dense"
    torch.manual_seed(0)
    load_pretrained_model(settings, device="cpu").model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sparse(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "sparse"
    torch.manual_seed(0)
    load_pretrained_model(dense, moe_config=MOE, device="cpu").model.save_pretrained(folder)
    return folder


def tensors_of(folder):
    return load_file(Path(folder) / "model.safetensors")


def changed_parts(before, after):
    """The parts of which weights differ, by the names of the tree."""
    found = set()
    for name in before:
        if not torch.equal(before[name], after[name]):
            part = name.split(".")[name.startswith("model")]
            found.add("experts" if ".experts." in name else "router" if ".gate." in name else part)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------

LOADED_ALONE = """
import json
from transformers import AutoModelForImageTextToText, AutoProcessor
found = []
for folder in {folders!r}:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    found.append([type(model).__module__, processor.num_image_tokens, model.config.moe_config.num_experts])
print(json.dumps(found))
"""


def test_three_stages(settings, data, tmp_path):
    """From parts to a mixture by one file; each stage goes on with what the last has made."""
    (tmp_path / "rows.json").write_text(data.read_text(encoding="utf-8").replace("11.png", "gone.png"))
    recipe = {
        "model": {name: str(value) for name, value in settings.items()},
        "data": str(tmp_path / "rows.json"),
        "eval_data": str(data),
        "image_folder": str(data.parent),
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "moe": MOE,
        "stages": [
            {"stage": "align", "learning_rate": "1e-2", "image_aspect_ratio": "square"},
            {"stage": "instruct", "save_steps": 2, "image_aspect_ratio": "pad"},
            {"stage": "moe", "learning_rates": {"router": 0.01}},
        ],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    report = train(tmp_path / "recipe.yaml", save_steps=3)
    align, instruct, moe = report.stages

    # What each trained, and how much of it there is.
    assert [stage.steps for stage in report.stages] == [3, 3, 3]
    assert {part for part, counts in align.trained.items() if counts["trained"]} == {"multi_modal_projector"}
    assert {part for part, counts in instruct.trained.items() if not counts["trained"]} == {"vision_tower"}
    assert {part for part, counts in moe.trained.items() if counts["trained"]} == {
        "multi_modal_projector", "experts", "router",
    }  # fmt: skip
    before, after = (tensors_of(stage.checkpoint) for stage in (align, instruct))
    assert changed_parts(before, after) == {"multi_modal_projector", "language_model", "lm_head"}
    assert report.checkpoint == tmp_path / "out" / "moe" / "model"

    card = (report.checkpoint / "README.md").read_text(encoding="utf-8")
    for stage in ("align", "instruct", "moe"):
        assert f"Trained with transformers' `Trainer`, stage `{stage}`: 3 steps, 1 epoch, on `rows.json`." in card
    assert "The projector needs training" not in card

    # What was logged: the loss, of the evaluation too; of the mixture also the routers'.
    assert all(len(stage.losses) == 3 and min(stage.losses) > 0 for stage in report.stages)
    assert all(any("eval_loss" in entry for entry in stage.log) for stage in report.stages)
    assert align.losses[-1] < align.losses[0]
    steps = [entry for entry in moe.log if "loss" in entry]
    assert not any("router_loss" in entry for entry in align.log)
    for entry in steps:
        load = [entry[f"expert_load/layer_1/expert_{expert}"] for expert in range(4)]
        assert sum(load) == pytest.approx(1) and 0.9 < entry["router_loss"] < 4
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (tmp_path / "out" / "moe").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(run)).Reload()
    logged = [event.value for event in events.Scalars("train/router_loss")]
    assert logged == pytest.approx([entry["router_loss"] for entry in steps])

    # The row that could not be used.
    assert align.data["usable"] == 12 and align.data["problems"][0]["row"] == "row 11 (id 11)"
    assert json.loads((tmp_path / "out" / "align" / "data.json").read_text())["kinds"] == {"missing picture": 1}

    # The last checkpoint of the trainer's is a checkpoint like any other, and so is the result.
    folders = [tmp_path / "out" / "moe" / "checkpoint-3", report.checkpoint]
    said = json.loads(run_python(LOADED_ALONE.format(folders=list(map(str, folders)))).splitlines()[-1])
    for folder, (module, tokens, experts) in zip(folders, said, strict=True):
        assert module.startswith("transformers_modules.") and (tokens, experts) == (16, 4)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config["image_aspect_ratio"] == "pad" and config.get("use_cache") is not False
    saved = json.loads(json.dumps(report.to_dict()))
    assert saved["checkpoint"] == str(report.checkpoint) and len(saved["stages"]) == 3

    # A run that is complete is not done again.
    again = train(tmp_path / "recipe.yaml", save_steps=3, resume=True)
    assert again.to_dict() == report.to_dict()
    with pytest.raises(ValueError, match="align holds an earlier run. Give resume: true to go on with it, or another"):
        train(tmp_path / "recipe.yaml")


def test_a_sparse_model_goes_on_as_it_is(sparse, data, tmp_path):
    report = train({"model": sparse, "data": data, "output_dir": tmp_path, "stage": "moe", "max_steps": 1, **QUIET})
    assert tensors_of(report.checkpoint).keys() == tensors_of(sparse).keys()
    changed = train(
        {"model": sparse, "data": data, "output_dir": tmp_path / "other", "stage": "moe", "max_steps": 1, **QUIET},
        moe={"router_aux_loss_coef": 0.5},
    )
    assert load_pretrained_model(changed.checkpoint, device="cpu").model.config.moe_config.router_aux_loss_coef == 0.5
    assert changed.stages[0].losses[0] > report.stages[0].losses[0]


@pytest.mark.parametrize("part", PARTS)
def test_freeze_and_unfreeze(sparse, part):
    model = load_pretrained_model(sparse, device="cpu").model
    set_trained(model, "moe", [], [])
    before = {name: parameter.requires_grad for _, name, parameter in PartNames(model)}
    within = {part} | {name for name, parent in PARTS.items() if parent == part}
    set_trained(model, "moe", ["multi_modal_projector", "experts", "router"], [part])
    trained = {name for name, counts in trained_parameters(model).items() if counts["trained"]}
    # A narrower name wins over a wider one: the experts stay frozen within the language model.
    frozen = {"experts", "router"} if part == "language_model" else set()
    assert trained == (within & set(trained_parameters(model))) - frozen or part in ("experts", "router")
    assert part in trained
    assert any(before.values()) and not all(before.values())


def test_shared_and_frozen_weights(parts, sparse):
    tied = load_pretrained_model(
        parts.language_model("llama", tie_word_embeddings=True, overrides={"num_hidden_layers": 1}),
        mm_vision_tower=parts.vision_tower("clip"), device="cpu",
    ).model  # fmt: skip
    set_trained(tied, "instruct", ["embeddings"], [])
    assert not tied.lm_head.weight.requires_grad and "lm_head" not in trained_parameters(tied)
    model = load_pretrained_model(sparse, moe_config={"freeze_router": True}, device="cpu").model
    set_trained(model, "moe", ["language_model"], [])  # with all that lies within it
    assert {part for part, counts in trained_parameters(model).items() if counts["trained"]} == {
        "multi_modal_projector"
    }
    set_trained(model, "moe", [], [])
    assert trained_parameters(model)["router"]["trained"] == 0 < trained_parameters(model)["experts"]["trained"]
    with pytest.raises(ValueError, match="unfreeze names the router, but the model keeps its routers frozen"):
        set_trained(model, "moe", [], ["router"])
    with pytest.raises(ValueError, match="Nothing is left to train in the stage 'align'"):
        set_trained(model, "align", ["multi_modal_projector"], [])


# ---------------------------------------------------------------------------------------------------------------------
# The trainer
# ---------------------------------------------------------------------------------------------------------------------


def trainer_for(model, data, folder, learning_rates=None, rows=None, exact_router_loss=True, **arguments):
    fixed = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    examples = Examples(open_data(rows or data, data.parent), Encoder(model.processor))
    return MoellavaTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), remove_unused_columns=False, **fixed | arguments),
        train_dataset=examples,
        data_collator=Collator(model.processor),
        learning_rates=learning_rates,
        exact_router_loss=exact_router_loss,
    )


def test_learning_rates_of_parts(sparse, data, tmp_path):
    model = load_pretrained_model(sparse, device="cpu").model
    rates = {"vision_tower": 2e-6, "language_model": 1e-4, "experts": 3e-4}
    trainer = trainer_for(model, data, tmp_path, rates, learning_rate=1e-3, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimizer
    expected = {"embeddings": 1e-4, "router": 1e-4, "multi_modal_projector": 1e-3, "lm_head": 1e-3} | rates
    groups = optimizer.param_groups
    of = {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    found = list(PartNames(model))
    assert len(of) == len(found)
    for part, name, parameter in found:
        rate, decay = of[id(parameter)]
        assert rate == expected[part], name
        assert decay == (0.0 if name.endswith("bias") or "norm" in name else 0.1), name
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.args.max_steps = 1
    trainer.args.lr_scheduler_type = "constant"
    trainer.train()
    moved = {name: (parameter - before[name]).abs().max().item() for name, parameter in model.named_parameters()}
    # Adam's first step is as long as the learning rate.
    (name,) = (name for name in moved if "vision_tower" in name and ".0.mlp.fc1.weight" in name)
    assert moved[name] == pytest.approx(2e-6, rel=0.2)
    assert moved["lm_head.weight"] == pytest.approx(1e-3, rel=0.2)


@pytest.mark.parametrize("exact", [True, False])
def test_gradient_accumulation_is_the_large_batch(sparse, data, tmp_path, exact):
    """Router loss included, which is no mean over rows: with parts that are unlike, in length and in what is learnt."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    rows = [rows[number] for number in ((0, 12, 1, 3) if exact else (0, 1, 0, 1))]
    updated = []
    for size, parts_of_batch in ((4, 1), (2, 2)):
        model = load_pretrained_model(sparse, device="cpu").model
        model.config.moe_config.router_aux_loss_coef = 1.0
        trainer = trainer_for(
            model, data, tmp_path, rows=rows, per_device_train_batch_size=size,
            gradient_accumulation_steps=parts_of_batch, max_steps=1, optim="sgd", learning_rate=0.1,
            lr_scheduler_type="constant", max_grad_norm=0,
            train_sampling_strategy="sequential", exact_router_loss=exact,
        )  # fmt: skip
        trainer.train()
        updated.append((trainer.state.log_history[0], model.state_dict()))
    (log, whole), (log_of_parts, in_parts) = updated
    assert log_of_parts["loss"] == pytest.approx(log["loss"], rel=1e-5)
    assert log_of_parts["router_loss"] == pytest.approx(log["router_loss"], rel=1e-5)
    before = tensors_of(sparse)
    for name, tensor in whole.items():
        torch.testing.assert_close(in_parts[name], tensor, rtol=1e-4, atol=2e-6, msg=name)
    gate = "model.language_model.layers.1.mlp.gate.weight"
    assert (whole[gate] - before[gate]).abs().max() > 1e-4


def test_first_choices_without_a_mask_are_those_of_all_tokens():
    """A collator that packs rows gives no mask."""
    logits = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0)).unbind()
    losses = []
    for mask in (None, torch.ones(3, 4, dtype=torch.long)):
        choices = FirstChoices()
        choices.add(logits, mask)
        losses.append(choices.loss(logits, mask))
    shares = [torch.bincount(layer.argmax(dim=-1), minlength=4) / 12 for layer in logits]
    means = [layer.softmax(dim=-1).mean(dim=0) for layer in logits]
    expected = sum(4 * (share * mean).sum() for share, mean in zip(shares, means, strict=True))
    torch.testing.assert_close(losses, [expected, expected])


def test_router_statistics_are_the_models_own(sparse, data, tmp_path):
    model = load_pretrained_model(sparse, device="cpu").model
    trainer = trainer_for(model, data, tmp_path, per_device_train_batch_size=13, max_steps=1, learning_rate=0.0)
    trainer.log({"loss": 1.0})  # of somebody's own, before any step
    assert "router_loss" not in trainer.state.log_history[0]
    trainer.train()
    log = trainer.state.log_history[0]
    batch = Collator(model.processor)(list(trainer.train_dataset))
    with torch.no_grad():
        outputs = model.eval()(**batch, output_router_logits=True)
    assert log["router_loss"] == pytest.approx(outputs.aux_loss.item(), rel=1e-4)
    chosen = outputs.router_logits[0][batch["attention_mask"].flatten().bool()].topk(2).indices
    load = torch.bincount(chosen.flatten(), minlength=4) / chosen.numel()
    assert [log[f"expert_load/layer_1/expert_{expert}"] for expert in range(4)] == pytest.approx(load.tolist())


def test_checkpointing_changes_no_loss(dense, data, tmp_path):
    """By default activations are computed anew in the backward pass; here with a frozen tower, and in 16 bits."""
    losses = []
    for number, (checkpointing, bf16) in enumerate(((True, False), (False, False), (True, True))):
        report = train(
            {"model": dense, "data": data, "output_dir": tmp_path / str(number), "stage": "instruct", "max_steps": 3},
            activation_checkpointing=checkpointing, bf16=bf16, learning_rate=1e-3, per_device_train_batch_size=4,
            **QUIET,
        )  # fmt: skip
        losses.append(report.stages[0].losses)
        assert {tensor.dtype for tensor in tensors_of(report.checkpoint).values()} == {torch.float32}
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[2] == pytest.approx(losses[1], rel=2e-2) and losses[2] != losses[1]


def test_early_stopping(dense, data, tmp_path):
    report = train(
        {"model": dense, "data": data, "output_dir": tmp_path, "stage": "instruct", "num_train_epochs": 9},
        eval_data=data, early_stopping_patience=1, learning_rate=0.3, per_device_train_batch_size=7,
        gradient_accumulation_steps=1, lr_scheduler_type="constant", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    (stage,) = report.stages
    losses = [entry["eval_loss"] for entry in stage.log if "eval_loss" in entry]
    assert stage.steps < 18 and len(losses) < 9 and losses[-1] >= min(losses)
    best = tmp_path / "instruct" / f"checkpoint-{2 * (losses.index(min(losses)) + 1)}"
    assert all(torch.equal(tensor, tensors_of(best)[name]) for name, tensor in tensors_of(report.checkpoint).items())


def test_early_stopping_saves_when_it_evaluates(dense, data, tmp_path):
    settings = {"model": dense, "data": data, "output_dir": tmp_path, "stage": "instruct", "eval_data": data}
    for strategy in ("epoch", "steps"):
        given = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2} if strategy == "steps" else {}
        recipe = read_recipe(settings, early_stopping_patience=1, report_to="none", use_cpu=True, **given)
        arguments = recipe.stages[0].training_arguments(tmp_path)
        assert arguments.save_strategy == arguments.eval_strategy == strategy and arguments.load_best_model_at_end


def test_streamed(dense, data, tmp_path):
    rows = [row | {"image": str(data.parent / row["image"])} for row in json.loads(data.read_text()) if "image" in row]
    recipe = {"model": dense, "data": itertools.chain(rows, [{"id": "bad"}]), "output_dir": tmp_path, "stage": "align"}
    with pytest.raises(ValueError, match="'align' is streamed, so that nobody knows how long an epoch is: give max_"):
        train(recipe)
    with pytest.raises(ValueError, match="streamed, and each of several workers would read all of it: leave data"):
        train(recipe, max_steps=4, dataloader_num_workers=2)
    report = train(recipe, max_steps=4, per_device_train_batch_size=3, **QUIET)
    assert report.stages[0].steps == 4 and report.stages[0].data["usable"] >= 12


# ---------------------------------------------------------------------------------------------------------------------
# Killed and resumed
# ---------------------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from moellava.training import running, train

class Killed(running.MoellavaTrainer):
    def log(self, logs, *args, **kwargs):
        super().log(logs, *args, **kwargs)
        if self.state.global_step == 9:
            os.kill(os.getpid(), signal.SIGKILL)

running.MoellavaTrainer = Killed
train({recipe!r})
"""


@pytest.fixture(scope="module")
def uninterrupted(sparse, data, tmp_path_factory):
    """A recipe of four epochs, with noise before the routers, and what it makes when nothing happens."""
    recipe = {
        "model": str(sparse), "data": str(data), "stage": "moe", "num_train_epochs": 4, "save_steps": 4,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "use_cpu": True,
        "moe": {"router_jitter_noise": 0.1}, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    return recipe, train(recipe, output_dir=tmp_path_factory.mktemp("uninterrupted")).stages[0]


def check_nothing_was_lost(resumed, whole):
    assert resumed.steps == whole.steps == 16
    assert resumed.losses == whole.losses  # not nearly: the very same
    kept = ("loss", "router_loss", "grad_norm", "learning_rate", "step")
    assert [{name: entry.get(name) for name in kept} for entry in resumed.log[:-1]] == [
        {name: entry.get(name) for name in kept} for entry in whole.log[:-1]
    ]
    first, second = tensors_of(whole.checkpoint), tensors_of(resumed.checkpoint)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_killed_run_goes_on_exactly(uninterrupted, tmp_path):
    """In the second epoch: order, noise, schedule and optimizer are those of one run."""
    recipe, whole = uninterrupted
    script = KILLED.format(root=str(ROOT), recipe=recipe | {"output_dir": str(tmp_path)})
    killed = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, timeout=3000)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    folder = tmp_path / "moe"
    assert last_checkpoint(folder).name == "checkpoint-8" and not (folder / "model").exists()
    resumed = train(recipe, output_dir=tmp_path, resume=True).stages[0]
    check_nothing_was_lost(resumed, whole)
    state = json.loads((folder / "checkpoint-16" / "trainer_state.json").read_text(encoding="utf-8"))
    assert [entry["loss"] for entry in state["log_history"]] == whole.losses


def test_streamed_data_goes_on_exactly(sparse, data, tmp_path):
    """In the second round through the stream, which is read from its beginning up to where the run was."""
    pytest.importorskip("datasets", reason="streams a dataset of its")
    rows = json.loads(data.read_text(encoding="utf-8"))[:7]
    (tmp_path / "rows").mkdir()
    lines = [json.dumps({**row, "id": str(row["id"]), "image": str(data.parent / row["image"])}) for row in rows]
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    recipe = {
        "model": sparse, "data": {"path": str(tmp_path / "rows"), "streaming": True}, "stage": "moe", "max_steps": 6,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_steps": 2, "learning_rate": 1e-3,
        "moe": {"router_jitter_noise": 0.1}, "output_dir": tmp_path / "out", **QUIET, "save_strategy": "steps",
    }  # fmt: skip
    whole = train(recipe, save_total_limit=3).stages[0]
    stop_at(tmp_path / "out" / "moe", 4)
    resumed = train(recipe, save_total_limit=3, resume=True).stages[0]
    assert len(whole.losses) == 6 and resumed.losses == whole.losses


def stop_at(folder, step):
    """Takes away what a stage has written after a step, as if it had been stopped there."""
    for path in folder.iterdir():
        number = path.name.rpartition("-")[2]
        if path.name in ("stage.json", "model", "adapter") or (number.isdecimal() and int(number) > step):
            path.unlink() if path.is_file() else shutil.rmtree(path)


def test_another_recipe_does_not_go_on(dense, data, tmp_path, caplog):
    recipe = {"model": str(dense), "data": str(data), "output_dir": tmp_path, "stage": "align", "max_steps": 2} | QUIET
    recipe |= {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    first = train(recipe).stages[0].losses
    other = recipe | {"learning_rate": 1e-2, "max_steps": 3, "freeze": ["lm_head"], "resume": True}
    message = (
        rf"The run in {tmp_path} was begun with another recipe \(align: freeze is \['lm_head'\] and was \[\]; align: "
        r"learning_rate is 0.01 and was 0.001; align: max_steps is 3 and was 2\). Take the changes back, give another"
    )
    with pytest.raises(ValueError, match=message):
        train(other)
    # What has no part in the losses may change, also while a stage is not complete.
    stop_at(tmp_path / "align", 1)
    assert train(recipe, resume=True, save_steps=5, logging_steps=1, disable_tqdm=True).stages[0].losses == first
    stop_at(tmp_path / "align", 1)
    caplog.clear()
    changed = train(other, allow_changes=True, freeze=[]).stages[0]
    assert changed.steps == 3 and changed.losses[0] == first[0]
    assert "Going on with another recipe: align: learning_rate is 0.01 and was 0.001" in caplog.text
    # From then on it is the run's.
    train(other, freeze=[])


def test_weights_alone_are_nothing_to_go_on_from(dense, data, tmp_path):
    recipe = {"model": str(dense), "data": str(data), "output_dir": tmp_path, "stage": "align", "max_steps": 2} | QUIET
    recipe |= {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    train(recipe)
    stop_at(tmp_path / "align", 1)
    message = r"checkpoint-1 holds weights alone \(save_only_model\), so that no run can go on from it. Give it as the"
    with pytest.raises(ValueError, match=message):
        train(recipe, resume=True)
    # Where there is nothing to go on from, a run begins.
    again = {"model": tmp_path / "align" / "checkpoint-1", "output_dir": tmp_path / "new", "resume": True}
    assert train(recipe, **again).stages[0].steps == 2


def test_a_folder_that_no_run_has_made_is_not_gone_on_with(dense, data, tmp_path):
    """LLaVA's own trainer leaves checkpoints without a state, which look like those that were cut off."""
    recipe = {"model": str(dense), "data": str(data), "output_dir": tmp_path, "stage": "align", "max_steps": 1} | QUIET
    held = tmp_path / "align" / "checkpoint-1000" / "mm_projector.bin"
    held.parent.mkdir(parents=True)
    held.write_bytes(b"weeks of work")
    with pytest.raises(ValueError, match=r"align holds files and no recipe.json, .* Nothing was deleted"):
        train(recipe, resume=True)
    with pytest.raises(ValueError, match="align holds an earlier run"):
        train(recipe)
    assert held.read_bytes() == b"weeks of work"


def test_a_trainer_does_not_push_its_whole_folder(dense, data, tmp_path):
    recipe = {"model": str(dense), "data": str(data), "output_dir": tmp_path, "stage": "align", "max_steps": 1} | QUIET
    message = "sends its whole output folder, whatever lies there. Leave it out, and push what was trained afterwards"
    with pytest.raises(ValueError, match=message):
        read_recipe(recipe | {"push_to_hub": True})
    model = load_pretrained_model(dense, device="cpu").model
    trainer = MoellavaTrainer(model=model, args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    with pytest.raises(ValueError, match=message):
        trainer.push_to_hub()
    with pytest.raises(ValueError, match=message):
        MoellavaTrainer(model=model, args=TrainingArguments(str(tmp_path), push_to_hub=True, report_to="none"))


def test_what_is_no_checkpoint_of_a_run_is_left_alone(tmp_path, caplog):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-30", "checkpoint-31", "checkpoint-best", ".model.saving"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-2", "checkpoint-10"):
        (tmp_path / name / "trainer_state.json").write_text("{}", encoding="utf-8")
    (tmp_path / "checkpoint-30" / "trainer_state.json").write_text('{"global_st', encoding="utf-8")
    (tmp_path / "checkpoint-31" / "trainer_state.json").write_bytes(b"\xff\x00")
    (tmp_path / "checkpoint-40").write_text("notes", encoding="utf-8")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    left = {"checkpoint-2", "checkpoint-10", "checkpoint-best", "checkpoint-40"}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert caplog.text.count("was not written to its end, and is removed") == 3


# Every child goes on where the last was killed. The kernel kills it when a file gets larger than it may: in the middle
# of a write, in whatever language that is done.
KILLED_IN_SAVES = """
import json, os, resource, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from moellava.training import running, train
from moellava.training.checkpoints import last_checkpoint

def nothing_larger_than(size):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

class Killed(running.MoellavaTrainer):
    moment = None

    def save_model(self, output_dir=None, _internal_call=False):
        if self.moment == ("weights" if _internal_call else "model"):
            nothing_larger_than(50_000)
        super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.moment == "optimizer":
            nothing_larger_than(50_000)
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self.moment == "state":
            nothing_larger_than(100)

rotates = False

def hook(event, arguments):
    global rotates
    if event == "shutil.rmtree":
        rotates = Path(arguments[0]).name.startswith("checkpoint-")
    if Killed.moment == "rotation" and rotates and event == "os.remove" and arguments[0] == "optimizer.pt":
        os.kill(os.getpid(), signal.SIGKILL)
    if Killed.moment == "report" and event == "open" and str(arguments[0]).endswith(".stage.json"):
        nothing_larger_than(100)

running.MoellavaTrainer = Killed
sys.addaudithook(hook)
for moment in {moments!r}:
    child = os.fork()
    if not child:
        Killed.moment = moment
        train({recipe!r}, resume=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    left = Path({folder!r}).glob("*checkpoint-*")
    files = {{path.name: sorted(file.name for file in path.iterdir()) for path in left}}
    last = last_checkpoint({folder!r})
    print(json.dumps([os.WIFSIGNALED(status) and os.WTERMSIG(status), files, last and last.name]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked, and killed by a limit on files, as on Linux")
def test_a_run_killed_in_its_saves_goes_on_exactly(uninterrupted, tmp_path):
    """With one checkpoint kept: in its weights, optimizer and state, while the older one is deleted, and at the end."""
    recipe, whole = uninterrupted
    recipe = recipe | {"output_dir": str(tmp_path), "save_total_limit": 1}
    moments = ["weights", "optimizer", "state", "rotation", "model", "report"]
    script = KILLED_IN_SAVES.format(root=str(ROOT), recipe=recipe, folder=str(tmp_path / "moe"), moments=moments)
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    said = dict(zip(moments, said, strict=True))
    killed = dict.fromkeys(moments, int(signal.SIGXFSZ)) | {"rotation": int(signal.SIGKILL)}
    assert {moment: by for moment, (by, _, _) in said.items()} == killed
    # What each left, and what the next one went on from.
    left = {moment: files for moment, (_, files, _) in said.items()}
    staged = next(files for name, files in left["weights"].items() if name.endswith(".saving"))
    assert "config.json" in staged and "model.safetensors" not in staged
    assert "optimizer.pt" in left["optimizer"]["checkpoint-4"]
    assert "scheduler.pt" not in left["optimizer"]["checkpoint-4"]
    assert "trainer_state.json" in left["state"]["checkpoint-4"]
    assert "optimizer.pt" in left["rotation"]["checkpoint-4"]
    assert len(left["rotation"]["checkpoint-4"]) < len(left["rotation"]["checkpoint-8"])
    assert [last for _, _, last in said.values()] == [None] * 3 + ["checkpoint-8"] + ["checkpoint-16"] * 2
    check_nothing_was_lost(train(recipe, resume=True).stages[0], whole)
    assert not list((tmp_path / "moe").glob(".*"))


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


def test_lora_reaches_the_experts(sparse, data, tmp_path):
    recipe = {"model": sparse, "data": data, "output_dir": tmp_path, "stage": "moe", "max_steps": 3, **QUIET}
    report = train(recipe, lora={"r": 4, "alpha": 8}, learning_rate=1e-2, per_device_train_batch_size=4)
    (stage,) = report.stages
    assert stage.adapters == {
        "attention": {"of": 8, "adapted": 8},
        "mlp": {"of": 3, "adapted": 3},
        "experts": {"of": 2, "adapted": 2},
        "projector": {"of": 2, "adapted": 2},
        "vision_tower": {"of": 12 * 2, "adapted": 0},
    }
    assert 0 < stage.trained["experts"]["trained"] < stage.trained["experts"]["parameters"] / 4
    assert "router_loss" in stage.log[0]
    before, after = tensors_of(sparse), tensors_of(report.checkpoint)
    assert before.keys() == after.keys()
    assert changed_parts(before, after) == {"multi_modal_projector", "language_model", "experts", "router"}
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert "lm_head.weight" in kept and not any("proj.weight" in name for name in kept if "language_model" in name)

    # The adapter beside it is the same model.
    inputs = load_pretrained_model(sparse, device="cpu").model.processor(text="Which one?", return_tensors="pt")
    merged = load_pretrained_model(report.checkpoint, device="cpu").model
    apart = load_pretrained_model(tmp_path / "moe" / "adapter", model_base=sparse, merge=False, device="cpu").model
    with torch.no_grad():
        torch.testing.assert_close(apart(**inputs).logits, merged(**inputs).logits, rtol=0, atol=1e-4)


def test_lora_goes_on_exactly(sparse, data, tmp_path):
    recipe = {"model": sparse, "data": data, "output_dir": tmp_path, "stage": "moe", "max_steps": 4, **QUIET}
    recipe |= {"lora": {"r": 4, "alpha": 8}, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    whole = train(recipe).stages[0].losses
    stop_at(tmp_path / "moe", 2)
    assert train(recipe, resume=True).stages[0].losses == whole and len(whole) == 4


def test_a_stage_follows_adapters(dense, data, tmp_path):
    """They are merged, and the next stage begins with the model that they have made."""
    stages = [{"stage": "instruct", "lora": {"r": 4, "alpha": 8}}, {"stage": "moe", "moe": MOE, "max_steps": 2}]
    recipe = {"model": dense, "data": data, "output_dir": tmp_path, "max_steps": 3, "stages": stages, **QUIET}
    adapted, sparse = train(recipe, learning_rate=1e-2).stages
    assert Path(adapted.checkpoint) == tmp_path / "instruct" / "model"
    before, between, after = (tensors_of(folder) for folder in (dense, adapted.checkpoint, sparse.checkpoint))
    assert "language_model" in changed_parts(before, between)
    # The attention, which the second stage leaves alone, is the one that the adapter has made.
    attention = [name for name in after if "self_attn" in name and "language_model" in name]
    assert attention and all(torch.equal(after[name], between[name]) for name in attention)


def test_lora_on_some_parts(sparse):
    model = load_pretrained_model(sparse, device="cpu").model
    lora = LoraRecipe(r=2, dropout=0.1, attention=False, mlp=False, experts=False, vision_tower=True)
    adapted, reach = put_adapters(model, lora, trains_routers=False, quantised=False)
    assert {part: found.adapted for part, found in reach.items()} == {
        "attention": 0, "mlp": 0, "experts": 0, "projector": 2, "vision_tower": 24,
    }  # fmt: skip
    trained = {part for part, counts in trained_parameters(adapted).items() if counts["trained"]}
    assert trained == {"multi_modal_projector", "vision_tower"}
    with pytest.raises(ValueError, match="dropout is 0.1, but the experts' stacked tensors take none. Give dropout: 0"):
        put_adapters(load_pretrained_model(sparse, device="cpu").model, LoraRecipe(dropout=0.1), False, False)


def test_nothing_for_lora(dense):
    model = load_pretrained_model(dense, device="cpu").model
    lora = LoraRecipe(attention=False, mlp=False, projector=False)
    with pytest.raises(ValueError, match="nothing in the model that lora could be put on: it has no experts"):
        put_adapters(model, lora, trains_routers=False, quantised=False)


def test_qlora_reaches_the_experts(sparse, data, tmp_path):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    recipe = {"model": sparse, "data": data, "output_dir": tmp_path, "stage": "moe", "load_4bit": True, **QUIET}
    report = train(
        recipe | {"dtype": "bfloat16"}, lora={"r": 4, "alpha": 8, "dropout": 0.05}, learning_rate=1e-2, max_steps=4,
        per_device_train_batch_size=4, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    (stage,) = report.stages
    assert stage.adapters["experts"] == {"of": 8, "adapted": 8}  # linear layers, in modules of their own
    assert stage.trained["experts"]["trained"] > 0 and stage.trained["router"]["trained"] > 0
    assert stage.losses[-1] < stage.losses[0]
    assert report.checkpoint == tmp_path / "moe" / "adapter"
    names = load_file(report.checkpoint / "adapter_model.safetensors").keys()
    assert any(".experts.3.down_proj.lora_A" in name for name in names)
    model = load_pretrained_model(report.checkpoint, model_base=sparse, merge=False, load_4bit=True, device="cpu").model
    assert model.processor is not None


# ---------------------------------------------------------------------------------------------------------------------
# TRL
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's own default
def test_trl_trains_the_model_unchanged(sparse, data, tmp_path):
    trl = pytest.importorskip("trl", reason="tests TRL's trainer")
    datasets = pytest.importorskip("datasets", reason="TRL's data are its datasets")
    model = load_pretrained_model(sparse, device="cpu").model
    rows = [
        {
            "messages": [{"role": "user", "content": "Which one?"}, {"role": "assistant", "content": "Three birds."}],
            "images": [picture(number)],
        }
        for number in range(4)
    ]
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, use_cpu=True,
        bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, max_length=None, warmup_steps=0,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=model.processor
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    saved, before = tensors_of(tmp_path / "saved"), tensors_of(sparse)
    assert {"experts", "router", "multi_modal_projector"} <= changed_parts(before, saved)
    assert isinstance(trainer, Trainer)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------


def test_example_recipe():
    recipe = read_recipe(ROOT / "examples" / "recipes" / "llava.yaml")
    assert [stage.name for stage in recipe.stages] == ["align", "instruct", "moe"]
    align, instruct, moe = recipe.stages
    arguments = [stage.training_arguments(recipe.output_dir / stage.name) for stage in recipe.stages]
    batches = [args.per_device_train_batch_size * args.gradient_accumulation_steps for args in arguments]
    assert batches == [256, 128, 128] and [args.learning_rate for args in arguments] == [1e-3, 2e-5, 2e-5]
    assert [args.train_sampling_strategy for args in arguments] == ["random", "group_by_length", "group_by_length"]
    assert all(args.warmup_steps == 0.03 and args.num_train_epochs == 1 for args in arguments)
    assert (
        moe.moe["num_experts"] == 4 and instruct.moe is None and moe.learning_rates == {"multi_modal_projector": 2e-5}
    )
    assert (align.image_aspect_ratio, instruct.image_aspect_ratio) == ("square", "pad")
    assert not Path("checkpoints").exists()  # reading it makes nothing


def test_older_names_and_repeated_stages(tmp_path):
    given = {"model": "m", "data": "d", "output_dir": tmp_path, "report_to": "none", "use_cpu": True}
    stages = [{"stage": "instruct"}, {"stage": "instruct", "group_by_length": False}, {"stage": "instruct"}]
    stages.append({"stage": "align", "group_by_length": True})
    recipe = read_recipe(given | {"stages": stages}, gradient_checkpointing=False, warmup_ratio=0.5, lora=True)
    assert [stage.name for stage in recipe.stages] == ["instruct", "instruct-2", "instruct-3", "align"]
    arguments = [stage.training_arguments(tmp_path) for stage in recipe.stages]
    sampling = [args.train_sampling_strategy for args in arguments]
    assert sampling == ["group_by_length", "random", "group_by_length", "group_by_length"]
    assert all(args.warmup_steps == 0.5 for args in arguments) and recipe.stages[0].lora == LoraRecipe()
    assert not any(
        getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None)
        for args in arguments
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lerning_rate": 1}, ValueError, "Unknown key 'lerning_rate' in the recipe; did you mean 'learning_rate'"),
        ({"model": None}, ValueError, "the recipe has no model: give the checkpoint that training starts from"),
        ({"output_dir": None}, ValueError, "the recipe has no output_dir: give the folder that checkpoints"),
        ({"stage": "aline"}, ValueError, "Unknown stage 'aline'; did you mean 'align'"),
        ({"stages": [{"stage": "align"}]}, ValueError, "has both stages and stage; expected one of them"),
        ({"stage": ...}, ValueError, "has neither stage nor stages; expected one of them"),
        ({"stage": ..., "stages": []}, ValueError, r"stages is \[\]; expected a list, such as"),
        ({"stage": ..., "stages": ["align"]}, ValueError, "Stage 0 is 'align'; expected a mapping with the key stage"),
        ({"stage": ..., "stages": [{"stage": "align", "model": "x"}]}, ValueError, "Unknown key 'model' in stage 0"),
        ({"data": None}, ValueError, "The stage 'align' has no data"),
        ({"freeze": ["expert"]}, ValueError, "Unknown part 'expert' in freeze; did you mean 'experts'"),
        ({"learning_rates": {"tower": 1}}, ValueError, "Unknown part 'tower' in learning_rates"),
        ({"freeze": "lm_head", "unfreeze": ["lm_head"]}, ValueError, r"\['lm_head'\] are in freeze and in unfreeze"),
        ({"lora": 3}, TypeError, "lora is 3; expected its fields"),
        ({"lora": {"rank": 3}}, ValueError, "Unknown field 'rank' in lora"),
        ({"lora": {"r": 0}}, ValueError, "lora's r is 0; expected a rank of at least 1"),
        ({"lora": {"dropout": 1}}, ValueError, "lora's dropout is 1; expected a share from 0 to below 1"),
        ({"lora": True, "freeze": "lm_head"}, ValueError, "freeze and unfreeze have no effect on adapters"),
        (
            {"lora": {"attention": False, "mlp": False, "experts": False, "projector": False}},
            ValueError, "lora is put on nothing: switch on one of attention",
        ),
        ({"load_4bit": True}, ValueError, "Quantised weights cannot be trained: give lora too"),
        ({"load_4bit": True, "lora": {"merge": True}}, ValueError, "merge is true, but the model is quantised"),
        (
            {"stage": ..., "lora": True, "load_4bit": True, "stages": [{"stage": "align"}, {"stage": "instruct"}]},
            ValueError, "The stage 'align' leaves its adapter apart, so that no stage can follow it",
        ),
        ({"learning_rates": {"experts": "fast"}}, ValueError, "learning rate of experts is 'fast'; expected a number"),
        ({"learning_rates": ["experts"]}, ValueError, r"learning_rates is \['experts'\]; expected parts with"),
        ({"learning_rate": "fast"}, ValueError, "learning_rate is 'fast'; expected a number"),
        ({"num_train_epochs": True}, ValueError, "num_train_epochs is True; expected a number"),
        ({"max_length": 5.5}, ValueError, "max_length is 5.5; expected a number of tokens"),
        ({"check_pictures": "no"}, ValueError, "check_pictures is 'no'; expected true or false"),
        ({"lora": {"dropout": "a"}}, ValueError, "lora's dropout is 'a'; expected a number"),
        ({"early_stopping_patience": "x", "eval_data": "e.json"}, ValueError, "stopping_patience is 'x'; expected"),
        ({"output_dir": __file__}, NotADirectoryError, "test_training.py is a file, and output_dir is .*Give a folder"),
        ({"unusable_rows": "drop"}, ValueError, "unusable_rows is 'drop'; expected 'skip' or 'error'"),
        ({"moe": {"num_expert": 4}, "stage": "moe"}, ValueError, "Unknown field 'num_expert' in moe_config"),
        ({"early_stopping_patience": 2}, ValueError, "early_stopping_patience needs eval_data"),
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, ValueError, "the recipe gives warmup_steps twice"),
        ({"lr_scheduler_type": "cosin"}, ValueError, "cosin"),
    ],
)  # fmt: skip
def test_recipes_that_are_wrong(tmp_path, changes, error, message):
    recipe = {"model": "nowhere/at-all", "data": "d.json", "output_dir": tmp_path, "stage": "align"} | changes
    with pytest.raises(error, match=message):
        train({name: value for name, value in recipe.items() if value is not ...})
    assert not any(tmp_path.iterdir())


def test_recipe_files_that_are_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no recipe .*none.yaml. Give the path of a YAML file"):
        train(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [", encoding="utf-8")
    (tmp_path / "latin.yaml").write_text("a: \u00e4", encoding="latin-1")
    for name in ("broken.yaml", "latin.yaml"):
        with pytest.raises(ValueError, match=f"{name} is no valid YAML"):
            train(tmp_path / name)
    (tmp_path / "list.yaml").write_text("- a", encoding="utf-8")
    with pytest.raises(TypeError, match="list.yaml is a list; expected keys with values, such as model and data"):
        train(tmp_path / "list.yaml")


def test_extras_that_are_not_installed(sparse, tmp_path, monkeypatch):
    for module in ("datasets", "peft", "tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, module, None)  # as Python has it of what cannot be imported
    with pytest.raises(
        ImportError, match=r"Reading me/rows needs the datasets library: pip install 'moellava\[train\]'"
    ):
        check_data("me/rows")
    with pytest.raises(ImportError, match=r"LoRA needs PEFT: pip install 'moellava\[peft\]'"):
        put_adapters(load_pretrained_model(sparse, device="cpu").model, LoraRecipe(), False, False)
    message = r"Logging to TensorBoard needs tensorboard: pip install 'moellava\[train\]', or set report_to: none."
    with pytest.raises(ImportError, match=message):
        read_recipe({"model": "m", "data": "d", "output_dir": tmp_path, "stage": "align"})


def test_rows_that_may_not_be_left_out(dense, data, tmp_path):
    rows = [*json.loads(data.read_text(encoding="utf-8")), {"id": "odd"}]
    recipe = {"model": dense, "data": rows, "image_folder": str(data.parent), "output_dir": tmp_path, "stage": "align"}
    with pytest.raises(ValueError, match=r"1 of the 14 rows cannot be used.*row 13 \(id odd\): form: has neither"):
        train(recipe, unusable_rows="error", **QUIET)
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Routers
# ---------------------------------------------------------------------------------------------------------------------


def labelled(data, count=24):
    rows = json.loads(data.read_text(encoding="utf-8"))[:12]
    kinds = ("X-ray", "CT", "MRI")
    return [rows[number % 12] | {"modality": kinds[number % 12 % 3]} for number in range(count)]


def test_router_of_modalities(dense, data, tmp_path):
    """Three pictures of three kinds; the router is put into every sparse layer, and trained around."""
    report = train_router(
        dense, labelled(data), tmp_path / "router.safetensors", image_folder=data.parent, num_train_epochs=60,
        learning_rate=0.05, use_cpu=True,
    )  # fmt: skip
    assert report.classes == ["CT", "MRI", "X-ray"] and report.rows == {"X-ray": 8, "CT": 8, "MRI": 8}
    assert report.held_out == 2 and report.accuracy == 1.0
    with safe_open(report.path, framework="pt") as file:
        assert file.metadata()["classes"] == "CT, MRI, X-ray"
        weight, bias = file.get_tensor("fc1.weight"), file.get_tensor("fc1.bias")
    assert (tuple(weight.shape), tuple(bias.shape)) == ((3, 64), (3,))

    moe = {
        "num_experts": 3,
        "num_experts_per_tok": 1,
        "use_meta_expert": True,
        "layers": "dense",
        "freeze_router": True,
    }
    recipe = {"model": dense, "data": data, "output_dir": tmp_path / "out", "stage": "moe", "max_steps": 2, **QUIET}
    trained = train(recipe, moe=moe | {"router_path": str(report.path)})
    assert trained.stages[0].trained["router"]["trained"] == 0
    tensors = tensors_of(trained.checkpoint)
    for layer in range(2):
        assert torch.equal(tensors[f"model.language_model.layers.{layer}.mlp.gate.weight"], weight)
        assert torch.equal(tensors[f"model.language_model.layers.{layer}.mlp.gate.bias"], bias)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"out": "router.pth"}, r"out is router.pth; expected a .safetensors file"),
        ({"modality": None}, {}, r"row 0 \(id 0\) has no modality: expected its class"),
        ({"image": None}, {}, r"row 0 \(id 0\) cannot be used: has 1 <image> placeholder"),
        ({}, {"classes": ["CT", "MRI"]}, r"Rows have the modality \['X-ray'\], which classes does not name"),
        ({"modality": "CT"}, {"count": 1}, r"The rows have the one modality \['CT'\]; a router tells at least two"),
    ],
)
def test_routers_that_cannot_be_trained(dense, data, change, arguments, message):
    rows = labelled(data, arguments.pop("count", 3))
    rows[0] = rows[0] | change
    with pytest.raises(ValueError, match=message):
        train_router(dense, rows, **{"out": "router.safetensors", **arguments}, image_folder=data.parent)
