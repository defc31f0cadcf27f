# SPDX-License-Identifier: Apache-2.0
"""The tables from the names of encoders and projectors to the classes that carry them, and to the sparse layers.

A name maps to a class and never to a substring of a path. `parts_moellava.py` fills the tables: in the package with all
built-in parts, in a checkpoint with its own.
"""

import inspect
from typing import Any

from ..configuration.config_base_moellava import known_names
from ..configuration.tools_moellava import tools


class PartTable:
    """A table from a name to the class that carries it.

    Args:
        slot (`str`): What the classes are, in words, for error messages: "projector", "encoder".
        supplied (`tuple[str, ...]`): The arguments of a class's constructor that the model supplies. Every other
            argument is a field of the part, kept in the config.
    """

    def __init__(self, slot: str, supplied: tuple[str, ...] = ()):
        self.slot = slot
        self.supplied = supplied
        self._classes: dict[str, type] = {}
        self._answers: dict[str, type] = {}

    def enter(self, name: str, cls: type, answer: type) -> None:
        """Enters a class, and the class that answers for it: `VisionEncoder`, `Projector` or one of their kind."""
        self._classes[name], self._answers[name] = cls, answer

    def answer(self, name: str) -> type:
        """The class that answers for a part; see `enter`."""
        _ = self[name]  # for its error
        return self._answers[name]

    def is_by_user(self, name: str) -> bool:
        """Whether a user has written the part of that name."""
        return getattr(self.answer(name), "is_by_user", False)

    def __getitem__(self, name: str) -> type:
        if not isinstance(name, str) or name not in self._classes:
            raise ValueError(
                f"Unknown {self.slot} {name!r}{known_names(name, self._classes)} One of your own is made known by "
                f"importing the file that registers it with @register_{self.slot}(...); of a checkpoint that carries "
                "the file, also by load_pretrained_model(..., trust_remote_code=True), where you trust its author. "
                "Without moellava, a checkpoint knows its own parts alone: install it for the others."
            )
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._classes

    def names(self) -> list[str]:
        """The names, sorted."""
        return sorted(self._classes)

    def fields(self, name: str) -> dict[str, Any]:
        """The fields of a part with their defaults (`inspect.Parameter.empty` where there is none)."""
        parameters = constructor_parameters(self[name])
        supplied = getattr(self._answers.get(name), "supplied", lambda parameters: self.supplied)(parameters)
        return {field: default for field, default in parameters.items() if field not in supplied}

    def complete_fields(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """Returns every field of a part: the given values, and the defaults of the class for the rest.

        Raises:
            ValueError: Where moellava is installed: a field that the part does not have, one without default that is
                not given, or a value that `config.json` cannot hold.
        """
        return tools().checked_part_fields(self, name, {**self.fields(name), **given})


def constructor_parameters(cls: type) -> dict[str, Any]:
    """The arguments of a class's constructor and their defaults, but for `*args` and `**kwargs`."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind in named}


PROJECTORS = PartTable("projector", supplied=("vision_hidden_size", "text_hidden_size"))
ENCODERS = PartTable("encoder")
# What a checkpoint has where it needs it: "sparse" layers, the "routing" of a language model that is sparse by itself,
# "quantised" weights, the "modular_experts" of sparse layers with such; and "user_encoder_config", the config class of
# the vision encoders that users write.
OPTIONAL: dict[str, type] = {}


def optional(name: str) -> Any:
    """Returns an entry of `OPTIONAL`, or raises a ValueError where a checkpoint does without it."""
    if name not in OPTIONAL:
        raise ValueError(f"This checkpoint carries no code for {name!r}. To change its parts: pip install moellava.")
    return OPTIONAL[name]


def detect_encoder_type(model_type: str) -> str:
    """Returns the encoder that answers for a tower's `model_type`: the one that names it, else `"auto"`."""
    for name in ENCODERS.names():
        if model_type in getattr(ENCODERS[name], "detected_model_types", ()):
            return name
    return "auto"


def encoder_for(config) -> Any:
    """Returns the `VisionEncoder` of a `MoellavaConfig`; raises a ValueError for an unknown one."""
    name = config.encoder_type or detect_encoder_type(config.vision_config.model_type)
    answer = ENCODERS.answer(name)
    return answer(config, name, ENCODERS[name]) if ENCODERS.is_by_user(name) else answer(config)


def projector_for(config, vision_hidden_size: int) -> Any:
    """Returns the `Projector` of a `MoellavaConfig` for image features of some width."""
    name, fields = config.projector_config.type, config.projector_config.fields
    return PROJECTORS.answer(name)(PROJECTORS[name], fields, (vision_hidden_size, config.text_embedding_size))
