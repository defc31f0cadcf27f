# SPDX-License-Identifier: Apache-2.0
"""Adapters that were meant for the experts too, and do not reach them."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

_GATED_LAYERS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")
_PLAIN_LAYERS = ("fc1", "fc2", "up_proj", "down_proj", "c_fc")


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


__all__ = ["warn_of_experts_without_adapters"]
