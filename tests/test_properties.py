# Copyright 2026 The MoELLaVA authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
from moellava.configuration.names_moellava import FIELD_NAMES, MOE_FIELD_NAMES
from moellava.processing.images_moellava import to_rgb
from moellava.request import read_request


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
    small = st.integers(1, 3)
    return st.one_of(
        st.fixed_dictionaries({"type": st.just("linear")}, optional={"bias": st.booleans()}),
        st.fixed_dictionaries({"type": st.just("mlp"), "num_hidden_layers": st.integers(2, 3)}, optional={"hidden_size": small}),
        st.sampled_from([{"type": "mlp1x_gelu"}, {"type": "mlp3x_gelu"}, {"type": "identity"}, {"type": "pool_mlp2x_gelu"}]),
        st.fixed_dictionaries(
            {"type": st.just("qformer"), "num_query_tokens": small, "qformer_hidden_size": st.sampled_from([8, 16]), "num_hidden_layers": small}
        ),
        st.fixed_dictionaries(
            {"type": st.just("perceiver"), "num_latents": small, "latent_dim": st.sampled_from([8, 16]), "num_hidden_layers": small}
        ),
        st.builds("cheap_qformer{}_{}".format, small, small).map(lambda kind: {"type": kind}),
    )  # fmt: skip


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


JUNK = st.sampled_from([-1, 0, 1.5, 7, 1000, "x", "", True, None, [], [0], [-9], {}, {"a": 1}, float("nan"), b"x"])


@st.composite
def broken_configs(draw) -> dict:
    """Fields of a config of which one to three hold something else, or that has a field which there is not."""
    fields = copy.deepcopy(draw(configs()))
    for _ in range(draw(st.integers(1, 3))):
        holder = fields
        part = draw(st.sampled_from(["", "text_config", "vision_config", "projector_config", "moe_config"]))
        if isinstance(fields.get(part), dict):
            holder = fields[part]
        names = [*holder, "no_such_field", "image_token_id", "vision_feature_layer", "image_size", "encoder_type"]
        holder[draw(st.sampled_from(names))] = draw(JUNK)
    return fields


def build(fields: dict) -> MoellavaForCausalLM | None:
    """The model of a config; `None` where there is an error of ours, which says something."""
    try:
        torch.manual_seed(0)
        return MoellavaForCausalLM(MoellavaConfig(**copy.deepcopy(fields))).eval()
    except OUR_ERRORS as error:
        assert len(str(error)) > 20, repr(error)
        event("an error")
        return None


def answer_of(model: MoellavaForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and tokens for a row with a picture and one of text."""
    config = model.config
    side = config.image_size or config.vision_config.image_size
    placeholders = [config.image_token_id] * config.image_seq_length
    rows = torch.tensor([[3, *placeholders, 5], [*[0] * (len(placeholders) - 1), 3, 4, 5]])
    mask = torch.ones_like(rows)
    mask[1, : len(placeholders) - 1] = 0
    pixels = torch.linspace(-1, 1, 3 * side * side).reshape(1, 3, side, side)
    inputs = {"input_ids": rows, "attention_mask": mask, "pixel_values": pixels}
    with torch.no_grad():
        return model(**inputs).logits, model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)


@examples(25)
@given(fields=configs())
def test_a_config_that_validates_makes_a_model(tmp_path_factory, fields):
    """It saves, loads, is equal and answers."""
    model = build(fields)
    assume(model is not None)
    event(f"tower {fields['vision_config']['model_type']}")
    event(
        f"language model {fields['text_config']['model_type']}, {'dense' if model.config.moe_config is None else 'sparse'}"
    )
    logits, tokens = answer_of(model)
    assert torch.isfinite(logits).all()
    assert tokens.shape[1] == logits.shape[1] + 2
    folder = tmp_path_factory.mktemp("property")
    model.save_pretrained(folder)
    again = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(again) is MoellavaForCausalLM
    left, right = (dict(one.config.to_dict(), _name_or_path="", dtype="") for one in (model, again))
    assert {name for name in left if left[name] != right.get(name)} <= {"architectures", "text_config", "vision_config"}
    assert MoellavaConfig(**fields).to_diff_dict().keys() >= {"text_config", "vision_config"}
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
        assert torch.isfinite(answer_of(model)[0]).all()
