# SPDX-License-Identifier: Apache-2.0

"""Fields that are set after a config was made, or laid over those of a file, are checked and measured as a file's are.

By arguments of `from_pretrained` and `from_dict`, by attributes, and by the checkpoint's own code.
"""

import json

import pytest
import torch
from parts import picture, run_python
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    SiglipVisionConfig,
)

from moellava import MoellavaConfig, MoellavaForCausalLM, load_pretrained_model


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    """A saved model with its processor: CLIP at 32 pixels with patches of 8, an MLP, a LLaMA."""
    folder = tmp_path_factory.mktemp("overrides") / "model"
    load_pretrained_model(
        parts.language_model("llama"), mm_vision_tower=parts.vision_tower("clip_vision"), device="cpu"
    ).model.save_pretrained(folder)
    return folder


# What a caller says, and what follows from it.
OVERRIDES = {
    "strategy": ({"vision_feature_select_strategy": "cls"}, {"image_seq_length": 1}),
    "strategy by its older name": ({"mm_vision_select_feature": "cls_patch"}, {"image_seq_length": 17}),
    "size": ({"image_size": 64}, {"image_seq_length": 64}),
    "size by its older name": ({"mm_vision_image_size": 48}, {"image_size": 48, "image_seq_length": 36}),
    "layer": ({"vision_feature_layer": [-1, -2]}, {"vision_feature_layer": [-1, -2], "image_seq_length": 16}),
    "first patch": ({"drop_first_patch": True}, {"image_seq_length": 15}),
    "projector": ({"projector_type": "linear"}, {"projector_config.type": "linear"}),
    "projector of one spelling": ({"mm_projector_type": "mlp3x_gelu"}, {"projector_config.num_hidden_layers": 3}),
    "projector's fields": (
        {"projector_config": {"type": "qformer", "num_query_tokens": 4}},
        {"projector_config.type": "qformer", "image_seq_length": 4},
    ),
    "a field of the projector": (
        {"projector_config": {"num_hidden_layers": 3}},
        {"projector_config.type": "mlp", "projector_config.num_hidden_layers": 3},
    ),
    "sparse layers": (
        {"moe_config": {"moe_mode": "second_half", "top_k_experts": 1}},
        {"moe_config.layers": [2, 3], "moe_config.num_experts_per_tok": 1},
    ),
    "the tower's size": ({"vision_config": {"image_size": 64}}, {"image_seq_length": 64}),
    "the language model's": (
        {"text_config": {"num_hidden_layers": 2}},
        {"text_config.num_hidden_layers": 2, "text_config.hidden_size": 64},
    ),
    "tied": (
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": True, "text_config.tie_word_embeddings": True},
    ),
    "another tower": (
        {"vision_config": SiglipVisionConfig(image_size=32, patch_size=8, num_hidden_layers=2)},
        {"encoder_type": "siglip", "image_seq_length": 16},
    ),
    "another tower by value": (
        {"vision_config": {"model_type": "dinov2", "image_size": 32, "patch_size": 8, "num_hidden_layers": 2}},
        {"encoder_type": "dinov2", "image_seq_length": 16},
    ),
    "what is computed, rightly": ({"image_seq_length": 16}, {"image_seq_length": 16}),
    "of transformers' own": ({"attn_implementation": "eager", "use_cache": False}, {"image_seq_length": 16}),
}

