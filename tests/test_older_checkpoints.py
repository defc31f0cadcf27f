# SPDX-License-Identifier: Apache-2.0
"""Older checkpoints: written by a writer and judged by a reference that know nothing of the converter.

`older.py` writes them in the older layout, `older_reference.py` computes in float64 what they say, and here both are
compared with what `load_pretrained_model` and `moellava convert` make of the same folder.
"""

import base64
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from older import (
    ABSENT,
    CLASS_STEMS,
    FAMILIES,
    FFN,
    HIDDEN,
    SHARDS,
    TRAINERS_TOWER,
    Older,
    moe_layers,
    write_llava15,
    write_older,
    write_tower,
)
from older_reference import IMAGE, Reference, expand2square, tokens_of
from parts import picture, pictures, run_python
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from typer.testing import CliRunner

import moellava
from moellava import load_pretrained_model
from moellava.cli import app
from moellava.converting import OlderCheckpointError
from moellava.converting.legacy_weights import merge_lora


TOLERANCE = 1e-4

# What a sparse checkpoint may say beside the training scripts' `moe`.
FORMS = {
    "one expert": {"moe": {"top_k_experts": 1}},
    "residual": {"moe": {"use_residual": True}},
    "residual, one expert": {"moe": {"use_residual": True, "top_k_experts": 1}},
    "explicit layers": {"moe": {"moe_layers_idx": [1, 2, 3], "moe_mode": "sparse", "num_experts": [4] * 3}},
    "layers by their mode": {"moe": {"moe_layers_idx": ABSENT, "moe_mode": "second_half"}},
    "no list of layers": {"moe": {"moe_layers_idx": None, "moe_mode": "first_half"}},
    "a number of experts": {"moe": {"num_experts": 3}},
    "one number in a list": {"moe": {"num_experts": [4]}},
    "defaults left out": {
        "moe": dict.fromkeys(("ep_size", "capacity_factor", "min_capacity", "use_residual", "train_modules"), ABSENT)
    },
    "Med-MoE": {"med_moe": True},
    "Med-MoE with a residual": {"med_moe": True, "moe": {"use_residual": True}},
}

TEXT = [17, 203, 45, 301, 88, 12, 150, 333, 61, 274, 19]
WITH_PICTURE = [21, 210, 34, IMAGE, 77, 145, 302, 18, 99, 250, 41, 360]
WITH_TWO = [30, IMAGE, 101, 222, IMAGE, 64, 313, 29]

PROMPT = (
    "A chat between a curious user and a careful assistant. USER: <image>\nWhat is shown in this picture? ASSISTANT:"
)


# ---------------------------------------------------------------------------------------------------------------------
# What the tests share
# ---------------------------------------------------------------------------------------------------------------------


class Shop:
    """Older checkpoints and the models loaded from them, made once. Tests that change one work on a copy."""

    def __init__(self, root: Path):
        self.root = root
        self.written: dict[str, Older] = {}
        self.models: dict[Path, tuple] = {}

    def tower(self, kind: str = "clip") -> Path:
        return write_tower(self.root / f"tower_{kind}", kind)

    def write(self, family: str, tower: str = "clip", **fields) -> Older:
        name = repr((family, tower, sorted(fields.items(), key=lambda item: item[0])))
        if name not in self.written:
            folder = self.root / f"{family}-{len(self.written)}"
            self.written[name] = write_older(folder, family, tower_folder=self.tower(tower), **fields)
        return self.written[name]

    def load(self, older: Older, **arguments) -> tuple:
        if arguments:
            return load_pretrained_model(str(older.folder), device="cpu", **arguments)
        if older.folder not in self.models:
            self.models[older.folder] = load_pretrained_model(str(older.folder), device="cpu")
        return self.models[older.folder]

    def copy(self, older: Older, to: Path, **changed) -> Path:
        """A copy of a folder with fields of its config changed; `ABSENT` takes one out."""
        shutil.copytree(older.folder, to)
        change_config(to, **changed)
        return to


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Shop:
    return Shop(tmp_path_factory.mktemp("older"))


