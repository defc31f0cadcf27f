# SPDX-License-Identifier: Apache-2.0
"""How a model is divided among processes: the plans that transformers reads (`DistributedConfig`, `tp_plan="auto"`).

A plan says how a module or a parameter is divided, by its name with `*` for the numbers of layers. transformers takes
the plans of a model's children, of which the language model brings that of its family. What stands deeper declares its
own on its class, and is collected here: the tower's blocks, the sparse layers, their routers and experts. What no rule
names, every process holds whole.
"""

import re
from collections.abc import Mapping
from itertools import chain

from transformers import PreTrainedModel

from .sparse_moellava import SparseMoeBlock


# The kinds of plans, by the names that they have on classes: tensor, expert and fully sharded data parallelism.
_KINDS = ("_tp_plan", "_ep_plan", "_fsdp_plan")


def add_plans(part: PreTrainedModel, plans: Mapping[str, Mapping[str, str]]) -> None:
    """Adds rules to the plans of a part, and drops those that name nothing in it.

    Args:
        part (`PreTrainedModel`): A language model's body, or a vision tower.
        plans (`Mapping[str, Mapping[str, str]]`): By kind (`_tp_plan`, ...), styles by names within the part.
    """
    names = {_general(name) for name, _ in chain(part.named_modules(), part.named_parameters())}
    for kind in _KINDS:
        rules = (getattr(part, kind, None) or {}) | plans.get(kind, {})
        setattr(part, kind, {name: style for name, style in rules.items() if name in names})


def sparse_plans(language_model: PreTrainedModel) -> dict[str, dict[str, str]]:
    """Returns the plans that the sparse layers of a language model declare, by kind.

    A dense MLP that stands within a sparse layer is divided as its family divides the one whose place it has.

    Args:
        language_model (`PreTrainedModel`): The body, with its sparse layers in place.
    """
    plans: dict[str, dict[str, str]] = {kind: {} for kind in _KINDS}
    family = getattr(language_model, "_tp_plan", None) or {}
    for name, block in language_model.named_modules():
        if not isinstance(block, SparseMoeBlock):
            continue
        place = _general(name)
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


def _general(name: str) -> str:
    """Returns a name with `*` in the place of numbers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


__all__ = ["add_plans", "sparse_plans"]
