# SPDX-License-Identifier: Apache-2.0
"""The built-in projectors: shapes, token counts, training, loading, and equality with transformers' own modules."""

import inspect

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from moellava import load_pretrained_model
from moellava.parts.identity_projector_moellava import IdentityProjector
from moellava.parts.linear_projector_moellava import LinearProjector
from moellava.parts.mlp_projector_moellava import MlpProjector
from moellava.parts.parts_moellava import PROJECTORS
from moellava.parts.perceiver_projector_moellava import PerceiverProjector
from moellava.parts.qformer_projector_moellava import QFormerProjector


VISION, TEXT, TOKENS = 24, 32, 17

# One small projector of every kind and the number of tokens it makes of TOKENS: (type, vision width, fields, tokens).
SMALL = [
    pytest.param("linear", VISION, {}, TOKENS, id="linear"),
    pytest.param("linear", VISION, {"bias": False}, TOKENS, id="linear-no-bias"),
    pytest.param("mlp", VISION, {}, TOKENS, id="mlp"),
    pytest.param("mlp", VISION, {"num_hidden_layers": 1}, TOKENS, id="mlp-1"),
    pytest.param(
        "mlp",
        VISION,
        {"num_hidden_layers": 3, "hidden_size": 20, "hidden_act": "silu", "bias": False},
        TOKENS,
        id="mlp-3",
    ),
    pytest.param("identity", TEXT, {}, TOKENS, id="identity"),
    pytest.param("qformer", VISION, {"qformer_hidden_size": 48}, 32, id="qformer"),
    pytest.param(
        "qformer",
        VISION,
        {
            "qformer_hidden_size": 40,
            "num_query_tokens": 5,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 36,
            "cross_attention_frequency": 2,
        },
        5,
        id="qformer-fields",
    ),
    pytest.param("perceiver", VISION, {}, 64, id="perceiver"),
    pytest.param(
        "perceiver",
        VISION,
        {
            "num_latents": 6,
            "latent_dim": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_act": "gelu",
        },
        6,
        id="perceiver-fields",
    ),
]
WITH_WEIGHTS = [case for case in SMALL if case.id != "identity"]


def build(name, vision_hidden_size, fields, seed=0):
    torch.manual_seed(seed)
    return PROJECTORS[name](vision_hidden_size, TEXT, **fields).eval()


def features(vision_hidden_size, tokens=TOKENS, batch=2, seed=1):
    return torch.randn(batch, tokens, vision_hidden_size, generator=torch.Generator().manual_seed(seed))


def set_attention(projector, implementation):
    """Sets the attention implementation in the config that a projector's blocks share."""
    configs = {id(module.config): module.config for module in projector.modules() if hasattr(module, "config")}
    for config in configs.values():
        config._attn_implementation = implementation
    return len(configs)


class HostConfig(PreTrainedConfig):
    model_type = "projector_host"
    initializer_range = 0.02

    def __init__(self, projector_type="linear", vision_hidden_size=VISION, fields=None, **kwargs):
        self.projector_type = projector_type
        self.vision_hidden_size = vision_hidden_size
        self.fields = fields or {}
        super().__init__(**kwargs)


class Host(PreTrainedModel):
    """The least model around a projector: what transformers' loading and training calls see."""

    config_class = HostConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.multi_modal_projector = PROJECTORS[config.projector_type](config.vision_hidden_size, TEXT, **config.fields)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if hasattr(module, "initialize_parameters"):
            module.initialize_parameters()

    def forward(self, image_features):
        return self.multi_modal_projector(image_features)


def build_host(name, vision_hidden_size, fields):
    torch.manual_seed(0)
    return Host(HostConfig(name, vision_hidden_size, fields)).eval()


# Registration and fields


@pytest.mark.parametrize(
    ("name", "projector"),
    [
        ("linear", LinearProjector),
        ("mlp", MlpProjector),
        ("identity", IdentityProjector),
        ("qformer", QFormerProjector),
        ("perceiver", PerceiverProjector),
    ],
)
def test_registered_and_public(name, projector):
    assert PROJECTORS[name] is projector
    parameters = list(inspect.signature(projector.__init__).parameters.values())[1:]
    assert [parameter.name for parameter in parameters[:2]] == ["vision_hidden_size", "text_hidden_size"]
    fields = {parameter.name: parameter.default for parameter in parameters[2:]}
    assert inspect.Parameter.empty not in fields.values()
    # A default that the count repeats must be the constructor's.
    counted = inspect.signature(projector.num_output_tokens).parameters
    for field in fields.keys() & counted.keys():
        assert counted[field].default == fields[field]


