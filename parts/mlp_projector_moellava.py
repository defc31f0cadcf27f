# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5's projector: linear layers with an activation between them."""

import torch
from torch import nn

from .projector_checks_moellava import build_activation, check_bool, check_image_features, check_positive_int


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
