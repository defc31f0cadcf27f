# SPDX-License-Identifier: Apache-2.0
"""What the config of sparse layers may say, and which layers it means."""

import math
from collections.abc import Mapping
from typing import Any

from ..authoring.older_names import canonical_moe
from ..configuration.config_base_moellava import known_names
from ..configuration.moe_config_moellava import MoellavaMoeConfig


def canonical_fields(moe: MoellavaMoeConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that a config of sparse layers is given besides its own, by their own names.

    Raises:
        ValueError: An unknown name, or two names of one field with different values.
    """
    fields, known = canonical_moe(given), type(moe).__annotations__
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"Unknown field {name!r} in moe_config{known_names(name, known)}")
        earlier, default = getattr(moe, name), type(moe).__dataclass_fields__[name].default
        if name != "num_experts" and earlier not in (default, value):
            raise ValueError(
                f"moe_config gives {name} twice, as {earlier!r} and by an older name as {value!r}. Give one."
            )
    return fields


def check_moe(moe: MoellavaMoeConfig) -> None:
    """Raises a ValueError where the fields of sparse layers make no sense, or not together."""
    if not isinstance(moe.num_experts, int) or not 1 <= moe.num_experts_per_tok <= moe.num_experts:
        raise ValueError(
            f"num_experts_per_tok is {moe.num_experts_per_tok} of num_experts {moe.num_experts}; expected from 1 "
            "to the number of experts."
        )
    if moe.sample_second_expert and moe.num_experts_per_tok != 2:
        raise ValueError(
            f"sample_second_expert needs num_experts_per_tok=2, got {moe.num_experts_per_tok}. Leave it out."
        )
    for name in ("capacity_factor", "eval_capacity_factor"):
        value = getattr(moe, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; expected a number above 0, or None to drop no token.")
    for name in ("router_aux_loss_coef", "min_capacity"):
        if not 0 <= getattr(moe, name) < math.inf:
            raise ValueError(f"{name} is {getattr(moe, name)}; expected a number from 0.")
    if not 0 <= moe.router_jitter_noise < 1:
        raise ValueError(f"router_jitter_noise is {moe.router_jitter_noise}; expected from 0 to below 1.")


def resolved_layers(layers: str | list[int], num_hidden_layers: int) -> list[int]:
    """Returns the indices of the sparse layers of a language model with so many layers, ascending.

    Raises:
        ValueError: An unknown word, or an index that the language model does not have.
    """
    modes = {
        "first_half": range(num_hidden_layers // 2),
        "second_half": range(num_hidden_layers // 2, num_hidden_layers),
        "sparse": range(0, num_hidden_layers, 2),
        "dense": range(num_hidden_layers),
    }
    if isinstance(layers, str):
        if layers not in modes:
            raise ValueError(f"Unknown choice of layers {layers!r}{known_names(layers, modes)}")
        if not modes[layers]:
            raise ValueError(f"layers is {layers!r}, which is none of a language model's {num_hidden_layers} layers.")
        return list(modes[layers])
    wrong = [i for i in layers if not -num_hidden_layers <= i < num_hidden_layers]
    if wrong or not layers:
        raise ValueError(f"layers is {layers}, but the language model has the layers 0 to {num_hidden_layers - 1}.")
    return sorted({index % num_hidden_layers for index in layers})


__all__ = ["canonical_fields", "check_moe", "resolved_layers"]