def change_config(folder: Path, **changed) -> None:
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changed
    fields = {name: value for name, value in fields.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def change_weights(folder: Path, change) -> None:
    """Replaces what `model.safetensors` of a folder holds by what `change` returns for it."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: t.clone() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def reference_of(older: Older) -> Reference:
    return Reference(older.state, older.config, older.tower_folder, older.projector_prefix, older.tower_prefix)


def pixels_of(older: Older, *images) -> torch.Tensor:
    """The pixel values as the older code made them: a square of the mean colour, then the tower's own processor."""
    processor = AutoImageProcessor.from_pretrained(older.tower_folder, backend="pil")
    squares = [expand2square(image, processor.image_mean) for image in images]
    return processor(squares, return_tensors="pt")["pixel_values"]


def expanded(model, row: list[int]) -> list[int]:
    """A row with the picture token as often as the model wants it in the place of every `IMAGE`."""
    token, count = model.config.image_token_id, model.processor.num_image_tokens
    return [entry for one in row for entry in ([token] * count if one == IMAGE else [one])]


@torch.no_grad()
def logits_of(model, row: list[int], pixel_values: torch.Tensor | None = None) -> torch.Tensor:
    inputs = {} if pixel_values is None else {"pixel_values": pixel_values}
    return model(input_ids=torch.tensor([expanded(model, row)]), **inputs).logits[0]


def assert_near(found: torch.Tensor, expected: torch.Tensor, vocabulary: int, tolerance: float = TOLERANCE) -> None:
    """Every logit of every token that the tokenizer knows is within the tolerance of the largest."""
    assert found.shape[0] == expected.shape[0]
    found, expected = found[:, :vocabulary].double(), expected[:, :vocabulary].double()
    assert found.shape == expected.shape
    assert expected.std() > 0.1  # nothing is shown by logits that are all alike
    assert ((found - expected).norm() / expected.norm()).item() < tolerance
    assert ((found - expected).abs().max() / expected.abs().max()).item() < tolerance


def assert_same_answers(shop: Shop, older: Older, model=None) -> None:
    """A model says what the reference says: about text, one picture, and two."""
    model = shop.load(older)[0] if model is None else model
    reference = reference_of(older)
    assert_near(logits_of(model, TEXT), reference.logits(TEXT), older.vocabulary)
    if moe_layers(older.config):
        assert len(reference.chosen) > 1
    one, two = pixels_of(older, picture(1)), pixels_of(older, *pictures(2, seed=3))
    assert_near(logits_of(model, WITH_PICTURE, one), reference.logits(WITH_PICTURE, one), older.vocabulary)
    assert_near(logits_of(model, WITH_TWO, two), reference.logits(WITH_TWO, two), older.vocabulary)


# ---------------------------------------------------------------------------------------------------------------------
# The judge itself
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "class_name", "fields"),
    [
        ("llama", "Llama", {}),
        ("llama", "Llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("mistral", "Mistral", {}),
        ("mistral", "Mistral", {"sliding_window": 4}),
        ("phi", "Phi", {}),
        ("stablelm", "StableLm", {"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5}),
        ("qwen1_5", "Qwen2", {}),
    ],
)
def test_the_reference_agrees_with_transformers_own_classes(shop, family, class_name, fields):
    older = shop.write(family, with_tower_weights=False, **fields)
    own = {name: value for name, value in older.config.items() if name not in ("model_type", "architectures")}
    config = getattr(transformers, f"{class_name}Config")(**own)
    model = getattr(transformers, f"{class_name}ForCausalLM")(config).double().eval()
    state = {name: tensor for name, tensor in older.state.items() if "mm_projector" not in name}
    if family == "phi":
        state["lm_head.bias"] = torch.zeros(config.vocab_size)
    model.load_state_dict(state)
    with torch.no_grad():
        expected = model(torch.tensor([TEXT])).logits[0]
    assert_near(reference_of(older).logits(TEXT), expected, config.vocab_size, tolerance=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Every family, dense and sparse
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(shop, family, kind):
    older = shop.write(family, moe={} if kind == "sparse" else None)
    model, image_processor, tokenizer, context_len = shop.load(older)
    assert_same_answers(shop, older)
    assert not model.training
    assert (model.config.moe_config is None) == (kind == "dense")
    assert image_processor is model.processor.image_processor and tokenizer is model.processor.tokenizer
    assert context_len == older.config["max_position_embeddings"]


@pytest.mark.parametrize("family", ["phi", "qwen"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_sparse_layers(shop, family, form):
    assert_same_answers(shop, shop.write(family, **FORMS[form]))


@pytest.mark.parametrize("family", ["llama", "stablelm"])
def test_med_moe_of_gated_ffns(shop, family):
    older = shop.write(family, med_moe=True)
    assert_same_answers(shop, older)


def test_med_moe_is_told_by_its_keys(shop):
    """Its config has no field of its own; uploads of 2024 are of the plain architecture, with one expert each."""
    plain = shop.load(shop.write("phi", **FORMS["one expert"]))[0].config.moe_config
    med = shop.load(shop.write("phi", med_moe=True))[0].config.moe_config
    assert not plain.use_meta_expert and not plain.router_bias
    assert med.use_meta_expert and med.router_bias
    assert med.num_experts_per_tok == plain.num_experts_per_tok == 1


def test_a_biased_gate_without_a_meta_expert_is_loaded_as_it_is(shop, tmp_path):
    older = shop.write("phi", med_moe=True)
    folder = shop.copy(older, tmp_path / "biased")
    kept = {name: tensor for name, tensor in older.state.items() if ".meta_moe." not in name}
    change_weights(folder, lambda _: kept)
    model = load_pretrained_model(folder, device="cpu").model
    expected = Reference(kept, older.config, older.tower_folder, older.projector_prefix, older.tower_prefix)
    assert_near(logits_of(model, TEXT), expected.logits(TEXT), older.vocabulary)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama", {"rope_theta": 500.0, "rms_norm_eps": 0.05}),
        ("mistral", {"sliding_window": 4}),
        ("phi", {"partial_rotary_factor": 0.25, "layer_norm_eps": 0.05, "rope_theta": 500.0}),
        ("stablelm", {"use_qkv_bias": False, "rope_pct": 0.5, "norm_eps": 0.05, "rope_theta": 500}),
        ("qwen", {"rotary_emb_base": 500, "layer_norm_epsilon": 0.05}),
        ("qwen1_5", {"tie_word_embeddings": True, "rms_norm_eps": 0.05, "rope_theta": 500.0}),
        ("qwen1_5", {"num_key_value_heads": 2}),
        ("minicpm", {"scale_emb": 3, "scale_depth": 0.7, "dim_model_base": 32, "rms_norm_eps": 0.05}),
        ("minicpm", {"tie_word_embeddings": False}),
    ],
    ids=str,
)
def test_the_configs_own_values_are_used(shop, family, fields):
    assert_same_answers(shop, shop.write(family, moe={}, **fields))


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp3x_gelu", "pool_mlp2x_gelu", "qformer2_4"])
def test_projectors(shop, kind):
    older = shop.write("llama", projector=kind)
    assert_same_answers(shop, older)
    assert shop.load(older)[0].processor.num_image_tokens == (4 if kind.startswith(("pool", "qformer")) else 16)


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_weights_tell_whether_the_head_is_the_embedding_where_the_config_does_not(shop, tmp_path, is_tied):
    older = shop.write("qwen1_5", tie_word_embeddings=is_tied)
    folder = shop.copy(older, tmp_path / "untold", tie_word_embeddings=ABSENT)
    model = load_pretrained_model(folder, device="cpu").model
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == is_tied
    assert_same_answers(shop, older, model)


def test_the_names_of_llava_for_tower_and_projector_are_understood(shop, tmp_path):
    older = shop.write("llama", moe={})
    config = older.config
    folder = shop.copy(
        older,
        tmp_path / "aliases",
        mm_image_tower=ABSENT,
        mm_vision_tower=config["mm_image_tower"],
        image_projector_type=ABSENT,
        mm_projector_type=config["image_projector_type"],
    )
    assert_same_answers(shop, older, load_pretrained_model(folder, device="cpu").model)


def test_a_projector_one_level_higher_is_understood(shop, tmp_path):
    older = shop.write("phi")
    folder = shop.copy(older, tmp_path / "higher")
    change_weights(folder, lambda state: {name.replace(".image_spatial_proj", ""): t for name, t in state.items()})
    assert_same_answers(shop, older, load_pretrained_model(folder, device="cpu").model)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_classes_of_a_sparse_model(shop, family):
    trained, evaluated = shop.write(family, moe={}), shop.write(family, moe={}, architectures="eval")
    assert trained.config["architectures"] == [f"MoELLaVA{CLASS_STEMS[family]}ForCausalLM"]
    assert evaluated.config["architectures"] == [f"EvalMoELLaVA{CLASS_STEMS[family]}ForCausalLM"]
    assert_same_weights(shop.load(evaluated)[0].state_dict(), shop.load(trained)[0].state_dict())


def test_the_name_of_a_folder_says_nothing(shop, tmp_path):
    dense = shop.copy(shop.write("phi"), tmp_path / "MoE-LLaVA-Qwen-lora-Stage2")
    sparse = shop.copy(shop.write("phi", moe={}), tmp_path / "vicuna-7b")
    assert load_pretrained_model(dense, device="cpu").model.config.moe_config is None
    model = load_pretrained_model(sparse, device="cpu").model
    assert model.config.moe_config is not None
    assert model.config.text_config.model_type == "phi"


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_loss_counts_the_routers_balance_as_the_older_code_did(shop, family):
    older = shop.write(family, moe={})
    reference = reference_of(older)
    logits = reference.logits(TEXT)
    expected = F.cross_entropy(logits[:-1], torch.tensor(TEXT[1:])) + 0.01 * sum(reference.aux)
    ids = torch.tensor([TEXT])
    with torch.no_grad():
        # The head may have another number of rows than the source's, so the targets' part alone is compared.
        output = shop.load(older)[0](input_ids=ids, labels=ids)
    found = output.loss + F.cross_entropy(output.logits[0, :-1, : logits.shape[-1]].double(), ids[0, 1:])
    found = found - F.cross_entropy(output.logits[0, :-1].double(), ids[0, 1:])
    assert found.item() == pytest.approx(expected.item(), rel=TOLERANCE)
    assert len(reference.aux) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Bit by bit
# ---------------------------------------------------------------------------------------------------------------------


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [n for n, t in expected.items() if found[n].dtype != t.dtype or not torch.equal(found[n], t)] == []


_QWEN = {
    "transformer.wte.": "embed_tokens.",
    "transformer.ln_f.": "norm.",
    "ln_1.": "input_layernorm.",
    "ln_2.": "post_attention_layernorm.",
    "attn.c_proj.": "self_attn.o_proj.",
    "mlp.w2.": "mlp.gate_proj.",
    "mlp.w1.": "mlp.up_proj.",
    "mlp.c_proj.": "mlp.down_proj.",
}
# How the FFNs of a sparse layer call their matrices, and how ours does.
_PARTS = {"w2": "gate_proj", "w1": "up_proj", "c_proj": "down_proj"}


def expected_weights(older: Older) -> dict[str, torch.Tensor]:
    """What every tensor of the converted model has to be, from the source alone."""
    expected, experts = {}, {}
    for name, tensor in older.state.items():
        if name.startswith(older.tower_prefix):
            expected[f"model.vision_tower.{name.removeprefix(older.tower_prefix + 'vision_model.')}"] = tensor
        elif name.startswith(older.projector_prefix):
            number, _, kind = name.removeprefix(f"{older.projector_prefix}.").partition(".")
            expected[f"model.multi_modal_projector.linear_{1 + int(number) // 2}.{kind}"] = tensor
        elif name.startswith("lm_head."):
            expected[name] = tensor
        elif ".deepspeed_experts." in name:
            layer, _, rest = name.partition(".mlp.deepspeed_moe.experts.deepspeed_experts.")
            number, part, kind = rest.split(".")
            experts.setdefault((layer, part, kind), {})[int(number)] = tensor
        elif ".attn.c_attn." in name:
            layer, _, kind = name.partition(".attn.c_attn.")
            for part, rows in zip("qkv", tensor.split(HIDDEN), strict=True):
                expected[f"{ours(layer)}.self_attn.{part}_proj.{kind}"] = rows
        else:
            expected[ours(name)] = tensor
    for layer, part, kind in list(experts):
        numbered = experts[layer, part, kind]
        stacked = torch.stack([numbered[index] for index in range(len(numbered))])
        experts[layer, part, kind] = stacked
    for (layer, part, kind), stacked in experts.items():
        prefix = f"{ours(layer)}.mlp.experts"
        if part in ("fc1", "fc2"):
            own = {"fc1": "up_proj", "fc2": "down_proj"}[part]
            expected[f"{prefix}.{own}" + ("_bias" if kind == "bias" else "")] = stacked
        elif part in ("w2", "gate_proj"):
            up = experts[layer, "w1" if part == "w2" else "up_proj", kind]
            expected[f"{prefix}.gate_up_proj"] = torch.cat([stacked, up], dim=1)
            assert expected[f"{prefix}.gate_up_proj"].shape == (4, 2 * FFN, HIDDEN)
        elif part in ("c_proj", "down_proj"):
            expected[f"{prefix}.down_proj"] = stacked
    return expected


def ours(name: str) -> str:
    for old, new in (("mlp.deepspeed_moe.gate.wg.", "mlp.gate."), ("mlp.meta_moe.", "mlp.meta_expert.")):
        name = name.replace(old, new)
    head, inner, part = name.partition(".mlp.mlp.")
    if not inner:
        head, inner, part = name.partition(".mlp.meta_expert.")
    if inner:
        part, _, kind = part.partition(".")
        return f"{ours(head)}{inner}{_PARTS.get(part, part)}.{kind}"
    if name.startswith("transformer."):
        for old, new in _QWEN.items():
            name = name.replace(old, new)
        name = "model." + name.removeprefix("transformer.").replace("h.", "layers.", 1).removeprefix("model.")
    return name.replace("model.", "model.language_model.", 1)


EXACT = {
    "dense": {},
    "sparse": {"moe": {}},
    "residual": {"moe": {"use_residual": True}},
    "Med-MoE": {"med_moe": True},
}


@pytest.mark.parametrize(
    ("family", "form"),
    [(family, form) for family in FAMILIES for form in ("dense", "sparse")]
    + [(family, form) for family in ("phi", "qwen", "stablelm") for form in ("residual", "Med-MoE")],
)
def test_every_tensor_is_its_source_bit_by_bit(shop, family, form):
    older = shop.write(family, **EXACT[form])
    found = dict(shop.load(older)[0].state_dict())
    expected = expected_weights(older)
    if family == "minicpm":
        assert torch.equal(found.pop("lm_head.weight"), found["model.language_model.embed_tokens.weight"])
    if family == "phi" and "lm_head.bias" in found:
        assert not found.pop("lm_head.bias").any()
    assert found.keys() == expected.keys()
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        if name in expected:  # the rows that no token uses may have been cut off or added to
            found[name], expected[name] = found[name][: older.vocabulary], expected[name][: older.vocabulary]
    assert_same_weights(found, expected)


def test_half_precision_is_kept_and_routers_lose_nothing(shop):
    older = shop.write("phi", moe={}, dtype=torch.bfloat16, gate_dtype=torch.float32)
    model = shop.load(older)[0]
    found = model.state_dict()
    for name, tensor in expected_weights(older).items():
        if "embed_tokens" not in name and "lm_head" not in name:
            assert torch.equal(found[name].float(), tensor.float()), name
    assert model.dtype == torch.bfloat16
    assert found["model.language_model.layers.0.mlp.experts.up_proj"].dtype == torch.bfloat16
    # A dtype that is asked for wins.
    assert shop.load(older, dtype=torch.float32)[0].dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# LoRA weights among the others
# ---------------------------------------------------------------------------------------------------------------------


def whole_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Of so few digits that float32 holds their products exactly, and bfloat16 does not."""
    return torch.randint(-99, 100, shape, generator=torch.Generator().manual_seed(seed)).float()


def lora_layer(rows: int = 5, columns: int = 3, rank: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        "weight": whole_numbers(rows, columns, seed=seed),
        "lora_A.weight": whole_numbers(rank, columns, seed=seed + 1),
        "lora_B.weight": whole_numbers(rows, rank, seed=seed + 2),
    }


def merged(layer: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    """What a layer has to become, element by element."""
    weight, a, b = (layer[name].double() for name in ("weight", "lora_A.weight", "lora_B.weight"))
    total = weight.clone()
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            total[row, column] += scale * sum(b[row, k] * a[k, column] for k in range(a.shape[0]))
    return total.to(layer["weight"].dtype)


@pytest.mark.parametrize("scale", [2.5, 1.0, -0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_adds_the_scaled_product_in_float32_and_keeps_the_dtype(dtype, scale):
    layer = lora_layer()
    layer["weight"] = layer["weight"].to(dtype)
    before = {name: tensor.clone() for name, tensor in layer.items()}
    found = merge_lora({f"q.{name}": tensor for name, tensor in layer.items()}, scale, "a model")
    assert_same_weights(found, {"q.weight": merged(layer, scale)})
    assert_same_weights(layer, before)


def test_merge_takes_several_adapters_and_leaves_the_rest(tmp_path):
    """PEFT names the weight below an adapter `base_layer`, and the adapter's own with or without `default`."""
    first, second = lora_layer(seed=10), lora_layer(4, 6, 3, seed=20)
    bias, norm = torch.ones(5), torch.ones(3)
    source = {
        "model.q.base_layer.weight": first["weight"],
        "model.q.base_layer.bias": bias,
        "model.q.lora_A.default.weight": first["lora_A.weight"],
        "model.q.lora_B.default.weight": first["lora_B.weight"],
        "model.norm.weight": norm,
        **{f"model.v.{name}": tensor for name, tensor in reversed(second.items())},
    }
    found = merge_lora(source, 0.5, "a model")
    expected = {"model.q.weight": merged(first, 0.5), "model.v.weight": merged(second, 0.5)}
    assert_same_weights(found, expected | {"model.q.bias": bias, "model.norm.weight": norm})
    assert found["model.q.bias"] is bias and found["model.norm.weight"] is norm


@pytest.mark.parametrize("scale", [None, 2.0])
def test_merge_without_adapters_needs_no_scale_and_copies_nothing(scale):
    weight = torch.ones(2)
    found = merge_lora({"model.q.base_layer.weight": weight, "lm_head.bias": weight}, scale, "a model")
    assert list(found) == ["model.q.weight", "lm_head.bias"]
    assert all(tensor is weight for tensor in found.values())


def test_merge_without_a_scale_is_refused():
    with pytest.raises(
        OlderCheckpointError, match=r"of a model hold LoRA weights \(q, \.\.\.\).*no lora_alpha and lora_r"
    ):
        merge_lora({f"q.{name}": tensor for name, tensor in lora_layer().items()}, None, "a model")


BAD_LORA = {
    # name -> what a layer of 5 x 3 with adapters of rank 2 has instead, and what the message says
    "no A": ({"lora_A.weight": None}, "adapter of q in a model is not whole"),
    "no B": ({"lora_B.weight": None}, "adapter of q in a model is not whole"),
    "no weight": ({"weight": None}, "adapter of q in a model is not whole"),
    "ranks that differ": ({"lora_B.weight": torch.ones(5, 4)}, r"\(5, 3\), \(2, 3\), \(5, 4\), which do not belong"),
    "A of another width": ({"lora_A.weight": torch.ones(2, 4)}, r"\(5, 3\), \(2, 4\), \(5, 2\), which do not belong"),
    "B of another height": ({"lora_B.weight": torch.ones(6, 2)}, r"\(5, 3\), \(2, 3\), \(6, 2\), which do not belong"),
    "a row that would be spread": ({"weight": torch.ones(1, 3)}, r"\(1, 3\), \(2, 3\), .*which do not belong"),
    "a column that would be spread": ({"weight": torch.ones(5, 1)}, r"\(5, 1\), \(2, 3\), .*which do not belong"),
    "a number that would be spread": ({"weight": torch.ones(())}, r"\(\), \(2, 3\), .*which do not belong"),
    "A that is no matrix": ({"lora_A.weight": torch.ones(2)}, r"\(5, 3\), \(2,\), \(5, 2\), which do not belong"),
    "B that is no matrix": ({"lora_B.weight": torch.ones(5)}, r"\(5, 3\), \(2, 3\), \(5,\), which do not belong"),
}


@pytest.mark.parametrize("fault", BAD_LORA)
def test_merge_refuses_what_does_not_belong_together(fault):
    change, match = BAD_LORA[fault]
    layers = {f"p.{name}": tensor for name, tensor in lora_layer().items()}
    layers |= {f"q.{name}": tensor for name, tensor in (lora_layer() | change).items() if tensor is not None}
    with pytest.raises(OlderCheckpointError, match=match):
        merge_lora(layers, 1.0, "a model")


def test_what_is_merged_counts_as_used(shop, tmp_path):
    older = shop.write("phi", lora={"lora_r": 2, "lora_alpha": 5})
    layer = "model.layers.1.self_attn.q_proj"
    weights = lora_layer(HIDDEN, HIDDEN) | {"weight": older.state[f"{layer}.weight"]}
    folder = shop.copy(older, tmp_path / "source")
    change_weights(folder, lambda state: state | {f"{layer}.{name}": tensor for name, tensor in weights.items()})
    report = moellava.convert(folder, tmp_path / "out")
    assert report.num_used == len(older.state) + 2
    found = load_pretrained_model(tmp_path / "out", device="cpu").model.get_submodule(ours(layer)).weight
    torch.testing.assert_close(found, merged(weights, 2.5))


# ---------------------------------------------------------------------------------------------------------------------
# The tower and its pictures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("feature", "tokens"), [("patch", 15), ("cls_patch", 16)])
def test_siglip_loses_its_first_patch_where_the_config_says_patch(shop, feature, tokens):
    """729 - 1 = 728 tokens in the published models; 16 - 1 here."""
    older = shop.write("phi", "siglip", moe={}, mm_vision_select_feature=feature)
    model = shop.load(older)[0]
    assert model.processor.num_image_tokens == tokens
    assert_same_answers(shop, older)


def test_clip_with_its_class_token(shop):
    older = shop.write("llama", mm_vision_select_feature="cls_patch")
    assert shop.load(older)[0].processor.num_image_tokens == 17
    assert_same_answers(shop, older)


@pytest.mark.parametrize("layer", [-1, -3])
def test_the_layer_that_the_config_names(shop, layer):
    assert_same_answers(shop, shop.write("llama", mm_vision_select_layer=layer))


def test_the_towers_weights_come_from_its_folder_where_the_checkpoint_has_none(shop):
    older = shop.write("phi", moe={}, with_tower_weights=False)
    assert_same_answers(shop, older)  # in the other tests, the checkpoint's differ from the folder's
    with_its_own = shop.load(shop.write("phi", moe={}))[0].model.vision_tower.state_dict()
    found = shop.load(older)[0].model.vision_tower.state_dict()
    assert any(not torch.equal(tensor, with_its_own[name]) for name, tensor in found.items())


def test_a_tower_under_its_name_on_the_hub(shop, tmp_path, monkeypatch):
    name = "openai/clip-vit-large-patch14-336"
    (tmp_path / "openai").mkdir()
    (tmp_path / name).symlink_to(shop.tower(), target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    older = shop.write("phi", moe={}, with_tower_weights=False, image_tower=name)
    model = load_pretrained_model(older.folder, device="cpu").model
    assert_same_answers(shop, older, model)


@pytest.mark.parametrize("with_tower_weights", [True, False])
def test_a_tower_on_somebody_elses_machine(shop, tmp_path, with_tower_weights):
    older = shop.write("stablelm", moe={}, with_tower_weights=with_tower_weights, image_tower=TRAINERS_TOWER)
    with pytest.raises((ValueError, FileNotFoundError), match="mm_vision_tower") as caught:
        load_pretrained_model(older.folder, device="cpu")
    assert TRAINERS_TOWER in str(caught.value)
    with pytest.raises((ValueError, FileNotFoundError), match="vision_tower"):
        moellava.convert(older.folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

    # The given tower tells what the tower is; the checkpoint's own weights of it are still taken, where it has them.
    model = load_pretrained_model(older.folder, device="cpu", mm_vision_tower=str(shop.tower())).model
    assert_same_answers(shop, older, model)
    moellava.convert(older.folder, tmp_path / "out", vision_tower=str(shop.tower()))
    assert_same_answers(shop, older, load_pretrained_model(tmp_path / "out", device="cpu").model)


def other_weights(tower, to):
    """A tower of the same sizes with other weights."""
    shutil.copytree(tower, to)
    tensors = load_file(to / "model.safetensors")
    save_file({name: x + 1 if x.is_floating_point() else x for name, x in tensors.items()}, to / "model.safetensors")
    return to


@pytest.mark.parametrize("holds_tower", [True, False])
def test_another_tower_of_equal_width_is_told(shop, tmp_path, caplog, holds_tower):
    """The projector of an older checkpoint stays as it is, so that no other tower may come before it in silence."""
    older = shop.write("phi", with_tower_weights=holds_tower, tower_noise=0.0)
    folder = shop.copy(older, tmp_path / "model")
    other = other_weights(shop.tower(), tmp_path / "other")
    same = shutil.copytree(shop.tower(), tmp_path / "same")
    load_pretrained_model(str(folder), mm_vision_tower=str(same), device="cpu")
    assert "tower" not in caplog.text
    if holds_tower:
        model = load_pretrained_model(str(folder), mm_vision_tower=str(other), device="cpu").model
        assert "files hold the weights of a vision tower, which are taken" in caplog.text
        assert_same_answers(shop, older, model)
        return
    with pytest.raises(ValueError, match="is not the one that the config.json of .* names"):
        load_pretrained_model(str(folder), mm_vision_tower=str(other), device="cpu")
    with pytest.raises(ValueError, match="is not the one that the config.json of .* names"):
        moellava.convert(folder, tmp_path / "out", vision_tower=str(other))
    change_config(folder, mm_image_tower=TRAINERS_TOWER, mm_vision_tower=TRAINERS_TOWER)
    load_pretrained_model(str(folder), mm_vision_tower=str(other), device="cpu")
    assert f"names the vision tower {TRAINERS_TOWER}, and {other} takes its place" in caplog.text


def test_another_tower_for_a_llava_hf_checkpoint(parts, tmp_path):
    with pytest.raises(ValueError, match="is not the one that .* holds, with which the projector was trained"):
        moellava.convert(parts.llava_hf(), tmp_path / "out", vision_tower=str(parts.vision_tower("clip", seed=7)))
    assert not (tmp_path / "out").exists()


def test_a_given_tower_that_cannot_be_had(shop):
    """The message is about what was given, not about what the config names."""
    older = shop.write("stablelm", moe={}, image_tower=TRAINERS_TOWER)
    with pytest.raises(FileNotFoundError, match="/nowhere/clip") as caught:
        load_pretrained_model(older.folder, device="cpu", mm_vision_tower="/nowhere/clip")
    assert TRAINERS_TOWER not in str(caught.value)


def test_the_first_of_several_towers(shop, tmp_path):
    """The older config may hold a list; its code takes the first."""
    older = shop.write("phi")
    folder = shop.copy(older, tmp_path / "listed", mm_image_tower=[str(older.tower_folder), TRAINERS_TOWER])
    assert_same_answers(shop, older, load_pretrained_model(folder, device="cpu").model)


def test_a_tower_that_the_checkpoints_weights_do_not_fit_is_refused(shop):
    older = shop.write("stablelm", moe={}, image_tower=TRAINERS_TOWER)
    with pytest.raises(ValueError, match="tower"):
        load_pretrained_model(older.folder, device="cpu", mm_vision_tower=str(shop.tower("siglip")))


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_pictures_are_prepared_as_they_were(shop, tower):
    older = shop.write("phi", tower, moe={})
    processor = shop.load(older)[0].processor
    for image in pictures(5):
        found = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
        expected = pixels_of(older, image)
        assert found.shape == expected.shape
        # One level of 255 apart at most: what the two ways of resizing differ by.
        assert (found - expected).abs().max() < 1.01 / 255 / 0.26


def test_pictures_that_were_not_padded_still_are_not(shop):
    older = shop.write("llama", image_aspect_ratio="square")
    image = picture(1)
    processor = AutoImageProcessor.from_pretrained(older.tower_folder, backend="pil")
    expected = processor([image], return_tensors="pt")["pixel_values"]
    found = shop.load(older)[0].processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
    assert (found - expected).abs().max() < 1.01 / 255 / 0.26
    assert (pixels_of(older, image) - expected).abs().max() > 0.1


def test_pixels_of_another_size_are_refused_and_not_resized(shop):
    model = shop.load(shop.write("llama"))[0]
    with pytest.raises(ValueError, match="40"):
        logits_of(model, WITH_PICTURE, torch.randn(1, 3, 40, 40))


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def prompts_of(family: str) -> list[str]:
    stop = {"llama": "</s>", "minicpm": "</s>", "mistral": "<|end_of_turn|>"}.get(family, "<|endoftext|>")
    two_turns = f"{PROMPT} A red bus.{stop}USER: How many birds are there? ASSISTANT:"
    return [
        PROMPT,
        two_turns,
        "No picture.",
        "<image>",
        "<image>\n<image>\nSame?",
        "a<image><image>b",
        "What is <image>",
    ]


def ids_of(processor, prompt: str) -> list[int]:
    images = pictures(prompt.count("<image>")) or None
    return processor(images=images, text=prompt, return_tensors="pt")["input_ids"][0].tolist()


@pytest.mark.parametrize(
    ("family", "files"),
    [(family, "slow") for family in FAMILIES] + [(family, "fast") for family in ("phi", "stablelm", "qwen1_5")],
)
def test_prompts_become_the_tokens_that_they_became(shop, family, files):
    older = shop.write(family, moe={}, **({"tokenizer_files": "fast"} if files == "fast" else {}))
    model, _, tokenizer, _ = shop.load(older)
    for prompt in prompts_of(family):
        assert ids_of(model.processor, prompt) == expanded(model, tokens_of(prompt, older.tokenizer)), prompt
    assert tokenizer.pad_token == older.tokenizer.pad_token
    assert tokenizer.unk_token == older.tokenizer.unk_token
    assert tokenizer.eos_token == older.tokenizer.eos_token
    # The picture's token is none that meant something before, and the embedding has a row for it.
    assert model.config.image_token_id >= older.vocabulary
    assert model.get_input_embeddings().weight.shape[0] > model.config.image_token_id
    assert model.get_output_embeddings().weight.shape[0] == model.get_input_embeddings().weight.shape[0]


@pytest.mark.parametrize("family", ["llama", "phi", "qwen"])
def test_the_report_counts_parameters(shop, tmp_path, family):
    """Total: the numbers of the source. Active: without the experts that a token does not go to."""
    older = shop.write(family, moe={})
    report = moellava.convert(older.folder, tmp_path / "out")
    total = sum(tensor.numel() for tensor in older.state.values())
    experts = sum(tensor.numel() for name, tensor in older.state.items() if ".deepspeed_experts." in name)
    # What is added: rows for the picture's token, and Phi's bias of the head.
    added = report.num_parameters - total
    assert 0 <= added <= 64 * 2 * HIDDEN + older.config["vocab_size"] + 64
    assert report.num_parameters - report.num_active_parameters == experts // 2


@pytest.mark.parametrize("with_patch_token", [True, False])
def test_marks_around_pictures(shop, with_patch_token):
    """Where the config says so, a picture stands between two tokens, which the older loader adds to the tokenizer."""
    older = shop.write("phi", moe={}, mm_use_im_start_end=True, mm_use_im_patch_token=with_patch_token)
    model, _, tokenizer, _ = shop.load(older)
    added = ["<im_patch>"] * with_patch_token + ["<im_start>", "<im_end>"]
    ids = list(range(older.vocabulary, older.vocabulary + len(added)))
    assert tokenizer.convert_tokens_to_ids(added) == ids
    marks = ids[-2:]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompt = model.processor.apply_chat_template(messages, add_generation_prompt=True)
    assert "USER: <im_start><image><im_end>\nWhat? ASSISTANT:" in prompt
    ids = model.processor(images=picture(1), text=prompt, return_tensors="pt")["input_ids"][0].tolist()
    places = [index for index, token in enumerate(ids) if token == model.config.image_token_id]
    assert [ids[places[0] - 1], ids[places[-1] + 1]] == marks
    assert max(ids) < model.config.text_config.vocab_size


def test_the_context_that_the_config_says(shop):
    assert shop.load(shop.write("phi", moe={}, max_sequence_length=96))[3] == 96


@pytest.mark.parametrize("family", ["llama", "mistral", "phi"])
def test_a_saved_processor_makes_the_same_tokens(shop, tmp_path, family):
    older = shop.write(family, moe={})
    moellava.convert(older.folder, tmp_path / "out")
    model = load_pretrained_model(tmp_path / "out", device="cpu").model
    model.processor.save_pretrained(tmp_path / "again")
    for processor in (model.processor, AutoProcessor.from_pretrained(tmp_path / "again", trust_remote_code=True)):
        for prompt in prompts_of(family):
            assert ids_of(processor, prompt) == expanded(model, tokens_of(prompt, older.tokenizer)), prompt


def test_qwens_own_tokenizer(shop, tmp_path):
    """Published Qwen-1 models have `qwen.tiktoken` and code of their own, and no file that transformers reads."""
    older = shop.write("qwen", moe={}, vocab_size=640)
    folder = shop.copy(older, tmp_path / "qwen")
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink()
    bytes_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    lines = [
        f"{base64.b64encode(bytes(bytes_of[letter] for letter in token)).decode()} {rank}"
        for token, rank in vocabulary.items()
        if not token.startswith("<|")
    ]
    (folder / "qwen.tiktoken").write_text("\n".join(lines) + "\n", encoding="utf-8")
    own_code = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    fields = {"auto_map": own_code, "clean_up_tokenization_spaces": True, "model_max_length": 2048}
    fields |= {"padding_side": "right", "tokenizer_class": "QWenTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    model, _, tokenizer, _ = load_pretrained_model(folder, device="cpu")
    inputs = model.processor(images=picture(1), text=PROMPT, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == expanded(model, tokens_of(PROMPT, older.tokenizer))
    # Its code gives the ids after the last rank to these, and then to 205 tokens from <|extra_0|> on.
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"]
    assert tokenizer.convert_tokens_to_ids(special) == [len(lines) + index for index in (0, 1, 2, 3, 207)]


@pytest.mark.parametrize("line", ["IQ==", "IQ== 0 1", "IQ== first", "I?Q== 0", "IQ= 0", "é 0"])
def test_a_tokenizer_of_qwens_own_that_cannot_be_read(shop, tmp_path, refused, line):
    folder = shop.copy(shop.write("qwen", moe={}), tmp_path / "qwen")
    (folder / "vocab.json").unlink()
    (folder / "qwen.tiktoken").write_text(f"{line}\nIg== 1\n", encoding="utf-8")
    refused(folder, "qwen.tiktoken cannot be read .* expected a token in base64 and its rank on every line")


@torch.no_grad()
def continued(older: Older, row: list[int], count: int, pixel_values: torch.Tensor) -> list[int]:
    """The tokens that the reference says after a row."""
    reference, said = reference_of(older), []
    for _ in range(count):
        said.append(int(reference.logits([*row, *said], pixel_values)[-1, : older.vocabulary].argmax()))
    return said


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_said_token_by_token(shop, family):
    """With the cache: the older LLaMA and Mistral could not, and MiniCPM scaled those tokens alone."""
    older = shop.write(family, moe={})
    model, one = shop.load(older)[0], pixels_of(older, picture(1))
    ids = torch.tensor([expanded(model, WITH_PICTURE)])
    arguments = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "repetition_penalty": 1.0}
    expected = continued(older, WITH_PICTURE, 3, one)
    assert older.tokenizer.eos_token_id not in expected  # generate keeps it from being said, the reference does not
    # The random rows beyond the vocabulary are no tokens.
    arguments["suppress_tokens"] = list(range(older.vocabulary, model.get_output_embeddings().weight.shape[0]))
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=one, **arguments)
    assert found[0, ids.shape[1] :].tolist() == expected


# ---------------------------------------------------------------------------------------------------------------------
# Faults of the older code that do not come back
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("family", ["llama", "phi", "qwen"])
def test_a_batch_of_three(shop, family, kind):
    """The older code took a dense layer's output for the three outputs of a sparse one, if the batch had three rows."""
    model = shop.load(shop.write(family, moe={} if kind == "sparse" else None))[0]
    rows = [TEXT, TEXT[::-1], TEXT[3:] + TEXT[:3]]
    with torch.no_grad():
        together = model(input_ids=torch.tensor(rows)).logits
    for found, row in zip(together, rows, strict=True):
        assert_near(found, logits_of(model, row), found.shape[-1], tolerance=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_there_is_no_noise_at_inference(shop, family):
    """The older code drew the second expert, in evaluation too."""
    older = shop.write(family, moe={})
    model, one = shop.load(older)[0], pixels_of(older, picture(1))
    torch.manual_seed(0)
    first = logits_of(model, WITH_PICTURE, one)
    torch.manual_seed(1)
    assert torch.equal(logits_of(model, WITH_PICTURE, one), first)
    assert torch.equal(logits_of(load_pretrained_model(older.folder, device="cpu").model, WITH_PICTURE, one), first)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["sparse", "Med-MoE"])
def test_padding_changes_no_row(shop, form, side):
    """The older code sent padding to the experts, where it took the places of tokens."""
    older = shop.write("phi", **EXACT[form])
    model, one = shop.load(older)[0], pixels_of(older, picture(1))
    rows = [expanded(model, WITH_PICTURE), TEXT, TEXT[:4]]
    longest = max(map(len, rows))
    ids, mask = torch.full((3, longest), older.config["pad_token_id"]), torch.zeros(3, longest, dtype=torch.long)
    places = [slice(0, len(row)) if side == "right" else slice(longest - len(row), longest) for row in rows]
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=one).logits
    reference = reference_of(older)
    expected = [reference.logits(WITH_PICTURE, one), reference.logits(TEXT), reference.logits(TEXT[:4])]
    for index, place in enumerate(places):
        assert_near(found[index, place], expected[index], older.vocabulary)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_minicpm_scales_its_text_with_a_picture_and_without(shop, kind):
    """The older code left the scale out as soon as there was a picture."""
    older = shop.write("minicpm", moe={} if kind == "sparse" else None)
    model, one = shop.load(older)[0], pixels_of(older, picture(1))
    before = WITH_PICTURE.index(IMAGE)
    found = logits_of(model, WITH_PICTURE, one)[:before]
    assert_near(found, logits_of(model, WITH_PICTURE[:before]), older.vocabulary, tolerance=1e-5)


def test_the_published_number_of_experts_can_be_one_list_or_one_number(shop):
    """The older code failed on each of the two in another place; both say the same."""
    listed, number = shop.write("llama", moe={"num_experts": [4, 4]}), shop.write("llama", moe={"num_experts": 4})
    assert_same_weights(shop.load(listed)[0].state_dict(), shop.load(number)[0].state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("family", ["phi", "qwen"])
def test_layouts_of_files(shop, family, shards):
    expected = shop.load(shop.write(family, moe={}))[0].state_dict()
    assert_same_weights(shop.load(shop.write(family, moe={}, shards=shards))[0].state_dict(), expected)


@pytest.mark.parametrize("shards", ["sharded_safetensors", "sharded_bin"])
def test_shards_of_two_checkpoints(shop, tmp_path, refused, shards):
    folder = shop.copy(shop.write("phi", moe={}, shards=shards), tmp_path / "source")
    last = next(folder.glob("*-00003-of-00003.*"))
    other = last.name.replace("00003-of-00003", "00004-of-00004")
    shutil.copy(last, folder / other)
    refused(folder, f"holds {other}, which its index does not list")


def test_a_projector_beside_a_whole_checkpoint_is_left_alone(shop, tmp_path):
    """LLaVA-1.5 is published with the projector of its first stage, which the weights have in them, trained further."""
    older = shop.write("phi")
    folder = shop.copy(older, tmp_path / "source")
    torch.save({"model.mm_projector.0.weight": torch.zeros(HIDDEN, 3)}, folder / "mm_projector.bin")
    assert_same_answers(shop, older, load_pretrained_model(folder, device="cpu").model)


def test_a_second_copy_of_the_weights_is_left_alone(shop, tmp_path):
    """Runs of sparse models leave a whole pytorch_model.bin beside the shards; it is not read."""
    older = shop.write("phi", moe={}, shards="sharded_safetensors", duplicate_bin=True)
    folder = shop.copy(older, tmp_path / "copy")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    expected = shop.load(shop.write("phi", moe={}))[0].state_dict()
    assert_same_weights(load_pretrained_model(folder, device="cpu").model.state_dict(), expected)


def test_the_source_is_left_as_it_is(shop, tmp_path):
    older = shop.write("stablelm", moe={})
    before = {path.name: path.read_bytes() for path in sorted(older.folder.iterdir())}
    moellava.convert(older.folder, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in sorted(older.folder.iterdir())} == before


CONVERTED = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

torch.set_num_threads(1)
folder, work = {out!r}, {work!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
given = torch.load(work + "/given.pt")
picture = [processor.image_token_id] * processor.num_image_tokens
ids = [token for one in given["row"] for token in (picture if one < 0 else [one])]
with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids]), pixel_values=given["pixel_values"]).logits[0]
torch.save(logits, work + "/logits.pt")
assert "moellava" not in [name for name, module in sys.modules.items() if module is not None]
print(type(model).__name__)
"""


@pytest.mark.parametrize(
    ("family", "fields"),
    [("phi", {"med_moe": True}), ("qwen", {"moe": {"use_residual": True}}), ("minicpm", {})],
    ids=["phi", "qwen", "minicpm"],
)
def test_converted_once_it_loads_anywhere(shop, tmp_path, family, fields):
    older = shop.write(family, **fields)
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["convert", str(older.folder), str(out)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    one = pixels_of(older, picture(1))
    torch.save({"row": WITH_PICTURE, "pixel_values": one}, tmp_path / "given.pt")
    assert "Moellava" in run_python(CONVERTED.format(out=str(out), work=str(tmp_path)))
    found = torch.load(tmp_path / "logits.pt")
    assert_near(found, reference_of(older).logits(WITH_PICTURE, one), older.vocabulary)
    # What was converted is one of this package's checkpoints, and equal to what is loaded at once.
    assert_same_weights(load_pretrained_model(out, device="cpu").model.state_dict(), shop.load(older)[0].state_dict())
    assert not list(out.glob("*.bin")) and list(out.glob("*.safetensors"))


def test_a_loaded_model_is_saved_as_one_of_ours(shop, tmp_path):
    older = shop.write("stablelm", med_moe=True)
    model = shop.load(older)[0]
    model.save_pretrained(tmp_path / "saved")
    again = load_pretrained_model(tmp_path / "saved", device="cpu").model
    assert_same_weights(again.state_dict(), model.state_dict())
    assert_same_answers(shop, older, again)


def test_what_is_not_taken_over_is_noted(shop, tmp_path):
    older = shop.write("phi", moe={})
    folder = shop.copy(
        older, tmp_path / "source", pad_token_id=-1, mm_video_tower="LanguageBind/LanguageBind_Video_merge"
    )
    change_weights(folder, lambda state: state | {"model.video_tower.video_tower.weight": torch.ones(3)})
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["convert", str(folder), str(out), "--json"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["left_out"] == {"model.video_tower.video_tower.weight": "videos are not supported"}
    assert report["num_used"] == len(older.state) and report["out"] == str(out)
    notes = "\n".join(report["notes"])
    assert "pad_token_id -1 lies outside the vocabulary and is left out" in notes
    assert "the video tower is left out: videos are not supported" in notes
    model = load_pretrained_model(out, device="cpu").model
    assert model.config.text_config.pad_token_id is None
    assert_same_answers(shop, older, model)


def test_convert_in_python(shop, tmp_path):
    older = shop.write("qwen1_5", moe={})
    report = moellava.convert(older.folder, tmp_path / "out")
    assert report.num_used == len(older.state) and not report.left_out
    model, _, tokenizer, context_len = load_pretrained_model(tmp_path / "out", device="cpu")
    assert_same_answers(shop, older, model)
    assert context_len == older.config["max_position_embeddings"]
    assert tokenizer.pad_token == "<|extra_0|>"


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA-1.5
# ---------------------------------------------------------------------------------------------------------------------


def as_transformers_llava(older: Older) -> LlavaForConditionalGeneration:
    """The same weights as transformers' own LLaVA."""
    tower = transformers.CLIPVisionModel.from_pretrained(older.tower_folder)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            **{
                name: older.config[name]
                for name in (
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "rms_norm_eps",
                    "vocab_size",
                )
            }
        ),
        vision_config=tower.config,
        image_token_id=3,  # a token that no row has
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    names = {name.replace("vision_tower.vision_model.", "vision_tower."): name for name in model.state_dict()}
    state = {}
    for name, tensor in older.state.items():
        if name.endswith((".inv_freq", ".position_ids")):
            continue
        if name.startswith(older.tower_prefix):
            name = f"model.vision_tower.{name.removeprefix(older.tower_prefix + 'vision_model.')}"
        elif name.startswith(older.projector_prefix):
            name = name.replace(f"{older.projector_prefix}.0.", "model.multi_modal_projector.linear_1.")
            name = name.replace(f"{older.projector_prefix}.2.", "model.multi_modal_projector.linear_2.")
        elif name.startswith("model."):
            name = name.replace("model.", "model.language_model.", 1)
        state[names[name]] = tensor
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("published", {}),
        ("later", {"model_type": "llava_llama", "shards": "safetensors", "with_buffers": False}),
        ("shards", {"shards": "sharded_safetensors"}),
    ],
)
def test_llava15_equals_transformers_own(shop, tmp_path, name, fields):
    older = write_llava15(tmp_path / "llava-v1.5-7b", tower_folder=shop.tower(), **fields)
    model = load_pretrained_model(older.folder, device="cpu").model
    expected = as_transformers_llava(older)
    one = pixels_of(older, picture(1))
    ids = [entry for token in WITH_PICTURE for entry in ([3] * 16 if token == IMAGE else [token])]
    with torch.no_grad():
        logits = expected(input_ids=torch.tensor([ids]), pixel_values=one).logits[0]
        text = expected(input_ids=torch.tensor([TEXT])).logits[0]
    assert_near(logits_of(model, WITH_PICTURE, one), logits, older.vocabulary, tolerance=1e-5)
    assert_near(logits_of(model, TEXT), text, older.vocabulary, tolerance=1e-5)
    assert_same_answers(shop, older, model)


