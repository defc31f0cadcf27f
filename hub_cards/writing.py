# SPDX-License-Identifier: Apache-2.0
"""Writes a card into a checkpoint's folder, and leaves alone what its user has written there.

A card of ours carries `MARKER` and is written anew. Any other `README.md` is the user's own: keys that its metadata
lacks are added, and every other byte stays.
"""

import os
import uuid
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, constants
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from .cards import is_ours, is_tag_of_facts, render_card


# What transformers writes where a repository has no card, for `ModelCard.from_template`.
_BLANK_DESCRIPTION = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)
# Keys that say one thing together: where the user gives the first, the others are not added.
_TOGETHER = {"license_name": "license", "license_link": "license"}


def write_card(
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    evaluation: list[dict[str, Any]] | None = None,
    on_hub: str | None = None,
) -> Path:
    r"""
    Writes the model card of a saved checkpoint to its `README.md`.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint.
        repo_id (`str`, *optional*): The Hub id that the card's code loads. Defaults to the folder's name.
        evaluation (`list[dict]`, *optional*): As for `render_card`.
        on_hub (`str`, *optional*): The text of the `README.md` that the repository has which the folder is about to be
            pushed to: a user's own there is completed where the folder has none.

    Returns:
        `Path`: The path of `README.md`.

    Raises:
        FileNotFoundError: There is no such folder, or it has no weights.
        TypeError, ValueError: As for `render_card`; or the user's `README.md` has metadata that cannot be completed.

    Example:

    ```python
    >>> from moellava.hub_cards import write_card

    >>> write_card("my-model", repo_id="me/my-model")
    ```"""
    path = Path(folder) / constants.REPOCARD_NAME
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} to write a card into. Give the folder of a checkpoint.")
    card = render_card(folder, repo_id=repo_id, evaluation=evaluation)
    earlier = read_card(path)
    if earlier is None or _is_nobodys(earlier):
        earlier = on_hub
    save_card(path, complete_card(earlier, card))
    return path


def complete_card(earlier: str | None, card: ModelCard) -> str:
    """Returns the text of a card that takes the place of an earlier one: `card`, or the user's own, completed.

    Args:
        earlier (`str`, *optional*): The `README.md` that is there.
        card (`ModelCard`): What `render_card` returns.

    Raises:
        ValueError: The metadata of the user's own is no block of YAML that lines can be added to.
    """
    if earlier is not None and not _is_nobodys(earlier):
        return _with_missing_keys(earlier, card.data)
    if earlier is not None:
        # What `push_to_hub(tags=...)` has put there, now or at an earlier push.
        block = REGEX_YAML_BLOCK.search(earlier)
        tags = _own_keys(block[2]).get("tags") if block else None
        given = [tag for tag in tags or () if not is_tag_of_facts(tag)]
        card.data.tags = list(dict.fromkeys([*card.data.tags, *given]))
    return str(card)


def read_card(path: Path) -> str | None:
    """Returns the text of a card with its own line ends, or `None` where there is none.

    Raises:
        ValueError: It is no UTF-8.
    """
    if not path.is_file():
        return None
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}). Save it as UTF-8.") from error


def save_card(path: Path, content: str) -> None:
    """Puts a card in its place in one step; a file that is linked to from elsewhere stays as it is there."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        aside.write_bytes(content.encode("utf-8"))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _is_nobodys(content: str) -> bool:
    """Whether a card is one of ours, or the one that transformers writes where there is none: no work of a user."""
    if is_ours(content):
        return True
    blank = ModelCard.from_template(ModelCardData(), model_description=_BLANK_DESCRIPTION)
    block = REGEX_YAML_BLOCK.search(content)
    return block is not None and content[block.end() :].strip() == blank.text.strip()


def _with_missing_keys(content: str, data: ModelCardData) -> str:
    line_break = "\r\n" if "\r\n" in content else "\n"
    mark = content[: len(content) - len(content.removeprefix("\ufeff"))]  # of UTF-8, as some editors write it
    content = content.removeprefix(mark)
    block = REGEX_YAML_BLOCK.search(content)
    own = _own_keys(block[2]) if block else {}
    missing = {
        key: value for key, value in data.to_dict().items() if key not in own and _TOGETHER.get(key, key) not in own
    }
    if not missing:
        return mark + content
    added = yaml_dump(missing, sort_keys=False, line_break=line_break).rstrip()
    if block is None:
        return f"{mark}---{line_break}{added}{line_break}---{line_break}{content}"
    completed = block[2] + line_break + added
    if not _is_yaml_of(completed, own | missing):
        raise ValueError(
            "The metadata at the head of README.md is no list of 'key: value' lines, so that none can be added. Write "
            "it so, or delete the block between the two '---'."
        )
    return mark + block[1] + completed + content[block.end(2) :]


def _is_yaml_of(block: str, content: dict[str, Any]) -> bool:
    try:
        return yaml.safe_load(block) == content
    except yaml.YAMLError:
        return False


def _own_keys(block: str) -> dict[str, Any]:
    try:
        own = yaml.safe_load(block)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The metadata at the head of README.md is no valid YAML ({reason}). Correct it, or delete the block "
            "between the two '---'."
        ) from error
    if not isinstance(own, dict | None):
        raise ValueError(
            f"The metadata at the head of README.md is a {type(own).__name__}; expected lines of 'key: value'."
        )
    return own or {}


__all__ = ["complete_card", "read_card", "save_card", "write_card"]
