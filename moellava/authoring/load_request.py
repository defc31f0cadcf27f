# SPDX-License-Identifier: Apache-2.0
"""From what a user writes to what is to be loaded.

`load_pretrained_model` takes a dictionary, a dataclass or any object with attributes, and keywords, under several
generations of names. `read_request` makes one `LoadRequest` of them. Where they disagree, keywords win over the objects
and dictionaries; what is left open comes from the checkpoint's own config, then from the defaults.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch

from ..configuration.config_base_moellava import CHOICES, check_choice, known_names
from ..parts.parts_moellava import ENCODERS, PROJECTORS
from .older_names import (
    FIELD_NAMES,
    MOE_FIELD_NAMES,
    VISION_FIELD_NAMES,
    canonical_encoder_type,
    canonical_moe,
    canonical_projector,
    canonical_projector_fields,
    canonical_strategy,
    given_type,
    stacked_projector,
    translate_fields,
)
from .part_fields import check_fields


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
_OPTION_NAMES = {
    "load_in_4bit": "load_4bit",
    "load_in_8bit": "load_8bit",
    "precision": "dtype",
    "torch_dtype": "dtype",
}
_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token", "trust_remote_code")
_MODEL_OPTIONS = (
    "attn_implementation",
    "distributed_config",
    "experts_implementation",
    "max_memory",
    "modules_to_quantize",
    "offload_buffers",
    "offload_folder",
    "offload_state_dict",
    "tp_plan",
    "use_kernels",
    "use_safetensors",
)
# Objects and dictionaries that describe one part each, and what the older builder's files call them.
_PARTS: dict[str, tuple[str, str]] = {
    "custom_vision_config": ("part", "custom_vision_config"),
    "image_encoder": ("part", "custom_vision_config"),
    "vision_config": ("part", "custom_vision_config"),
    "moe_config": ("part", "moe_config"),
    "projector": ("part", "projector_config"),
    "projector_config": ("part", "projector_config"),
    "video_encoder": ("video", "video_encoder"),
}


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

    What is given by keyword wins over the objects `custom_vision_config`, `projector_config` and `moe_config`, and
    these win over the fields of the configuration. `None` counts as not given.

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
        given = _as_fields(configuration, "The configuration")
    fields, parts = _read_layer(given, "the configuration")
    keyword_fields, keyword_parts = _read_layer(keywords, "the arguments")
    flat_type = (fields.get("projector", {}) | keyword_fields.get("projector", {})).get("type")
    flat_encoder = (fields.get("model", {}) | keyword_fields.get("model", {})).get("encoder_type")
    parts, keyword_parts = (_read_parts(one, flat_type, flat_encoder) for one in (parts, keyword_parts))

    merged: dict[str, dict[str, Any]] = {}
    for layer in (fields, parts, keyword_parts, keyword_fields):
        projector = stacked_projector(merged.get("projector"), layer.get("projector"))
        for section, values in layer.items():
            merged.setdefault(section, {}).update(values)
        if projector is not None:
            merged["projector"] = projector

    source = merged.get("source", {})
    if source.get("model_path") in (None, ""):
        raise ValueError(
            "No model to load: give model_path (or model_name_or_path), a checkpoint of this package or a language "
            "model, as a folder or a Hub id."
        )
    projector = merged.get("projector")
    path = projector.pop("path", None) if projector else None
    if projector and projector.get("type") in PROJECTORS:
        check_fields(PROJECTORS, projector["type"], [name for name in projector if name != "type"])
    return LoadRequest(
        model_path=_path(source["model_path"]),
        model_base=_path_or_none(source.get("model_base")),
        vision_tower=_path_or_none(source.get("vision_tower")),
        encoder_fields=merged.get("encoder", {}),
        projector=projector or None,
        projector_path=_path_or_none(path),
        moe=merged.get("moe"),
        model_fields=_checked_model_fields(merged.get("model", {})),
        claims=merged.get("check", {}),
        options=_checked_options({**_OPTIONS, **merged.get("option", {})}),
        hub_options=merged.get("hub", {}),
        model_options=merged.get("loading", {}),
    )


def _checked_model_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of `MoellavaConfig` under the values that it takes; what depends on the parts, it checks."""
    if "encoder_type" in fields:
        fields["encoder_type"] = canonical_encoder_type(fields["encoder_type"])
    if "vision_feature_select_strategy" in fields:
        fields["vision_feature_select_strategy"] = canonical_strategy(fields["vision_feature_select_strategy"])
    for name in CHOICES:
        if name in fields:
            check_choice(name, fields[name])
    if isinstance(fields.get("vision_feature_layer"), tuple):
        fields["vision_feature_layer"] = list(fields["vision_feature_layer"])
    return fields