def test_llava15_is_converted_with_its_sampling_settings(shop, tmp_path):
    """Published: a temperature without sampling, which was greedy then and which transformers now refuses to save."""
    older = write_llava15(tmp_path / "llava", tower_folder=shop.tower())
    report = moellava.convert(older.folder, tmp_path / "out")
    model = load_pretrained_model(tmp_path / "out", device="cpu").model
    assert_same_answers(shop, older, model)
    assert not model.generation_config.do_sample
    assert model.generation_config.eos_token_id in (2, [2])
    buffers = {name for name in older.state if name.endswith((".inv_freq", ".position_ids"))}
    assert set(report.left_out) == buffers and len(buffers) == 5
    assert report.num_used == len(older.state) - len(buffers)


def test_llava16_sees_one_picture_as_a_whole(shop, tmp_path):
    """Its tiles are not made; what is left out because of that is named."""
    fields = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    fields |= {"image_grid_pinpoints": [[32, 64], [64, 32]], "model_type": "llava_llama", "shards": "safetensors"}
    older = write_llava15(tmp_path / "llava", tower_folder=shop.tower(), with_buffers=False, **fields)
    change_weights(older.folder, lambda state: state | {"model.image_newline": torch.ones(HIDDEN)})
    report = moellava.convert(older.folder, tmp_path / "out")
    assert list(report.left_out) == ["model.image_newline"]
    model = load_pretrained_model(tmp_path / "out", device="cpu").model
    assert_same_answers(shop, older, model)
    prepared = model.processor(images=picture(1), text="<image>", return_tensors="pt")
    assert prepared["pixel_values"].shape == (1, 3, 32, 32)


