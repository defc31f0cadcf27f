# SPDX-License-Identifier: Apache-2.0
"""A projector that a user has written: an `nn.Module` under `@register_projector`. See `docs/extending.md`."""

from torch import nn

from ..configuration.tools_moellava import tools
from .projector_moellava import Projector
from .user_parts_moellava import build_part, initialize_part


class UserProjector(Projector):
    """Answers for a projector that a user has written."""

    is_by_user = True

    def num_output_tokens(self, num_tokens: int) -> int | None:
        """The number of tokens, which the tools measure by running it once; the config keeps what they have found."""
        return tools().measured_output_tokens(self, num_tokens)

    def build(self) -> nn.Module:
        return build_part(self.make)

    def initialize(self, module: nn.Module) -> None:
        initialize_part(module, self.make)

    def follow_attention(self, module: nn.Module, asked: str | None) -> None:
        pass  # that is its author's
