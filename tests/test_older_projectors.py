# SPDX-License-Identifier: Apache-2.0
"""MoE-LLaVA's own projectors: values against a slow second implementation, names of weights, type strings, files.

The second implementation computes in float64 from a dictionary with the older names, one head, one group and one place
of the grid at a time, so that it shares no code and no shape trick with the projectors.
"""

import copy
import inspect
import math

import pytest
import torch
from parts import run_python
from safetensors.torch import save_file
from timm.models.vision_transformer import Block
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, CLIPVisionConfig, CLIPVisionModel

from moellava import MoellavaConfig, load_pretrained_model
from moellava.authoring.older_names import canonical_projector, stacked_projector
from moellava.configuration.configuration_moellava import MoellavaProjectorConfig
from moellava.parts.parts_moellava import PROJECTORS
from moellava.parts.simple_projector_moellava import VitBlock
from moellava.reading.projector_file import legacy_projector_tensors, read_projector


VISION, TEXT = 32, 64

# type string of the older code -> our type and fields.
TYPES = {
    "linear": {"type": "linear"},
    "mlp1x_gelu": {"type": "mlp", "num_hidden_layers": 1},
    "mlp2x_gelu": {"type": "mlp", "num_hidden_layers": 2},
    "mlp12x_gelu": {"type": "mlp", "num_hidden_layers": 12},
    "identity": {"type": "identity"},
    "qformer2_64": {"type": "older_qformer", "num_hidden_layers": 2, "num_query_tokens": 64, "narrow": False},
    "cheap_qformer4_36": {"type": "older_qformer", "num_hidden_layers": 4, "num_query_tokens": 36, "narrow": True},
    "simple_in1_out0": {"type": "simple", "num_blocks_in": 1, "num_blocks_out": 0, "narrow": False},
    "cheap_simple_in2_out10": {"type": "simple", "num_blocks_in": 2, "num_blocks_out": 10, "narrow": True},
    "pool_mlp2x_gelu": {"type": "pool_mlp", "num_hidden_layers": 2},
    "cheap_pool_mlp3x_gelu": {"type": "pool_mlp", "num_hidden_layers": 3},
    "cheap_mlp2x_gelu": {"type": "mlp", "num_hidden_layers": 2},
    "cheap_linear": {"type": "linear"},
}

# Small ones of every kind: type string, tokens in, tokens out.
SMALL = [
    ("qformer1_4", 16, 4),
    ("qformer2_3", 7, 3),
    ("cheap_qformer2_4", 16, 4),
    ("simple_in0_out0", 16, 4),
    ("simple_in1_out0", 16, 4),
    ("simple_in2_out0", 25, 4),
    ("simple_in1_out1", 64, 4),
    ("simple_in0_out2", 100, 9),
    ("cheap_simple_in1_out1", 64, 4),
    ("cheap_simple_in2_out0", 36, 9),
    ("pool_mlp1x_gelu", 4, 1),
    ("pool_mlp2x_gelu", 16, 4),
    ("pool_mlp3x_gelu", 25, 4),
]
SIMPLE = [case for case in SMALL if "simple" in case[0]]


def build(kind: str, vision: int = VISION, text: int = TEXT, seed: int = 0) -> nn.Module:
    """The projector that a type string names, with every weight drawn anew and none at its starting value."""
    fields = canonical_projector({"type": kind})
    projector = PROJECTORS[fields.pop("type")](vision, text, **fields).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in projector.named_parameters():
            scale = 1.0 if name == "query_tokens" else 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if "norm" in name.lower() and name.endswith("weight") or name.endswith("conv.0.weight"):
                parameter.add_(1.0)
    return projector


def features(tokens: int, vision: int = VISION, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, tokens, vision, generator=torch.Generator().manual_seed(seed))