def test_llava15_without_its_tower(shop, tmp_path):
    older = write_llava15(tmp_path / "llava", tower_folder=shop.tower(), with_tower_weights=False, shards="bin")
    assert_same_answers(shop, older, load_pretrained_model(older.folder, device="cpu").model)
    change_config(older.folder, mm_vision_tower=TRAINERS_TOWER)
    with pytest.raises((ValueError, FileNotFoundError), match="mm_vision_tower"):
        load_pretrained_model(older.folder, device="cpu")
    model = load_pretrained_model(older.folder, device="cpu", mm_vision_tower=str(shop.tower())).model
    assert_same_answers(shop, older, model)


@pytest.mark.parametrize(
    ("tower", "strategy", "taken"),
    [
        ("clip", "default", ("default", False)),
        ("clip", "full", ("full", False)),
        ("siglip", "full", ("full", False)),
        ("siglip", "default", ("default", True)),
        ("vit", "default", ("default", False)),
        ("dinov2", "full", ("full", False)),
        ("dinov2_registers", "default", ("full", True)),
        ("dinov3", "default", ("full", True)),
        ("deit", "default", ("full", True)),
        ("beit", "default", ("default", False)),
    ],
)
def test_llava_hf(parts, tmp_path, tower, strategy, taken):
    """What transformers' own LLaVA saves. By default it drops the first token, whatever it is, and no other."""
    folder = parts.llava_hf(tower, strategy=strategy)
    own = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    own_processor = LlavaProcessor.from_pretrained(folder)
    model = load_pretrained_model(folder, device="cpu").model
    assert (model.config.vision_feature_select_strategy, model.config.drop_first_patch) == taken
    inputs = own_processor(
        images=picture(1).resize((32, 32)), text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt"
    )
    ids = inputs["input_ids"][0]
    row, features = [], (ids == own.config.image_token_id).sum().item()
    assert features == model.processor.num_image_tokens
    for position, token in enumerate(ids.tolist()):
        if token != own.config.image_token_id:
            row.append(token)
        elif ids[position - 1] != own.config.image_token_id:
            row.append(IMAGE)
    with torch.no_grad():
        expected = own(**inputs).logits[0]
    found = logits_of(model, row, inputs["pixel_values"])
    assert_near(found, expected, len(own_processor.tokenizer), tolerance=1e-5)

    report = moellava.convert(folder, tmp_path / "out")
    assert ("drops one token of every tower" in " ".join(report.notes)) is taken[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    again.processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(logits_of(again, row, inputs["pixel_values"]), found)


def test_llava_hf_of_an_older_transformers(parts, tmp_path):
    """Its files hold buffers too, which are computed anew."""
    folder = parts.copy(parts.llava_hf("clip"), tmp_path / "source")
    buffers = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    before = len(load_file(folder / "model.safetensors"))
    change_weights(folder, lambda state: state | buffers)
    report = moellava.convert(folder, tmp_path / "out")
    assert report.left_out == dict.fromkeys(buffers, "computed anew")
    assert report.num_used == before


# ---------------------------------------------------------------------------------------------------------------------
# Bad sources
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path):
    """A function: a folder is refused with a message, by both ways of reading it, and nothing is written."""

    def check(folder: Path, match: str, *, errors=(ValueError, FileNotFoundError)) -> str:
        target = tmp_path / "target"
        target.mkdir()
        source = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
        with pytest.raises(errors, match=match) as caught:
            moellava.convert(folder, target / "out")
        assert list(target.iterdir()) == []
        with pytest.raises(errors, match=match):
            load_pretrained_model(folder, device="cpu")
        assert {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))} == source
        return str(caught.value)

    return check


