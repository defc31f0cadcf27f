# Copyright 2026 The MoELLaVA authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Rows of training data: LLaVA's JSON, and `messages` with `images`, in one form; what is wrong in a row is named."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..building import IMAGE_TOKEN
from ..configuration.registry_moellava import known_names
from ..dataset_pictures import undecoded
from ..json_files import read_json_rows
from ..processing.images_moellava import check_shape, decode_picture, to_rgb
from ..wording import encodable


# What rows call those who speak.
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip
_SOURCE_FIELDS = ("path", "name", "split", "streaming", "image_folder")


class RowError(ValueError):
    """Says why a row cannot be used: in a word, `kind`, and in a sentence."""

    def __init__(self, kind: str, detail: str):
        super().__init__(encodable(detail))
        self.kind = kind


@dataclass(frozen=True)
class Row:
    """One conversation.

    Attributes:
        name (`str`): What reports call it: its number from 0 and, where it has one, its id.
        messages (`list[dict]`): `role` and `content`, a list of parts: `{"type": "image"}` and
            `{"type": "text", "text": ...}`.
        pictures (`list`): In the order of their places: paths, text of the form `data:image/...`, PIL pictures, or
            `{"bytes": ..., "path": ...}` as `datasets` holds them.
    """

    name: str
    messages: list[dict[str, Any]]
    pictures: list[Any]


def open_data(data: Any, image_folder: str | os.PathLike | None = None) -> "Rows":
    """Opens training data without reading a picture.

    Args:
        data (`str`, `os.PathLike`, `Mapping`, `Iterable`):
            A `.json` file with a list of rows, or a `.jsonl` file with one in each line; a folder that
            `Dataset.save_to_disk` has written; any other name that `datasets.load_dataset` takes; a mapping with `path`
            (one of these) and `name`, `split`, `streaming`, `image_folder`; or the rows themselves, a list or a
            dataset.
        image_folder (`str` or `os.PathLike`, *optional*): Where relative paths of pictures begin; by default the folder
            of the file.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: `datasets` is needed and not installed.
        ValueError: The file is no list of rows, or `data` has an unknown field.
    """
    options: dict[str, Any] = {}
    if isinstance(data, Mapping):
        for field in data:
            if field not in _SOURCE_FIELDS:
                raise ValueError(f"Unknown field {field!r} in data{known_names(field, _SOURCE_FIELDS)}")
        options = {field: value for field, value in data.items() if field != "path"}
        image_folder = options.pop("image_folder", image_folder)
        if "path" not in data:
            raise ValueError("data has no path: give the file, the folder or the dataset that holds the rows.")
        data = data["path"]
    if isinstance(data, str | os.PathLike):
        if not os.fspath(data):
            raise ValueError("data is empty: give the file, the folder or the dataset that holds the rows.")
        path = Path(data).expanduser()
        if path.suffix.lower() in (".json", ".jsonl"):
            return Rows(_read_json(path), path.parent if image_folder is None else image_folder)
        data = _load_dataset(str(data), path, options)
    elif not isinstance(data, Iterable):
        raise TypeError(
            f"data is a {type(data).__name__}; expected the path of a .json file, the name of a dataset, a dataset, or "
            "a list of rows."
        )
    return Rows(data, image_folder)


def _read_json(path: Path) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Give a .json file with a list of rows, or a .jsonl file.")
    return read_json_rows(path)


def _load_dataset(name: str, path: Path, options: dict[str, Any]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"Reading {name} needs the datasets library: pip install 'moellava[train]'. A .json file needs none."
        ) from error
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        split = options.get("split") or "train"
        if split not in loaded:
            raise ValueError(f"Unknown split {split!r} of {name}{known_names(split, loaded)}")
        return loaded[split]
    # By its whole path, since the library takes no ".".
    return datasets.load_dataset(str(path.resolve()) if path.is_dir() else name, **{"split": "train", **options})


class Rows:
    """Rows as they lie in a file or a dataset, made to `Row`s one by one.

    Args:
        source (`Iterable`): The rows; with a length, or streamed.
        image_folder (`str` or `os.PathLike`, *optional*): Where relative paths of pictures begin.
    """

    def __init__(self, source: Iterable[Mapping[str, Any]], image_folder: str | os.PathLike | None = None):
        self.source = undecoded(source)
        self.image_folder = Path(image_folder or ".").expanduser()

    @property
    def is_streamed(self) -> bool:
        """Whether nobody knows how many rows there are."""
        return not hasattr(self.source, "__len__")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Row:
        return self.parse(self.source[index], index)

    def raw(self) -> Iterator[tuple[int, Any]]:
        """Yields every row as it lies, with its number."""
        return enumerate(self.source)

    def parse(self, raw: Any, index: int) -> Row:
        """Makes a row of what lies in the file.

        Raises:
            RowError: It cannot be used.
        """
        if not isinstance(raw, Mapping):
            raise RowError("form", f"is a {type(raw).__name__}; expected an object")
        if turns := _turns(raw, "conversations", "conversatons"):  # the latter in some of LLaVA-Med's files
            messages = [_llava_message(turn, number) for number, turn in enumerate(turns)]
        elif turns := _turns(raw, "messages"):
            messages = [_message(turn, number) for number, turn in enumerate(turns)]
        else:
            raise RowError(
                "form", f"has neither conversations nor messages, but {', '.join(map(str, raw)) or 'nothing'}"
            )
        pictures = raw.get("images") if raw.get("images") is not None else raw.get("image")
        pictures = [] if pictures is None else pictures if isinstance(pictures, list | tuple) else [pictures]
        if raw.get("messages") and pictures and not _places(messages):
            # As TRL has it: pictures that no place is named for stand before the first question.
            first = next((message for message in messages if message["role"] == "user"), None)
            if first is not None:
                first["content"] = [{"type": "image"}] * len(pictures) + first["content"]
        _check_turns(messages)
        _check_text(messages)
        if _places(messages) != len(pictures):
            raise RowError(
                "placeholders", f"has {_places(messages)} {IMAGE_TOKEN} placeholder(s) and {len(pictures)} picture(s)"
            )
        return Row(row_name(raw, index), messages, [self._located(picture) for picture in pictures])

    def _located(self, picture: Any) -> Any:
        if isinstance(picture, Mapping) and not picture.get("bytes"):
            picture = picture.get("path")
        if not isinstance(picture, str):
            return picture
        if picture.startswith("data:"):
            return picture
        if picture.startswith(("http://", "https://")):
            raise RowError("missing picture", f"names {picture}; download it, training fetches nothing")
        return self.image_folder / picture


