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


# The kinds of plans, by the names that they have on classes: tensor, expert and fully sharded data parallelism.
PLAN_KINDS = ("_tp_plan", "_ep_plan", "_fsdp_plan")


def add_plans(part: PreTrainedModel, plans: Mapping[str, Mapping[str, str]]) -> None:
    """Adds rules to the plans of a part, and drops those that name nothing in it.

    Args:
        part (`PreTrainedModel`): A language model's body, or a vision tower.
        plans (`Mapping[str, Mapping[str, str]]`): By kind (`_tp_plan`, ...), styles by names within the part.
    """
    names = {general_name(name) for name, _ in chain(part.named_modules(), part.named_parameters())}
    for kind in PLAN_KINDS:
        rules = (getattr(part, kind, None) or {}) | plans.get(kind, {})
        setattr(part, kind, {name: style for name, style in rules.items() if name in names})


def general_name(name: str) -> str:
    """Returns a name with `*` in the place of numbers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