@pytest.mark.parametrize("shards", ["sharded_safetensors", "sharded_bin"])
def test_a_missing_shard(shop, tmp_path, refused, shards):
    folder = shop.copy(shop.write("phi", moe={}, shards=shards), tmp_path / "source")
    gone = next(folder.glob("*-00002-of-*"))
    gone.unlink()
    refused(folder, gone.name)


@pytest.mark.parametrize(
    "asked",
    [{"moe_config": {"num_experts": 2}}, {"projector_config": {"type": "linear"}}, {"projector_type": "qformer"}],
    ids=lambda asked: next(iter(asked)),
)
def test_other_parts_than_its_own_are_asked_for_after_the_conversion(shop, tmp_path, asked):
    folder = shop.copy(shop.write("phi"), tmp_path / "source")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is an older checkpoint, whose projector and experts.*`moellava convert`"):
        load_pretrained_model(folder, device="cpu", **asked)


def test_no_weights_at_all(shop, tmp_path, refused):
    folder = shop.copy(shop.write("phi", moe={}), tmp_path / "source")
    (folder / "model.safetensors").unlink()
    refused(folder, "safetensors")


BAD_WEIGHTS = {
    # name -> what is done to the tensors, and what the message names
    "a key that nobody knows": (
        lambda state: state | {"model.layers.1.mlp.surprise.weight": torch.ones(3)},
        r"model\.layers\.1\.mlp\.surprise\.weight",
    ),
    "a key of nowhere": (lambda state: state | {"ema.shadow": torch.ones(3)}, r"ema\.shadow"),
    "a layer too many": (
        lambda state: state | {n.replace(".3.", ".4."): t for n, t in state.items() if n.startswith("model.layers.3.")},
        r"layers\.4\.",
    ),
    "an expert too many": (
        lambda state: state | {n.replace("experts.3.", "experts.4."): t for n, t in state.items() if "experts.3." in n},
        "expert",
    ),
    "no norm": (lambda state: {n: t for n, t in state.items() if "final_layernorm" not in n}, "final_layernorm"),
    "an expert too few": (
        lambda state: {n: t for n, t in state.items() if "layers.2.mlp" not in n or "experts.3." not in n},
        "expert",
    ),
    "half an expert": (
        lambda state: {
            n: t
            for n, t in state.items()
            if not n.endswith("layers.2.mlp.deepspeed_moe.experts.deepspeed_experts.1.fc2.bias")
        },
        "expert",
    ),
    "no gate": (lambda state: {n: t for n, t in state.items() if "layers.2.mlp.deepspeed_moe.gate" not in n}, "gate"),
    "no projector": (lambda state: {n: t for n, t in state.items() if "mm_projector" not in n}, "projector"),
    "half a tower": (
        lambda state: {n: t for n, t in state.items() if "vision_model.encoder.layers.1." not in n},
        "tower|vision",
    ),
    "a wrong shape": (
        lambda state: state | {"model.layers.1.self_attn.k_proj.weight": torch.ones(HIDDEN // 2, HIDDEN)},
        r"k_proj",
    ),
    "an expert of another width": (
        lambda state: (
            state
            | {"model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.1.fc1.weight": torch.ones(FFN + 1, HIDDEN)}
        ),
        "fc1|up_proj",
    ),
    "a projector of another width": (
        lambda state: state | {"model.mm_projector.image_spatial_proj.0.weight": torch.ones(HIDDEN, 7)},
        "projector",
    ),
    "both a dense FFN and experts": (
        lambda state: state | {"model.layers.0.mlp.fc1.weight": torch.ones(FFN, HIDDEN)},
        r"layers\.0\.mlp\.fc1",
    ),
}


@pytest.mark.parametrize("fault", BAD_WEIGHTS)
def test_bad_weights(shop, tmp_path, refused, fault):
    change, match = BAD_WEIGHTS[fault]
    folder = shop.copy(shop.write("phi", moe={}), tmp_path / "source")
    change_weights(folder, change)
    refused(folder, match)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (3 * HIDDEN + 3, "q_proj"),
        (3 * HIDDEN + 1, r"c_attn.weight is \(193, 64\); expected queries, keys and values of one width"),
    ],
)
def test_qwens_fused_attention_of_another_shape(shop, tmp_path, refused, rows, match):
    folder = shop.copy(shop.write("qwen", moe={}), tmp_path / "source")
    name = "transformer.h.1.attn.c_attn.weight"
    change_weights(folder, lambda state: state | {name: torch.ones(rows, HIDDEN)})
    refused(folder, match)


