# SPDX-License-Identifier: Apache-2.0
"""The sparse block, its routing and its loss, against a reference that is written out token by token in float64."""

import copy
import inspect
import math
import threading
import types
from fractions import Fraction

import pytest
import torch
from parts import pictures
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    NemotronConfig,
    PhiConfig,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.nemotron.modeling_nemotron import NemotronMLP
from transformers.models.phi.modeling_phi import PhiMLP

from moellava import MoellavaConfig, MoellavaForCausalLM, MoellavaMoeConfig, load_pretrained_model, upcycle
from moellava.building.expert_weights import stacked_experts
from moellava.parts import experts_moellava
from moellava.parts.experts_moellava import EXPERTS_FUNCTIONS
from moellava.parts.modular_experts_moellava import experts_apart, modular_experts
from moellava.parts.moe_block_moellava import DenseForm, RouterLogits, SparseMoeBlock, TokenMask
from moellava.parts.sparse_layers_moellava import load_balancing_loss, token_mask


HIDDEN, INNER, EXPERTS = 16, 24, 5  # grouped_mm takes widths that are multiples of 8
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "sorted_mm")

SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": 2}
# The four forms of a dense MLP, by the families that have them, and their activations.
DENSE = {
    "gated": lambda: LlamaMLP(LlamaConfig(**SIZES)),
    "gated with bias": lambda: LlamaMLP(LlamaConfig(**SIZES, mlp_bias=True)),
    "plain": lambda: NemotronMLP(NemotronConfig(**SIZES)),
    "plain with bias": lambda: PhiMLP(PhiConfig(**SIZES)),
}
FORMS = tuple(DENSE)
ACTIVATIONS = {
    "gated": F.silu,
    "gated with bias": F.silu,
    "plain": lambda x: F.relu(x) ** 2,
    "plain with bias": lambda x: F.gelu(x, approximate="tanh"),
}


def tiny_config(**moe) -> MoellavaConfig:
    text = LlamaConfig(**SIZES, vocab_size=20, initializer_range=0.3)
    vision = CLIPVisionConfig(**SIZES, image_size=16, patch_size=8, projection_dim=8)
    return MoellavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=19,
        vision_feature_layer=-1,
        moe_config={"num_experts": EXPERTS, "layers": "dense", **moe},
    )


def make_block(form: str = "gated", *, implementation: str = "eager", seed: int = 0, **moe) -> SparseMoeBlock:
    """A block whose weights are all random, biases too."""
    config = tiny_config(**moe)
    config._experts_implementation = implementation
    generator = torch.Generator().manual_seed(seed)
    block = SparseMoeBlock(config, DENSE[form]())
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return block.eval()


def random_tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1000 + seed))


# ---------------------------------------------------------------------------------------------------------------------
# The reference
# ---------------------------------------------------------------------------------------------------------------------


def reference_mlp(form: str, weights: dict, token: torch.Tensor) -> torch.Tensor:
    """A dense MLP of one token, from its own named weights."""
    act = ACTIVATIONS[form]
    if form.startswith("gated"):
        gate = weights["gate_proj.weight"] @ token + weights.get("gate_proj.bias", 0)
        up = weights["up_proj.weight"] @ token + weights.get("up_proj.bias", 0)
        return weights["down_proj.weight"] @ (act(gate) * up) + weights.get("down_proj.bias", 0)
    first, second = ("fc1", "fc2") if "fc1.weight" in weights else ("up_proj", "down_proj")
    hidden = act(weights[f"{first}.weight"] @ token + weights.get(f"{first}.bias", 0))
    return weights[f"{second}.weight"] @ hidden + weights.get(f"{second}.bias", 0)


def expert_of(form: str, weights: dict, expert: int) -> dict:
    """The weights of one expert, under the names of a dense MLP."""
    experts = {name.removeprefix("experts."): w[expert] for name, w in weights.items() if name.startswith("experts.")}
    dense = {"down_proj.weight": experts["down_proj"]}
    if "down_proj_bias" in experts:
        dense["down_proj.bias"] = experts["down_proj_bias"]
    if form.startswith("gated"):
        dense["gate_proj.weight"], dense["up_proj.weight"] = (
            experts["gate_up_proj"][:INNER],
            experts["gate_up_proj"][INNER:],
        )
        if "gate_up_proj_bias" in experts:
            dense["gate_proj.bias"] = experts["gate_up_proj_bias"][:INNER]
            dense["up_proj.bias"] = experts["gate_up_proj_bias"][INNER:]
    else:
        dense["up_proj.weight"] = experts["up_proj"]
        if "up_proj_bias" in experts:
            dense["up_proj.bias"] = experts["up_proj_bias"]
    return dense


def kept_choices(choices: list[list[int]], is_token: list[bool], num_experts: int, factor, minimum: int):
    """Which choices of which tokens their experts have room for: `{(token, place)}`."""
    num_choices = len(choices[0])
    everything = {(token, place) for token in range(len(choices)) for place in range(num_choices)}
    if factor is None:
        return everything
    share = Fraction(num_choices * sum(is_token), num_experts) * Fraction(str(factor))
    capacity = max(math.ceil(share), minimum)
    load = dict.fromkeys(range(num_experts), 0)
    kept = {(token, place) for token, place in everything if not is_token[token]}
    for place in range(num_choices):
        for token in range(len(choices)):
            if is_token[token] and load[choices[token][place]] < capacity:
                load[choices[token][place]] += 1
                kept.add((token, place))
    return kept


def reference(form: str, weights: dict, tokens: torch.Tensor, moe: MoellavaMoeConfig, factor=None, is_token=None):
    """The block, token by token. Everything in float64, with gradients."""
    scores = []
    for token in tokens:
        logits = weights["gate.weight"] @ token + weights.get("gate.bias", 0)
        exponentials = [math.e**logit for logit in logits]
        scores.append([e / sum(exponentials) for e in exponentials])
    choices = [
        sorted(range(moe.num_experts), key=lambda expert, own=own: -own[expert].item())[: moe.num_experts_per_tok]
        for own in scores
    ]
    is_token = [True] * len(tokens) if is_token is None else is_token
    kept = kept_choices(choices, is_token, moe.num_experts, factor, moe.min_capacity)
    outputs = []
    for t, token in enumerate(tokens):
        own = {e: scores[t][e] for place, e in enumerate(choices[t]) if (t, place) in kept}
        if moe.norm_topk_prob:
            own = {e: p / sum(own.values()) for e, p in own.items()}
        output = torch.zeros_like(token)
        for expert, weight in own.items():
            output = output + weight * reference_mlp(form, expert_of(form, weights, expert), token)
        if moe.use_residual:
            a, b = (math.e**x for x in weights["coefficient.weight"] @ token + weights["coefficient.bias"])
            mlp = {name.removeprefix("mlp."): w for name, w in weights.items() if name.startswith("mlp.")}
            output = a / (a + b) * output + b / (a + b) * reference_mlp(form, mlp, token)
        if moe.use_meta_expert:
            meta = {name.removeprefix("meta_expert."): w for name, w in weights.items() if "meta_expert." in name}
            output = output + reference_mlp(form, meta, token)
        outputs.append(output)
    return torch.stack(outputs), kept


