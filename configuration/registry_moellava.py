# SPDX-License-Identifier: Apache-2.0
"""The registries of vision encoders and projectors: exact names, one class each.

A name maps to a class and never to a substring of a path. The built-in parts register themselves when
`modeling/encoders_moellava.py`, `modeling/projectors_moellava.py` and `modeling/older_projectors_moellava.py` are
imported; a user's own part registers itself with the same decorator, from the user's own file:

```python
from torch import nn
from moellava import register_projector

@register_projector("gated")
class GatedProjector(nn.Module):
    def __init__(self, vision_hidden_size, text_hidden_size): ...
```
"""

import difflib
import inspect
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from .custom_code_moellava import is_own_class, source_file_of


_NAME_PATTERN = re.compile(r"[a-z0-9_]+")

# Keys that a part's config may carry and that are data of somebody else's process: never acted on, never passed on.
FOREIGN_KEYS = (
    "_attn_implementation",
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation",
    "_experts_implementation_internal",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "name_or_path",
    "transformers_version",
    "trust_remote_code",
)


def known_names(name: object, known: Iterable[str]) -> str:
    """Returns the end of an error message about an unknown name: the nearest known one, and the list of all."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.6)
    suggestion = f"; did you mean {close[0]!r}?" if close else "."
    return f"{suggestion} Known: {', '.join(known) or 'none'}."


_built_in_parts: tuple | None = None


def _load_built_in_parts() -> None:
    """Imports the files whose parts register themselves; at the first look-up, since they import torch's modules."""
    global _built_in_parts
    if _built_in_parts is None:
        _built_in_parts = ()  # set first: the files below register parts, which asks for them again
        # Of each file a name that it binds before its first decorator, since it may itself be the one being imported.
        from ..modeling.encoders_moellava import VisionEncoder
        from ..modeling.older_projectors_moellava import torch
        from ..modeling.projectors_moellava import nn

        _built_in_parts = (VisionEncoder, torch, nn)


