# SPDX-License-Identifier: Apache-2.0
"""What projectors check of their fields, and of the image features that they get."""

import torch
from torch import nn
from transformers.activations import ACT2FN


def check_positive_int(projector: str, **sizes: int) -> None:
    """Raises ValueError for the first of `sizes` that is no int of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"The projector '{projector}' needs {name} as an integer of at least 1, got {size!r}.")


def check_bool(projector: str, **flags: bool) -> None:
    """Raises ValueError for the first of `flags` that is neither True nor False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"The projector '{projector}' needs {name} as True or False, got {flag!r}.")


def build_activation(projector: str, hidden_act: str) -> nn.Module:
    """The activation called `hidden_act` in transformers' `ACT2FN`. Raises ValueError for one that cannot be used."""
    if not isinstance(hidden_act, str) or hidden_act not in ACT2FN:
        raise ValueError(
            f"The projector '{projector}' does not know hidden_act={hidden_act!r}. Use one of transformers' "
            f"activations: {', '.join(sorted(ACT2FN))}."
        )
    activation = ACT2FN[hidden_act]
    if next(activation.parameters(), None) is not None:
        # Nothing would initialise them: transformers' models draw weights for the layers they know.
        raise ValueError(
            f"The projector '{projector}' cannot use hidden_act={hidden_act!r}, which has weights of its own. Use an "
            f"activation without weights, such as 'gelu' or 'silu'."
        )
    return activation


def check_image_features(projector: str, image_features: torch.Tensor, vision_hidden_size: int) -> None:
    """Raises ValueError unless `image_features` has the shape `(batch, tokens, vision_hidden_size)`."""
    if image_features.ndim != 3 or image_features.shape[-1] != vision_hidden_size:
        raise ValueError(
            f"The projector '{projector}' takes image features of shape (batch, tokens, {vision_hidden_size}), got "
            f"{tuple(image_features.shape)}. Check that vision_hidden_size is the width of the selected features."
        )
