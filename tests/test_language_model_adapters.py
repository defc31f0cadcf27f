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
"""LoRA adapters of a language model alone, put onto the model that was assembled of it."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moellava import load_pretrained_model


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 9, 14, 30, 41, 7]])
FORMS = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*\.self_attn\.(q|k)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rslora": {"target_modules": ["o_proj"], "use_rslora": True},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "ranks": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 3, "v_proj": 1},
        "alpha_pattern": {"model.layers.1.self_attn.q_proj": 5},
    },
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


def adapter_of(folder, to, **options):
    """Writes an adapter of a language model, of which every weight matters; returns the adapted model's logits."""
    language = AutoModelForCausalLM.from_pretrained(folder)
    tuned = peft.get_peft_model(language, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape) * 0.1
                parameter.copy_(parameter.abs() + noise.abs() if "magnitude" in name else parameter + noise)
    tuned.save_pretrained(to)
    with torch.no_grad():
        return tuned(input_ids=IDS).logits


@pytest.fixture
def loaded(parts):
    def load(folder, language, **options):
        tower = parts.vision_tower("clip")
        return load_pretrained_model(folder, model_base=language, mm_vision_tower=tower, device="cpu", **options).model

    return load


def check(model, expected):
    with torch.no_grad():
        found = model(input_ids=IDS).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not any("vision_tower" in name for name, _ in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("form", list(FORMS))
def test_an_adapter_of_the_language_model_alone(parts, loaded, tmp_path, form, merge):
    language = parts.language_model("llama")
    expected = adapter_of(language, tmp_path, **FORMS[form])
    with torch.no_grad():
        bare = AutoModelForCausalLM.from_pretrained(language)(input_ids=IDS).logits
    assert (expected - bare).abs().max() > 1e-2
    check(loaded(tmp_path, language, merge=merge), expected)


@pytest.mark.parametrize("family", ["mistral", "phi", "qwen2", "stablelm", "granite", "gpt_neox", "opt", "bloom"])
def test_every_family_by_its_own_names(parts, loaded, tmp_path, family):
    language = parts.language_model(family)
    expected = adapter_of(language, tmp_path, target_modules="all-linear")
    check(loaded(tmp_path, language), expected)


def test_onto_a_saved_model_of_that_language_model(parts, tmp_path):
    language = parts.language_model("llama")
    expected = adapter_of(language, tmp_path / "lora", target_modules="all-linear")
    whole = load_pretrained_model(language, mm_vision_tower=parts.vision_tower("clip"), device="cpu").model
    whole.save_pretrained(tmp_path / "model")
    check(load_pretrained_model(tmp_path / "lora", model_base=tmp_path / "model", device="cpu").model, expected)


@pytest.mark.parametrize("is_ours", [False, True])
def test_a_weight_without_a_place_is_an_error(parts, loaded, tmp_path, is_ours):
    language = parts.language_model("llama")
    if is_ours:
        model = load_pretrained_model(language, mm_vision_tower=parts.vision_tower("clip"), device="cpu").model
        config = peft.LoraConfig(r=2, target_modules=["q_proj"])
        peft.get_peft_model(model, config).save_pretrained(tmp_path)
    else:
        adapter_of(language, tmp_path, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.1." in name and "vision" not in name)
    moved = {key.replace("layers.1.", "layers.7."): tensor for key, tensor in tensors.items()}
    for changed in (moved, tensors | {"base_model.model.elsewhere.lora_A.weight": tensors[name].clone()}):
        save_file(changed, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"weight\(s\) of the adapter .* have no place in the model"):
            loaded(tmp_path, language)


def test_an_adapter_of_another_size_is_an_error(parts, loaded, tmp_path):
    language = parts.language_model("llama")
    adapter_of(language, tmp_path, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: tensor[:1] for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not fit the model"):
        loaded(tmp_path, language)
