# SPDX-License-Identifier: Apache-2.0
"""MoE-LLaVA's Q-Former as a projector, for the checkpoints that have it: `qformer2_64` is `num_hidden_layers=2` and
`num_query_tokens=64`, with `cheap_` before it `narrow=True`.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig

from .attention_parts_moellava import LEARNED_TOKENS_STD, QFormerModule
from .legacy_projector_parts_moellava import NUM_ATTENTION_HEADS, block_sizes, two_linear_layers
from .projector_checks_moellava import check_image_features, check_positive_int


_QFORMER_LAYER_NORM_EPS = 1e-12


class OlderQFormerProjector(nn.Module):
    """MoE-LLaVA's `qformer{L}_{Q}`: two linear layers, BLIP-2's Q-Former (Li et al. 2023, arXiv:2301.12597) with
    cross-attention in every layer, and two linear layers. The number of tokens is `num_query_tokens` for any input.

    It differs from the projector `qformer` in the linear layers around the Q-Former, and in its widths: everything is
    as wide as the text model, with 32 attention heads, or with `narrow` as wide as the image features.

    Args:
        vision_hidden_size (`int`): Width of the image features.
        text_hidden_size (`int`): Width of the text model's embeddings.
        num_hidden_layers (`int`, defaults to 2): Number of the Q-Former's layers, `L`.
        num_query_tokens (`int`, defaults to 64): Number of learned queries, `Q`.
        narrow (`bool`, defaults to `False`): Whether the Q-Former is as wide as the image features, with feed-forward
            layers four times as wide, instead of as wide as the text model, with feed-forward layers 2.6875 times as
            wide. The older code's `cheap_qformer{L}_{Q}`.

    Raises:
        ValueError: a size is no integer of at least 1, `narrow` is no bool, or 32 does not divide the blocks' width.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        num_hidden_layers: int = 2,
        num_query_tokens: int = 64,
        narrow: bool = False,
    ):
        super().__init__()
        check_positive_int("older_qformer", num_hidden_layers=num_hidden_layers, num_query_tokens=num_query_tokens)
        width, intermediate_size = block_sizes("older_qformer", vision_hidden_size, text_hidden_size, narrow)
        self.vision_hidden_size = vision_hidden_size
        self.attention_config = config = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=NUM_ATTENTION_HEADS,
            intermediate_size=intermediate_size,
            hidden_act="gelu",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=_QFORMER_LAYER_NORM_EPS,
            cross_attention_frequency=1,
            encoder_hidden_size=width,
            attn_implementation="sdpa",
        )
        self.proj_in = two_linear_layers(vision_hidden_size, width)
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, width))
        self.qformer = QFormerModule(config)
        self.proj_out = two_linear_layers(width, text_hidden_size)
        self.initialize_parameters()

    @classmethod
    def num_output_tokens(cls, num_tokens: int, num_query_tokens: int = 64, **fields) -> int:
        """Number of tokens returned for `num_tokens` image features: `num_query_tokens`, whatever `num_tokens` is.
        `fields` are the projector's other fields. Raises ValueError unless `num_query_tokens` is an integer of at
        least 1.
        """
        check_positive_int("older_qformer", num_query_tokens=num_query_tokens)
        return num_query_tokens

    @torch.no_grad()
    def initialize_parameters(self) -> None:
        """Draws the queries anew, unless they were loaded. The older code starts them all at zero, where they get
        equal gradients and stay equal.
        """
        init.normal_(self.query_tokens, mean=0.0, std=LEARNED_TOKENS_STD)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, vision_hidden_size)` to `(batch, num_query_tokens, text_hidden_size)`."""
        check_image_features("older_qformer", image_features, self.vision_hidden_size)
        query_embeds = self.query_tokens.expand(image_features.shape[0], -1, -1)
        return self.proj_out(self.qformer(query_embeds, self.proj_in(image_features)))
