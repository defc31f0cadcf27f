# SPDX-License-Identifier: Apache-2.0
"""The same weights in others' code say the same: transformers' LLaVA, each language model, each tower, open_clip.

What is compared bit by bit has to lie in equal memory: see `aligned`.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from parts import LANGUAGE_MODELS, Parts, biomedclip_oracle, make_tokenizer, picture, pictures, run_python
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from moellava import MoellavaConfig, MoellavaForCausalLM, load_pretrained_model
from moellava.parts.parts_moellava import encoder_for


TEXTS = [
    "The heart is of normal size.",
    "USER: How many birds are there? ASSISTANT:",
    "The chest X-ray shows a small opacity in the upper lobe of the right lung.",
]


def aligned(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with every parameter in memory of its own.

    Where a file's tensors begin at no multiple of 64 bytes, so do those that are mapped from it, and the products of a
    matrix and a vector differ in their last bit.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def assembled(parts: Parts, language_model, tower=None, **fields):
    """`load_pretrained_model` on the CPU, with a CLIP tower where none is given; the model `aligned`."""
    tower = parts.vision_tower("clip_vision") if tower is None else tower
    loaded = load_pretrained_model(language_model, mm_vision_tower=tower, device="cpu", **fields)
    aligned(loaded.model)
    return loaded


def with_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch, with its own tokens as labels where it is not padding."""
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


# ---------------------------------------------------------------------------------------------------------------------
# transformers' LLaVA
# ---------------------------------------------------------------------------------------------------------------------

# The names that files on disk have, in transformers 5 too; the first that fits is taken.
LLAVA_ON_DISK = {
    r"^language_model\.lm_head": "lm_head",
    r"^language_model\.model": "model.language_model",
    r"^vision_tower": "model.vision_tower",
    r"^multi_modal_projector": "model.multi_modal_projector",
}


def llavas_config(llava: LlavaForConditionalGeneration, **fields) -> MoellavaConfig:
    config = llava.config
    return MoellavaConfig(
        text_config=config.text_config,
        vision_config=config.vision_config,
        projector_config={"type": "mlp2x_gelu", "hidden_act": config.projector_hidden_act},
        image_token_id=config.image_token_id,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        **fields,
    )


@pytest.fixture(scope="module", params=["clip", "siglip"])
def llava(request, parts):
    """transformers' LLaVA, its processor, our model with its weights, and its folder."""
    folder = parts.llava_hf(request.param)
    model = aligned(LlavaForConditionalGeneration.from_pretrained(folder))
    ours = MoellavaForCausalLM(llavas_config(model)).eval()
    ours.load_state_dict(model.state_dict(), strict=True)
    return model, LlavaProcessor.from_pretrained(folder), ours, folder


def llava_batch(processor) -> dict[str, torch.Tensor]:
    """Rows with one picture, none, and two, padded on the left."""
    images = pictures(3)
    text = ["USER: <image>\nWhat is it? ASSISTANT:", "Words alone.", "<image> and <image>: which is red? ASSISTANT:"]
    processor.tokenizer.padding_side = "left"
    return dict(processor(images=images, text=text, padding=True, return_tensors="pt"))


@torch.no_grad()
def test_llavas_logits_and_loss(llava):
    theirs, processor, ours, _ = llava
    batch = with_labels(llava_batch(processor))
    expected, found = theirs(**batch), ours(**batch)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    # One tensor, or from transformers 5.24 on a list of one for each picture.
    per_picture = [states.reshape(-1, found.image_hidden_states.shape[-1]) for states in expected.image_hidden_states]
    assert torch.equal(found.image_hidden_states, torch.cat(per_picture))
    for layer, state in enumerate(ours(**batch, output_hidden_states=True).hidden_states):
        assert torch.equal(state, theirs(**batch, output_hidden_states=True).hidden_states[layer])


@torch.no_grad()
def test_llavas_greedy_text(llava):
    theirs, processor, ours, _ = llava
    batch = llava_batch(processor)
    expected = theirs.generate(**batch, max_new_tokens=12, do_sample=False)
    found = ours.generate(
        **batch,
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=theirs.generation_config.pad_token_id,
        eos_token_id=theirs.generation_config.eos_token_id,
    )
    assert processor.batch_decode(found) == processor.batch_decode(expected)
    assert torch.equal(found, expected)
    assert found.shape[1] > batch["input_ids"].shape[1] + 4


