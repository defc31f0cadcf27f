# SPDX-License-Identifier: Apache-2.0
"""Where the parts of a model come from, and under which licence, as their own model cards tell.

The answers are kept in the config's `parts`, for the model card, and never read to load anything. A licence is taken
from the metadata of a part's `README.md`; nothing is concluded from names.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import constants
from huggingface_hub.repocard import RepoCard

from ..authoring.older_names import last_part
from .sources import Source


logger = logging.getLogger(__name__)

LICENSE_KEYS = ("license", "license_name", "license_link")
NEW = "new"  # the origin of a projector that no file gives
UPCYCLED = "upcycled"  # the origin of experts that are copies of a dense model's MLPs


def license_of(source: Source) -> dict[str, str]:
    """Returns what a part's model card says of its licence: `license`, `license_name`, `license_link`, or nothing.

    No more than `README.md` is read or fetched; a part without one, or with one that cannot be read, tells nothing.
    """
    try:
        path = source.find(constants.REPOCARD_NAME)
        content = "" if path is None else Path(path).read_text(encoding="utf-8-sig")
        metadata = RepoCard(content).data.to_dict() if content.lstrip().startswith("---") else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.info("%s: its model card cannot be read, so that its licence is unknown (%s).", source, error)
        return {}
    known = {key: metadata[key] for key in LICENSE_KEYS if metadata.get(key)}
    if isinstance(known.get("license"), list):  # some cards list several
        known["license"] = "-and-".join(map(str, known["license"]))
    return {key: str(value) for key, value in known.items()} if "license" in known else {}


def folder_name(path: str) -> str:
    """Returns the last part of a folder's path, which says no more of where it lies."""
    return os.path.basename(os.path.abspath(os.path.expanduser(path)))


def without_places(value: Any, places: Iterable[str | os.PathLike | None]) -> Any:
    """Returns plain values without the folders that paths in their texts lie in, for files that others may read.

    Args:
        value: Texts, numbers, lists and dictionaries.
        places (`Iterable[str]`): Folders; those that are no absolute paths say nothing of a machine and stay.
    """
    folders = {os.path.expanduser(place).rstrip(os.sep) for place in places if place is not None}
    folders = sorted((folder for folder in folders if os.path.isabs(folder)), key=len, reverse=True)
    return _replaced(value, lambda text: _shortened(text, folders))


def path_labels(value: Any) -> Any:
    """Returns plain values with the absolute paths among them as their last part and a digest: still equal or not."""
    return _replaced(value, _labelled)


def _replaced(value: Any, replace: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _replaced(entry, replace) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(entry, replace) for entry in value]
    return replace(value) if isinstance(value, str) else value


def _shortened(text: str, folders: list[str]) -> str:
    for folder in folders:
        text = text.replace(f"{folder}{os.sep}", "")
    return text


def _labelled(text: str) -> str:
    path = os.path.expanduser(text)
    if not os.path.isabs(path):
        return text
    return f"{last_part(path)}@{hashlib.sha256(path.encode(errors='surrogateescape')).hexdigest()[:12]}"


def with_provenance(
    parts: Mapping[str, Any] | None, name: str, origin: str | None, source: Source | None = None
) -> dict[str, Any]:
    """Returns a config's `parts` with the origin of one more part, in the place of an earlier one of that name.

    Args:
        parts (`dict`, *optional*): What is known already.
        name (`str`): `"language_model"`, `"vision_tower"`, `"multi_modal_projector"`, `"experts"` or
            `"converted_from"`.
        origin (`str`, *optional*): The Hub id or the path, of which a config keeps the last part; or `NEW` or
            `UPCYCLED`.
        source (`Source`, *optional*): Where to look for the licence.
    """
    parts = dict(parts or {})
    licenses = {part: terms for part, terms in parts.pop("licenses", {}).items() if part != name}
    known = {} if source is None else license_of(source)
    if known:
        licenses[name] = known
    return parts | {name: origin} | ({"licenses": licenses} if licenses else {})


def with_training(
    parts: Mapping[str, Any] | None,
    *,
    steps: int,
    epochs: float | None = None,
    data: Iterable[str] = (),
    stage: str | None = None,
) -> dict[str, Any]:
    """Returns a config's `parts` with one more stage of training, after those that it lists in `training` already.

    Args:
        parts (`dict`, *optional*): What is known already.
        steps (`int`): The optimiser's steps.
        epochs (`float`, *optional*): How often the data were gone through.
        data (`Iterable[str]`, *optional*): Their Hub ids or names.
        stage (`str`, *optional*): The stage's name.
    """
    training = {"stage": stage, "steps": steps, "epochs": epochs, "data": list(data)}
    training = {name: value for name, value in training.items() if value}
    return dict(parts or {}) | {"training": [*training_records(parts), training]}


def training_records(parts: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Returns what a config's `parts` says of the stages of training; earlier versions kept the last one alone."""
    known = (parts or {}).get("training")
    known = [known] if isinstance(known, Mapping) else known
    return [dict(record) for record in known if isinstance(record, Mapping)] if isinstance(known, list) else []


__all__ = [
    "LICENSE_KEYS",
    "NEW",
    "UPCYCLED",
    "folder_name",
    "license_of",
    "path_labels",
    "training_records",
    "with_provenance",
    "with_training",
    "without_places",
]
