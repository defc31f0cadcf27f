# SPDX-License-Identifier: Apache-2.0
"""The names of weights in a model's tree: the prefixes of its parts, and the patterns that tell them apart."""

import re


PROJECTOR_PREFIX = "model.multi_modal_projector."

TOWER_PREFIX = "model.vision_tower."

# What a dense model has no weights for.
NEW_WEIGHTS = re.compile(r".*\.mlp\.(gate|coefficient)\.(weight|bias)")


def is_new_weight(name: str) -> bool:
    """Whether a weight is one that a dense model does not have."""
    return NEW_WEIGHTS.fullmatch(name) is not None


__all__ = ["NEW_WEIGHTS", "PROJECTOR_PREFIX", "TOWER_PREFIX", "is_new_weight"]