# What a caller says, and what is wrong with it.
WRONG = {
    "strategy": ({"vision_feature_select_strategy": "patches"}, "Unknown vision_feature_select_strategy 'patches'"),
    "aspect ratio": ({"image_aspect_ratio": "pads"}, "Unknown image_aspect_ratio 'pads'; did you mean 'pad'"),
    "size": ({"image_size": 30}, "image_size is 30, which is no multiple of the tower's patches of 8 pixels"),
    "size of another type": ({"image_size": "64"}, "image_size"),
    "layer": ({"vision_feature_layer": -9}, "vision_feature_layer -9 is out of range"),
    "encoder": ({"encoder_type": "siglip"}, "encoder_type is 'siglip', but the vision tower's config says"),
    "projector": ({"projector_type": "qfomer"}, "Unknown projector 'qfomer'; did you mean 'qformer'"),
    "a field of the projector": ({"projector_config": {"num_queries": 8}}, "has no field 'num_queries'"),
    "the language model's": ({"text_config": {"num_attention_heads": -1}}, "num_attention_heads is -1"),
    "the tower's": ({"vision_config": {"patch_size": 0}}, "patch_size is 0"),
    "experts per token": ({"moe_config": {"num_experts": 2, "top_k": 3}}, "num_experts_per_tok is 3 of num_experts 2"),
    "image token": ({"image_token_id": 10**6}, "image_token_id is 1000000, but the language model's vocabulary has"),
    "a scale": ({"image_feature_scale": 0}, "image_feature_scale is 0; expected a number above 0"),
    "what is computed": ({"image_seq_length": 7}, "image_seq_length is 7, but the parts make 16 tokens of a picture"),
    "two names": (
        {"image_size": 64, "mm_vision_image_size": 48},
        "'image_size' is 64 and 'mm_vision_image_size' is 48 in the arguments",
    ),
    "a part from elsewhere": (
        {"mm_vision_tower": "google/siglip-base-patch16-224"},
        "from_pretrained changes fields and loads no other part. Use load_pretrained_model",
    ),
}


def at(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("name", OVERRIDES)
@pytest.mark.parametrize("by", ["AutoConfig", "from_dict"])
def test_what_a_caller_says_is_measured(checkpoint, tmp_path, name, by):
    fields, expected = OVERRIDES[name]
    if by == "from_dict":
        config = MoellavaConfig.from_dict(json.loads((checkpoint / "config.json").read_text()), **fields)
    else:
        config = AutoConfig.from_pretrained(checkpoint, **fields)
        MoellavaForCausalLM(config)
    assert {path: at(config, path) for path in expected} == expected
    config.save_pretrained(tmp_path)
    again = MoellavaConfig.from_pretrained(tmp_path)
    assert {path: at(again, path) for path in expected} == expected


def test_a_config_without_overrides_is_as_saved_and_says_nothing(checkpoint, caplog):
    config = AutoConfig.from_pretrained(checkpoint)
    assert json.loads(config.to_json_string()) == json.loads((checkpoint / "config.json").read_text())
    assert not caplog.records


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("by", [AutoConfig, MoellavaForCausalLM, AutoModelForImageTextToText])
def test_what_a_caller_says_is_checked(checkpoint, name, by):
    fields, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        by.from_pretrained(checkpoint, **fields)


def test_a_misspelled_field_is_no_field_that_is_ignored(checkpoint):
    with pytest.raises(ValueError, match="Unknown field 'projector_typ' in MoellavaConfig; did you mean"):
        AutoConfig.from_pretrained(checkpoint, projector_typ="linear")
    with pytest.raises(TypeError, match="projector_typ"):
        AutoModelForImageTextToText.from_pretrained(checkpoint, projector_typ="linear")


def test_what_is_meant_for_a_tokenizer_passes_the_config_by(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="right", image_token="<image>", unheard_of=1)
    assert tokenizer.padding_side == "right"
    config, unused = AutoConfig.from_pretrained(
        checkpoint, unheard_of=1, vision_feature_select_strategy="cls", return_unused_kwargs=True
    )
    assert unused["unheard_of"] == 1 and "vision_feature_select_strategy" not in unused
    assert config.image_seq_length == 1


def logits(model, processor) -> torch.Tensor:
    inputs = processor(text="<image> What is shown?", images=picture(3), return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def test_a_model_loaded_with_another_strategy_is_saved_and_loaded_as_it_is(checkpoint, tmp_path, caplog):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, vision_feature_select_strategy="cls").eval()
    assert "image_seq_length is 1, and was 16 when the model was saved" in caplog.text
    processor = AutoProcessor.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="has 16 image tokens, but .* its num_image_tokens has to be 1"):
        logits(model, processor)

    processor = AutoProcessor.from_pretrained(checkpoint, num_image_tokens=1)
    expected = logits(model, processor)
    fitted = load_pretrained_model(checkpoint, vision_feature_select_strategy="cls", device="cpu").model
    assert torch.equal(expected, logits(fitted, fitted.processor))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = load_pretrained_model(tmp_path, device="cpu").model
    assert torch.equal(logits(again, again.processor), expected)


