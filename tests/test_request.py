# SPDX-License-Identifier: Apache-2.0
"""What a user writes, and what is made of it: every way to say the same thing, and which word wins."""

import argparse
import dataclasses
from collections import OrderedDict, namedtuple
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

from moellava import load_pretrained_model
from moellava.authoring.load_request import LoadRequest, read_request


FIELDS: dict[str, Any] = {
    "model_name_or_path": "some/model",
    "mm_vision_tower": "some/tower",
    "encoder_type": "clip",
    "image_size": 64,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "projector_type": "qformer",
    "num_query_tokens": 4,
    "qformer_hidden_size": 32,
    "mm_hidden_size": 48,
    "load_4bit": True,
    "dtype": "bfloat16",
    "revision": "main",
    "attn_implementation": "eager",
}

Dataclass = dataclasses.make_dataclass("Dataclass", [(name, Any, value) for name, value in FIELDS.items()])


class Attributes:
    """A plain class whose attributes stand on the class."""


for _name, _value in FIELDS.items():
    setattr(Attributes, _name, _value)


class Slots:
    __slots__ = tuple(FIELDS)

    def __init__(self):
        for name, value in FIELDS.items():
            setattr(self, name, value)


class WithProperty:
    """An object that computes one of its attributes, and has a method."""

    def __init__(self):
        self.__dict__.update({name: value for name, value in FIELDS.items() if name != "image_size"})

    @property
    def image_size(self) -> int:
        return 64

    def describe(self) -> str:
        return "a method is no field"


def request(configuration: Any = None, **keywords) -> LoadRequest:
    return read_request(configuration, keywords)


EXPECTED = request("some/model", **{name: value for name, value in FIELDS.items() if name != "model_name_or_path"})


# ---------------------------------------------------------------------------------------------------------------------
# Every form means the same
# ---------------------------------------------------------------------------------------------------------------------