def assert_near(
    found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5, name: str = "", floor: float = 1e-7
):
    """Compares relatively to the size of what is expected, which may be 0."""
    assert found.shape == expected.shape, name
    error = (found.double() - expected.double()).norm()
    assert error <= tolerance * expected.double().norm() + floor, (name, error.item(), expected.norm().item())


def check_against_reference(block, form, tokens, *, is_token=None) -> int:
    """Compares forward and every gradient; returns how many choices were dropped."""
    tolerance, floor = 1e-5, 1e-5
    moe = block.experts.config.moe_config
    factor = moe.capacity_factor if block.training else moe.eval_capacity_factor
    wide = {name: p.detach().double().requires_grad_() for name, p in block.named_parameters()}
    wide_tokens = tokens.detach().double().requires_grad_()
    expected, kept = reference(form, wide, wide_tokens, moe, factor, is_token)
    rows = torch.ones(len(tokens), dtype=torch.bool) if is_token is None else torch.tensor(is_token)
    direction = torch.randn(expected.shape, dtype=torch.double, generator=torch.Generator().manual_seed(7))
    direction[~rows] = 0  # what comes of padding counts nowhere
    (expected * direction).sum().backward()

    own_tokens = tokens.detach().clone().requires_grad_()
    for parameter in block.parameters():
        parameter.grad = None
    with TokenMask(None if is_token is None else rows.long()):
        found = block(own_tokens[None])[0]
    (found * direction.float()).sum().backward()

    assert_near(found[rows], expected[rows].detach(), tolerance, "output", floor)
    assert_near(own_tokens.grad, wide_tokens.grad, tolerance, "tokens", floor)
    for name, parameter in block.named_parameters():
        expected_grad = torch.zeros_like(wide[name]) if wide[name].grad is None else wide[name].grad
        if parameter.requires_grad:
            assert_near(parameter.grad, expected_grad, tolerance, name, floor)
    return len(tokens) * block.top_k - len(kept)


VARIANTS = {
    "bare": {},
    "router bias": {"router_bias": True},
    "residual": {"use_residual": True},
    "meta expert": {"use_meta_expert": True},
    "residual and meta expert": {"use_residual": True, "use_meta_expert": True, "router_bias": True},
    "otherwise normalised": {"norm_topk_prob": None},  # the opposite of the default, see below
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_block_equals_the_reference(form, k, variant):
    fields = dict(VARIANTS[variant])
    if "norm_topk_prob" in fields:
        fields["norm_topk_prob"] = k == 1
    implementation = IMPLEMENTATIONS[(FORMS.index(form) + k + list(VARIANTS).index(variant)) % 4]
    block = make_block(form, implementation=implementation, seed=k, num_experts_per_tok=k, **fields)
    assert check_against_reference(block, form, random_tokens(9, seed=k)) == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_experts_implementation_equals_the_reference(form, implementation):
    for k in (1, 2, 3):
        block = make_block(form, implementation=implementation, seed=10 + k, num_experts_per_tok=k)
        check_against_reference(block, form, random_tokens(9, seed=k))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_capacity_equals_the_reference(k, padded):
    """Over random routers, tight capacities and both modes; choices are dropped before the weights are normalised."""
    dropped = 0
    for seed, (factor, minimum, form) in enumerate(
        [(0.5, 0, "gated"), (1.0, 0, "plain with bias"), (0.3, 2, "gated"), (1.1, 1, "plain"), (4.0, 0, "gated")]
    ):
        fields = {"router_bias": True, "use_residual": seed % 2 == 0, "use_meta_expert": seed == 1}
        block = make_block(
            form, implementation=IMPLEMENTATIONS[seed % 4], seed=20 + seed, num_experts_per_tok=k,
            capacity_factor=factor, eval_capacity_factor=factor + 0.5, min_capacity=minimum, **fields,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        is_token = (torch.rand(14, generator=generator) < 0.6).tolist() if padded else None
        for training in (True, False):
            block.train(training)
            dropped += check_against_reference(block, form, random_tokens(14, seed=30 + seed), is_token=is_token)
    assert dropped > 10


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "factor", "minimum", "expected"),
    [
        (30, 3, 1, 1.1, 0, 11),  # 30 / 3 * 1.1 is 11.000000000000002 in floating point
        (10, 3, 1, 1.5, 0, 5),
        (7, 4, 2, 1.5, 0, 6),  # 5.25
        (8, 4, 1, 1.0, 0, 2),
        (9, 4, 1, 1, 0, 3),
        (1, 4, 1, 1.0, 0, 1),
        (1, 4, 2, 0.1, 4, 1),  # DeepSpeed's default of min_capacity with one token
        (12, 4, 1, 0.5, 4, 4),
        (5, 5, 1, 3.3, 0, 4),
        (6, 4, 2, 2.0, 0, 6),  # with 4 experts, 2 choices and a factor of 2 nothing is dropped
    ],
)
def test_capacity_is_rounded_up_exactly(tokens, experts, k, factor, minimum, expected):
    """All tokens want the same experts, in the same order; the first ones get them."""
    block = make_block(
        num_experts=experts, num_experts_per_tok=k, router_bias=True, eval_capacity_factor=factor, min_capacity=minimum
    )
    logits = torch.arange(experts).float().expand(tokens, experts)
    weights, index = block.route(logits)
    assert index.tolist() == [list(range(experts - 1, experts - 1 - k, -1))] * tokens
    kept = (weights > 0).sum(dim=0).tolist()
    assert kept == [min(expected, tokens)] * k
    assert (weights[: kept[0]] > 0).all()