@torch.no_grad()
def test_llavas_files_by_their_names(llava):
    """Files that transformers' LLaVA saved carry older names, which `key_mapping` translates."""
    theirs, processor, _, folder = llava
    ours, report = MoellavaForCausalLM.from_pretrained(
        folder, config=llavas_config(theirs), key_mapping=LLAVA_ON_DISK, output_loading_info=True
    )
    assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, found = theirs.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    batch = llava_batch(processor)
    assert torch.equal(aligned(ours)(**batch).logits, theirs(**batch).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [{"vision_feature_layer": -1}, {"vision_feature_layer": [-2, 1]}, {"vision_feature_select_strategy": "full"}],
    ids=["last_layer", "two_layers", "full"],
)
def test_llavas_vision_features(llava, fields):
    theirs, *_ = llava
    config = theirs.config.__class__.from_dict(theirs.config.to_dict() | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other = LlavaForConditionalGeneration(config).eval()
    ours = MoellavaForCausalLM(llavas_config(other)).eval()
    ours.load_state_dict(other.state_dict(), strict=True)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = other.get_image_features(pixels).pooler_output
    found = ours.get_image_features(pixels).pooler_output
    assert len(found) == len(expected) == 2
    assert all(torch.equal(one, another) for one, another in zip(found, expected, strict=True))


def test_our_processor_prepares_what_llavas_does(parts, llava):
    """The same tokenizer, image processor and placeholder: the same inputs, text and pixels."""
    _, processor, ours, folder = llava
    tower = parts.vision_tower("clip_vision" if "clip" in ours.config.encoder_type else "siglip_vision")
    loaded = load_pretrained_model(
        parts.language_model("llama", padded_rows=64),
        mm_vision_tower=tower,
        image_aspect_ratio="square",
        device="cpu",
    )
    images, text = pictures(3), ["<image> What is it?", "<image> and <image>"]
    theirs = processor(images=images, text=text, padding=True, return_tensors="pt", padding_side="left")
    found = loaded.model.processor(images=images, text=text, padding=True, return_tensors="pt")
    assert torch.equal(found["pixel_values"], theirs["pixel_values"])
    # LLaVA's own tokenizer holds a padding token before the placeholder; all else is one vocabulary.
    length = len(AutoTokenizer.from_pretrained(parts.language_model("llama", padded_rows=64)))
    keep = theirs["attention_mask"].bool()
    assert torch.equal(found["attention_mask"], theirs["attention_mask"])
    mine, other = found["input_ids"][keep], theirs["input_ids"][keep]
    assert torch.equal(mine.clamp(max=length), other.clamp(max=length))
    assert torch.equal(mine == loaded.model.config.image_token_id, other == processor.image_token_id)


# ---------------------------------------------------------------------------------------------------------------------
# Every language model's own class, on text
# ---------------------------------------------------------------------------------------------------------------------


def own_and_ours(parts: Parts, family: str, **options):
    folder = parts.language_model(family, **options)
    own = aligned(AutoModelForCausalLM.from_pretrained(folder))
    return own, assembled(parts, folder)


def text_batch(tokenizer) -> dict[str, torch.Tensor]:
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert tokenizer.padding_side == "left"
    assert (batch["attention_mask"][:, 0] == 0).any()
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
@pytest.mark.parametrize("padded_rows", [0, 64], ids=["full_vocabulary", "padded_vocabulary"])
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_text_parity(parts, family, padded_rows):
    own, (model, _, tokenizer, _) = own_and_ours(parts, family, padded_rows=padded_rows)
    rows = own.config.vocab_size
    batch = text_batch(tokenizer)
    expected = own(**batch, output_hidden_states=True)
    found = model(**batch, output_hidden_states=True)
    assert found.logits.shape[-1] == rows + (padded_rows == 0)
    assert torch.equal(found.logits[..., :rows], expected.logits)
    assert expected.logits.std() > 0.01
    for one, another in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(one, another)
    if padded_rows:  # over the same number of rows
        batch = with_labels(batch)
        assert torch.equal(model(**batch).loss, own(**batch).loss)

    tokens = own.generate(
        **text_batch(tokenizer), max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    assert torch.equal(model.generate(**text_batch(tokenizer), max_new_tokens=8, do_sample=False), tokens)
    assert tokens.shape[1] > batch["input_ids"].shape[1]


@pytest.mark.parametrize("family", ["llama", "phi", "qwen2"])
def test_text_is_tokenized_as_by_the_language_models_own(parts, family):
    folder = parts.language_model(family)
    own, ours = AutoTokenizer.from_pretrained(folder), assembled(parts, folder).tokenizer
    for text in (*TEXTS, "", " two  spaces ", "<im age>", "naïve – 你好 🙂\n\ttabs"):
        assert ours(text).input_ids == own(text).input_ids
        assert ours.decode(ours(text).input_ids) == own.decode(own(text).input_ids)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "mixtral"])