# What every projector does


@pytest.mark.parametrize(("name", "vision_hidden_size", "fields", "num_tokens"), SMALL)
def test_shape_and_token_count(name, vision_hidden_size, fields, num_tokens):
    projector = build(name, vision_hidden_size, fields)
    with torch.no_grad():
        output = projector(features(vision_hidden_size))
    assert output.shape == (2, num_tokens, TEXT)
    assert torch.isfinite(output).all()
    assert projector.num_output_tokens(TOKENS, **fields) == num_tokens


@pytest.mark.parametrize(("name", "vision_hidden_size", "fields", "num_tokens"), SMALL)
def test_token_count_takes_every_field(name, vision_hidden_size, fields, num_tokens):
    # As a config holds them: the fields that were given and the defaults of all the others.
    complete = PROJECTORS.complete_fields(name, fields)
    assert PROJECTORS[name].num_output_tokens(TOKENS, **complete) == num_tokens
    projector = build(name, vision_hidden_size, complete)
    with torch.no_grad():
        assert torch.equal(
            projector(features(vision_hidden_size)),
            build(name, vision_hidden_size, fields)(features(vision_hidden_size)),
        )


@pytest.mark.parametrize(("name", "vision_hidden_size", "fields", "num_tokens"), SMALL)
def test_gradients_reach_every_parameter(name, vision_hidden_size, fields, num_tokens):
    projector = build(name, vision_hidden_size, fields).train()
    image_features = features(vision_hidden_size).requires_grad_()
    output = projector(image_features)
    (output * torch.randn_like(output)).sum().backward()
    assert image_features.grad.abs().max() > 0
    for parameter_name, parameter in projector.named_parameters():
        assert parameter.grad is not None, parameter_name
        # A key bias adds the same number to all scores of a query, and softmax takes it away: its gradient is 0.
        if not parameter_name.endswith(".key.bias"):
            assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize(("name", "vision_hidden_size", "fields", "num_tokens"), SMALL)
def test_rows_of_a_batch_are_independent(name, vision_hidden_size, fields, num_tokens):
    projector = build(name, vision_hidden_size, fields)
    image_features = features(vision_hidden_size, batch=3)
    with torch.no_grad():
        together = projector(image_features)
        alone = torch.cat([projector(row[None]) for row in image_features])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "vision_hidden_size", "fields", "num_tokens"), SMALL)
def test_meta_construction_then_to_empty(name, vision_hidden_size, fields, num_tokens):
    projector = build(name, vision_hidden_size, fields)
    with torch.device("meta"):
        empty = PROJECTORS[name](vision_hidden_size, TEXT, **fields)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty = empty.to_empty(device="cpu").eval()
    # Nothing but parameters: a buffer that is no part of the checkpoint would be left as garbage here.
    assert list(empty.buffers()) == []
    empty.load_state_dict(projector.state_dict())
    with torch.no_grad():
        assert torch.equal(empty(features(vision_hidden_size)), projector(features(vision_hidden_size)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("name", "vision_hidden_size", "fields", "num_tokens"), SMALL)
def test_half_precision(name, vision_hidden_size, fields, num_tokens, dtype):
    projector = build(name, vision_hidden_size, fields)
    image_features = features(vision_hidden_size)
    with torch.no_grad():
        expected = projector(image_features)
        output = projector.to(dtype)(image_features.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("name", "vision_hidden_size", "fields", "num_tokens"), SMALL)
def test_compiles_in_one_graph(name, vision_hidden_size, fields, num_tokens):
    projector = build(name, vision_hidden_size, fields)
    torch.compiler.reset()
    compiled = torch.compile(projector, fullgraph=True, backend="eager")
    with torch.no_grad():
        for tokens, batch in ((TOKENS, 2), (9, 3)):
            image_features = features(vision_hidden_size, tokens=tokens, batch=batch)
            torch.testing.assert_close(compiled(image_features), projector(image_features), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "vision_hidden_size", "fields", "num_tokens"), SMALL)