def test_what_the_keywords_mean():
    assert EXPECTED.model_path == "some/model"
    assert EXPECTED.vision_tower == "some/tower"
    assert EXPECTED.model_fields == {
        "encoder_type": "clip",
        "image_size": 64,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    assert EXPECTED.projector == {"type": "qformer", "num_query_tokens": 4, "qformer_hidden_size": 32}
    assert EXPECTED.claims == {"mm_hidden_size": 48}
    assert EXPECTED.options["load_4bit"] is True and EXPECTED.options["load_8bit"] is False
    assert EXPECTED.options["dtype"] is torch.bfloat16
    assert EXPECTED.hub_options == {"revision": "main"}
    assert EXPECTED.model_options == {"attn_implementation": "eager"}


@pytest.mark.parametrize(
    "configuration",
    [
        FIELDS,
        OrderedDict(FIELDS),
        MappingProxyType(FIELDS),
        Dataclass(),
        Attributes(),
        Slots(),
        WithProperty(),
        SimpleNamespace(**FIELDS),
        argparse.Namespace(**FIELDS),
        namedtuple("Named", FIELDS)(**FIELDS),
    ],
    ids=lambda configuration: type(configuration).__name__,
)
def test_every_form_of_a_configuration_is_the_same_request(configuration):
    assert request(configuration) == EXPECTED


def test_keywords_alone():
    assert request(**FIELDS) == EXPECTED
    assert request(None, **FIELDS) == EXPECTED


def test_a_pydantic_model():
    pydantic = pytest.importorskip("pydantic")
    fields = {name: (Any, value) for name, value in FIELDS.items() if name != "model_name_or_path"}
    model_class = pydantic.create_model("Settings", model_path=(str, "some/model"), **fields)
    assert request(model_class()) == EXPECTED
    projector_class = pydantic.create_model("Projector", type=(str, "linear"), hidden_size=(int, 768))
    # As of a dataclass, a default that the projector has no field for is left out.
    assert request("some/model", projector_config=projector_class()).projector == {"type": "linear"}


def test_parts_in_every_form():
    vision = {"mm_vision_tower": "some/tower", "image_size": 64, "type": "clip", "select_layer": -1}
    vision |= {"select_feature": "cls_patch", "mm_hidden_size": 48}
    projector = {"type": "qformer", "num_query_tokens": 4, "qformer_hidden_size": 32}
    rest = {name: FIELDS[name] for name in ("load_4bit", "dtype", "revision", "attn_implementation")}
    for make in (dict, lambda fields: SimpleNamespace(**fields), lambda fields: argparse.Namespace(**fields)):
        parts = {"custom_vision_config": make(vision), "projector_config": make(projector)}
        assert request("some/model", **parts, **rest) == EXPECTED
        assert request({"model_path": "some/model", **parts, **rest}) == EXPECTED
        assert request(SimpleNamespace(model_path="some/model", **parts), **rest) == EXPECTED


def test_the_forms_make_the_same_model(parts):
    fields = {
        "model_path": str(parts.language_model("llama")), "mm_vision_tower": str(parts.vision_tower("clip")),
        "vision_feature_layer": -1, "projector_type": "qformer", "qformer_hidden_size": 32, "num_query_tokens": 4,
        "device": "cpu",
    }  # fmt: skip
    dataclass = dataclasses.make_dataclass("Settings", [(name, Any, value) for name, value in fields.items()])
    configs = [
        load_pretrained_model(**fields).model.config.to_dict(),
        load_pretrained_model(fields).model.config.to_dict(),
        load_pretrained_model(dataclass()).model.config.to_dict(),
        load_pretrained_model(argparse.Namespace(**fields)).model.config.to_dict(),
        load_pretrained_model(
            fields["model_path"],
            device="cpu",
            custom_vision_config=SimpleNamespace(model_name=fields["mm_vision_tower"], select_layer=-1),
            projector_config={"type": "qformer", "hidden_size": 32, "num_query_tokens": 4},
        ).model.config.to_dict(),
    ]
    assert all(config == configs[0] for config in configs[1:])


@pytest.mark.parametrize("path", ["some/model", Path("some/model")])
def test_paths(path):
    assert request(path).model_path == request(model_path=path).model_path == "some/model"
    assert request("some/model", mm_vision_tower=path).vision_tower == "some/model"
    assert request("some/model", projector_config={"path": path}).projector_path == "some/model"


def test_what_is_given_is_not_changed():
    given = {"model_path": "some/model", "projector_config": {"path": "file.bin", "type": "mlp2x_gelu"}}
    copied = {"model_path": "some/model", "projector_config": dict(given["projector_config"])}
    request(given, vision_feature_layer=-1)
    assert given == copied


# ---------------------------------------------------------------------------------------------------------------------
# Which word wins
# ---------------------------------------------------------------------------------------------------------------------


def test_a_keyword_wins_over_a_configuration():
    made = request({**FIELDS, "load_4bit": False}, image_size=32, mm_vision_tower="other/tower", load_8bit=True)
    assert made.model_fields["image_size"] == 32
    assert made.model_fields["vision_feature_layer"] == -1  # which only the configuration gives
    assert made.vision_tower == "other/tower"
    assert made.options["load_8bit"] is True


def test_a_keyword_wins_over_an_object_beside_it():
    vision, projector = SimpleNamespace(vision_feature_layer=-2, image_size=64), {"type": "mlp", "hidden_size": 768}
    made = request(
        "some/model",
        custom_vision_config=vision,
        projector_config=projector,
        vision_feature_layer=-1,
        mm_projector_hidden_size=40,
        projector_type="mlp",
    )
    assert made.model_fields == {"vision_feature_layer": -1, "image_size": 64}
    assert made.projector == {"type": "mlp", "hidden_size": 40}


def test_an_object_wins_over_the_configurations_own_fields():
    made = request(
        {"model_path": "some/model", "image_size": 32, "vision_feature_layer": -3, "mm_projector_hidden_size": 20},
        custom_vision_config={"image_size": 64},
        projector_config={"hidden_size": 40},
    )
    assert made.model_fields == {"image_size": 64, "vision_feature_layer": -3}
    assert made.projector == {"hidden_size": 40}


def test_another_type_of_projector_drops_the_fields_of_the_first():
    made = request(
        {"model_path": "some/model", "projector_type": "qformer", "num_query_tokens": 4}, projector_type="mlp"
    )
    assert made.projector == {"type": "mlp"}


def test_a_width_meets_its_other_name():
    """`hidden_size` and `qformer_hidden_size` are one field of a Q-Former: the keyword wins, and not both stand."""
    made = request({"model_path": "some/model", "projector_type": "qformer", "qformer_hidden_size": 64}, hidden_size=32)
    assert made.projector == {"type": "qformer", "qformer_hidden_size": 32}
    made = request({"model_path": "some/model", "mm_projector_hidden_size": 64}, projector_type="perceiver")
    assert made.projector == {"type": "perceiver", "latent_dim": 64}


def test_then_the_checkpoints_own_config_then_the_defaults(parts, tmp_path):
    llama, clip = parts.language_model("llama"), parts.vision_tower("clip")
    first = load_pretrained_model(
        llama, mm_vision_tower=clip, vision_feature_layer=-3, projector_type="linear", device="cpu"
    )
    first.model.save_pretrained(tmp_path / "model")
    assert first.model.config.vision_feature_select_strategy == "default"  # a default

    own = load_pretrained_model(tmp_path / "model", device="cpu").model.config
    assert (own.vision_feature_layer, own.projector_config.type) == (-3, "linear")

    configuration = {"model_path": tmp_path / "model", "vision_feature_layer": -2, "image_size": 48}
    by_dictionary = load_pretrained_model(configuration, device="cpu").model.config
    assert (by_dictionary.vision_feature_layer, by_dictionary.image_size) == (-2, 48)
    assert by_dictionary.projector_config.type == "linear"

    by_keyword = load_pretrained_model(configuration, vision_feature_layer=-1, device="cpu").model.config
    assert (by_keyword.vision_feature_layer, by_keyword.image_size) == (-1, 48)


def test_none_means_not_given():
    assert request("some/model", **dict.fromkeys(FIELDS.keys() - {"model_name_or_path"})) == request("some/model")
    assert request({**FIELDS, "image_aspect_ratio": None}, image_size=None, projector_type=None, dtype=None) == EXPECTED
    assert request("some/model", custom_vision_config=None, projector_config=None) == request("some/model")
    made = request({"model_path": "some/model", "image_size": 64}, custom_vision_config={"image_size": None})
    assert made.model_fields == {"image_size": 64}
    assert request("some/model", projector_config={"type": None, "hidden_size": 40}).projector == {"hidden_size": 40}


# ---------------------------------------------------------------------------------------------------------------------
# Older names
# ---------------------------------------------------------------------------------------------------------------------

SAME = [
    ({"model_name_or_path": "other/model"}, {"model_path": "other/model"}),
    ({"vision_tower": "a"}, {"mm_vision_tower": "a"}),
    ({"mm_image_tower": "a"}, {"mm_vision_tower": "a"}),
    ({"mm_vision_image_size": 64}, {"image_size": 64}),
    ({"mm_vision_select_layer": -1}, {"vision_feature_layer": -1}),
    ({"mm_vision_select_feature": "patch"}, {"vision_feature_select_strategy": "patch"}),
    ({"mm_vision_select_feature": "cls_patch"}, {"vision_feature_select_strategy": "full"}),
    ({"encoder_type": "sigclip"}, {"encoder_type": "siglip"}),
    ({"encoder_type": "medclip"}, {"encoder_type": "biomedclip"}),
    ({"vision_feature_layer": (-2, -5)}, {"vision_feature_layer": [-2, -5]}),
    ({"mm_projector_type": "linear"}, {"projector_type": "linear"}),
    ({"image_projector_type": "linear"}, {"projector_type": "linear"}),
    ({"projector_type": "mlp2x_gelu"}, {"projector_type": "mlp", "num_hidden_layers": 2}),
    ({"mm_projector_type": "mlp3x_gelu"}, {"projector_type": "mlp", "num_hidden_layers": 3}),
    ({"hidden_size": 40}, {"mm_projector_hidden_size": 40}),
    ({"mm_projector_num_layers": 3}, {"num_hidden_layers": 3}),
    (
        {"projector_type": "qformer", "mm_qformer_num_query_tokens": 4, "mm_qformer_num_hidden_layers": 1},
        {"projector_type": "qformer", "num_query_tokens": 4, "num_hidden_layers": 1},
    ),
    (
        {"projector_type": "qformer", "mm_projector_hidden_size": 32},
        {"projector_type": "qformer", "qformer_hidden_size": 32},
    ),
    (
        {"projector_type": "perceiver", "mm_perceiver_num_latents": 4, "mm_perceiver_num_layers": 1, "hidden_size": 32},
        {"projector_type": "perceiver", "num_latents": 4, "num_hidden_layers": 1, "latent_dim": 32},
    ),
    ({"torch_dtype": "float16"}, {"dtype": torch.float16}),
    ({"precision": "bf16"}, {"dtype": "bfloat16"}),
    ({"precision": "fp16"}, {"dtype": "torch.float16"}),
    ({"dtype": "fp32"}, {"dtype": "float32"}),
    ({"dtype": "auto"}, {}),
    ({"load_in_4bit": True}, {"load_4bit": True}),
    ({"load_in_8bit": True}, {"load_8bit": True}),
    ({"vision_config": {"image_size": 64}}, {"custom_vision_config": {"image_size": 64}}),
    ({"image_encoder": {"select_layer": -1}}, {"vision_feature_layer": -1}),
    ({"projector": {"type": "linear"}}, {"projector_type": "linear"}),
    ({"custom_vision_config": {"model_name": "a"}}, {"mm_vision_tower": "a"}),
    ({"custom_vision_config": {"model_name_or_path": "a"}}, {"mm_vision_tower": "a"}),
    ({"custom_vision_config": {"type": "sigclip"}}, {"encoder_type": "siglip"}),
    ({"custom_vision_config": {"select_feature": "cls"}}, {"vision_feature_select_strategy": "cls"}),
    ({"custom_vision_config": {"use_encoder_framework": True}}, {}),
    ({"projector_config": {"projector_type": "linear"}}, {"projector_type": "linear"}),
    ({"projector_config": {"image_projector_type": "mlp2x_gelu"}}, {"projector_type": "mlp2x_gelu"}),
    ({"projector_config": {"num_layers": 3}}, {"num_hidden_layers": 3}),
    ({"projector_config": {"mm_projector_hidden_size": 40}}, {"hidden_size": 40}),
    (
        {"projector_config": {"type": "qformer", "mm_qformer_num_query_tokens": 4}},
        {"projector_type": "qformer", "num_query_tokens": 4},
    ),
    ({"projector_config": {"type": "mlp", "mm_hidden_size": 48}}, {"projector_type": "mlp", "mm_hidden_size": 48}),
    ({"video_encoder": None}, {}),
]


@pytest.mark.parametrize("older, today", SAME, ids=lambda fields: "-".join(fields) or "nothing")
def test_older_names(older, today):
    path = {} if "model_name_or_path" in older else {"model_path": "some/model"}
    expected, made = request(**path, **today), request(**path, **older)
    made.claims.pop("use_encoder_framework", None)
    assert made == expected
    made = request({**path, **older})
    made.claims.pop("use_encoder_framework", None)
    assert made == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"model_path": "a", "model_name_or_path": "b"},
        {"model_path": "a", "mm_vision_tower": "b", "mm_image_tower": "c"},
        {"model_path": "a", "vision_feature_layer": -1, "mm_vision_select_layer": -2},
        {"model_path": "a", "vision_feature_select_strategy": "full", "mm_vision_select_feature": "patch"},
        {"model_path": "a", "projector_type": "mlp", "mm_projector_type": "linear"},
        {"model_path": "a", "hidden_size": 1, "mm_projector_hidden_size": 2},
        {"model_path": "a", "projector_type": "qformer", "hidden_size": 1, "qformer_hidden_size": 2},
        {"model_path": "a", "projector_type": "mlp2x_gelu", "num_hidden_layers": 3},
        {"model_path": "a", "dtype": "float16", "torch_dtype": "bfloat16"},
        {"model_path": "a", "load_4bit": True, "load_in_4bit": False},
        {"model_path": "a", "vision_config": {"image_size": 1}, "custom_vision_config": {"image_size": 2}},
        {"model_path": "a", "custom_vision_config": {"type": "clip", "encoder_type": "siglip"}},
        {"model_path": "a", "projector_config": {"type": "mlp", "projector_type": "linear"}},
        {"model_path": "a", "projector_config": {"num_layers": 2, "num_hidden_layers": 3}},
    ],
    ids=lambda fields: "-".join(list(fields)[1:] or fields),
)
def test_two_names_of_one_field_that_differ(fields):
    """Both values are named, and what to do."""
    with pytest.raises(ValueError, match="Give one") as caught:
        request(fields)
    values = [value for name, value in fields.items() if name != "model_path"]
    for value in values[0].values() if isinstance(values[0], dict) and len(values) == 1 else values:
        assert repr(value) in str(caught.value) or str(value) in str(caught.value)
    if "model_name_or_path" not in fields:
        path = fields.pop("model_path")
        with pytest.raises(ValueError, match="Give one"):
            request(path, **fields)


