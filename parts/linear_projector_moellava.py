# SPDX-License-Identifier: Apache-2.0
"""A projector of one linear layer."""

import torch
from torch import nn

from .projector_checks_moellava import check_bool, check_image_features, check_positive_int


class LinearProjector(nn.Module):
    """One linear layer per token, as in LLaVA (Liu et al. 2023, "Visual Instruction Tuning", arXiv:2304.08485).

    Args:
        vision_hidden_size (`int`): Width of the image features.
        text_hidden_size (`int`): Width of the text model's embeddings.
        bias (`bool`, defaults to `True`): Whether the layer has a bias.

    Raises:
        ValueError: a width is no integer of at least 1, or `bias` is no bool.
    """

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, bias: bool = True):
        super().__init__()
        check_positive_int("linear", vision_hidden_size=vision_hidden_size, text_hidden_size=text_hidden_size)
        check_bool("linear", bias=bias)
        self.vision_hidden_size = vision_hidden_size
        self.linear = nn.Linear(vision_hidden_size, text_hidden_size, bias=bias)

    @classmethod
    def num_output_tokens(cls, num_tokens: int, **fields) -> int:
        """Number of tokens returned for `num_tokens` image features: as many. `fields` are the projector's fields."""
        return num_tokens

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, vision_hidden_size)` to `(batch, tokens, text_hidden_size)`."""
        check_image_features("linear", image_features, self.vision_hidden_size)
        return self.linear(image_features)
