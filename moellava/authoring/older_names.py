# SPDX-License-Identifier: Apache-2.0
"""The names that users may give to a field, in one table.

Names of the older builder and of LLaVA's checkpoints are translated here and nowhere else. `translate_fields` sorts
what a user wrote into sections:

- `source`: what to load: the language model, the vision tower, a projector file.
- `model`: fields of `MoellavaConfig`.
- `projector`: fields of the projector, and its `type`.
- `check`: facts that the parts themselves tell; a different value is reported and not used.
"""

import difflib
import logging
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from ..configuration.config_base_moellava import FOREIGN_KEYS, LIBRARY_FIELDS, known_names


if TYPE_CHECKING:
    from ..configuration import MoellavaConfig

logger = logging.getLogger(__name__)

# name -> (section, canonical name)
FIELD_NAMES: dict[str, tuple[str, str]] = {
    # what to load
    "model_path": ("source", "model_path"),
    "model_name_or_path": ("source", "model_path"),
    "model_base": ("source", "model_base"),
    "vision_tower": ("source", "vision_tower"),
    "mm_vision_tower": ("source", "vision_tower"),
    "mm_image_tower": ("source", "vision_tower"),
    # fields of the model
    "encoder_type": ("model", "encoder_type"),
    "image_size": ("model", "image_size"),
    "mm_vision_image_size": ("model", "image_size"),
    "vision_feature_layer": ("model", "vision_feature_layer"),
    "mm_vision_select_layer": ("model", "vision_feature_layer"),
    "vision_feature_select_strategy": ("model", "vision_feature_select_strategy"),
    "mm_vision_select_feature": ("model", "vision_feature_select_strategy"),
    "image_aspect_ratio": ("model", "image_aspect_ratio"),
    # the projector
    "projector_type": ("projector", "type"),
    "mm_projector_type": ("projector", "type"),
    "image_projector_type": ("projector", "type"),
    "mm_projector_hidden_size": ("projector", "hidden_size"),
    "hidden_size": ("projector", "hidden_size"),
    "num_hidden_layers": ("projector", "num_hidden_layers"),
    "mm_projector_num_layers": ("projector", "num_hidden_layers"),
    "num_query_tokens": ("projector", "num_query_tokens"),
    "mm_qformer_num_query_tokens": ("projector", "num_query_tokens"),
    "mm_qformer_num_hidden_layers": ("projector", "num_hidden_layers"),
    "qformer_hidden_size": ("projector", "qformer_hidden_size"),
    "num_latents": ("projector", "num_latents"),
    "mm_perceiver_num_latents": ("projector", "num_latents"),
    "mm_perceiver_num_layers": ("projector", "num_hidden_layers"),
    "latent_dim": ("projector", "latent_dim"),
    # what the tower says itself
    "mm_hidden_size": ("check", "mm_hidden_size"),
}

# Inside an object or dictionary that describes one part, short names are unambiguous.
PROJECTOR_FIELD_NAMES = {name: place[1] for name, place in FIELD_NAMES.items() if place[0] == "projector"} | {
    "num_layers": "num_hidden_layers"
}
VISION_FIELD_NAMES: dict[str, tuple[str, str]] = {
    **{name: place for name, place in FIELD_NAMES.items() if place[0] in ("model", "check")},
    "vision_tower": ("source", "vision_tower"),
    "mm_vision_tower": ("source", "vision_tower"),
    "mm_image_tower": ("source", "vision_tower"),
    "model_name": ("source", "vision_tower"),
    "model_name_or_path": ("source", "vision_tower"),
    "type": ("model", "encoder_type"),
    "select_layer": ("model", "vision_feature_layer"),
    "select_feature": ("model", "vision_feature_select_strategy"),
    "use_encoder_framework": ("check", "use_encoder_framework"),  # chose between two loaders of the older builder
}

# `hidden_size` means the width of the projector's own layers, which Q-Former and Perceiver call by other names.
PROJECTOR_WIDTH_FIELDS = {"qformer": "qformer_hidden_size", "perceiver": "latent_dim"}

# The sparse layers: the fields of `MoellavaMoeConfig`, and what MoE-LLaVA calls them.
MOE_FIELD_NAMES: dict[str, str] = {
    **{
        name: name
        for name in (
            "capacity_factor",
            "eval_capacity_factor",
            "eval_capacity_per_row",
            "freeze_router",
            "layers",
            "min_capacity",
            "norm_topk_prob",
            "num_experts",
            "num_experts_per_tok",
            "output_router_logits",
            "router_aux_loss_coef",
            "router_bias",
            "router_jitter_noise",
            "sample_second_expert",
            "use_meta_expert",
            "use_residual",
        )
    },
    "moe_layers_idx": "layers",
    "moe_mode": "layers",
    "top_k": "num_experts_per_tok",
    "top_k_experts": "num_experts_per_tok",
}
# Fields of the older recipes that say how to train or to distribute, not what the model is.
_MOE_FIELDS_WITHOUT_EFFECT = ("ep_size", "moe_enable", "train_modules")

