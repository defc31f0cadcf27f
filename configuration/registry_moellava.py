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
"""The registries of vision encoders and projectors: exact names, one class each.

A name maps to a class and never to a substring of a path. The built-in parts register themselves when
`modeling/encoders_moellava.py` and `modeling/projectors_moellava.py` are imported; a user's own part registers itself
with the same decorator, from the user's own file:

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
import re
from collections.abc import Callable, Iterable


_NAME_PATTERN = re.compile(r"[a-z0-9_]+")


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
        from ..modeling.projectors_moellava import nn

        _built_in_parts = (VisionEncoder, nn)


class Registry:
    """A table from a name to the class that carries it.

    Args:
        slot (`str`): What the classes are, in words, for error messages: "projector", "encoder".
        constructor_arguments (`tuple[str, ...]`): The leading arguments of a class's constructor that the model
            supplies. Every further argument is a field of the part's own, kept in the config.
    """

    def __init__(self, slot: str, constructor_arguments: tuple[str, ...]):
        self.slot = slot
        self.constructor_arguments = constructor_arguments
        self._classes: dict[str, type] = {}

    def register(self, name: str, *, exist_ok: bool = False) -> Callable[[type], type]:
        """Returns the class decorator that enters a class under `name`.

        Raises:
            ValueError: The name has other characters than `a-z`, `0-9` and `_`, or is taken and `exist_ok` is false.
        """
        if not isinstance(name, str) or _NAME_PATTERN.fullmatch(name) is None:
            raise ValueError(
                f"{name!r} cannot name a {self.slot}: a name is made of lower-case letters, digits and underscores."
            )

        def enter(cls: type) -> type:
            if not inspect.isclass(cls):
                raise TypeError(f"register_{self.slot}({name!r}) decorates a class, got {type(cls).__name__}.")
            _load_built_in_parts()
            earlier = self._classes.get(name)
            same_definition = earlier is not None and (
                (earlier.__module__, earlier.__qualname__) == (cls.__module__, cls.__qualname__)
            )
            if earlier is not None and not exist_ok and not same_definition:
                raise ValueError(
                    f"The {self.slot} {name!r} is registered already, by {earlier.__module__}.{earlier.__qualname__}. "
                    "Choose another name, or pass exist_ok=True to replace it."
                )
            self._classes[name] = cls
            return cls

        return enter

    def __getitem__(self, name: str) -> type:
        _load_built_in_parts()
        if not isinstance(name, str) or name not in self._classes:
            raise ValueError(
                f"Unknown {self.slot} {name!r}{known_names(name, self._classes)} One of your own is made known by "
                f"importing the file that registers it with @register_{self.slot}(...)."
            )
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        _load_built_in_parts()
        return isinstance(name, str) and name in self._classes

    def names(self) -> list[str]:
        """The registered names, sorted."""
        _load_built_in_parts()
        return sorted(self._classes)

    def fields(self, name: str) -> dict[str, object]:
        """The part's own fields with their defaults (`inspect.Parameter.empty` where there is none)."""
        parameters = list(inspect.signature(self[name].__init__).parameters.values())[1:]
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {
            parameter.name: parameter.default
            for parameter in parameters
            if parameter.kind in named and parameter.name not in self.constructor_arguments
        }

    def check_fields(self, name: str, given: Iterable[str]) -> None:
        """Raises a ValueError that names the first field which the part does not have, and the nearest that it has."""
        known = self.fields(name)
        for field in given:
            if field not in known:
                raise ValueError(f"The {self.slot} {name!r} has no field {field!r}{known_names(field, known)}")

    def complete_fields(self, name: str, given: dict[str, object]) -> dict[str, object]:
        """Returns every own field of the part: the given values, and the defaults of the class for the rest.

        Raises:
            ValueError: A field that the part does not have, or a field without default that is not given.
        """
        self.check_fields(name, given)
        complete = {**self.fields(name), **given}
        missing = [field for field, value in complete.items() if value is inspect.Parameter.empty]
        if missing:
            raise ValueError(f"The {self.slot} {name!r} needs a value for: {', '.join(missing)}.")
        return complete


PROJECTORS = Registry("projector", constructor_arguments=("vision_hidden_size", "text_hidden_size"))
ENCODERS = Registry("encoder", constructor_arguments=())

register_projector = PROJECTORS.register
register_encoder = ENCODERS.register

__all__ = ["ENCODERS", "PROJECTORS", "Registry", "known_names", "register_encoder", "register_projector"]
