# SPDX-License-Identifier: Apache-2.0
"""The vision encoders that users write: a module of their own, or a class of the older builder's shape.

`CustomEncoder` answers for an `nn.Module` under `@register_encoder`, `OlderEncoder` for a class with `load_model()` and
`forward(images)`. Both measure what the module gives by running it once. See `docs/extending.md`.
"""

import functools
import inspect
import json
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..configuration.registry_moellava import ENCODERS
from .encoders_moellava import VisionEncoder, as_tokens
from .own_parts_moellava import build_part, run_part


class CustomEncoder(VisionEncoder):
    """Answers for a user's own `nn.Module`.

    Args:
        config (`MoellavaConfig`): The model's config; its `vision_config` holds the module's fields.
        encoder_type (`str`): The name that the module is registered under.
        module_class (`type`): Its class.
    """

    def __init__(self, config, encoder_type: str, module_class: type):
        self.encoder_type = encoder_type
        self.module_class = module_class
        if config.vision_config.model_type != "moellava_encoder":
            raise ValueError(
                f"encoder_type is {encoder_type!r}, an encoder of your own, but vision_config.model_type is "
                f"{config.vision_config.model_type!r}; expected 'moellava_encoder' and the fields of "
                f"{module_class.__name__}."
            )
        self.fields = self.read_fields(config)
        super().__init__(config)

    def read_fields(self, config) -> dict[str, Any]:
        """Returns what the module is made from."""
        given = config.vision_config.fields
        if "image_size" not in ENCODERS.fields(self.encoder_type):
            given = {name: value for name, value in given.items() if name != "image_size"}  # told, but no field of it
        return ENCODERS.complete_fields(self.encoder_type, given)

    @staticmethod
    def make(module_class: type, fields: dict[str, Any]) -> nn.Module:
        """Makes the module on the default device."""
        return module_class(**fields)

    def make_tower(self) -> nn.Module:
        """Makes the module, as its constructor leaves it."""
        return self.make(self.module_class, self.fields)

    def build(self) -> nn.Module:
        return build_part(self.make_tower)

    @property
    def tower_name(self) -> str:
        return self.encoder_type

    @property
    def num_hidden_layers(self) -> int:
        return len(self._measured_shapes) - 1

    @functools.cached_property
    def num_prefix_tokens(self) -> int:
        count = getattr(self.module_class, "num_prefix_tokens", 0)
        if not isinstance(count, int):  # a property, which the module's fields decide
            with torch.device("meta"):
                count = self.build().num_prefix_tokens
        return count

    @property
    def has_class_token(self) -> bool:
        return self.num_prefix_tokens > 0

    @property
    def native_image_size(self) -> int:
        sizes = (self.fields.get("image_size"), getattr(self.vision_config, "image_size", None), self._image_size)
        size = next((size for size in sizes if size is not None), None)
        if not isinstance(size, int):
            raise ValueError(f"The encoder {self.encoder_type!r} needs its picture size in pixels: give image_size.")
        return size

    def _check_image_size(self) -> None:
        if not self._measured_shapes:  # the module itself decides what it takes, by running
            raise ValueError(f"The encoder {self.encoder_type!r} returns no features.")

    _as_tokens = staticmethod(as_tokens)  # their author writes maps as (width, rows, columns)

    @property
    def _measured_shapes(self) -> list[tuple[int, int, int]]:
        return _measured_shapes(
            type(self), self.encoder_type, self.module_class, json.dumps(self.fields, sort_keys=True), self.image_size
        )

    def _run(self, tower: nn.Module, pixel_values: torch.Tensor, **asked: bool | list[int]) -> BaseModelOutput:
        # Its forward takes pictures and nothing else, so that what is asked for besides features is not there.
        return BaseModelOutput(hidden_states=as_hidden_states(tower(pixel_values)))


@functools.lru_cache(maxsize=32)
def _measured_shapes(
    encoder_class: type[CustomEncoder], encoder_type: str, module_class: type, fields: str, image_size: int
) -> list[tuple[int, int, int]]:
    """Returns the shapes `(2, tokens, width)` of the features of every layer that a module offers."""
    given = (2, 3, image_size, image_size)
    try:
        output = run_part(lambda: encoder_class.make(module_class, json.loads(fields)), given)
        hidden_states = as_hidden_states(output)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"The encoder {encoder_type!r} cannot be run on pictures of shape {given}: {error}. Its forward takes "
            "pixel_values (batch, 3, height, width) and returns features (batch, tokens, width), or a list of them, "
            "one per layer."
        ) from error
    shapes = [tuple(hidden_state.shape) for hidden_state in hidden_states]
    wrong = [shape for shape in shapes if len(shape) not in (3, 4) or shape[0] != 2]
    if wrong:
        raise ValueError(
            f"The encoder {encoder_type!r} makes features of shape {wrong[0]} of pictures of shape {given}; expected "
            "(2, tokens, width), or a map (2, width, rows, columns)."
        )
    return [tuple(as_tokens(hidden_state).shape) for hidden_state in hidden_states]


