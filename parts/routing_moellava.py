# SPDX-License-Identifier: Apache-2.0
"""The routers of a language model, in a pass and in the loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


class Routing:
    """What a model does with the routers of a language model that is sparse by itself; `SparseLayers` are our own.

    Args:
        config (`MoellavaConfig`): The model's config.
    """

    def __init__(self, config):
        self.config = config
        # Says whether router logits are returned, and the weight of the load-balancing loss.
        self.fields = config.text_config if config.moe_config is None else config.moe_config

    def build(self, model: nn.Module) -> None:
        """Changes the parts of a new model: its language model comes as it is."""

    def count_experts(self) -> None:
        """Tells TRL of the experts; here the language model's config does."""

    def checkpointing(self, function: Callable) -> Callable:
        """Returns a gradient checkpointing function for the model's."""
        return function

    def wants_logits(self, asked: bool | None) -> bool:
        """Whether router logits and the load-balancing loss are returned."""
        return bool(getattr(self.fields, "output_router_logits", False)) if asked is None else asked

    @property
    def balances(self) -> bool:
        """Whether the load-balancing loss is part of the loss without being asked for."""
        return False

    def run(
        self, language_model: nn.Module, inputs: dict[str, Any], cache: Cache | None, output_router_logits: bool | None
    ) -> tuple[BaseModelOutputWithPast, tuple[torch.Tensor, ...] | None]:
        """Runs the language model; returns its output and the router logits, if wanted."""
        if output_router_logits is not None:
            inputs["output_router_logits"] = output_router_logits
        outputs = language_model(**inputs)
        return outputs, outputs.get("router_logits")

    def token_mask(self, attention_mask: Any, tokens: torch.Tensor, cache: Cache | None) -> Any:
        """Which of the tokens, `(batch_size, sequence_length, ...)`, are padding; asked before they are run."""
        return attention_mask

    def aux_loss(self, router_logits: tuple[torch.Tensor, ...], mask: Any) -> torch.Tensor:
        """The load-balancing loss of a pass, as the language model's own family computes it."""
        text = self.config.text_config
        num_experts = getattr(text, "num_local_experts", None) or text.num_experts
        return load_balancing_loss_func(router_logits, num_experts, text.num_experts_per_tok, mask)

    def aux_weight(self, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None, **kwargs) -> Any:
        """The weight of the load-balancing loss beside the next-token loss.

        With gradient accumulation, the next-token loss of a part of a batch is its sum over the number of tokens of
        the whole batch; the load-balancing loss is a mean, and gets the part's share of those tokens.
        """
        if num_items_in_batch is None:
            return self.fields.router_aux_loss_coef
        return self.fields.router_aux_loss_coef * (labels[:, 1:] != -100).sum() / num_items_in_batch

    def warn_of_lost_loss(self) -> None:
        """Says that the load-balancing loss takes no part in the loss that a trainer computes by itself."""
