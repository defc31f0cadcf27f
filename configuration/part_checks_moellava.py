# SPDX-License-Identifier: Apache-2.0
"""What the config of a part may not say, whoever wrote it: the names of other repositories, and absurd sizes.

It is found before a class of transformers sees the config. Some of these fetch what a field names; all of them build as
many layers as they are told.
"""

import re
from typing import Any


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
    import torch  # late: a config alone needs none

    if not isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype):
        raise ValueError(f"{place} is {name!r}, which is no dtype of PyTorch. Expected such as 'bfloat16'.")


__all__ = ["check_dtype", "check_part"]
