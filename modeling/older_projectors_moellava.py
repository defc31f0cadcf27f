# SPDX-License-Identifier: Apache-2.0
"""MoE-LLaVA's own projectors (Lin et al. 2024, "MoE-LLaVA: Mixture of Experts for Large Vision-Language Models",
arXiv:2401.15947), for the checkpoints that have one: its Q-Former, its convolution and transformer blocks, and its
pooled MLP. New models have the projectors of `projectors_moellava.py` to choose from.

Sizes, parameter names and results are those of the older code. What it calls `qformer2_64` is `older_qformer` with
`num_hidden_layers=2` and `num_query_tokens=64`; `simple_in1_out0` is `simple` with `num_blocks_in=1` and
`num_blocks_out=0`; `pool_mlp2x_gelu` is `pool_mlp` with `num_hidden_layers=2`; `cheap_` before one of the first two is
`narrow=True`. The contract is that of every projector; see `projectors_moellava.py`.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig

from ..configuration.registry_moellava import register_projector
from .projector_parts_moellava import (
    LEARNED_TOKENS_STD,
    QFormerModule,
    check_bool,
    check_image_features,
    check_positive_int,
)


# What the older code fixes: the same numbers at every width.
_NUM_ATTENTION_HEADS = 32
_NUM_GROUPS = 32
_GROUP_NORM_EPS = 1e-6
_QFORMER_LAYER_NORM_EPS = 1e-12

# Width inside the feed-forward layers, as a multiple of the blocks' width.
_WIDE_RATIO = 2.6875
_NARROW_RATIO = 4


def _check_not_negative_int(projector: str, **numbers: int) -> None:
    """Raises ValueError for the first of `numbers` that is no int of at least 0."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"The projector '{projector}' needs {name} as an integer of at least 0, got {number!r}.")


def _block_sizes(projector: str, vision_hidden_size: int, text_hidden_size: int, narrow: bool) -> tuple[int, int]:
    """Returns the width of a projector's blocks and the width inside their feed-forward layers.

    Raises:
        ValueError: 32, which is the number of attention heads and of the norms' groups, does not divide the width.
    """
    check_positive_int(projector, vision_hidden_size=vision_hidden_size, text_hidden_size=text_hidden_size)
    check_bool(projector, narrow=narrow)
    name, width = ("vision_hidden_size", vision_hidden_size) if narrow else ("text_hidden_size", text_hidden_size)
    if width % _NUM_ATTENTION_HEADS != 0:
        raise ValueError(
            f"The projector '{projector}' with narrow={narrow} has blocks as wide as {name}={width}, which cannot be "
            f"split into its {_NUM_ATTENTION_HEADS} attention heads and groups. Use a part whose width is a multiple "
            f"of {_NUM_ATTENTION_HEADS}, narrow={not narrow}, or another projector."
        )
    return width, int(width * (_NARROW_RATIO if narrow else _WIDE_RATIO))


def _two_linear_layers(in_features: int, out_features: int) -> nn.Sequential:
    # trf-ignore: TRF036  names and indices are those of the older files
    return nn.Sequential(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))


def _rounded_root(number: int) -> int:
    """The square root of `number`, rounded down. By comparisons, which `torch.compile` can follow in one graph where a
    number of tokens is symbolic, as it cannot follow `math.isqrt`.
    """
    root = 0
    while (root + 1) * (root + 1) <= number:
        root += 1
    return root


def _grid_side(projector: str, num_tokens: int) -> int:
    """The side of the square grid that `num_tokens` patches make. Raises ValueError where they make none of 2 x 2 or
    more.
    """
    side = _rounded_root(num_tokens)
    if side * side != num_tokens or side < 2:
        raise ValueError(
            f"The projector '{projector}' pools a square grid of patches, at least 2 x 2, but gets {num_tokens} "
            "tokens, which make none. Select the patches alone, all of them "
            "(vision_feature_select_strategy='patch'), or use a projector that needs no grid, such as 'mlp'."
        )
    return side


