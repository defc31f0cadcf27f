# SPDX-License-Identifier: Apache-2.0
"""Properties, by hypothesis: of every config, every spelling of one, every prompt and every picture.

The examples are the same at every run. `HYPOTHESIS_PROFILE=thorough` tries twenty times as many
(`make test-thorough`).
"""

import copy
import dataclasses
import os
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from parts import picture
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from moellava import MoellavaConfig, MoellavaForCausalLM, MoellavaProcessor
from moellava.authoring.load_request import read_request
from moellava.authoring.older_names import FIELD_NAMES, MOE_FIELD_NAMES
from moellava.checks.pictures import to_rgb


THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
# What our errors are, to a caller.
OUR_ERRORS = (OSError, TypeError, ValueError)


def examples(number: int) -> settings:
    """So many examples, the same ones at every run, however long one takes."""
    return settings(
        max_examples=number * (20 if THOROUGH else 1),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------

VOCABULARY = 40
TOWERS = ("clip_vision_model", "dinov2", "siglip_vision_model", "vit")
TEXT = {
    "llama": {},
    "qwen2": {},
    "phi": {},
    "gemma2": {"head_dim": 8},
    "gpt_neox": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "mixtral": {"num_local_experts": 2},
}
WORDS = ("first_half", "second_half", "sparse", "dense")


def text_configs() -> st.SearchStrategy[dict]:
    common = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 256}
    common |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return st.builds(
        lambda family, layers, tied: {
            "model_type": family, **common, **({} if family == "opt" else {"intermediate_size": 32}),
            **({} if family in ("opt", "phi", "gpt_neox") else {"num_key_value_heads": 1}),
            "num_hidden_layers": layers, "tie_word_embeddings": tied, **TEXT[family],
        },
        st.sampled_from(list(TEXT)), st.integers(1, 3), st.booleans(),
    )  # fmt: skip


def vision_configs() -> st.SearchStrategy[dict]:
    return (
        st.fixed_dictionaries(
            {
                "model_type": st.sampled_from(TOWERS),
                "hidden_size": st.sampled_from([16, 24]),
                "num_hidden_layers": st.integers(1, 3),
                "image_size": st.sampled_from([8, 16]),
                "patch_size": st.sampled_from([4, 8]),
            }
        )
        .map(lambda fields: {**fields, "num_attention_heads": 2, "intermediate_size": 32, "mlp_ratio": 2})
        .map(
            lambda fields: {
                k: v
                for k, v in fields.items()
                if k != ("intermediate_size" if fields["model_type"] == "dinov2" else "mlp_ratio")
            }
        )
    )


def projector_configs() -> st.SearchStrategy[dict]:
    small, widths = st.integers(1, 3), st.sampled_from([8, 16])
    layers = {"num_hidden_layers": small}
    return st.one_of(
        st.fixed_dictionaries({"type": st.just("linear")}, optional={"bias": st.booleans()}),
        st.fixed_dictionaries(
            {"type": st.just("mlp"), "num_hidden_layers": st.integers(2, 3)}, optional={"hidden_size": small}
        ),
        st.fixed_dictionaries(
            {"type": st.just("qformer"), "num_query_tokens": small, "qformer_hidden_size": widths, **layers}
        ),
        st.fixed_dictionaries({"type": st.just("perceiver"), "num_latents": small, "latent_dim": widths, **layers}),
        st.sampled_from(["mlp1x_gelu", "mlp3x_gelu", "identity", "pool_mlp2x_gelu"]).map(lambda kind: {"type": kind}),
        st.builds("cheap_qformer{}_{}".format, small, small).map(lambda kind: {"type": kind}),
    )


