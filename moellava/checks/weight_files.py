# SPDX-License-Identifier: Apache-2.0
"""What is checked of a checkpoint's weight files before they are opened, and before memory is taken for them."""

import json
import os
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import find_adapter_config_file, is_peft_available


# No format stores a weight in less than half a byte, and a weight that is tied to another may be counted twice.
_MOST_WEIGHTS_PER_BYTE = 4
_ALWAYS_ALLOWED = 2**24
# By these `from_pretrained` is told where in a repository files are, and how to come by them.
_PLACES = ("revision", "subfolder")
_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", *_PLACES)


def check_indices(folder: str | os.PathLike) -> None:
    """Checks that the indices of a checkpoint name files beside them alone; transformers opens whatever they name.

    Args:
        folder (`str` or `os.PathLike`): Where the weights are. Of what is no folder nothing is checked: of a repository
            on the Hub, transformers asks by name for what an index lists.

    Raises:
        ValueError: An index is damaged, or names a file outside of the folder.
    """
    for path in sorted(Path(folder).glob("*.index.json")):
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no valid JSON ({error}). Save or download the model again.") from error
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{path} has no weight_map from weights to files. Save or download the model again.")
        for shard in shards.values():
            if not isinstance(shard, str) or shard != os.path.basename(shard) or shard in ("", ".", ".."):
                raise ValueError(
                    f"{path} names {shard!r}; expected the plain name of a file beside it. Nothing outside the folder "
                    "is read."
                )


def find_adapter_config(name: str | os.PathLike, options: dict[str, Any]) -> str | None:
    """Returns the path of the `adapter_config.json` that `from_pretrained` goes by, or `None` where there is none.

    Args:
        name (`str` or `os.PathLike`): What is loaded. An adapter may lie beside it.
        options (`dict`): The options of `from_pretrained`. Where an Auto class has found that it was given an adapter,
            and has put its base in its place, they say where the adapter is.
    """
    if not is_peft_available():  # transformers looks for none
        return None
    found = {option: options[option] for option in _HUB_OPTIONS if options.get(option) is not None}
    of_adapter = options.get("adapter_kwargs") or {}
    if "_adapter_model_path" in of_adapter:
        name, found = of_adapter["_adapter_model_path"], {o: v for o, v in found.items() if o not in _PLACES}
    found |= {option: of_adapter[option] for option in _HUB_OPTIONS if of_adapter.get(option) is not None}
    return find_adapter_config_file(name, **found)


def check_adapter(path: str | os.PathLike) -> None:
    """Checks that an adapter is one of LoRA's, which its own files hold as a whole.

    PEFT's other kinds may open what their configs name: a model, a tokenizer, other adapters. Of LoRA's fields, one
    names a module that is imported.

    Args:
        path (`str` or `os.PathLike`): Its `adapter_config.json`.

    Raises:
        ValueError: It is damaged, of another kind, or names a module.
    """
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}). Save or download the adapter again.") from error
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind != "LORA":
        raise ValueError(
            f"{path} is of an adapter of the type {kind!r}; only LORA is loaded, whose files are all that it "
            "needs. Put another one on the loaded model yourself: PeftModel.from_pretrained(model, folder)."
        )
    if fields.get("megatron_config"):
        raise ValueError(
            f"{path} names the module {fields.get('megatron_core')!r} in megatron_config, which would be imported. "
            "Nothing is imported because of what a file says: set megatron_config to null."
        )


def check_size(model: nn.Module, stored: int, new_part: str | None = None) -> None:
    """Checks that a model, which has no memory yet, is not far larger than the files that it is filled from.

    Args:
        model (`nn.Module`): The model, of which every weight is on the meta device.
        stored (`int`): The bytes of the files, or of the weights in them.
        new_part (`str`, *optional*): The name of a module that may have no weights yet, of whatever size.

    Raises:
        ValueError: It is; the config would have memory taken for weights that nobody has.
    """
    described = sum(
        tensor.numel()
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
        if new_part is None or new_part not in name.split(".")
    )
    if described > _MOST_WEIGHTS_PER_BYTE * stored + _ALWAYS_ALLOWED:
        raise ValueError(
            f"The config describes a model of {described:,} weights, but the weight files have {stored:,} bytes. "
            "They do not belong together: save or download them again."
        )


__all__ = ["check_adapter", "check_indices", "check_size", "find_adapter_config"]
