# SPDX-License-Identifier: Apache-2.0
"""The experts of a sparse layer together: every kind of weight is one tensor, the expert its first dimension."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface


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


def one_after_the_other(
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
        return one_after_the_other(experts, hidden_states, top_k_index, top_k_weights)


@_use_experts_implementation
class GatedExperts(_Experts):
    """Experts of the form `down(act(gate(x)) * up(x))`: LLaMA, Mistral, Qwen, StableLM, Granite."""

    gated, biased = True, False
    _tp_plan = {"": "moe_tp_experts", "gate_up_proj": "packed_colwise", "down_proj": "rowwise"}


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


EXPERTS = {(cls.gated, cls.biased): cls for cls in (GatedExperts, BiasedGatedExperts, PlainExperts, BiasedPlainExperts)}


def initializer_range(config) -> float:
    """The standard deviation that the language model's family draws new weights with."""
    return getattr(config.text_config, "initializer_range", None) or 0.02