ENCODER_ALIASES = {"sigclip": "siglip", "medclip": "biomedclip"}
STRATEGY_ALIASES = {"cls_patch": "full"}
# The older builders' types, which say some of the fields too: each with the type's name here and the fields that its
# numbers are. `cheap_` in front makes the narrow form of the two that have one; of the others it changes nothing.
_OLDER_TYPES = (
    (re.compile(r"mlp(\d+)x_gelu"), "mlp", ("num_hidden_layers",)),
    (re.compile(r"pool_mlp(\d+)x_gelu"), "pool_mlp", ("num_hidden_layers",)),
    (re.compile(r"qformer(\d+)_(\d+)"), "older_qformer", ("num_hidden_layers", "num_query_tokens")),
    (re.compile(r"simple_in(\d+)_out(\d+)"), "simple", ("num_blocks_in", "num_blocks_out")),
    (re.compile(r"linear"), "linear", ()),
    (re.compile(r"identity"), "identity", ()),
)
_CHEAP = "cheap_"
_TYPES_WITH_NARROW_FORM = ("older_qformer", "simple")


def _projectors() -> Any:
    from ..parts.parts_moellava import PROJECTORS  # late: it is built on PyTorch, and this file is read with AutoConfig

    return PROJECTORS


def canonical_encoder_type(encoder_type: str) -> str:
    """Returns the registry's name of an encoder, for any accepted spelling."""
    return ENCODER_ALIASES.get(encoder_type, encoder_type) if isinstance(encoder_type, str) else encoder_type


def canonical_strategy(strategy: str) -> str:
    """Returns the name that `vision_feature_select_strategy` takes, for any accepted spelling."""
    return STRATEGY_ALIASES.get(strategy, strategy) if isinstance(strategy, str) else strategy