def test_two_names_of_one_field_that_agree():
    assert request("a", vision_feature_layer=-1, mm_vision_select_layer=-1) == request("a", vision_feature_layer=-1)
    assert request("a", projector_type="mlp2x_gelu", num_hidden_layers=2) == request("a", projector_type="mlp2x_gelu")


# ---------------------------------------------------------------------------------------------------------------------
# Unknown fields
# ---------------------------------------------------------------------------------------------------------------------

MISSPELT = [
    ("mm_vision_towr", "mm_vision_tower"),
    ("vision_feature_layers", "vision_feature_layer"),
    ("vision_select_strategy", "vision_feature_select_strategy"),
    ("projecter_type", "projector_type"),
    ("encodertype", "encoder_type"),
    ("load_4_bit", "load_4bit"),
    ("custom_vision_cfg", "custom_vision_config"),
    ("trust_remote", "trust_remote_code"),
    ("attn_implementaton", "attn_implementation"),
    ("Device", "device"),
]


@pytest.mark.parametrize("name, nearest", MISSPELT)
def test_an_unknown_field_is_answered_with_the_nearest_known(name, nearest):
    with pytest.raises(ValueError, match=f"Unknown field '{name}' in the arguments; did you mean '{nearest}'"):
        request("some/model", **{name: "x"})
    for configuration in (
        {"model_path": "some/model", name: "x"},
        SimpleNamespace(model_path="some/model", **{name: 1}),
    ):
        with pytest.raises(ValueError, match=f"Unknown field '{name}' in the configuration; did you mean '{nearest}'"):
            request(configuration)


