# SPDX-License-Identifier: Apache-2.0
"""Building the parts that are models of transformers, and finding those that give another answer every time."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel


def build_library_part(key: str, config: PreTrainedConfig, **arguments: object) -> PreTrainedModel:
    """Builds the model that a part's config describes, with its initial weights.

    Args:
        key (`str`): What `MoellavaConfig` calls the config, for the error message.
        config (`PreTrainedConfig`): The part's config.
        arguments (*optional*): For the model's class.

    Raises:
        ValueError: The config passes its own checks, but no model can be built of it.
    """
    try:
        return AutoModel.from_config(config, **arguments)
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{key} does not describe a {config.model_type!r} model ({type(error).__name__}: {error}). Expected the "
            f"fields of transformers' {type(config).__name__}."
        ) from error


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


__all__ = ["DrawnNumbers", "build_library_part"]
