# SPDX-License-Identifier: Apache-2.0
"""What several projectors are made of: the checks of their sizes, and the body of the Q-Former.

It registers nothing, so that every file of projectors can import it, whichever of them is imported first.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerEncoder


# Spread of freshly drawn queries and latents: the library's usual initializer_range. They must differ from one another
# from the start, since equal ones get equal gradients and would stay equal for ever.
LEARNED_TOKENS_STD = 0.02

# The head width that `num_attention_heads=None` aims at, and the narrowest one it settles for.
_USUAL_HEAD_WIDTH = 64
_NARROWEST_HEAD_WIDTH = 8


def check_positive_int(projector: str, **sizes: int) -> None:
    """Raises ValueError for the first of `sizes` that is no int of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"The projector '{projector}' needs {name} as an integer of at least 1, got {size!r}.")


def check_positive_number(projector: str, **numbers: float) -> None:
    """Raises ValueError for the first of `numbers` that is no number above 0."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not number > 0:
            raise ValueError(f"The projector '{projector}' needs {name} as a number above 0, got {number!r}.")


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


def check_image_features(projector: str, image_features: torch.Tensor, vision_hidden_size: int) -> None:
    """Raises ValueError unless `image_features` has the shape `(batch, tokens, vision_hidden_size)`."""
    if image_features.ndim != 3 or image_features.shape[-1] != vision_hidden_size:
        raise ValueError(
            f"The projector '{projector}' takes image features of shape (batch, tokens, {vision_hidden_size}), got "
            f"{tuple(image_features.shape)}. Check that vision_hidden_size is the width of the selected features."
        )


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


__all__ = [
    "LEARNED_TOKENS_STD",
    "QFormerModule",
    "build_activation",
    "check_bool",
    "check_image_features",
    "check_positive_int",
    "check_positive_number",
    "resolve_num_attention_heads",
]
