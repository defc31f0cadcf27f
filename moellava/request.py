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
"""From what a user writes to what is to be loaded.

`load_pretrained_model` takes a dictionary, a dataclass or any object with attributes, and keywords, under several
generations of names. `read_request` makes one `LoadRequest` of them. Where they disagree, keywords win over the objects
and dictionaries; what is left open comes from the checkpoint's own config, then from the defaults.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .configuration.names_moellava import (
    FIELD_NAMES,
    PROJECTOR_FIELD_NAMES,
    VISION_FIELD_NAMES,
    canonical_encoder_type,
    canonical_moe,
    canonical_projector,
    canonical_strategy,
    translate_fields,
)
from .configuration.registry_moellava import PROJECTORS, known_names


logger = logging.getLogger(__name__)

# Arguments that say how to load, with what they mean when nobody gives them.
_OPTIONS: dict[str, Any] = {
    "device": None,
    "device_map": None,
    "dtype": None,
    "encoder_debug": False,
    "load_4bit": False,
    "load_8bit": False,
    "merge": True,
    "projector_debug": False,
    "quantization_config": None,
}
_OPTION_NAMES = {"torch_dtype": "dtype", "load_in_4bit": "load_4bit", "load_in_8bit": "load_8bit"}
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token", "trust_remote_code")
_MODEL_OPTIONS = (
    "attn_implementation",
    "distributed_config",
    "experts_implementation",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "offload_state_dict",
    "tp_plan",
    "use_kernels",
    "use_safetensors",
)
_PART_OPTIONS = ("custom_vision_config", "moe_config", "projector_config")


@dataclasses.dataclass
class LoadRequest:
    """What to load, in one form whatever the user wrote.

    Attributes:
        model_path (`str`): A checkpoint of this package, or a language model; a folder or a Hub id.
        model_base (`str`, *optional*): The model that `model_path` is an adapter of.
        vision_tower (`str`, *optional*): A vision tower's folder or Hub id.
        encoder_fields (`dict`): Fields of an encoder of the user's own.
        projector (`dict`, *optional*): The projector's `type` and fields, as far as given.
        projector_path (`str`, *optional*): A file with the projector's weights.
        moe (`dict`, *optional*): Fields of `MoellavaMoeConfig`, as far as given, and `router_path`.
        model_fields (`dict`): Fields of `MoellavaConfig`.
        claims (`dict`): What the user says of a part that the part itself tells.
        options, hub_options, model_options (`dict`): How to load.
    """

    model_path: str
    model_base: str | None = None
    vision_tower: str | None = None
    encoder_fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    projector: dict[str, Any] | None = None
    projector_path: str | None = None
    moe: dict[str, Any] | None = None
    model_fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    claims: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    hub_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    model_options: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_request(configuration: Any, keywords: Mapping[str, Any]) -> LoadRequest:
    """Makes one request of a configuration and keywords.

    Args:
        configuration (`str`, `os.PathLike`, `Mapping`, dataclass or object): The model's path, or a configuration.
        keywords (`Mapping[str, Any]`): What was given by keyword.

    Raises:
        TypeError: A configuration or a part of it is neither a dictionary nor an object with attributes.
        ValueError: An unknown or contradictory field, or no model to load.
    """
    if configuration is None or isinstance(configuration, str | os.PathLike):
        given = {"model_path": configuration}
    else:
        given = _as_fields(configuration, "the configuration")
    layers = [_read_layer(given, "the configuration"), _read_layer(keywords, "the arguments")]

    merged: dict[str, dict[str, Any]] = {}
    for layer in layers:  # the later one wins
        projector = _stacked_projector(merged.get("projector"), layer.get("projector"))
        for section, fields in layer.items():
            merged.setdefault(section, {}).update(fields)
        if projector is not None:
            merged["projector"] = projector

    source, model_fields = merged.get("source", {}), merged.get("model", {})
    if source.get("model_path") in (None, ""):
        raise ValueError(
            "No model to load: give model_path (or model_name_or_path), a checkpoint of this package or a language "
            "model, as a folder or a Hub id."
        )
    if "encoder_type" in model_fields:
        model_fields["encoder_type"] = canonical_encoder_type(model_fields["encoder_type"])
    if "vision_feature_select_strategy" in model_fields:
        strategy = canonical_strategy(model_fields["vision_feature_select_strategy"])
        strategies = ("default", "patch", "cls", "full")
        if strategy not in strategies:
            raise ValueError(f"Unknown vision_feature_select_strategy {strategy!r}{known_names(strategy, strategies)}")
        model_fields["vision_feature_select_strategy"] = strategy
    options = {**_OPTIONS, **merged.get("option", {})}
    if options["load_4bit"] and options["load_8bit"]:
        raise ValueError("load_4bit and load_8bit are both set; a model is loaded in one of them. Leave one out.")
    if options["quantization_config"] is not None and (options["load_4bit"] or options["load_8bit"]):
        raise ValueError("quantization_config says how to quantise already; leave load_4bit and load_8bit out.")

    projector = merged.get("projector")
    path = projector.pop("path", None) if projector else None
    return LoadRequest(
        model_path=os.fspath(source["model_path"]),
        model_base=_path_or_none(source.get("model_base")),
        vision_tower=_path_or_none(source.get("vision_tower")),
        encoder_fields=merged.get("encoder", {}),
        projector=projector or None,
        projector_path=_path_or_none(path),
        moe=merged.get("moe"),
        model_fields=model_fields,
        claims=merged.get("check", {}),
        options=options,
        hub_options=merged.get("hub", {}),
        model_options=merged.get("loading", {}),
    )


def _path_or_none(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{value!r} is no path: expected a folder, a file or a Hub id as a string.")
    return str(Path(value)) if isinstance(value, os.PathLike) else value


def _as_fields(value: Any, origin: str) -> dict[str, Any]:
    """Returns the fields of a dictionary, a dataclass or an object with attributes."""
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, str | bytes | int | float | bool | list | tuple | set | type) or callable(value):
        raise TypeError(
            f"{origin} is a {type(value).__name__}; expected a dictionary, a dataclass instance or an object with "
            "attributes."
        )
    names = [name for name in dir(value) if not name.startswith("_")]
    fields = {name: getattr(value, name) for name in names if not callable(getattr(value, name))}
    if not fields:
        raise TypeError(f"{origin} is a {type(value).__name__} without attributes; expected a dictionary or dataclass.")
    return fields


def _own_defaults(value: Any) -> dict[str, Any]:
    """What the class of an object says by itself, without the user having chosen it."""
    if isinstance(value, Mapping):
        return {}
    if dataclasses.is_dataclass(value):
        return {
            field.name: field.default for field in dataclasses.fields(value) if field.default is not dataclasses.MISSING
        }
    return {name: default for name, default in vars(type(value)).items() if not name.startswith("_")}


def _read_layer(given: Mapping[str, Any], origin: str) -> dict[str, dict[str, Any]]:
    """Sorts one layer of what was given into sections; its part objects win over its flat fields."""
    flat, sections = {}, {}
    parts = {name: given[name] for name in _PART_OPTIONS if given.get(name) is not None}
    for name, value in given.items():
        name = _OPTION_NAMES.get(name, name)
        if name in _PART_OPTIONS:
            continue
        for section, names in (("option", _OPTIONS), ("hub", _HUB_OPTIONS), ("loading", _MODEL_OPTIONS)):
            if name in names:
                if value is not None:
                    sections.setdefault(section, {})[name] = value
                break
        else:
            flat[name] = value
    others = dict.fromkeys((*_OPTIONS, *_HUB_OPTIONS, *_MODEL_OPTIONS, *_PART_OPTIONS), ("", ""))
    for name in flat:
        if name not in FIELD_NAMES:
            raise ValueError(f"Unknown field {name!r} in {origin}{known_names(name, [*FIELD_NAMES, *others])}")
    for section, fields in translate_fields(flat, origin).items():
        sections.setdefault(section, {}).update(fields)
    if "custom_vision_config" in parts:
        for section, fields in _read_vision(parts["custom_vision_config"]).items():
            sections.setdefault(section, {}).update(fields)
    if "moe_config" in parts:
        sections["moe"] = _read_moe(parts["moe_config"])
    if "projector" in sections:
        sections["projector"] = canonical_projector_fields(sections["projector"])
    if "projector_config" in parts:
        own = _read_projector(parts["projector_config"], sections.get("projector", {}).get("type"))
        sections["projector"] = _stacked_projector(sections.get("projector"), own)
    return sections


def _read_vision(value: Any) -> dict[str, dict[str, Any]]:
    fields = _as_fields(value, "custom_vision_config")
    known = {name: field for name, field in fields.items() if name in VISION_FIELD_NAMES}
    sections = translate_fields(known, "custom_vision_config", names=VISION_FIELD_NAMES)
    own = {name: field for name, field in fields.items() if name not in known}
    if own:
        encoder_type = canonical_encoder_type(sections.get("model", {}).get("encoder_type", ""))
        if not is_custom_encoder(encoder_type):
            name = next(iter(own))
            raise ValueError(f"Unknown field {name!r} in custom_vision_config{known_names(name, VISION_FIELD_NAMES)}")
        sections["encoder"] = own
    return sections


def is_custom_encoder(encoder_type: str) -> bool:
    """Whether a registered encoder is a module of the user's own."""
    from .configuration.registry_moellava import ENCODERS
    from .modeling.encoders_moellava import VisionEncoder

    return encoder_type in ENCODERS and not issubclass(ENCODERS[encoder_type], VisionEncoder)


