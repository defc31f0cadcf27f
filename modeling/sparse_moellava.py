# SPDX-License-Identifier: Apache-2.0
"""The sparse mixture of experts: one block, made of a language model's dense MLP and put in its place.

The formulas are those of MoE-LLaVA (Lin et al. 2024, arXiv:2401.15947), which routes as DeepSpeed's layer does, and of
Med-MoE (Jiang et al. 2024, arXiv:2404.10237), which adds a shared expert. Where the older code depended on noise or on
the other rows of a batch, this one does not: see `docs/design.md`.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from fractions import Fraction
from functools import partial, reduce
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.utils import logging
from transformers.utils.generic import maybe_autocast
from transformers.utils.output_capturing import CompileableContextVar


logger = logging.get_logger(__name__)

# The blocks sit within another library's layers, which hand them hidden states and nothing else. What else there is of
# a forward pass they find here: where to leave their routers' logits, and which tokens are padding.
_router_logits_of_pass = CompileableContextVar("moellava_router_logits")
_token_mask_of_pass = CompileableContextVar("moellava_token_mask")


class _SortedExperts(torch.autograd.Function):
    """Runs every expert on its own tokens, which are in the order of the experts.

    What it is for is the backward pass: the gradient of all experts is one tensor, which every expert's product is
    written into. Experts taken apart by indexing have theirs copied together afterwards, which for few tokens takes
    as long as all the rest. Of the values within an expert those before the activation are kept, and no others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: torch.Tensor,
        up: torch.Tensor,
        up_bias: torch.Tensor | None,
        down: torch.Tensor,
        down_bias: torch.Tensor | None,
        activation: Callable,
        counts: list[int],
    ) -> torch.Tensor:
        output = tokens.new_empty(tokens.shape[0], down.shape[1])
        kept = []
        for expert, span in _spans(counts):
            before = F.linear(tokens[span], up[expert], None if up_bias is None else up_bias[expert])
            output[span] = F.linear(activation(before), down[expert], None if down_bias is None else down_bias[expert])
            if any(ctx.needs_input_grad):
                kept.append(before)
        ctx.save_for_backward(tokens, up, up_bias, down, down_bias, *kept)
        ctx.activation, ctx.counts = activation, counts
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: with gradient checkpointing, that is what computes them anew
        inputs, kept = saved[:5], saved[5:]
        tokens, up, _, down, _ = inputs
        grads = [
            torch.empty_like(tensor) if needed else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        grad_tokens, grad_up, grad_up_bias, grad_down, grad_down_bias = grads
        for (expert, span), before in zip(_spans(ctx.counts), kept, strict=True):
            grad_after = grad_output[span] @ down[expert]
            with torch.enable_grad():
                before = before.detach().requires_grad_()
                after = ctx.activation(before)
            (grad_before,) = torch.autograd.grad(after, before, grad_after)
            if grad_tokens is not None:
                torch.mm(grad_before, up[expert], out=grad_tokens[span])
            if grad_up is not None:
                torch.mm(grad_before.T, tokens[span], out=grad_up[expert])
            if grad_up_bias is not None:
                torch.sum(grad_before, dim=0, out=grad_up_bias[expert])
            if grad_down is not None:
                torch.mm(grad_output[span].T, after.detach(), out=grad_down[expert])
            if grad_down_bias is not None:
                torch.sum(grad_output[span], dim=0, out=grad_down_bias[expert])
        for grad in grads[1:]:
            for expert, count in enumerate(ctx.counts):
                if grad is not None and not count:
                    grad[expert].zero_()
        return *grads, None, None


def _spans(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Goes through the experts that have tokens, each with the place of these in the order."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def sorted_mm_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """An experts implementation for the CPU: every touched expert multiplies its own tokens, and no other is visited.

    `grouped_mm` does the same in one call, which is what graphs and accelerators need, and is used there; on the CPU
    its kernel is slower than PyTorch's matrix product for many tokens (`benchmarks/moe.py`).

    Args:
        hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`): What the experts get.
        top_k_index (`torch.Tensor` of shape `(num_tokens, k)`): The chosen experts.
        top_k_weights (`torch.Tensor` of shape `(num_tokens, k)`): Their weights, in fp32.

    Returns:
        `torch.Tensor` of shape `(num_tokens, hidden_size)`.
    """
    if hidden_states.device.type != "cpu" or torch.compiler.is_compiling() or self._is_expert_parallel:
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    num_tokens, num_choices = top_k_index.shape
    if num_tokens == 0:
        return hidden_states
    experts_of_choices = top_k_index.reshape(-1)  # (num_tokens * k)
    order = torch.argsort(experts_of_choices, stable=True)
    counts = torch.bincount(experts_of_choices, minlength=self.num_experts).tolist()

    # Of `self` is known what `use_experts_implementation` says of a class: it may be the experts of a language model
    # that is sparse by itself.
    tokens = hidden_states[order // num_choices]
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    weights = [
        getattr(self, name + suffix) if self.has_bias or not suffix else None
        for name in (up_name, "down_proj")
        for suffix in ("", "_bias")
    ]
    if self.is_transposed:
        weights[::2] = [weight.mT for weight in weights[::2]]
    if torch.is_autocast_enabled("cpu"):  # which does not see into a function of our own
        dtype = torch.get_autocast_dtype("cpu")
        tokens = tokens.to(dtype)
        weights = [None if weight is None else weight.to(dtype) for weight in weights]
    output = _SortedExperts.apply(tokens, *weights, self._apply_gate if self.has_gate else self.act_fn, counts)
    if getattr(self, "has_post_expert_norm", False):
        output = self.post_expert_norm(output)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel())
    choices = zip(back.view(num_tokens, num_choices).unbind(1), top_k_weights.float().split(1, dim=1), strict=True)
    # Weighted and summed in fp32: in 16 bits equal experts would not add up to one of them.
    return reduce(torch.add, (output[place] * weight for place, weight in choices)).to(hidden_states.dtype)


# An interface of this file alone. In the one that all models of the process share, the file of a checkpoint that is
# loaded later would replace the function of those that are loaded already.
EXPERTS_FUNCTIONS = ExpertsInterface()
EXPERTS_FUNCTIONS["sorted_mm"] = sorted_mm_experts_forward
_use_experts_implementation = partial(use_experts_implementation, experts_interface=EXPERTS_FUNCTIONS)


def _one_after_the_other(
    experts: Iterable[Callable], hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Runs every touched expert, a function of tokens, on its own tokens; shapes as in the forward of experts."""
    # In fp32, as in `sorted_mm_experts_forward`.
    output = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float))
    for number, expert in enumerate(experts):
        token, choice = torch.where(top_k_index == number)
        if token.numel():
            result = expert(hidden_states[token])
            weighted = result * top_k_weights[token, choice].float().unsqueeze(-1)
            output = output.index_add(0, token, weighted.to(output.dtype))
    return output.to(hidden_states.dtype)


class _Experts(nn.Module):
    """The experts of one block, every kind of weight as one tensor with the expert as its first dimension.

    Args:
        config (`MoellavaConfig`): The model's config; tells the implementation.
        num_experts (`int`): How many.
        hidden_size (`int`): The width of what comes in and goes out.
        intermediate_size (`int`): The width within an expert.
        act_fn (`nn.Module`): The activation of the dense MLP.
    """

    gated: bool
    biased: bool
    # How processes divide them: every expert by its width, or (`_ep_plan`) by experts; "" is the module itself.
    _tp_plan: dict[str, str] = {}
    _ep_plan = {
        "": "ep_dispatch_experts",
        **{
            f"{name}{suffix}": "grouped_gemm"
            for name in ("gate_up_proj", "up_proj", "down_proj")
            for suffix in ("", "_bias")
        },
    }

    # trf-ignore: TRF029  the sizes are those of the dense MLP, whatever its family's config calls them
    def __init__(self, config, num_experts: int, hidden_size: int, intermediate_size: int, act_fn: nn.Module):
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.act_fn = act_fn
        self._initializer_range = initializer_range(config)
        width, up_name = (2 * intermediate_size, "gate_up_proj") if self.gated else (intermediate_size, "up_proj")
        setattr(self, up_name, nn.Parameter(torch.empty(num_experts, width, hidden_size)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        if self.biased:
            setattr(self, f"{up_name}_bias", nn.Parameter(torch.empty(num_experts, width)))
            self.down_proj_bias = nn.Parameter(torch.empty(num_experts, hidden_size))

    def initialize_parameters(self) -> None:
        """Draws the experts' weights that no checkpoint has given."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=self._initializer_range)

    def expert_weights(self) -> list[tuple[torch.Tensor | None, ...]]:
        """Returns the weights of every expert: up, up's bias, down, down's bias."""
        kinds = []
        # One `unbind` for all: taken one by one, every expert's gradient would be as large as that of all of them.
        for name in ("gate_up_proj" if self.gated else "up_proj", "down_proj"):
            kinds.append(getattr(self, name).unbind(0))
            kinds.append(getattr(self, f"{name}_bias").unbind(0) if self.biased else [None] * self.num_experts)
        return list(zip(*kinds, strict=True))

    def run_expert(self, weights: tuple[torch.Tensor | None, ...], tokens: torch.Tensor) -> torch.Tensor:
        """Runs one expert on its tokens, `(num_tokens, hidden_size)` in and out."""
        up, up_bias, down, down_bias = weights
        hidden = F.linear(tokens, up, up_bias)
        hidden = self._apply_gate(hidden) if self.gated else self.act_fn(hidden)
        return F.linear(hidden, down, down_bias)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The plain form (`experts_implementation="eager"`): one expert after the other."""
        experts = [partial(self.run_expert, weights) for weights in self.expert_weights()]
        return _one_after_the_other(experts, hidden_states, top_k_index, top_k_weights)


@_use_experts_implementation
class GatedExperts(_Experts):
    """Experts of the form `down(act(gate(x)) * up(x))`: LLaMA, Mistral, Qwen, StableLM, Granite."""

    gated, biased = True, False
    _tp_plan = {"": "moe_tp_experts", "gate_up_proj": "packed_colwise", "down_proj": "rowwise"}


# Divided by their width, experts with biases would add that of the down projection once per process.


@_use_experts_implementation(has_bias=True)
class BiasedGatedExperts(_Experts):
    """Gated experts whose projections have biases: LLaMA with `mlp_bias`."""

    gated, biased = True, True


@_use_experts_implementation(has_gate=False)
class PlainExperts(_Experts):
    """Experts of the form `fc2(act(fc1(x)))` without biases."""

    gated, biased = False, False
    _tp_plan = {"": "moe_tp_experts", "up_proj": "colwise", "down_proj": "rowwise"}


@_use_experts_implementation(has_gate=False, has_bias=True)
class BiasedPlainExperts(_Experts):
    """Experts of the form `fc2(act(fc1(x)))`: Phi."""

    gated, biased = False, True


class ExpertMlp(nn.Module):
    """One expert as a module of linear layers; the arguments are those of the experts together."""

    # trf-ignore: TRF029  the sizes are those of the dense MLP, whatever its family's config calls them
    def __init__(self, hidden_size: int, intermediate_size: int, act_fn: nn.Module, gated: bool, biased: bool):
        super().__init__()
        self.act_fn = act_fn
        if gated:
            self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=biased)
        else:
            self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=biased)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=biased)
        self.gated = gated

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Takes and returns tokens of shape `(num_tokens, hidden_size)`."""
        if not self.gated:
            return self.down_proj(self.act_fn(self.up_proj(tokens)))
        gate, up = self.gate_up_proj(tokens).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class ModularExperts(nn.ModuleList):
    """The experts of one block as modules of their own, in which a quantised model holds them.

    What quantises a model, whichever method it is, looks for linear layers, and leaves tensors of three dimensions in
    full precision; so do the tools that put adapters onto quantised layers. The weights are those of the experts
    together, taken apart: `experts.gate_up_proj[3]` is `experts.3.gate_up_proj.weight`.
    """

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As the forward of the experts together: every touched expert runs on its own tokens."""
        return _one_after_the_other(self, hidden_states, top_k_index, top_k_weights)


_builds_modular_experts: ContextVar[bool] = ContextVar("moellava_builds_modular_experts", default=False)


@contextmanager
def modular_experts() -> Iterator[None]:
    """Makes the sparse layers that are built within hold their experts as modules."""
    token = _builds_modular_experts.set(True)
    try:
        yield
    finally:
        _builds_modular_experts.reset(token)


_STACKED_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|up_proj|down_proj)(_bias)?")
_ONE_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_up_proj|up_proj|down_proj)\.(weight|bias)")


def experts_apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns weights with those of the experts under the names of modules of their own, nothing copied."""
    apart = {}
    for name, tensor in tensors.items():
        match = _STACKED_EXPERTS.fullmatch(name)
        if match is None:
            apart[name] = tensor
            continue
        kind = "bias" if match[3] else "weight"
        apart |= {f"{match[1]}.{expert}.{match[2]}.{kind}": share for expert, share in enumerate(tensor.unbind(0))}
    return apart


def experts_together(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns weights with those of experts that are modules of their own stacked: the inverse of `experts_apart`."""
    together, shares = {}, {}
    for name, tensor in tensors.items():
        match = _ONE_EXPERT.fullmatch(name)
        if match is None:
            together[name] = tensor
        else:
            stack = f"{match[1]}.{match[3]}{'_bias' if match[4] == 'bias' else ''}"
            shares.setdefault(stack, {})[int(match[2])] = tensor
    return together | {name: torch.stack([share[i] for i in sorted(share)]) for name, share in shares.items()}


_EXPERTS = {
    (cls.gated, cls.biased): cls for cls in (GatedExperts, BiasedGatedExperts, PlainExperts, BiasedPlainExperts)
}

# The projections of a dense MLP, by family: those that make up the experts' up projection in order, and the down one.
_DENSE_FORMS: tuple[tuple[tuple[str, ...], str, bool], ...] = (
    (("gate_proj", "up_proj"), "down_proj", True),
    (("gate_up_proj",), "down_proj", True),
    (("up_proj",), "down_proj", False),
    (("fc1",), "fc2", False),
    (("c_fc",), "c_proj", False),
    (("dense_h_to_4h",), "dense_4h_to_h", False),
)
_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act")


class DenseForm:
    """How a dense MLP is made, whatever its family calls its parts.

    Raises:
        ValueError: The MLP has none of the known forms.
    """

    def __init__(self, mlp: nn.Module):
        self.name = type(mlp).__name__
        forms = (
            form
            for form in _DENSE_FORMS
            if all(isinstance(getattr(mlp, name, None), nn.Linear) for name in (*form[0], form[1]))
        )
        up_names, down_name, gated = next(forms, (None, None, None))
        if up_names is None:
            raise ValueError(f"A {self.name} cannot be made sparse: it has none of the forms gate/up/down or fc1/fc2.")
        activation = next((name for name in _ACTIVATION_NAMES if callable(getattr(mlp, name, None))), None)
        if activation is None:
            raise ValueError(f"A {self.name} cannot be made sparse: its activation is not known.")
        self.up_names, self.down_name, self.gated = up_names, down_name, gated
        self.act_fn = getattr(mlp, activation)
        down = getattr(mlp, down_name)
        self.hidden_size, self.intermediate_size = down.out_features, down.in_features
        self.biased = down.bias is not None
        kinds = [f"{name}.{kind}" for name in (*up_names, down_name) for kind in ("weight", "bias")[: 1 + self.biased]]
        others = sorted({name for name, _ in mlp.named_parameters()} ^ set(kinds))
        if others:
            raise ValueError(f"A {self.name} cannot be made sparse: {', '.join(others)} have no place in an expert.")

    def build_experts(self, config, num_experts: int) -> nn.Module:
        """Builds experts of this form, `config` being the model's."""
        if _builds_modular_experts.get():
            sizes = (self.hidden_size, self.intermediate_size)
            return ModularExperts(ExpertMlp(*sizes, self.act_fn, self.gated, self.biased) for _ in range(num_experts))
        experts_class = _EXPERTS[self.gated, self.biased]
        return experts_class(config, num_experts, self.hidden_size, self.intermediate_size, self.act_fn)

    def stacked(self, experts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Returns the experts' tensors, of the weights of an MLP of this form for each."""
        up_name = "gate_up_proj" if self.gated else "up_proj"
        tensors = {}
        for kind, suffix in (("weight", ""), ("bias", "_bias"))[: 1 + self.biased]:
            tensors[f"{up_name}{suffix}"] = _stacked(
                [[expert[f"{name}.{kind}"] for name in self.up_names] for expert in experts]
            )
            tensors[f"down_proj{suffix}"] = _stacked([[expert[f"{self.down_name}.{kind}"]] for expert in experts])
        return tensors


def _stacked(experts: list[list[torch.Tensor]]) -> torch.Tensor:
    """Stacks the experts, each the rows of several tensors, without any tensor in between."""
    first = experts[0]
    stack = first[0].new_empty(len(experts), sum(part.shape[0] for part in first), *first[0].shape[1:])
    for rows, expert in zip(stack, experts, strict=True):
        torch.cat(expert, out=rows)
    return stack


class Router(nn.Module):
    """A linear layer that scores the experts, in fp32 whatever the model's dtype; quantisation leaves it as it is.

    Args:
        hidden_size (`int`): The width of what comes in.
        num_experts (`int`): How many experts there are.
        initializer_range (`float`): The standard deviation of new weights.
        bias (`bool`): Whether there is a bias.
        frozen (`bool`, *optional*, defaults to `False`): Whether it is left out of training.
        jitter_noise (`float`, *optional*, defaults to 0.0): In training, what comes in is multiplied by noise from
            `1 - x` to `1 + x`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        initializer_range: float,
        bias: bool,
        frozen: bool = False,
        jitter_noise: float = 0.0,
    ):
        super().__init__()
        # New ones are drawn in fp32 too, in a model that is loaded in 16 bits.
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float))
        self.bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float)) if bias else None
        self.jitter_noise = jitter_noise
        self.frozen = frozen
        self.requires_grad_(not frozen)
        self._initializer_range = initializer_range

    def initialize_parameters(self) -> None:
        """Draws the weights that no checkpoint has given."""
        init.normal_(self.weight, mean=0.0, std=self._initializer_range)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Takes tokens of shape `(num_tokens, hidden_size)`; returns logits, `(num_tokens, num_experts)`, in fp32."""
        with maybe_autocast(device_type=tokens.device.type, enabled=False):
            tokens = tokens.float()
            if self.training and self.jitter_noise > 0:
                noise = torch.empty_like(tokens).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
                tokens = tokens * noise
            return F.linear(tokens, self.weight.float(), None if self.bias is None else self.bias.float())


# The weights of the routers and of the residual coefficient, by the ends of their names.
ROUTER_WEIGHTS = {f"mlp.{name}.{kind}" for name in ("gate", "coefficient") for kind in ("weight", "bias")}


class SparseMoeBlock(nn.Module):
    r"""
    A mixture of experts in the place of a dense MLP.

    With `p = softmax(gate(x))` over all experts, in fp32, and `T` the `k` experts of the largest `p`:

    - `norm_topk_prob`: `y = sum over e in T of p_e / (sum over T of p) * expert_e(x)`.
    - otherwise: `y = sum over e in T of p_e * expert_e(x)`, the probabilities as they are.
    - with a capacity, an expert takes `max(ceil(k * tokens / num_experts * capacity_factor), min_capacity)` tokens, by
      position, first choices before second ones; what is over is dropped before the weights are normalised. The
      tokens are those of the batch in training, and those of the row otherwise (`eval_capacity_per_row`).
    - residual: `y = c_0 * y + c_1 * mlp(x)` with `c = softmax(coefficient(x))`.
    - meta expert: `y = y + meta_expert(x)`.

    Args:
        config (`MoellavaConfig`): The model's config, with `moe_config`.
        mlp (`nn.Module`): The dense MLP whose form the experts take; kept as the residual MLP where there is one.
    """

    _tp_plan = {"gate": "replicate", "coefficient": "replicate"}

    def __init__(self, config, mlp: nn.Module):
        super().__init__()
        moe, form = config.moe_config, DenseForm(mlp)
        self.num_experts = moe.num_experts
        self.top_k = moe.num_experts_per_tok
        self.norm_topk_prob = moe.norm_topk_prob
        self.sample_second_expert = moe.sample_second_expert
        self.capacity_factor = _as_ratio(moe.capacity_factor)
        self.eval_capacity_factor = _as_ratio(moe.eval_capacity_factor)
        self.eval_capacity_per_row = moe.eval_capacity_per_row
        self.min_capacity = moe.min_capacity
        self.gate = Router(
            form.hidden_size,
            moe.num_experts,
            initializer_range(config),
            bias=moe.router_bias,
            frozen=moe.freeze_router,
            jitter_noise=moe.router_jitter_noise,
        )
        self.experts = form.build_experts(config, moe.num_experts)
        self.coefficient = (
            Router(form.hidden_size, 2, initializer_range(config), bias=True) if moe.use_residual else None
        )
        self.mlp = mlp if moe.use_residual else None
        self.meta_expert = copy.deepcopy(mlp) if moe.use_meta_expert else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Takes and returns hidden states of shape `(batch_size, sequence_length, hidden_size)`."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (batch_size * sequence_length, hidden_size)
        router_logits = self.gate(tokens)
        collector = _router_logits_of_pass.get()
        if collector is not None:
            collector.add(router_logits)
        rows = hidden_states.shape[0] if hidden_states.dim() == 3 else 1
        weights, index = self.route(router_logits, rows)
        # Before the experts, which vLLM replaces by its own: those may write their output over their input.
        dense = None if self.mlp is None else self.mlp(tokens)
        # (tokens, 2)
        coefficient = None if self.coefficient is None else torch.softmax(self.coefficient(tokens), dim=-1)
        shared = None if self.meta_expert is None else self.meta_expert(tokens)
        output = self.experts(tokens, index, weights)
        if coefficient is not None:
            output = (coefficient[:, :1] * output + coefficient[:, 1:] * dense).to(output.dtype)
        if shared is not None:
            output = output + shared
        return output.reshape(hidden_states.shape)

    def route(self, router_logits: torch.Tensor, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses experts.

        Args:
            router_logits (`torch.Tensor` of shape `(num_tokens, num_experts)`): Their scores, row after row.
            rows (`int`, *optional*, defaults to 1): How many rows of a batch the tokens are from.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The weights in fp32 and the experts, both `(num_tokens, k)`.
        """
        probabilities = torch.softmax(router_logits, dim=-1, dtype=torch.float)
        if self.training and self.sample_second_expert and self.top_k == 2:
            first = probabilities.argmax(dim=-1, keepdim=True)
            noise = -torch.log(-torch.log(torch.rand_like(router_logits).clamp_min(1e-20)))  # Gumbel
            second = (router_logits + noise).scatter(1, first, float("-inf")).argmax(dim=-1, keepdim=True)
            index = torch.cat([first, second], dim=-1)
            weights = probabilities.gather(1, index)
        else:
            weights, index = torch.topk(probabilities, self.top_k, dim=-1)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is not None:
            by_row = self.eval_capacity_per_row and not self.training
            weights = weights * self._within_capacity(index, factor, rows if by_row else 1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).eps)
        return weights, index

    def _within_capacity(self, index: torch.Tensor, factor: tuple[int, int], rows: int) -> torch.Tensor:
        """Returns 1 for every choice that its expert has room for and 0 for the others, of shape `(num_tokens, k)`.

        Each of the `rows` that the tokens are from has the experts to itself.
        """
        num_tokens, num_choices = index.shape
        length = num_tokens // max(rows, 1)
        chosen = F.one_hot(index.view(rows, length, num_choices), self.num_experts)  # (rows, length, k, num_experts)
        mask = _token_mask_of_pass.get()
        count = length
        if mask is not None:
            mask = mask.to(chosen).view(rows, length)
            chosen = chosen * mask[..., None, None]
            count = mask.sum(dim=1, keepdim=True)  # (rows, 1)
        capacity = -(-count * num_choices * factor[0] // (factor[1] * self.num_experts))  # rounded up
        # In the order of the queue: all first choices by position, then all second ones.
        queue = chosen.transpose(1, 2).reshape(rows, num_choices * length, self.num_experts)
        place = (queue.cumsum(dim=1) * queue).sum(dim=-1)  # counted from 1; 0 for padding
        within = (place <= capacity) | (place <= self.min_capacity)  # (rows, k * length)
        return within.view(rows, num_choices, length).transpose(1, 2).reshape(num_tokens, num_choices).to(torch.float)


def initializer_range(config) -> float:
    """The standard deviation that the language model's family draws new weights with."""
    return getattr(config.text_config, "initializer_range", None) or 0.02


def _as_ratio(factor: float | None) -> tuple[int, int] | None:
    """Returns a factor as the two whole numbers that it is written for: 1.1 is 11 / 10, as no float is."""
    return None if factor is None else Fraction(str(factor)).as_integer_ratio()


class RouterLogits:
    """Collects the router logits of the blocks that run within the `with` block, layer by layer.

    Of several threads, each collects those of its own forward pass.
    """

    def __enter__(self) -> list[torch.Tensor]:
        self.collected: list[torch.Tensor] = []
        self.with_grad = torch.is_grad_enabled()
        self._token = _router_logits_of_pass.set(self)
        return self.collected

    def __exit__(self, *exception) -> None:
        _router_logits_of_pass.reset(self._token)

    def add(self, router_logits: torch.Tensor) -> None:
        """Takes the logits of one layer, `(num_tokens, num_experts)`.

        Raises:
            ValueError: They have lost their gradient on the way.
        """
        if self.with_grad and not torch.is_grad_enabled():
            raise ValueError(
                "The load-balancing loss cannot train the routers, whose logits have no gradient: reentrant gradient "
                "checkpointing is on. Use gradient_checkpointing_kwargs={'use_reentrant': False}, or "
                "router_aux_loss_coef=0 to train without that loss."
            )
        self.collected.append(router_logits)


class TokenMask:
    """Tells the blocks that run within the `with` block which tokens are padding; every thread its own blocks.

    Args:
        mask (`torch.Tensor` of shape `(batch_size * sequence_length)`, *optional*): 0 for padding; none, where there is
            nothing to tell.
    """

    def __init__(self, mask: torch.Tensor | None):
        self.mask = mask

    def __enter__(self) -> None:
        if self.mask is not None:
            self._token = _token_mask_of_pass.set(self.mask)

    def __exit__(self, *exception) -> None:
        if self.mask is not None:
            _token_mask_of_pass.reset(self._token)


def checkpoint_with_token_mask(checkpoint: Callable, function: Callable, *args) -> Any:
    """Runs gradient checkpointing so that the backward pass, which computes a layer anew, does so with the same mask.

    Args:
        checkpoint (callable): The checkpointing function.
        function (callable): The layer, and its arguments `args`.
    """
    mask = _token_mask_of_pass.get()
    if mask is None:
        return checkpoint(function, *args)

    def with_token_mask(*args):
        if _token_mask_of_pass.get() is mask:
            return function(*args)
        with TokenMask(mask):
            return function(*args)

    return checkpoint(with_token_mask, *args)


def load_balancing_loss(router_logits: tuple[torch.Tensor, ...], mask: torch.Tensor | None = None) -> torch.Tensor:
    """The auxiliary loss of Switch Transformers (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6), summed over
    the layers as MoE-LLaVA does: `num_experts * sum over experts of (mean probability * share of first choices)`.

    Args:
        router_logits (`tuple[torch.Tensor]`): Of every sparse layer, `(batch_size * sequence_length, num_experts)`.
        mask (`torch.Tensor` of shape `(batch_size * sequence_length)`, *optional*): 0 for what does not count.

    Returns:
        `torch.Tensor` of shape `()`: 1 per layer when the load is even.
    """
    total = None
    for logits in router_logits:
        weight = torch.ones_like(logits[:, :1]) if mask is None else mask.to(logits).unsqueeze(-1)
        count = weight.sum().clamp_min(1)
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float)
        first = F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(probabilities)
        mean_probability = (probabilities * weight).sum(dim=0) / count
        share = (first * weight).sum(dim=0) / count
        loss = logits.shape[-1] * (mean_probability * share).sum()
        total = loss if total is None else total + loss.to(total.device)
    return total


def dense_mlps(language_model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Returns the name and the module of the MLP of every layer of a language model's body.

    Raises:
        ValueError: The layers have no MLP of a known form; the message says whether they are sparse already.
    """
    model_type = language_model.config.model_type
    num_layers = language_model.config.num_hidden_layers
    found = {}
    for name, module in language_model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            for index, layer in enumerate(module):
                mlp = getattr(layer, "mlp", None)
                if mlp is None:
                    kind = "is sparse already" if _is_sparse(layer) else "keeps its MLP in no module of its own"
                    raise ValueError(f"A {model_type} language model cannot be made sparse: its layer {index} {kind}.")
                if _is_sparse(mlp):
                    raise ValueError(
                        f"A {model_type} language model is sparse already: its layer {index} holds a "
                        f"{type(mlp).__name__}. Leave moe_config out to use it as it is."
                    )
                found[index] = (f"{name}.{index}.mlp", mlp)
            return found
    raise ValueError(f"A {model_type} language model cannot be made sparse: its layers were not found.")


def _is_sparse(module: nn.Module) -> bool:
    return any(hasattr(child, "experts") for child in module.modules())


def make_sparse(language_model: nn.Module, config) -> None:
    """Puts a `SparseMoeBlock` in the place of the MLP of every layer that `config.moe_config.layers` names.

    Args:
        language_model (`nn.Module`): The body of the language model.
        config (`MoellavaConfig`): The model's config.

    Raises:
        ValueError: A layer cannot be made sparse.
    """
    mlps = dense_mlps(language_model)
    # Not done yet where a config has been given its sparse layers after it was made.
    config.moe_config.resolve(len(mlps))
    for index in config.moe_config.layers:
        name, mlp = mlps[index]
        language_model.set_submodule(name, SparseMoeBlock(config, mlp))


def warn_of_experts_without_adapters(model: nn.Module, peft_configs: Mapping[str, Any]) -> None:
    """Warns where adapters were meant for all linear layers, or for the MLPs, and the experts have got none.

    Stacked experts are parameters, not linear layers, and PEFT leaves them out without a word.

    Args:
        model (`PreTrainedModel`): The model, with PEFT's adapters on it.
        peft_configs (`Mapping[str, PeftConfig]`): PEFT's configs of the adapters, by name.
    """
    bare = dict(_without_adapters(model))
    experts = {name: module for name, module in bare.items() if name.endswith(".experts")}
    stacks = [
        f"{name}.{key}"
        for name, module in experts.items()
        for key, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3 and not weight.requires_grad
    ]
    head = model.get_output_embeddings()
    linear = [name for name, module in bare.items() if isinstance(module, nn.Linear) and module is not head]
    # Names that the MLPs would have if they were dense, or modules.
    mlps = [
        f"{place}.{layer}"
        for name, module in experts.items()
        for place in (name.removesuffix(".experts"), f"{name}.0")
        for layer in (_GATED_LAYERS if hasattr(module, "gate_up_proj") else _PLAIN_LAYERS)
    ]
    for adapter in peft_configs.values():
        targets = getattr(adapter, "target_modules", None)
        if not stacks or not targets or adapter.inference_mode or getattr(adapter, "target_parameters", None):
            continue
        if all(_is_target(name, targets) for name in linear) or any(_is_target(name, targets) for name in mlps):
            names = sorted({".".join(stack.split(".")[-3:]) for stack in stacks})
            logger.warning(
                "The experts have no adapters and will not be trained: they are stacked parameters, which "
                "target_modules does not reach. To train them too, give LoraConfig target_parameters=%s (and "
                "lora_dropout=0).", names,
            )  # fmt: skip


_GATED_LAYERS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")
_PLAIN_LAYERS = ("fc1", "fc2", "up_proj", "down_proj", "c_fc")


def _without_adapters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules that are neither adapted by PEFT, nor trained in full by it, nor within one that is."""
    for name, child in module.named_children():
        if not hasattr(child, "base_layer") and not hasattr(child, "modules_to_save"):
            yield prefix + name, child
            yield from _without_adapters(child, f"{prefix}{name}.")


def _is_target(name: str, targets: str | Iterable[str]) -> bool:
    """Tells whether PEFT's `target_modules` name a module."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


__all__ = [
    "DenseForm",
    "ModularExperts",
    "ROUTER_WEIGHTS",
    "Router",
    "RouterLogits",
    "SparseMoeBlock",
    "TokenMask",
    "checkpoint_with_token_mask",
    "dense_mlps",
    "experts_apart",
    "experts_together",
    "load_balancing_loss",
    "make_sparse",
    "modular_experts",
    "warn_of_experts_without_adapters",
]