def test_an_unknown_field_is_an_error_even_without_a_value():
    with pytest.raises(ValueError, match="did you mean 'image_size'"):
        request("some/model", image_sizes=None)


def test_an_unknown_field_that_is_near_to_none_lists_them_all():
    with pytest.raises(ValueError, match=r"Unknown field 'zzz' in the arguments\. Known: .*encoder_type, .*image_size"):
        request("some/model", zzz=1)


@pytest.mark.parametrize("make", [dict, lambda fields: SimpleNamespace(**fields)])
def test_an_unknown_field_of_a_part(make):
    message = "Unknown field 'select_layers' in custom_vision_config; did you mean 'select_layer'"
    with pytest.raises(ValueError, match=message):
        request("some/model", custom_vision_config=make({"select_layers": -1}))
    with pytest.raises(ValueError, match="The projector 'mlp' has no field 'hiden_size'; did you mean 'hidden_size'"):
        request("some/model", projector_config=make({"type": "mlp", "hiden_size": 40}))
    with pytest.raises(ValueError, match="The projector 'mlp' has no field 'num_latents'"):
        request("some/model", projector_type="mlp", num_latents=4)
    # Without a type, which may come from the checkpoint, its fields are not known yet.
    assert request("some/model", projector_config=make({"hiden_size": 40})).projector == {"hiden_size": 40}