def test_first_choices_go_before_second_ones():
    """Two experts, room for two each: a late first choice displaces an early second one."""
    block = make_block(num_experts=2, num_experts_per_tok=2, eval_capacity_factor=0.5)
    # Tokens 0, 1 and 3 want expert 0 first, token 2 expert 1.
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [2.0, 1.0]])
    weights, index = block.route(logits)
    by_expert = torch.zeros(4, 2).scatter(1, index, weights)
    # Expert 0 is full with tokens 0 and 1; expert 1 takes token 2, then the first second choice, token 0's.
    p = 1 / (1 + math.exp(-1))
    expected = torch.tensor([[p, 1 - p], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert torch.allclose(by_expert, expected, atol=1e-6)


def test_dropped_tokens_are_left_to_the_residual_stream():
    block = make_block(num_experts_per_tok=2, eval_capacity_factor=0.01)
    tokens = random_tokens(6)
    block.gate.weight.data[1:] = block.gate.weight.data[:1] - 0.1  # everybody likes the same experts, or dislikes them
    output = block(tokens[None])[0]
    weights, _ = block.route(block.gate(tokens))
    dropped = (weights == 0).all(dim=-1)
    assert 0 < dropped.sum() < 6
    assert (output[dropped] == 0).all()
    assert (output[~dropped] != 0).any()


# ---------------------------------------------------------------------------------------------------------------------
# Experts implementations
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_all_experts_implementations_agree(form, dtype):
    for k, experts in ((1, 4), (2, 8), (3, 4)):
        results = {}
        for implementation in IMPLEMENTATIONS:
            block = make_block(form, implementation=implementation, num_experts=experts, num_experts_per_tok=k)
            block.to(dtype)
            tokens = random_tokens(17).to(dtype).requires_grad_()
            output = block(tokens[None])
            (output * torch.linspace(-1, 1, HIDDEN).to(dtype)).sum().backward()
            results[implementation] = {"output": output.detach(), "tokens": tokens.grad} | {
                name: parameter.grad for name, parameter in block.named_parameters()
            }
        tolerance = 2e-6 if dtype == torch.float32 else 2e-2
        for implementation in IMPLEMENTATIONS[1:]:
            assert results[implementation]["output"].dtype == dtype
            for name, value in results[implementation].items():
                assert_near(value, results["eager"][name], tolerance, f"{implementation} {name}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", ["gated", "plain with bias"])
def test_autocast(form, implementation):
    """The router stays in fp32, the experts compute in bf16."""
    block = make_block(form, implementation=implementation, num_experts_per_tok=2)
    tokens = random_tokens(8)
    expected, logits = block(tokens[None]), block.gate(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block.gate(tokens), logits)
        assert_near(block(tokens[None]).float(), expected.detach(), 3e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_tokens_to_one_expert(implementation):
    for form in FORMS:
        block = make_block(form, implementation=implementation, num_experts_per_tok=1, router_bias=True)
        block.gate.bias.data[3] = 50.0
        tokens = random_tokens(7)
        assert (block.route(block.gate(tokens))[1] == 3).all()
        check_against_reference(block, form, tokens)
        touched = block.experts.down_proj.grad.flatten(1).abs().sum(dim=1)
        assert touched[3] > 0
        assert touched[[0, 1, 2, 4]].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_64_experts_top_8(implementation):
    block = make_block(implementation=implementation, num_experts=64, num_experts_per_tok=8)
    check_against_reference(block, "gated", random_tokens(6))
    block = make_block(
        implementation=implementation,
        num_experts=64,
        num_experts_per_tok=8,
        eval_capacity_factor=1.0,
        use_residual=True,
    )
    assert check_against_reference(block, "gated", random_tokens(6)) > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (3, 2), (1, 3), (2, 0), (0, 4)])
def test_shapes(implementation, shape):
    """A batch of three was mistaken for a tuple by the older code; one token is a decoding step."""
    for fields in ({}, {"use_residual": True, "use_meta_expert": True}, {"eval_capacity_factor": 1.0}):
        block = make_block(implementation=implementation, num_experts_per_tok=2, **fields)
        tokens = random_tokens(math.prod(shape)).view(*shape, HIDDEN)
        if tokens.numel() == 0 and implementation != "sorted_mm":
            continue  # transformers' own do not all take it
        output = block(tokens)
        assert output.shape == tokens.shape
        if tokens.numel() and "eval_capacity_factor" not in fields:
            each = torch.stack([block(token.view(1, 1, -1)).view(-1) for token in tokens.view(-1, HIDDEN)])
            assert_near(output.view(-1, HIDDEN), each, 1e-5)


def test_the_function_of_later_code_is_not_that_of_earlier_code():
    """Code of another generation is loaded: neither it nor what it registers changes a block that is there."""
    block = make_block(implementation="sorted_mm", num_experts_per_tok=2)
    tokens = random_tokens(5)[None]
    expected = block(tokens)
    assert "sorted_mm" not in type(EXPERTS_FUNCTIONS)._global_mapping
    source = inspect.getsource(experts_moellava).replace("* weight for place", "* weight * 2 for place")
    other = types.ModuleType("later_experts_moellava")
    exec(compile(source, experts_moellava.__file__, "exec"), other.__dict__)
    config = block.experts.config
    later = make_block(implementation="sorted_mm", num_experts_per_tok=2)
    later.experts = other.GatedExperts(
        config,
        config.moe_config.num_experts,
        block.experts.hidden_size,
        block.experts.intermediate_size,
        block.experts.act_fn,
    ).eval()
    later.load_state_dict(block.state_dict())
    assert_near(later(tokens), 2 * expected.detach(), 1e-6)
    assert torch.equal(block(tokens), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:1] + IMPLEMENTATIONS[2:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 2, 3])
@torch.no_grad()
def test_equal_experts_add_up_to_one_in_16_bits(k, dtype, implementation):
    block = make_block(implementation=implementation, num_experts_per_tok=k, norm_topk_prob=True, use_residual=True)
    block.mlp.to(dtype)
    weights = block.mlp.state_dict()
    block.experts.to(dtype)
    block.experts.gate_up_proj.data[:] = torch.cat([weights["gate_proj.weight"], weights["up_proj.weight"]])
    block.experts.down_proj.data[:] = weights["down_proj.weight"]
    tokens = random_tokens(64).to(dtype)[None]
    assert torch.equal(block(tokens), block.mlp(tokens))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_equal_experts_are_one_in_bf16_as_modules_and_in_what_tokens_learn(form, k):
    """As modules of linear layers, as in a quantised model, too; and the gradient of the input, as the dense MLP's."""
    mlp = DENSE[form]().to(torch.bfloat16)
    weights = {name: torch.randn(p.shape).to(torch.bfloat16) for name, p in mlp.named_parameters()}
    mlp.load_state_dict(weights)
    tokens = random_tokens(64).to(torch.bfloat16)[None].requires_grad_()
    expected = mlp(tokens)
    cotangent = torch.randn(expected.shape).to(torch.bfloat16)
    (learnt,) = torch.autograd.grad(expected, tokens, cotangent)
    stacks = {f"experts.{name}": t for name, t in stacked_experts(DenseForm(mlp), [weights] * EXPERTS).items()}
    gate = {"gate.weight": torch.zeros(EXPERTS, HIDDEN)}  # equal choices: weights of exactly 1 / k
    config = tiny_config(num_experts_per_tok=k, norm_topk_prob=True)
    with modular_experts():
        modular = SparseMoeBlock(config, copy.deepcopy(mlp))
    modular.experts.to(torch.bfloat16)
    prefix = "layers.0.mlp."
    apart = experts_apart({prefix + name: tensor for name, tensor in (stacks | gate).items()})
    modular.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in apart.items()})
    blocks = {"modules": modular}
    for implementation in ("eager", "sorted_mm"):
        config = tiny_config(num_experts_per_tok=k, norm_topk_prob=True)
        config._experts_implementation = implementation
        blocks[implementation] = SparseMoeBlock(config, copy.deepcopy(mlp))
        blocks[implementation].experts.to(torch.bfloat16)
        blocks[implementation].load_state_dict(stacks | gate)
    for name, block in blocks.items():
        found = block.eval()(tokens)
        assert torch.equal(found, expected), name
        (gradient,) = torch.autograd.grad(found, tokens, cotangent)
        # A sum of rounded ones: of the experts, and, of the dense MLP, of its gate and its other projection.
        assert_near(gradient.float(), learnt.float(), 0.02)


