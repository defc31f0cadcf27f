# SPDX-License-Identifier: Apache-2.0
"""The config: it survives every way of writing it down, says what is wrong with a field, and acts on no foreign one."""

import copy
import json
import logging
import pickle

import pytest
import torch
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    GraniteConfig,
    LlamaConfig,
    SiglipVisionConfig,
    SwinConfig,
)

from moellava import MoellavaConfig, MoellavaForCausalLM, MoellavaMoeConfig, MoellavaProjectorConfig


TEXT = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
}  # fmt: skip
SIGLIP = VISION | {"model_type": "siglip_vision_model"}
REGISTERS = VISION | {"model_type": "dinov2_with_registers", "num_register_tokens": 4, "mlp_ratio": 2}


def make(**fields) -> MoellavaConfig:
    return MoellavaConfig(**{"text_config": TEXT, "vision_config": VISION, "image_token_id": 99, **fields})


CONFIGS = {
    "plain": {},
    "everything": {
        "projector_config": {"type": "qformer", "qformer_hidden_size": 32, "num_query_tokens": 4},
        "encoder_type": "clip",
        "vision_feature_layer": [-1, -2],
        "vision_feature_select_strategy": "full",
        "image_size": 48,
        "image_aspect_ratio": "square",
        "parts": {"language_model": "me/lm", "vision_tower": "me/tower"},
    },
    "tied": {"text_config": TEXT | {"tie_word_embeddings": True}},
    "siglip": {"vision_config": SIGLIP, "projector_config": {"type": "perceiver", "num_latents": 4, "latent_dim": 16}},
    "granite": {"text_config": TEXT | {"model_type": "granite", "logits_scaling": 4.0}},
    "sparse": {"moe_config": {"num_experts": 4, "num_experts_per_tok": 1, "layers": [1]}},
    "objects": {
        "text_config": GraniteConfig(**{name: value for name, value in TEXT.items() if name != "model_type"}),
        "vision_config": SiglipVisionConfig(**{name: value for name, value in SIGLIP.items() if name != "model_type"}),
        "projector_config": MoellavaProjectorConfig(type="linear", bias=False),
    },
}


def assert_same(config: MoellavaConfig, other: MoellavaConfig) -> None:
    assert type(other) is MoellavaConfig
    assert other.to_dict() == config.to_dict()
    assert other.to_json_string(use_diff=False) == config.to_json_string(use_diff=False)
    for name in ("text_config", "vision_config", "projector_config", "moe_config"):
        assert type(getattr(other, name)) is type(getattr(config, name))
    assert other.projector_config.fields == config.projector_config.fields


# ---------------------------------------------------------------------------------------------------------------------
# There and back
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
class TestThereAndBack:
    def test_dictionary(self, name):
        config = make(**CONFIGS[name])
        written = config.to_dict()
        before = copy.deepcopy(written)
        assert_same(config, MoellavaConfig.from_dict(written))
        assert written == before
        assert_same(config, MoellavaConfig(**config.to_dict()))

    def test_json(self, name):
        config = make(**CONFIGS[name])
        for use_diff in (True, False):
            read = json.loads(config.to_json_string(use_diff=use_diff))
            assert_same(config, MoellavaConfig.from_dict(read))

    def test_file(self, name, tmp_path):
        config = make(**CONFIGS[name])
        config.save_pretrained(tmp_path / "first")
        first = MoellavaConfig.from_pretrained(tmp_path / "first")
        first.save_pretrained(tmp_path / "second")
        second = AutoConfig.from_pretrained(tmp_path / "second")
        for read in (first, second):
            assert_same(config, without_place(read))
        texts = [(tmp_path / folder / "config.json").read_text() for folder in ("first", "second")]
        assert texts[0] == texts[1]

    def test_copies(self, name):
        config = make(**CONFIGS[name])
        for other in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))):
            assert_same(config, other)
        deep = copy.deepcopy(config)
        deep.text_config.hidden_size = 8
        deep.projector_config.type = "another"
        assert config.text_config.hidden_size != 8
        assert config.projector_config.type != "another"

    def test_what_was_given_is_not_changed(self, name):
        given = copy.deepcopy(CONFIGS[name])
        config = make(**given)
        config.text_config.vocab_size = 7
        config.projector_config.type = "another"
        for key, value in CONFIGS[name].items():
            described = [part.to_dict() if hasattr(part, "to_dict") else part for part in (given[key], value)]
            assert described[0] == described[1]