def test_text_parity_in_half_precision(parts, family):
    own, (model, _, tokenizer, _) = own_and_ours(parts, family, dtype=torch.bfloat16, padded_rows=64)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    batch = with_labels(text_batch(tokenizer))
    expected, found = own(**batch), model(**batch)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_native_mixtures_balancing_loss(parts, family):
    own, (model, _, tokenizer, _) = own_and_ours(parts, family, padded_rows=64)
    batch = with_labels(text_batch(tokenizer))
    expected = own(**batch, output_router_logits=True)
    found = model(**batch, output_router_logits=True)
    assert torch.equal(found.aux_loss, expected.aux_loss)
    assert torch.equal(found.loss, expected.loss)
    assert not torch.equal(found.loss, model(**batch).loss)
    for one, another in zip(found.router_logits, expected.router_logits, strict=True):
        assert torch.equal(one, another)
    # and what is learnt from it
    expected.loss.backward()
    found.loss.backward()
    gradients = {name: parameter.grad for name, parameter in own.named_parameters()}
    router = next(name for name in gradients if name.endswith("mlp.gate.weight"))
    ours = dict(model.named_parameters())[f"model.language_{router}"].grad
    assert gradients[router].abs().max() > 0
    torch.testing.assert_close(ours, gradients[router], rtol=0, atol=1e-7)


# --- MiniCPM, which transformers does not have ---


