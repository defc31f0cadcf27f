# SPDX-License-Identifier: Apache-2.0
"""A vision encoder that a user has written for the older builder: a class with `load_model()` and `forward(images)`."""

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .part_table_moellava import ENCODERS
from .user_encoder_moellava import UserEncoder


class LegacyEncoder(UserEncoder):
    """Answers for a class of the older builder's shape: made of a path, filled by `load_model()`, and no module.

    While assembling, the class loads its backbone. From then on the backbone is described by value: an instance is
    made without a path, gets a backbone built from its config, and is told that it is loaded. What `forward` returns is
    taken as it is: such a class chooses layer and tokens itself, by its `config`.
    """

    @staticmethod
    def supplied(parameters: dict[str, Any]) -> tuple[str, ...]:
        """The arguments of its constructor that are no fields: the path, which comes first, and `config`."""
        return (next(iter(parameters), ""), "config")

    def __init__(self, config, encoder_type: str, module_class: type):
        self._settings = legacy_settings(
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
        return make_legacy_encoder(module_class, fields["own"], settings, {**fields["attributes"], **backbones})


def legacy_settings(layer: int | list[int], strategy: str, image_size: int | None) -> dict[str, Any]:
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


def make_legacy_encoder(
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
        settings (`SimpleNamespace`): What it is told as its `config`: `legacy_settings`.
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
