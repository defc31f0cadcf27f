# SPDX-License-Identifier: Apache-2.0
"""What towers of transformers give that no encoder names: sizes as pairs, maps, tokens of other kinds, chance.

The reference is the tower itself, run by transformers.
"""

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel

from moellava import MoellavaConfig, MoellavaForCausalLM, load_pretrained_model, register_encoder, register_projector
from moellava.parts.parts_moellava import ENCODERS, PROJECTORS


TEXT = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
PAIRS = [([32, 32], [8, 8]), ((32, 32), (8, 8)), ([32, 32], 8), (32, [8, 8])]
# Towers whose config takes pairs, each with the tokens before those of its patches.
WITH_PAIRS = {
    "internvl_vision": 1, "qianfan_ocr_vision": 1, "vit": 1, "dinov2": 1, "dinov3_vit": 1, "deit": 2, "beit": 1,
    "data2vec-vision": 1, "vit_msn": 1, "vitdet": 0,
}  # fmt: skip


def make(vision: dict, **fields) -> MoellavaConfig:
    fields = {"image_token_id": 99, "vision_feature_layer": -1, **fields}
    return MoellavaConfig(text_config=TEXT, vision_config=vision, **fields)


def hidden_state(model: MoellavaForCausalLM, pictures: torch.Tensor, **arguments) -> torch.Tensor:
    """The last hidden state of a tower that transformers builds of the same config, with the same weights."""
    fields = model.config.vision_config.to_dict()
    tower = AutoModel.from_config(AutoConfig.for_model(**fields)).eval()
    tower.load_state_dict(model.model.vision_tower.state_dict(), strict=False)  # but for a pooler
    with torch.no_grad():
        return tower(pictures, output_hidden_states=True, **arguments).hidden_states[-1]


def features(model: MoellavaForCausalLM, pictures: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model.get_image_features(pictures)
    assert {len(tokens) for tokens in output.pooler_output} == {model.config.image_seq_length}
    return output.last_hidden_state


def drawn_pictures(side: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sizes", PAIRS, ids=str)
@pytest.mark.parametrize("model_type", WITH_PAIRS)
def test_sizes_as_pairs(model_type, sizes):
    vision = VISION | {"model_type": model_type, "image_size": sizes[0], "patch_size": sizes[1]}
    pictures, prefix = drawn_pictures(), WITH_PAIRS[model_type]
    model = MoellavaForCausalLM(make(vision)).eval()
    assert model.config.image_seq_length == 16
    whole = hidden_state(model, pictures)
    whole = whole if whole.dim() == 3 else whole.flatten(2).transpose(1, 2)
    torch.testing.assert_close(features(model, pictures), whole[:, prefix:])
    for strategy, tokens in (("full", slice(None)), ("cls", slice(1))):
        if strategy == "cls" and not prefix:
            continue
        config = make(vision, vision_feature_select_strategy=strategy)
        assert config.image_seq_length == whole[:, tokens].shape[1]
        other = MoellavaForCausalLM(config).eval()
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(features(other, pictures), whole[:, tokens])


@pytest.mark.parametrize("model_type", ["vit", "deit", "dinov2", "beit", "dinov3_vit", "internvl_vision"])
def test_pairs_and_another_size(model_type):
    """Of some towers transformers computes other positions with numbers alone: told before any weight is read."""
    vision = VISION | {"model_type": model_type, "image_size": [32, 32], "patch_size": [8, 8]}
    try:
        config = make(vision, image_size=48)
    except ValueError as error:
        assert any(text in str(error) for text in ("cannot be a vision tower here", "cannot interpolate"))
        assert model_type not in ("beit", "dinov3_vit")
        return
    assert config.image_seq_length == 36
    assert features(MoellavaForCausalLM(config).eval(), drawn_pictures(48)).shape == (2, 36, 24)
    with pytest.raises(ValueError, match="image_size is 30, which is no multiple of the tower's patches of 8 pixels"):
        make(vision, image_size=30)


@pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip_vision_model", *WITH_PAIRS])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": [32, 64]}, "image_size is .*32, 64.*only square pictures and patches"),
        (
            {"patch_size": [8, 16]},
            "patch_size is .*8, 16.*only square pictures|cannot be a vision tower",
        ),
        ({"image_size": [32, 64], "patch_size": [8, 16]}, "only square pictures and patches are supported"),
    ],
)
def test_sizes_that_are_not_square(model_type, sizes, message):
    with pytest.raises(ValueError, match=message):
        make(VISION | {"model_type": model_type, **sizes})


@pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip_vision_model", "chinese_clip_vision_model"])
@pytest.mark.parametrize("sizes", PAIRS, ids=str)
def test_pairs_that_transformers_does_not_take(model_type, sizes):
    with pytest.raises(ValueError, match=f"vision_config does not describe a '{model_type}'"):
        MoellavaForCausalLM(make(VISION | {"model_type": model_type, "image_size": sizes[0], "patch_size": sizes[1]}))


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_maps_with_the_width_behind(layer):
    """SAM's hidden states are (batch, rows, columns, width)."""
    vision = VISION | {"model_type": "sam_vision_model", "output_channels": 16, "mlp_dim": 48, "window_size": 0}
    vision |= {"global_attn_indexes": [0, 1], "num_pos_feats": 8}
    model = MoellavaForCausalLM(make(vision, vision_feature_layer=layer)).eval()
    assert model.config.image_seq_length == 16 and model.model.encoder.feature_size == 24
    with torch.no_grad():
        states = model.model.vision_tower(drawn_pictures(), output_hidden_states=True).hidden_states
    assert states[layer].shape == (2, 4, 4, 24)
    torch.testing.assert_close(features(model, drawn_pictures()), states[layer].reshape(2, 16, 24))


