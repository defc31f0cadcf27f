# SPDX-License-Identifier: Apache-2.0
"""What transformers expects of any model of its own, as its common tests have found it missing (`tests/referee`)."""

import inspect

import pytest
import torch
from transformers import AutoModel, CLIPVisionConfig, LlamaConfig

from moellava import MoellavaConfig, MoellavaForCausalLM, MoellavaProcessor


TEXT = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOWER = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
QFORMER = {"type": "qformer", "num_query_tokens": 4, "qformer_hidden_size": 32, "num_hidden_layers": 1}
PERCEIVER = {"type": "perceiver", "num_latents": 4, "latent_dim": 32, "num_hidden_layers": 1}
OLDER_QFORMER = {"type": "older_qformer", "num_query_tokens": 4, "num_hidden_layers": 1}


def make_config(tower: str = "clip", **fields) -> MoellavaConfig:
    return MoellavaConfig(
        text_config=TEXT,
        vision_config={"model_type": f"{tower}_vision_model", **TOWER},
        image_token_id=3,
        **{"vision_feature_layer": -1, **fields},
    )


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_weights_that_no_file_has_are_drawn_as_the_towers_family_draws_them(tower):
    config = make_config(tower)
    drawn = MoellavaForCausalLM.from_pretrained(None, config=config, state_dict={}).model.vision_tower
    expected = AutoModel.from_config(config.vision_config)
    for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"):
        found, own = (model.get_submodule(f"encoder.layers.0.{name}").weight.std() for model in (drawn, expected))
        torch.testing.assert_close(found, own, rtol=0.15, atol=0, msg=name)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_image_features_come_with_the_towers_hidden_states_and_attentions(tower):
    model = MoellavaForCausalLM(make_config(tower)).eval()
    model.set_attn_implementation("eager")
    pixel_values = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        plain = model.get_image_features(pixel_values)
        asked = model.get_image_features(pixel_values, output_hidden_states=True, output_attentions=True)
        expected = model.model.vision_tower(pixel_values, output_hidden_states=True, output_attentions=True)
    assert plain.hidden_states is None and plain.attentions is None
    torch.testing.assert_close(asked.last_hidden_state, plain.last_hidden_state)
    assert len(asked.hidden_states) == 4 and len(asked.attentions) == 3
    torch.testing.assert_close(asked.hidden_states, expected.hidden_states)
    torch.testing.assert_close(asked.attentions, expected.attentions)


def test_hidden_states_end_at_the_feature_layer():
    model = MoellavaForCausalLM(make_config(vision_feature_layer=-2)).eval()
    model.config.vision_config.output_hidden_states = True
    with torch.no_grad():
        encoded = model.get_image_features(torch.randn(1, 3, 8, 8))
    assert len(encoded.hidden_states) == 3
    torch.testing.assert_close(encoded.last_hidden_state, encoded.hidden_states[2][:, 1:])


@pytest.mark.parametrize(("name", "other"), [("vision_feature_layer", -1), ("vision_feature_select_strategy", "full")])
def test_features_asked_for_as_of_llava_are_the_models_own(name, other):
    """LLaVA takes these fields of its config by call too: what would not be followed is not taken in silence."""
    model = MoellavaForCausalLM(make_config(vision_feature_layer=-2)).eval()
    pixel_values, input_ids = torch.randn(1, 3, 8, 8), torch.tensor([[1, 3, 3, 3, 3, 5]])
    own = {name: getattr(model.config, name)}
    with torch.no_grad():
        (expected,) = model.get_image_features(pixel_values).pooler_output
        (repeated,) = model.get_image_features(pixel_values, **own).pooler_output
        passed_on = model(input_ids=input_ids, pixel_values=pixel_values, **own).image_hidden_states
    assert torch.equal(repeated, expected) and torch.equal(passed_on, expected)
    message = rf"{name} is {other!r}, .* from_pretrained\(\.\.\., {name}={other!r}\)"
    with pytest.raises(ValueError, match=message):
        model.get_image_features(pixel_values, **{name: other})
    with pytest.raises(ValueError, match=message):
        model(input_ids=input_ids, pixel_values=pixel_values, **{name: other})


@pytest.mark.parametrize("projector", [QFORMER, PERCEIVER, OLDER_QFORMER], ids=lambda fields: fields["type"])
def test_the_attention_of_a_projector_follows_the_models(projector, tmp_path):
    model = MoellavaForCausalLM(make_config(projector_config=projector)).eval()
    attention = model.model.multi_modal_projector.attention_config
    pixel_values = torch.randn(2, 3, 8, 8)
    assert attention._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = model.get_image_features(pixel_values).pooler_output
        model.set_attn_implementation("eager")
        assert attention._attn_implementation == "eager"
        torch.testing.assert_close(model.get_image_features(pixel_values).pooler_output, expected)
    model.save_pretrained(tmp_path)
    loaded = MoellavaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.model.multi_modal_projector.attention_config._attn_implementation == "eager"
    loaded.set_attn_implementation({"projector_config": "sdpa"})
    assert loaded.model.multi_modal_projector.attention_config._attn_implementation == "sdpa"
    assert loaded.config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize("use_residual", [False, True])
def test_only_weights_that_a_sparse_model_has_are_kept_in_full_precision(use_residual):
    moe = {"layers": "dense", "use_residual": use_residual}
    model = MoellavaForCausalLM(make_config(moe_config=moe))
    expected = {"mlp.gate.weight"} | ({"mlp.coefficient.weight", "mlp.coefficient.bias"} if use_residual else set())
    assert model.model._keep_in_fp32_modules_strict == expected


def test_the_plan_of_tensor_parallelism_names_what_a_sparse_model_has():
    def planned(layers) -> set[str]:
        plan = MoellavaForCausalLM(make_config(moe_config={"layers": layers})).tp_plan
        return {pattern.removeprefix("model.language_model.") for pattern in plan}

    mlp = {f"layers.*.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    assert mlp <= planned([0])
    assert not mlp & planned("dense")
    assert "layers.*.self_attn.q_proj" in planned("dense")


def test_a_parts_config_read_from_a_checkpoint_is_the_one_within(tmp_path):
    config = make_config()
    config.save_pretrained(tmp_path)
    for own_class, within in ((LlamaConfig, config.text_config), (CLIPVisionConfig, config.vision_config)):
        read = own_class.from_pretrained(tmp_path).to_dict()
        read.pop("transformers_version")
        key = "text_config" if own_class is LlamaConfig else "vision_config"
        assert read == config.to_dict()[key]
        assert type(within) is own_class
    assert "_name_or_path" not in (tmp_path / "config.json").read_text()


def test_a_processor_tells_the_types_that_it_takes():
    parameters = inspect.signature(MoellavaProcessor.__call__).parameters
    assert all(parameters[name].annotation is not inspect.Parameter.empty for name in ("images", "text", "kwargs"))