@torch.no_grad()
def test_capacity_in_evaluation_counts_each_row_alone():
    block = make_block(num_experts_per_tok=2, eval_capacity_factor=0.6, capacity_factor=0.6)
    tokens = random_tokens(36).view(3, 12, HIDDEN)
    alone = torch.cat([block(row[None]) for row in tokens])
    assert_near(block(tokens), alone, 1e-6)
    # Padding, on either side, changes nothing of a row.
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[0, 12:] = mask[1:, :4] = 0
    wide = torch.randn(3, 16, HIDDEN, generator=torch.Generator().manual_seed(3))
    wide[mask.bool()] = tokens.flatten(0, 1)
    with TokenMask(mask.flatten()):
        assert_near(block(wide)[mask.bool()], alone.flatten(0, 1), 1e-6)
    block.train()
    assert not torch.allclose(block(tokens), alone, atol=1e-3)  # training counts over the batch


# ---------------------------------------------------------------------------------------------------------------------
# Training alone: jitter, sampling
# ---------------------------------------------------------------------------------------------------------------------


def test_jitter_is_multiplied_in_training_alone():
    block = make_block(num_experts_per_tok=1, router_jitter_noise=0.1)
    tokens = random_tokens(50)
    expected = block.gate(tokens)
    assert torch.equal(expected, F.linear(tokens, block.gate.weight))
    block.train()
    torch.manual_seed(0)
    first = block.gate(tokens)
    assert not torch.allclose(first, expected)
    torch.manual_seed(0)
    assert torch.equal(block.gate(tokens), first)
    assert not torch.equal(block.gate(tokens), first)
    # Of one input at a time, the noise shows.
    block.gate.weight.data = torch.eye(EXPERTS, HIDDEN)
    noise = block.gate(torch.ones(2000, HIDDEN))
    assert noise.min() >= 0.9
    assert noise.max() <= 1.1
    assert abs(noise.mean() - 1) < 0.005
    assert noise.min() < 0.905 < 1.095 < noise.max()
    # The experts get the tokens as they are.
    block.experts.forward = lambda tokens, index, weights: tokens
    assert torch.equal(block(tokens[None])[0], tokens)
    # Without jitter no random number is drawn: what is drawn for something else stays what it was.
    block = make_block(num_experts_per_tok=1).train()
    state = torch.get_rng_state()
    assert torch.equal(block.gate(tokens), F.linear(tokens, block.gate.weight))
    assert torch.equal(torch.get_rng_state(), state)


def test_second_expert_is_sampled_in_training_alone():
    block = make_block(num_experts_per_tok=2, sample_second_expert=True)
    logits = torch.tensor([[0.3, 2.0, 1.0, -0.5, 0.6]])
    weights, index = block.route(logits)
    assert index.tolist() == [[1, 2]]
    block.train()
    torch.manual_seed(0)
    count = 20000
    weights, index = block.route(logits.expand(count, -1))
    assert (index[:, 0] == 1).all()
    probabilities = logits[0].softmax(-1)
    rest = probabilities.clone()
    rest[1] = 0
    found = torch.bincount(index[:, 1], minlength=EXPERTS) / count
    assert torch.allclose(found, rest / rest.sum(), atol=0.015)  # Gumbel noise draws from the softmax of the others
    chosen = probabilities[index]
    assert torch.allclose(weights, chosen / chosen.sum(-1, keepdim=True), atol=1e-6)
    torch.manual_seed(0)
    assert torch.equal(block.route(logits.expand(count, -1))[1], index)
    assert not torch.equal(block.route(logits.expand(count, -1))[1], index)


def test_evaluation_is_deterministic():
    block = make_block(num_experts_per_tok=2, sample_second_expert=True, router_jitter_noise=0.3)
    tokens = random_tokens(20)[None]
    assert torch.equal(block(tokens), block(tokens))
    plain = make_block(num_experts_per_tok=2)
    assert torch.equal(block(tokens), plain(tokens))
    block.train()
    assert not torch.equal(block(tokens), block(tokens))


def test_frozen_router():
    block = make_block(freeze_router=True, router_bias=True)
    assert not any(parameter.requires_grad for parameter in block.gate.parameters())
    assert all(parameter.requires_grad for parameter in block.experts.parameters())
    check_against_reference(block, "gated", random_tokens(5))
    assert block.gate.weight.grad is None


# ---------------------------------------------------------------------------------------------------------------------
# The load-balancing loss
# ---------------------------------------------------------------------------------------------------------------------


def reference_loss(router_logits, is_token=None) -> float:
    """`E * sum(mean probability * share of first choices)` per layer, summed over the layers, in Python's floats."""
    total = 0.0
    for logits in router_logits:
        rows = [row.double().tolist() for i, row in enumerate(logits) if is_token is None or is_token[i]]
        experts = len(rows[0])
        mean, share = [0.0] * experts, [0.0] * experts
        for row in rows:
            exponentials = [math.exp(logit) for logit in row]
            for expert in range(experts):
                mean[expert] += exponentials[expert] / sum(exponentials) / len(rows)
            share[row.index(max(row))] += 1 / len(rows)
        total += experts * sum(m * s for m, s in zip(mean, share, strict=True))
    return total


def test_loss_formula():
    generator = torch.Generator().manual_seed(0)
    for experts in (2, 4, 7):
        logits = tuple(torch.randn(30, experts, generator=generator) * 2 for _ in range(3))
        assert load_balancing_loss(logits).item() == pytest.approx(reference_loss(logits), rel=1e-5)
        mask = torch.rand(30, generator=generator) < 0.5
        expected = reference_loss(logits, mask.tolist())
        for form in (mask, mask.long(), mask.float(), mask.to(torch.int32)):
            assert load_balancing_loss(logits, form).item() == pytest.approx(expected, rel=1e-5)


