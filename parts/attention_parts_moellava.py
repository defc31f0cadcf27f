# SPDX-License-Identifier: Apache-2.0
"""What projectors with learned tokens share: BLIP-2's Q-Former, and the number of attention heads."""

import torch
from torch import nn
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerEncoder

from .projector_checks_moellava import check_positive_int


# Spread of freshly drawn queries and latents: the library's usual initializer_range. They must differ from one another
# from the start, since equal ones get equal gradients and would stay equal for ever.
LEARNED_TOKENS_STD = 0.02


# The head width that `num_attention_heads=None` aims at, and the narrowest one it settles for.
_USUAL_HEAD_WIDTH = 64
_NARROWEST_HEAD_WIDTH = 8


def check_positive_number(projector: str, **numbers: float) -> None:
    """Raises ValueError for the first of `numbers` that is no number above 0."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not number > 0:
            raise ValueError(f"The projector '{projector}' needs {name} as a number above 0, got {number!r}.")


def resolve_num_attention_heads(projector: str, num_attention_heads: int | None, width_name: str, width: int) -> int:
    """The number of attention heads for `width` channels: `num_attention_heads` where it is given and divides `width`
    (ValueError where it does not), else the number whose head width lies nearest 64, which is 64 wherever 64 divides.
    """
    if num_attention_heads is None:
        narrowest = min(_NARROWEST_HEAD_WIDTH, width)
        head_widths = [head_width for head_width in range(narrowest, width + 1) if width % head_width == 0]
        return width // min(
            head_widths, key=lambda head_width: max(head_width / _USUAL_HEAD_WIDTH, _USUAL_HEAD_WIDTH / head_width)
        )
    check_positive_int(projector, num_attention_heads=num_attention_heads)
    if width % num_attention_heads != 0:
        raise ValueError(
            f"The projector '{projector}' cannot split {width_name}={width} into num_attention_heads="
            f"{num_attention_heads} heads of equal width. Use a number of heads that divides {width}, or leave "
            f"num_attention_heads out to have one chosen."
        )
    return num_attention_heads


class QFormerModule(nn.Module):
    """The body of the Q-Former: a norm of the queries, then BLIP-2's encoder.

    The parameter names and the result are those of transformers' `Blip2QFormerModel` without text input. That class
    itself is a `PreTrainedModel`, whose forward replaces the output recording of the model around it and which any
    attention implementation chosen for the text model would reach; this one is a plain module, which `"eager"` reaches.

    Args:
        config (`Blip2QFormerConfig`): Sizes, and the attention implementation.
    """

    def __init__(self, config: Blip2QFormerConfig):
        super().__init__()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = Blip2QFormerEncoder(config)

    def forward(self, query_embeds: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        """`query_embeds` of shape `(batch, queries, hidden_size)` and `encoder_hidden_states` of shape `(batch,
        tokens, encoder_hidden_size)` to `(batch, queries, hidden_size)`. Every query sees every token.
        """
        encoder_outputs = self.encoder(
            self.layernorm(query_embeds),
            encoder_hidden_states=encoder_hidden_states,
            query_length=query_embeds.shape[1],
        )
        return encoder_outputs.last_hidden_state