def without_place(config: MoellavaConfig) -> MoellavaConfig:
    config._name_or_path = ""
    return config


def test_the_defaults_are_a_model():
    config = MoellavaConfig()
    assert config.encoder_type == "clip"
    assert config.projector_config.type == "mlp"
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert config.image_aspect_ratio == "pad"
    assert config.image_seq_length == (336 // 14) ** 2
    assert 0 <= config.image_token_id < config.text_config.vocab_size
    assert config.moe_config is None
    assert_same(config, MoellavaConfig.from_dict(config.to_dict()))
    with torch.device("meta"):
        model = MoellavaForCausalLM(config)
    assert model.model.multi_modal_projector.linear_1.in_features == 1024


def test_two_configs_share_nothing():
    one, other = MoellavaConfig(), MoellavaConfig()
    one.parts, one.auto_map["AutoModel"] = {"language_model": "a"}, "changed"
    one.text_config.hidden_size = 8
    assert other.parts is None
    assert other.auto_map["AutoModel"] != "changed"
    assert other.text_config.hidden_size != 8


def test_what_the_parts_are_is_written_in_full(tmp_path):
    """A config is read without anything else: every field of the projector stands there, defaults too."""
    make(projector_config={"type": "perceiver", "latent_dim": 16}).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["projector_config"]["num_latents"] == 64
    assert written["projector_config"]["num_hidden_layers"] == 3
    assert written["text_config"]["model_type"] == "llama"
    assert written["vision_config"]["model_type"] == "clip_vision_model"
    assert written.get("moe_config") is None
    assert set(written["auto_map"]) == {
        "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM",
        "AutoProcessor",
    }  # fmt: skip


def test_a_model_is_made_of_the_config_alone(tmp_path):
    config = make(parts={"language_model": "/nowhere/lm", "vision_tower": "nobody/tower"})
    model = MoellavaForCausalLM(config)
    ids = torch.tensor([[1] + [99] * config.image_seq_length + [2]])
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32)).logits
    assert logits.shape == (1, ids.shape[1], 100)


def test_where_the_parts_came_from_is_kept_and_has_no_effect(tmp_path):
    origin = {"language_model": "me/lm", "vision_tower": "me/tower"}
    config = make(parts=origin)
    config.save_pretrained(tmp_path)
    assert MoellavaConfig.from_pretrained(tmp_path).parts == origin
    assert without_parts(config) == without_parts(make())


def without_parts(config: MoellavaConfig) -> dict:
    return {name: value for name, value in config.to_dict().items() if name != "parts"}


# ---------------------------------------------------------------------------------------------------------------------
# What is computed
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vision, strategy, tokens",
    [
        (VISION, "default", 16),
        (VISION, "patch", 16),
        (VISION, "cls", 1),
        (VISION, "full", 17),
        (SIGLIP, "default", 16),
        (SIGLIP, "full", 16),
        (REGISTERS, "default", 16),
        (REGISTERS, "cls", 1),
        (REGISTERS, "full", 21),
    ],
)
def test_the_number_of_tokens_follows_from_tower_and_strategy(vision, strategy, tokens):
    config = make(vision_config=vision, vision_feature_select_strategy=strategy)
    assert config.image_seq_length == tokens
    with torch.no_grad():
        features = MoellavaForCausalLM(config).get_image_features(torch.zeros(2, 3, 32, 32))
    assert [projected.shape for projected in features.pooler_output] == [(tokens, 32)] * 2


@pytest.mark.parametrize(
    "projector, tokens",
    [
        ({"type": "mlp"}, 36),
        ({"type": "linear"}, 36),
        ({"type": "qformer", "qformer_hidden_size": 32, "num_query_tokens": 5}, 5),
        ({"type": "perceiver", "latent_dim": 16, "num_latents": 6}, 6),
    ],
)
def test_the_number_of_tokens_follows_from_size_and_projector(projector, tokens):
    assert make(image_size=48, projector_config=projector).image_seq_length == tokens


def test_the_number_of_tokens_is_not_what_somebody_writes():
    assert make(image_seq_length=7).image_seq_length == 16
    assert MoellavaConfig.from_dict(make().to_dict() | {"image_seq_length": 7}).image_seq_length == 16


