# SPDX-License-Identifier: Apache-2.0
"""Two processes over gloo on the CPU: they compute what one process does, and what they save is a checkpoint like any
other. What transformers and accelerate cannot do so is at the end."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from parts import picture, run_python
from safetensors.torch import load_file

from moellava import load_pretrained_model, train


RECIPES = Path(__file__).resolve().parent.parent / "examples" / "recipes"
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "layers": [1], "router_aux_loss_coef": 0.1}
ACCELERATE = ("-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(RECIPES / "ddp.yaml"))
ACCELERATE += ("--num_processes", "2", "--main_process_port", "0")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


def launch(launcher: tuple[str, ...], *command: object, timeout: float = 1800.0) -> subprocess.CompletedProcess:
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
    """Sixteen conversations; where two processes share the first four, one of them gets pictures and the other none."""
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
    rows = [*rows[:2], *rows[12:14], *rows[2:4], *rows[14:], *rows[4:12]]
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
        written = json.loads((Path(stage["folder"]) / "stage.json").read_text(encoding="utf-8"))
        assert stage == written | {name: stage[name] for name in ("folder", "checkpoint")}
        assert (written["folder"], written["checkpoint"]) == (".", "model")  # as seen from the file
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


RUNS = """
import itertools, json, shutil, sys
from accelerate import PartialState
from moellava import train

runs, out = json.loads(sys.argv[1]), sys.argv[2]
runs["streamed"]["data"] = itertools.chain(runs["streamed"]["data"])
reports = [train(runs[name], output_dir=f"{out}/{name}").stages[0] for name in ("streamed", "adapted")]
train(runs["resumed"] | {"max_steps": 2}, output_dir=f"{out}/resumed")
if PartialState().is_main_process:  # as if it had been stopped then
    shutil.rmtree(f"{out}/resumed/moe/model")
    shutil.move(f"{out}/resumed/moe/stage.json", f"{out}/stopped.json")
PartialState().wait_for_everyone()
reports.append(train(runs["resumed"], output_dir=f"{out}/resumed", resume=True, allow_changes=True).stages[0])
if PartialState().is_main_process:
    print(json.dumps([vars(report) for report in reports]))
"""


def test_streamed_adapted_and_resumed(recipe, sparse, data, tmp_path):
    common = {key: value for key, value in recipe.items() if key not in ("stages", "save_steps")} | {
        "model": str(sparse), "stage": "moe", "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 4,
    }  # fmt: skip
    rows = json.loads(data.read_text(encoding="utf-8"))
    runs = {
        "streamed": common | {"data": rows, "image_folder": str(data.parent), "train_sampling_strategy": "random"},
        "adapted": common | {"lora": {"r": 4}},
        "resumed": common | {"save_steps": 2},
    }
    (tmp_path / "runs.py").write_text(RUNS, encoding="utf-8")
    together = {name: run | TOGETHER for name, run in runs.items()}
    done = launch(ACCELERATE, tmp_path / "runs.py", json.dumps(together), tmp_path / "two")
    found = json.loads(done.stdout.splitlines()[-1])  # after what the Trainer prints
    runs["streamed"]["data"] = itertools.chain(rows)
    for (name, run), report in zip(runs.items(), found, strict=True):
        (expected,) = train(run, output_dir=str(tmp_path / "one" / name), **ALONE).stages
        assert_same_training(report, expected)
        assert report["data"] == expected.data


# ---------------------------------------------------------------------------------------------------------------------
# A model divided among processes: tensor and expert parallelism, FSDP2
# ---------------------------------------------------------------------------------------------------------------------

DIVIDED = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

cases, inputs, out = json.loads(sys.argv[1]), torch.load(sys.argv[2]), sys.argv[3]
for name, (folder, settings) in cases.items():
    model = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, distributed_config=DistributedConfig(**settings)
    )
    found = {"divided": [name for name, parameter in model.named_parameters() if hasattr(parameter, "placements")
        and not all(placement.is_replicate() for placement in parameter.placements)]}
    if "fsdp_size" in settings:
        register_fsdp_forward_method(model, "generate")
    found["tokens"] = model.generate(**inputs[folder], max_new_tokens=5, do_sample=False)
    output = model(**inputs[folder], labels=inputs[folder]["input_ids"])
    output.loss.backward()
    found |= {"logits": output.logits.detach(), "loss": output.loss.detach()}
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    found["grads"] = {n: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for n, grad in grads.items()}
    model.save_pretrained(f"{out}/{name}")
    if dist.get_rank() == 0:
        torch.save(found, f"{out}/{name}.pt")
dist.destroy_process_group()
"""
TENSOR, EXPERT, SHARDED = {"tp_plan": "auto"}, {"tp_size": 2, "ep_size": 2}, {"fsdp_size": 2}