def test_wrong_features_are_refused(name, vision_hidden_size, fields, num_tokens):
    projector = build(name, vision_hidden_size, fields)
    for shape in (
        (2, TOKENS, vision_hidden_size + 1),
        (TOKENS, vision_hidden_size),
        (1, 2, TOKENS, vision_hidden_size),
    ):
        with pytest.raises(ValueError) as error:
            projector(torch.zeros(shape))
        assert f"'{name}'" in str(error.value)
        assert f"(batch, tokens, {vision_hidden_size})" in str(error.value)
        assert str(shape) in str(error.value)


# Inside a model of transformers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "vision_hidden_size", "fields", "num_tokens"), WITH_WEIGHTS)
def test_saved_and_loaded_inside_a_model(name, vision_hidden_size, fields, num_tokens, dtype, tmp_path):
    host = build_host(name, vision_hidden_size, fields).to(dtype)
    image_features = features(vision_hidden_size).to(dtype)
    host.save_pretrained(tmp_path)
    loaded, info = Host.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(loaded(image_features), host(image_features))


@pytest.mark.parametrize(
    ("name", "fields", "parameter"),
    [
        ("qformer", {"qformer_hidden_size": 48, "num_query_tokens": 8}, "query_tokens"),
        ("perceiver", {"num_latents": 8}, "latents"),
    ],
)
def test_weights_missing_from_a_checkpoint_are_drawn(name, fields, parameter, tmp_path):
    host = build_host(name, VISION, fields)
    host.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    linear = "multi_modal_projector.qformer.encoder.layer.0.attention.attention.key.weight"
    if name == "perceiver":
        linear = "multi_modal_projector.layers.0.self_attn.k_proj.weight"
    dropped = [f"multi_modal_projector.{parameter}", linear]
    save_file({key: tensor for key, tensor in weights.items() if key not in dropped}, tmp_path / "model.safetensors")
    loaded, info = Host.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(dropped)
    for key, tensor in loaded.state_dict().items():
        if key in dropped:
            assert 0.01 < tensor.std() < 0.03, key
            assert not torch.equal(tensor, weights[key]), key
        else:
            assert torch.equal(tensor, weights[key]), key
    tokens = getattr(loaded.multi_modal_projector, parameter).detach().reshape(8, -1)
    assert torch.pdist(tokens).min() > 0.01


@pytest.mark.parametrize("name", ["qformer", "perceiver"])
def test_loaded_tokens_survive_another_initialization(name):
    projector = build_host(name, VISION, {}).multi_modal_projector
    tokens = projector.query_tokens if name == "qformer" else projector.latents
    before = tokens.detach().clone()
    tokens._is_hf_initialized = True
    projector.initialize_parameters()
    assert torch.equal(tokens, before)
    tokens._is_hf_initialized = False
    projector.initialize_parameters()
    assert not torch.equal(tokens, before)


def test_qformer_gradients_under_checkpointing():
    host = build_host("qformer", VISION, {"qformer_hidden_size": 48}).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            # The newer name of two; transformers 5.19 knows only the older one.
            enable = getattr(host, "activation_checkpointing_enable", None) or host.gradient_checkpointing_enable
            enable()
            assert all(layer.gradient_checkpointing for layer in host.multi_modal_projector.qformer.encoder.layer)
        host.zero_grad()
        host(features(VISION)).square().sum().backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in host.named_parameters()})
    for key, gradient in gradients[0].items():
        assert torch.equal(gradients[1][key], gradient), key


@pytest.mark.parametrize("name", ["qformer", "perceiver"])
def test_no_model_inside_the_projector(name):
    # A nested PreTrainedModel would take part in the outer model's attention settings and output recording.
    host = build_host(name, VISION, {})
    assert [module for module in host.modules() if isinstance(module, PreTrainedModel)] == [host]
    host.set_attn_implementation("eager")
    configs = [module.config for module in host.multi_modal_projector.modules() if hasattr(module, "config")]
    assert configs and all(config._attn_implementation == "sdpa" for config in configs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("qformer", {"qformer_hidden_size": 48, "num_attention_heads": 4}),
        ("perceiver", {"num_attention_heads": 4}),
        ("perceiver", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ],
    ids=["qformer", "perceiver", "perceiver-grouped"],
)
def test_eager_attention_agrees_with_sdpa(name, fields, dtype):
    projector = build(name, VISION, fields).to(dtype)
    image_features = features(VISION).to(dtype)
    with torch.no_grad():
        sdpa = projector(image_features)
        assert set_attention(projector, "eager") == 1
        eager = projector(image_features)
    torch.testing.assert_close(eager, sdpa, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03)