def older_weights(kind: str, projector: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a projector as the older code's state dict names them: each run of a shared block has its own."""
    fields = canonical_projector({"type": kind})
    tensors = {}
    for name, tensor in projector.state_dict().items():
        if fields["type"] == "simple" and name.startswith("block_"):
            blocks, place, leaf = name.split(".", 2)
            for run in range(fields[f"num_blocks_{blocks.removeprefix('block_')}"]):
                tensors[f"{blocks}.{2 * run + int(place)}.{leaf}"] = tensor.clone()
        elif fields["type"] == "mlp":
            layer, leaf = name.split(".")
            tensors[f"{2 * (int(layer.removeprefix('linear_')) - 1)}.{leaf}"] = tensor.clone()
        else:
            tensors[name.removeprefix("linear.")] = tensor.clone()
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# The second implementation
# ---------------------------------------------------------------------------------------------------------------------


def linear(weights, name, x):
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(weights, name, x, eps):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attention(query, key, value):
    """Softmax attention of 32 heads, one head and one row of the batch at a time."""
    heads, width = [], query.shape[-1] // 32
    for head in range(32):
        part = slice(head * width, (head + 1) * width)
        rows = [
            torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(width), dim=-1) @ v[:, part]
            for q, k, v in zip(query, key, value, strict=True)
        ]
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=-1)


def two_layers(weights, name, x):
    return linear(weights, f"{name}.2", gelu(linear(weights, f"{name}.0", x)))


