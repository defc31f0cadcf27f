# SPDX-License-Identifier: Apache-2.0
"""The SigLIP encoder, under all of its spellings: what is detected, and that the model sees what the tower sees."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from parts import make_hub_named, make_language_model, picture, pictures
from transformers import AutoImageProcessor, Siglip2VisionModel, SiglipVisionModel

from moellava import load_pretrained_model


SIGLIP = "google/siglip-base-patch16-224"
PATCHES = 16  # of 8 pixels, for pictures of 32


# The documentation's class.


@dataclass
class VisionConfig:
    mm_vision_tower: str = "openai/clip-vit-large-patch14"
    image_size: int = 224
    vision_feature_layer: int = -2


@pytest.fixture
def documented(parts, monkeypatch) -> Path:
    """Enters a folder where the names of the documentation's examples are paths."""
    root = make_hub_named(parts.root / "documented", SIGLIP)
    make_language_model("llama", root / "path/to/model", seed=3)
    monkeypatch.chdir(root)
    return root


def load(folder, **settings):
    return load_pretrained_model(folder, device="cpu", **settings).model


def hidden_states(folder, pixel_values: torch.Tensor, **settings) -> tuple[torch.Tensor, ...]:
    """What the tower itself computes, by its own class."""
    tower = SiglipVisionModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return tower(pixel_values, output_hidden_states=True, **settings).hidden_states


def features(model, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.get_image_features(pixel_values).last_hidden_state


def assert_answers(model) -> None:
    inputs = model.processor(images=picture(1), text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
    assert int((inputs.input_ids == model.config.image_token_id).sum()) == model.config.image_seq_length
    assert (
        model.generate(**inputs, min_new_tokens=3, max_new_tokens=3, do_sample=False).shape[1]
        == inputs.input_ids.shape[1] + 3
    )


# ---------------------------------------------------------------------------------------------------------------------
# The documentation's examples
# ---------------------------------------------------------------------------------------------------------------------


def test_using_sigclip_with_automatic_detection(documented):
    # Using SigClip with automatic detection (based on model path)
    model, image_processor, tokenizer, context_len = load_pretrained_model(
        model_path="path/to/model",
        device="cpu",
        custom_vision_config=VisionConfig(
            mm_vision_tower="google/siglip-base-patch16-224"
        )
    )  # fmt: skip

    assert model.config.encoder_type == "siglip"
    assert model.config.vision_config.model_type == "siglip_vision_model"
    pixel_values = image_processor(pictures(2), return_tensors="pt").pixel_values
    assert pixel_values.shape == (2, 3, 224, 224)
    expected = hidden_states(SIGLIP, pixel_values, interpolate_pos_encoding=True)[-2]
    assert torch.equal(features(model, pixel_values), expected)
    assert_answers(model)


def test_explicitly_specifying_sigclip_encoder(documented):
    # Explicitly specifying SigClip encoder
    model, image_processor, tokenizer, context_len = load_pretrained_model(
        model_path="path/to/model",
        device="cpu",
        encoder_type="sigclip",
        custom_vision_config=VisionConfig(
            mm_vision_tower="google/siglip-base-patch16-224"
        )
    )  # fmt: skip

    assert model.config.encoder_type == "siglip"
    assert_answers(model)


# ---------------------------------------------------------------------------------------------------------------------
# Which tower it is
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder_type", [None, "siglip", "sigclip"])
@pytest.mark.parametrize("kind", ["siglip", "siglip_vision"])
def test_every_spelling_is_the_same_model(parts, kind, encoder_type):
    tower = parts.vision_tower(kind)
    model = load(parts.language_model("llama"), mm_vision_tower=tower, encoder_type=encoder_type)
    assert model.config.encoder_type == "siglip"
    pixel_values = model.processor.image_processor(pictures(2), return_tensors="pt").pixel_values
    assert torch.equal(features(model, pixel_values), hidden_states(tower, pixel_values)[-2])


def test_the_config_decides_and_not_the_name(parts, tmp_path):
    """The older builder took every local path for CLIP, and then failed."""
    folder = shutil.copytree(parts.vision_tower("siglip"), tmp_path / "openai-clip-vit-biomedclip")
    assert load(parts.language_model("llama"), mm_vision_tower=folder).config.encoder_type == "siglip"
    folder = shutil.copytree(parts.vision_tower("clip"), tmp_path / "google-siglip")
    assert load(parts.language_model("llama"), mm_vision_tower=folder).config.encoder_type == "clip"


@pytest.mark.parametrize("spelling", ["sigclip", "siglip"])
def test_a_tower_that_is_no_siglip(parts, spelling):
    with pytest.raises(
        ValueError, match="encoder_type is 'siglip', but .*'clip_vision_model'.*Use encoder_type='clip'"
    ):
        load(parts.language_model("llama"), mm_vision_tower=parts.vision_tower("clip"), encoder_type=spelling)


# ---------------------------------------------------------------------------------------------------------------------
# What it sees
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-1, -2, -5, 0, 2, 4])
def test_no_patch_is_dropped_at_any_layer(parts, layer):
    """SigLIP has no class token: dropping "it", as older builders do, loses the first patch."""
    tower = parts.vision_tower("siglip")
    model = load(parts.language_model("llama"), mm_vision_tower=tower, vision_feature_layer=layer)
    pixel_values = model.processor.image_processor(pictures(2), return_tensors="pt").pixel_values
    assert features(model, pixel_values).shape == (2, PATCHES, 40)
    assert torch.equal(features(model, pixel_values), hidden_states(tower, pixel_values)[layer])