def _to_grid(tokens: torch.Tensor, side: int) -> torch.Tensor:
    """`(batch, side * side, channels)` to `(batch, channels, side, side)`, row by row."""
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def _to_tokens(grid: torch.Tensor) -> torch.Tensor:
    """`(batch, channels, side, side)` to `(batch, side * side, channels)`, row by row."""
    return grid.flatten(2).transpose(1, 2)


@register_projector("older_qformer")
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
        width, intermediate_size = _block_sizes("older_qformer", vision_hidden_size, text_hidden_size, narrow)
        self.vision_hidden_size = vision_hidden_size
        self.attention_config = config = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=_NUM_ATTENTION_HEADS,
            intermediate_size=intermediate_size,
            hidden_act="gelu",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=_QFORMER_LAYER_NORM_EPS,
            cross_attention_frequency=1,
            encoder_hidden_size=width,
            attn_implementation="sdpa",
        )
        self.proj_in = _two_linear_layers(vision_hidden_size, width)
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, width))
        self.qformer = QFormerModule(config)
        self.proj_out = _two_linear_layers(width, text_hidden_size)
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


class ResidualConvBlock(nn.Module):
    """A group norm, a 3 x 3 convolution and a GELU, added to their input. Tokens of a square grid in and out.

    Args:
        width (`int`): Number of channels, a multiple of 32.
    """

    def __init__(self, width: int):
        super().__init__()
        # trf-ignore: TRF036  names and indices are those of the older files
        self.conv = nn.Sequential(
            nn.GroupNorm(_NUM_GROUPS, width, eps=_GROUP_NORM_EPS),
            nn.Conv2d(width, width, kernel_size=3, padding=1),
            nn.GELU(),
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch, side * side, width)` to the same shape."""
        grid = _to_grid(tokens, _rounded_root(tokens.shape[1]))
        return _to_tokens(grid + self.conv(grid))


class VitAttention(nn.Module):
    """Self-attention of a vision transformer, 32 heads, every token sees every token.

    Args:
        width (`int`): Width of the tokens, a multiple of 32.
    """

    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, width)` to the same shape."""
        # (batch, tokens, 3 * width) -> query, key and value, each (batch, heads, tokens, head width)
        query, key, value = self.qkv(tokens).unflatten(2, (3, _NUM_ATTENTION_HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class VitMlp(nn.Module):
    """Feed-forward layers of a vision transformer.

    Args:
        width (`int`): Width of the tokens.
        intermediate_size (`int`): Width inside.
    """

    def __init__(self, width: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(width, intermediate_size)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(intermediate_size, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, width)` to the same shape."""
        return self.fc2(self.act(self.fc1(tokens)))