def make_minicpm(folder: Path, tie_word_embeddings: bool | None, **fields) -> dict:
    """Writes a MiniCPM checkpoint as openbmb publishes them, and returns its config.

    Its weights are named as LLaMA's. The published configs do not say `tie_word_embeddings`: the default of the class
    that they are written for ties, and the files hold no head.
    """
    make_tokenizer(folder)
    config = {
        "architectures": ["MiniCPMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_minicpm.MiniCPMConfig",
            "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 48,
        "initializer_range": 0.1,
        "intermediate_size": 80,
        "max_position_embeddings": 256,
        "model_type": "minicpm",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "torch_dtype": "float32",
        "transformers_version": "4.36.0",
        "use_cache": True,
        "vocab_size": 640,
        "scale_emb": 12,
        "dim_model_base": 16,
        "scale_depth": 1.4,
        **fields,
    }
    if tie_word_embeddings is not None:
        config["tie_word_embeddings"] = tie_word_embeddings
    generator = torch.Generator().manual_seed(0)

    def weight(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    width, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * width // config["num_attention_heads"]
    weights = {"model.embed_tokens.weight": weight(config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = weight(*shape) + ("norm" in name)
    weights["model.norm.weight"] = weight(width) + 1
    if tie_word_embeddings is False:
        weights["lm_head.weight"] = weight(config["vocab_size"], width)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return config


def minicpm_logits(folder: Path, input_ids: list[int]) -> torch.Tensor:
    """MiniCPM's arithmetic, token by token and head by head, after arXiv:2404.06395 and openbmb's modeling file."""
    config = json.loads((folder / "config.json").read_text())
    weights = {
        name: tensor.double() for name, tensor in torch.load(folder / "pytorch_model.bin", weights_only=True).items()
    }
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    branch = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])

    def norm(states, name):
        scale = (states.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt()
        return states * scale * weights[name]

    def rotated(vector, position):
        out = torch.empty_like(vector)
        half = size // 2
        for index in range(half):
            angle = position * config.get("rope_theta", 10000.0) ** (-2 * index / size)
            first, second = vector[index], vector[index + half]
            out[index] = first * math.cos(angle) - second * math.sin(angle)
            out[index + half] = second * math.cos(angle) + first * math.sin(angle)
        return out

    def attention(states, name):
        query, key, value = (states @ weights[f"{name}.{part}_proj.weight"].T for part in "qkv")
        out = torch.zeros_like(query)
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            group = head // (heads // groups)
            shared = slice(group * size, (group + 1) * size)
            keys = [rotated(row[shared], position) for position, row in enumerate(key)]
            for position in range(len(states)):
                asked = rotated(query[position, own], position)
                scores = torch.stack([asked @ keys[earlier] / math.sqrt(size) for earlier in range(position + 1)])
                out[position, own] = scores.softmax(0) @ value[: position + 1, shared]
        return out @ weights[f"{name}.o_proj.weight"].T

    def mlp(states, name):
        gate, up, down = (weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (nn.functional.silu(states @ gate.T) * (states @ up.T)) @ down.T

    states = weights["model.embed_tokens.weight"][input_ids] * config["scale_emb"]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        states = states + attention(norm(states, f"{name}.input_layernorm.weight"), f"{name}.self_attn") * branch
        states = states + mlp(norm(states, f"{name}.post_attention_layernorm.weight"), f"{name}.mlp") * branch
    states = norm(states, "model.norm.weight") / (config["hidden_size"] / config["dim_model_base"])
    return states @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


@torch.no_grad()
@pytest.mark.parametrize(
    ("tie_word_embeddings", "fields"),
    [(None, {}), (True, {"num_key_value_heads": 4, "rope_theta": 1e6}), (False, {"scale_emb": 1.5, "scale_depth": 2})],
    ids=["as_published", "tied", "untied"],
)
def test_minicpm_is_read_as_granite(parts, tmp_path, tie_word_embeddings, fields):
    folder = tmp_path / "minicpm"
    make_minicpm(folder, tie_word_embeddings, **fields)
    model, _, tokenizer, context_length = assembled(parts, folder)
    assert model.config.text_config.model_type == "granite"
    assert context_length == 256
    ids = tokenizer("The heart is of normal size.").input_ids
    expected = minicpm_logits(folder, ids)
    found = model(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1

    # Every scale counts: without one of them the logits are others.
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"):
        changed = MoellavaConfig.from_dict(model.config.to_dict())
        setattr(changed.text_config, name, getattr(changed.text_config, name) * 1.5)
        other = MoellavaForCausalLM(changed).eval()
        other.load_state_dict(model.state_dict())
        assert (other(input_ids=torch.tensor([ids])).logits[0] - found).abs().max() > 0.01, name

    # Greedy text, step by step by the reference, the end of text left out.
    tokens = list(ids)
    for _ in range(4):
        last = minicpm_logits(folder, tokens)[-1]
        last[tokenizer.eos_token_id] = -math.inf
        tokens.append(int(last.argmax()))
    found_tokens = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert found_tokens[0].tolist() == tokens
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(aligned(again)(input_ids=torch.tensor([ids])).logits[0], found)


# --- The vocabulary ---


def embedding_and_head(model) -> tuple[torch.Tensor, nn.Linear]:
    return model.get_input_embeddings().weight, model.get_output_embeddings()


@pytest.mark.parametrize("family", ["llama", "phi", "gemma", "granite", "opt"])
def test_a_padded_vocabulary_gives_a_free_row(parts, family):
    own, (model, _, tokenizer, _) = own_and_ours(parts, family, padded_rows=3)
    assert model.config.text_config.vocab_size == own.config.vocab_size
    assert model.config.image_token_id == own.config.vocab_size - 3 == len(tokenizer) - 1
    for found, expected in zip(embedding_and_head(model), embedding_and_head(own), strict=True):
        for one, another in zip(parameters(found), parameters(expected), strict=True):
            assert torch.equal(one, another)
    assert model.generation_config.suppress_tokens is None


def parameters(part) -> list[torch.Tensor]:
    return [part] if isinstance(part, torch.Tensor) else list(part.parameters())


@pytest.mark.parametrize("family", ["llama", "phi", "gemma", "granite", "opt"])
def test_a_full_vocabulary_grows_by_one_row(parts, family):
    own, (model, _, tokenizer, _) = own_and_ours(parts, family)
    rows = own.config.vocab_size
    assert model.config.text_config.vocab_size == rows + 1 == len(tokenizer)
    assert model.config.image_token_id == rows
    assert model.generation_config.suppress_tokens == [rows]
    for found, expected in zip(embedding_and_head(model), embedding_and_head(own), strict=True):
        for one, another in zip(parameters(found), parameters(expected), strict=True):
            assert one.shape[0] == rows + 1
            assert torch.equal(one[:rows], another)
            torch.testing.assert_close(one[rows], another.mean(0), rtol=0, atol=1e-6)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == own.config.tie_word_embeddings


def test_a_language_model_that_knows_the_image_token(parts, tmp_path):
    """Its own row is taken, and nothing grows."""
    folder = parts.copy(parts.language_model("llama", padded_rows=8), tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<one>", "<image>", "<two>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    loaded = assembled(parts, folder)
    assert loaded.model.config.image_token_id == 513
    assert loaded.model.config.text_config.vocab_size == 520
    assert len(loaded.tokenizer) == 515


# ---------------------------------------------------------------------------------------------------------------------
# A tower's own hidden states
# ---------------------------------------------------------------------------------------------------------------------

# kind -> the class that its library loads it with, tokens before the patches, whether the first is a class token
TOWERS = {
    "clip": (transformers.CLIPVisionModel, 1, True),
    "clip_vision": (transformers.CLIPVisionModel, 1, True),
    "siglip": (transformers.SiglipVisionModel, 0, False),
    "siglip_vision": (transformers.SiglipVisionModel, 0, False),
    "siglip2_naflex": (transformers.Siglip2VisionModel, 0, False),
    "dinov2": (AutoModel, 1, True),
    "dinov2_registers": (AutoModel, 5, True),
    "vit": (AutoModel, 1, True),
    "vit_classifier": (transformers.ViTModel, 1, True),
    "deit": (AutoModel, 2, True),
    "beit": (AutoModel, 1, True),
    "dinov3": (AutoModel, 5, True),
    "swin": (AutoModel, 0, False),
    "convnext": (AutoModel, 0, False),
}
LAYERS = (-2, -1, 0, 2, [-2, 1], [2, 2, -1])
STRATEGIES = ("default", "patch", "cls", "full")
PLAIN = [kind for kind in TOWERS if kind not in ("deit", "beit", "dinov3", "swin", "convnext")]


@torch.no_grad()
def own_states(kind: str, folder: Path, pixels: torch.Tensor) -> list[torch.Tensor]:
    """All hidden states of a tower by its own library, as tokens (pictures, tokens, width)."""
    tower = aligned(TOWERS[kind][0].from_pretrained(folder))
    inputs = {"pixel_values": pixels}
    if kind == "siglip2_naflex":
        from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

        patches = torch.stack([convert_image_to_patches(picture, 8) for picture in pixels])
        inputs = {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * len(pixels)),
        }
    states = tower(**inputs, output_hidden_states=True).hidden_states
    return [state if state.dim() == 3 else state.flatten(2).transpose(1, 2) for state in states]


def selected(states: list[torch.Tensor], layer, strategy: str, prefix: int) -> torch.Tensor:
    """The features that `vision_feature_layer` and `vision_feature_select_strategy` stand for."""
    layers = [layer] if isinstance(layer, int) else layer
    features = torch.cat([states[each] for each in layers], dim=-1)
    if strategy == "cls":
        return features[:, :1]
    return features if strategy == "full" else features[:, prefix:]


@torch.no_grad()
@pytest.mark.parametrize("kind", TOWERS)
def test_features_are_the_towers_own_hidden_states(parts, kind):
    folder = parts.vision_tower(kind)
    _, prefix, has_class_token = TOWERS[kind]
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    states = own_states(kind, folder, pixels)
    model = assembled(parts, parts.language_model("llama"), folder).model
    features = model.get_image_features(pixels).last_hidden_state
    assert torch.equal(features, selected(states, -2, "default", prefix))
    weights = model.model.vision_tower.state_dict()

    for layer, strategy in itertools.product(LAYERS, STRATEGIES):
        layers = [layer] if isinstance(layer, int) else layer
        fields = model.config.to_dict() | {
            "vision_feature_layer": layer,
            "vision_feature_select_strategy": strategy,
        }
        if strategy == "cls" and not has_class_token:
            with pytest.raises(ValueError, match="'cls', but a .* tower has no class token"):
                MoellavaConfig.from_dict(fields)
            continue
        if len({states[each].shape[1] for each in layers}) > 1:
            with pytest.raises(ValueError, match="so that their features cannot be joined"):
                MoellavaConfig.from_dict(fields)
            continue
        config = MoellavaConfig.from_dict(fields)
        encoder = encoder_for(config)
        tower = encoder.build().eval()
        tower.load_state_dict(weights, strict=True)
        found = encoder.encode(aligned(tower), pixels).last_hidden_state
        expected = selected(states, layer, strategy, prefix)
        assert torch.equal(found, expected), (layer, strategy)
        assert found.shape[1:] == (encoder.num_selected_tokens, encoder.feature_size)
        assert config.image_seq_length == found.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("kind", PLAIN)
def test_layers_behind_the_feature_layer_are_not_run(parts, kind):
    folder = parts.vision_tower(kind)
    fields = assembled(parts, parts.language_model("llama"), folder).model.config.to_dict()
    pixels = torch.zeros(1, 3, 32, 32)
    for layer, expected in ((-2, 3), (-1, 4), (0, 1), (2, 2), ([-4, 2], 2), ([1, -1], 4)):
        encoder = encoder_for(MoellavaConfig.from_dict(fields | {"vision_feature_layer": layer}))
        tower = encoder.build().eval()
        layers = next(
            module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module._modules) == 4
        )
        runs = [0] * 4
        for index, block in enumerate(layers._modules.values()):

            def count(*_, index=index, runs=runs):
                runs[index] += 1

            block.register_forward_hook(count)
        encoder.encode(tower, pixels)
        assert runs == [1] * expected + [0] * (4 - expected), layer
        # They are kept nevertheless: saved, moved and counted with the others.
        assert len({name.split(f"{_name_of(tower, layers)}.")[1][0] for name in _names_in(tower, layers)}) == 4


def _name_of(tower: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in tower.named_modules() if module is part)


def _names_in(tower: nn.Module, part: nn.Module) -> list[str]:
    return [name for name in tower.state_dict() if name.startswith(f"{_name_of(tower, part)}.")]


@torch.no_grad()
def test_a_larger_picture_as_the_tower_interpolates_it(parts):
    folder = parts.vision_tower("dinov2")
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    model = assembled(parts, parts.language_model("llama"), folder, image_size=48).model
    expected = selected(own_states("dinov2", folder, pixels), -2, "default", 1)
    assert expected.shape[1] == 36
    assert torch.equal(model.get_image_features(pixels).last_hidden_state, expected)


# ---------------------------------------------------------------------------------------------------------------------
# BiomedCLIP, against open_clip
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def trunk_states(trunk: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """What goes into the first block of open_clip's trunk, and what comes out of each block."""
    states = []
    hooks = [trunk.blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
    hooks += [block.register_forward_hook(lambda _, args, output: states.append(output)) for block in trunk.blocks]
    trunk.forward_features(pixels)
    for hook in hooks:
        hook.remove()
    return states


@pytest.fixture(scope="module")
def biomedclip(parts):
    """open_clip's own model and preprocessing, and our model with its tower."""
    folder = parts.biomedclip()
    loaded = assembled(parts, parts.language_model("llama"), folder, image_aspect_ratio="square")
    return biomedclip_oracle(folder), loaded.model


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_biomedclips_hidden_states(biomedclip, layer, strategy):
    oracle, model = biomedclip
    fields = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
    other = MoellavaForCausalLM(MoellavaConfig.from_dict(model.config.to_dict() | fields)).eval()
    other.model.vision_tower.load_state_dict(model.model.vision_tower.state_dict())
    images = pictures(3)
    pixels = model.processor(images=images, return_tensors="pt")["pixel_values"]
    states = trunk_states(oracle.model.visual.trunk, torch.stack([oracle.preprocess(image) for image in images]))
    assert len(states) == 5
    found = other.get_image_features(pixels).last_hidden_state
    torch.testing.assert_close(found, selected(states, layer, strategy, 1), rtol=0, atol=1e-5)


def all_pictures() -> list:
    """Of several shapes, and a grey one. (open_clip resizes a palette's indices, and shows what is transparent.)"""
    return [*pictures(5), *pictures(2, seed=7), picture(3, (200, 140)), picture(4, (33, 32)), picture(9, (60, 45), "L")]


def test_biomedclips_pixels(biomedclip):
    oracle, model = biomedclip
    for image in all_pictures():
        found = model.processor(images=image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(found, oracle.preprocess(image)), image


def test_biomedclips_pixels_with_padding(biomedclip):
    """`pad` is open_clip's preprocessing of the picture on a square of the mean colour."""
    oracle, model = biomedclip
    image = picture(1, (50, 30))
    square = np.empty((50, 50, 3), np.uint8)
    square[:] = [int(255 * mean) for mean in model.processor.image_processor.image_mean]
    square[10:40] = np.asarray(image)
    found = model.processor(images=image, return_tensors="pt", image_aspect_ratio="pad")["pixel_values"][0]
    assert torch.equal(found, oracle.preprocess(transformers.image_utils.PIL.Image.fromarray(square)))


def test_biomedclips_pixels_after_save_and_load(biomedclip, tmp_path):
    """transformers loads the image processor in another backend by itself, whose pixels differ."""
    oracle, model = biomedclip
    model.save_pretrained(tmp_path / "model")
    images = all_pictures()
    expected = torch.stack([oracle.preprocess(image) for image in images])
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert type(processor.image_processor) is type(model.processor.image_processor)
    assert torch.equal(processor(images=images, return_tensors="pt")["pixel_values"], expected)

    torch.save(expected, tmp_path / "expected.pt")
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    output = run_python(
        f"""
from pathlib import Path
import sys
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
for extra in ("open_clip", "timm"):
    sys.modules[extra] = None
root = Path({str(tmp_path)!r})
expected = torch.load(root / "expected.pt")
images = [root / f"{{index}}.png" for index in range(len(expected))]
for name in ("model", "again", "once_more"):
    processor = AutoProcessor.from_pretrained(root / name, trust_remote_code=True)
    found = processor(images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(found, expected), (name, (found - expected).abs().max())
    if name == "model":
        processor.save_pretrained(root / "again")
        model = AutoModelForImageTextToText.from_pretrained(root / name, trust_remote_code=True)
        model.processor = processor
        model.save_pretrained(root / "once_more")
print(type(processor.image_processor).__name__)
"""
    )
    assert output.split()[-1] == type(model.processor.image_processor).__name__


@pytest.mark.parametrize("backend", ["open_clip", "pil", "torchvision"])
def test_an_image_processor_keeps_its_backend(biomedclip, parts, tmp_path, backend):
    _, model = biomedclip
    tower = AutoImageProcessor.from_pretrained(parts.vision_tower("clip_vision"), backend="pil")
    processor = (
        model.processor if backend == "open_clip" else assembled(parts, parts.language_model("llama"))[0].processor
    )
    if backend == "pil":
        processor.image_processor = tower
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded.image_processor) is type(processor.image_processor)
    expected = processor(images=pictures(5), return_tensors="pt")["pixel_values"]
    assert torch.equal(loaded(images=pictures(5), return_tensors="pt")["pixel_values"], expected)

    # The caller may choose another one.
    assert AutoProcessor.from_pretrained(tmp_path, backend="torchvision").image_processor.backend == "torchvision"
    assert AutoProcessor.from_pretrained(tmp_path, backend="pil").image_processor.backend == "pil"
    # Where a file does not say, transformers does.
    path = tmp_path / "processor_config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("image_backend") == backend
    path.write_text(json.dumps(fields))
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.backend == "torchvision"