# Against transformers' own modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
def test_mlp_is_llavas(hidden_act, bias, dtype):
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=VISION),
        text_config=LlamaConfig(hidden_size=TEXT),
        projector_hidden_act=hidden_act,
        multimodal_projector_bias=bias,
    )
    reference = LlavaMultiModalProjector(config).to(dtype)
    projector = MlpProjector(VISION, TEXT, hidden_act=hidden_act, bias=bias).to(dtype)
    assert list(projector.state_dict()) == list(reference.state_dict())
    projector.load_state_dict(reference.state_dict())
    image_features = features(VISION).to(dtype)
    with torch.no_grad():
        assert torch.equal(projector(image_features), reference(image_features))


@pytest.mark.parametrize("num_hidden_layers", [1, 2, 3, 4])
def test_mlp_layers(num_hidden_layers):
    projector = build("mlp", VISION, {"num_hidden_layers": num_hidden_layers, "hidden_size": None})
    layers = [f"linear_{index}" for index in range(1, num_hidden_layers + 1)]
    assert list(projector.state_dict()) == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    with torch.no_grad():
        hidden_states = projector.linear_1(features(VISION))
        for layer in layers[1:]:
            hidden_states = projector.get_submodule(layer)(nn.functional.gelu(hidden_states))
        assert torch.equal(projector(features(VISION)), hidden_states)


def test_mlp_hidden_width():
    projector = build("mlp", VISION, {"num_hidden_layers": 3, "hidden_size": 20})
    shapes = [tuple(projector.get_submodule(f"linear_{index}").weight.shape) for index in (1, 2, 3)]
    assert shapes == [(20, VISION), (20, 20), (TEXT, 20)]


