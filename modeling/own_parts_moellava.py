# SPDX-License-Identifier: Apache-2.0
"""Building, measuring and initialising the modules that users write: encoders and projectors of their own.

They are plain modules, written without regard to how transformers loads a model: on the meta device, with only what the
checkpoint holds put in afterwards. Whatever else their constructors make (new weights, buffers that are not saved,
tensors kept as attributes) is taken from a second instance, built for real.
"""

import inspect
import json
from collections.abc import Callable
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration.custom_code_moellava import is_own_class
from ..configuration.registry_moellava import PROJECTORS
from .library_parts_moellava import DrawnNumbers


# What a module that cannot be run on the meta device raises, or one that does not fit its input.
RUN_ERRORS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def build_part(make: Callable[[], nn.Module]) -> nn.Module:
    """Builds a module on the default device, also on the meta device where its constructor needs values."""
    if torch.empty(0).device.type != "meta":
        return _initialized(make())
    try:
        part = make()
    except RUN_ERRORS:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            part = make()
    return part.to("meta")


def build_projector(config, vision_hidden_size: int) -> nn.Module:
    """Builds the projector of a `MoellavaConfig` for image features of some width."""
    projector_class = PROJECTORS[config.projector_config.type]
    if is_own_class(projector_class):
        return build_part(lambda: make_projector(config, vision_hidden_size))
    return make_projector(config, vision_hidden_size)


def make_projector(config, vision_hidden_size: int) -> nn.Module:
    """Calls the constructor of a `MoellavaConfig`'s projector."""
    return PROJECTORS[config.projector_config.type](
        vision_hidden_size=vision_hidden_size,
        text_hidden_size=config.text_embedding_size,
        **config.projector_config.fields,
    )


def _initialized(part: nn.Module) -> nn.Module:
    """Marks the values of a module that was built for real as final, so that transformers draws no others."""
    for module in part.modules():
        if hasattr(module, "initialize_parameters"):
            module.initialize_parameters()
    for tensor in chain(part.parameters(), part.buffers()):
        tensor._is_hf_initialized = True
    return part


@torch.no_grad()
def initialize_part(part: nn.Module, make: Callable[[], nn.Module]) -> None:
    """Gives every weight, buffer and attribute of a module that was not loaded the value that its constructor gives it.

    Args:
        part (`nn.Module`): The module, which was built on the meta device, or for real by `build_part`.
        make (`Callable[[], nn.Module]`): Builds it once more.
    """
    tensors = dict(chain(part.named_parameters(), part.named_buffers()))
    if tensors and all(tensor.is_meta for tensor in tensors.values()):
        return
    # The models of transformers inside of it make their own unsaved buffers.
    models = tuple(f"{name}." for name, module in part.named_modules() if isinstance(module, PreTrainedModel))
    saved = part.state_dict(keep_vars=True)
    new = [
        name
        for name, tensor in tensors.items()
        if not getattr(tensor, "_is_hf_initialized", False)
        and not tensor.is_meta
        and (name in saved or not name.startswith(models))
    ]
    modules = dict(part.named_modules())
    attributes = [
        (name, attribute)
        for name, module in modules.items()
        for attribute, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.is_meta and not f"{name}.".startswith(models)
    ]
    if not new and not attributes:
        return
    with torch.device("cpu"):
        made = build_part(make)
    values = dict(chain(made.named_parameters(), made.named_buffers()))
    for name in new:
        tensors[name].copy_(values[name])
        tensors[name]._is_hf_initialized = True
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    for name, attribute in attributes:
        setattr(modules[name], attribute, getattr(made.get_submodule(name), attribute).to(device))


def run_part(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Any:
    """Runs a module on an input of some shape, for the shapes of what it returns.

    On the meta device, which costs nothing; where the module looks at values, for real, on zeros.

    Raises:
        RuntimeError: It could not be run; the cause is the error that it raised itself.
        ValueError: It draws random numbers, though it is in eval mode.
    """
    errors = []
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), torch.random.fork_rng(devices=[]), torch.no_grad():
                part = build_part(make).eval()
                with DrawnNumbers() as drawn:
                    output = part(torch.zeros(shape))
        except RUN_ERRORS as error:
            errors.append(error)
        else:
            drawn.check(type(part).__name__)
            return output
    raise RuntimeError(f"{type(errors[-1]).__name__}: {errors[-1]}") from errors[-1]


def known_arguments(function: Callable, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns those of a part's fields that a function takes."""
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in fields.items() if takes_all or name in parameters}


def measured_output_tokens(
    projector_class: type[nn.Module], fields: dict[str, Any], num_tokens: int, widths: tuple[int, int]
) -> int:
    """Returns how many tokens a user's own projector makes of `num_tokens` image features.

    Args:
        projector_class (`type`): Its class.
        fields (`dict`): Its fields.
        num_tokens (`int`): The number of image features of one picture.
        widths (`tuple[int, int]`): `vision_hidden_size` and `text_hidden_size`.

    Raises:
        ValueError: It cannot be run, returns another shape than `(batch, tokens, text_hidden_size)`, or another number
            of tokens than its `num_output_tokens` says.
    """
    tokens = _measured_tokens(projector_class, json.dumps(fields), num_tokens, widths)
    count = getattr(projector_class, "num_output_tokens", None)
    if count is not None:
        said = count(num_tokens, **known_arguments(count, fields))
        if said != tokens:
            raise ValueError(
                f"{projector_class.__name__}.num_output_tokens says {said} tokens for {num_tokens} image features, but "
                f"forward returns {tokens}. Make them agree, or leave num_output_tokens out: the number is measured."
            )
    return tokens


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
    return shape[1]


__all__ = [
    "RUN_ERRORS",
    "build_part",
    "build_projector",
    "initialize_part",
    "known_arguments",
    "make_projector",
    "measured_output_tokens",
    "run_part",
]
