# SPDX-License-Identifier: Apache-2.0
"""What `docs/serving.md` says of servers that others have written, as far as it can be told without them.

The service of that page is run by `test_docs.py`, vLLM by `make test-serving` (tests/serving).
"""

import copy
import json

import pytest
import torch
from parts import picture
from transformers.cli.serving.model_manager import ModelManager

from moellava import MoellavaConfig, load_pretrained_model


def test_transformers_serve_looks_for_the_class_among_its_own(parts, tmp_path):
    # When this fails, transformers serves checkpoints that carry their code, and the guide has to say so.
    folder = tmp_path / "my-model"
    load_pretrained_model(
        parts.language_model(), vision_tower=parts.vision_tower(), device="cpu"
    ).model.save_pretrained(folder)
    with pytest.raises(AttributeError, match="module transformers has no attribute MoellavaForCausalLM"):
        ModelManager(device="cpu", trust_remote_code=True, force_model=str(folder))


# vLLM's backend for models of transformers asks a checkpoint for what follows.


@pytest.fixture(scope="module")
def assembled(parts):
    return load_pretrained_model(
        parts.language_model(), vision_tower=parts.vision_tower(), moe_config={"num_experts": 3}, device="cpu"
    ).model


def counts(text_config) -> tuple:
    return getattr(text_config, "num_experts", None), getattr(text_config, "num_experts_per_tok", None)


def test_the_experts_are_announced_where_servers_look_and_not_written_down(assembled, tmp_path):
    config = assembled.config
    assert config.get_text_config() is config.text_config  # which vLLM gives its attention to
    assert counts(config.get_text_config()) == (3, 2)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not {"num_experts", "num_experts_per_tok"} & written["text_config"].keys()
    assert counts(MoellavaConfig.from_pretrained(tmp_path).text_config) == (3, 2)
    assert counts(copy.deepcopy(config).text_config) == (3, 2)


@pytest.mark.parametrize(
    "fields",
    [{"hidden_act": "gelu"}, {"mlp_bias": True}, {"model_type": "phi"}],
    ids=["another activation", "biases", "plain experts"],
)
def test_experts_that_vllm_would_compute_otherwise_are_not_announced(fields, assembled):
    text = {"model_type": "llama", "vocab_size": 32064, "num_hidden_layers": 2, **fields}
    config = MoellavaConfig(text_config=text, vision_config=assembled.config.vision_config, moe_config={})
    assert counts(config.text_config) == (None, None)


def test_a_dense_model_announces_no_experts(assembled):
    config = MoellavaConfig(vision_config=assembled.config.vision_config)
    assert counts(config.get_text_config()) == (None, None)


def test_the_experts_can_be_replaced_by_a_server(assembled):
    blocks = [module for module in assembled.modules() if type(module).__name__ == "SparseMoeBlock"]
    assert blocks
    for block in blocks:
        assert all(parameter.ndim == 3 for parameter in block.experts.parameters())
        assert {name for name, _ in block.experts.named_parameters()} == {"gate_up_proj", "down_proj"}


@torch.no_grad()
def test_experts_may_write_over_what_they_are_given(parts):
    model = load_pretrained_model(
        parts.language_model(),
        vision_tower=parts.vision_tower(),
        moe_config={"use_residual": True, "use_meta_expert": True},
        device="cpu",
    ).model
    block = next(module for module in model.modules() if type(module).__name__ == "SparseMoeBlock")
    hidden_states = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    expected = block(hidden_states)
    own = block.experts.forward

    def in_place(tokens, index, weights):
        return tokens.copy_(own(tokens, index, weights))

    block.experts.forward = in_place  # as the kernels of vLLM may do
    assert torch.equal(block(hidden_states.clone()), expected)


def test_the_processor_says_where_pictures_are_and_how_many_tokens_they_take(assembled):
    processor = assembled.processor
    counted = processor._get_num_multimodal_tokens(image_sizes=[(48, 36), (10_000, 10_000)])
    assert counted["num_image_tokens"] == [16, 16]
    assert counted["num_image_patches"] == [1, 1]
    text = "USER: <image> and <image>. ASSISTANT:"
    inputs = processor(
        text=text, images=[picture(0), picture(1)], return_text_replacement_offsets=True, return_tensors="pt"
    )
    (offsets,) = inputs["text_replacement_offsets"]
    assert [entry["type"] for entry in offsets] == ["image", "image"]
    assert [entry["replacement"] for entry in offsets] == ["<image>" * 16] * 2
    assert inputs["pixel_values"].shape[0] == 2


def test_features_come_as_one_tensor_for_each_picture(assembled):
    pixel_values = assembled.processor(images=[picture(0), picture(1)], return_tensors="pt")["pixel_values"]
    features = assembled.get_image_features(pixel_values, return_dict=True).pooler_output
    assert [tuple(feature.shape) for feature in features] == [(16, 64)] * 2


def test_servers_find_the_tower_and_the_plan_of_the_language_model(assembled):
    body = assembled.model
    assert body.get_encoder(modality="image") is body.vision_tower
    assert body._supports_attention_backend
    assert any("q_proj" in name for name in body.tp_plan)