def test_loss_is_one_per_layer_when_the_load_is_even():
    even = 3.0 * torch.eye(4).repeat(5, 1)
    for layers in (1, 2, 16):
        assert load_balancing_loss((even,) * layers).item() == pytest.approx(layers, rel=1e-6)
    collapsed = torch.tensor([[100.0, 0, 0, 0]]).repeat(20, 1)
    assert load_balancing_loss((collapsed,)).item() == pytest.approx(4.0)


def test_loss_gradient_evens_the_load():
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(4, HIDDEN, generator=generator) + torch.tensor([[2.0], [0], [0], [0]])).requires_grad_()
    tokens = torch.randn(200, HIDDEN, generator=generator) + 0.5
    before = load_balancing_loss((tokens @ weight.T,)).item()
    optimizer = torch.optim.Adam([weight], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        load_balancing_loss((tokens @ weight.T,)).backward()
        optimizer.step()
    after = load_balancing_loss((tokens @ weight.T,)).item()
    assert before > 2
    assert after < 1.2


@pytest.mark.parametrize("mask", [None, torch.tensor([1])])
def test_the_loss_of_one_token_alone(mask):
    """A step of generation: its share is all of it."""
    logits = (torch.tensor([[2.0, 0.0, 1.0]]),)
    assert abs(load_balancing_loss(logits, mask).item() - reference_loss(logits)) < 1e-6


def test_padding_alone_gives_no_loss():
    assert load_balancing_loss((torch.randn(4, 3),), torch.zeros(4)).item() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Within a model
# ---------------------------------------------------------------------------------------------------------------------

TEXT = ["<image> What is it?", "No picture here, only words.", "Is <image> like <image> or not?"]


@pytest.fixture(scope="module")
def dense(parts) -> MoellavaForCausalLM:
    return load_pretrained_model(
        parts.language_model("llama", padded_rows=1), mm_vision_tower=parts.vision_tower("clip"), device="cpu"
    ).model


@torch.no_grad()
def told_apart(model: MoellavaForCausalLM, seed: int = 0) -> MoellavaForCausalLM:
    """Makes different experts of those that upcycling left alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".mlp." in name and ("experts." in name or "gate." in name or "coefficient." in name):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def sparse_model(dense, **fields) -> MoellavaForCausalLM:
    torch.manual_seed(0)
    return told_apart(upcycle(dense, **{"num_experts": 4, "num_experts_per_tok": 2, "layers": "sparse"} | fields))


@pytest.fixture(scope="module")
def sparse(dense) -> MoellavaForCausalLM:
    return sparse_model(dense)


def prepared(model, text=TEXT) -> dict:
    images = pictures(3)
    return model.processor(images=[images[:1], [], images[1:]], text=text, padding=True, return_tensors="pt")


def with_positions(inputs: dict) -> dict:
    """Positions that do not count padding, as `generate` makes them."""
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)}


def wider(inputs: dict, columns: int, pad_token_id: int) -> dict:
    """The same rows, padded to the left by more columns."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return {
        **inputs,
        "input_ids": torch.cat([ids.new_full((len(ids), columns), pad_token_id), ids], dim=1),
        "attention_mask": torch.cat([mask.new_zeros(len(ids), columns), mask], dim=1),
    }


def labels_of(inputs: dict) -> torch.Tensor:
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def test_where_the_blocks_are(sparse):
    for index, layer in enumerate(sparse.model.language_model.layers):
        assert isinstance(layer.mlp, SparseMoeBlock) == (index % 2 == 0)
    assert sparse.config.moe_config.layers == [0, 2]


@torch.no_grad()
def test_router_logits_are_returned_when_asked_for(dense):
    model = sparse_model(dense, num_experts=6)
    inputs = prepared(model)
    tokens = inputs["input_ids"].numel()
    plain = model(**inputs)
    assert plain.router_logits is None
    assert plain.aux_loss is None
    asked = model(**inputs, output_router_logits=True)
    assert [tuple(logits.shape) for logits in asked.router_logits] == [(tokens, 6)] * 2
    assert all(logits.dtype == torch.float32 for logits in asked.router_logits)
    assert torch.equal(asked.logits, plain.logits)
    expected = reference_loss(asked.router_logits, inputs["attention_mask"].flatten().tolist())
    assert asked.aux_loss.item() == pytest.approx(expected, rel=1e-5)
    base = model.model(**inputs, output_router_logits=True)
    assert all(torch.equal(a, b) for a, b in zip(base.router_logits, asked.router_logits, strict=True))
    assert model.model(**inputs).router_logits is None
    as_tuple = model(**inputs, output_router_logits=True, return_dict=False)
    assert torch.equal(as_tuple[-2], asked.aux_loss)
    model.config.moe_config.output_router_logits = True
    assert torch.equal(model(**inputs).aux_loss, asked.aux_loss)
    assert model(**inputs, output_router_logits=False).aux_loss is None
    # What they are: the gate's scores of what the layer's MLP gets.
    seen = []
    block = model.model.language_model.layers[2].mlp
    handle = block.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    logits = model(**inputs).router_logits[1]
    handle.remove()
    assert torch.equal(logits, F.linear(seen[0].flatten(0, 1), block.gate.weight))


@torch.no_grad()
def test_loss_with_labels(dense, sparse):
    inputs = prepared(sparse)
    labels = labels_of(inputs)
    output = sparse(**inputs, labels=labels, output_router_logits=True)
    words = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert output.loss.item() == pytest.approx(words.item() + 0.01 * output.aux_loss.item(), rel=1e-6)
    quiet = sparse(**inputs, labels=labels, output_router_logits=False)
    assert quiet.loss == output.loss
    assert quiet.router_logits is None
    without = sparse_model(dense, router_aux_loss_coef=0)
    output = without(**inputs, labels=labels)
    words = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert output.loss.item() == pytest.approx(words.item(), rel=1e-6)
    with RouterLogits() as collected:
        without.model.language_model(input_ids=inputs["input_ids"])
    assert len(collected) == 2  # they can be had, and are not where the loss does not need them


def test_router_is_trained_by_the_loss(dense):
    for coefficient, trained in ((0.5, True), (0, False)):
        model = sparse_model(dense, num_experts_per_tok=4, num_experts=4, router_aux_loss_coef=coefficient)
        # All experts alike: only the load-balancing loss tells the router anything.
        for block in model.modules():
            if isinstance(block, SparseMoeBlock):
                for parameter in block.experts.parameters():
                    parameter.data = parameter.data[:1].expand_as(parameter).clone()
        inputs = prepared(model)
        model(**inputs, labels=labels_of(inputs)).loss.backward()
        gradients = [
            module.gate.weight.grad.abs().max() for module in model.modules() if isinstance(module, SparseMoeBlock)
        ]
        assert all((gradient > 1e-4) == trained for gradient in gradients)