def test_a_class_default_that_the_projector_has_no_field_for_is_left_out_and_said(caplog):
    @dataclasses.dataclass
    class ProjectorConfig:
        type: str = "mlp"
        hidden_size: int = 768
        num_hidden_layers: int = 2

    with caplog.at_level("INFO", logger="moellava"):
        assert request("a", projector_config=ProjectorConfig(type="linear")).projector == {"type": "linear"}
    assert "has no field 'hidden_size'" in caplog.text
    assert request("a", projector_config=ProjectorConfig(type="identity")).projector == {"type": "identity"}
    made = request("a", projector_config=ProjectorConfig(type="qformer", hidden_size=32)).projector
    assert made == {"type": "qformer", "qformer_hidden_size": 32, "num_hidden_layers": 2}
    # A type that says the number of layers wins over a default of the class that says another.
    made = request("a", projector_config=ProjectorConfig(type="mlp3x_gelu")).projector
    assert made == {"type": "mlp", "num_hidden_layers": 3, "hidden_size": 768}


# ---------------------------------------------------------------------------------------------------------------------
# Wrong types
# ---------------------------------------------------------------------------------------------------------------------


class Empty:
    pass


WRONG = [
    (["some/model"], "of type list"),
    (("some/model",), "of type tuple"),
    (3, "of type int"),
    (True, "of type bool"),
    (b"some/model", "of type bytes"),
    ({"some/model"}, "of type set"),
    (print, "of type builtin_function_or_method"),
    (Empty(), "of type Empty"),
    (Dataclass, r"the class Dataclass; expected an instance of it: Dataclass\(\)"),
    (dict, r"the class dict; expected an instance"),
]