def test_pictures_of_the_size_before_the_override_are_named(checkpoint, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, image_size=64).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, num_image_tokens=64)
    with pytest.raises(ValueError, match="The pictures are 32x32 pixels, but the model takes 64x64"):
        logits(model, processor)
    with pytest.raises(ValueError, match="The pictures are 32x32 pixels"):
        model.get_image_features(torch.zeros(1, 3, 32, 32))
    side = {"height": 64, "width": 64}
    processor = AutoProcessor.from_pretrained(
        checkpoint, num_image_tokens=64, size={"shortest_edge": 64}, crop_size=side
    )
    expected = logits(model, processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = load_pretrained_model(tmp_path, device="cpu").model
    assert torch.equal(logits(again, again.processor), expected)


def test_how_a_picture_is_padded_is_the_processors_and_said(checkpoint, caplog):
    AutoModelForImageTextToText.from_pretrained(checkpoint, image_aspect_ratio="square")
    assert "image_aspect_ratio is square, and was pad when the model was saved" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# By attributes
# ---------------------------------------------------------------------------------------------------------------------

# An attribute that is set, and what follows from it.
SET = {
    "strategy": ({"vision_feature_select_strategy": "cls"}, {"image_seq_length": 1}),
    "a spelling of it": ({"vision_feature_select_strategy": "cls_patch"}, {"vision_feature_select_strategy": "full"}),
    "size": ({"image_size": 64}, {"image_seq_length": 64}),
    "the tower's size": ({"vision_config.image_size": 64}, {"image_seq_length": 64}),
    "another tower": (
        {"vision_config": CLIPVisionConfig(image_size=48, patch_size=8, num_hidden_layers=2)},
        {"image_seq_length": 36},
    ),
    "a field of the projector": (
        {"projector_config.num_hidden_layers": 3},
        {"projector_config.num_hidden_layers": 3},
    ),
    "what is computed": ({"image_seq_length": 7}, {"image_seq_length": 16}),
}
SET_WRONG = {
    "strategy": ({"vision_feature_select_strategy": "patches"}, "Unknown vision_feature_select_strategy"),
    "layer": ({"vision_feature_layer": 9}, "vision_feature_layer 9 is out of range"),
    "encoder": ({"encoder_type": "siglip"}, "encoder_type is 'siglip'"),
    "the tower's": ({"vision_config.image_size": 0}, "image_size is 0"),
    "the language model's vocabulary": ({"text_config.vocab_size": 5}, "the language model's vocabulary has 5 rows"),
    "the language model's heads": ({"text_config.num_attention_heads": -1}, "num_attention_heads is -1"),
    "the projector": ({"projector_config.type": "qfomer"}, "Unknown projector 'qfomer'"),
    "the projector with another's fields": (
        {"projector_config.type": "linear"},
        "The projector 'linear' has no field 'num_hidden_layers'",
    ),
    "tied": ({"tie_word_embeddings": True}, "They are one field: set both"),
    "another tower": ({"vision_config": SiglipVisionConfig()}, "encoder_type is 'clip', but the vision tower's config"),
}


def set_fields(config, fields) -> None:
    for path, value in fields.items():
        place, _, name = path.rpartition(".")
        setattr(at(config, place) if place else config, name, value)


@pytest.mark.parametrize("name", SET)
def test_a_field_that_is_set_is_measured_where_it_counts(checkpoint, tmp_path, name):
    fields, expected = SET[name]
    for use in (AutoModelForImageTextToText.from_config, MoellavaForCausalLM, lambda it: it.save_pretrained(tmp_path)):
        config = AutoConfig.from_pretrained(checkpoint)
        set_fields(config, fields)
        model = use(config)
        used = config if model is None else model.config
        assert {path: at(used, path) for path in expected} == expected
    again = MoellavaConfig.from_pretrained(tmp_path)
    assert {path: at(again, path) for path in expected} == expected


@pytest.mark.parametrize("name", SET_WRONG)
def test_a_field_that_is_set_is_checked_where_it_counts(checkpoint, tmp_path, name):
    fields, message = SET_WRONG[name]
    config = AutoConfig.from_pretrained(checkpoint)
    set_fields(config, fields)
    for use in (
        AutoModelForImageTextToText.from_config,
        MoellavaForCausalLM,
        lambda it: MoellavaForCausalLM.from_pretrained(checkpoint, config=it),
        lambda it: it.save_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=message):
            use(config)
    assert not list(tmp_path.iterdir())


def test_experts_that_are_set_are_checked(checkpoint, tmp_path):
    config = AutoConfig.from_pretrained(checkpoint, moe_config={"num_experts": 2})
    config.moe_config.num_experts_per_tok = 3
    for use in (AutoModelForImageTextToText.from_config, lambda it: it.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="num_experts_per_tok is 3 of num_experts 2"):
            use(config)


def test_a_part_of_a_config_may_be_set_as_a_dictionary(checkpoint, tmp_path):
    config = AutoConfig.from_pretrained(checkpoint)
    config.projector_config = {"type": "qformer", "num_query_tokens": 4}
    config.save_pretrained(tmp_path)
    assert config.projector_config.type == "qformer" and config.image_seq_length == 4


@pytest.mark.parametrize("name", ["text_config", "vision_config", "projector_config"])
def test_a_model_is_built_of_parts_that_were_set_as_dictionaries(checkpoint, name):
    fields = AutoConfig.from_pretrained(checkpoint).to_dict()[name]
    for build in (
        AutoModelForImageTextToText.from_config,
        MoellavaForCausalLM,
        lambda config: AutoModelForImageTextToText.from_pretrained(checkpoint, config=config),
    ):
        config = AutoConfig.from_pretrained(checkpoint)
        setattr(config, name, dict(fields))
        built = getattr(build(config).config, name).to_dict()
        assert {field: built[field] for field in fields} == fields
    config.projector_config = {"type": "linea"}
    with pytest.raises(ValueError, match="Unknown projector 'linea'; did you mean 'linear'"):
        AutoModelForImageTextToText.from_config(config)


def test_checking_changes_nothing_of_a_config_that_is_right(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint, moe_config={"num_experts": 2})
    before, parts = config.to_dict(), [getattr(config, name) for name in config.sub_configs]
    config.check()
    assert config.to_dict() == before
    assert all(getattr(config, name) is part for name, part in zip(config.sub_configs, parts, strict=True))


def test_a_model_with_another_config_than_its_processor_is_not_saved(checkpoint, tmp_path):
    model = load_pretrained_model(checkpoint, device="cpu").model
    model.config.vision_feature_select_strategy = "cls"
    with pytest.raises(ValueError, match="processor makes 16 tokens of a picture, its config 1. Set model.processor"):
        model.save_pretrained(tmp_path / "out")
    model.config.vision_feature_select_strategy = "patches"
    with pytest.raises(ValueError, match="Unknown vision_feature_select_strategy 'patches'"):
        model.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Where this package is not installed
# ---------------------------------------------------------------------------------------------------------------------

ELSEWHERE = """
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

folder, trust = {folder!r}, {{"trust_remote_code": True}}
print(AutoConfig.from_pretrained(folder, image_aspect_ratio="square", **trust).image_aspect_ratio)
model = AutoModelForImageTextToText.from_pretrained(folder, vision_feature_select_strategy="cls", **trust)
processor = AutoProcessor.from_pretrained(folder, num_image_tokens=1, **trust)
model.save_pretrained("out")
processor.save_pretrained("out")
print(AutoConfig.from_pretrained("out", **trust).image_seq_length)

def refused(call):
    try:
        call()
    except ValueError as error:
        print(error)

refused(lambda: AutoModelForImageTextToText.from_pretrained(folder, vision_feature_select_strategy="patches", **trust))
config = AutoConfig.from_pretrained(folder, **trust)
config.vision_feature_select_strategy = "patches"
refused(lambda: AutoModelForImageTextToText.from_config(config, **trust))
refused(lambda: config.save_pretrained("nowhere"))
refused(lambda: AutoConfig.from_pretrained(folder, projector_config={{"type": "linear"}}, **trust))
refused(lambda: AutoModelForImageTextToText.from_pretrained(folder, moe_config={{"num_experts": 2}}, **trust))
"""


def test_elsewhere_too(checkpoint):
    printed = run_python(ELSEWHERE.format(folder=str(checkpoint))).splitlines()
    unknown = "Unknown vision_feature_select_strategy 'patches'"
    assert printed[:2] == ["square", "1"]
    assert all(line.startswith(unknown) for line in printed[2:5])
    # The checkpoint has the code of its own parts alone.
    assert printed[5].startswith("Unknown projector 'linear'") and "Without moellava, " in printed[5]
    assert printed[6].startswith("This checkpoint carries no code for 'sparse'") and len(printed) == 7
