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
"""Two processes over gloo on the CPU: they compute what one process does, and what they save is a checkpoint like any
other. What transformers and accelerate cannot do so is at the end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from parts import picture, run_python
from safetensors.torch import load_file

from moellava import load_pretrained_model, train


RECIPES = Path(__file__).resolve().parent.parent / "examples" / "recipes"
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "layers": [1], "router_aux_loss_coef": 0.1}
ACCELERATE = ("-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(RECIPES / "ddp.yaml"))
ACCELERATE += ("--num_processes", "2", "--main_process_port", "0")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


def launch(launcher: tuple[str, ...], *command: object, timeout: float = 180.0) -> subprocess.CompletedProcess:
    """Runs a command by a launcher, and fails with what it has printed; no process of it is left."""
    process = subprocess.Popen(
        [sys.executable, *launcher, *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        pytest.fail(f"not done after {timeout} s\n--- stdout\n{stdout}\n--- stderr\n{stderr[-8000:]}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        pytest.fail(f"ended with {process.returncode}\n--- stdout\n{stdout}\n--- stderr\n{stderr[-8000:]}")
    return subprocess.CompletedProcess(process.args, 0, stdout, stderr)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixteen conversations; those of words alone are the shortest, so that whole batches are of no pictures."""
    folder = tmp_path_factory.mktemp("parallel-data")
    rows = []
    for number in range(12):
        picture(number % 3).save(folder / f"{number}.png")
        answer = ("One.", "The second.", "Three birds.")[number % 3]
        turns = [{"from": "human", "value": "<image>\nWhich one?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": number, "image": f"{number}.png", "conversations": turns})
    for number in range(12, 16):
        turns = [{"from": "human", "value": "Only words?"}, {"from": "gpt", "value": "Yes." * (number - 11)}]
        rows.append({"id": number, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "rows.json"


@pytest.fixture(scope="module")
def dense(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel") / "dense"
    text = {"num_hidden_layers": 2, "intermediate_size": 128, "initializer_range": 0.05}
    settings = {"model_path": parts.language_model("llama", overrides=text), "vision_tower": parts.vision_tower("clip")}
    torch.manual_seed(0)
    load_pretrained_model(settings, device="cpu").model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sparse(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel") / "sparse"
    torch.manual_seed(0)
    load_pretrained_model(dense, moe_config=MOE, device="cpu").model.save_pretrained(folder)
    return folder


def tensors_of(folder):
    return load_file(Path(folder) / "model.safetensors")


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------------------------
# Data-parallel
# ---------------------------------------------------------------------------------------------------------------------

# What one process does in two parts of a batch, two processes do at once.
ALONE = {"gradient_accumulation_steps": 2}
TOGETHER = {"gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def recipe(dense, data):
    """A dense model trained whole, and made sparse and trained on."""
    return {
        "model": str(dense),
        "data": str(data),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "stages": [{"stage": "instruct", "unfreeze": "vision_tower"}, {"stage": "moe", "moe": MOE}],
    }


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """The recipe's stages by one process."""
    return train(recipe, output_dir=str(tmp_path_factory.mktemp("alone") / "out"), **ALONE).stages


def assert_same_training(found, expected):
    assert found["steps"] == expected.steps
    for ours, theirs in zip(found["log"], expected.log, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if name.startswith(("loss", "router_loss", "expert_load", "grad_norm", "learning_rate", "epoch")):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
    ours, theirs = tensors_of(found["checkpoint"]), tensors_of(expected.checkpoint)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    assert files_in(found["checkpoint"]) == files_in(expected.checkpoint)


def test_data_parallel_by_the_command_line(recipe, alone, tmp_path):
    """Dense and sparse; the vision tower, part of which has no gradient, is trained too."""
    out = tmp_path / "out"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | TOGETHER), encoding="utf-8")
    done = launch(
        ACCELERATE, "-m", "moellava", "train", tmp_path / "recipe.yaml", "--set", f"output_dir={out}", "--json",
        "--verbose",
    )  # fmt: skip
    report = json.loads(done.stdout)  # of the main process alone
    assert done.stderr.count("router: 256 of 256 parameters are trained") == 1
    for stage, expected in zip(report["stages"], alone, strict=True):
        assert_same_training(stage, expected)
        assert stage == json.loads((Path(stage["folder"]) / "stage.json").read_text(encoding="utf-8"))
        assert sorted(os.listdir(stage["folder"])) == sorted(os.listdir(expected.folder))
    code = f"""
import torch
from transformers import AutoModelForImageTextToText
model, info = AutoModelForImageTextToText.from_pretrained(
    {report["checkpoint"]!r}, trust_remote_code=True, output_loading_info=True
)
print(model.config.moe_config.num_experts, [len(found) for found in info.values()])
"""
    assert run_python(code).split() == ["4", "[0,", "0,", "0,", "0]"]
