# Copyright 2026 The MoELLaVA authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Projector files from elsewhere: their keys, under any prefix, as those of a projector of ours."""

import os
import re
from pathlib import Path
from typing import Any

import torch

from .sources import read_tensors


# What may stand before the projector's own keys: our tree, LLaVA's, MoE-LLaVA's, and what trainers put in front.
_PREFIX = re.compile(
    r"^(?:.+\.)?(?:multi_modal_projector|mm_projector)\.(?:image_spatial_proj\.)?|^image_spatial_proj\.|^module\."
)
_SEQUENTIAL_KEY = re.compile(r"(?:(.+)\.)?(\d+)\.(weight|bias)")
_LINEAR_KEY = re.compile(r"linear_(\d+)\.(weight|bias)")


def read_projector(path: str | os.PathLike, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Reads a projector file.

    Args:
        path (`str` or `os.PathLike`): A safetensors file, or a `.bin` or `.pt` of tensors.
        fields (`dict`): What the user says of the projector; of an MLP, its number of layers and its width are told by
            the file where the user does not.

    Returns:
        `tuple[dict, dict]`: The projector's fields, and its weights under our names.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, holds no projector, or is a pickle of more than tensors.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"There is no projector file {path}. Give the path of a .safetensors or .bin file.")
    tensors = dict(read_tensors(path))
    prefixed = {name: _PREFIX.sub("", name) for name in tensors}
    if any(short != name for name, short in prefixed.items()):
        # A file of a trainer may hold more than the projector, such as embedding rows.
        tensors = {short: tensors[name] for name, short in prefixed.items() if short != name}
    if not tensors:
        raise ValueError(
            f"{path} holds no weights of a projector. Expected what a trainer saves as mm_projector.bin, or the state "
            "dict of a projector."
        )
    short = {name.removeprefix("linear."): tensor for name, tensor in tensors.items()}
    if set(short) <= {"weight", "bias"} and fields.get("type") in (None, "linear"):
        tensors = {f"linear.{name}": tensor for name, tensor in short.items()}
        return {"bias": "bias" in short, **fields, "type": "linear"}, tensors
    if fields.get("type", "mlp") == "mlp":
        tensors = _as_mlp(tensors)
        fields = {**_mlp_fields(tensors), **fields}
    return fields, tensors


def _as_mlp(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the layers of an `nn.Sequential` (`0`, `2`, ...), under any one prefix, to `linear_1`, `linear_2`, ..."""
    matches = {name: _SEQUENTIAL_KEY.fullmatch(name) for name in tensors}
    if not all(matches.values()) or len({match.group(1) for match in matches.values()}) > 1:
        return tensors
    places = sorted({int(match.group(2)) for match in matches.values()})
    return {
        f"linear_{places.index(int(match.group(2))) + 1}.{match.group(3)}": tensors[name]
        for name, match in matches.items()
    }


def _mlp_fields(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the weights of an MLP tell of it; nothing where they are not those of one."""
    matches = [_LINEAR_KEY.fullmatch(name) for name in tensors]
    first = tensors.get("linear_1.weight")
    if not all(matches) or first is None:
        return {"type": "mlp"}
    return {
        "type": "mlp",
        "num_hidden_layers": max(int(match.group(1)) for match in matches),
        "hidden_size": first.shape[0],
        "bias": "linear_1.bias" in tensors,
    }


__all__ = ["read_projector"]