def canonical_projector(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Translates a projector's fields to those of its class.

    `{"type": "mlp2x_gelu"}` becomes `{"type": "mlp", "num_hidden_layers": 2}`, `{"type": "cheap_qformer2_64"}` becomes
    `{"type": "older_qformer", "num_hidden_layers": 2, "num_query_tokens": 64, "narrow": True}`, and `hidden_size`
    becomes the width field of the type. A field that the class itself calls so is left alone, and so is a type that is
    registered by this very name.

    Raises:
        ValueError: The type says something else than a field does, or two names of one field differ.
    """
    fields = _under_own_names(fields)
    kind = fields.get("type", "mlp")
    if isinstance(kind, str) and kind not in _projectors():
        written, (kind, said) = kind, _older_type(kind)
        for name, value in said.items():
            if fields.setdefault(name, value) != value:
                raise ValueError(
                    f"The projector type {written!r} means {name}={value}, but {name} is {fields[name]!r}. Give one of "
                    "the two."
                )
    width = PROJECTOR_WIDTH_FIELDS.get(kind) if isinstance(kind, str) else None
    if width is not None and "hidden_size" in fields and "hidden_size" not in _projectors().fields(kind):
        value = fields.pop("hidden_size")
        if fields.setdefault(width, value) != value:
            raise ValueError(f"hidden_size is {value} and {width} is {fields[width]}; they are one field. Give one.")
    return {**fields, "type": kind}


def _older_type(kind: str) -> tuple[str, dict[str, Any]]:
    """Returns the type that an older builder's type is here, and the fields that it says; `kind` where it is none."""
    for pattern, canonical, names in _OLDER_TYPES:
        match = pattern.fullmatch(kind.removeprefix(_CHEAP))
        if match is not None:
            said: dict[str, Any] = {name: int(number) for name, number in zip(names, match.groups(), strict=True)}
            if canonical in _TYPES_WITH_NARROW_FORM:
                # Said in both cases, so that the wide form laid over a description of the narrow one is wide.
                said["narrow"] = kind.startswith(_CHEAP)
            return canonical, said
    return kind, {}


def canonical_projector_fields(fields: Mapping[str, Any], kind: str | None = None) -> dict[str, Any]:
    """`canonical_projector` for fields that may leave the type open; `kind` is the type where they do."""
    if given_type(fields) is not None:
        return canonical_projector(fields)
    canonical = canonical_projector({**fields, "type": kind})
    return {name: value for name, value in canonical.items() if name != "type"}


def stacked_projector(lower: Mapping[str, Any] | None, upper: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Lays one description of a projector over another; fields of another type than the upper one's are dropped."""
    if lower is None or upper is None:
        only = upper if lower is None else lower
        return None if only is None else dict(only)
    lower, upper = canonical_projector_fields(lower), canonical_projector_fields(upper)
    kind = upper.get("type", lower.get("type"))
    if lower.get("type", kind) != kind:
        lower = {}
    # Under the names of the type that it turns out to be, so that `hidden_size` meets `qformer_hidden_size`.
    stacked = {**canonical_projector_fields(lower, kind), **canonical_projector_fields(upper, kind)}
    return stacked if kind is None else {**stacked, "type": kind}


def given_type(fields: Mapping[str, Any]) -> Any:
    """Returns what the fields of a projector say of its type, or `None`."""
    names = ["type", *(name for name, canonical in PROJECTOR_FIELD_NAMES.items() if canonical == "type")]
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _under_own_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the fields of a projector that have several names, except where its class has a field of that name."""
    kind = given_type(fields)
    own = _projectors().fields(kind) if kind in _projectors() else ()
    canonical: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None:
            continue
        renamed = name if name in own else PROJECTOR_FIELD_NAMES.get(name, name)
        if canonical.setdefault(renamed, value) != value:
            raise ValueError(
                f"The projector's {renamed!r} is {canonical[renamed]!r} and, as {name!r}, {value!r}, but they are two "
                "names of one field. Give one of them."
            )
    return canonical


def canonical_moe(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Translates the fields of the sparse layers to those of `MoellavaMoeConfig`.

    `moe_layers_idx` wins over `moe_mode`, which the older code leaves as it was; a list of equal numbers of experts,
    one per layer, is that number.

    Raises:
        ValueError: An unknown field, or layers with different numbers of experts.
    """
    fields = {key: value for key, value in fields.items() if value is not None}
    if not fields.get("moe_enable", True):
        raise ValueError(
            f"moe_enable is {fields['moe_enable']}, but moe_config describes sparse layers. Leave moe_config out for a "
            "dense model."
        )
    if "moe_layers_idx" in fields:
        fields.pop("moe_mode", None)
    canonical: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _MOE_FIELDS_WITHOUT_EFFECT:
            continue
        if name not in MOE_FIELD_NAMES:
            raise ValueError(f"Unknown field {name!r} in moe_config{known_names(name, MOE_FIELD_NAMES)}")
        if MOE_FIELD_NAMES[name] in canonical and canonical[MOE_FIELD_NAMES[name]] != value:
            raise ValueError(f"moe_config gives {MOE_FIELD_NAMES[name]!r} twice, as {name!r} too. Give one of them.")
        canonical[MOE_FIELD_NAMES[name]] = value
    experts = canonical.get("num_experts")
    if isinstance(experts, list | tuple):
        if len(set(experts)) != 1:
            raise ValueError(f"num_experts is {list(experts)}; every sparse layer has the same number of experts.")
        canonical["num_experts"] = experts[0]
    return canonical


def translate_fields(
    given: Mapping[str, Any],
    origin: str,
    names: Mapping[str, tuple[str, str]] = FIELD_NAMES,
    passed_on: Mapping[str, tuple[str, str]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Sorts fields by section under their canonical names. A field whose value is `None` counts as not given.

    Args:
        given (`Mapping[str, Any]`): The fields as the user wrote them.
        origin (`str`): What they were written in, for error messages.
        names (`Mapping`, *optional*): The table of known names.
        passed_on (`Mapping`, *optional*): Further known names.

    Returns:
        `dict[str, dict[str, Any]]`: Section to canonical name to value.

    Raises:
        ValueError: An unknown name (the nearest known one is named), or two names of one field with different values.
    """
    table = {**names, **(passed_on or {})}
    sections: dict[str, dict[str, Any]] = {}
    written: dict[tuple[str, str], str] = {}
    for name, value in given.items():
        if name not in table:
            raise ValueError(f"Unknown field {name!r} in {origin}{known_names(name, table)}")
        if value is None:
            continue
        section, canonical = table[name]
        values = sections.setdefault(section, {})
        if canonical in values and values[canonical] != value:
            raise ValueError(
                f"{written[section, canonical]!r} is {values[canonical]!r} and {name!r} is {value!r} in {origin}, but "
                "they are two names of one field. Give one of them."
            )
        values[canonical] = value
        written[section, canonical] = name
    return sections


def take_other_names(config: PreTrainedConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Moves the fields that a config is given by another name to where they belong; returns the library's own.

    Raises:
        ValueError: An unknown name, or two names of one field with different values.
    """
    library = {name: value for name, value in given.items() if name in LIBRARY_FIELDS or name in FOREIGN_KEYS}
    given = {name: value for name, value in given.items() if name not in library}
    for name in given:
        if name not in FIELD_NAMES:
            fields = {*config.default_field_names(), *FIELD_NAMES}
            raise ValueError(f"Unknown field {name!r} in {type(config).__name__}{known_names(name, fields)}")
    sections = translate_fields(given, type(config).__name__)
    for name, value in sections.get("model", {}).items():
        earlier = getattr(config, name)
        if earlier not in (type(config).__dataclass_fields__[name].default, value):
            other = next(key for key in given if FIELD_NAMES[key] == ("model", name))
            raise ValueError(f"{name!r} is {earlier!r} and {other!r} is {value!r}, but they are one field. Give one.")
        setattr(config, name, value)
    if "source" in sections:
        config.parts = {**(config.parts or {}), **sections["source"]}
    if "projector" in sections:
        lower = config.projector_config
        lower = {"type": lower.type, **lower.fields} if hasattr(lower, "fields") else lower
        config.projector_config = stacked_projector(lower, sections["projector"])
    claimed = sections.get("check", {}).get("mm_hidden_size")
    vision = config.vision_config
    actual = vision.get("hidden_size") if isinstance(vision, dict) else getattr(vision, "hidden_size", None)
    if claimed is not None and actual is not None and claimed != actual:
        logger.warning("mm_hidden_size is given as %s, but the vision tower is %s wide.", claimed, actual)
    return library


def canonical_overrides(
    config_class: type["MoellavaConfig"], fields: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits what a caller gives for a config's file into fields, as they are laid over the file's, and the rest.

    Raises:
        ValueError: A misspelt name; a field that says what to load; two names of one field with different values.
    """
    known = {*config_class.default_field_names(), *FIELD_NAMES}
    rest = {name: value for name, value in given.items() if name not in known}
    overrides = {name: value for name, value in given.items() if name in known}
    if not rest.get("return_unused_kwargs"):  # else a model refuses them; tokenizers pass theirs on to here
        for name in rest:
            if close := difflib.get_close_matches(name, known, n=1, cutoff=0.9):
                raise ValueError(f"Unknown field {name!r} in {config_class.__name__}; did you mean {close[0]!r}?")
    translate_fields({name: value for name, value in overrides.items() if name in FIELD_NAMES}, "the arguments")
    places: dict[str, Any] = {}
    for name, value in overrides.items():
        section, place = FIELD_NAMES.get(name, ("model", name))
        if section == "source":
            raise ValueError(
                f"{name} is {value!r}, but from_pretrained changes fields and loads no other part. Use "
                "load_pretrained_model, which takes parts from elsewhere."
            )
        places[place if section == "model" else name] = value
    if "tie_word_embeddings" in places:  # the text config's
        tied, text = {"tie_word_embeddings": places.pop("tie_word_embeddings")}, places.get("text_config", {})
        places["text_config"] = tied | text if isinstance(text, dict) else text
    vision = places.get("vision_config")
    if vision is not None and "encoder_type" not in places:
        kind = vision.get("model_type") if isinstance(vision, dict) else vision.model_type
        if kind not in (None, (fields.get("vision_config") or {}).get("model_type")):
            places["encoder_type"] = None  # detected anew
    if isinstance(places.get("projector_config"), dict):
        places["projector_config"] = stacked_projector(fields.get("projector_config"), places["projector_config"])
    if isinstance(places.get("moe_config"), dict):
        names = MOE_FIELD_NAMES
        places["moe_config"] = {names.get(key, key): entry for key, entry in places["moe_config"].items()}
    return places, rest


def public_name(origin: Any) -> Any:
    """Returns the last part of a local path, since a config is published; a Hub id and all else as it is."""
    is_path = isinstance(origin, str) and (
        origin.startswith(("/", "~", ".")) or "\\" in origin or origin.count("/") > 1
    )
    return last_part(origin) if is_path else origin


def last_part(path: str | os.PathLike) -> str:
    """Returns the last part of a path of any system, or of a Hub id."""
    return re.split(r"[\\/]+", os.fspath(path).rstrip("\\/"))[-1]


__all__ = [
    "FIELD_NAMES",
    "MOE_FIELD_NAMES",
    "PROJECTOR_FIELD_NAMES",
    "VISION_FIELD_NAMES",
    "canonical_encoder_type",
    "canonical_moe",
    "canonical_projector",
    "canonical_projector_fields",
    "canonical_strategy",
    "given_type",
    "stacked_projector",
    "translate_fields",
]