def test_gradient_accumulation(dense):
    """Of a batch in parts, each part's load-balancing loss has the weight of its share of the labels; they sum to 1.

    sum of the parts' losses = (sum of all labels' losses) / N + coefficient * (sum over the parts of n / N * aux loss),
    with n labels in a part and N in all of them.
    """
    model = sparse_model(dense, router_aux_loss_coef=0.3)
    inputs = prepared(model)
    labels = labels_of(inputs)
    labels[0, :20] = -100  # the parts have different numbers of labels
    parts = [
        {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1], "labels": labels[:1],
         "pixel_values": inputs["pixel_values"][:1]},
        {"input_ids": inputs["input_ids"][1:], "attention_mask": inputs["attention_mask"][1:], "labels": labels[1:],
         "pixel_values": inputs["pixel_values"][1:]},
    ]  # fmt: skip
    counts = [(part["labels"][:, 1:] != -100).sum().item() for part in parts]
    assert counts[0] != counts[1]
    total = sum(counts)
    for num_items in (total, torch.tensor(total)):
        model.zero_grad()
        losses = []
        for part in parts:
            loss = model(**part, num_items_in_batch=num_items).loss
            loss.backward()
            losses.append(loss.item())
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        model.zero_grad()
        outputs = [model(**part, output_router_logits=True) for part in parts]
        words = sum(
            F.cross_entropy(output.logits[:, :-1].flatten(0, 1), part["labels"][:, 1:].flatten(), reduction="sum")
            for output, part in zip(outputs, parts, strict=True)
        )
        balance = sum(count / total * output.aux_loss for count, output in zip(counts, outputs, strict=True))
        expected = words / total + 0.3 * balance
        expected.backward()
        assert sum(losses) == pytest.approx(expected.item(), rel=1e-5)
        for name, gradient in found.items():
            assert_near(gradient, dict(model.named_parameters())[name].grad, 1e-4, name)


def test_accumulating_equal_parts_is_one_batch(dense):
    """The same rows twice, in two parts: exactly the loss and the gradient of the rows once."""
    model = sparse_model(dense, router_aux_loss_coef=0.3)
    inputs = prepared(model)
    labels = labels_of(inputs)
    whole = model(**inputs, labels=labels)
    whole.loss.backward()
    expected = model.model.language_model.layers[0].mlp.gate.weight.grad.clone()
    model.zero_grad()
    count = (labels[:, 1:] != -100).sum()
    total = 0
    for _ in range(2):
        loss = model(**inputs, labels=labels, num_items_in_batch=2 * count).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-6)
    assert_near(model.model.language_model.layers[0].mlp.gate.weight.grad, expected, 1e-5)


def test_gradient_accumulation_by_the_trainer(dense, tmp_path):
    """transformers' Trainer, which counts the labels of all parts: one step of plain gradient descent."""
    model = sparse_model(dense, router_aux_loss_coef=0.3)
    rows = [
        dict(model.processor(text=text, return_tensors="pt")) for text in ("Words.", "No picture here, only words.")
    ]
    rows = [{"input_ids": row["input_ids"][0], "labels": row["input_ids"][0]} for row in rows]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    counts = [len(row["labels"]) - 1 for row in rows]
    expected = sum(
        count / sum(counts) * model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss
        for count, row in zip(counts, rows, strict=True)
    )
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=1, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0, report_to="none", use_cpu=True,
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-3)
    for name, parameter in model.named_parameters():
        step = before[name] - parameter.detach()
        assert_near(step, 0.1 * gradients.get(name, torch.zeros_like(step)), 1e-3, name, floor=1e-5)
    assert gradients["model.language_model.layers.0.mlp.gate.weight"].norm() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_changes_no_row(sparse, implementation):
    sparse.set_experts_implementation(implementation)
    inputs = with_positions(prepared(sparse))
    expected = sparse(**inputs, output_router_logits=True)
    more = with_positions(wider(inputs, 5, sparse.processor.tokenizer.pad_token_id))
    padded = sparse(**more, output_router_logits=True)
    assert padded.aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=1e-5)
    images = list(inputs["pixel_values"].split([1, 0, 2]))
    for row in range(3):
        length = int(inputs["attention_mask"][row].sum())
        alone = {"input_ids": inputs["input_ids"][row : row + 1, -length:], "pixel_values": images[row]}
        if not len(images[row]):
            del alone["pixel_values"]
        logits = sparse(**alone).logits[0]
        assert_near(expected.logits[row, -length:], logits, 1e-5)
        assert_near(padded.logits[row, -length:], logits, 1e-5)
    sparse.set_experts_implementation("sorted_mm")


