# SPDX-License-Identifier: Apache-2.0
"""The dtypes of frozen parts: what a training in float32 leaves as it was does not grow on disk."""

import torch
from torch import nn

from .parts import PartNames


def frozen_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Returns the 16-bit dtype of every part whose frozen weights one holds exactly: that of an adapter's base.

    Routers stay in float32.

    Args:
        model (`nn.Module`): The model, whose parameters say what is trained.
    """
    frozen: dict[str, list[torch.Tensor]] = {}
    for part, _, parameter in PartNames(model):
        if part != "router" and not parameter.requires_grad and parameter.dtype == torch.float32:
            frozen.setdefault(part, []).append(parameter.detach())
    found = {part: _narrowest(tensors) for part, tensors in frozen.items()}
    return {part: dtype for part, dtype in found.items() if dtype is not None}


def frozen_as_loaded(
    model: nn.Module, state_dict: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype] | None = None
) -> dict[str, torch.Tensor]:
    """Returns weights with those of frozen parts in 16 bits again, if they were that before they came into float32.

    That is so if 16 bits hold every weight of the part exactly, so nothing is lost. Routers stay in float32.

    Args:
        model (`nn.Module`): The model, whose parameters say what is trained.
        state_dict (`dict[str, torch.Tensor]`): Its weights, by the same names.
        dtypes (`dict[str, torch.dtype]`, *optional*): Parts that an adapter was merged into, and the dtypes that they
            are rounded to.
    """
    trained = {part for part, _, parameter in PartNames(model) if parameter.requires_grad}
    frozen: dict[str, list[torch.Tensor]] = {}
    for part, name, _ in PartNames(model):
        if part not in (*trained, "router") and name in state_dict and state_dict[name].dtype == torch.float32:
            frozen.setdefault(part, []).append(state_dict[name])
    narrow: dict[int, torch.Tensor] = {}
    for part, tensors in frozen.items():
        dtype = (dtypes or {}).get(part) or _narrowest(tensors)
        if dtype is not None:
            narrow |= {tensor.data_ptr(): tensor.to(dtype) for tensor in tensors}
    # By their place in memory: a head that is tied to the embedding is the same tensor under another name.
    return {name: narrow.get(tensor.data_ptr(), tensor) for name, tensor in state_dict.items()}


def _narrowest(tensors: list[torch.Tensor]) -> torch.dtype | None:
    dtypes = (torch.bfloat16, torch.float16)
    return next((dtype for dtype in dtypes if all(_holds(dtype, tensor) for tensor in tensors)), None)


def _holds(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    return tensor.to(dtype).to(tensor.dtype).equal(tensor)


__all__ = ["frozen_as_loaded", "frozen_dtypes"]