BAD_CONFIGS = {
    "an unknown projector": ({"image_projector_type": "mystery9"}, "mystery9"),
    "a projector without its number": ({"image_projector_type": "mlpx_gelu"}, "mlpx_gelu"),
    "an unknown feature": ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature|cls"),
    "a family that nobody knows": ({"model_type": "moe_llava_gemma"}, "gemma"),
    "MPT": ({"model_type": "llava_mpt", "architectures": ["LlavaMPTForCausalLM"]}, "mpt"),
    "experts in a dense type": ({"model_type": "llava_phi", "moe": ABSENT}, "expert|moe"),
    "no experts in a sparse type": ({"moe": ABSENT}, "model_type 'moe_llava_phi', but under 'moe', .*it has none"),
    "a width that is no number": ({"hidden_size": "wide"}, "does not describe a phi language model .*hidden_size"),
    "no tower": ({"mm_image_tower": None}, "tower"),
    "fewer layers than the file": ({"num_hidden_layers": 3}, "layers"),
    "no width": ({"hidden_size": ABSENT}, "hidden_size|shape|expected"),
}
BAD_MOE = {
    "no number of experts": ({"num_experts": ABSENT}, "num_experts"),
    "more experts than the file": ({"num_experts": [8, 8]}, "expert"),
    "fewer experts than the file": ({"num_experts": [2, 2]}, "expert"),
    "layers with other numbers of experts": ({"num_experts": [4, 2]}, "num_experts"),
    "experts that are no number": ({"num_experts": "four"}, "num_experts"),
    "other layers than the file": ({"moe_layers_idx": [1, 3]}, "layer"),
    "a layer fewer than the file": (
        {"moe_layers_idx": [0], "num_experts": 4},
        r"experts in the layers \[0, 2\], its config says \[0\]",
    ),
    "a layer more than the file": (
        {"moe_layers_idx": [0, 2, 3], "num_experts": 4},
        r"experts in the layers \[0, 2\], its config says \[0, 2, 3\]",
    ),
    "experts that are switched off": ({"moe_enable": False}, "under 'moe', .*moe_enable is false"),
    "the experts of one process": ({"ep_size": 2}, "trained with ep_size 2: its files hold the experts of one process"),
    "a layer that is not there": ({"moe_layers_idx": [0, 2, 9], "num_experts": 4}, "9"),
    "an unknown mode and no layers": ({"moe_layers_idx": ABSENT, "moe_mode": "thirds"}, "thirds|moe_mode"),
    "a residual that the file has not": ({"use_residual": True}, "residual|coefficient"),
    "more experts a token than there are": ({"top_k_experts": 5}, "top_k_experts|num_experts_per_tok"),
}


