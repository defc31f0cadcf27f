# SPDX-License-Identifier: Apache-2.0
"""The sparse layers of a model: how they come into its language model, how it is run with them, and their loss."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from ..configuration.config_base_moellava import EXPERT_COUNTS
from ..configuration.moe_config_moellava import MoellavaMoeConfig
from .moe_block_moellava import (
    ROUTER_WEIGHTS,
    RouterLogits,
    SparseMoeBlock,
    TokenMask,
    checkpoint_with_token_mask,
)
from .parallel_moellava import PLAN_KINDS, add_plans, general_name
from .routing_moellava import Routing


logger = logging.get_logger(__name__)


class SparseLayers(Routing):
    """What a model with sparse layers does beside what a dense one does.

    Args:
        config (`MoellavaConfig`): The model's config, with `moe_config`.
    """

    config_class = MoellavaMoeConfig

    def build(self, model: nn.Module) -> None:
        make_sparse(model.language_model, self.config)
        add_plans(model.language_model, sparse_plans(model.language_model))
        # Rounded to 16 bits, routers choose other experts.
        names = [name for name, _ in model.named_parameters()]
        model._keep_in_fp32_modules_strict = {
            weight for weight in ROUTER_WEIGHTS if any(name.endswith(weight) for name in names)
        }

    def count_experts(self) -> None:
        # TRL computes the router loss by it; an engine that must not builds no head.
        for name in EXPERT_COUNTS:
            setattr(self.config.text_config, name, getattr(self.fields, name))

    @property
    def balances(self) -> bool:
        return self.fields.router_aux_loss_coef > 0

    def run(
        self, language_model: nn.Module, inputs: dict[str, Any], cache: Cache | None, output_router_logits: bool | None
    ) -> tuple[BaseModelOutputWithPast, tuple[torch.Tensor, ...] | None]:
        mask = None
        if self.fields.capacity_factor is not None or self.fields.eval_capacity_factor is not None:
            mask = token_mask(inputs["attention_mask"], inputs["inputs_embeds"].shape[:2], cache)
        with TokenMask(mask):
            if not (self.fields.output_router_logits if output_router_logits is None else output_router_logits):
                return language_model(**inputs), None
            with RouterLogits() as collected:
                outputs = language_model(**inputs)
        return outputs, tuple(collected)

    def token_mask(
        self, attention_mask: torch.Tensor | dict | None, tokens: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor | None:
        return token_mask(attention_mask, tokens.shape[:2], cache)

    def aux_loss(self, router_logits: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> torch.Tensor:
        return load_balancing_loss(router_logits, mask)

    def checkpointing(self, function: Callable) -> Callable:
        return partial(checkpoint_with_token_mask, function)

    def warn_of_lost_loss(self) -> None:
        if self.balances:
            logger.warning_once(
                "The trainer computes the loss by itself (label_smoothing_factor, compute_loss_func), and the load-"
                "balancing loss of the routers is not in it. moellava's own trainer adds it: see docs/training.md."
            )


def token_mask(
    attention_mask: torch.Tensor | dict | None, shape: tuple[int, int], cache: Cache | None
) -> torch.Tensor | None:
    """Tells which tokens of a pass are padding.

    Args:
        attention_mask (`torch.Tensor` or `dict`, *optional*): Of shape `(batch_size, all tokens so far)`; or, as
            `generate` makes it for a static cache, `(batch_size or 1, 1, sequence_length, keys)`: what each token sees.
        shape (`tuple[int, int]`): `(batch_size, sequence_length)` of this pass.
        cache (`Cache`, *optional*): What there was before them.

    Returns:
        `torch.Tensor` of shape `(batch_size * sequence_length)`: 0 for padding; `None` where there is none.
    """
    if isinstance(cache, PagedAttentionCache):  # rows are packed into one, without padding
        return None
    if isinstance(attention_mask, dict):  # by kind of layer; what a token sees of itself is the same in all
        attention_mask = next(iter(attention_mask.values()), None)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() not in (2, 4):
        return None
    width, sequence_length = attention_mask.shape[-1], shape[1]
    past = 0 if cache is None else cache.get_seq_length()
    first = width - sequence_length  # where a sliding window has dropped older ones
    first = past.clamp_max(first) if isinstance(past, torch.Tensor) else min(past, first)
    own = first + torch.arange(sequence_length, device=attention_mask.device)
    if attention_mask.dim() == 2:
        return attention_mask[:, own].expand(shape).reshape(-1)
    # Padding is what is hidden from itself.
    seen = attention_mask[:, 0, torch.arange(sequence_length, device=attention_mask.device), own]
    if seen.is_floating_point():
        seen = seen > torch.finfo(seen.dtype).min / 2
    return seen.expand(shape).reshape(-1)


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


def sparse_plans(language_model: PreTrainedModel) -> dict[str, dict[str, str]]:
    """Returns the plans that the sparse layers of a language model declare, by kind.

    A dense MLP that stands within a sparse layer is divided as its family divides the one whose place it has.

    Args:
        language_model (`PreTrainedModel`): The body, with its sparse layers in place.
    """
    plans: dict[str, dict[str, str]] = {kind: {} for kind in PLAN_KINDS}
    family = getattr(language_model, "_tp_plan", None) or {}
    for name, block in language_model.named_modules():
        if not isinstance(block, SparseMoeBlock):
            continue
        place = general_name(name)
        for kind, rules in plans.items():
            for inner, module in block.named_modules():
                prefix = f"{place}.{inner}" if inner else place
                for own, style in getattr(type(module), kind, {}).items():
                    rules[f"{prefix}.{own}" if own else prefix] = style
        for rule, style in family.items():
            if rule.startswith(f"{place}."):
                for child in ("mlp", "meta_expert"):
                    plans["_tp_plan"][f"{place}.{child}{rule.removeprefix(place)}"] = style
    return plans
