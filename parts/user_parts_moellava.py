# SPDX-License-Identifier: Apache-2.0
"""Parts that a user has written.

They are plain modules, written without regard to how transformers loads a model: on the meta device, with only what the
checkpoint holds put in afterwards. Whatever else their constructors make (new weights, buffers that are not saved,
tensors kept as attributes) is taken from a second instance, built for real.
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel


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