def moe_configs() -> st.SearchStrategy[dict | None]:
    factors = st.sampled_from([None, 0.5, 1, 1.5])
    return st.none() | st.fixed_dictionaries(
        {"num_experts": st.integers(1, 4), "num_experts_per_tok": st.integers(1, 4)},
        optional={
            "layers": st.sampled_from(WORDS) | st.lists(st.integers(-4, 3), max_size=3),
            "norm_topk_prob": st.booleans(),
            "router_bias": st.booleans(),
            "capacity_factor": factors,
            "eval_capacity_factor": factors,
            "min_capacity": st.integers(0, 3),
            "use_residual": st.booleans(),
            "use_meta_expert": st.booleans(),
            "output_router_logits": st.booleans(),
        },
    )


def configs() -> st.SearchStrategy[dict]:
    """Fields of a config, which fit together more often than not."""
    layers = st.integers(-4, 3)
    return st.fixed_dictionaries(
        {"text_config": text_configs(), "vision_config": vision_configs(), "projector_config": projector_configs()},
        optional={
            "moe_config": moe_configs(),
            "vision_feature_layer": layers | st.lists(layers, max_size=3),
            "vision_feature_select_strategy": st.sampled_from(["default", "patch", "cls", "full", "cls_patch"]),
            "image_size": st.sampled_from([8, 16, 24]),
            "drop_first_patch": st.booleans(),
        },
    ).map(lambda fields: {**fields, "image_token_id": VOCABULARY - 1})


JUNK = st.sampled_from([-1, 0, 1.5, 7, 33, "x", "", True, None, [], [0], [-9], {}, {"a": 1}, float("nan"), b"x"])


# How long a prompt can be is for the language model to say, and Mixtral's products need rows of a multiple of 16 bytes:
# transformers tells of both when the model is run.
FAMILYS_OWN = {"any": ("max_position_embeddings",)}
FAMILYS_OWN["mixtral"] = (*FAMILYS_OWN["any"], "hidden_size", "intermediate_size")


@st.composite
def broken_configs(draw) -> dict:
    """Fields of a config of which one to three hold something else, or that has a field which there is not."""
    fields = copy.deepcopy(draw(configs()))
    for _ in range(draw(st.integers(1, 3))):
        holder = fields
        part = draw(st.sampled_from(["", "text_config", "vision_config", "projector_config", "moe_config"]))
        if isinstance(fields.get(part), dict):
            holder = fields[part]
        own = [
            name for name in holder if name not in FAMILYS_OWN.get(str(holder.get("model_type")), FAMILYS_OWN["any"])
        ]
        names = [*own, "no_such_field", "image_token_id", "vision_feature_layer", "image_size", "encoder_type"]
        holder[draw(st.sampled_from(names))] = draw(JUNK)
    return fields


def build(fields: dict) -> MoellavaForCausalLM | None:
    """The model of a config; `None` where there is an error of ours, which says something."""
    try:
        config = MoellavaConfig(**copy.deepcopy(fields))
        if config.text_config.hidden_size > 64 or getattr(config.vision_config, "hidden_size", 0) > 64:
            with torch.device("meta"):  # what is left out has the size of a published model
                MoellavaForCausalLM(config)
            return None
        torch.manual_seed(0)
        return MoellavaForCausalLM(config).eval()
    except OUR_ERRORS as error:
        assert len(str(error)) > 20, repr(error)
        event("an error")
        return None


