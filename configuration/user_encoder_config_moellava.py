# SPDX-License-Identifier: Apache-2.0
"""The config of a vision encoder that a user has written."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .config_base_moellava import FOREIGN_KEYS, LIBRARY_FIELDS, WithValueErrors
from .tools_moellava import tools


# What a field of a user's own encoder or projector cannot be called.
RESERVED_FIELDS = frozenset({*dir(PreTrainedConfig()), *LIBRARY_FIELDS, *FOREIGN_KEYS, "fields"})


@strict
class MoellavaEncoderConfig(PreTrainedConfig, metaclass=WithValueErrors):
    r"""
    The vision config of a user's own encoder: the fields that its class takes.

    Args:
        kwargs:
            The fields of the encoder, as its constructor names them.
    """

    model_type = "moellava_encoder"

    def __post_init__(self, **kwargs):
        library = {key: value for key, value in kwargs.items() if key in RESERVED_FIELDS}
        fields = {
            key: tools().canonical_value(f"vision_config.{key}", value)
            for key, value in kwargs.items()
            if key not in library
        }
        super().__post_init__(**{key: value for key, value in library.items() if key not in FOREIGN_KEYS}, **fields)

    @property
    def fields(self) -> dict[str, Any]:
        """Every field that is not common to all configs of transformers."""
        return {
            name: value
            for name, value in vars(self).items()
            if name not in RESERVED_FIELDS and not name.startswith("_")
        }
