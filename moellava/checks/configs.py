# SPDX-License-Identifier: Apache-2.0
"""What the config of a part may not say, whoever wrote it: the names of other repositories, and absurd sizes.

It is found before a class of transformers sees the config. Some of these fetch what a field names; all of them build as
many layers as they are told.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from ..authoring.older_names import FIELD_NAMES, canonical_overrides
from ..configuration.config_base_moellava import FOREIGN_KEYS, LIBRARY_FIELDS
from ..configuration.configuration_moellava import MoellavaConfig


logger = logging.get_logger(__name__)

# What config classes of transformers raise on fields that make no sense.
CONFIG_ERRORS = (
    ArithmeticError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError, ValueError,
)  # fmt: skip

# Of a part: what there has to be at least one of.
_AT_LEAST_ONE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
# What a processor has to agree with.
_FOR_PROCESSOR = ("image_aspect_ratio", "image_seq_length", "image_size")
_MOE_FIELDS_OF_0_1_0 = {
    "capacity_factor", "eval_capacity_factor", "freeze_router", "layers", "min_capacity", "norm_topk_prob",
    "num_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef", "router_bias",
    "router_jitter_noise", "sample_second_expert", "use_meta_expert", "use_residual",
}  # fmt: skip

# By these fields a vision model with a backbone takes it from another place.
_BACKBONE_NAMES = ("architecture", "backbone", "model_name")
_TIMM_NAME = re.compile(r"[\w.-]+")  # without the colon and the slashes of a name that timm fetches or opens
_DEEPEST = 200
# Layers are built one by one, and modules of experts too. Sizes take memory only once weights are given to them, and
# are compared with the files then.
_COUNTS = re.compile(r"(?:num|n|encoder|decoder)_(?:\w+_)?(?:layers?|(experts))|depths?")
_MOST_LAYERS, _MOST_EXPERTS = 10_000, 100_000  # Doge has 16,384 experts
_SIZES = re.compile(r"(?:image|patch|vocab)_size")


def check_part(key: str, fields: dict[str, Any]) -> None:
    """Checks the config of a part, before anything is made of it.

    Args:
        key (`str`): What the part is called in error messages: `"text_config"`, ...
        fields (`dict`): Its config, as it stands in `config.json`.

    Raises:
        ValueError: It names another repository, is nested too deeply, counts more layers or experts than any model has,
            or has a size below 1 or a dtype that is none.
    """
    remaining: list[tuple[str, Any, int]] = [(key, fields, 0)]
    while remaining:  # no recursion, which a nested config could exhaust
        place, current, depth = remaining.pop()
        if depth > _DEEPEST:
            raise ValueError(f"{key} is nested more than {_DEEPEST} levels deep. Expected what save_pretrained writes.")
        entries = current.items() if isinstance(current, dict) else enumerate(current)
        for name, value in entries:
            inner = f"{place}.{name}"
            if isinstance(value, dict | list):
                remaining.append((inner, value, depth + 1))
            if isinstance(current, dict):
                _check_backbone(inner, name, value, current)
                _check_size(inner, str(name), value)
                if name in ("dtype", "torch_dtype") and isinstance(value, str):
                    check_dtype(inner, value)


def _check_backbone(place: str, name: object, value: Any, fields: dict[str, Any]) -> None:
    is_timm = str(fields.get("model_type", "")).startswith("timm_") or bool(fields.get("use_timm_backbone"))
    by_name = name in _BACKBONE_NAMES and isinstance(value, str)
    if name == "backbone" and by_name and not is_timm or by_name and is_timm and _TIMM_NAME.fullmatch(value) is None:
        raise ValueError(
            f"{place} names {value!r}, from where a backbone would be fetched. Expected its config by value, as "
            "backbone_config: nothing is opened because of what a config says."
        )
    if name == "use_pretrained_backbone" and value:
        raise ValueError(
            f"{place} asks for the weights of a backbone from elsewhere. Leave it out: a checkpoint holds all weights."
        )


def _check_size(place: str, name: str, value: Any) -> None:
    numbers = value if isinstance(value, list) else [value]
    numbers = [number for number in numbers if isinstance(number, int) and not isinstance(number, bool)]
    if count := _COUNTS.fullmatch(name):
        low, high = 0, _MOST_EXPERTS if count[1] else _MOST_LAYERS
    elif _SIZES.fullmatch(name):
        low, high = 1, 2**63 - 1  # what a tensor can have
    else:
        return
    wrong = next((number for number in numbers if not low <= number <= high), None)
    if wrong is not None:
        # Of a number with thousands of digits Python gives no text.
        shown = wrong if abs(wrong) < 10**20 else "a number of more than 20 digits"
        expected = f"at least {low}" if wrong < low else f"at most {high}"
        raise ValueError(f"{place} is {shown}; expected {expected}.")


def check_dtype(place: str, name: str) -> None:
    """Raises a ValueError where a text is no dtype's name: transformers looks it up among all that torch has."""
    if not isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype):
        raise ValueError(f"{place} is {name!r}, which is no dtype of PyTorch. Expected such as 'bfloat16'.")


