# SPDX-License-Identifier: Apache-2.0
"""The BiomedCLIP encoder: read from its open_clip checkpoint, equal to open_clip's own, and independent of it later."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from parts import biomedclip_oracle, make_hub_named, make_language_model, picture, pictures, run_python

from moellava import load_pretrained_model


BIOMEDCLIP = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
WIDTH, LAYERS, PATCHES = 192, 4, 16  # of the tiny ViT that stands in for it


# The documentation's class.


@dataclass
class VisionConfig:
    mm_vision_tower: str = "openai/clip-vit-large-patch14"
    image_size: int = 224
    vision_feature_layer: int = -2


@pytest.fixture
def documented(parts, monkeypatch) -> Path:
    """Enters a folder where the names of the documentation's examples are paths."""
    root = make_hub_named(parts.root / "documented", BIOMEDCLIP)
    make_language_model("llama", root / "path/to/model", seed=3)
    monkeypatch.chdir(root)
    return root


@pytest.fixture(scope="module")
def oracle(parts):
    """What open_clip itself makes of the same folder."""
    return biomedclip_oracle(parts.biomedclip())


def load(folder, **settings):
    return load_pretrained_model(folder, device="cpu", **settings).model


def features(model, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.get_image_features(pixel_values).last_hidden_state


def trunk_states(trunk: torch.nn.Module, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """The embeddings and the output of every block of a timm ViT, class token first."""
    states: list[torch.Tensor] = []
    hooks = [trunk.blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
    hooks += [block.register_forward_hook(lambda *args: states.append(args[2])) for block in trunk.blocks]
    with torch.no_grad():
        trunk.forward_features(pixel_values)
    for hook in hooks:
        hook.remove()
    return states


def assert_answers(model) -> None:
    inputs = model.processor(images=picture(1), text="USER: <image>\nWhich organ? ASSISTANT:", return_tensors="pt")
    assert int((inputs.input_ids == model.config.image_token_id).sum()) == model.config.image_seq_length
    assert (
        model.generate(**inputs, min_new_tokens=3, max_new_tokens=3, do_sample=False).shape[1]
        == inputs.input_ids.shape[1] + 3
    )


# ---------------------------------------------------------------------------------------------------------------------
# The documentation's examples
# ---------------------------------------------------------------------------------------------------------------------


def test_using_biomedclip_with_automatic_detection(documented):
    # Using BiomedCLIP with automatic detection
    model, image_processor, tokenizer, context_len = load_pretrained_model(
        model_path="path/to/model",
        device="cpu",
        custom_vision_config=VisionConfig(
            mm_vision_tower="microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
        )
    )  # fmt: skip

    assert model.config.encoder_type == "biomedclip"
    assert model.config.image_seq_length == (224 // 8) ** 2
    assert image_processor(picture(0), return_tensors="pt").pixel_values.shape == (1, 3, 224, 224)
    assert_answers(model)


def test_explicitly_specifying_biomedclip_encoder(documented):
    # Explicitly specifying BiomedCLIP encoder
    model, image_processor, tokenizer, context_len = load_pretrained_model(
        model_path="path/to/model",
        device="cpu",
        encoder_type="biomedclip",
        custom_vision_config=VisionConfig(
            mm_vision_tower="microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
        )
    )  # fmt: skip

    assert model.config.encoder_type == "biomedclip"
    assert_answers(model)


# ---------------------------------------------------------------------------------------------------------------------
# Which tower it is
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("encoder_type", [None, "biomedclip", "medclip"])
def test_every_spelling_and_format_is_the_same_model(parts, oracle, encoder_type, weights):
    tower = parts.biomedclip(weights=weights)
    model = load(parts.language_model("llama"), mm_vision_tower=tower, encoder_type=encoder_type)
    assert model.config.encoder_type == "biomedclip"
    pixel_values = torch.stack([oracle.preprocess(image) for image in pictures(2)])
    states = trunk_states(oracle.model.visual.trunk, pixel_values)
    assert torch.allclose(features(model, pixel_values), states[-2][:, 1:], atol=1e-5)


def test_the_folder_decides_and_not_the_name(parts, tmp_path):
    folder = shutil.copytree(parts.biomedclip(), tmp_path / "google-siglip")
    assert load(parts.language_model("llama"), mm_vision_tower=folder).config.encoder_type == "biomedclip"
    folder = shutil.copytree(parts.vision_tower("clip"), tmp_path / "BiomedCLIP")
    assert load(parts.language_model("llama"), mm_vision_tower=folder).config.encoder_type == "clip"


def test_a_folder_in_both_formats_is_what_one_says(parts, tmp_path):
    folder = shutil.copytree(parts.vision_tower("clip"), tmp_path / "both")
    shutil.copytree(parts.biomedclip(), folder, dirs_exist_ok=True)
    lm = parts.language_model("llama")
    assert load(lm, mm_vision_tower=folder).config.encoder_type == "clip"  # transformers' own, where there is one
    assert load(lm, mm_vision_tower=folder, encoder_type="biomedclip").config.vision_config.hidden_size == WIDTH


@pytest.mark.parametrize("spelling", ["biomedclip", "medclip"])
def test_a_tower_that_is_no_open_clip_checkpoint(parts, spelling):
    with pytest.raises(ValueError, match="encoder_type is 'biomedclip', but .* has no open_clip_config.json"):
        load(parts.language_model("llama"), mm_vision_tower=parts.vision_tower("clip"), encoder_type=spelling)


@pytest.mark.parametrize("other", ["clip", "siglip", "dinov2"])
def test_another_type_for_an_open_clip_checkpoint(parts, other):
    with pytest.raises(ValueError, match=f"encoder_type is '{other}', but .*Use encoder_type='biomedclip'"):
        load(parts.language_model("llama"), mm_vision_tower=parts.biomedclip(), encoder_type=other)


# ---------------------------------------------------------------------------------------------------------------------
# What it sees
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2, 3, 4, -1, -2])
def test_hidden_states_are_those_of_open_clips_trunk(parts, oracle, layer):
    model = load(
        parts.language_model("llama"),
        mm_vision_tower=parts.biomedclip(),
        vision_feature_layer=layer,
        vision_feature_select_strategy="full",
    )
    pixel_values = torch.stack([oracle.preprocess(image) for image in pictures(2)])
    states = trunk_states(oracle.model.visual.trunk, pixel_values)
    assert len(states) == LAYERS + 1
    actual = features(model, pixel_values)
    assert actual.shape == (2, 1 + PATCHES, WIDTH)
    assert torch.allclose(actual, states[layer], atol=1e-5)


def test_the_patches_are_patches(parts):
    """The older encoder gave the pooled embedding over and over: no patch knew where it was."""
    model = load(parts.language_model("llama"), mm_vision_tower=parts.biomedclip())
    pixel_values = model.processor.image_processor(picture(4), return_tensors="pt").pixel_values
    seen = features(model, pixel_values)[0]
    assert torch.pdist(seen).min() > 1e-3
    changed = pixel_values.clone()
    changed[..., -8:, -8:] = 0  # the last patch
    difference = (features(model, changed)[0] - seen).norm(dim=-1)
    assert difference.argmax() == PATCHES - 1


def test_the_preprocessing_is_open_clips(parts, oracle):
    _, image_processor, *_ = load_pretrained_model(
        parts.language_model("llama"), mm_vision_tower=parts.biomedclip(), device="cpu"
    )
    for image in pictures(4):
        pixels = image_processor(image, return_tensors="pt").pixel_values[0]
        assert torch.equal(pixels, oracle.preprocess(image))


def test_the_width_is_the_trunks(parts, caplog):
    """Neither the 768 of the documentation's tables nor the width of the projection that CLIP compares by."""
    model = load(parts.language_model("llama"), mm_vision_tower=parts.biomedclip(), mm_hidden_size=768)
    assert model.model.multi_modal_projector.linear_1.in_features == WIDTH
    assert "mm_hidden_size is given as 768" in caplog.text and f"is {WIDTH} wide" in caplog.text


def test_the_class_token_alone(parts, oracle):
    model = load(
        parts.language_model("llama"), mm_vision_tower=parts.biomedclip(), vision_feature_select_strategy="cls"
    )
    pixel_values = oracle.preprocess(picture(2))[None]
    states = trunk_states(oracle.model.visual.trunk, pixel_values)
    assert torch.allclose(features(model, pixel_values), states[-2][:, :1], atol=1e-5)


def test_every_weight_is_the_checkpoints(parts, oracle):
    tower = load(parts.language_model("llama"), mm_vision_tower=parts.biomedclip()).model.vision_tower
    trunk = oracle.model.visual.trunk
    assert sum(p.numel() for p in tower.parameters()) == sum(p.numel() for p in trunk.parameters())
    fused = trunk.blocks[2].attn.qkv.weight
    attention = tower.layers[2].attention
    split = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(split, fused)


# ---------------------------------------------------------------------------------------------------------------------
# What it needs, and when
# ---------------------------------------------------------------------------------------------------------------------


def test_open_clip_is_not_needed_even_to_assemble(parts, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert_answers(load(parts.language_model("llama"), mm_vision_tower=parts.biomedclip()))


def test_the_saved_model_needs_neither_timm_nor_open_clip_nor_this_package(parts, tmp_path):
    model = load(parts.language_model("llama"), mm_vision_tower=parts.biomedclip())
    model.save_pretrained(tmp_path / "model")
    inputs = model.processor(images=picture(1), text="<image>", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    torch.save(expected, tmp_path / "logits.pt")
    picture(1).save(tmp_path / "picture.png")
    run_python(
        f"""
for name in ("timm", "open_clip"):
    sys.modules[name] = None
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

folder = {str(tmp_path)!r}
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder + "/model", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder + "/model", trust_remote_code=True)
inputs = processor(images=Image.open(folder + "/picture.png"), text="<image>", return_tensors="pt")
for name, value in torch.load(folder + "/inputs.pt").items():
    assert torch.equal(inputs[name], value), name
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, torch.load(folder + "/logits.pt"))
"""
    )


def test_timm_is_an_extra(parts, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm, which is not installed: `pip install moellava\[biomedclip\]`"):
        load(parts.language_model("llama"), mm_vision_tower=parts.biomedclip())


def test_the_text_towers_source_is_not_asked(parts, tmp_path):
    """Its config names a repository that this machine cannot reach; only the trunk is wanted."""
    folder = parts.copy(parts.biomedclip(), tmp_path / "tower")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert_answers(load(parts.language_model("llama"), mm_vision_tower=folder))


@pytest.mark.parametrize("architecture", ["test_vit2", "test_convnext"])
def test_a_tower_that_is_no_plain_vit(parts, architecture):
    tower = parts.biomedclip(timm_model_name=architecture, image_size=160)
    with pytest.raises(ValueError, match="is no plain ViT: .*Supported are timm's plain VisionTransformer"):
        load(parts.language_model("llama"), mm_vision_tower=tower)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
