# SPDX-License-Identifier: Apache-2.0
"""How many tokens a user's projector makes: measured, by running it once."""

import inspect
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..parts.projector_moellava import Projector
from ..parts.user_encoder_moellava import run_part


def measured_output_tokens(projector: Projector, num_tokens: int) -> int:
    """Returns how many tokens a user's projector makes of `num_tokens` image features.

    Raises:
        ValueError: It cannot be run, returns another shape than `(batch, tokens, text_hidden_size)`, or another number
            of tokens than its `num_output_tokens` says.
    """
    projector_class, fields = projector.module_class, projector.fields
    # mypy asks for the hash of an instance, where the key is the class.
    tokens = _measured_tokens(projector_class, json.dumps(fields), num_tokens, projector.widths)  # type: ignore[arg-type]
    count = getattr(projector_class, "num_output_tokens", None)
    if count is not None:
        said = count(num_tokens, **known_arguments(count, fields))
        if said != tokens:
            raise ValueError(
                f"{projector_class.__name__}.num_output_tokens says {said} tokens for {num_tokens} image features, but "
                f"forward returns {tokens}. Make them agree, or leave num_output_tokens out: the number is measured."
            )
    return tokens


def known_arguments(function: Callable, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns those of a part's fields that a function takes."""
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in fields.items() if takes_all or name in parameters}


@lru_cache(maxsize=32)
def _measured_tokens(projector_class: type[nn.Module], fields: str, num_tokens: int, widths: tuple[int, int]) -> int:
    def make() -> nn.Module:
        return projector_class(vision_hidden_size=widths[0], text_hidden_size=widths[1], **json.loads(fields))

    given, name = (2, num_tokens, widths[0]), projector_class.__name__
    try:
        output = run_part(make, given)
    except RuntimeError as error:
        raise ValueError(f"The projector {name} cannot be run on image features of shape {given}: {error}") from error
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if not isinstance(output, torch.Tensor) or output.dim() != 3 or shape[0] != 2 or shape[2] != widths[1]:
        raise ValueError(
            f"The projector {name} makes {shape} of image features of shape {given}; expected a tensor of shape "
            f"(2, tokens, {widths[1]}), as wide as the language model."
        )
    return output.shape[1]


__all__ = ["known_arguments", "measured_output_tokens"]
