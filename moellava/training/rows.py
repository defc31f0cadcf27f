# SPDX-License-Identifier: Apache-2.0
"""Rows of training data: LLaVA's JSON, and `messages` with `images`, in one form; what is wrong in a row is named."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..chatting.conversations import RowError, located, read_conversation
from ..chatting.dataset_pictures import undecoded
from ..checks.pictures import check_shape, decode_picture, to_rgb
from ..configuration.config_base_moellava import known_names
from ..formatting import encodable
from ..reading.json_files import read_json_rows


_SOURCE_FIELDS = ("path", "name", "split", "streaming", "image_folder")


@dataclass(frozen=True)
class Row:
    """One conversation.

    Attributes:
        name (`str`): What reports call it: its number from 0 and, where it has one, its id.
        messages (`list[dict]`): `role` and `content`, a list of parts: `{"type": "image"}` and
            `{"type": "text", "text": ...}`.
        pictures (`list`): In the order of their places: paths, text of the form `data:image/...`, PIL pictures, or
            `{"bytes": ..., "path": ...}` as `datasets` holds them.
        learnt (`frozenset[int]`): The numbers, from 0, of the messages that are learnt.
        unread (`frozenset[str]`): The fields that are not read.
    """

    name: str
    messages: list[dict[str, Any]]
    pictures: list[Any]
    learnt: frozenset[int]
    unread: frozenset[str] = frozenset()


def open_data(data: Any, image_folder: str | os.PathLike | None = None, as_written: bool = False) -> "Rows":
    """Opens training data without reading a picture.

    Args:
        data (`str`, `os.PathLike`, `Mapping`, `Iterable`):
            A `.json` file with a list of rows, a `.jsonl` file with one in each line, or a `.parquet` file; a folder
            that `Dataset.save_to_disk` has written; any other name that `datasets.load_dataset` takes; a mapping with
            `path` (one of these) and `name`, `split`, `streaming`, `image_folder`; or the rows themselves, a list or a
            dataset; of several splits in memory, `train`. `split` is a name or a slice, such as `train[:90%]`, of
            whatever `path` is; rows without the name of a split are `train`.
        image_folder (`str` or `os.PathLike`, *optional*): Where relative paths of pictures begin; by default the folder
            of the file.
        as_written (`bool`, *optional*, defaults to `False`): Whether questions stay as they are in the rows: see
            [`moellava.conversations.arranged`].

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: `datasets` is needed and not installed.
        ValueError: The file is no list of rows, there is no such split, or `data` has an unknown field.
    """
    options: dict[str, Any] = {}
    if isinstance(data, Mapping) and not hasattr(data, "column_names"):  # which several splits in memory have
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
            rows = _selected(_read_json(path), str(data), options)
            return Rows(rows, path.parent if image_folder is None else image_folder, as_written)
        data = _load_dataset(str(data), path, options)
    elif isinstance(data, Iterable):
        data = _selected(data, "the dataset", options)
    else:
        raise TypeError(
            f"data is a {type(data).__name__}; expected the path of a .json file, the name of a dataset, a dataset, or "
            "a list of rows."
        )
    return Rows(data, image_folder, as_written)


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
        return _selected(datasets.load_from_disk(str(path)), name, options)
    if path.is_file():  # by its name alone, the library would look for it on the Hub
        if path.suffix.lower() != ".parquet":
            raise ValueError(f"{name} ends in {path.suffix!r}; expected a .json, .jsonl or .parquet file, or a folder.")
        return _selected(datasets.Dataset.from_parquet(str(path)), name, options)
    given = {option: value for option, value in options.items() if value is not None}
    # By its whole path, since the library takes no ".".
    return datasets.load_dataset(str(path.resolve()) if path.is_dir() else name, **{"split": "train", **given})


def _selected(rows: Any, name: str, options: Mapping[str, Any]) -> Any:
    """Returns the rows of a split, or of a slice of one, by the rules of `datasets.load_dataset`.

    Args:
        rows: A list, a dataset, or datasets by the names of their splits.
        name (`str`): What an error calls them.
        options (`Mapping`): `split`, `name` and `streaming`, of which the last two go with `load_dataset` alone.
    """
    for option in ("name", "streaming"):
        if options.get(option):
            raise ValueError(
                f"data gives {option}: {options[option]!r} with {name}; it goes with what load_dataset reads "
                "alone. Leave it out."
            )
    asked = options.get("split")
    if asked is None and not isinstance(rows, Mapping):
        return rows
    splits = dict(rows) if isinstance(rows, Mapping) else {str(getattr(rows, "split", None) or "train"): rows}
    asked = "train" if asked is None else str(asked)
    if asked in splits:
        return splits[asked]
    for of in splits.values():
        if not hasattr(of, "__len__"):
            raise ValueError(f"data asks for the split {asked!r} of {name}, which is streamed. Select it beforehand.")
    import datasets

    known = {split: len(of) for split, of in splits.items()}
    wanted = {part.partition("[")[0].strip() for part in asked.split("+")}
    if unknown := sorted(wanted - set(known)):
        raise ValueError(f"Unknown split {unknown[0]!r} of {name}{known_names(unknown[0], known)}")
    try:
        pieces = datasets.ReadInstruction.from_spec(asked).to_absolute(known)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"split is {asked!r} ({error}); expected a name or a slice, such as train[:90%].") from error
    found = [_slice(splits[piece.splitname], piece.from_, piece.to) for piece in pieces]
    if len(found) == 1:
        return found[0]
    if all(isinstance(piece, list) for piece in found):
        return [row for piece in found for row in piece]
    return datasets.concatenate_datasets(found)


def _slice(rows: Any, start: int, stop: int) -> Any:
    return rows.select(range(start, stop)) if hasattr(rows, "select") else list(rows)[start:stop]


class Rows:
    """Rows as they lie in a file or a dataset, made to `Row`s one by one.

    Args:
        source (`Iterable`): The rows; with a length, or streamed.
        image_folder (`str` or `os.PathLike`, *optional*): Where relative paths of pictures begin.
        as_written (`bool`, *optional*, defaults to `False`): As for [`open_data`].
    """

    def __init__(
        self,
        source: Iterable[Mapping[str, Any]],
        image_folder: str | os.PathLike | None = None,
        as_written: bool = False,
    ):
        self.source = undecoded(source)
        self.as_written = as_written
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
        said = read_conversation(raw, as_written=self.as_written)
        pictures = [located(picture, self.image_folder) for picture in said.pictures]
        return Row(row_name(raw, index), said.messages, pictures, said.learnt, said.unread)


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


__all__ = ["Row", "RowError", "Rows", "open_data", "open_picture", "row_name"]