def test_experts_given_to_a_config_later():
    config = make()
    config.moe_config = MoellavaMoeConfig(layers="second_half")
    names = [name for name, _ in MoellavaForCausalLM(config).named_parameters() if "experts" in name]
    assert {name.partition("experts")[0] for name in names} == {"model.language_model.layers.1.mlp."}
    assert config.moe_config.layers == [1]


@pytest.mark.parametrize("tied", [True, False])
def test_tying_is_the_language_models(tied):
    config = make(text_config=TEXT | {"tie_word_embeddings": tied}, tie_word_embeddings=not tied)
    assert config.tie_word_embeddings is tied
    model = MoellavaForCausalLM(config)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied


@pytest.mark.parametrize(
    "vision, encoder_type",
    [
        (VISION, "clip"),
        (SIGLIP, "siglip"),
        (REGISTERS, "dinov2"),
        (VISION | {"model_type": "vit"}, "vit"),
        (VISION | {"model_type": "deit"}, "auto"),
    ],
)
def test_the_encoder_is_told_by_the_towers_type(vision, encoder_type):
    assert make(vision_config=vision).encoder_type == encoder_type


@pytest.mark.parametrize("spelling, name", [("sigclip", "siglip"), ("siglip", "siglip")])
def test_accepted_spellings_of_encoders(spelling, name):
    assert make(vision_config=SIGLIP, encoder_type=spelling).encoder_type == name
    vit = VISION | {"model_type": "vit"}
    for accepted in ("biomedclip", "medclip"):
        assert make(vision_config=vit, encoder_type=accepted).encoder_type == "biomedclip"


# ---------------------------------------------------------------------------------------------------------------------
# Older names
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "older, today",
    [
        ({"mm_vision_select_layer": -1}, {"vision_feature_layer": -1}),
        ({"mm_vision_select_feature": "cls"}, {"vision_feature_select_strategy": "cls"}),
        ({"mm_vision_select_feature": "cls_patch"}, {"vision_feature_select_strategy": "full"}),
        ({"vision_feature_select_strategy": "cls_patch"}, {"vision_feature_select_strategy": "full"}),
        ({"mm_vision_image_size": 48}, {"image_size": 48}),
        ({"projector_type": "linear"}, {"projector_config": {"type": "linear"}}),
        ({"mm_projector_type": "mlp2x_gelu"}, {"projector_config": {"type": "mlp", "num_hidden_layers": 2}}),
        ({"image_projector_type": "mlp3x_gelu"}, {"projector_config": {"type": "mlp", "num_hidden_layers": 3}}),
        ({"projector_config": {"type": "mlp2x_gelu"}}, {"projector_config": {"type": "mlp"}}),
        ({"projector_config": {"mm_projector_type": "linear"}}, {"projector_config": {"type": "linear"}}),
        ({"mm_projector_hidden_size": 40}, {"projector_config": {"type": "mlp", "hidden_size": 40}}),
        (
            {"hidden_size": 40, "num_hidden_layers": 3},
            {"projector_config": {"hidden_size": 40, "num_hidden_layers": 3}},
        ),
        (
            {"projector_type": "qformer", "num_query_tokens": 4, "qformer_hidden_size": 32},
            {"projector_config": {"type": "qformer", "num_query_tokens": 4, "qformer_hidden_size": 32}},
        ),
        (
            {"projector_type": "perceiver", "num_latents": 4, "hidden_size": 16},
            {"projector_config": {"type": "perceiver", "num_latents": 4, "latent_dim": 16}},
        ),
        ({"mm_vision_tower": "me/tower"}, {"parts": {"vision_tower": "me/tower"}}),
        ({"mm_image_tower": "me/tower"}, {"parts": {"vision_tower": "me/tower"}}),
        ({"mm_hidden_size": 24}, {}),
    ],
    ids=lambda fields: "-".join(fields) or "nothing",
)
def test_older_names(older, today):
    assert make(**older).to_dict() == make(**today).to_dict()
    assert MoellavaConfig.from_dict(make().to_dict() | older).to_dict() == make(**today).to_dict()