class VitBlock(nn.Module):
    """A block of a vision transformer, with norms before its two parts; names and result are those of timm's.

    Args:
        width (`int`): Width of the tokens, a multiple of 32.
        intermediate_size (`int`): Width inside the feed-forward layers.
    """

    def __init__(self, width: int, intermediate_size: int):
        super().__init__()
        # The epsilon is PyTorch's, as in timm when these checkpoints were made; timm's later default is a smaller one.
        self.norm1 = nn.LayerNorm(width)
        self.attn = VitAttention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = VitMlp(width, intermediate_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, width)` to the same shape."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


@register_projector("simple")
class SimpleProjector(nn.Module):
    """MoE-LLaVA's `simple_in{a}_out{b}`: two linear layers, 2 x 2 average pooling, convolution and transformer blocks,
    a 3 x 3 convolution without padding, such blocks again, and two linear layers. 256 tokens become 64, and with the
    second blocks 36.

    A convolution and a transformer block take turns. The repeated ones are one and the same pair with one set of
    weights, as in the older code: `num_blocks_in` says how often it runs, and without a second pair
    (`num_blocks_out=0`) there is no convolution before it either.

    Args:
        vision_hidden_size (`int`): Width of the image features.
        text_hidden_size (`int`): Width of the text model's embeddings.
        num_blocks_in (`int`, defaults to 1): How often the first pair of blocks runs, `a`; 0 for none.
        num_blocks_out (`int`, defaults to 0): How often the second pair runs, `b`; 0 for none.
        narrow (`bool`, defaults to `False`): Whether the blocks are as wide as the image features, with feed-forward
            layers four times as wide, instead of as wide as the text model, with feed-forward layers 2.6875 times as
            wide. The older code's `cheap_simple_in{a}_out{b}`.

    Raises:
        ValueError: a width is no integer of at least 1, a number of blocks no integer of at least 0, `narrow` is no
            bool, or 32 does not divide the blocks' width.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        num_blocks_in: int = 1,
        num_blocks_out: int = 0,
        narrow: bool = False,
    ):
        super().__init__()
        _check_not_negative_int("simple", num_blocks_in=num_blocks_in, num_blocks_out=num_blocks_out)
        width, intermediate_size = _block_sizes("simple", vision_hidden_size, text_hidden_size, narrow)
        self.vision_hidden_size = vision_hidden_size
        self.num_blocks_in = num_blocks_in
        self.num_blocks_out = num_blocks_out
        self.proj_in = _two_linear_layers(vision_hidden_size, width)
        if num_blocks_in > 0:
            # trf-ignore: TRF036  names and indices are those of the older files
            self.block_in = nn.Sequential(ResidualConvBlock(width), VitBlock(width, intermediate_size))
        if num_blocks_out > 0:
            self.down2 = nn.Conv2d(width, width, kernel_size=3)
            # trf-ignore: TRF036  names and indices are those of the older files
            self.block_out = nn.Sequential(ResidualConvBlock(width), VitBlock(width, intermediate_size))
        self.proj_out = _two_linear_layers(width, text_hidden_size)

    @classmethod
    def num_output_tokens(cls, num_tokens: int, num_blocks_out: int = 0, **fields) -> int:
        """Number of tokens returned for `num_tokens` image features: half the side of their grid, rounded down, and
        two less with `num_blocks_out`, squared. `fields` are the projector's other fields. Raises ValueError where
        `num_tokens` is no square number, or too small for the second convolution.
        """
        _check_not_negative_int("simple", num_blocks_out=num_blocks_out)
        side = _grid_side("simple", num_tokens) // 2
        if num_blocks_out == 0:
            return side * side
        if side < 4:
            raise ValueError(
                f"The projector 'simple' with num_blocks_out={num_blocks_out} needs a grid of at least 8 x 8 patches "
                f"(64 tokens), so that 2 x 2 are left after pooling and convolution; it gets {num_tokens} tokens. Use "
                "larger pictures, smaller patches, or num_blocks_out=0."
            )
        return (side - 2) ** 2

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, vision_hidden_size)` to `(batch, out_tokens, text_hidden_size)`.

        Raises:
            ValueError: The shape is another one, or the tokens make no square grid that is large enough.
        """
        check_image_features("simple", image_features, self.vision_hidden_size)
        num_tokens = image_features.shape[1]
        self.num_output_tokens(num_tokens, num_blocks_out=self.num_blocks_out)  # for its checks
        side = _grid_side("simple", num_tokens)
        tokens = _to_tokens(F.avg_pool2d(_to_grid(self.proj_in(image_features), side), kernel_size=2))
        for _ in range(self.num_blocks_in):
            tokens = self.block_in(tokens)
        if self.num_blocks_out > 0:
            tokens = _to_tokens(self.down2(_to_grid(tokens, side // 2)))
        for _ in range(self.num_blocks_out):
            tokens = self.block_out(tokens)
        return self.proj_out(tokens)


@register_projector("pool_mlp")
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
        return (_grid_side("pool_mlp", num_tokens) // 2) ** 2

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, vision_hidden_size)` to `(batch, out_tokens, text_hidden_size)`.

        Raises:
            ValueError: The shape is another one, or the tokens make no square grid.
        """
        check_image_features("pool_mlp", image_features, self.vision_hidden_size)
        side = _grid_side("pool_mlp", image_features.shape[1])
        return self.block(_to_tokens(F.avg_pool2d(_to_grid(image_features, side), kernel_size=2)))


__all__ = [
    "OlderQFormerProjector",
    "PoolMlpProjector",
    "SimpleProjector",
]
