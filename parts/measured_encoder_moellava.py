# SPDX-License-Identifier: Apache-2.0
"""What encoders have in common whose features no config tells: they are measured, by running the tower once."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .vision_encoder_moellava import VisionEncoder


class MeasuredEncoder(VisionEncoder):
    """A tower that is known by the shapes of its hidden states, `_measured_shapes`, each `(2, tokens, width)`."""

    plans = {}
    layers_name = ""

    @property
    def _measured_shapes(self) -> list[tuple[int, int, int]]:
        raise NotImplementedError

    @property
    def num_hidden_layers(self) -> int:
        return len(self._measured_shapes) - 1

    @property
    def num_patches(self) -> int:
        return self._token_count - self.num_prefix_tokens

    def _layer_width(self, layer: int) -> int:
        return self._measured_shapes[layer][-1]

    @property
    def _token_count(self) -> int:
        counts = {self._measured_shapes[layer][1] for layer in self.feature_layers}
        if len(counts) > 1:
            raise ValueError(
                f"The layers {self.feature_layers} of the {self.tower_name} tower give {sorted(counts)} "
                "tokens, so that their features cannot be joined. Choose layers of one resolution."
            )
        return counts.pop()

    @staticmethod
    def _as_tokens(hidden_state: torch.Tensor) -> torch.Tensor:
        return as_tokens(hidden_state)


def as_tokens(hidden_state: torch.Tensor) -> torch.Tensor:
    """Lays out a feature map `(batch, width, rows, columns)` as tokens `(batch, tokens, width)`; tokens stay."""
    return hidden_state if hidden_state.dim() == 3 else hidden_state.flatten(2).transpose(1, 2)


class DrawnNumbers(TorchDispatchMode):
    """Notes what a part draws at random while it runs, on the meta device too.

    A part that does so in eval mode answers differently each time: ViT-MAE draws which patches it sees.
    """

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Attention has the tag for its dropout, of which there is none in eval mode.
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func.name():
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))

    def check(self, part: str) -> None:
        """Raises a ValueError if something was drawn; `part` begins its message."""
        if self.names:
            raise ValueError(
                f"{part} draws random numbers when it is asked ({', '.join(sorted(self.names))}), so that it answers "
                "differently each time. Expected a part that gives the same features for the same picture."
            )