def test_a_claimed_width_that_the_tower_has_not(caplog):
    assert make(mm_hidden_size=768).to_dict() == make().to_dict()
    assert "mm_hidden_size is given as 768, but the vision tower is 24 wide" in caplog.text


def test_two_names_that_differ():
    with pytest.raises(ValueError, match="'vision_feature_layer' is -1 and 'mm_vision_select_layer' is -3.*Give one"):
        make(vision_feature_layer=-1, mm_vision_select_layer=-3)
    with pytest.raises(ValueError, match="'mm_projector_type'.*Give one"):
        make(projector_type="linear", mm_projector_type="mlp")


# ---------------------------------------------------------------------------------------------------------------------
# Unknown fields and values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("vision_feature_layers", "vision_feature_layer"),
        ("text_cfg", "text_config"),
        ("image_token_index", "image_token_id"),
        ("projectr_config", "projector_config"),
        ("mm_vision_select_layers", "mm_vision_select_layer"),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest_known(name, nearest):
    with pytest.raises(ValueError, match=f"Unknown field '{name}' in MoellavaConfig; did you mean '{nearest}'"):
        make(**{name: 1})


def test_an_unknown_field_of_a_projector():
    with pytest.raises(ValueError, match="'qformer' has no field 'num_query_token'; did you mean 'num_query_tokens'"):
        make(projector_config={"type": "qformer", "num_query_token": 4})
    with pytest.raises(ValueError, match="'mlp' has no field 'num_latents'"):
        MoellavaProjectorConfig(num_latents=4)
    with pytest.raises(ValueError, match="Unknown projector 'qformr'; did you mean 'qformer'"):
        make(projector_config={"type": "qformr"})


@pytest.mark.parametrize("projector, width", [("qformer", "qformer_hidden_size"), ("perceiver", "latent_dim")])
def test_the_width_of_a_projector_has_one_value_under_both_names(projector, width):
    # Not Python's own small numbers: two that are equal are two objects.
    assert getattr(make(projector_config={"type": projector, "hidden_size": 1024}).projector_config, width) == 1024
    both = {"type": projector, "hidden_size": 1024, width: int("1024")}
    assert getattr(make(projector_config=both).projector_config, width) == 1024
    for other in (512, 2048):
        with pytest.raises(ValueError, match=f"hidden_size is 1024 and {width} is {other}; they are one field"):
            make(projector_config=both | {width: other})


