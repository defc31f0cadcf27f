# SPDX-License-Identifier: Apache-2.0
"""The last step of every way to a model: a config and named weights become a model."""

import logging
import os
from collections.abc import Callable

import torch

from ..configuration import MoellavaConfig
from ..formatting import first_few
from ..modeling import MoellavaForCausalLM


logger = logging.getLogger(__name__)


def build(
    config: MoellavaConfig,
    tensors: dict[str, torch.Tensor] | str | os.PathLike,
    is_new: Callable[[str], bool] = lambda name: False,
    strict: bool = False,
    **options,
) -> MoellavaForCausalLM:
    """Builds a model of a config and named weights.

    Args:
        config (`MoellavaConfig`): What it is made of.
        tensors (`dict[str, torch.Tensor]`, `str` or `os.PathLike`):
            Weights under the names of the tree, memory-mapped or not; or a checkpoint, a folder or a Hub id.
        is_new (callable): Which weights, by name, are to be initialised where `tensors` lacks them.
        strict (`bool`): Whether weights that no part uses are an error.
        options: Passed on to `from_pretrained`.

    Raises:
        ValueError: A weight is missing or has another shape than the config says; or, `strict`, is not used.
    """
    options = {name: value for name, value in options.items() if value is not None}
    name, state_dict = (None, tensors) if isinstance(tensors, dict) else (tensors, None)
    try:
        # A weight of another shape is ignored only to be told of below: transformers' own error does not name it.
        model, report = MoellavaForCausalLM.from_pretrained(
            name,
            config=config,
            state_dict=state_dict,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except (ArithmeticError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(
            f"The config does not describe a model that can be built ({type(error).__name__}: {error}). Expected names "
            "and sizes that transformers knows: save or download the model again."
        ) from error
    origin = "the parts' files" if name is None else f"the files of {name}"
    if name is None:
        model.name_or_path = model.config.name_or_path = ""  # transformers writes the string "None"
    misfits = sorted(report["mismatched_keys"])
    if misfits:
        faults = [f"{key} is {tuple(found)}, expected {tuple(expected)}" for key, found, expected in misfits]
        raise ValueError(
            f"{len(misfits)} weight(s) of {origin} have another shape than the config says: "
            f"{first_few(faults, separator='; ')}. The files and the configs beside them do not belong together: save "
            "or download them again."
        )
    missing = sorted(key for key in report["missing_keys"] if not is_new(key))
    if missing:
        raise ValueError(
            f"{len(missing)} weight(s) are missing from {origin}: {first_few(missing)}. A file is incomplete, or the "
            "files and the configs beside them do not belong together: save or download them again."
        )
    if report["missing_keys"]:
        logger.info("newly initialised: %s", ", ".join(sorted(report["missing_keys"])))
    if report["unexpected_keys"] and strict:
        raise ValueError(
            f"{len(report['unexpected_keys'])} weight(s) of {origin} have no place in the model: "
            f"{first_few(report['unexpected_keys'])}. The files and the config beside them do not belong "
            "together."
        )
    if report["unexpected_keys"]:
        logger.info("skipped, since no part uses them: %s", ", ".join(sorted(report["unexpected_keys"])))
    return model


__all__ = [
    "build",
]