def row_name(raw: Any, index: int) -> str:
    """What reports call a row."""
    own = raw.get("id") if isinstance(raw, Mapping) else None
    return f"row {index}" if own is None else encodable(f"row {index} (id {own})")


def open_picture(source: Any, aspect_ratio: str = "square") -> Any:
    """Opens a picture of a row, as RGB.

    Args:
        source: As in [`Row.pictures`].
        aspect_ratio (`str`, *optional*): The processor's `image_aspect_ratio`: a picture may be too large to be padded.

    Raises:
        RowError: There is no such file, or it cannot be decoded, or its shape is none that a processor takes.
    """
    try:
        if isinstance(source, Mapping):
            picture = to_rgb(decode_picture(source["bytes"]))
        else:
            picture = to_rgb(source)
    except FileNotFoundError as error:
        raise RowError("missing picture", f"there is no file {source}") from error
    except (OSError, TypeError, ValueError) as error:
        where = source if isinstance(source, os.PathLike) else f"a {type(source).__name__}"
        raise RowError("unreadable picture", f"{where} cannot be decoded ({error})") from error
    try:
        check_shape(*picture.size, aspect_ratio, str(source) if isinstance(source, os.PathLike) else "the picture")
    except ValueError as error:
        raise RowError("unreadable picture", str(error)) from error
    return picture


def _turns(raw: Mapping[str, Any], *names: str) -> list[Any]:
    """Returns the turns that a row has under one of some names, or none."""
    name, turns = next(((name, raw[name]) for name in names if raw.get(name)), ("", []))
    if not isinstance(turns, list | tuple):
        raise RowError("form", f"has a {type(turns).__name__} as its {name}; expected a list of turns")
    return list(turns)


def _llava_message(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise RowError("form", f"turn {number} has no 'from' and 'value'")
    return _message({"role": turn["from"], "content": turn["value"]}, number)


def _message(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or "role" not in turn:
        raise RowError("form", f"message {number} has no role")
    role = _ROLES.get(turn["role"]) if isinstance(turn["role"], str) else None
    if role is None:
        raise RowError("roles", f"message {number} is of {turn['role']!r}; expected one of {', '.join(_ROLES)}")
    content = turn.get("content")
    if isinstance(content, str):
        return {"role": role, "content": _parts(content)}
    if not isinstance(content, list):
        raise RowError("form", f"message {number} has a {type(content).__name__} as its content")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts += [{"type": "text", "text": part["text"]}] if part["text"] else []
        elif kind == "image":
            parts.append({"type": "image"})
        else:
            raise RowError("form", f"message {number} has a part that is neither text nor image")
    return {"role": role, "content": parts}


def _parts(text: str) -> list[dict[str, str]]:
    """Takes a text with placeholders apart; blanks at its ends and line ends behind pictures are the template's."""
    pieces = text.strip().split(IMAGE_TOKEN)
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _places(messages: list[dict[str, Any]]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def _check_text(messages: list[dict[str, Any]]) -> None:
    """Refuses what tokenizers do not take: halves of characters, where a text was cut within one."""
    for number, message in enumerate(messages):
        for part in message["content"]:
            if part["type"] == "text" and encodable(part["text"]) != part["text"]:
                raise RowError("form", f"message {number} is no text in Unicode: {part['text'][:80]!r}")


def _check_turns(messages: list[dict[str, Any]]) -> None:
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for number, message in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if message["role"] != expected:
            raise RowError("roles", f"turn {number} is of the {message['role']}; expected the {expected}")
        if expected == "user":
            continue
        if any(part["type"] == "image" for part in message["content"]):
            raise RowError("placeholders", f"turn {number}, an answer, has a picture")
        if not "".join(part["text"] for part in message["content"]).strip():
            raise RowError("empty answer", f"turn {number} of the assistant is empty")
    if not turns or len(turns) % 2:
        raise RowError("roles", "ends without an answer")


__all__ = ["Row", "RowError", "Rows", "open_data", "open_picture", "row_name"]