def test_a_field_of_a_later_version_in_a_file_is_kept_without_effect_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        config = MoellavaConfig.from_dict(make().to_dict() | {"field_of_tomorrow": {"a": 1}})
    assert "field_of_tomorrow" in caplog.text
    assert config.to_dict()["field_of_tomorrow"] == {"a": 1}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vision_feature_select_strategy": "pach"}, "Unknown vision_feature_select_strategy 'pach'; .* 'patch'"),
        ({"vision_feature_select_strategy": 3}, "vision_feature_select_strategy"),
        ({"image_aspect_ratio": "padd"}, "Unknown image_aspect_ratio 'padd'; did you mean 'pad'"),
        ({"encoder_type": "clipp"}, "Unknown encoder 'clipp'; did you mean 'clip'"),
        ({"encoder_type": "siglip"}, "encoder_type is 'siglip', but .*'clip_vision_model'"),
        ({"encoder_type": ["clip"]}, "'encoder_type'"),
        ({"vision_feature_layer": 4}, "vision_feature_layer 4 is out of range: .*3 layers.* from -4 to 3"),
        ({"vision_feature_layer": -5}, "vision_feature_layer -5 is out of range"),
        ({"vision_feature_layer": [-1, 7]}, "vision_feature_layer 7 is out of range"),
        ({"vision_feature_layer": []}, "empty list; give one layer or several"),
        ({"vision_feature_layer": "-2"}, "'vision_feature_layer'.*int"),
        ({"vision_feature_layer": -2.0}, "'vision_feature_layer'.*int"),
        ({"vision_feature_layer": ["-2"]}, "vision_feature_layer"),
        ({"image_size": 0}, "image_size is 0; expected a number of pixels"),
        ({"image_size": -8}, "image_size is -8; expected a number of pixels"),
        ({"image_size": "32"}, "'image_size'.*int"),
        ({"image_size": 30}, "image_size is 30, which is no multiple of .* 8 pixels. The nearest that is: 32"),
        ({"image_size": 3}, "image_size is 3, .*The nearest that is: 8"),
        ({"image_token_id": 100}, "image_token_id is 100, .*vocabulary has 100 rows: expected 0 to 99"),
        ({"image_token_id": -1}, "image_token_id is -1"),
        ({"image_token_id": "99"}, "'image_token_id'.*int"),
        ({"parts": "me/lm"}, "'parts'"),
        ({"vision_config": SIGLIP, "vision_feature_select_strategy": "cls"}, "siglip_vision_model tower has no class"),
        ({"projector_config": {"type": "mlp", "hidden_size": -1}}, None),
        ({"projector_config": {"type": 3}}, "'type'.*str"),
        ({"projector_config": ["mlp"]}, "'projector_config'"),
        ({"projector_config": LlamaConfig()}, "projector_config is a LlamaConfig; expected a MoellavaProjectorConfig"),
        ({"text_config": "llama"}, "'text_config'"),
        ({"text_config": VISION}, "text_config describes a 'clip_vision_model' model, which has no vocabulary"),
        ({"text_config": TEXT | {"num_attention_heads": -1}}, "num_attention_heads is -1; expected at least 1"),
        ({"vision_config": VISION | {"hidden_size": 0}}, "vision_config.hidden_size is 0; expected at least 1"),
        ({"vision_config": VISION | {"image_size": -1}}, "vision_config.image_size is -1; expected at least 1"),
        (
            {"text_config": TEXT | {"num_key_value_heads": 7}},
            "text_config.num_attention_heads is 2 and num_key_value_heads is 7; expected a multiple of it",
        ),
        (
            {"text_config": TEXT | {"model_type": "qwen2", "hidden_size": 7, "num_key_value_heads": 1}},
            "text_config has heads of 3 channels, which rotary embeddings turn in pairs; expected an even number",
        ),
        ({"vision_config": TEXT}, "A llama tower does not tell its picture size"),
        ({"vision_config": TEXT, "image_size": 32}, "A llama model cannot be a vision tower here"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values(fields, message):
    if message is None:  # a size is checked by the projector's own class, when the model is built
        with pytest.raises(ValueError, match="hidden_size"), torch.device("meta"):
            MoellavaForCausalLM(make(**fields))
        return
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_a_language_model_that_cannot_be_built():
    with pytest.raises(ValueError, match="text_config does not describe a 'llama' model .KeyError: .* LlamaConfig"):
        MoellavaForCausalLM(make(text_config=TEXT | {"hidden_act": "no_such"}))


def test_a_tower_that_cannot_interpolate():
    with pytest.raises(ValueError, match="cannot interpolate its position embeddings. Leave image_size out"):
        make(vision_config=VISION | {"model_type": "aimv2_vision_model"}, image_size=64)
    swin = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    assert make(vision_config=swin, image_size=64).image_seq_length == 4 * make(vision_config=swin).image_seq_length


# ---------------------------------------------------------------------------------------------------------------------
# A config that came from elsewhere
# ---------------------------------------------------------------------------------------------------------------------

FOREIGN = {
    "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
    "trust_remote_code": True,
    "_name_or_path": "/home/somebody/model",
    "_attn_implementation_internal": "evil-org/kernel",
    "_attn_implementation": "evil-org/kernel",
    "attn_implementation": "evil-org/kernel",
    "experts_implementation": "evil-org/kernel",
    "transformers_version": "3.0.0",
    "_commit_hash": "abc",
}
EVIL_CODE = 'import pathlib\npathlib.Path(__file__).with_name("EXECUTED").touch()\nraise RuntimeError("executed")\n'


@pytest.fixture
def hostile(tmp_path):
    """A config.json with foreign keys at every level, beside the code that they name."""
    written = make(projector_config={"type": "linear"}, moe_config={"num_experts": 2, "layers": [0]}).to_dict()
    for key in ("text_config", "vision_config", "projector_config", "moe_config"):
        written[key] = written[key] | FOREIGN
    written |= FOREIGN
    (tmp_path / "config.json").write_text(json.dumps(written))
    (tmp_path / "evil.py").write_text(EVIL_CODE)
    return tmp_path


def test_foreign_keys_of_parts_are_data_and_are_dropped(hostile, tmp_path_factory):
    for trust in (False, True):
        config = AutoConfig.from_pretrained(hostile, trust_remote_code=trust)
        assert type(config) is MoellavaConfig
        for part in (config, config.text_config, config.vision_config, config.projector_config, config.moe_config):
            assert part._attn_implementation != "evil-org/kernel"
            assert part._experts_implementation != "evil-org/kernel"
            assert not getattr(part, "trust_remote_code", False)
            assert "evil" not in str(getattr(part, "auto_map", ""))
        again = tmp_path_factory.mktemp("saved")
        config.save_pretrained(again)
        text = (again / "config.json").read_text()
        for trace in ("evil", "somebody", "trust_remote_code", "3.0.0"):
            assert trace not in text
    assert not (hostile / "EXECUTED").exists()


def test_a_model_of_such_a_config_runs_on_the_librarys_own_attention(hostile):
    config = MoellavaConfig.from_pretrained(hostile)
    model = MoellavaForCausalLM(config)
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert model.model.language_model.config._attn_implementation in ("sdpa", "eager")
    ids = torch.tensor([[1] + [99] * config.image_seq_length])
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32)).logits).all()
    assert not (hostile / "EXECUTED").exists()