@torch.no_grad()
def test_padding_takes_no_capacity(dense):
    model = sparse_model(dense, eval_capacity_factor=0.6, layers="dense")
    inputs = with_positions(prepared(model))
    real = inputs["attention_mask"].bool()
    expected = model(**inputs, output_router_logits=True)
    more = with_positions(wider(inputs, 9, model.processor.tokenizer.pad_token_id))
    padded = model(**more, output_router_logits=True)
    assert_near(padded.logits[:, 9:][real], expected.logits[real], 1e-5)
    assert padded.aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=1e-5)
    # It does drop, and padding that is not marked would take room.
    loose = sparse_model(dense, layers="dense")
    assert not torch.allclose(loose(**inputs).logits[real], expected.logits[real], atol=1e-3)
    unmarked = model(**{**more, "attention_mask": None}).logits[:, 9:]
    assert not torch.allclose(unmarked[real], expected.logits[real], atol=1e-3)
    # Masks of what sees what say the same.
    size = inputs["input_ids"].shape[1]
    sees = torch.ones(size, size, dtype=torch.bool).tril() & inputs["attention_mask"].bool()[:, None, :]
    additive = torch.zeros(3, 1, size, size).masked_fill(~sees[:, None], torch.finfo(torch.float).min)
    for mask in (sees[:, None], additive):
        assert_near(model(**{**inputs, "attention_mask": mask}).logits[real], expected.logits[real], 1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_which_tokens_of_a_pass_are_padding(kind):
    """Five tokens are cached, of which one row has two of padding; two more come, of which the other row has one."""
    config = LlamaConfig(**SIZES)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config, max_cache_len=9)
    cache.update(torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8), 0)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])
    expected = [1, 1, 1, 0]
    assert token_mask(mask, (2, 2), cache).tolist() == expected
    assert token_mask(mask[:, :5], (2, 5), None).tolist() == mask[:, :5].flatten().tolist()
    # Of the width of a static cache, whose last columns nothing has come to yet.
    wide = F.pad(mask, (0, 2))
    assert token_mask(wide, (2, 2), cache).tolist() == expected
    sees = (torch.ones(2, 9, dtype=torch.bool).tril(5) & wide.bool()[:, None, :])[:, None]  # (2, 1, 2, 9)
    assert token_mask(sees, (2, 2), cache).tolist() == expected
    assert token_mask({"full_attention": sees, "sliding_attention": sees}, (2, 2), cache).tolist() == expected
    # As what is added to the scores.
    for hidden in (torch.finfo(torch.float).min, float("-inf")):
        added = torch.zeros(sees.shape).masked_fill(~sees, hidden)
        assert token_mask(added, (2, 2), cache).tolist() == expected
    # A sliding window of four has dropped the first three tokens.
    assert token_mask(sees[..., 3:7], (2, 2), cache).tolist() == expected
    for nothing in (None, {}, {"full_attention": None}, object()):
        assert token_mask(nothing, (2, 2), cache) is None
    # One mask for all rows.
    assert token_mask(sees[:1], (3, 2), cache).tolist() == [1, 1] * 3


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_padding_takes_no_capacity_in_generation(parts, family, cache):
    overrides = {"sliding_window": 40} if family == "mistral" else None
    folder = parts.language_model(family, **({"overrides": overrides} if overrides else {}))
    model = load_pretrained_model(
        folder, mm_vision_tower=parts.vision_tower("clip"), device="cpu",
        moe_config={"eval_capacity_factor": 0.6, "layers": "dense"},
    ).model  # fmt: skip
    told_apart(model)
    inputs = prepared(model)
    more = wider(inputs, 6, model.processor.tokenizer.pad_token_id)
    options = {
        "max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
        "eos_token_id": None, "disable_compile": True,
    }  # fmt: skip
    expected = model.generate(**inputs, **options)
    kind = {} if cache == "dynamic" else {"cache_implementation": cache}
    for given in (inputs, more):
        found = model.generate(**given, **options, **kind)
        assert torch.equal(found.sequences[:, -4:], expected.sequences[:, -4:])
        for one, other in zip(found.logits, expected.logits, strict=True):
            assert_near(one, other, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"capacity_factor": 1.0, "eval_capacity_factor": 0.5}])
def test_threads_get_their_own(dense, fields):
    """Two passes at once, each of which waits for the other in the middle of the language model."""
    model = sparse_model(dense, **fields)
    inputs = prepared(model)
    rows = [
        {"input_ids": inputs["input_ids"][1:2], "attention_mask": inputs["attention_mask"][1:2]},
        {"input_ids": inputs["input_ids"][[1, 1]].flip(1), "attention_mask": inputs["attention_mask"][[1, 1]].flip(1)},
    ]
    expected = [model(**row, output_router_logits=True) for row in rows]
    barrier = threading.Barrier(2, timeout=600)

    def wait(module, arguments):
        barrier.wait()

    handles = [layer.register_forward_pre_hook(wait) for layer in model.model.language_model.layers]
    found: dict = {}

    def run(index):
        with torch.no_grad():
            found[index] = model(**rows[index], output_router_logits=True)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    for index in range(2):
        assert torch.equal(found[index].logits, expected[index].logits)
        assert len(found[index].router_logits) == 2
        for one, other in zip(found[index].router_logits, expected[index].router_logits, strict=True):
            assert torch.equal(one, other)


@torch.no_grad()
def test_an_interrupted_pass_leaves_nothing_behind(sparse):
    inputs = prepared(sparse)
    handle = sparse.model.language_model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sparse(**inputs, output_router_logits=True)
    handle.remove()
    assert len(sparse(**inputs, output_router_logits=True).router_logits) == 2
    assert sparse(**inputs).router_logits is None


def test_copies(sparse):
    """The experts follow the config of the model that they are part of."""
    twin = copy.deepcopy(sparse)
    twin.set_experts_implementation("eager")
    assert twin.model.language_model.layers[0].mlp.experts.config is twin.config
    assert sparse.config._experts_implementation == "sorted_mm"


# ---------------------------------------------------------------------------------------------------------------------
# Choosing the experts implementation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sparse_folder(sparse, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    sparse.save_pretrained(folder)
    return folder


def ran(model, inputs) -> str:
    """The experts implementation that a pass really went through."""
    calls = []
    originals = [
        (functions, name, functions[name])
        for functions, names in (
            (EXPERTS_FUNCTIONS, IMPLEMENTATIONS[1:]),
            (ALL_EXPERTS_FUNCTIONS, IMPLEMENTATIONS[1:3]),
        )
        for name in names
    ]
    for functions, name, original in originals:
        functions[name] = lambda *args, own=name, run=original: (calls.append(own), run(*args))[1]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for functions, name, original in originals:
            functions[name] = original
    assert len(set(calls)) <= 1
    return calls[0] if calls else "eager"


@torch.no_grad()
def test_experts_implementation_of_from_pretrained(sparse, sparse_folder):
    inputs = prepared(sparse)
    expected = sparse(**inputs).logits
    default = MoellavaForCausalLM.from_pretrained(sparse_folder)
    assert ran(default, inputs) == "sorted_mm"
    for name in IMPLEMENTATIONS:
        for given in (name, {"": name}):
            model = AutoModelForCausalLM.from_pretrained(sparse_folder, experts_implementation=given)
            assert model.config._experts_implementation == name
            assert ran(model, inputs) == name
            assert_near(model(**inputs).logits, expected, 1e-5)
        loaded = load_pretrained_model(sparse_folder, experts_implementation=name, device="cpu").model
        assert ran(loaded, inputs) == name
    with pytest.raises(ValueError, match="nonsense.*is not supported"):
        AutoModelForCausalLM.from_pretrained(sparse_folder, experts_implementation="nonsense")


@torch.no_grad()
def test_experts_implementation_at_run_time(sparse_folder, sparse):
    model = MoellavaForCausalLM.from_pretrained(sparse_folder)
    inputs = prepared(sparse)
    expected = model(**inputs).logits
    for name in IMPLEMENTATIONS:
        model.set_experts_implementation(name)
        assert ran(model, inputs) == name
        assert_near(model(**inputs).logits, expected, 1e-5)
        model.model.set_experts_implementation("eager")
        assert ran(model, inputs) == "eager"
    with pytest.raises(ValueError, match="nonsense.*is not supported"):
        model.set_experts_implementation("nonsense")
    assert ran(model, inputs) == "eager"


def test_experts_implementation_is_not_saved(sparse_folder, sparse, tmp_path):
    model = MoellavaForCausalLM.from_pretrained(sparse_folder, experts_implementation="eager")
    model.save_pretrained(tmp_path)
    assert "experts_implementation" not in (tmp_path / "config.json").read_text()
    assert ran(MoellavaForCausalLM.from_pretrained(tmp_path), prepared(sparse)) == "sorted_mm"


