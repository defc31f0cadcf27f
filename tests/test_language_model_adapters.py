# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of a language model alone, put onto the model that was assembled of it."""

import json
from pathlib import Path

import peft
import pytest
import torch
from parts import picture
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from moellava import load_pretrained_model
from moellava.cli import app


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
    "new rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 9]},
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


TIED_FORMS = {
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "both saved as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "new rows": {"trainable_token_indices": [3, 5, 9]},
    "neither": {},
}


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("form", list(TIED_FORMS))
def test_a_head_that_is_the_embedding(parts, loaded, tmp_path, form):
    language = parts.language_model("qwen2", tie_word_embeddings=True)
    expected = adapter_of(language, tmp_path / "lora", **{"target_modules": ["q_proj"], **TIED_FORMS[form]})
    check(loaded(tmp_path / "lora", language, merge=False), expected)
    merged = loaded(tmp_path / "lora", language)
    check(merged, expected)
    merged.save_pretrained(tmp_path / "model")
    check(load_pretrained_model(tmp_path / "model", device="cpu").model, expected)
    assert merged.config.tie_word_embeddings == (form in ("neither", "both saved as one"))


def offloading(parts, language, folder):
    """Returns what puts the language model's layers off to disk, and its embedding and its head too."""
    whole = load_pretrained_model(language, mm_vision_tower=parts.vision_tower("clip"), device="cpu").model
    places = {f"model.{name}": "cpu" for name, _ in whole.model.named_children() if name != "language_model"}
    places |= {f"model.language_model.{name}": "disk" for name, _ in whole.model.language_model.named_children()}
    return {"device_map": {**places, "lm_head": "disk"}, "offload_folder": str(folder)}


def files(*folders):
    return {path: path.read_bytes() for folder in folders for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize(
    ("form", "merge"),
    [("all-linear", True), ("all-linear", False), ("dora", True)]
    + [(form, False) for form in ("head saved", "embedding saved", "head", "embedding")],
)
def test_onto_a_model_with_offloaded_weights(parts, tmp_path, monkeypatch, form, merge):
    (tmp_path / "here").mkdir()
    language, tower = parts.language_model("llama"), parts.vision_tower("clip")
    expected = adapter_of(language, tmp_path / "lora", **FORMS[form])
    options = offloading(parts, language, tmp_path / "offloaded")
    load_pretrained_model(language, mm_vision_tower=tower, device="cpu").model.save_pretrained(
        tmp_path / "here" / "whole"
    )
    monkeypatch.chdir(tmp_path / "here")
    before = files(".", language)
    # Relative: PEFT's own loader would write over the base's files.
    check(load_pretrained_model(tmp_path / "lora", model_base="whole", merge=merge, **options).model, expected)
    if form == "all-linear":
        options |= {"mm_vision_tower": tower, "model_base": language}
        check(load_pretrained_model(tmp_path / "lora", merge=merge, **options).model, expected)
    assert files(".", language) == before


@pytest.mark.parametrize(("form", "what"), [("dora", "uses DoRA"), ("new rows", "trains single tokens")])
def test_what_needs_the_bases_weights_is_not_put_onto_offloaded_ones(parts, tmp_path, form, what):
    language = parts.language_model("llama")
    adapter_of(language, tmp_path / "lora", **FORMS[form])
    options = offloading(parts, language, tmp_path / "offloaded") | {"mm_vision_tower": parts.vision_tower("clip")}
    with pytest.raises(ValueError, match=f"{what}, which needs the base's weights in memory"):
        load_pretrained_model(tmp_path / "lora", model_base=language, merge=False, **options)


def test_onto_experts_of_the_language_model(parts, loaded, tmp_path):
    language = parts.language_model("mixtral")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    expected = adapter_of(language, tmp_path, target_modules=["q_proj"], target_parameters=experts)
    check(loaded(tmp_path, language), expected)


def test_a_saved_adapter_is_loaded_again(parts, loaded, tmp_path):
    language = parts.language_model("llama")
    expected = adapter_of(language, tmp_path / "lora", target_modules="all-linear")
    loaded(tmp_path / "lora", language, merge=False).save_pretrained(tmp_path / "again")
    check(loaded(tmp_path / "again", language), expected)


def without_weights(folder, part):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: x for name, x in tensors.items() if part not in name}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("part", ["v_proj", "layers.1.self_attn.v_proj.lora_B"])
@pytest.mark.parametrize("is_ours", [False, True])
def test_layers_without_weights_are_named(parts, loaded, tmp_path, caplog, is_ours, part):
    language = parts.language_model("llama")
    options = {"target_modules": r".*language_model.*\.(q|v)_proj" if is_ours else ["q_proj", "v_proj"]}
    if is_ours:
        model = load_pretrained_model(language, mm_vision_tower=parts.vision_tower("clip"), device="cpu").model
        peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).save_pretrained(tmp_path)
    else:
        adapter_of(language, tmp_path, **options)
    loaded(tmp_path, language)
    assert "lacks weights" not in caplog.text
    without_weights(tmp_path, part)
    loaded(tmp_path, language)
    count = AutoConfig.from_pretrained(language).num_hidden_layers
    assert f"lacks weights of {count if part == 'v_proj' else 1} layer(s)" in caplog.text
    assert "layers.1.self_attn.v_proj" in caplog.text


@pytest.mark.parametrize(
    "fields", [{"target_modules": ["nothing"]}, {"target_modules": "(("}, {"r": "x"}, {"rank_pattern": {"q_proj": 7}}]
)
def test_a_config_that_does_not_fit_is_an_error(parts, loaded, tmp_path, fields):
    language = parts.language_model("llama")
    adapter_of(language, tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=r"(?s)The adapter .* does not fit the model .*adapter_config\.json"):
        loaded(tmp_path, language)


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


def test_asking_with_an_adapter_of_a_saved_model(parts, tmp_path):
    language = parts.language_model("llama")
    adapter_of(language, tmp_path / "lora", target_modules="all-linear")
    whole = load_pretrained_model(language, mm_vision_tower=parts.vision_tower("clip"), device="cpu").model
    whole.save_pretrained(tmp_path / "model")
    picture(1).save(tmp_path / "scan.png")

    def ask(*options):
        asked = CliRunner().invoke(app, ["ask", *map(str, options), "--device", "cpu", "--max-new-tokens", "8"])
        assert asked.exit_code == 0, asked.output
        return asked.stdout

    question = (tmp_path / "scan.png", "What is shown?")
    adapted = ask(tmp_path / "lora", *question, "--model-base", tmp_path / "model")
    load_pretrained_model(tmp_path / "lora", model_base=tmp_path / "model", device="cpu").model.save_pretrained(
        tmp_path / "merged"
    )
    assert adapted == ask(tmp_path / "merged", *question) != ask(tmp_path / "model", *question)
