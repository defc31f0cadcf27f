# SPDX-License-Identifier: Apache-2.0
"""What MoE-LLaVA's own projectors share (Lin et al. 2024, arXiv:2401.15947): sizes, grids of patches, linear layers.

Sizes, parameter names and results of these projectors are those of the older code.
"""

import torch
from torch import nn

from .projector_checks_moellava import check_bool, check_positive_int


# What the older code fixes: the same numbers at every width.
NUM_ATTENTION_HEADS = 32


# Width inside the feed-forward layers, as a multiple of the blocks' width.
_WIDE_RATIO = 2.6875
_NARROW_RATIO = 4


def check_not_negative_int(projector: str, **numbers: int) -> None:
    """Raises ValueError for the first of `numbers` that is no int of at least 0."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"The projector '{projector}' needs {name} as an integer of at least 0, got {number!r}.")


def block_sizes(projector: str, vision_hidden_size: int, text_hidden_size: int, narrow: bool) -> tuple[int, int]:
    """Returns the width of a projector's blocks and the width inside their feed-forward layers.

    Raises:
        ValueError: 32, which is the number of attention heads and of the norms' groups, does not divide the width.
    """
    check_positive_int(projector, vision_hidden_size=vision_hidden_size, text_hidden_size=text_hidden_size)
    check_bool(projector, narrow=narrow)
    name, width = ("vision_hidden_size", vision_hidden_size) if narrow else ("text_hidden_size", text_hidden_size)
    if width % NUM_ATTENTION_HEADS != 0:
        raise ValueError(
            f"The projector '{projector}' with narrow={narrow} has blocks as wide as {name}={width}, which cannot be "
            f"split into its {NUM_ATTENTION_HEADS} attention heads and groups. Use a part whose width is a multiple "
            f"of {NUM_ATTENTION_HEADS}, narrow={not narrow}, or another projector."
        )
    return width, int(width * (_NARROW_RATIO if narrow else _WIDE_RATIO))


def two_linear_layers(in_features: int, out_features: int) -> nn.Sequential:
    """Two linear layers with a GELU between them."""
    # trf-ignore: TRF036  names and indices are those of the older files
    return nn.Sequential(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))


def rounded_root(number: int) -> int:
    """The square root of `number`, rounded down. By comparisons, which `torch.compile` can follow in one graph where a
    number of tokens is symbolic, as it cannot follow `math.isqrt`.
    """
    root = 0
    while (root + 1) * (root + 1) <= number:
        root += 1
    return root


def grid_side(projector: str, num_tokens: int) -> int:
    """The side of the square grid that `num_tokens` patches make. Raises ValueError where they make none of 2 x 2 or
    more.
    """
    side = rounded_root(num_tokens)
    if side * side != num_tokens or side < 2:
        raise ValueError(
            f"The projector '{projector}' pools a square grid of patches, at least 2 x 2, but gets {num_tokens} "
            "tokens, which make none. Select the patches alone, all of them "
            "(vision_feature_select_strategy='patch'), or use a projector that needs no grid, such as 'mlp'."
        )
    return side


def to_grid(tokens: torch.Tensor, side: int) -> torch.Tensor:
    """`(batch, side * side, channels)` to `(batch, channels, side, side)`, row by row."""
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def to_tokens(grid: torch.Tensor) -> torch.Tensor:
    """`(batch, channels, side, side)` to `(batch, side * side, channels)`, row by row."""
    return grid.flatten(2).transpose(1, 2)