@pytest.mark.parametrize("wrong, found", WRONG, ids=[found for _, found in WRONG])
def test_a_configuration_of_a_wrong_type(wrong, found):
    with pytest.raises(TypeError, match=f"The configuration is .*{found}") as caught:
        load_pretrained_model(wrong)
    assert "expected" in str(caught.value)
    for name in ("custom_vision_config", "projector_config"):
        with pytest.raises(TypeError, match=f"{name} is .*{found}"):
            load_pretrained_model("some/model", **{name: wrong})


@pytest.mark.parametrize("name", ["custom_vision_config", "projector_config"])
def test_a_string_is_no_part(name):
    with pytest.raises(TypeError, match=f"{name} is 'mlp' of type str; expected a dictionary, a dataclass instance"):
        load_pretrained_model("some/model", **{name: "mlp"})


@pytest.mark.parametrize("fields", [
    {"model_path": 3},
    {"model_path": "a", "mm_vision_tower": 3},
    {"model_path": "a", "model_base": ["b"]},
    {"model_path": "a", "projector_config": {"path": 3}},
])  # fmt: skip
def test_a_path_of_a_wrong_type(fields):
    with pytest.raises(TypeError, match="is no path: expected a folder, a file or a Hub id"):
        request(fields)


@pytest.mark.parametrize("name", ["load_4bit", "load_8bit", "encoder_debug", "projector_debug", "merge"])
def test_a_switch_that_is_neither_true_nor_false(name):
    with pytest.raises(TypeError, match=f"{name} is 'yes'; expected True or False"):
        request("some/model", **{name: "yes"})


@pytest.mark.parametrize("dtype", ["brain", "int8", torch.int64, 16])
def test_a_dtype_that_is_none(dtype):
    with pytest.raises(ValueError, match="expected a floating-point dtype of PyTorch or its name"):
        request("some/model", dtype=dtype)


@pytest.mark.parametrize("given", [None, {}, {"model_path": None}, {"model_path": ""}, SimpleNamespace(device="cpu")])
def test_nothing_to_load(given):
    with pytest.raises(ValueError, match=r"No model to load: give model_path \(or model_name_or_path\)"):
        load_pretrained_model(given)


@pytest.mark.parametrize("strategy", ["pach", "CLS", 3, ["patch"], {"patch": 1}])
def test_an_unknown_strategy(strategy):
    with pytest.raises(ValueError, match="Unknown vision_feature_select_strategy .*Known: cls, default, full, patch"):
        request("some/model", vision_feature_select_strategy=strategy)


def test_videos_are_not_supported():
    with pytest.raises(ValueError, match="video_encoder is given in the configuration, but videos are not supported"):
        request({"model_path": "a", "video_encoder": {"type": "languagebind"}})


@pytest.mark.parametrize("quantise", ["load_4bit", "load_8bit"])
def test_quantisation_is_said_once(quantise):
    with pytest.raises(ValueError, match="quantization_config says how to quantise already"):
        request("some/model", quantization_config={"load_in_4bit": True}, **{quantise: True})
