# SPDX-License-Identifier: Apache-2.0
"""Which files of a checkpoint hold its weights, and which its code, by their names."""

import re
from collections.abc import Iterable


_WEIGHT_FILE = re.compile(
    r"(?:model|pytorch_model)(?:\.([\w-]+?))?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
    r"|[^/]+\.(?:safetensors|bin)\.index(?:\.([\w-]+))?\.json"
)
_CODE_FILE = re.compile(r"\w+_moellava\.py|moellava_(?:api|custom|entry)\.py")
_USER_CODE_FILE = re.compile(r"custom_\w+\.py")
_ENTRY = "moellava_entry.py"


def is_weight_file(name: str) -> bool:
    """Whether a file holds a checkpoint's weights, or tells which files hold them; those of a subfolder are others."""
    return _WEIGHT_FILE.fullmatch(name) is not None


def replaced_weights(held: Iterable[str], saved: Iterable[str]) -> list[str]:
    """Returns which of the files of an earlier checkpoint must not stay beside those of a save: its weights, of every
    `variant` that has been saved anew. transformers would read an earlier `model.safetensors` rather than new shards.

    Args:
        held (`Iterable[str]`): The files of the earlier checkpoint.
        saved (`Iterable[str]`): Those of the save: with weights, of a processor alone, or of an adapter.
    """
    saved = set(saved)
    variants = {_variant(name) for name in saved if is_weight_file(name)}
    return [name for name in held if name not in saved and is_weight_file(name) and _variant(name) in variants]


def replaced_code(held: Iterable[str], saved: Iterable[str]) -> list[str]:
    """Returns which files of an earlier checkpoint are code that the code of a save takes the place of.

    Args:
        held (`Iterable[str]`): The files of the earlier checkpoint.
        saved (`Iterable[str]`): Those of the save; without code, none is replaced.
    """
    held, saved = list(held), set(saved)
    if _ENTRY not in saved or _ENTRY not in held:
        return []
    # Without code of its author's, a file of such a name is somebody else's.
    has_user_code = "moellava_custom.py" in held
    return [name for name in held if name not in saved and is_code_file(name, has_user_code)]


def is_code_file(name: str, has_user_code: bool = True) -> bool:
    """Whether a file is code that a checkpoint carries; `has_user_code` says whether its author's may be among it."""
    return _CODE_FILE.fullmatch(name) is not None or (has_user_code and _USER_CODE_FILE.fullmatch(name) is not None)


def _variant(name: str) -> str | None:
    file, index = _WEIGHT_FILE.fullmatch(name).groups()
    return file or index


__all__ = ["is_code_file", "is_weight_file", "replaced_code", "replaced_weights"]
