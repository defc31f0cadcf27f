# SPDX-License-Identifier: Apache-2.0
"""Idefics2's perceiver resampler as a projector."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverLayer, Idefics2RMSNorm

from .attention_parts_moellava import LEARNED_TOKENS_STD, check_positive_number, resolve_num_attention_heads
from .projector_checks_moellava import build_activation, check_image_features, check_positive_int


_WIDEST_DEFAULT_LATENTS = 1024


class PerceiverProjector(nn.Module):
    """Perceiver resampler (Jaegle et al. 2021, "Perceiver: General Perception with Iterative Attention",
    arXiv:2103.03206; Alayrac et al. 2022, "Flamingo", arXiv:2204.14198), with the blocks of Idefics2 (Laurençon et al.
    2024, "What matters when building vision-language models?", arXiv:2405.02246): learned latents attend to the image
    features and to one another. The number of tokens is `num_latents` for any input.

    A linear layer takes the image features to `latent_dim` and another one takes the latents to `text_hidden_size`.
    Both are always there, also between equal widths, so that the parameter names depend on no width. The parameter
    names `latents`, `layers.*` and `norm.*` are those of transformers' `Idefics2PerceiverResampler`. The blocks run
    without dropout, and with PyTorch's scaled dot product attention unless the model is loaded with
    `attn_implementation="eager"`.

    A block has about `16 * latent_dim ** 2` weights, which is why `latent_dim` does not grow with the text model by
    default: at 1024 three blocks have 50 million, at 4096 they would have 0.8 billion.

    Args:
        vision_hidden_size (`int`): Width of the image features.
        text_hidden_size (`int`): Width of the text model's embeddings.
        num_latents (`int`, defaults to 64): Number of learned latents.
        latent_dim (`int`, *optional*): Width of the latents and the blocks; `None` means
            `text_hidden_size`, at most 1024.
        num_hidden_layers (`int`, defaults to 3): Number of blocks, Idefics2's resampler depth.
        num_attention_heads (`int`, *optional*): Number of attention heads, a divisor of `latent_dim`. `None` means
            heads 64 wide, or the nearest width that divides.
        num_key_value_heads (`int`, *optional*): Number of key and value heads, a divisor of the number of attention
            heads. `None` means as many as attention heads; Idefics2 has a quarter.
        hidden_act (`str`, defaults to `"silu"`): Activation of the gated feed-forward layers, a name in `ACT2FN`.
        rms_norm_eps (`float`, defaults to 1e-6): Epsilon of the RMS norms.

    Raises:
        ValueError: a size is no integer of at least 1, `latent_dim` is not divisible by `num_attention_heads` or that
            by `num_key_value_heads`, `hidden_act` is unknown or has weights of its own, or `rms_norm_eps` is not
            above 0.
    """

    # How processes divide it; attention they hold whole.
    _tp_plan = {
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        num_latents: int = 64,
        latent_dim: int | None = None,
        num_hidden_layers: int = 3,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
    ):
        super().__init__()
        check_positive_int("perceiver", text_hidden_size=text_hidden_size)
        if latent_dim is None:
            latent_dim = min(text_hidden_size, _WIDEST_DEFAULT_LATENTS)
        check_positive_int(
            "perceiver",
            vision_hidden_size=vision_hidden_size,
            text_hidden_size=text_hidden_size,
            num_latents=num_latents,
            latent_dim=latent_dim,
            num_hidden_layers=num_hidden_layers,
        )
        check_positive_number("perceiver", rms_norm_eps=rms_norm_eps)
        build_activation("perceiver", hidden_act)  # for its check alone: the blocks build their own from the name
        num_attention_heads = resolve_num_attention_heads("perceiver", num_attention_heads, "latent_dim", latent_dim)
        if num_key_value_heads is None:
            num_key_value_heads = num_attention_heads
        check_positive_int("perceiver", num_key_value_heads=num_key_value_heads)
        if num_attention_heads % num_key_value_heads != 0:
            raise ValueError(
                f"The projector 'perceiver' cannot share num_key_value_heads={num_key_value_heads} among "
                f"num_attention_heads={num_attention_heads} heads. Use a number that divides {num_attention_heads}, "
                f"or leave num_key_value_heads out to have as many."
            )

        self.vision_hidden_size = vision_hidden_size
        self.attention_config = config = Idefics2PerceiverConfig(
            hidden_size=latent_dim,
            hidden_act=hidden_act,
            rms_norm_eps=float(rms_norm_eps),
            resampler_n_latents=num_latents,
            resampler_depth=num_hidden_layers,
            resampler_n_heads=num_attention_heads,
            resampler_head_dim=latent_dim // num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            attention_dropout=0.0,
            attn_implementation="sdpa",
        )
        self.input_projection = nn.Linear(vision_hidden_size, latent_dim)
        # The layers and not Idefics2PerceiverResampler around them: it sets its latents to ones, all of them equal,
        # and wants an attention mask, whose all-ones shortcut looks at the data.
        self.latents = nn.Parameter(torch.zeros(num_latents, latent_dim))
        self.layers = nn.ModuleList([Idefics2PerceiverLayer(config, index) for index in range(num_hidden_layers)])
        self.norm = Idefics2RMSNorm(latent_dim, eps=config.rms_norm_eps)
        self.output_projection = nn.Linear(latent_dim, text_hidden_size)
        self.initialize_parameters()

    @classmethod
    def num_output_tokens(cls, num_tokens: int, num_latents: int = 64, **fields) -> int:
        """Number of tokens returned for `num_tokens` image features: `num_latents`, whatever `num_tokens` is. `fields`
        are the projector's other fields. Raises ValueError unless `num_latents` is an integer of at least 1.
        """
        check_positive_int("perceiver", num_latents=num_latents)
        return num_latents

    @torch.no_grad()
    def initialize_parameters(self) -> None:
        """Draws the latents anew, unless they were loaded."""
        init.normal_(self.latents, mean=0.0, std=LEARNED_TOKENS_STD)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, vision_hidden_size)` to `(batch, num_latents, text_hidden_size)`."""
        check_image_features("perceiver", image_features, self.vision_hidden_size)
        context = self.input_projection(image_features)
        latents = self.latents.expand(image_features.shape[0], -1, -1)
        for layer in self.layers:
            # No mask: every latent sees every image token and every latent.
            latents = layer(latents, context)
        return self.output_projection(self.norm(latents))