@pytest.mark.parametrize("strategy", ["default", "patch", "full"])
def test_the_strategies_select_every_token(parts, strategy):
    tower = parts.vision_tower("siglip")
    model = load(parts.language_model("llama"), mm_vision_tower=tower, vision_feature_select_strategy=strategy)
    assert model.config.image_seq_length == PATCHES
    pixel_values = model.processor.image_processor(picture(0), return_tensors="pt").pixel_values
    assert torch.equal(features(model, pixel_values), hidden_states(tower, pixel_values)[-2])


def test_layers_are_joined(parts):
    tower = parts.vision_tower("siglip")
    model = load(parts.language_model("llama"), mm_vision_tower=tower, vision_feature_layer=[-2, 1])
    pixel_values = model.processor.image_processor(picture(0), return_tensors="pt").pixel_values
    states = hidden_states(tower, pixel_values)
    assert torch.equal(features(model, pixel_values), torch.cat([states[-2], states[1]], dim=-1))
    assert_answers(model)


def test_the_towers_own_preprocessing(parts):
    tower = parts.vision_tower("siglip")
    _, image_processor, *_ = load_pretrained_model(parts.language_model("llama"), mm_vision_tower=tower, device="cpu")
    own = AutoImageProcessor.from_pretrained(tower)
    for image in pictures(3):
        assert torch.equal(
            image_processor(image, return_tensors="pt").pixel_values, own(image, return_tensors="pt").pixel_values
        )
    assert list(image_processor.image_mean) == [0.5, 0.5, 0.5]  # and not CLIP's


def test_the_text_half_is_left_behind(parts, tmp_path):
    model = load(parts.language_model("llama"), mm_vision_tower=parts.vision_tower("siglip"))
    assert not any("text_model" in name or "logit" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    pixel_values = again.processor.image_processor(picture(0), return_tensors="pt").pixel_values
    assert torch.equal(features(again, pixel_values), features(model, pixel_values))


def test_no_layer_behind_the_feature_layer_is_run(parts):
    model = load(parts.language_model("llama"), mm_vision_tower=parts.vision_tower("siglip"), vision_feature_layer=2)
    run = []
    layers = model.model.vision_tower.encoder.layers
    for index in range(len(layers)):
        layers[index].register_forward_hook(lambda *_, index=index: run.append(index))
    features(model, torch.zeros(1, 3, 32, 32))
    assert run == [0, 1]
    assert len(layers) == 4  # all of them are kept


# ---------------------------------------------------------------------------------------------------------------------
# SigLIP 2
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder_type", [None, "siglip", "sigclip"])
def test_siglip_2_of_flexible_resolution(parts, encoder_type):
    tower = parts.vision_tower("siglip2_naflex")
    model = load(parts.language_model("llama"), mm_vision_tower=tower, encoder_type=encoder_type)
    assert model.config.encoder_type == "siglip"
    assert model.config.vision_config.model_type == "siglip2_vision_model"
    image = picture(0, (32, 32))
    pixel_values = model.processor.image_processor(image, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 32, 32)

    own = Siglip2VisionModel.from_pretrained(tower).eval()
    inputs = AutoImageProcessor.from_pretrained(tower)(image, return_tensors="pt")
    with torch.no_grad():
        expected = own(**inputs, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(features(model, pixel_values), expected, atol=1e-5)
    assert_answers(model)


def test_siglip_2_at_another_size(parts):
    model = load(parts.language_model("llama"), mm_vision_tower=parts.vision_tower("siglip2_naflex"), image_size=48)
    assert model.config.image_seq_length == 36
    assert_answers(model)


# ---------------------------------------------------------------------------------------------------------------------
# What it cannot do
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["siglip", "siglip2_naflex"])
def test_there_is_no_class_token(parts, kind):
    with pytest.raises(
        ValueError, match="is 'cls', but a siglip2?_vision_model tower has no class token. Use 'default'"
    ):
        load(
            parts.language_model("llama"),
            mm_vision_tower=parts.vision_tower(kind),
            vision_feature_select_strategy="cls",
        )


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