def check_part_config(key: str, config: PreTrainedConfig) -> None:
    """Checks the config of a part for what transformers' classes do not all check; their models fail when they run.

    Raises:
        ValueError: A size below 1, heads that cannot be shared out, or that rotary embeddings cannot turn.
    """
    sizes = {name: getattr(config, name, None) for name in _AT_LEAST_ONE}
    sizes = {name: size for name, size in sizes.items() if isinstance(size, int)}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{key}.{name} is {size}; expected at least 1.")
    heads, groups = sizes.get("num_attention_heads", 0), sizes.get("num_key_value_heads", 1)
    if heads % groups:
        raise ValueError(
            f"{key}.num_attention_heads is {heads} and num_key_value_heads is {groups}; expected a multiple of it."
        )
    _check_rotary_channels(key, config)


def _check_rotary_channels(key: str, config: PreTrainedConfig) -> None:
    """Refuses heads that rotary embeddings cannot turn: they take channels in pairs (Su et al. 2021, arXiv:2104.09864).

    Where they turn a part of the channels, some families round it up.
    """
    fields = config.to_dict()
    rope, heads, head_dim = (fields.get(name) for name in ("rope_parameters", "num_attention_heads", "head_dim"))
    differ = any("head" in name and "dim" in name and name != "head_dim" for name in fields)
    if not rope or not isinstance(heads, int) or differ:
        return
    if head_dim is None:
        head_dim = config.hidden_size // heads
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]  # of layers
    if head_dim % 2 and any(kind.get("partial_rotary_factor", 1) == 1 for kind in kinds):
        raise ValueError(
            f"{key} has heads of {head_dim} channels, which rotary embeddings turn in pairs; expected an even number. "
            "It is head_dim or, without one, hidden_size divided by num_attention_heads."
        )


def config_from_dict(
    from_dict: Callable, config_class: type[MoellavaConfig], fields: dict[str, Any], given: dict[str, Any]
) -> Any:
    """Makes a config of the fields of a file, checked, with those that a caller gives laid over them.

    Args:
        from_dict (`Callable`): Makes the config, by transformers.
        config_class (`type`): The class of the config.
        fields (`dict`): The fields of the file.
        given (`dict`): What the caller gives: fields by whatever names, and the arguments of `from_dict`.

    Raises:
        ValueError: See `check_part`, `canonical_overrides` and `MoellavaConfig`.
    """
    fields = _checked_fields(fields)
    given, arguments = canonical_overrides(config_class, fields, given)
    laid_over = _laid_over(fields, given)
    known = {*config_class.__dataclass_fields__, *LIBRARY_FIELDS, *FIELD_NAMES}
    # What the file says of how to run the model is data; what the caller says of it is in `arguments`. A file may carry
    # what a trainer wrote on the config, or a field of a later version: kept where it can do no harm, and said. A field
    # that a caller misspells is an error.
    strange = {key: value for key, value in laid_over.items() if key not in known and key not in FOREIGN_KEYS}
    laid_over = {key: value for key, value in laid_over.items() if key in known and key not in FOREIGN_KEYS}
    result = from_dict(laid_over, **arguments)
    config = result[0] if isinstance(result, tuple) else result
    _check_overrides(config, fields, given)
    for key, value in strange.items():
        if hasattr(config_class, key):
            logger.warning("The config's field %r is not one of MoellavaConfig's; it is left out.", key)
        else:
            logger.warning("The config's field %r is not one of MoellavaConfig's; it is kept without effect.", key)
            setattr(config, key, value)
    return result