def test_linear_and_identity_compute_what_they_say():
    image_features = features(VISION)
    projector = build("linear", VISION, {})
    assert list(projector.state_dict()) == ["linear.weight", "linear.bias"]
    expected = image_features @ projector.linear.weight.T + projector.linear.bias
    torch.testing.assert_close(projector(image_features), expected, rtol=0, atol=1e-6)
    wide = features(TEXT)
    assert build("identity", TEXT, {})(wide) is wide


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("frequency", [1, 2])
def test_qformer_is_blip2s(frequency, implementation):
    torch.manual_seed(0)
    config = Blip2QFormerConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        cross_attention_frequency=frequency,
        encoder_hidden_size=VISION,
    )
    reference = Blip2QFormerModel._from_config(config, attn_implementation=implementation).eval()
    fields = {
        "qformer_hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "cross_attention_frequency": frequency,
        "num_query_tokens": 7,
    }
    projector = build("qformer", VISION, fields)
    set_attention(projector, implementation)
    assert projector.qformer.state_dict().keys() == reference.state_dict().keys()
    projector.qformer.load_state_dict(reference.state_dict())
    with torch.no_grad():
        queried = reference(
            query_embeds=projector.query_tokens.expand(2, -1, -1), encoder_hidden_states=features(VISION)
        ).last_hidden_state
        expected = projector.language_projection(queried)
        assert torch.equal(projector(features(VISION)), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("num_key_value_heads", [4, 1])
def test_perceiver_is_idefics2s(num_key_value_heads, implementation):
    torch.manual_seed(0)
    config = Idefics2PerceiverConfig(
        hidden_size=40,
        resampler_n_latents=6,
        resampler_depth=3,
        resampler_n_heads=4,
        resampler_head_dim=10,
        num_key_value_heads=num_key_value_heads,
    )
    reference = Idefics2PerceiverResampler._from_config(config, attn_implementation=implementation).eval()
    fields = {
        "num_latents": 6,
        "latent_dim": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": num_key_value_heads,
    }
    projector = build("perceiver", VISION, fields)
    set_attention(projector, implementation)
    reference.load_state_dict(
        {key: tensor for key, tensor in projector.state_dict().items() if "_projection." not in key}
    )
    with torch.no_grad():
        resampled = reference(
            context=projector.input_projection(features(VISION)), attention_mask=torch.ones(2, TOKENS)
        )
        torch.testing.assert_close(
            projector(features(VISION)), projector.output_projection(resampled), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("tokens", [1, 16, 577])
@pytest.mark.parametrize("name", ["qformer", "perceiver"])
def test_resamplers_take_any_number_of_tokens(name, tokens):
    projector = build(name, VISION, {})
    with torch.no_grad():
        output = projector(features(VISION, tokens=tokens))
    assert output.shape == (2, projector.num_output_tokens(tokens), TEXT)
    assert torch.isfinite(output).all()
    # Every output token still depends on the input.
    with torch.no_grad():
        other = projector(features(VISION, tokens=tokens, seed=2))
    assert (output - other).abs().amax(dim=-1).min() > 0


@pytest.mark.parametrize("name", ["qformer", "perceiver"])
def test_learned_tokens_differ(name):
    projector = build(name, VISION, {})
    tokens = projector.query_tokens[0] if name == "qformer" else projector.latents
    with torch.no_grad():
        tokens.fill_(1.0)
        projector.initialize_parameters()
        assert 0.01 < tokens.std() < 0.03
        assert torch.pdist(tokens).min() > 0.01
        output = projector(features(VISION, batch=1))[0]
    # And so do the tokens that the text model sees.
    assert torch.pdist(output).min() > 1e-4


@pytest.mark.parametrize(
    ("width", "heads"), [(768, 12), (1024, 16), (2560, 40), (1152, 18), (80, 1), (100, 2), (48, 1), (67, 1), (7, 1)]
)
def test_default_number_of_heads(width, heads):
    with torch.device("meta"):
        qformer = QFormerProjector(VISION, TEXT, qformer_hidden_size=width, num_hidden_layers=1)
        perceiver = PerceiverProjector(VISION, TEXT, latent_dim=width, num_hidden_layers=1)
    assert qformer.qformer.encoder.config.num_attention_heads == heads
    assert perceiver.layers[0].self_attn.num_heads == heads
    assert perceiver.layers[0].self_attn.head_dim * heads == width


def test_default_sizes_follow_the_text_width_and_the_papers():
    with torch.device("meta"):
        qformer = QFormerProjector(1024, 2048)
        perceiver = PerceiverProjector(1024, 2048)
    assert qformer.query_tokens.shape == (1, 32, 768)
    assert len(qformer.qformer.encoder.layer) == 2
    assert all(layer.has_cross_attention for layer in qformer.qformer.encoder.layer)
    assert qformer.qformer.encoder.layer[0].intermediate_query.dense.out_features == 3072
    assert qformer.language_projection.weight.shape == (2048, 768)
    assert perceiver.latents.shape == (64, 1024)
    assert len(perceiver.layers) == 3
    assert perceiver.input_projection.weight.shape == (1024, 1024)
    assert perceiver.output_projection.weight.shape == (2048, 1024)


# Errors

SIZES = {
    "linear": ["vision_hidden_size", "text_hidden_size"],
    "mlp": ["vision_hidden_size", "text_hidden_size", "hidden_size", "num_hidden_layers"],
    "identity": ["vision_hidden_size", "text_hidden_size"],
    "qformer": [
        "vision_hidden_size",
        "text_hidden_size",
        "num_query_tokens",
        "qformer_hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "cross_attention_frequency",
    ],
    "perceiver": [
        "vision_hidden_size",
        "text_hidden_size",
        "num_latents",
        "latent_dim",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ],
}


@pytest.mark.parametrize("size", [0, -3, 2.0, "8", True])
@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in SIZES.items() for field in fields])
def test_sizes_are_checked(name, field, size):
    arguments = {"vision_hidden_size": 16, "text_hidden_size": 16, field: size}
    with pytest.raises(ValueError) as error:
        PROJECTORS[name](**arguments)
    assert str(error.value) == f"The projector '{name}' needs {field} as an integer of at least 1, got {size!r}."


