# SPDX-License-Identifier: Apache-2.0
"""What a model asks of its projector beside running it.

Every projector is an `nn.Module` built as `Projector(vision_hidden_size, text_hidden_size, **fields)`. It takes image
features of shape `(batch, tokens, vision_hidden_size)` and returns `(batch, out_tokens, text_hidden_size)`; its class
tells `out_tokens` for a given `tokens` by `num_output_tokens`. The fields, all of them with defaults, are the keyword
arguments of `__init__`, and what a config's `projector_config` may say beside `type`. A parameter that
lies directly in a projector (learned queries, latents) is drawn by its `initialize_parameters`, unless it was loaded.
"""

from typing import Any

from torch import nn


class Projector:
    """Answers for a projector of this package.

    Args:
        module_class (`type`): Its class.
        fields (`dict`): Its fields.
        widths (`tuple[int, int]`): `vision_hidden_size` and `text_hidden_size`.
    """

    def __init__(self, module_class: type[nn.Module], fields: dict[str, Any], widths: tuple[int, int]):
        self.module_class = module_class
        self.fields = fields
        self.widths = widths

    def num_output_tokens(self, num_tokens: int) -> int | None:
        """The number of tokens that it makes of `num_tokens` image features; `None` where that is not known here."""
        return self.module_class.num_output_tokens(num_tokens, **self.fields)

    def make(self) -> nn.Module:
        """Calls its constructor."""
        vision_hidden_size, text_hidden_size = self.widths
        return self.module_class(
            vision_hidden_size=vision_hidden_size, text_hidden_size=text_hidden_size, **self.fields
        )

    def build(self) -> nn.Module:
        """Builds the module, with its initial weights."""
        return self.make()

    def initialize(self, module: nn.Module) -> None:
        """Gives what was not loaded its values, where transformers does not: a user's own."""

    def follow_attention(self, module: nn.Module, asked: str | None) -> None:
        """Lets it compute its attention as was asked for: plainly (`"eager"`), or else by PyTorch's function."""
        config = getattr(module, "attention_config", None)
        if config is not None:
            config._attn_implementation = "eager" if asked == "eager" else "sdpa"