def answer_of(model: MoellavaForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and tokens for a row with a picture and one of text."""
    config = model.config
    side = config.image_size or config.vision_config.image_size
    pad, *words = [token for token in range(6) if token != config.image_token_id][:4]
    placeholders = [config.image_token_id] * config.image_seq_length
    rows = torch.tensor([[words[0], *placeholders, words[1]], [*[pad] * (len(placeholders) - 1), *words]])
    mask = torch.ones_like(rows)
    mask[1, : len(placeholders) - 1] = 0
    pixels = torch.linspace(-1, 1, 3 * side * side).reshape(1, 3, side, side)
    inputs = {"input_ids": rows, "attention_mask": mask, "pixel_values": pixels}
    with torch.no_grad():
        return model(**inputs).logits, model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)


def described(fields: dict) -> dict:
    """What a config says of the model, without what saving and loading note in it."""
    noted = ("_name_or_path", "architectures", "dtype", "transformers_version")
    return {
        name: described(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name not in noted
    }


@examples(25)
@given(fields=configs())
def test_a_config_that_validates_makes_a_model(tmp_path_factory, fields):
    """It saves, loads, is equal and answers."""
    model = build(fields)
    assume(model is not None)
    event(f"tower {fields['vision_config']['model_type']}")
    event(f"language model {fields['text_config']['model_type']}")
    event("dense" if model.config.moe_config is None else "sparse")
    logits, tokens = answer_of(model)
    assert torch.isfinite(logits).all()
    assert tokens.shape[1] == logits.shape[1] + 2
    folder = tmp_path_factory.mktemp("property")
    model.save_pretrained(folder)
    again = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(again) is MoellavaForCausalLM
    assert described(again.config.to_dict()) == described(model.config.to_dict())
    weights = again.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    logits_again, tokens_again = answer_of(again)
    torch.testing.assert_close(logits_again, logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(tokens_again, tokens)


@examples(150)
@given(fields=broken_configs())
def test_a_config_that_does_not_validate_gives_our_error(fields):
    """And what validates all the same, answers."""
    model = build(fields)
    if model is not None:
        event("a model")
        assert answer_of(model)[1].shape[0] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

# Canonical field to values; what it can be called is in the tables.
VALUES = {
    ("model", "image_size"): st.integers(1, 500),
    ("model", "vision_feature_layer"): st.integers(-9, 9) | st.lists(st.integers(-9, 9), min_size=1, max_size=3),
    ("model", "vision_feature_select_strategy"): st.sampled_from(["default", "patch", "cls", "full"]),
    ("model", "image_aspect_ratio"): st.sampled_from(["pad", "square"]),
    ("source", "vision_tower"): st.text("abc/", min_size=1, max_size=5),
    ("source", "model_path"): st.text("abc/", min_size=1, max_size=5),
}
QFORMER = {
    "num_query_tokens": st.integers(1, 99),
    "num_hidden_layers": st.integers(1, 9),
    "qformer_hidden_size": st.integers(1, 99),
}
MOE = {
    "num_experts": st.integers(1, 9), "num_experts_per_tok": st.integers(1, 9), "layers": st.sampled_from(WORDS),
    "capacity_factor": st.floats(0.1, 9), "min_capacity": st.integers(0, 9), "use_residual": st.booleans(),
}  # fmt: skip


def written_as(draw, canonical: str, table: dict[str, Any], place: Any) -> str:
    """One of the names that a field has."""
    return draw(st.sampled_from(sorted(name for name, meant in table.items() if meant == place)), label=canonical)


@st.composite
def spellings(draw) -> tuple[dict, dict, dict]:
    """Flat fields under any of their names, those of the sparse layers too, and what they mean."""
    flat, meant = {}, {}
    for place, values in VALUES.items():
        if place[1] == "model_path" or draw(st.booleans()):
            meant[place[1]] = draw(values)
            flat[written_as(draw, place[1], FIELD_NAMES, place)] = meant[place[1]]
    flat[written_as(draw, "type", FIELD_NAMES, ("projector", "type"))] = "qformer"
    meant["projector"] = {"type": "qformer"}
    for name, values in QFORMER.items():
        if draw(st.booleans()):
            meant["projector"][name] = draw(values)
            flat[written_as(draw, name, FIELD_NAMES, ("projector", name))] = meant["projector"][name]
    moe, meant["moe"] = {}, {}
    for name, values in MOE.items():
        if draw(st.booleans()):
            meant["moe"][name] = draw(values)
            moe[written_as(draw, name, MOE_FIELD_NAMES, name)] = meant["moe"][name]
    return flat, moe, meant


@examples(100)
@given(spelling=spellings())
def test_every_spelling_means_the_same(spelling):
    """A dictionary, a dataclass, an object with attributes or keywords, under any name that a field has had."""
    flat, moe, meant = spelling
    everything = {**flat, **({"moe_config": moe} if moe else {})}
    as_dataclass = dataclasses.make_dataclass("Given", [(name, Any, None) for name in everything])(**everything)
    moe_as_object = {**flat, **({"moe_config": types.SimpleNamespace(**moe)} if moe else {})}
    requests = [
        read_request(everything, {}),
        read_request(as_dataclass, {}),
        read_request(types.SimpleNamespace(**everything), {}),
        read_request(None, everything),
        read_request(moe_as_object, {}),
        read_request(everything, everything),
    ]
    request = requests[0]
    assert all(other == request for other in requests)
    found = {"model_path": request.model_path, "vision_tower": request.vision_tower, **request.model_fields}
    found |= {"projector": request.projector, "moe": request.moe or {}}
    assert {name: value for name, value in found.items() if value is not None} == meant


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and pictures
# ---------------------------------------------------------------------------------------------------------------------

TOKENS = 3  # of a picture


@pytest.fixture(scope="module")
def processor(parts) -> MoellavaProcessor:
    tokenizer = AutoTokenizer.from_pretrained(parts.language_model("llama"))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    image_processor = AutoImageProcessor.from_pretrained(parts.vision_tower("clip"))
    return MoellavaProcessor(image_processor, tokenizer, num_image_tokens=TOKENS)


WORDS_AND_PLACES = st.lists(
    st.sampled_from(["<image>", "<image>", " a lake", "\n", " ", "red?", "é", "<imag", ""]), max_size=7
)


@examples(60)
@given(
    rows=st.lists(WORDS_AND_PLACES.map("".join), min_size=1, max_size=3),
    spare=st.lists(st.integers(-1, 1), min_size=3, max_size=3),
    nested=st.booleans(),
    max_length=st.none() | st.integers(1, 20),
)
def test_prompts_with_any_number_and_place_of_pictures(processor, rows, spare, nested, max_length):
    wanted = [row.count("<image>") for row in rows]
    counts = [max(0, number + more * (more == spare[0])) for number, more in zip(wanted, spare, strict=False)]
    pictures = [[picture(10 * row + index, (6 + index, 5)) for index in range(n)] for row, n in enumerate(counts)]
    flat = [one for row in pictures for one in row]
    images = (pictures if nested else flat) if flat or sum(wanted) else None
    arguments = {"images": images, "text": rows, "padding": True, "return_tensors": "pt"}
    arguments |= {} if max_length is None else {"truncation": True, "max_length": max_length}
    fits = counts == wanted if nested and images else len(flat) == sum(wanted)
    try:
        output = processor(**arguments, return_mm_token_type_ids=True)
    except ValueError as error:
        assert not fits or max_length is not None, error
        assert len(str(error)) > 20
        event("refused")
        return
    assert fits
    event("prepared")
    is_picture = output["input_ids"] == processor.image_token_id
    assert torch.equal(is_picture.long(), output["mm_token_type_ids"])
    assert not (is_picture & (output["attention_mask"] == 0)).any()
    found = is_picture.sum(1).tolist()
    if max_length is None:
        assert found == [TOKENS * number for number in wanted]
        for row, ids in zip(rows, output["input_ids"].tolist(), strict=True):
            assert [ids.count(processor.image_token_id) // TOKENS] == [row.count("<image>")]
    else:
        assert output["input_ids"].shape[1] <= max_length
        assert found == [TOKENS * number for number in wanted]
    if flat:
        each = [processor(images=one, return_tensors="pt")["pixel_values"] for one in flat]
        assert torch.equal(output["pixel_values"], torch.cat(each))
    else:
        assert "pixel_values" not in output


MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I;16",
    "I",
    "F",
)
SIDES = st.integers(1, 40) | st.sampled_from([1, 2, 3, 500, 2000])


def by_hand(image: Image.Image) -> np.ndarray:
    """The picture in 8-bit RGB over white, computed in floats."""
    values = np.asarray(image).astype(np.float64)
    if image.mode in ("I;16", "I"):
        grey = np.floor((values * 255 + 32767) / 65535)
    elif image.mode == "F":
        grey = np.rint(values * 255)
    else:
        rgba = np.asarray(image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")).astype(
            np.float64
        )
        alpha = rgba[:, :, 3:] / 255
        return rgba[:, :, :3] * alpha + 255 * (1 - alpha)
    return np.repeat(grey[:, :, None], 3, axis=2)


@st.composite
def any_pictures(draw) -> Image.Image:
    size = (draw(SIDES), draw(SIDES))
    assume(size[0] * size[1] <= 200_000)
    mode = draw(st.sampled_from(MODES))
    values = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    rgba = Image.fromarray(values)
    if mode == "I;16":
        return Image.fromarray(values[:, :, 0].astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(values[:, :, 0].astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(values[:, :, 0].astype(np.float32) / 255)
    if mode in ("La", "PA"):
        return rgba.convert("LA").convert(mode)
    if mode == "LAB":
        return Image.frombytes("LAB", size, values[:, :, :3].tobytes())
    if mode in ("RGBa", "LA"):
        return rgba.convert(mode)
    image = rgba.convert("RGB").convert(mode) if mode != "RGBA" else rgba
    if mode == "P" and draw(st.booleans()):
        image.info["transparency"] = draw(st.integers(0, 255))
    return image


@examples(120)
@given(image=any_pictures(), orientation=st.integers(0, 9))
def test_a_picture_of_any_mode_and_size(processor, image, orientation):
    """It is what it is when it is converted by hand; or there is an error of ours."""
    event(f"mode {image.mode}")
    if orientation and image.mode not in ("La", "PA"):
        image.getexif()[274] = orientation
    turned = ImageOps.exif_transpose(image)
    try:
        rgb = to_rgb(image)
    except OUR_ERRORS as error:
        assert len(str(error)) > 20
        event(f"refused in mode {image.mode}")
        assert image.mode in ("LAB", "La", "PA", "HSV")
        return
    assert rgb.mode == "RGB" and rgb.size == turned.size
    if image.mode != "LAB":
        assert np.abs(np.asarray(rgb).astype(np.float64) - by_hand(turned)).max() <= 2
    if max(image.size) > 200 * min(image.size):
        with pytest.raises(ValueError, match="more than 200 times as long as wide"):
            processor(images=image, return_tensors="pt")
        return
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    assert torch.equal(pixels, processor(images=rgb, return_tensors="pt")["pixel_values"])


@examples(120)
@given(
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 9]), min_size=1, max_size=4).map(tuple),
    kind=st.sampled_from(["uint8", "uint16", "bool", "float16", "float32", "float64", "int64", "int8", "complex64"]),
    as_tensor=st.booleans(),
    seed=st.integers(0, 9),
)
def test_an_array_of_any_shape_and_type(processor, shape, kind, as_tensor, seed):
    """It is the picture of the same values; or there is an error of ours."""
    values = np.random.default_rng(seed).integers(0, 256, shape)
    scale = {"uint8": 1, "uint16": 257, "bool": 1 / 128, "int64": 1, "int8": 1 / 2}.get(kind, 1 / 255)
    array = (values * scale).astype(kind)
    given_array = torch.from_numpy(array) if as_tensor else array
    try:
        pixels = processor(images=given_array, return_tensors="pt")["pixel_values"]
    except OUR_ERRORS as error:
        assert len(str(error)) > 20
        event("refused")
        return
    event(f"{len(shape)} axes of {kind}")
    assert kind not in ("int64", "int8", "complex64")
    eight_bits = values.astype(np.uint8) if kind != "bool" else array.astype(np.uint8) * 255
    expected = processor(images=eight_bits, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0.02)
