# SPDX-License-Identifier: Apache-2.0
"""The decorators by which users make parts of their own known.

A user's own part registers itself from the user's own file:

```python
from torch import nn
from moellava import register_projector

@register_projector("gated")
class GatedProjector(nn.Module):
    def __init__(self, vision_hidden_size, text_hidden_size): ...
```
"""

import inspect
import re
from collections.abc import Callable

from torch import nn

from ..configuration.user_encoder_config_moellava import RESERVED_FIELDS
from ..parts.legacy_encoder_moellava import LegacyEncoder
from ..parts.part_table_moellava import PartTable, constructor_parameters
from ..parts.parts_moellava import ENCODERS, PROJECTORS
from ..parts.projector_moellava import Projector
from ..parts.user_encoder_moellava import UserEncoder
from ..parts.user_projector_moellava import UserProjector
from ..parts.vision_encoder_moellava import VisionEncoder
from .user_code import source_file_of


_NAME_PATTERN = re.compile(r"[a-z0-9_]+")
# Names that no field of a user's own part can have, since they mean something else where the part's fields are given.
_TAKEN_NAMES = {
    "projector": ("path", "projector_type", "mm_projector_type", "image_projector_type", "type"),
    "encoder": (
        "encoder_type", "mm_image_tower", "mm_vision_tower", "select_feature", "select_layer", "type",
        "vision_feature_layer", "vision_feature_select_strategy", "vision_tower",
    ),
}  # fmt: skip


def register_projector(name: str, *, exist_ok: bool = False) -> Callable[[type], type]:
    """Returns the class decorator that makes a projector known under `name`.

    Args:
        name (`str`): The name, of lower-case letters, digits and underscores.
        exist_ok (`bool`, *optional*, defaults to `False`): Whether a class of that name is replaced.

    Returns:
        `Callable[[type], type]`: The decorator, which returns the class as it is.

    Raises:
        TypeError: What is decorated is no class that can be the part.
        ValueError: The name has other characters than `a-z`, `0-9` and `_`, or is taken and `exist_ok` is false
            (running the same file or notebook cell again is no error); or the class has a field whose name means
            something else in a config.
    """
    return _register(PROJECTORS, name, exist_ok)


def register_encoder(name: str, *, exist_ok: bool = False) -> Callable[[type], type]:
    """Returns the class decorator that makes a vision encoder known under `name`; as `register_projector`."""
    return _register(ENCODERS, name, exist_ok)


def is_user_class(cls: type) -> bool:
    """Whether a class was written by a user: not in this package."""
    return not cls.__module__.startswith(f"{__name__.partition('.authoring.')[0]}.")


def is_legacy_encoder(cls: type) -> bool:
    """Whether an encoder class has the older builder's shape: made of a path, and filled by its `load_model()`."""
    if not callable(getattr(cls, "load_model", None)):
        return False
    return not issubclass(cls, nn.Module) or "model_name_or_path" in constructor_parameters(cls)


def _register(table: PartTable, name: str, exist_ok: bool) -> Callable[[type], type]:
    if not isinstance(name, str) or _NAME_PATTERN.fullmatch(name) is None:
        article = "an" if table is ENCODERS else "a"
        raise ValueError(
            f"{name!r} cannot name {article} {table.slot}: a name is made of lower-case letters, digits and "
            "underscores."
        )

    def enter(cls: type) -> type:
        if not inspect.isclass(cls):
            raise TypeError(f"register_{table.slot}({name!r}) decorates a class, got {type(cls).__name__}.")
        earlier = table[name] if name in table else None
        if earlier is not None and not exist_ok and not _is_same_definition(earlier, cls):
            raise ValueError(
                f"The {table.slot} {name!r} is registered already, by {earlier.__module__}.{earlier.__qualname__}. "
                "Choose another name, or pass exist_ok=True to replace it."
            )
        answer = _answer(table, cls)
        if is_user_class(cls):
            _check_user_class(table, cls, answer)
        table.enter(name, cls, answer)
        return cls

    return enter


def _answer(table: PartTable, cls: type) -> type:
    if table is PROJECTORS:
        return UserProjector if is_user_class(cls) else Projector
    if issubclass(cls, VisionEncoder):
        return cls
    return LegacyEncoder if is_legacy_encoder(cls) else UserEncoder


def _is_same_definition(earlier: type, cls: type) -> bool:
    """Whether a class is an earlier one whose file, or notebook cell, was run again.

    A function that defines a class makes a new one each time, and the very same object is none that was run again.
    """
    if earlier is cls or earlier.__qualname__ != cls.__qualname__ or "<locals>" in cls.__qualname__:
        return False
    return earlier.__module__ == cls.__module__ or source_file_of(earlier) == source_file_of(cls) is not None


def _check_user_class(table: PartTable, cls: type, answer: type) -> None:
    """Raises a TypeError or ValueError that says what a user's class lacks to be the part."""
    what = f"@register_{table.slot}: {cls.__qualname__}"
    if not issubclass(cls, nn.Module) and answer in (UserEncoder, UserProjector):
        older = ", or give it load_model() and forward(images)" if table is ENCODERS else ""
        raise TypeError(f"{what} is no torch.nn.Module. Derive it from nn.Module{older}; see docs/extending.md.")
    parameters = constructor_parameters(cls)
    lacking = [argument for argument in table.supplied if argument not in parameters]
    if lacking:
        raise TypeError(
            f"{what} is built with {' and '.join(table.supplied)}, but its constructor takes "
            f"({', '.join(parameters)}), without {' and '.join(lacking)}. Call its arguments so."
        )
    supplied = answer.supplied(parameters) if answer is LegacyEncoder else table.supplied
    reserved = {*RESERVED_FIELDS, *_TAKEN_NAMES[table.slot]}
    taken = [field for field in parameters if field not in supplied and field in reserved]
    if taken:
        raise ValueError(
            f"{what} has a field {taken[0]!r}, a name that means something else in a config. Call the argument of "
            "its constructor otherwise."
        )


__all__ = ["is_legacy_encoder", "is_user_class", "register_encoder", "register_projector"]
