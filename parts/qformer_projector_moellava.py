# SPDX-License-Identifier: Apache-2.0
"""BLIP-2's Q-Former as a projector."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig

from .attention_parts_moellava import (
    LEARNED_TOKENS_STD,
    QFormerModule,
    check_positive_number,
    resolve_num_attention_heads,
)
from .projector_checks_moellava import build_activation, check_image_features, check_positive_int


class QFormerProjector(nn.Module):
    """BLIP-2's Q-Former (Li et al. 2023, "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders
    and Large Language Models", arXiv:2301.12597): learned queries attend to one another and to the image features, and
    a linear layer takes them to the text model's width. The number of tokens is `num_query_tokens` for any input.

    The parameter names `query_tokens`, `qformer.*` and `language_projection.*` are those of transformers'
    `Blip2ForConditionalGeneration`. The blocks run without dropout, and with PyTorch's scaled dot product attention
    unless the model is loaded with `attn_implementation="eager"`.

    Args:
        vision_hidden_size (`int`): Width of the image features.
        text_hidden_size (`int`): Width of the text model's embeddings.
        num_query_tokens (`int`, defaults to 32): Number of learned queries.
        qformer_hidden_size (`int`, defaults to 768): Width of the queries and the blocks.
        num_hidden_layers (`int`, defaults to 2): Number of blocks. BLIP-2's 12 start from BERT's weights and have a
            pretraining of their own; blocks that start from nothing and learn through the text model alone are kept
            shallow, as in the older MoE-LLaVA builders. Give 12, with `cross_attention_frequency=2`, for BLIP-2's
            shape.
        num_attention_heads (`int`, *optional*): Number of attention heads, a divisor of `qformer_hidden_size`. `None`
            means heads 64 wide, or the nearest width that divides.
        intermediate_size (`int`, *optional*): Width inside the feed-forward layers; `None` means four times
            `qformer_hidden_size`.
        cross_attention_frequency (`int`, defaults to 1): Every how many blocks, from the first on, the queries attend
            to the image features.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the feed-forward layers, a name in `ACT2FN`.
        layer_norm_eps (`float`, defaults to 1e-12): Epsilon of the layer norms.

    Raises:
        ValueError: a size is no integer of at least 1, `qformer_hidden_size` is not divisible by
            `num_attention_heads`, `hidden_act` is unknown or has weights of its own, or `layer_norm_eps` is not
            above 0.
    """

    # How processes divide it; attention they hold whole.
    _tp_plan = {
        "qformer.encoder.layer.*.intermediate_query.dense": "colwise",
        "qformer.encoder.layer.*.output_query.dense": "rowwise",
    }

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        num_query_tokens: int = 32,
        qformer_hidden_size: int = 768,
        num_hidden_layers: int = 2,
        num_attention_heads: int | None = None,
        intermediate_size: int | None = None,
        cross_attention_frequency: int = 1,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-12,
    ):
        super().__init__()
        check_positive_int(
            "qformer",
            vision_hidden_size=vision_hidden_size,
            text_hidden_size=text_hidden_size,
            num_query_tokens=num_query_tokens,
            qformer_hidden_size=qformer_hidden_size,
            num_hidden_layers=num_hidden_layers,
            cross_attention_frequency=cross_attention_frequency,
        )
        if intermediate_size is None:
            intermediate_size = 4 * qformer_hidden_size
        check_positive_int("qformer", intermediate_size=intermediate_size)
        check_positive_number("qformer", layer_norm_eps=layer_norm_eps)
        build_activation("qformer", hidden_act)  # for its check alone: the blocks build their own from the name

        self.vision_hidden_size = vision_hidden_size
        self.attention_config = config = Blip2QFormerConfig(
            hidden_size=qformer_hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=resolve_num_attention_heads(
                "qformer", num_attention_heads, "qformer_hidden_size", qformer_hidden_size
            ),
            intermediate_size=intermediate_size,
            hidden_act=hidden_act,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=float(layer_norm_eps),
            cross_attention_frequency=cross_attention_frequency,
            encoder_hidden_size=vision_hidden_size,
            attn_implementation="sdpa",
        )
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, qformer_hidden_size))
        self.qformer = QFormerModule(config)
        self.language_projection = nn.Linear(qformer_hidden_size, text_hidden_size)
        self.initialize_parameters()

    @classmethod
    def num_output_tokens(cls, num_tokens: int, num_query_tokens: int = 32, **fields) -> int:
        """Number of tokens returned for `num_tokens` image features: `num_query_tokens`, whatever `num_tokens` is.
        `fields` are the projector's other fields. Raises ValueError unless `num_query_tokens` is an integer of at
        least 1.
        """
        check_positive_int("qformer", num_query_tokens=num_query_tokens)
        return num_query_tokens

    @torch.no_grad()
    def initialize_parameters(self) -> None:
        """Draws the queries anew, unless they were loaded."""
        init.normal_(self.query_tokens, mean=0.0, std=LEARNED_TOKENS_STD)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, vision_hidden_size)` to `(batch, num_query_tokens, text_hidden_size)`."""
        check_image_features("qformer", image_features, self.vision_hidden_size)
        query_embeds = self.query_tokens.expand(image_features.shape[0], -1, -1)
        return self.language_projection(self.qformer(query_embeds, image_features))