def _laid_over(fields: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Lays fields that a caller gives over those of a file; of a part of the same kind, field by field."""
    fields = dict(fields)
    for name, value in given.items():
        earlier = fields.get(name)
        if name.endswith("_config") and isinstance(value, dict) and isinstance(earlier, dict):
            kind = "type" if name == "projector_config" else "model_type"
            if value.get(kind, earlier.get(kind)) == earlier.get(kind):
                value = {**earlier, **value}
        fields[name] = value
    return fields


def check_config(config: MoellavaConfig) -> None:
    """Checks that the fields of a config make sense, and fit together.

    Raises:
        ValueError: They do not.
    """
    vocab_size = getattr(config.text_config, "vocab_size", None)
    if not isinstance(vocab_size, int):
        raise ValueError(
            f"text_config describes a {config.text_config.model_type!r} model, which has no vocabulary; expected the "
            "config of a language model."
        )
    if not 0 <= config.image_token_id < vocab_size:
        raise ValueError(
            f"image_token_id is {config.image_token_id}, but the language model's vocabulary has {vocab_size} rows: "
            f"expected 0 to {vocab_size - 1}. Add the token to the tokenizer and set text_config.vocab_size."
        )
    if config.image_size is not None and config.image_size < 1:
        raise ValueError(
            f"image_size is {config.image_size}; expected a number of pixels, or None for the tower's own."
        )
    if not 0 < config.image_feature_scale < math.inf:
        raise ValueError(f"image_feature_scale is {config.image_feature_scale}; expected a number above 0.")


def check_ties(config: MoellavaConfig, again: MoellavaConfig) -> None:
    """Raises a ValueError where a config ties the embeddings and its text config does not, or the other way round."""
    if config.tie_word_embeddings != again.tie_word_embeddings:
        raise ValueError(
            f"tie_word_embeddings is {config.tie_word_embeddings}, but text_config.tie_word_embeddings is "
            f"{again.tie_word_embeddings}. They are one field: set both."
        )


@contextmanager
def reading_part(key: str, model_type: Any) -> Iterator[None]:
    """Says what is wrong with a part whose config transformers cannot make, as a ValueError."""
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{key}.model_type is {model_type!r}, which transformers {__version__} does not have. Expected the type of "
            "one of its own models; code that a part brings with it is not run."
        )
    try:
        yield
    except CONFIG_ERRORS as error:
        raise ValueError(
            f"{key} does not describe a {model_type!r} model ({config_fault(error)}). Expected the fields of "
            f"transformers' {CONFIG_MAPPING[model_type].__name__}."
        ) from error


def config_fault(error: Exception) -> str:
    """Returns what an error of a config class says is wrong."""
    reason = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    return f"{type(reason).__name__}: {reason}"


def _checked_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a model's config file, checked, and completed where an earlier version wrote them.

    Raises:
        ValueError: See `check_part`; or a dtype or quantisation config that is none.
    """
    for name in ("projector_config", "moe_config"):
        if isinstance(fields.get(name), dict):
            check_part(name, fields[name])
    if isinstance(fields.get("dtype"), str):
        check_dtype("dtype", fields["dtype"])
    if isinstance(fields.get("quantization_config"), bool | float | int | list | str):
        raise ValueError(
            f"quantization_config is {fields['quantization_config']!r}; expected an object with the method "
            "and its fields. Save or download the model again."
        )
    moe = fields.get("moe_config")
    # A file of 0.1.0 lacks this field alone; others are completed by the defaults.
    if isinstance(moe, dict) and _MOE_FIELDS_OF_0_1_0 <= moe.keys() and "eval_capacity_per_row" not in moe:
        fields = {**fields, "moe_config": {**moe, "eval_capacity_per_row": False}}  # answers stay what they were
        if moe["eval_capacity_factor"] is not None:
            logger.warning(
                "eval_capacity_factor is %s and counts over the batch, so an answer depends on its neighbours. "
                "Set moe_config.eval_capacity_per_row to count each row alone.",
                moe["eval_capacity_factor"],
            )
    return fields


def _check_overrides(config: PreTrainedConfig, fields: dict[str, Any], given: dict[str, Any]) -> None:
    """Checks a config that was made of a file's fields and of some that a caller has laid over them.

    Raises:
        ValueError: `image_seq_length` is another one than the parts make.
    """
    asked = given.get("image_seq_length")
    if asked not in (None, config.image_seq_length):
        raise ValueError(
            f"image_seq_length is {asked}, but the parts make {config.image_seq_length} tokens of a picture. Leave "
            "it out: it is always computed."
        )
    for name in _FOR_PROCESSOR if given else ():
        earlier, value = fields.get(name, type(config).__dataclass_fields__[name].default), getattr(config, name)
        if value != earlier:
            logger.warning(
                "%s is %s, and was %s when the model was saved: so the processor beside it goes on to prepare "
                "pictures. Load both by load_pretrained_model, or give the processor the new value too.",
                name, value, earlier,
            )  # fmt: skip


@contextmanager
def building_part(key: str, config: PreTrainedConfig) -> Iterator[None]:
    """Says what is wrong with a part whose config passes its own checks, and of which no model can be built."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{key} does not describe a {config.model_type!r} model ({type(error).__name__}: {error}). Expected the "
            f"fields of transformers' {type(config).__name__}."
        ) from error


def check_head(text_config: PreTrainedConfig, head: Any) -> None:
    """Raises a ValueError where the output projection of a language model's family is no linear layer."""
    if not isinstance(head, torch.nn.Linear):
        raise ValueError(
            f"A {text_config.model_type} language model has no linear output projection (found "
            f"{type(head).__name__}), so that it cannot be the language model here."
        )


__all__ = [
    "check_head",
    "building_part",
    "CONFIG_ERRORS", "check_config", "check_dtype", "check_part", "check_part_config", "check_ties", "config_fault",
    "config_from_dict", "reading_part",
]  # fmt: skip