@pytest.mark.parametrize("fault", BAD_CONFIGS)
def test_bad_configs(shop, tmp_path, refused, fault):
    changed, match = BAD_CONFIGS[fault]
    refused(shop.copy(shop.write("phi", moe={}), tmp_path / "source", **changed), match)


@pytest.mark.parametrize("fault", BAD_MOE)
def test_bad_mixtures(shop, tmp_path, refused, fault):
    changed, match = BAD_MOE[fault]
    older = shop.write("phi", moe={})
    moe = {name: value for name, value in (older.config["moe"] | changed).items() if value is not ABSENT}
    refused(shop.copy(older, tmp_path / "source", moe=moe), match)


@pytest.mark.parametrize(
    "changed",
    [{"no_bias": False}, {"kv_channels": 32}, {"rotary_pct": 0.5}, {"rotary_emb_base": ABSENT}],
    ids=lambda changed: next(iter(changed)),
)
def test_qwens_that_are_no_qwen2(shop, tmp_path, changed):
    """What Qwen2 has no word for is refused, not left out; what is absent has Qwen-1's default."""
    folder = shop.copy(shop.write("qwen", moe={}), tmp_path / "source", **changed)
    (name,) = changed
    if changed[name] is ABSENT:
        text_config = load_pretrained_model(folder, device="cpu").model.config.text_config
        assert text_config.rope_parameters["rope_theta"] == 10000
        return
    with pytest.raises(ValueError, match=name):
        load_pretrained_model(folder, device="cpu")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {"lm_head.weight": 5}}', "[]", "no JSON"])
