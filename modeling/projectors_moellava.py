# SPDX-License-Identifier: Apache-2.0
"""The projectors that come with the package: from the width and the tokens of the vision tower to the text model's.

Every projector is an `nn.Module` built as `Projector(vision_hidden_size, text_hidden_size, **own_fields)`. It takes
image features of shape `(batch, tokens, vision_hidden_size)` and returns `(batch, out_tokens, text_hidden_size)`;
`num_output_tokens` tells `out_tokens` for a given `tokens`, which is what one image placeholder expands to. The own
fields, all of them with defaults, are the keyword arguments of `__init__`, and what a config's `projector_config` may
say beside `type`.

Linear layers and norms are initialised by the model that holds the projector, as those of its other parts. A parameter
that lies directly in a projector (learned queries, latents) is drawn by the projector's `initialize_parameters`, which
leaves loaded weights as they are.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverLayer, Idefics2RMSNorm

from ..configuration.registry_moellava import register_projector
from .projector_parts_moellava import (
    LEARNED_TOKENS_STD,
    QFormerModule,
    build_activation,
    check_bool,
    check_image_features,
    check_positive_int,
    check_positive_number,
    resolve_num_attention_heads,
)


_WIDEST_DEFAULT_LATENTS = 1024


@register_projector("linear")
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


@register_projector("mlp")
class MlpProjector(nn.Module):
    """Linear layers with an activation between them, per token, as in LLaVA-1.5 (Liu et al. 2023, "Improved Baselines
    with Visual Instruction Tuning", arXiv:2310.03744).

    The layers are called `linear_1` to `linear_N`: with two of them and `hidden_size=None`, names, shapes and result
    are those of transformers' `LlavaMultiModalProjector`.

    Args:
        vision_hidden_size (`int`): Width of the image features.
        text_hidden_size (`int`): Width of the text model's embeddings.
        hidden_size (`int`, *optional*): Width between the layers; `None` means `text_hidden_size`.
        num_hidden_layers (`int`, defaults to 2): Number of linear layers. LLaVA's `mlp2x_gelu` has 2; 1 is a single
            linear layer without activation.
        hidden_act (`str`, defaults to `"gelu"`): Activation between the layers, a name in transformers' `ACT2FN`.
        bias (`bool`, defaults to `True`): Whether the layers have biases.

    Raises:
        ValueError: a size is no integer of at least 1, `hidden_act` is unknown or has weights of its own, `bias` is no
            bool, or `hidden_size` is given although a single layer has no hidden width.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        hidden_size: int | None = None,
        num_hidden_layers: int = 2,
        hidden_act: str = "gelu",
        bias: bool = True,
    ):
        super().__init__()
        if hidden_size is None:
            hidden_size = text_hidden_size
        check_positive_int(
            "mlp",
            vision_hidden_size=vision_hidden_size,
            text_hidden_size=text_hidden_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
        )
        check_bool("mlp", bias=bias)
        if num_hidden_layers == 1 and hidden_size != text_hidden_size:
            raise ValueError(
                f"The projector 'mlp' with num_hidden_layers=1 is a single layer from {vision_hidden_size} to "
                f"{text_hidden_size} and has no place for hidden_size={hidden_size}. Leave hidden_size out, or use "
                f"num_hidden_layers=2 or more."
            )

        self.vision_hidden_size = vision_hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.act = build_activation("mlp", hidden_act)
        widths = [vision_hidden_size] + [hidden_size] * (num_hidden_layers - 1) + [text_hidden_size]
        for index in range(num_hidden_layers):
            # One attribute per layer instead of a list, for the parameter names of transformers' LLaVA.
            setattr(self, f"linear_{index + 1}", nn.Linear(widths[index], widths[index + 1], bias=bias))
        # Processes divide the layers two by two.
        self._tp_plan = {
            f"linear_{index}": "colwise" if index % 2 else "rowwise"
            for index in range(1, num_hidden_layers - num_hidden_layers % 2 + 1)
        }

    @classmethod
    def num_output_tokens(cls, num_tokens: int, **fields) -> int:
        """Number of tokens returned for `num_tokens` image features: as many. `fields` are the projector's fields."""
        return num_tokens

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, vision_hidden_size)` to `(batch, tokens, text_hidden_size)`."""
        check_image_features("mlp", image_features, self.vision_hidden_size)
        hidden_states = self.linear_1(image_features)
        for index in range(2, self.num_hidden_layers + 1):
            hidden_states = getattr(self, f"linear_{index}")(self.act(hidden_states))
        return hidden_states


@register_projector("identity")
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


@register_projector("qformer")
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


@register_projector("perceiver")
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


__all__ = [
    "IdentityProjector",
    "LinearProjector",
    "MlpProjector",
    "PerceiverProjector",
    "QFormerProjector",
]