def canonical_projector_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`canonical_projector` for fields that may leave the type open."""
    canonical = canonical_projector(fields)
    return canonical if fields.get("type") is not None else {k: v for k, v in canonical.items() if k != "type"}


def _read_projector(value: Any, flat_type: str | None) -> dict[str, Any]:
    """Reads `projector_config`; the defaults of a user's class that the projector's type does not have are left out."""
    if isinstance(value, str):
        raise TypeError("projector_config is a str; expected a dictionary, a dataclass instance or an object.")
    fields = _as_fields(value, "projector_config")
    fields = {PROJECTOR_FIELD_NAMES.get(name, name): field for name, field in fields.items()}
    defaults = {PROJECTOR_FIELD_NAMES.get(name, name): field for name, field in _own_defaults(value).items()}
    kind = canonical_projector({"type": fields.get("type") or flat_type or "mlp"})["type"]
    known = {"type", "path", "hidden_size", *PROJECTORS.fields(kind)}
    for name in [name for name in fields if name not in known and defaults.get(name) == fields[name]]:
        logger.info(
            "The projector %r has no field %r; the default of projector_config's class is left out.", kind, name
        )
        del fields[name]
    if "hidden_size" in fields and "hidden_size" in defaults and fields["hidden_size"] == defaults["hidden_size"]:
        canonical = canonical_projector({"type": kind, "hidden_size": fields["hidden_size"]})
        if any(name not in PROJECTORS.fields(kind) for name in canonical if name != "type"):
            del fields["hidden_size"]
    return canonical_projector_fields(fields)


def _read_moe(value: Any) -> dict[str, Any]:
    fields = _as_fields(value, "moe_config")
    router_path = _path_or_none(fields.pop("router_path", None))
    return canonical_moe(fields) | ({} if router_path is None else {"router_path": router_path})


def _stacked_projector(lower: dict[str, Any] | None, upper: dict[str, Any] | None) -> dict[str, Any] | None:
    """Lays one description of the projector over another; fields of another type than the upper one's are dropped."""
    if lower is None or upper is None:
        return upper if lower is None else lower
    if "type" in upper and "type" in lower and upper["type"] != lower["type"]:
        lower = {}
    return {**lower, **upper}


__all__ = ["LoadRequest", "canonical_projector_fields", "is_custom_encoder", "read_request"]
