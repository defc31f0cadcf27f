# SPDX-License-Identifier: Apache-2.0
"""Adapters that are put on by PEFT itself: a sparse model says so where its experts get none."""

import copy

import pytest
import torch

from moellava import MoellavaForCausalLM, load_pretrained_model, upcycle
from moellava.parts.modular_experts_moellava import modular_experts


peft = pytest.importorskip("peft")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SAID = f"target_parameters={sorted(EXPERTS)}"
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLPS = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def model_of(parts):
    """A function: a new model, sparse in some layers or all, with a dense MLP beside, or by its language model."""
    tower = parts.vision_tower("clip")
    dense = load_pretrained_model(parts.language_model("llama"), mm_vision_tower=tower, device="cpu").model
    models = {
        "some layers": upcycle(dense, num_experts=2),
        "all layers": upcycle(dense, num_experts=2, layers="dense"),
        "with a dense MLP": upcycle(dense, num_experts=2, layers="dense", use_residual=True),
        "dense": dense,
    }
    for family in ("mixtral", "qwen2_moe"):
        own = parts.language_model(family, padded_rows=1)
        models[family] = load_pretrained_model(own, mm_vision_tower=tower, device="cpu").model
    return lambda name: copy.deepcopy(models[name])


SPARSE = ("some layers", "all layers", "with a dense MLP", "mixtral", "qwen2_moe")
# Adapters that were meant for the experts too, and that were not or reach them.
LEAVE_OUT = {
    "all linear": {"target_modules": "all-linear"},
    "all linear, with a task": {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    "all but the tower": {"target_modules": "all-linear", "exclude_modules": ".*vision_tower.*"},
    "the projector in full": {"target_modules": "all-linear", "modules_to_save": ["multi_modal_projector"]},
    "attention and MLPs": {"target_modules": LAYERS + MLPS},
    "a pattern": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
}
ARE_RIGHT = {
    "attention": {"target_modules": LAYERS},
    "two of it": {"target_modules": ["q_proj", "v_proj"]},
    "a pattern of attention": {"target_modules": r".*language_model.*\.[qv]_proj"},
    "the experts too": {"target_modules": "all-linear", "target_parameters": EXPERTS},
    "some of the experts' weights": {"target_modules": "all-linear", "target_parameters": EXPERTS[1:]},
    "the experts in full": {"target_modules": "all-linear", "modules_to_save": ["experts"]},
}


def warnings_of(caplog) -> list[str]:
    found = [record.getMessage() for record in caplog.records if "experts have no adapters" in record.getMessage()]
    caplog.clear()
    return found


@pytest.mark.parametrize("name", SPARSE)
def test_adapters_that_leave_out_the_experts_are_warned_of(model_of, caplog, name):
    for how, fields in LEAVE_OUT.items():
        model = model_of(name)
        peft.get_peft_model(model, peft.LoraConfig(r=2, **fields))
        (warning,) = warnings_of(caplog)
        assert SAID in warning, how


@pytest.mark.parametrize("name", SPARSE)
def test_adapters_as_meant_are_not_warned_of(model_of, caplog, name):
    for how, fields in ARE_RIGHT.items():
        model = model_of(name)
        peft.get_peft_model(model, peft.LoraConfig(r=2, **fields))
        assert not warnings_of(caplog), how


def test_a_dense_model_has_no_experts_to_leave_out(model_of, caplog):
    for fields in LEAVE_OUT.values():
        model = model_of("dense")
        peft.get_peft_model(model, peft.LoraConfig(r=2, **fields))
    assert not warnings_of(caplog)


def test_experts_that_are_linear_layers_get_adapters(model_of, caplog):
    with modular_experts():  # as in a quantised model
        model = MoellavaForCausalLM(model_of("some layers").config)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert any(".experts.1.down_proj.lora_A" in name for name, _ in adapted.named_parameters())
    assert not warnings_of(caplog)


def test_every_way_of_putting_adapters_on_is_heard(model_of, caplog, tmp_path):
    model_of("some layers").add_adapter(peft.LoraConfig(r=2, target_modules="all-linear"))  # transformers' own
    assert len(warnings_of(caplog)) == 1
    peft.get_peft_model(model_of("some layers"), peft.IA3Config(target_modules="all-linear", feedforward_modules=[]))
    assert len(warnings_of(caplog)) == 1
    adapted = peft.get_peft_model(model_of("some layers"), peft.LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path)
    warnings_of(caplog)
    assert not hasattr(adapted.unload(), "peft_config")
    peft.PeftModel.from_pretrained(model_of("some layers"), tmp_path)  # trained as it is; to be asked
    assert not warnings_of(caplog)
    peft.PeftModel.from_pretrained(model_of("some layers"), tmp_path, is_trainable=True)
    assert len(warnings_of(caplog)) == 1


def test_what_the_warning_advises_trains_the_experts(model_of):
    for name in ("all layers", "mixtral"):
        model = model_of(name)
        config = peft.LoraConfig(r=2, target_modules="all-linear", target_parameters=EXPERTS, lora_dropout=0)
        adapted = peft.get_peft_model(model, config).train()
        ids = torch.arange(8)[None]
        adapted(input_ids=ids, labels=ids).loss.backward()
        trained = [n for n, p in adapted.named_parameters() if ".experts." in n and p.grad is not None and p.grad.any()]
        assert trained and all("lora_" in n for n in trained), name
