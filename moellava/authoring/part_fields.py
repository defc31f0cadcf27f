# SPDX-License-Identifier: Apache-2.0
"""The fields of parts, and their values as `config.json` holds them."""

import inspect
import json
from collections.abc import Iterable
from typing import Any

from ..configuration.config_base_moellava import FOREIGN_KEYS, known_names
from ..parts.part_table_moellava import PartTable


def check_fields(table: PartTable, name: str, given: Iterable[str]) -> None:
    """Raises a ValueError that names the first field which a part does not have, and the nearest that it has."""
    known = table.fields(name)
    for field in given:
        if field not in known:
            raise ValueError(f"The {table.slot} {name!r} has no field {field!r}{known_names(field, known)}")


def checked_part_fields(table: PartTable, name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns all fields of a part as a file holds them.

    Raises:
        ValueError: A field that the part does not have, a field without default that is not given, or a value that
            `config.json` cannot hold.
    """
    check_fields(table, name, fields)
    missing = [field for field, value in fields.items() if value is inspect.Parameter.empty]
    if missing:
        raise ValueError(f"The {table.slot} {name!r} needs a value for: {', '.join(missing)}.")
    owner = f"of the {table.slot} {name!r}"
    return {field: plain_value(value, f"The field {field!r} {owner}") for field, value in fields.items()}


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


__all__ = ["check_fields", "checked_part_fields", "plain_value"]