def test_dense_models_take_an_experts_implementation_too(dense, tmp_path):
    dense.save_pretrained(tmp_path)
    model = MoellavaForCausalLM.from_pretrained(tmp_path, experts_implementation="grouped_mm")
    assert_near(model(**prepared(dense)).logits, dense(**prepared(dense)).logits, 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Language models that are sparse by themselves
# ---------------------------------------------------------------------------------------------------------------------

NATIVE = ("mixtral", "qwen2_moe")


def native(parts, family: str, **kwargs):
    """A model with a sparse language model in it, and the family's own class with the same weights."""
    folder = parts.language_model(family, padded_rows=1)  # the image token's row, so that the vocabularies are the same
    model = load_pretrained_model(folder, mm_vision_tower=parts.vision_tower("clip"), device="cpu", **kwargs).model
    return model, AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("family", NATIVE)
def test_router_loss_of_a_sparse_language_model_is_passed_through(parts, family):
    model, own = native(parts, family)
    tokenizer = model.processor.tokenizer
    inputs = dict(tokenizer(["The door is green.", "No."], padding=True, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    labels = labels_of(inputs)
    for fields in (
        {},
        {"output_router_logits": True},
        {"labels": labels, "output_router_logits": True},
        {"labels": labels},
    ):
        found, expected = model(**inputs, **fields), own(**inputs, **fields)
        assert torch.equal(found.logits, expected.logits)
        for name in ("loss", "aux_loss"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (one is None) == (other is None), (name, fields)
            assert one is None or torch.equal(one, other), (name, fields)
        if "output_router_logits" in fields:
            assert len(found.router_logits) == len(expected.router_logits) == 2
            for one, other in zip(found.router_logits, expected.router_logits, strict=True):
                assert torch.equal(one, other)
    found.loss.backward()
    assert model.config.moe_config is None
    # By the config, as the family reads it.
    model.config.text_config.output_router_logits = own.config.output_router_logits = True
    with torch.no_grad():
        assert torch.equal(model(**inputs, labels=labels).loss, own(**inputs, labels=labels).loss)
        assert model(**inputs, output_router_logits=False).aux_loss is None


def test_gradient_accumulation_of_a_sparse_language_model(parts):
    model, _ = native(parts, "mixtral")
    model.config.text_config.output_router_logits = True
    inputs = dict(model.processor.tokenizer(["The door is green."], return_tensors="pt"))
    labels = labels_of(inputs)
    with torch.no_grad():
        whole = model(**inputs, labels=labels).loss.item()
        part = model(**inputs, labels=labels, num_items_in_batch=2 * (labels[:, 1:] != -100).sum()).loss.item()
    assert 2 * part == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("family", NATIVE)
def test_experts_implementation_reaches_a_sparse_language_model(parts, family, tmp_path):
    model, _ = native(parts, family)
    inputs = prepared(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert ran(model, inputs) == "grouped_mm"  # transformers' own default
        for name in IMPLEMENTATIONS[:3]:
            for loaded in (
                AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=name),
                load_pretrained_model(tmp_path, experts_implementation=name, device="cpu").model,
                native(parts, family, experts_implementation=name)[0],
            ):
                if name != "eager":
                    assert ran(loaded, inputs) == name
                assert loaded.model.language_model.config._experts_implementation == name
            model.set_experts_implementation(name)
            assert ran(model, inputs) == name
            assert_near(model(**inputs).logits, expected, 1e-5)
        # It is one of this package's own, for its own experts.
        with pytest.raises(ValueError, match="sorted_mm.*is not supported"):
            AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="sorted_mm")


@pytest.mark.parametrize("family", NATIVE)
def test_a_sparse_language_model_is_not_upcycled(parts, family):
    model, _ = native(parts, family)
    with pytest.raises(ValueError, match=f"A {family} language model is sparse already"):
        upcycle(model)
    with pytest.raises(ValueError, match=f"A {family} language model is sparse already"):
        load_pretrained_model(
            parts.language_model(family), mm_vision_tower=parts.vision_tower("clip"), device="cpu", moe_config={}
        )
    config = MoellavaConfig(
        text_config=model.config.text_config, vision_config=model.config.vision_config, image_token_id=1, moe_config={}
    )
    with pytest.raises(ValueError, match="sparse already.*Leave moe_config out"):
        MoellavaForCausalLM(config)


# ---------------------------------------------------------------------------------------------------------------------
# The forms of dense MLPs
# ---------------------------------------------------------------------------------------------------------------------


def test_mlps_that_no_expert_can_be_made_of():
    mlp = DENSE["gated"]()
    mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(INNER))
    with pytest.raises(ValueError, match="A LlamaMLP cannot be made sparse: up_proj.bias have no place in an expert"):
        DenseForm(mlp)
    mlp = DENSE["gated"]()
    mlp.norm = torch.nn.LayerNorm(INNER)
    with pytest.raises(ValueError, match=r"norm.bias, norm.weight have no place"):
        DenseForm(mlp)
    mlp = DENSE["gated"]()
    mlp.act_fn = None
    with pytest.raises(ValueError, match="its activation is not known"):
        DenseForm(mlp)
    with pytest.raises(ValueError, match="A Linear cannot be made sparse: it has none of the forms"):
        DenseForm(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("form", FORMS)
def test_experts_are_copies(form):
    mlp = DENSE[form]()
    weights = {name: torch.randn(p.shape) for name, p in mlp.named_parameters()}
    mlp.load_state_dict(weights)
    for count in (1, 3):
        tensors = stacked_experts(DenseForm(mlp), [weights] * count)
        owners = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
        assert not owners & {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
        experts = DenseForm(mlp).build_experts(tiny_config(), count)
        experts.load_state_dict(tensors)
        tokens = random_tokens(4)
        for expert in range(count):
            one = experts.run_expert(experts.expert_weights()[expert], tokens)
            assert_near(one.detach(), mlp(tokens).detach(), 1e-6)


def test_a_file_without_the_field_counts_capacity_over_the_batch(caplog):
    """As 0.1.0 wrote it, and as it answered; whoever makes a config gets rows counted alone."""
    config = MoellavaConfig(moe_config={"num_experts": 2, "eval_capacity_factor": 1.0})
    assert config.moe_config.eval_capacity_per_row
    written = config.to_dict()
    assert MoellavaConfig.from_dict(written).moe_config.eval_capacity_per_row
    del written["moe_config"]["eval_capacity_per_row"]
    earlier = MoellavaConfig.from_dict(written)
    assert not earlier.moe_config.eval_capacity_per_row
    assert "counts over the batch" in caplog.text
    assert not MoellavaConfig.from_dict(earlier.to_dict()).moe_config.eval_capacity_per_row
