# SPDX-License-Identifier: Apache-2.0
"""What all configs of this package have in common."""

import copy
import difflib
from collections.abc import Iterable
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig


# Fields without a declaration of ours that transformers and its trainers pass to a config or set on one.
LIBRARY_FIELDS = frozenset(
    (
        "_attn_implementation_internal", "_commit_hash", "_experts_implementation_internal", "_name_or_path",
        "attn_implementation", "auto_map", "bos_token_id", "distributed_config", "eos_token_id",
        "experts_implementation", "fusion_config", "model_type", "name_or_path", "num_labels", "output_attentions",
        "pad_token_id", "quantization_config", "tie_last_hidden_states", "torch_dtype", "transformers_weights",
        "use_cache",
    )
)  # fmt: skip
# Keys that a part's config may carry and that are data of somebody else's process: never acted on, never passed on.
FOREIGN_KEYS = (
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_experts_implementation",
    "_experts_implementation_internal", "_name_or_path", "attn_implementation", "auto_map", "experts_implementation",
    "name_or_path", "transformers_version", "trust_remote_code",
)  # fmt: skip
# What serving engines, and TRL, ask a language model's config about its experts.
EXPERT_COUNTS = ("num_experts", "num_experts_per_tok")
ROUTER_LOSS = ("output_router_logits", "router_aux_loss_coef")
# The values of fields that take one of a few words.
CHOICES = {
    "image_aspect_ratio": ("pad", "square"),
    "vision_feature_select_strategy": ("default", "patch", "cls", "full"),
}


class WithValueErrors(type):
    """Makes a ValueError of what `@strict` raises on a wrong field, which is none."""

    def __call__(cls, *args, **kwargs):
        try:
            return super().__call__(*args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"{cls.__name__}: {error.__cause__ or error}") from error


def split_library_fields(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits what a sub-config is made with into what every config has (labels, dtype and so on), and the rest.

    The foreign keys are left out.
    """
    kept = {key: value for key, value in kwargs.items() if key not in FOREIGN_KEYS}
    library = {key: kept.pop(key) for key in list(kept) if key in LIBRARY_FIELDS}
    return library, kept


def known_names(name: object, known: Iterable[str]) -> str:
    """Returns the end of an error message about an unknown name: the nearest known one, and the list of all."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.6)
    suggestion = f"; did you mean {close[0]!r}?" if close else "."
    return f"{suggestion} Known: {', '.join(known) or 'none'}."


def check_choice(name: str, value: Any) -> Any:
    """Returns a field's value if it is one of the words that it takes; raises a ValueError otherwise."""
    if value not in CHOICES[name]:
        raise ValueError(f"Unknown {name} {value!r}{known_names(value, CHOICES[name])}")
    return value


def own_config(key: str, given: dict | PreTrainedConfig | None, config_class: type[Any]) -> PreTrainedConfig:
    """Returns the config of a part that this package describes by a class of its own."""
    if isinstance(given, PreTrainedConfig):
        # By its name: loaded from a checkpoint, the class may be there twice.
        if given.model_type != config_class.model_type:
            raise ValueError(
                f"{key} is a {type(given).__name__}; expected a {config_class.__name__}, or a dictionary of its fields."
            )
        return copy.deepcopy(given)
    return config_class(**{name: value for name, value in (given or {}).items() if name != "model_type"})
