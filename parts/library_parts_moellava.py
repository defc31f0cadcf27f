# SPDX-License-Identifier: Apache-2.0
"""Models of transformers as parts: a vision tower, a language model."""

import torch
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


__all__ = ["build_library_part"]
