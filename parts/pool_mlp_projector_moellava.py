# SPDX-License-Identifier: Apache-2.0
"""MoE-LLaVA's pooled MLP as a projector, for the checkpoints that have it: `pool_mlp2x_gelu` has two
`num_hidden_layers`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .legacy_projector_parts_moellava import grid_side, to_grid, to_tokens
from .projector_checks_moellava import check_image_features, check_positive_int


class PoolMlpProjector(nn.Module):
    """MoE-LLaVA's `pool_mlp{N}x_gelu`: 2 x 2 average pooling of the grid of patches, then linear layers with GELUs
    between them, per token. 256 tokens become 64.

    Args:
        vision_hidden_size (`int`): Width of the image features.
        text_hidden_size (`int`): Width of the text model's embeddings, and between the layers.
        num_hidden_layers (`int`, defaults to 2): Number of linear layers, `N`.

    Raises:
        ValueError: a size is no integer of at least 1.
    """

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, num_hidden_layers: int = 2):
        super().__init__()
        check_positive_int(
            "pool_mlp",
            vision_hidden_size=vision_hidden_size,
            text_hidden_size=text_hidden_size,
            num_hidden_layers=num_hidden_layers,
        )
        self.vision_hidden_size = vision_hidden_size
        layers: list[nn.Module] = [nn.Linear(vision_hidden_size, text_hidden_size)]
        for _ in range(1, num_hidden_layers):
            layers += [nn.GELU(), nn.Linear(text_hidden_size, text_hidden_size)]
        # trf-ignore: TRF036  names and indices are those of the older files
        self.block = nn.Sequential(*layers)

    @classmethod
    def num_output_tokens(cls, num_tokens: int, **fields) -> int:
        """Number of tokens returned for `num_tokens` image features: half the side of their grid, rounded down,
        squared. `fields` are the projector's fields. Raises ValueError where `num_tokens` is no square number.
        """
        return (grid_side("pool_mlp", num_tokens) // 2) ** 2

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, vision_hidden_size)` to `(batch, out_tokens, text_hidden_size)`.

        Raises:
            ValueError: The shape is another one, or the tokens make no square grid.
        """
        check_image_features("pool_mlp", image_features, self.vision_hidden_size)
        side = grid_side("pool_mlp", image_features.shape[1])
        return self.block(to_tokens(F.avg_pool2d(to_grid(image_features, side), kernel_size=2)))