def pool(x):
    """Means of two by two neighbours of a square grid; an odd last row and column are left out."""
    side = math.isqrt(x.shape[1])
    places = [
        (2 * row * side + 2 * column, 2 * row * side + 2 * column + 1)
        for row in range(side // 2)
        for column in range(side // 2)
    ]
    return torch.stack([(x[:, a] + x[:, b] + x[:, a + side] + x[:, b + side]) / 4 for a, b in places], dim=1)


def convolution(weights, name, x, padding):
    """A 3 x 3 convolution, one place at a time."""
    side = math.isqrt(x.shape[1])
    kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    output = []
    for row in range(1 - padding, side - 1 + padding):
        for column in range(1 - padding, side - 1 + padding):
            y = bias.expand(x.shape[0], -1).clone()
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= row + dy < side and 0 <= column + dx < side:
                        y += x[:, (row + dy) * side + column + dx] @ kernel[:, :, dy + 1, dx + 1].T
            output.append(y)
    return torch.stack(output, dim=1)


def group_norm(weights, name, x):
    size = x.shape[-1] // 32
    groups = []
    for group in range(32):
        part = x[..., group * size : (group + 1) * size]
        mean = part.mean((1, 2), keepdim=True)
        groups.append((part - mean) / torch.sqrt((part - mean).square().mean((1, 2), keepdim=True) + 1e-6))
    return torch.cat(groups, dim=-1) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def conv_block(weights, name, x):
    return x + gelu(convolution(weights, f"{name}.conv.1", group_norm(weights, f"{name}.conv.0", x), padding=1))


def vit_block(weights, name, x):
    query, key, value = linear(weights, f"{name}.attn.qkv", layer_norm(weights, f"{name}.norm1", x, 1e-5)).chunk(3, -1)
    x = x + linear(weights, f"{name}.attn.proj", attention(query, key, value))
    inner = linear(weights, f"{name}.mlp.fc1", layer_norm(weights, f"{name}.norm2", x, 1e-5))
    return x + linear(weights, f"{name}.mlp.fc2", gelu(inner))


def qformer_attention(weights, name, x, context):
    query = linear(weights, f"{name}.attention.query", x)
    key, value = (linear(weights, f"{name}.attention.{part}", context) for part in ("key", "value"))
    y = linear(weights, f"{name}.output.dense", attention(query, key, value))
    return layer_norm(weights, f"{name}.output.LayerNorm", x + y, 1e-12)


def reference(kind: str, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What the older projector of a type string makes of image features, from the weights of the older state dict."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    x, kind = x.double(), kind.removeprefix("cheap_")
    if kind.startswith("qformer"):
        layers = int(kind.removeprefix("qformer").split("_")[0])
        context = two_layers(weights, "proj_in", x)
        x = layer_norm(weights, "qformer.layernorm", weights["query_tokens"].expand(len(x), -1, -1), 1e-12)
        for layer in range(layers):
            name = f"qformer.encoder.layer.{layer}"
            x = qformer_attention(weights, f"{name}.attention", x, x)
            x = qformer_attention(weights, f"{name}.crossattention", x, context)
            inner = gelu(linear(weights, f"{name}.intermediate_query.dense", x))
            y = linear(weights, f"{name}.output_query.dense", inner)
            x = layer_norm(weights, f"{name}.output_query.LayerNorm", x + y, 1e-12)
        return two_layers(weights, "proj_out", x)
    if kind.startswith("simple"):
        blocks_in, blocks_out = (int(part) for part in kind.removeprefix("simple_in").split("_out"))
        x = pool(two_layers(weights, "proj_in", x))
        for run in range(blocks_in):
            x = vit_block(weights, f"block_in.{2 * run + 1}", conv_block(weights, f"block_in.{2 * run}", x))
        if blocks_out:
            x = convolution(weights, "down2", x, padding=0)
        for run in range(blocks_out):
            x = vit_block(weights, f"block_out.{2 * run + 1}", conv_block(weights, f"block_out.{2 * run}", x))
        return two_layers(weights, "proj_out", x)
    layers = int(kind.removeprefix("pool_mlp").removesuffix("x_gelu"))
    x = linear(weights, "block.0", pool(x))
    for layer in range(1, layers):
        x = linear(weights, f"block.{2 * layer}", gelu(x))
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tokens", "num_output_tokens"), SMALL)
def test_values(kind, tokens, num_output_tokens):
    projector = build(kind)
    x = features(tokens)
    with torch.no_grad():
        output = projector(x)
        exact = copy.deepcopy(projector).double()(x.double())
    expected = reference(kind, older_weights(kind, projector), x)
    assert output.shape == expected.shape == (2, num_output_tokens, TEXT)
    assert expected.std() > 0.05
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("narrow", [False, True])
def test_the_transformer_block_is_timms(narrow):
    width, ratio = 64, 4 if narrow else 2.6875
    torch.manual_seed(0)
    # timm 0.6, with which the older code ran, normalises by PyTorch's class; later ones by one with another epsilon.
    block = Block(width, num_heads=32, mlp_ratio=ratio, norm_layer=nn.LayerNorm).eval()
    own = VitBlock(width, int(width * ratio)).eval()
    own.load_state_dict(block.state_dict())
    x = 0.01 * features(9, width)  # so small that the epsilon tells
    with torch.no_grad():
        torch.testing.assert_close(own(x), block(x), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(Block(width, 32, ratio).eval().norm1(x), own.norm1(x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("kind", "width", "ratio"), [("qformer2_3", TEXT, 2.6875), ("cheap_qformer2_3", VISION, 4)])
def test_the_qformer_is_transformers(kind, width, ratio):
    projector = build(kind)
    config = Blip2QFormerConfig(
        hidden_size=width,
        encoder_hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=32,
        intermediate_size=int(width * ratio),
        cross_attention_frequency=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    qformer = Blip2QFormerModel(config).eval()
    qformer.load_state_dict(projector.qformer.state_dict())
    x = features(16)
    with torch.no_grad():
        queries = projector.query_tokens.expand(2, -1, -1)
        expected = projector.proj_out(qformer(queries, encoder_hidden_states=projector.proj_in(x)).last_hidden_state)
        torch.testing.assert_close(projector(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("qformer1_4", {"query_tokens": (1, 4, 64), "proj_in.0.weight": (64, 32), "proj_out.2.weight": (64, 64)}),
        ("qformer1_4", {"qformer.encoder.layer.0.intermediate_query.dense.weight": (172, 64)}),
        ("cheap_qformer1_4", {"query_tokens": (1, 4, 32), "proj_in.2.weight": (32, 32), "proj_out.0.weight": (64, 32)}),
        ("cheap_qformer1_4", {"qformer.encoder.layer.0.intermediate_query.dense.weight": (128, 32)}),
        ("simple_in1_out1", {"block_in.0.conv.1.weight": (64, 64, 3, 3), "block_out.1.mlp.fc1.weight": (172, 64)}),
        ("simple_in1_out1", {"block_in.1.attn.qkv.weight": (192, 64), "down2.weight": (64, 64, 3, 3)}),
        ("cheap_simple_in1_out0", {"block_in.1.mlp.fc1.weight": (128, 32), "proj_out.0.weight": (64, 32)}),
        ("pool_mlp2x_gelu", {"block.0.weight": (64, 32), "block.2.weight": (64, 64), "block.2.bias": (64,)}),
    ],
)
def test_shapes(kind, shapes):
    tensors = build(kind).state_dict()
    assert {name: tuple(tensors[name].shape) for name in shapes} == shapes
    assert "block_in.1.attn.qkv.bias" not in tensors
    assert ("down2.weight" in tensors) == kind.endswith("out1")


def test_repeated_blocks_are_one():
    once, thrice = build("simple_in1_out1"), build("simple_in3_out3")
    assert list(once.state_dict()) == list(thrice.state_dict())
    with torch.no_grad():
        assert not torch.allclose(once(features(64)), thrice(features(64)), atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# The contract
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["older_qformer", "simple", "pool_mlp"])
def test_fields_have_defaults(name):
    projector = PROJECTORS[name]
    fields = PROJECTORS.fields(name)
    assert inspect.Parameter.empty not in fields.values()
    counted = inspect.signature(projector.num_output_tokens).parameters
    for field in fields.keys() & counted.keys():
        assert counted[field].default == fields[field]
    with torch.no_grad():
        assert projector(VISION, TEXT)(features(16)).shape == (2, projector.num_output_tokens(16), TEXT)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("qformer2_64", {256: 64, 576: 64, 728: 64}),
        ("qformer4_36", {256: 36}),
        ("simple_in1_out0", {256: 64, 576: 144, 729: 169}),
        ("simple_in1_out1", {256: 36, 576: 100, 64: 4}),
        ("cheap_simple_in2_out2", {256: 36}),
        ("simple_in0_out0", {256: 64, 4: 1}),
        ("pool_mlp2x_gelu", {256: 64, 576: 144, 16: 4, 729: 169}),
    ],
)
def test_token_counts(kind, tokens):
    fields = canonical_projector({"type": kind})
    projector = PROJECTORS[fields.pop("type")]
    assert {given: projector.num_output_tokens(given, **fields) for given in tokens} == tokens


@pytest.mark.parametrize(("kind", "tokens", "num_output_tokens"), SMALL)
def test_gradients_reach_every_weight(kind, tokens, num_output_tokens):
    projector = build(kind).train()
    x = features(tokens).requires_grad_()
    output = projector(x)
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert x.grad.abs().max() > 0
    for name, parameter in projector.named_parameters():
        # A key bias adds the same number to all scores of a query, and softmax takes it away: its gradient is 0.
        if not name.endswith(".key.bias"):
            assert parameter.grad.abs().max() > 0, name


def test_new_queries_differ():
    queries = PROJECTORS["older_qformer"](VISION, TEXT, num_query_tokens=4).query_tokens.detach()[0]
    assert torch.pdist(queries).min() > 0.01


@pytest.mark.parametrize(("kind", "tokens", "num_output_tokens"), SMALL)
def test_rows_of_a_batch_are_independent(kind, tokens, num_output_tokens):
    projector, x = build(kind), features(tokens, batch=3)
    with torch.no_grad():
        alone = torch.cat([projector(row[None]) for row in x])
        torch.testing.assert_close(projector(x), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "tokens", "num_output_tokens"), SMALL)
def test_half_precision(kind, tokens, num_output_tokens):
    projector, x = build(kind), features(tokens)
    with torch.no_grad():
        expected = projector(x)
        output = projector.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("kind", ["qformer2_4", "simple_in1_out1", "pool_mlp2x_gelu"])
def test_compiles_in_one_graph(kind):
    projector = build(kind)
    torch.compiler.reset()
    compiled = torch.compile(projector, fullgraph=True, backend="eager")
    with torch.no_grad():
        for tokens in (64, 100):
            torch.testing.assert_close(compiled(features(tokens)), projector(features(tokens)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["simple_in1_out0", "simple_in1_out1", "pool_mlp2x_gelu"])
@pytest.mark.parametrize("tokens", [257, 728, 1, 2])
def test_tokens_that_are_no_grid_are_refused(kind, tokens):
    fields = canonical_projector({"type": kind})
    name = fields.pop("type")
    for refused in (
        lambda: PROJECTORS[name].num_output_tokens(tokens, **fields),
        lambda: build(kind)(features(tokens)),
    ):
        with pytest.raises(ValueError, match=rf"'{name}' pools a square grid .* {tokens} tokens.*strategy='patch'"):
            refused()


@pytest.mark.parametrize("tokens", [16, 36, 49])
def test_a_grid_that_is_too_small_for_the_second_convolution(tokens):
    for refused in (
        lambda: PROJECTORS["simple"].num_output_tokens(tokens, num_blocks_out=1),
        lambda: build("simple_in0_out1")(features(tokens)),
    ):
        with pytest.raises(ValueError, match=rf"num_blocks_out=1 needs a grid of at least 8 x 8 .* {tokens} tokens"):
            refused()


@pytest.mark.parametrize("name", ["older_qformer", "simple"])
@pytest.mark.parametrize(("narrow", "widths"), [(False, (32, 48)), (True, (48, 32))])
def test_a_width_that_cannot_be_split(name, narrow, widths):
    width = "vision_hidden_size" if narrow else "text_hidden_size"
    with pytest.raises(ValueError, match=rf"'{name}' with narrow={narrow} .* {width}=48.*32 attention heads"):
        PROJECTORS[name](*widths, narrow=narrow)
    assert PROJECTORS[name](*widths, narrow=not narrow)(features(16, widths[0])).shape[-1] == widths[1]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("older_qformer", {"num_hidden_layers": 0}, "num_hidden_layers as an integer of at least 1, got 0"),
        ("older_qformer", {"num_query_tokens": True}, "num_query_tokens as an integer of at least 1, got True"),
        ("older_qformer", {"narrow": 1}, "narrow as True or False, got 1"),
        ("simple", {"num_blocks_in": -1}, "num_blocks_in as an integer of at least 0, got -1"),
        ("simple", {"num_blocks_out": 1.0}, "num_blocks_out as an integer of at least 0, got 1.0"),
        ("pool_mlp", {"num_hidden_layers": 0}, "num_hidden_layers as an integer of at least 1, got 0"),
    ],
)
def test_wrong_fields(name, fields, message):
    with pytest.raises(ValueError, match=f"The projector '{name}' needs {message}"):
        PROJECTORS[name](VISION, TEXT, **fields)


@pytest.mark.parametrize("name", ["older_qformer", "simple", "pool_mlp"])
def test_wrong_features(name):
    projector = PROJECTORS[name](VISION, TEXT)
    for shape in ((2, 16, VISION + 1), (16, VISION)):
        with pytest.raises(ValueError, match=rf"'{name}' takes image features of shape \(batch, tokens, {VISION}\)"):
            projector(torch.zeros(shape))


# ---------------------------------------------------------------------------------------------------------------------
# Type strings
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_type_strings(kind):
    assert canonical_projector({"type": kind}) == TYPES[kind]
    assert canonical_projector({"image_projector_type": kind}) == TYPES[kind]
    config = MoellavaProjectorConfig(type=kind)
    assert {"type": config.type, **config.fields}.items() >= TYPES[kind].items()


@pytest.mark.parametrize(
    ("kind", "said", "message"),
    [
        (
            "qformer2_64",
            {"num_hidden_layers": 3},
            "'qformer2_64' means num_hidden_layers=2, but num_hidden_layers is 3",
        ),
        ("qformer2_64", {"mm_qformer_num_query_tokens": 32}, "means num_query_tokens=64, but num_query_tokens is 32"),
        ("qformer2_64", {"narrow": True}, "means narrow=False, but narrow is True"),
        ("cheap_qformer2_64", {"narrow": False}, "means narrow=True, but narrow is False"),
        ("simple_in1_out0", {"num_blocks_out": 1}, "means num_blocks_out=0, but num_blocks_out is 1"),
        ("pool_mlp2x_gelu", {"num_layers": 3}, "means num_hidden_layers=2, but num_hidden_layers is 3"),
        ("mlp2x_gelu", {"num_hidden_layers": 3}, "means num_hidden_layers=2, but num_hidden_layers is 3"),
    ],
)
def test_a_type_string_and_a_field_that_disagree(kind, said, message):
    with pytest.raises(ValueError, match=message):
        canonical_projector({"type": kind, **said})
    agreeing = canonical_projector({"type": kind})
    assert canonical_projector({**agreeing, "type": kind}) == agreeing


def test_the_wide_form_is_laid_over_the_narrow_one():
    assert stacked_projector({"type": "cheap_qformer2_64"}, {"type": "qformer2_64"})["narrow"] is False


@pytest.mark.parametrize(
    "kind", ["qformer2", "cheap_qformer", "qformer2_64_8", "simple_in1", "simple_out1", "pool_linear", "x"]
)
def test_unknown_type_strings(kind):
    with pytest.raises(ValueError, match=f"Unknown projector '{kind}'.*older_qformer.*pool_mlp.*simple"):
        MoellavaProjectorConfig(type=kind)


def test_a_registered_name_wins(monkeypatch):
    monkeypatch.setitem(PROJECTORS._classes, "qformer2_64", PROJECTORS["linear"])
    monkeypatch.setitem(PROJECTORS._classes, "mlp2x_gelu", PROJECTORS["identity"])
    assert canonical_projector({"type": "qformer2_64", "bias": False}) == {"type": "qformer2_64", "bias": False}
    assert canonical_projector({"type": "mlp2x_gelu"}) == {"type": "mlp2x_gelu"}


# ---------------------------------------------------------------------------------------------------------------------
# Weights under their older names
# ---------------------------------------------------------------------------------------------------------------------

OLDER = [kind for kind, *_ in SMALL] + ["linear", "mlp1x_gelu", "mlp3x_gelu"]


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("kind", OLDER)
def test_older_names_become_ours(kind):
    projector = build(kind)
    older = older_weights(kind, projector)
    renamed = legacy_projector_tensors(canonical_projector({"type": kind}), older)
    assert_same(renamed, projector.state_dict())


@pytest.mark.parametrize("kind", ["simple_in2_out3", "cheap_simple_in2_out3"])
def test_copies_of_shared_weights(kind):
    projector = build(kind)
    fields, older = canonical_projector({"type": kind}), older_weights(kind, projector)
    assert "block_out.5.mlp.fc2.bias" in older
    # A state dict names every run, named_parameters() the first, and a trainer that drops copies may keep any.
    first = {name: tensor for name, tensor in older.items() if not name.startswith(("block_in.2", "block_in.3"))}
    last = {name: tensor for name, tensor in older.items() if not name.startswith(("block_out.0", "block_out.1"))}
    for given in (older, first, last):
        assert_same(legacy_projector_tensors(fields, given), projector.state_dict())
    older["block_out.3.norm1.bias"] += 1
    with pytest.raises(ValueError, match="block_out.1.norm1.bias and block_out.3.norm1.bias differ"):
        legacy_projector_tensors(fields, older)


@pytest.mark.parametrize(
    ("kind", "unknown"),
    [
        ("linear", "0.weight"),
        ("mlp2x_gelu", "4.weight"),
        ("mlp2x_gelu", "1.weight"),
        ("identity", "weight"),
        ("qformer2_4", "qformer.encoder.layer.2.attention.attention.query.weight"),
        ("qformer2_4", "qformer.encoder.layer.0.intermediate.dense.weight"),
        ("qformer2_4", "proj_in.1.weight"),
        ("simple_in1_out0", "down2.weight"),
        ("simple_in1_out0", "block_out.0.conv.0.weight"),
        ("simple_in1_out1", "block_in.2.conv.0.weight"),
        ("simple_in1_out1", "block_in.1.attn.qkv.bias"),
        ("simple_in1_out1", "block_in.0.norm1.weight"),
        ("pool_mlp2x_gelu", "block.4.weight"),
        ("pool_mlp2x_gelu", "block.1.weight"),
        ("pool_mlp2x_gelu", "0.weight"),
    ],
)
def test_unknown_names_are_refused(kind, unknown):
    fields = canonical_projector({"type": kind})
    older = {} if kind == "identity" else older_weights(kind, build(kind))
    with pytest.raises(ValueError, match=f"'{fields['type']}'.* has no {unknown}, zzz.weight"):
        legacy_projector_tensors(fields, older | {unknown: torch.zeros(1), "zzz.weight": torch.zeros(1)})


def test_types_that_no_older_checkpoint_has():
    assert legacy_projector_tensors({"type": "identity"}, {}) == {}
    with pytest.raises(ValueError, match="No older checkpoint has a projector of the type 'perceiver'.*older_qformer"):
        legacy_projector_tensors({"type": "perceiver"}, {})


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------

PREFIXES = [
    "",
    "image_spatial_proj.",
    "mm_projector.image_spatial_proj.",
    "model.mm_projector.image_spatial_proj.",
    "transformer.mm_projector.image_spatial_proj.",
    "base_model.model.model.mm_projector.image_spatial_proj.",
    "model.multi_modal_projector.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["cheap_qformer2_4", "simple_in2_out1", "pool_mlp2x_gelu"])
def test_files_under_every_prefix(kind, prefix, tmp_path):
    projector, path = build(kind), tmp_path / "mm_projector.bin"
    older = {f"{prefix}{name}": tensor for name, tensor in older_weights(kind, projector).items()}
    if prefix:
        older["model.embed_tokens.weight"] = torch.zeros(3, 3)
    torch.save(older, path)
    fields = canonical_projector({"type": kind})
    read, tensors = read_projector(path, fields)
    assert read == fields
    assert_same(tensors, projector.state_dict())


@pytest.mark.parametrize("kind", [kind for kind, *_ in SMALL])
def test_a_file_tells_what_is_not_said(kind, tmp_path):
    path, fields = tmp_path / "projector.safetensors", canonical_projector({"type": kind})
    projector = build(kind)
    save_file(older_weights(kind, projector), path)
    read, tensors = read_projector(path, {"type": fields["type"]})
    if kind == "simple_in0_out0":
        fields["narrow"] = False
    assert read == fields
    assert_same(tensors, projector.state_dict())


@pytest.mark.parametrize("kind", ["cheap_qformer2_4", "qformer1_3"])
def test_a_qformer_is_known_by_its_file(kind, tmp_path):
    path, projector = tmp_path / "mm_projector.bin", build(kind)
    torch.save({f"model.mm_projector.image_spatial_proj.{k}": v for k, v in projector.state_dict().items()}, path)
    read, tensors = read_projector(path, {})
    assert read == canonical_projector({"type": kind})
    assert_same(tensors, projector.state_dict())


def test_a_pooled_mlp_is_known_by_its_file(tmp_path):
    path, projector = tmp_path / "mm_projector.bin", build("pool_mlp2x_gelu")
    torch.save({f"model.mm_projector.image_spatial_proj.{k}": v for k, v in projector.state_dict().items()}, path)
    read, tensors = read_projector(path, {})
    assert read == {"type": "pool_mlp", "num_hidden_layers": 2}
    assert_same(tensors, projector.state_dict())
    # Without MoE-LLaVA's name before them they may be anybody's MLP.
    torch.save(projector.state_dict(), path)
    assert read_projector(path, {})[0]["type"] == "mlp"


def test_blocks_whose_number_nobody_says_are_refused(tmp_path):
    path = tmp_path / "mm_projector.bin"
    torch.save(build("simple_in1_out1").state_dict(), path)
    with pytest.raises(ValueError, match="does not say how often its blocks run. Give the type, such as"):
        read_projector(path, {})


def test_a_file_with_unknown_names_is_named(tmp_path):
    path = tmp_path / "mm_projector.bin"
    torch.save(older_weights("simple_in2_out1", build("simple_in2_out1")), path)
    with pytest.raises(ValueError, match=r"mm_projector\.bin: The projector 'simple' .* has no block_in\.2\.conv\.0"):
        read_projector(path, canonical_projector({"type": "simple_in1_out1"}))


# ---------------------------------------------------------------------------------------------------------------------
# In a model
# ---------------------------------------------------------------------------------------------------------------------

ASK = """
import torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained({folder!r}, trust_remote_code=True).eval()
projector = model.model.multi_modal_projector
x = torch.randn(2, {tokens}, {width}, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    output = projector(x)
print(type(projector).__name__, tuple(output.shape), f"{{output.double().abs().sum().item():.4f}}")
"""


def wide_tower(parts, folder, image_size: int):
    """A CLIP tower like that of the fixtures, but 64 wide: the narrow forms need a multiple of 32."""
    parts.copy(parts.vision_tower("clip_vision", image_size=image_size), folder)
    config = CLIPVisionConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size = 64, 64
    torch.manual_seed(0)
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "image_size", "num_output_tokens"),
    [
        ("cheap_qformer1_4", 32, 4),
        ("qformer2_4", 32, 4),
        ("simple_in2_out0", 32, 4),
        ("simple_in1_out1", 64, 4),
        ("cheap_simple_in1_out1", 64, 4),
        ("pool_mlp2x_gelu", 32, 4),
    ],
)
def test_a_projector_file_in_a_model(parts, kind, image_size, num_output_tokens, tmp_path):
    language, tower = parts.language_model("llama"), wide_tower(parts, tmp_path / "tower", image_size)
    blank = load_pretrained_model(language, vision_tower=tower, projector_type=kind, device="cpu").model
    assert blank.config.image_seq_length == num_output_tokens
    own = blank.model.multi_modal_projector
    vision, text = own.vision_hidden_size, blank.config.text_config.hidden_size
    projector = build(kind, vision, text)
    path = tmp_path / "mm_projector.bin"
    older = older_weights(kind, projector)
    torch.save({f"model.mm_projector.image_spatial_proj.{name}": tensor for name, tensor in older.items()}, path)

    loaded = load_pretrained_model(
        language, vision_tower=tower, projector_config={"type": kind, "path": str(path)}, device="cpu"
    )
    model = loaded.model
    assert_same(model.model.multi_modal_projector.state_dict(), projector.state_dict())
    assert loaded.model.processor.num_image_tokens == num_output_tokens

    # Into a checkpoint that has another projector, too.
    plain = load_pretrained_model(language, vision_tower=tower, device="cpu").model
    plain.save_pretrained(tmp_path / "plain")
    changed = load_pretrained_model(
        tmp_path / "plain", projector_config={"type": kind, "path": str(path)}, device="cpu"
    ).model
    assert_same(changed.model.multi_modal_projector.state_dict(), projector.state_dict())

    # And to a process that has no moellava.
    model.save_pretrained(tmp_path / "model")
    again = load_pretrained_model(tmp_path / "model", device="cpu").model
    assert again.config.projector_config.to_dict() == model.config.projector_config.to_dict()
    assert_same(again.model.multi_modal_projector.state_dict(), projector.state_dict())
    tokens = (image_size // 8) ** 2
    with torch.no_grad():
        output = projector(features(tokens, vision))
    expected = f"{type(projector).__name__} {tuple(output.shape)} {output.double().abs().sum().item():.4f}"
    if kind in ("qformer2_4", "simple_in1_out1", "pool_mlp2x_gelu"):
        printed = run_python(ASK.format(folder=str(tmp_path / "model"), tokens=tokens, width=vision))
        assert printed.splitlines()[-1] == expected


def test_a_tower_whose_tokens_make_no_grid(parts):
    with pytest.raises(ValueError, match="'pool_mlp' pools a square grid of patches.*17 tokens"):
        load_pretrained_model(
            parts.language_model("llama"),
            vision_tower=parts.vision_tower("clip"),
            projector_type="pool_mlp2x_gelu",
            vision_feature_select_strategy="full",
            device="cpu",
        )


def test_the_config_is_saved_under_our_names(tmp_path):
    config = MoellavaConfig(projector_config={"type": "cheap_qformer2_64"}, **_small_parts())
    config.save_pretrained(tmp_path)
    again = MoellavaConfig.from_pretrained(tmp_path)
    assert again.projector_config.type == "older_qformer"
    assert again.projector_config.fields == {"num_hidden_layers": 2, "num_query_tokens": 64, "narrow": True}
    assert again.image_seq_length == 64


def _small_parts() -> dict:
    return {
        "text_config": {"model_type": "llama", "hidden_size": 64, "vocab_size": 100, "num_hidden_layers": 1},
        "vision_config": {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
        "image_token_id": 99,
    }
