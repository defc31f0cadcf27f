# SPDX-License-Identifier: Apache-2.0
"""The names of weights and modules in a model's tree: the prefixes of its parts, and patterns that tell kinds apart.

What other layouts call theirs stands where these are read: `converting/` and `reading/`.
"""

import re
from collections.abc import Mapping
from typing import Any


HEAD = "lm_head"
PART_NAMES = ("vision_tower", "multi_modal_projector", "language_model", HEAD)
TOWER_PREFIX = "model.vision_tower."
PROJECTOR_PREFIX = "model.multi_modal_projector."
BODY_PREFIX = "model.language_model."
PEFT_PREFIX = "base_model.model."  # before all of these, where an adapter is put on

ROUTED_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
# The shared ones too; `mlp.mlp` is the residual MLP of our sparse blocks.
EXPERTS = re.compile(r"\.(experts|meta_expert|shared_expert|shared_mlp)\.|\.mlp\.mlp\.")
ROUTER = re.compile(r"(^|\.)(gate|router|coefficient|shared_expert_gate)(\.|$)")
# Of the sparse blocks, what a dense model has no weights for.
_NEW_WEIGHTS = re.compile(r".*\.mlp\.(gate|coefficient)\.(weight|bias)")


def is_new_weight(name: str) -> bool:
    """Whether a weight is one that a dense model does not have."""
    return _NEW_WEIGHTS.fullmatch(name) is not None


def place_of(name: str) -> str | None:
    """Returns which of `PART_NAMES` a weight or a module belongs to, whatever wrappers put in front of its name."""
    return next((part for part in PART_NAMES if f".{part}." in f".{name}."), None)


def part_weights(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the weights of one part, by its own names."""
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}


def with_part(tensors: Mapping[str, Any], prefix: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the weights with those of one part replaced."""
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    return others | {f"{prefix}{name}": tensor for name, tensor in part.items()}


__all__ = [
    "BODY_PREFIX",
    "EXPERTS",
    "HEAD",
    "PART_NAMES",
    "PEFT_PREFIX",
    "PROJECTOR_PREFIX",
    "ROUTED_EXPERTS",
    "ROUTER",
    "TOWER_PREFIX",
    "is_new_weight",
    "part_weights",
    "place_of",
    "with_part",
]
