# SPDX-License-Identifier: Apache-2.0
"""The values of fields as `config.json` holds them."""

import json
from typing import Any

from ..configuration.config_base_moellava import FOREIGN_KEYS


def plain_value(value: Any, owner: str) -> Any:
    """Returns a field's value as it comes back from `config.json`, so that a part is built alike before and after.

    A config of transformers becomes a dictionary, without the keys that name other files or processes.

    Raises:
        ValueError: `config.json` cannot hold the value.
    """
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    try:
        return _without_foreign_keys(json.loads(json.dumps(value)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{owner} is a {type(value).__name__}, which config.json cannot hold ({error}). Expected a number, a "
            "string, a truth value, None, or lists and dictionaries of these."
        ) from error


def _without_foreign_keys(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_foreign_keys(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    foreign = FOREIGN_KEYS if "model_type" in value else ()
    return {key: _without_foreign_keys(entry) for key, entry in value.items() if key not in foreign}


__all__ = ["plain_value"]
