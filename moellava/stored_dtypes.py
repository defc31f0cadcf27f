# SPDX-License-Identifier: Apache-2.0
"""The dtypes that weights are stored in: what a training in float32 leaves as it was does not grow on disk."""

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from .json_files import read_json_object


_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def frozen_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Returns the 16-bit dtype of every part whose frozen weights one holds exactly: that of an adapter's base.

    Routers stay in float32.

    Args:
        model (`nn.Module`): The model, whose parameters say what is trained.
    """
    from .training.parts import PartNames

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
    from .training.parts import PartNames

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


def write_stored_dtype(folder: Path, target: Path, repo_id: str | None = None) -> None:
    """Makes `dtype` in the `config.json` of a checkpoint the one that most of its weights are in; one of `SAVE_HOOKS`.

    transformers writes that of the first weight, which is the vision tower's, and loads the whole model in it.

    Args:
        folder (`Path`): Where the checkpoint's files lie.
        target (`Path`), repo_id (`str`, *optional*): As for every hook; without effect.
    """
    path = folder / "config.json"
    if not path.is_file():  # an adapter saved alone
        return
    config = read_json_object(path)
    amounts: Counter[str] = Counter()
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                header = weights.get_slice(name)
                amounts[header.get_dtype()] += torch.Size(header.get_shape()).numel()
    amounts = Counter({_NAMES[kind]: amount for kind, amount in amounts.items() if kind in _NAMES})
    if config.get("quantization_config") is not None or len(amounts) < 2:
        return
    ((dtype, _),) = amounts.most_common(1)
    if config.get("dtype") != dtype:
        path.write_text(json.dumps(config | {"dtype": dtype}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


__all__ = ["frozen_as_loaded", "frozen_dtypes", "write_stored_dtype"]
