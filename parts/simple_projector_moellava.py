# SPDX-License-Identifier: Apache-2.0
"""MoE-LLaVA's convolution and transformer blocks as a projector, for the checkpoints that have it: `simple_in1_out0` is
`num_blocks_in=1` and `num_blocks_out=0`, with `cheap_` before it `narrow=True`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .legacy_projector_parts_moellava import (
    NUM_ATTENTION_HEADS,
    block_sizes,
    check_not_negative_int,
    grid_side,
    rounded_root,
    to_grid,
    to_tokens,
    two_linear_layers,
)
from .projector_checks_moellava import check_image_features


_NUM_GROUPS = 32
_GROUP_NORM_EPS = 1e-6


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
        grid = to_grid(tokens, rounded_root(tokens.shape[1]))
        return to_tokens(grid + self.conv(grid))


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
        query, key, value = self.qkv(tokens).unflatten(2, (3, NUM_ATTENTION_HEADS, -1)).permute(2, 0, 3, 1, 4)
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
        check_not_negative_int("simple", num_blocks_in=num_blocks_in, num_blocks_out=num_blocks_out)
        width, intermediate_size = block_sizes("simple", vision_hidden_size, text_hidden_size, narrow)
        self.vision_hidden_size = vision_hidden_size
        self.num_blocks_in = num_blocks_in
        self.num_blocks_out = num_blocks_out
        self.proj_in = two_linear_layers(vision_hidden_size, width)
        if num_blocks_in > 0:
            # trf-ignore: TRF036  names and indices are those of the older files
            self.block_in = nn.Sequential(ResidualConvBlock(width), VitBlock(width, intermediate_size))
        if num_blocks_out > 0:
            self.down2 = nn.Conv2d(width, width, kernel_size=3)
            # trf-ignore: TRF036  names and indices are those of the older files
            self.block_out = nn.Sequential(ResidualConvBlock(width), VitBlock(width, intermediate_size))
        self.proj_out = two_linear_layers(width, text_hidden_size)

    @classmethod
    def num_output_tokens(cls, num_tokens: int, num_blocks_out: int = 0, **fields) -> int:
        """Number of tokens returned for `num_tokens` image features: half the side of their grid, rounded down, and
        two less with `num_blocks_out`, squared. `fields` are the projector's other fields. Raises ValueError where
        `num_tokens` is no square number, or too small for the second convolution.
        """
        check_not_negative_int("simple", num_blocks_out=num_blocks_out)
        side = grid_side("simple", num_tokens) // 2
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
        side = grid_side("simple", num_tokens)
        tokens = to_tokens(F.avg_pool2d(to_grid(self.proj_in(image_features), side), kernel_size=2))
        for _ in range(self.num_blocks_in):
            tokens = self.block_in(tokens)
        if self.num_blocks_out > 0:
            tokens = to_tokens(self.down2(to_grid(tokens, side // 2)))
        for _ in range(self.num_blocks_out):
            tokens = self.block_out(tokens)
        return self.proj_out(tokens)
