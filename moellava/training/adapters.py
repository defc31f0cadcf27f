# SPDX-License-Identifier: Apache-2.0
"""LoRA on a model's attention, MLPs, experts, projector and vision tower, quantised or not, and what it reaches."""

import logging
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..parts.moe_block_moellava import Router
from ..tree import EXPERTS, PEFT_PREFIX, place_of
from .recipe import LoraRecipe


logger = logging.getLogger(__name__)

_ATTENTION = re.compile(r"\.(self_attn|self_attention|attention|attn)\.")


@dataclass
class Reach:
    """What adapters reach of one part.

    Attributes:
        of (`int`): How many linear layers, and stacks of experts' weights, the part has.
        adapted (`int`): How many of them have an adapter.
    """

    of: int = 0
    adapted: int = 0


def put_adapters(model: Any, lora: LoraRecipe, trains_routers: bool, quantised: bool) -> tuple[Any, dict[str, Reach]]:
    """Puts LoRA adapters on a model.

    The experts of a quantised model are modules of linear layers, which PEFT targets as it does any; those of others
    are stacked tensors, which it targets as parameters.

    Args:
        model (`MoellavaForCausalLM`): The model, which is changed in place.
        lora (`LoraRecipe`): Where adapters go.
        trains_routers (`bool`): Whether the routers are trained in full beside them.
        quantised (`bool`): Whether the model is.

    Returns:
        `tuple`: The `PeftModel`, and what the adapters reach, by part.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: There is nothing that they could be put on, or dropout is asked for on stacked experts.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs PEFT: pip install 'moellava[peft]'.") from error
    modules, parameters = targets(model)
    chosen = {part: names for part, names in modules.items() if getattr(lora, part)}
    stacked = parameters if lora.experts else []
    if not stacked and not any(chosen.values()):
        wanted = ", ".join(part for part in modules if getattr(lora, part))
        raise ValueError(f"There is nothing in the model that lora could be put on: it has no {wanted}.")
    if stacked and lora.dropout:
        raise ValueError(
            f"lora's dropout is {lora.dropout}, but the experts' stacked tensors take none. Give dropout: 0, or "
            "experts: false."
        )
    routers = [name for name, module in model.named_modules() if isinstance(module, Router) and not module.frozen]
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=[name for names in chosen.values() for name in names],
        target_parameters=stacked or None,
        modules_to_save=routers if trains_routers and routers else None,
        task_type="CAUSAL_LM",
    )
    if quantised:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    processor = model.processor
    adapted = peft.get_peft_model(model, config)
    adapted.processor = processor
    reach = _reach(adapted, modules, parameters)
    for part, found in reach.items():
        logger.info("lora: %s: %d of %d have an adapter", part, found.adapted, found.of)
    logger.info("lora: routers: %d of %d are trained in full", len(routers) if trains_routers else 0, len(routers))
    return adapted, reach


def targets(model: nn.Module) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the names of all linear layers by part, and those of the experts' stacked tensors."""
    modules: dict[str, list[str]] = {part: [] for part in ("attention", "mlp", "experts", "projector", "vision_tower")}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):  # bitsandbytes' are ones too
            continue
        place = place_of(name)
        part = "projector" if place == "multi_modal_projector" else place
        if place == "language_model":
            part = "attention" if _ATTENTION.search(name) else "experts" if EXPERTS.search(name) else "mlp"
        if part in modules:
            modules[part].append(name)
    parameters = [
        name
        for name, parameter in model.named_parameters()
        if place_of(name) == "language_model" and EXPERTS.search(name) and parameter.dim() == 3
    ]
    return modules, parameters


def _reach(adapted: nn.Module, modules: dict[str, list[str]], parameters: list[str]) -> dict[str, Reach]:
    """Counts on the adapted model itself, not by what it was asked for."""
    reach = {part: Reach(of=len(names)) for part, names in modules.items()}
    reach["experts"].of += len(parameters)
    part_of = {name: part for part, names in modules.items() for name in names}
    for name, module in adapted.named_modules():
        if not hasattr(module, "lora_A") or not module.lora_A:
            continue
        plain = re.sub(r"\.base_layer\b", "", name.removeprefix(PEFT_PREFIX))
        reach[part_of.get(plain, "experts")].adapted += 1
    return {part: found for part, found in reach.items() if found.of}


__all__ = ["Reach", "put_adapters", "targets"]