def test_every_size_of_every_projector_is_checked():
    for name, sizes in SIZES.items():
        known = set(PROJECTORS.fields(name)) - {"bias", "hidden_act", "layer_norm_eps", "rms_norm_eps"}
        assert known == set(sizes) - {"vision_hidden_size", "text_hidden_size"}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("linear", {"bias": "false"}, "The projector 'linear' needs bias as True or False, got 'false'."),
        ("mlp", {"bias": None}, "The projector 'mlp' needs bias as True or False, got None."),
        ("mlp", {"hidden_act": "gelup"}, "The projector 'mlp' does not know hidden_act='gelup'. Use one of "),
        ("qformer", {"hidden_act": "gelup"}, "The projector 'qformer' does not know hidden_act='gelup'. Use one of "),
        ("perceiver", {"hidden_act": None}, "The projector 'perceiver' does not know hidden_act=None. Use one of "),
        (
            "mlp",
            {"hidden_act": "prelu"},
            "The projector 'mlp' cannot use hidden_act='prelu', which has weights of its",
        ),
        (
            "mlp",
            {"num_hidden_layers": 1, "hidden_size": 48},
            "The projector 'mlp' with num_hidden_layers=1 is a single layer from 24 to 32 and has no place for "
            "hidden_size=48. Leave hidden_size out, or use num_hidden_layers=2 or more.",
        ),
        (
            "identity",
            {},
            "The projector 'identity' needs equal widths, got vision_hidden_size=24 and text_hidden_size=32. Use the "
            "projector 'mlp' or 'linear', which map one to the other.",
        ),
        (
            "qformer",
            {"qformer_hidden_size": 48, "num_attention_heads": 5},
            "The projector 'qformer' cannot split qformer_hidden_size=48 into num_attention_heads=5 heads of equal "
            "width. Use a number of heads that divides 48, or leave num_attention_heads out to have one chosen.",
        ),
        (
            "perceiver",
            {"num_attention_heads": 5},
            "The projector 'perceiver' cannot split latent_dim=32 into num_attention_heads=5 heads of equal width. "
            "Use a number of heads that divides 32, or leave num_attention_heads out to have one chosen.",
        ),
        (
            "perceiver",
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "The projector 'perceiver' cannot share num_key_value_heads=3 among num_attention_heads=4 heads. Use a "
            "number that divides 4, or leave num_key_value_heads out to have as many.",
        ),
        (
            "qformer",
            {"layer_norm_eps": 0.0},
            "The projector 'qformer' needs layer_norm_eps as a number above 0, got 0.0.",
        ),
        (
            "perceiver",
            {"rms_norm_eps": "1e-6"},
            "The projector 'perceiver' needs rms_norm_eps as a number above 0, got '1e-6'.",
        ),
    ],
)
def test_error_messages(name, arguments, message):
    with pytest.raises(ValueError) as error:
        PROJECTORS[name](VISION, TEXT, **arguments)
    assert str(error.value).startswith(message)
    if "Use one of" in message:
        assert "gelu, " in str(error.value)


@pytest.mark.parametrize(("name", "field"), [("qformer", "num_query_tokens"), ("perceiver", "num_latents")])
def test_token_count_is_checked(name, field):
    with pytest.raises(ValueError, match=f"The projector '{name}' needs {field} as an integer of at least 1, got 0"):
        PROJECTORS[name].num_output_tokens(TOKENS, **{field: 0})


def test_one_layer_mlp_accepts_the_width_it_has():
    assert list(MlpProjector(VISION, TEXT, num_hidden_layers=1, hidden_size=TEXT).state_dict()) == [
        "linear_1.weight",
        "linear_1.bias",
    ]


def test_a_new_projector_may_be_larger_than_the_parts(parts):
    """A config that describes far more than its files hold is refused; a projector that is asked for has no files."""
    model = load_pretrained_model(
        parts.language_model("llama"),
        vision_tower=parts.vision_tower("clip"),
        projector_config={"type": "perceiver", "latent_dim": 1024},
        dtype="bfloat16",
        device="cpu",
    ).model
    own, others = (sum(p.numel() for p in part.parameters()) for part in (model.model.multi_modal_projector, model))
    assert own > 2**25 > 50 * (others - own)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