def test_the_callers_own_word_on_attention_counts(hostile):
    config = MoellavaConfig.from_pretrained(hostile, attn_implementation="eager")
    assert config._attn_implementation == "eager"
    assert MoellavaForCausalLM(config).model.language_model.config._attn_implementation == "eager"


def test_parts_given_as_objects_lose_their_foreign_keys_and_the_objects_keep_them():
    text = LlamaConfig(**{name: value for name, value in TEXT.items() if name != "model_type"})
    vision = CLIPVisionConfig(**{name: value for name, value in VISION.items() if name != "model_type"})
    for part in (text, vision):
        part._name_or_path, part.auto_map, part.trust_remote_code = "/home/somebody", {"AutoModel": "evil.M"}, True
    config = make(text_config=text, vision_config=vision)
    written = config.to_json_string(use_diff=False)
    assert "somebody" not in written and "evil" not in written
    assert text._name_or_path == "/home/somebody" and text.auto_map == {"AutoModel": "evil.M"}


def test_the_type_of_a_part_is_one_of_transformers_own():
    for key, base in (("text_config", TEXT), ("vision_config", VISION)):
        for model_type in ("evil_model", None, 3, ["llama"]):
            with pytest.raises(ValueError, match=f"{key}.model_type is .*code that a part brings with it is not run"):
                make(**{key: base | {"model_type": model_type, "auto_map": FOREIGN["auto_map"]}})


@pytest.mark.parametrize(
    "fields",
    [
        {"text_config": TEXT | {"hidden_size": "large"}},
        {"text_config": TEXT | {"vocab_size": None}},
        {"text_config": TEXT | {"vocab_size": [100]}},
        {"text_config": TEXT | {"rope_parameters": 3}},
        {"text_config": TEXT | {"num_hidden_layers": {"a": 1}}},
        {"text_config": TEXT | {"num_attention_heads": 3}},
        {"vision_config": VISION | {"image_size": "big"}},
        {"vision_config": VISION | {"patch_size": 0}},
        {"vision_config": VISION | {"patch_size": None}},
        {"vision_config": VISION | {"patch_size": 64}},
        {"vision_config": VISION | {"num_hidden_layers": -3}},
        {"vision_config": VISION | {"hidden_size": {}}},
        {"projector_config": {"type": "mlp", "num_hidden_layers": {"a": 1}, "type ": 1}},
        {"projector_config": {"type": {"a": 1}}},
        {"projector_config": {"type": "qformer", "num_query_tokens": "many"}},
        {"projector_config": {"type": "perceiver", "num_latents": -1}},
        {"moe_config": {"num_experts": "many"}},
        {"moe_config": {"layers": [99]}},
        {"moe_config": {"num_expert": 4}},
    ],
    ids=str,
)
def test_hostile_values_give_a_value_error(fields):
    for construct in (lambda: make(**fields), lambda: MoellavaConfig.from_dict(make().to_dict() | fields)):
        with pytest.raises(ValueError) as caught:
            construct()
        assert str(caught.value).strip()


def test_equal_numbers_of_experts_are_one():
    assert MoellavaMoeConfig(num_experts=[4, 4]).num_experts == 4