@pytest.fixture(scope="module")
def others(parts, tmp_path_factory):
    """Sparse models of other families: experts with biases, a residual MLP and a meta expert; a body without a plan."""
    folder = tmp_path_factory.mktemp("others")
    beside = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "layers": "dense",
        "use_residual": True,
        "use_meta_expert": True,
    }
    settings = {
        "phi": {"projector_type": "qformer", "vision_tower": parts.vision_tower("siglip"), "moe_config": beside},
        "stablelm": {"projector_type": "perceiver", "vision_tower": parts.vision_tower("dinov2"), "moe_config": MOE},
    }
    for family, given in settings.items():
        model_path = parts.language_model(family, overrides={"num_hidden_layers": 2})
        torch.manual_seed(0)
        load_pretrained_model({"model_path": model_path} | given, device="cpu").model.save_pretrained(folder / family)
    return {family: folder / family for family in settings}


@pytest.fixture(scope="module")
def divided(dense, sparse, others, tmp_path_factory):
    """What two processes have found and saved of each case, and what one finds, by the folder of the model."""
    out = tmp_path_factory.mktemp("divided")
    cases = {
        "dense-tensor": (dense, TENSOR),
        "dense-sharded": (dense, SHARDED),
        "sparse-tensor": (sparse, TENSOR),
        "sparse-expert": (sparse, EXPERT),
        "sparse-sharded": (sparse, SHARDED),
        "phi-tensor": (others["phi"], TENSOR),
        "phi-expert": (others["phi"], EXPERT),
        "stablelm-tensor": (others["stablelm"], TENSOR),
    }
    cases = {name: (str(folder), settings) for name, (folder, settings) in cases.items()}
    inputs, expected = {}, {}
    for folder, _ in cases.values():
        if folder in expected:
            continue
        model, _, _, _ = load_pretrained_model(folder, device="cpu")
        text = ["<image> Which one?", "<image> What does it show?"]
        batch = model.processor(text=text, images=[picture(0), picture(1)], padding=True, return_tensors="pt")
        inputs[folder] = dict(batch)
        tokens = model.generate(**batch, max_new_tokens=5, do_sample=False)
        output = model(**batch, labels=batch["input_ids"])
        output.loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        expected[folder] = {"tokens": tokens, "logits": output.logits, "loss": output.loss, "grads": grads}
    (out / "divided.py").write_text(DIVIDED, encoding="utf-8")
    torch.save(inputs, out / "inputs.pt")
    launch(TORCHRUN, out / "divided.py", json.dumps(cases), out / "inputs.pt", out)
    return {
        name: (torch.load(out / f"{name}.pt"), expected[folder], Path(folder), out / name)
        for name, (folder, _) in cases.items()
    }


EXPERTS = {
    "model.language_model.layers.1.mlp.experts.gate_up_proj",
    "model.language_model.layers.1.mlp.experts.down_proj",
}
HALVED = {
    "dense-tensor": {
        "lm_head.weight",
        "model.multi_modal_projector.linear_1.weight",
        "model.vision_tower.encoder.layers.0.mlp.fc2.weight",
        "model.language_model.layers.1.mlp.gate_proj.weight",
    },
    "dense-sharded": {
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "model.vision_tower.post_layernorm.bias",
    },
    "sparse-tensor": EXPERTS | {"model.language_model.layers.0.mlp.down_proj.weight"},
    "sparse-expert": EXPERTS | {"model.language_model.layers.0.mlp.down_proj.weight"},
    "sparse-sharded": EXPERTS | {"model.language_model.layers.1.mlp.gate.weight"},
    "phi-tensor": {
        "model.language_model.layers.0.mlp.mlp.fc1.weight",
        "model.language_model.layers.0.mlp.meta_expert.fc2.weight",
        "model.multi_modal_projector.qformer.encoder.layer.0.intermediate_query.dense.weight",
    },
    "phi-expert": {
        "model.language_model.layers.1.mlp.experts.up_proj",
        "model.language_model.layers.1.mlp.experts.down_proj_bias",
    },
    "stablelm-tensor": EXPERTS | {"model.multi_modal_projector.layers.0.mlp.up_proj.weight"},
}


