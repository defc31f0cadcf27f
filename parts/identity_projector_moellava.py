# SPDX-License-Identifier: Apache-2.0
"""A projector that hands the image features on as they are."""

import torch
from torch import nn

from .projector_checks_moellava import check_image_features, check_positive_int


class IdentityProjector(nn.Module):
    """Hands the image features on as they are, for a vision tower that is as wide as the text model. No weights.

    Args:
        vision_hidden_size (`int`): Width of the image features.
        text_hidden_size (`int`): Width of the text model's embeddings, the same number.

    Raises:
        ValueError: a width is no integer of at least 1, or the two differ.
    """

    def __init__(self, vision_hidden_size: int, text_hidden_size: int):
        super().__init__()
        check_positive_int("identity", vision_hidden_size=vision_hidden_size, text_hidden_size=text_hidden_size)
        if vision_hidden_size != text_hidden_size:
            raise ValueError(
                f"The projector 'identity' needs equal widths, got vision_hidden_size={vision_hidden_size} and "
                f"text_hidden_size={text_hidden_size}. Use the projector 'mlp' or 'linear', which map one to "
                "the other."
            )
        self.vision_hidden_size = vision_hidden_size

    @classmethod
    def num_output_tokens(cls, num_tokens: int, **fields) -> int:
        """Number of tokens returned for `num_tokens` image features: as many. `fields` are the projector's fields."""
        return num_tokens

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, vision_hidden_size)` to the same tensor."""
        check_image_features("identity", image_features, self.vision_hidden_size)
        return image_features
