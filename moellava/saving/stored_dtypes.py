# SPDX-License-Identifier: Apache-2.0
"""The dtypes that weights are stored in: what a training in float32 leaves as it was does not grow on disk."""

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open

from ..reading.json_files import read_json_object


_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def write_stored_dtype(folder: Path, target: Path, repo_id: str | None = None) -> None:
    """Makes `dtype` in the `config.json` of a checkpoint the one that most of its weights are in.

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


__all__ = ["write_stored_dtype"]