def _checked_options(options: dict[str, Any]) -> dict[str, Any]:
    for name, default in _OPTIONS.items():
        if isinstance(default, bool) and not isinstance(options[name], bool):
            raise TypeError(f"{name} is {options[name]!r}; expected True or False.")
    if options["load_4bit"] and options["load_8bit"]:
        raise ValueError("load_4bit and load_8bit are both set; a model is loaded in one of them. Leave one out.")
    if options["quantization_config"] is not None and (options["load_4bit"] or options["load_8bit"]):
        raise ValueError("quantization_config says how to quantise already; leave load_4bit and load_8bit out.")
    options["dtype"] = _dtype(options["dtype"])
    return options


def _dtype(given: Any) -> torch.dtype | None:
    """Returns the dtype of that name, or `None` for the weights' own."""
    if given in (None, "auto"):
        return None
    dtype = given
    if isinstance(given, str):
        name = given.removeprefix("torch.").lower()
        dtype = getattr(torch, _SHORT_DTYPES.get(name, name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"dtype is {given!r}; expected a floating-point dtype of PyTorch or its name, such as 'bfloat16', or "
            "'auto' for the dtype that the weights are saved in."
        )
    return dtype


def _path_or_none(value: Any) -> str | None:
    return None if value is None else _path(value)


def _path(value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{value!r} is no path: expected a folder, a file or a Hub id as a string.")
    return os.fspath(value)


def _as_fields(value: Any, origin: str) -> dict[str, Any]:
    """Returns the fields of a dictionary, a dataclass or an object with attributes."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, type):
        raise TypeError(f"{origin} is the class {value.__name__}; expected an instance of it: {value.__name__}().")
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return value._asdict()
    if callable(getattr(value, "model_dump", None)):  # pydantic's models, whose attributes include their machinery
        return value.model_dump()
    fields = {}
    if not isinstance(value, str | bytes | int | float | complex | list | tuple | set | frozenset) and not callable(
        value
    ):
        names = [name for name in dir(value) if not name.startswith("_")]
        fields = {name: getattr(value, name) for name in names if not callable(getattr(value, name))}
    if not fields:
        raise TypeError(
            f"{origin} is {_shortened(value)} of type {type(value).__name__}; expected a dictionary, a dataclass "
            "instance or an object with attributes."
        )
    return fields


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _own_defaults(value: Any) -> dict[str, Any]:
    """What the class of an object says by itself, without the user having chosen it."""
    if isinstance(value, Mapping):
        return {}
    if dataclasses.is_dataclass(value):
        return {
            field.name: field.default for field in dataclasses.fields(value) if field.default is not dataclasses.MISSING
        }
    if isinstance(value, tuple):
        return dict(getattr(value, "_field_defaults", {}))
    fields = getattr(type(value), "model_fields", None)  # pydantic's
    if isinstance(fields, Mapping):
        return {name: getattr(field, "default", None) for name, field in fields.items()}
    cls = type(value)
    return {name: getattr(cls, name) for name in dir(cls) if not name.startswith("_")}


def _read_layer(given: Mapping[str, Any], origin: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Sorts one layer of what was given into sections, and into the objects that describe one part each."""
    known = {**FIELD_NAMES, **_PARTS, **{name: ("option", canonical) for name, canonical in _OPTION_NAMES.items()}}
    for section, names in (("option", _OPTIONS), ("hub", _HUB_OPTIONS), ("loading", _MODEL_OPTIONS)):
        known |= {name: (section, name) for name in names}
    sections = translate_fields(given, origin, names=known)
    if sections.pop("video", None):
        raise ValueError(f"video_encoder is given in {origin}, but videos are not supported. Leave it out.")
    parts = sections.pop("part", {})
    if "projector" in sections:
        sections["projector"] = canonical_projector_fields(sections["projector"])
    return sections, parts


def _read_parts(parts: Mapping[str, Any], flat_type: str | None, flat_encoder: str | None) -> dict[str, dict[str, Any]]:
    """Sorts the fields of the objects that describe one part each; the flat types are given beside them."""
    sections: dict[str, dict[str, Any]] = {}
    if "custom_vision_config" in parts:
        sections = _read_vision(parts["custom_vision_config"], flat_encoder)
    if "moe_config" in parts:
        sections["moe"] = _read_moe(parts["moe_config"])
    if "projector_config" in parts:
        sections["projector"], claims = _read_projector(parts["projector_config"], flat_type)
        sections["check"] = sections.get("check", {}) | claims
    return sections


def _read_vision(value: Any, flat_encoder: str | None) -> dict[str, dict[str, Any]]:
    fields = _as_fields(value, "custom_vision_config")
    known = {name: field for name, field in fields.items() if name in VISION_FIELD_NAMES}
    sections = translate_fields(known, "custom_vision_config", names=VISION_FIELD_NAMES)
    own = {name: field for name, field in fields.items() if name not in known and field is not None}
    if own:
        encoder_type = flat_encoder or sections.get("model", {}).get("encoder_type", "")
        if not is_user_encoder(canonical_encoder_type(encoder_type)):
            name = next(iter(own))
            raise ValueError(f"Unknown field {name!r} in custom_vision_config{known_names(name, VISION_FIELD_NAMES)}")
        sections["encoder"] = own
    return sections


def is_user_encoder(encoder_type: str | None) -> TypeGuard[str]:
    """Whether a registered encoder is one that a user has written."""
    return encoder_type is not None and encoder_type in ENCODERS and ENCODERS.is_by_user(encoder_type)


def _read_projector(value: Any, flat_type: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads `projector_config`, and what it says of the tower.

    What a user's class says by default gives way to what was set and to what a file tells, and is left out where the
    projector has no such field.
    """
    given = _as_fields(value, "projector_config")
    claims = {name: field for name, field in given.items() if FIELD_NAMES.get(name, ("", ""))[0] == "check"}
    given = {name: field for name, field in given.items() if field is not None and name not in claims}
    defaults = _own_defaults(value)
    chosen = {name: field for name, field in given.items() if name not in defaults or defaults[name] != field}
    kind = canonical_projector({"type": given_type(given) or flat_type})["type"]
    known = {"type", "path", *PROJECTORS.fields(kind)}
    fields: dict[str, Any] = {}
    for name in [name for name in given if name not in chosen and "path" not in given]:
        field = canonical_projector_fields({name: given[name]}, kind)
        if set(field) <= known:
            fields |= field
        else:
            logger.info("The projector %r has no field %r; the default of the class is left out.", kind, name)
    return {**fields, **canonical_projector_fields(chosen, kind)}, claims


def _read_moe(value: Any) -> dict[str, Any]:
    fields = _as_fields(value, "moe_config")
    if getattr(value, "model_type", None) == "moellava_moe":  # a config, with what every config has beside its fields
        fields = {name: fields[name] for name in MOE_FIELD_NAMES if name in fields}
    router_path = _path_or_none(fields.pop("router_path", None))
    return canonical_moe(fields) | ({} if router_path is None else {"router_path": router_path})


__all__ = ["LoadRequest", "is_user_encoder", "read_request"]