@pytest.mark.parametrize("case", HALVED)
def test_divided_models_compute_the_same(divided, case):
    found, expected, _, _ = divided[case]
    assert HALVED[case] <= set(found["divided"])
    assert torch.equal(found["tokens"], expected["tokens"])
    torch.testing.assert_close(found["logits"], expected["logits"].detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found["loss"], expected["loss"].detach(), rtol=0, atol=1e-4)
    for name, grad in expected["grads"].items():
        torch.testing.assert_close(found["grads"][name], grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("case", HALVED)
def test_divided_models_save_what_they_have_loaded(divided, case):
    """The same files, bit by bit; those of the processor, which the model has not been given, are not among them."""
    _, _, original, saved = divided[case]
    files = files_in(saved)
    assert {"config.json", "generation_config.json", "model.safetensors", "modeling_moellava.py"} <= set(files)
    for name in files:
        assert (saved / name).read_bytes() == (original / name).read_bytes(), name


def test_fsdp2_by_a_recipe(recipe, sparse, tmp_path):
    """The model is divided while it is loaded, and what is saved is whole."""
    given = recipe | {"model": str(sparse), "stages": [{"stage": "instruct"}, {"stage": "moe"}], "save_strategy": "no"}
    sharded = given | TOGETHER | {"distributed_config": SHARDED, "output_dir": str(tmp_path / "two")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sharded), encoding="utf-8")
    done = launch(ACCELERATE, "-m", "moellava", "train", tmp_path / "recipe.yaml", "--json")
    expected = train(given, output_dir=str(tmp_path / "one"), **ALONE).stages
    for stage, alone in zip(json.loads(done.stdout)["stages"], expected, strict=True):
        assert_same_training(stage, alone)


def test_what_accelerate_divides_for_fsdp2(sparse):
    """By the config for GPUs, which needs them to run: the blocks, and the projector as a whole."""
    config = yaml.safe_load((RECIPES / "fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=config["fsdp_version"], auto_wrap_policy=config["fsdp_auto_wrap_policy"].lower()
    )
    model = load_pretrained_model(sparse, device="cpu").model
    plugin.set_auto_wrap_policy(model)
    divides = fsdp2_prepare_auto_wrap_policy(plugin, model)
    found = {name.removeprefix("model.") for name, module in model.named_modules() if divides(module)}
    blocks = {f"vision_tower.encoder.layers.{index}" for index in range(4)}
    blocks |= {f"language_model.layers.{index}" for index in range(2)}
    assert found == blocks | {"multi_modal_projector", "vision_tower.embeddings"}


# ---------------------------------------------------------------------------------------------------------------------
# What transformers 5.23 and accelerate 1.15 cannot do over gloo: a test that fails here says that they can by now
# ---------------------------------------------------------------------------------------------------------------------

CANNOT = """
import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState
from transformers import LlavaForConditionalGeneration
from transformers.distributed import DistributedConfig

found = []
try:
    Accelerator(cpu=True, parallelism_config=ParallelismConfig(tp_size=2))
except ValueError as error:
    found.append(str(error))
found.append(AcceleratorState().distributed_type.value)  # although the environment asks for FSDP
model = LlavaForConditionalGeneration.from_pretrained({folder!r}, distributed_config=DistributedConfig(fsdp_size=2))
try:
    ids, picture = torch.full((1, {tokens}), {image}), torch.zeros(1, 3, 32, 32)
    model.generate(input_ids=ids, pixel_values=picture, max_new_tokens=1)
except RuntimeError as error:
    found.append(str(error))
if torch.distributed.get_rank() == 0:
    print(*found, sep="\\n")
"""


def test_what_is_not_possible_over_gloo(parts, tmp_path):
    """With the libraries' own classes alone: FSDP and tensor parallelism by accelerate on CPUs, and pictures as the
    first thing that a model divided by FSDP2 is asked about."""
    folder = parts.llava_hf()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    code = CANNOT.format(folder=str(folder), tokens=config["image_seq_length"], image=config["image_token_index"])
    (tmp_path / "cannot.py").write_text(code, encoding="utf-8")
    plain = ("-m", "accelerate.commands.accelerate_cli", "launch", "--use_fsdp", "--fsdp_version", "2")
    plain += ("--num_processes", "2", "--main_process_port", "0")
    refused, kind, mixed = launch(plain, tmp_path / "cannot.py").stdout.splitlines()
    assert refused.startswith("ParallelismConfig is only compatible")
    assert kind == "MULTI_CPU"
    assert mixed.startswith("aten.convolution.default: got mixed torch.Tensor and DTensor")