def as_hidden_states(output: Any) -> tuple[torch.Tensor, ...]:
    """Returns the features of every layer, of what a module returns: one tensor, several, or an output of transformers.

    Raises:
        TypeError: It returns something else.
    """
    if isinstance(output, dict):  # an output of transformers is one
        layers = output.get("hidden_states")
        output = output.get("last_hidden_state") if layers is None else layers
    if isinstance(output, torch.Tensor):
        output = (output,)
    if not isinstance(output, list | tuple) or not all(isinstance(entry, torch.Tensor) for entry in output):
        raise TypeError(f"it returns a {type(output).__name__}")
    # One set of features stands for both of the layers that are asked for by default, -1 and -2.
    return tuple(output) * 2 if len(output) == 1 else tuple(output)


# The older builder's shape


class OlderEncoder(CustomEncoder):
    """Answers for a class of the older builder's shape: made of a path, filled by `load_model()`, and no module.

    While assembling, the class loads its backbone. From then on the backbone is described by value: an instance is
    made without a path, gets a backbone built from its config, and is told that it is loaded. What `forward` returns is
    taken as it is: such a class chooses layer and tokens itself, by its `config`.
    """

    def __init__(self, config, encoder_type: str, module_class: type):
        self._settings = older_settings(
            config.vision_feature_layer, config.vision_feature_select_strategy, config.image_size
        )
        whole = SimpleNamespace(
            vision_config=config.vision_config,
            image_size=config.image_size,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        super().__init__(whole, encoder_type, module_class)

    def read_fields(self, config) -> dict[str, Any]:
        given = config.vision_config.fields
        lacking = [name for name in ("backbones", "image_size") if name not in given]
        if lacking:
            raise ValueError(
                f"vision_config lacks {' and '.join(lacking)} of the encoder {self.encoder_type!r}, which "
                "load_pretrained_model takes from what the encoder loads. Give it a path as mm_vision_tower."
            )
        own = {name: value for name, value in given.items() if name in ENCODERS.fields(self.encoder_type)}
        own = ENCODERS.complete_fields(self.encoder_type, own)
        settings = self._settings | {"image_size": self._settings["image_size"] or given["image_size"]}
        return {"attributes": {}, **given, "own": own, "settings": settings}

    @staticmethod
    def make(module_class: type, fields: dict[str, Any]) -> nn.Module:
        backbones = {name: build_backbone(backbone) for name, backbone in fields["backbones"].items()}
        settings = SimpleNamespace(**fields["settings"])
        return make_older_encoder(module_class, fields["own"], settings, {**fields["attributes"], **backbones})


def older_settings(layer: int | list[int], strategy: str, image_size: int | None) -> dict[str, Any]:
    """Returns what a class of the older builder's shape is told as its `config`, under the newer and older names."""
    older_strategy = {"default": "patch", "full": "cls_patch"}.get(strategy, strategy)
    return {
        "image_size": image_size,
        "mm_vision_select_feature": older_strategy,
        "mm_vision_select_layer": layer,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
    }


def build_backbone(described: dict[str, Any]) -> PreTrainedModel:
    """Builds a model of transformers from its config's fields, with new weights; `architectures` names its class.

    Raises:
        ValueError: It is no model of transformers.
    """
    name = (described.get("architectures") or [None])[0]
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        raise ValueError(f"The backbone's class is {name!r}; expected a model of transformers.")
    return model_class(AutoConfig.for_model(**described))


def make_older_encoder(
    module_class: type,
    own: dict[str, Any],
    settings: SimpleNamespace,
    loaded: dict[str, Any] | None = None,
    path: str = "",
) -> nn.Module:
    """Makes an instance of a class of the older builder's shape, as a module.

    Args:
        module_class (`type`): The class.
        own (`dict`): Its own fields.
        settings (`SimpleNamespace`): What it is told as its `config`: `older_settings`.
        loaded (`dict`, *optional*): The attributes that `load_model()` would set. Without, it is to load them.
        path (`str`, *optional*): Where from.
    """
    encoder = _as_module_class(module_class).__new__(_as_module_class(module_class))
    nn.Module.__init__(encoder)
    encoder.is_made_again = loaded is not None
    config = {"config": settings} if "config" in inspect.signature(module_class.__init__).parameters else {}
    module_class.__init__(encoder, path, **config, **own)
    if loaded is not None:
        encoder.is_loaded = True
        for name, value in loaded.items():
            setattr(encoder, name, value)
    return encoder


@functools.cache
def _as_module_class(module_class: type) -> type[nn.Module]:
    """Returns a subclass that is a module, so that what an instance keeps as attributes is saved and moved with it."""

    def forward(self, images: torch.Tensor) -> Any:
        return module_class.forward(self, images)

    def load_model(self, *args, **kwargs) -> None:
        if not self.is_made_again:
            module_class.load_model(self, *args, **kwargs)

    bases = (module_class,) if issubclass(module_class, nn.Module) else (nn.Module, module_class)
    members = {"forward": forward, "load_model": load_model, "to": nn.Module.to}
    members |= {"__module__": module_class.__module__, "__doc__": module_class.__doc__}
    return type(module_class.__name__, bases, members)


__all__ = ["CustomEncoder", "OlderEncoder", "as_hidden_states", "make_older_encoder", "older_settings"]
