# SPDX-License-Identifier: Apache-2.0
"""Resumed runs, and the best model kept, with language models that are saved in another form than they are held in."""

import json
import shutil

import pytest
import torch
from parts import picture
from safetensors.torch import load_file, save_file

from moellava import load_pretrained_model, train
from moellava.training.checkpoints import restore


QUIET = {
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "dtype": "float32",
    "gradient_accumulation_steps": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(8):
        picture(number).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhich one?"},
            {"from": "gpt", "value": ("One.", "Two.")[number % 2]},
        ]
        rows.append({"image": f"{number}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "rows.json"


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe"])
def mixture(request, parts, tmp_path_factory):
    """A model with a language model that is a mixture of its own: its experts are stacked, and saved one by one."""
    folder = tmp_path_factory.mktemp("mixture") / request.param
    torch.manual_seed(0)
    settings = {"model_path": parts.language_model(request.param), "vision_tower": parts.vision_tower("clip")}
    load_pretrained_model(settings, device="cpu").model.save_pretrained(folder)
    return folder


def tensors_of(folder):
    """The weights of a checkpoint, in one file or in several."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def check_equal(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def stop_at(folder, step):
    """Takes away what a stage has written after a step, as if it had been stopped there."""
    for path in folder.iterdir():
        number = path.name.rpartition("-")[2]
        if path.name in ("stage.json", "model", "adapter") or (number.isdecimal() and int(number) > step):
            path.unlink() if path.is_file() else shutil.rmtree(path)


@pytest.mark.parametrize("stage", ["instruct", "moe", "lora"])
def test_a_mixture_of_its_own_goes_on_exactly(mixture, data, tmp_path, stage):
    """Weights, losses and the optimizer's state are those of the run that was not stopped, to the last bit."""
    recipe = {
        "model": mixture, "data": data, "output_dir": tmp_path, "stage": "instruct", "max_steps": 6, "save_steps": 2,
        "save_total_limit": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **QUIET,
    }  # fmt: skip
    if stage == "moe":
        recipe |= {"unfreeze": ["experts", "vision_tower"], "learning_rates": {"experts": 3e-2}}
    if stage == "lora":
        recipe |= {"lora": {"r": 2, "alpha": 4}}
    whole = train(recipe).stages[0]
    folder = tmp_path / "instruct"
    shutil.copytree(folder, tmp_path / "whole")
    stop_at(folder, 4)
    resumed = train(recipe, resume=True).stages[0]
    assert len(whole.losses) == 6 and resumed.losses == whole.losses
    for name in ("model", "checkpoint-6"):
        check_equal(tensors_of(tmp_path / "whole" / name), tensors_of(folder / name))
    states = [
        torch.load(path / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
        for path in (tmp_path / "whole", folder)
    ]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        check_equal(state, states[1][number])


def test_the_best_of_a_mixture_of_its_own_is_kept(mixture, data, tmp_path):
    report = train(
        {"model": mixture, "data": data, "output_dir": tmp_path, "stage": "instruct", "num_train_epochs": 6},
        eval_data=data, early_stopping_patience=1, learning_rate=0.1, per_device_train_batch_size=4,
        lr_scheduler_type="constant", **QUIET,
    )  # fmt: skip
    (stage,) = report.stages
    losses = [entry["eval_loss"] for entry in stage.log if "eval_loss" in entry]
    assert losses[-1] > min(losses)  # else the best would be the last
    best = tmp_path / "instruct" / f"checkpoint-{2 * (losses.index(min(losses)) + 1)}"
    check_equal(tensors_of(best), tensors_of(report.checkpoint))


@pytest.mark.parametrize("change", ["missing", "unexpected", "size"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_checkpoint_of_other_weights_does_not_go_on(mixture, data, tmp_path, change, lora):
    recipe = {"model": mixture, "data": data, "output_dir": tmp_path, "stage": "align", "max_steps": 2} | QUIET
    recipe |= {"save_steps": 1, "lora": {"r": 2, "alpha": 4}} if lora else {"save_steps": 1}
    train(recipe)
    stop_at(tmp_path / "align", 1)
    (file,) = (tmp_path / "align" / "checkpoint-1").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "multi_modal_projector" in name and tensors[name].dim() == 2)
    taken = tensors.pop(name)
    if change == "unexpected":
        tensors |= {name: taken, name.replace("multi_modal_projector", "resampler"): taken.clone()}
    if change == "size":
        tensors[name] = taken[:, :-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="multi_modal_projector|resampler") as raised:
        train(recipe, resume=True)
    if change != "size" or not lora:
        assert f"{file.parent} does not hold the weights of this model" in str(raised.value)
    assert not (tmp_path / "align" / "model").exists()


def test_shards_and_dtypes_are_restored(mixture, tmp_path):
    """Of 16 bits beside 32 too, as frozen parts may be: none is rounded on its way."""
    model = load_pretrained_model(mixture, device="cpu", dtype="float32").model
    model.model.vision_tower.to(torch.bfloat16)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    restore(model, tmp_path)
    check_equal(kept, model.state_dict())
    assert {name: tensor.dtype for name, tensor in kept.items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