@pytest.mark.parametrize("layer", [0, -1])
def test_patches_that_overlap_are_no_class_tokens(layer):
    """Hiera's patches of 7 pixels lie 4 apart, so that there are more of them than their size says."""
    vision = {"model_type": "hiera", "image_size": [64, 64], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 1]}
    vision |= {"mlp_ratio": 2.0, "masked_unit_size": [8, 8], "num_query_pool": 1}
    model = MoellavaForCausalLM(make(vision, vision_feature_layer=layer)).eval()
    assert model.model.encoder.num_prefix_tokens == 0
    whole = hidden_state(model, drawn_pictures(64))
    assert model.config.image_seq_length == (256 if layer == 0 else whole.shape[1])


def test_a_class_token_of_a_tower_without_one_size_of_patches():
    vision = {"model_type": "pvt", "image_size": 32, "hidden_sizes": [8, 8, 8, 16], "num_attention_heads": [1, 1, 1, 2]}
    vision |= {"depths": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2], "sequence_reduction_ratios": [1, 1, 1, 1]}
    model = MoellavaForCausalLM(make(vision)).eval()
    assert model.config.image_seq_length == 1 and model.model.encoder.num_prefix_tokens == 1
    torch.testing.assert_close(features(model, drawn_pictures()), hidden_state(model, drawn_pictures())[:, 1:])


def test_tokens_behind_those_of_the_patches():
    with pytest.raises(ValueError, match="yolos tower gives 101 tokens beside those of its patches, of which 1 are"):
        make(VISION | {"model_type": "yolos", "image_size": [32, 32]})


def test_a_tower_that_joins_pictures():
    with pytest.raises(ValueError, match="pixtral model cannot be a vision tower here: it joins the tokens of several"):
        make(VISION | {"model_type": "pixtral", "head_dim": 12})


# ---------------------------------------------------------------------------------------------------------------------
# Chance
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.75, 0.0])
def test_a_tower_that_draws_what_it_sees(parts, tmp_path, ratio):
    """Told before any weight is read: the folder has none."""
    fields = {name: value for name, value in VISION.items() if name != "model_type"}
    config = transformers.ViTMAEConfig(**fields, mask_ratio=ratio)
    message = r"A vit_mae model draws random numbers when it is asked \(aten::rand\), so that it answers differently"
    with pytest.raises(ValueError, match=message):
        make(config)
    config.architectures = ["ViTMAEForPreTraining"]
    config.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(parts.language_model("llama"), mm_vision_tower=tmp_path, device="cpu")


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "internvl_vision", "hidden_dropout_prob": 0.5, "attention_dropout": 0.5},
        {"model_type": "beit", "drop_path_rate": 0.5, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
        {"model_type": "dinov3_vit", "attention_dropout": 0.5, "pos_embed_jitter": 2.0, "pos_embed_shift": 0.5},
    ],
    ids=lambda fields: fields["model_type"],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_chance_in_training_alone_is_none(fields, attention):
    model = MoellavaForCausalLM(make(VISION | fields, attn_implementation=attention)).eval()
    assert torch.equal(features(model, drawn_pictures()), features(model, drawn_pictures()))


@pytest.fixture
def registered(monkeypatch):
    """What a test registers is known to it alone."""
    for registry in (ENCODERS, PROJECTORS):
        registry.names()  # so that the built-in ones are there
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))


DRAWS = {
    "noise": lambda x: x + torch.randn_like(x),
    "dropout": lambda x: nn.functional.dropout(x, 0.5, training=True),
    "order": lambda x: x[:, torch.randperm(x.shape[1])],
    "in place": lambda x: x * torch.empty_like(x).uniform_(),
    "by value": lambda x: x[:, : 1 + int(torch.rand(1) * x.shape[1])],  # which no meta tensor tells
}


@pytest.mark.parametrize("draws", DRAWS)
def test_parts_of_ones_own_that_draw(registered, draws):
    draw = DRAWS[draws]

    @register_encoder("drawing")
    class DrawingEncoder(nn.Module):
        def __init__(self, image_size=32):
            super().__init__()
            self.convolution = nn.Conv2d(3, 8, 8, 8)

        def forward(self, pixel_values):
            return draw(self.convolution(pixel_values).flatten(2).transpose(1, 2))

    @register_projector("drawing")
    class DrawingProjector(nn.Module):
        def __init__(self, vision_hidden_size, text_hidden_size):
            super().__init__()
            self.linear = nn.Linear(vision_hidden_size, text_hidden_size)

        def forward(self, x):
            return draw(self.linear(x))

    with pytest.raises(ValueError, match="DrawingEncoder draws random numbers when it is asked"):
        make({"model_type": "moellava_encoder"}, encoder_type="drawing")
    with pytest.raises(ValueError, match="DrawingProjector draws random numbers when it is asked"):
        make(VISION | {"model_type": "vit"}, projector_config={"type": "drawing"})