def plain_value(value: Any, owner: str) -> Any:
    """Returns a field's value as it comes back from `config.json`, so that a part is built alike before and after.

    A config of transformers becomes a dictionary, without the keys that name other files or processes.

    Raises:
        ValueError: `config.json` cannot hold the value.
    """
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    try:
        return _without_foreign_keys(json.loads(json.dumps(value)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{owner} is a {type(value).__name__}, which config.json cannot hold ({error}). Expected a number, a "
            "string, a truth value, None, or lists and dictionaries of these."
        ) from error


def _without_foreign_keys(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_foreign_keys(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    foreign = FOREIGN_KEYS if "model_type" in value else ()
    return {key: _without_foreign_keys(entry) for key, entry in value.items() if key not in foreign}


def is_older_encoder(cls: type) -> bool:
    """Whether an encoder class has the older builder's shape: made of a path, and filled by its `load_model()`."""
    from torch import nn

    if not callable(getattr(cls, "load_model", None)):
        return False
    return not issubclass(cls, nn.Module) or "model_name_or_path" in _constructor_parameters(cls)


def _constructor_parameters(cls: type) -> dict[str, Any]:
    """The arguments of a class's constructor and their defaults, but for `*args` and `**kwargs`."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind in named}


def _is_same_definition(earlier: type, cls: type) -> bool:
    """Whether a class is an earlier one whose file, or notebook cell, was run again.

    A function that defines a class makes a new one each time, and the very same object is none that was run again.
    """
    if earlier is cls or earlier.__qualname__ != cls.__qualname__ or "<locals>" in cls.__qualname__:
        return False
    return earlier.__module__ == cls.__module__ or source_file_of(earlier) == source_file_of(cls) is not None


class Registry:
    """A table from a name to the class that carries it.

    Args:
        slot (`str`): What the classes are, in words, for error messages: "projector", "encoder".
        constructor_arguments (`tuple[str, ...]`): The arguments of a class's constructor that the model supplies. Every
            other argument is a field of the part's own, kept in the config.
        reserved_fields (`Iterable[str]`): Names that no field of a user's own part can have, since they mean something
            else where the part's fields are given.
    """

    def __init__(self, slot: str, constructor_arguments: tuple[str, ...], reserved_fields: Iterable[str]):
        self.slot = slot
        self.constructor_arguments = constructor_arguments
        self.reserved_fields = frozenset(reserved_fields)
        self._classes: dict[str, type] = {}

    def register(self, name: str, *, exist_ok: bool = False) -> Callable[[type], type]:
        """Returns the class decorator that enters a class under `name`.

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
        if not isinstance(name, str) or _NAME_PATTERN.fullmatch(name) is None:
            article = "an" if self.slot == "encoder" else "a"
            raise ValueError(
                f"{name!r} cannot name {article} {self.slot}: a name is made of lower-case letters, digits and "
                "underscores."
            )

        def enter(cls: type) -> type:
            if not inspect.isclass(cls):
                raise TypeError(f"register_{self.slot}({name!r}) decorates a class, got {type(cls).__name__}.")
            _load_built_in_parts()
            earlier = self._classes.get(name)
            if earlier is not None and not exist_ok and not _is_same_definition(earlier, cls):
                raise ValueError(
                    f"The {self.slot} {name!r} is registered already, by {earlier.__module__}.{earlier.__qualname__}. "
                    "Choose another name, or pass exist_ok=True to replace it."
                )
            if is_own_class(cls):
                self._check_own_class(cls)
            self._classes[name] = cls
            return cls

        return enter

    def __getitem__(self, name: str) -> type:
        _load_built_in_parts()
        if not isinstance(name, str) or name not in self._classes:
            raise ValueError(
                f"Unknown {self.slot} {name!r}{known_names(name, self._classes)} One of your own is made known by "
                f"importing the file that registers it with @register_{self.slot}(...); of a checkpoint that carries "
                "the file, also by load_pretrained_model(..., trust_remote_code=True), where you trust its author."
            )
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        _load_built_in_parts()
        return isinstance(name, str) and name in self._classes

    def names(self) -> list[str]:
        """The registered names, sorted."""
        _load_built_in_parts()
        return sorted(self._classes)

    def _check_own_class(self, cls: type) -> None:
        """Raises a TypeError or ValueError that says what a user's class lacks to be the part."""
        from torch import nn

        from .configuration_moellava import RESERVED_FIELDS

        what = f"@register_{self.slot}: {cls.__qualname__}"
        is_encoder = self.slot == "encoder"
        if not issubclass(cls, nn.Module) and not (is_encoder and (is_older_encoder(cls) or _is_vision_encoder(cls))):
            older = ", or give it load_model() and forward(images)" if is_encoder else ""
            raise TypeError(f"{what} is no torch.nn.Module. Derive it from nn.Module{older}; see docs/extending.md.")
        parameters = _constructor_parameters(cls)
        lacking = [argument for argument in self.constructor_arguments if argument not in parameters]
        if lacking:
            raise TypeError(
                f"{what} is built with {' and '.join(self.constructor_arguments)}, but its constructor takes "
                f"({', '.join(parameters)}), without {' and '.join(lacking)}. Call its arguments so."
            )
        reserved = RESERVED_FIELDS | self.reserved_fields
        taken = [field for field in self._own_parameters(cls) if field in reserved]
        if taken:
            raise ValueError(
                f"{what} has a field {taken[0]!r}, a name that means something else in a config. Call the argument of "
                "its constructor otherwise."
            )

    def _own_parameters(self, cls: type) -> dict[str, Any]:
        supplied = self.constructor_arguments
        if self.slot == "encoder" and is_older_encoder(cls):
            supplied = (next(iter(_constructor_parameters(cls)), ""), "config")  # the path comes first
        return {name: value for name, value in _constructor_parameters(cls).items() if name not in supplied}

    def fields(self, name: str) -> dict[str, Any]:
        """The part's own fields with their defaults (`inspect.Parameter.empty` where there is none)."""
        return self._own_parameters(self[name])

    def check_fields(self, name: str, given: Iterable[str]) -> None:
        """Raises a ValueError that names the first field which the part does not have, and the nearest that it has."""
        known = self.fields(name)
        for field in given:
            if field not in known:
                raise ValueError(f"The {self.slot} {name!r} has no field {field!r}{known_names(field, known)}")

    def complete_fields(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """Returns every own field of the part: the given values, and the defaults of the class for the rest.

        Raises:
            ValueError: A field that the part does not have, a field without default that is not given, or a value that
                `config.json` cannot hold.
        """
        self.check_fields(name, given)
        complete = {**self.fields(name), **given}
        missing = [field for field, value in complete.items() if value is inspect.Parameter.empty]
        if missing:
            raise ValueError(f"The {self.slot} {name!r} needs a value for: {', '.join(missing)}.")
        owner = f"The field {{!r}} of the {self.slot} {name!r}"
        return {field: plain_value(value, owner.format(field)) for field, value in complete.items()}


def _is_vision_encoder(cls: type) -> bool:
    from ..modeling.encoders_moellava import VisionEncoder

    return issubclass(cls, VisionEncoder)


PROJECTORS = Registry(
    "projector",
    constructor_arguments=("vision_hidden_size", "text_hidden_size"),
    reserved_fields=("path", "projector_type", "mm_projector_type", "image_projector_type", "type"),
)
ENCODERS = Registry(
    "encoder",
    constructor_arguments=(),
    reserved_fields=(
        "encoder_type", "mm_image_tower", "mm_vision_tower", "select_feature", "select_layer", "type",
        "vision_feature_layer", "vision_feature_select_strategy", "vision_tower",
    ),
)  # fmt: skip

register_projector = PROJECTORS.register
register_encoder = ENCODERS.register

__all__ = [
    "ENCODERS",
    "FOREIGN_KEYS",
    "PROJECTORS",
    "Registry",
    "is_older_encoder",
    "known_names",
    "plain_value",
    "register_encoder",
    "register_projector",
]
