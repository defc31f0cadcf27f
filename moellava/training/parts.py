# SPDX-License-Identifier: Apache-2.0
"""The parts of a model by the names that recipes call them: which are trained, and at which learning rate."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..parts.modular_experts_moellava import ModularExperts
from ..parts.moe_block_moellava import Router
from ..tree import EXPERTS, HEAD, ROUTER, place_of


# Every part, with the part that it lies within, if any.
PARTS: dict[str, str | None] = {
    "vision_tower": None,
    "multi_modal_projector": None,
    "language_model": None,
    "embeddings": "language_model",
    "experts": "language_model",
    "router": "language_model",
    "lm_head": None,
}
# What the stages of LLaVA and MoE-LLaVA train.
TRAINED = {
    "align": ("multi_modal_projector",),
    "instruct": ("multi_modal_projector", "language_model", "lm_head"),
    "moe": ("multi_modal_projector", "experts", "router"),
}


class PartNames:
    """Tells the part of every parameter of a model, with adapters on it or without.

    Args:
        model (`nn.Module`): The model.
    """

    def __init__(self, model: nn.Module):
        embedding = model.get_input_embeddings()
        self._embedding = {id(parameter) for parameter in embedding.parameters()}
        self._parameters = list(model.named_parameters())

    def __iter__(self):
        """Yields part, name and parameter; what is shared by the embedding and the head counts as the embedding's."""
        for name, parameter in self._parameters:
            yield self._part_of(name, parameter), name, parameter

    def _part_of(self, name: str, parameter: nn.Parameter) -> str:
        if id(parameter) in self._embedding:
            return "embeddings"
        place = place_of(name) or HEAD
        if place != "language_model":
            return place
        if EXPERTS.search(name):
            return "experts"
        return "router" if ROUTER.search(name) else place


def by_part(values: Mapping[str, Any], part: str, default: Any) -> Any:
    """Returns the value that is given for a part, or for the part that it lies within; the narrower name wins."""
    for name in (part, PARTS[part]):
        if name in values:
            return values[name]
    return default


def set_trained(model: nn.Module, stage: str, freeze: list[str], unfreeze: list[str]) -> None:
    """Says for every parameter whether it is trained.

    Args:
        model (`nn.Module`): The model; what a quantised one holds in integers stays as it is.
        stage (`str`): What is trained where nothing else is said.
        freeze, unfreeze (`list[str]`): Parts that are not trained, and that are; a narrower name wins over a wider one,
            and both over the stage.

    Raises:
        ValueError: Nothing would be trained, or a router that the model keeps frozen.
    """
    by_stage = dict.fromkeys(TRAINED[stage], True)
    asked = dict.fromkeys(freeze, False) | dict.fromkeys(unfreeze, True)
    for part, _, parameter in PartNames(model):
        if parameter.is_floating_point():
            parameter.requires_grad_(by_part(asked, part, by_part(by_stage, part, False)))
    keeps_frozen = any(isinstance(module, Router) and module.frozen for module in model.modules())
    if keeps_frozen and "router" in unfreeze:
        raise ValueError(
            "unfreeze names the router, but the model keeps its routers frozen (moe_config.freeze_router). Give "
            "moe: {freeze_router: false}, or leave the router out of unfreeze."
        )
    for module in model.modules():
        if isinstance(module, Router) and module.frozen:
            module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"Nothing is left to train in the stage {stage!r}: freeze is {freeze}.")


def may_be_unused(model: nn.Module) -> bool:
    """Whether a batch may leave a trained parameter without a gradient, for which data-parallel training has to look.

    That are layers of the vision tower behind those in use, and experts that are modules of their own. Without a
    picture, several processes run tower and projector on a blank one.
    """
    names = [part for part, _, parameter in PartNames(model) if parameter.requires_grad]
    apart = any(isinstance(module, ModularExperts) for module in model.modules())
    return "vision_tower" in names or (apart and "experts" in names)


def trained_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Returns how many parameters every part has, and how many of them are trained."""
    counts = {part: {"parameters": 0, "trained": 0} for part in PARTS}
    for part, _, parameter in PartNames(model):
        counts[part]["parameters"] += parameter.numel()
        counts[part]["trained"] += parameter.numel() if parameter.requires_grad else 0
    return {part: count for part, count in counts.items() if count["parameters"]}


__all__ = ["PARTS", "TRAINED", "PartNames", "by_part", "may_be_unused", "set_trained", "trained_parameters"]
