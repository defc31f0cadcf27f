# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts in the place of a dense MLP.

The formulas are those of MoE-LLaVA (Lin et al. 2024, arXiv:2401.15947), which routes as DeepSpeed's layer does, and of
Med-MoE (Jiang et al. 2024, arXiv:2404.10237), which adds a shared expert. Where the older code depended on noise or on
the other rows of a batch, this one does not: see `docs/design.md`.
"""

import copy
from collections.abc import Callable
from contextvars import ContextVar
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast
from transformers.utils.output_capturing import CompileableContextVar

from .experts_moellava import EXPERTS, initializer_range


# The blocks sit within another library's layers, which hand them hidden states and nothing else. What else there is of
# a forward pass they find here: where to leave their routers' logits, and which tokens are padding.
_router_logits_of_pass = CompileableContextVar("moellava_router_logits")


_token_mask_of_pass = CompileableContextVar("moellava_token_mask")


# What builds the experts of the blocks that are made meanwhile, where they are not to be stacked.
EXPERTS_BUILDER: ContextVar[Callable[..., nn.Module] | None] = ContextVar("moellava_experts_builder", default=None)

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
        build = EXPERTS_BUILDER.get()
        if build is not None:
            return build(num_experts, self.hidden_size, self.intermediate_size, self.act_fn, self.gated, self.biased)
        experts_class = EXPERTS[self.gated, self.biased]
        return experts_class(config, num_experts, self.hidden_size, self.intermediate_size, self.act_fn)


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