def test_an_index_that_is_none(shop, tmp_path, refused, content):
    folder = shop.copy(shop.write("phi", moe={}, shards="sharded_safetensors"), tmp_path / "source")
    (folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    refused(folder, "model.safetensors.index.json")


class Harmful:
    """Unpickled, it writes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("form", ["zip", "plain pickle", "shard"])
def test_a_malicious_pickle(shop, tmp_path, refused, form):
    older = shop.write("phi", moe={}, shards="sharded_bin" if form == "shard" else "bin")
    folder = shop.copy(older, tmp_path / "source")
    trace = tmp_path / "trace"
    name = "pytorch_model-00002-of-00003.bin" if form == "shard" else "pytorch_model.bin"
    state = torch.load(folder / name) | {"harm": Harmful(str(trace))}
    if form == "plain pickle":
        (folder / name).write_bytes(pickle.dumps({"harm": Harmful(str(trace))}))
    else:
        torch.save(state, folder / name)
    message = refused(folder, name)
    assert not trace.exists()
    assert "pickle" in message or "weights_only" in message or "code" in message


@pytest.mark.parametrize("form", ["above", "absolute"])
def test_an_index_that_points_outside(shop, tmp_path, refused, form):
    folder = shop.copy(shop.write("phi", moe={}, shards="sharded_safetensors"), tmp_path / "source")
    shard = folder / "model-00002-of-00003.safetensors"
    outside = tmp_path / "outside.safetensors"
    shard.rename(outside)
    index = folder / "model.safetensors.index.json"
    path = "../outside.safetensors" if form == "above" else str(outside)
    index.write_text(index.read_text(encoding="utf-8").replace(shard.name, path), encoding="utf-8")
    refused(folder, "outside")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_damaged_files(shop, tmp_path, refused, name):
    older = shop.write("phi", moe={}, **({"shards": "bin"} if name.endswith("bin") else {}))
    folder = shop.copy(older, tmp_path / "source")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    refused(folder, name)


def test_no_tokenizer(shop, tmp_path, refused):
    folder = shop.copy(shop.write("phi", moe={}), tmp_path / "source")
    for path in (*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("merges*"), *folder.glob("special*")):
        path.unlink()
    refused(folder, "tokenizer")


def test_a_failed_conversion_leaves_what_was_there(shop, tmp_path):
    older = shop.write("phi", moe={})
    folder = shop.copy(older, tmp_path / "source", image_projector_type="mystery9")
    done = subprocess.run(
        [sys.executable, "-m", "moellava", "convert", str(folder), str(tmp_path / "out")],
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 1
    assert "mystery9" in done.stderr and "Traceback" not in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_a_folder_that_holds_something_is_not_written_into(shop, tmp_path):
    older = shop.write("phi", moe={})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="out"):
        moellava.convert(older.folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("spelled", ["the same", "through a folder that is not there", "through a link"])
def test_a_source_is_not_converted_onto_itself(shop, tmp_path, spelled):
    folder = shop.copy(shop.write("phi", moe={}), tmp_path / "source")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    out = {"the same": folder, "through a link": tmp_path / "link"}.get(spelled, tmp_path / "no" / ".." / "source")
    with pytest.raises((FileExistsError, ValueError)):
        moellava.convert(folder, out)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


_INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def test_a_mistral_with_a_template_of_its_own_keeps_it(shop, tmp_path, caplog):
    folder = shop.copy(shop.write("mistral"), tmp_path / "model", image_aspect_ratio="anyres")
    for path in folder.glob("*token*.json"):
        # OpenChat's token would make it another model.
        path.write_text(path.read_text().replace("<|end_of_turn|>", "<|another|>"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": _INST}))
    model = load_pretrained_model(str(folder), mm_vision_tower=str(shop.tower()), device="cpu").model
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    prompt = model.processor.apply_chat_template([question], add_generation_prompt=True)
    assert prompt == "<s>[INST] <image>\nWhat is it? [/INST]"
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("image_aspect_ratio 'anyres' is left out" in text for text in warned)
    assert any("the tokenizer's own chat template" in text for text in warned)
