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
"""Questions with true answers, out of the files that medical and LLaVA's datasets come in.

A row's own fields tell what it is:

- LLaVA's: `conversations`, a list of `{"from": "human" or "gpt", "value": ...}`, and `image`, a name or a list of
  names. Every answer is asked for, with the true turns before it.
- One question a row, as in LLaVA-Med's question files, VQA-RAD, SLAKE and PathVQA: `question` (or `text`), `answer`,
  and `image` (`image_name`, `img_name`).

Both may have `answer_type` (`OPEN`, `CLOSED`).
"""

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..asking import user_turn
from ..building import IMAGE_TOKEN
from ..dataset_pictures import undecoded
from ..json_files import read_json_rows
from ..processing.images_moellava import check_shape, decode_picture, to_rgb
from ..wording import encodable
from .scoring import CLOSED, OPEN, words


# The names of a field in the datasets, most common first. "conversatons" is what some of LLaVA-Med's files say.
_CONVERSATION_NAMES = ("conversations", "conversatons")
_QUESTION_NAMES = ("question", "text")
_PICTURE_NAMES = ("image", "image_name", "img_name")
_ID_NAMES = ("id", "question_id", "qid")
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# PathVQA tells its closed questions as "yes/no", its open ones as "other" and "number".
_KINDS = {"closed": CLOSED, "close": CLOSED, "yes/no": CLOSED, "open": OPEN, "other": OPEN, "number": OPEN}


@dataclass(frozen=True)
class Question:
    """One question of a row, with all that is said before it.

    Attributes:
        row (`int`): The row's number in the file, from 1.
        text (`str`): The question.
        expected (`str`): The true answer.
        kind (`str`): `"closed"` (yes or no, or a choice) or `"open"`.
        pictures (`list`): The pictures up to here: paths, PIL pictures, or a dictionary with their bytes.
        turns (`list[dict]`): The chat, as `apply_chat_template` takes it, up to and with the question.
        id (`str` or `None`): What the row calls itself.
    """

    row: int
    text: str
    expected: str
    kind: str
    pictures: list[Any]
    turns: list[dict[str, Any]]
    id: str | None = None


@dataclass(frozen=True)
class Unusable:
    """A row, or a question of it, that cannot be evaluated.

    Attributes:
        row (`int`): The row's number in the file, from 1.
        reason (`str`): What is wrong with it.
    """

    row: int
    reason: str


@dataclass
class QuestionSet:
    """All questions of a file.

    Attributes:
        name (`str`): What the set is called: the file's name, without its ending.
        questions (`list[Question]`): In the order of the rows.
        unusable (`list[Unusable]`): The rows that give none.
        num_rows (`int`): How many rows were read.
    """

    name: str
    questions: list[Question] = field(default_factory=list)
    unusable: list[Unusable] = field(default_factory=list)
    num_rows: int = 0


class _RowError(ValueError):
    """A row cannot be used."""


def read_questions(
    data: str | os.PathLike | Iterable[Mapping[str, Any]],
    image_folder: str | os.PathLike | None = None,
    limit: int | None = None,
) -> QuestionSet:
    """Reads questions with true answers; no picture is opened.

    Args:
        data (`str`, `os.PathLike` or iterable):
            A `.json` file with a list of rows, a `.jsonl` file with a row a line, or rows: a list of dictionaries, a
            `datasets.Dataset`.
        image_folder (`str` or `os.PathLike`, *optional*):
            Where the pictures are that rows name. Defaults to the file's folder, for rows to the working folder.
        limit (`int`, *optional*): How many rows to read at most.

    Raises:
        FileNotFoundError: There is no such file or folder.
        TypeError: `data` is neither a path nor rows.
        ValueError: The file is no JSON, or not a single row can be used; the message tells the first ones' faults.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected how many rows to evaluate, at least 1.")
    if isinstance(data, str | os.PathLike):
        path = Path(data).expanduser()
        rows, found, default_folder = _read_rows(path), QuestionSet(path.stem), path.parent
    elif isinstance(data, Iterable) and not isinstance(data, Mapping | bytes):
        rows, found, default_folder = undecoded(data), QuestionSet("rows"), Path()
    else:
        raise TypeError(
            f"The data is of type {type(data).__name__}; expected the path of a .json or .jsonl file, or rows: a list "
            "of dictionaries or a datasets.Dataset."
        )
    folder = default_folder if image_folder is None else Path(image_folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} for the pictures. Give the folder that they are in.")
    for number, row in enumerate(itertools.islice(rows, limit), start=1):
        found.num_rows = number
        try:
            found.questions += _questions_of(row, number, folder)
        except _RowError as error:
            found.unusable.append(Unusable(number, str(error)))
    if not found.questions:
        faults = "; ".join(f"row {fault.row} {fault.reason}" for fault in found.unusable[:3]) or "it is empty"
        raise ValueError(f"No row of {found.name} can be evaluated ({found.num_rows} read): {faults}.")
    return found


def open_picture(picture: Any, aspect_ratio: str = "square") -> Any:
    """Opens a picture of a [`Question`], as an RGB PIL picture.

    Raises:
        FileNotFoundError: The file is not there any more.
        TypeError: It is no picture.
        ValueError: It cannot be decoded, or its shape is none that a processor with this `image_aspect_ratio` takes.
    """
    if isinstance(picture, Mapping):  # a column of datasets.Image(decode=False)
        picture = decode_picture(picture["bytes"])
    image = to_rgb(picture)
    check_shape(*image.size, aspect_ratio)
    return image


def _read_rows(path: Path) -> list[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Expected a .json or .jsonl file with questions and answers.")
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise ValueError(
            f"{path} ends in {path.suffix!r}; expected a .json file with a list of rows, or a .jsonl file with a row a "
            "line."
        )
    return read_json_rows(path)


def _questions_of(row: Any, number: int, folder: Path) -> list[Question]:
    if not isinstance(row, Mapping):
        raise _RowError(f"is a {type(row).__name__}; expected an object with a question, an answer and a picture")
    name, conversation = _field(row, _CONVERSATION_NAMES)
    if name is not None:
        return _turns_of(row, name, conversation, number, folder)
    text = _required(row, _QUESTION_NAMES, "question")
    name, pictures = _field(row, _PICTURE_NAMES)
    if name is None:
        raise _RowError(f"has no picture: expected {_either(_PICTURE_NAMES)}, null for a question without")
    answer = _required(row, ("answer",), "true answer")
    expected, pictures = _expected(answer), _pictures_of(pictures, name, folder)
    text, turn = _asked(_text(text, "question"), pictures)
    return [Question(number, text, expected, _kind(row, expected), pictures, [turn], _id(row))]


def _turns_of(row: Mapping[str, Any], name: str, conversation: Any, number: int, folder: Path) -> list[Question]:
    """Returns a question for every answer of a conversation."""
    if not isinstance(conversation, list) or not conversation:
        raise _RowError(f"has {name!r} that are no list of turns")
    picture_name, pictures = _field(row, _PICTURE_NAMES)
    waiting = _pictures_of(pictures, picture_name, folder)
    said = [_said(turn, place) for place, turn in enumerate(conversation, start=1)]
    turns = [_text_turn(role, text) for role, text in said[:1] if role == "system"]
    said = said[len(turns) :]
    roles = [role for role, _ in said]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise _RowError(f"has turns of {', '.join(roles) or 'nobody'}; expected human and gpt in turn, gpt last")
    placed = sum(text.count(IMAGE_TOKEN) for role, text in said if role == "user")
    if placed not in (0, len(waiting)):
        raise _RowError(f"has {placed} {IMAGE_TOKEN} for {len(waiting)} picture(s); expected one for each, or none")
    questions, shown = [], []
    for (_, question), (_, answer) in zip(said[::2], said[1::2], strict=True):
        count = question.count(IMAGE_TOKEN) if placed else len(waiting)
        own, waiting = waiting[:count], waiting[count:]
        shown, expected = shown + own, _expected(answer)
        text, turn = _asked(question, own)
        turns = [*turns, turn]
        questions.append(Question(number, text, expected, _kind(row, expected), shown, turns, _id(row)))
        turns = [*turns, _text_turn("assistant", expected)]
    return questions


def _said(turn: Any, place: int) -> tuple[str, str]:
    role = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
    if not isinstance(role, str) or role not in _ROLES:
        raise _RowError(f"has a turn {place} that is not from human or gpt, but {role!r}")
    return _ROLES[role], _text(turn.get("value", turn.get("content")), f"text in turn {place}")


def _text_turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _asked(question: str, pictures: list[Any]) -> tuple[str, dict[str, Any]]:
    """Returns the text of a question, and the user's turn that it is.

    Pictures come before the text, as LLaVA asks, unless their placeholders stand in the middle of it.
    """
    pieces = question.split(IMAGE_TOKEN)
    if len(pieces) - 1 not in (0, len(pictures)):
        raise _RowError(
            f"has {len(pieces) - 1} {IMAGE_TOKEN} for {len(pictures)} picture(s); expected one for each, or none"
        )
    texts = [piece.strip() for piece in pieces if piece.strip()]
    if not texts:
        raise _RowError("has no text in the question")
    if len(texts) == 1:
        return texts[0], user_turn(pictures, texts[0])
    content = [{"type": "text", "text": pieces[0]}]
    for picture, piece in zip(pictures, pieces[1:], strict=True):
        # The newline behind a picture is the chat template's.
        content += [{"type": "image", "image": picture}, {"type": "text", "text": piece.removeprefix("\n")}]
    return question.strip(), {"role": "user", "content": [part for part in content if part.get("text") != ""]}


def _pictures_of(pictures: Any, name: str | None, folder: Path) -> list[Any]:
    """Returns the pictures that a field names: paths of files that exist, or the pictures that it holds."""
    if pictures is None:
        return []
    found = []
    for picture in pictures if isinstance(pictures, list | tuple) else [pictures]:
        if isinstance(picture, Mapping):
            if picture.get("path") and picture.get("bytes", "") is None:
                picture = picture["path"]  # so `datasets` holds a picture that lies in a file
            elif picture.get("bytes") is None:
                raise _RowError(f"has a dictionary without bytes as {name!r}; expected a picture's name")
        if isinstance(picture, str | os.PathLike):
            picture = folder / picture
            if not os.path.isfile(picture):  # which, unlike Path.is_file, takes names of any length
                raise _RowError(f"names the picture {picture}, and there is no such file")
        elif not isinstance(picture, Mapping) and not hasattr(picture, "convert"):  # a PIL picture has it
            raise _RowError(f"has a {type(picture).__name__} as {name!r}; expected a picture's name")
        found.append(picture)
    return found


def _field(row: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str | None, Any]:
    """Returns the first of the names that a row has, with its value."""
    return next(((name, row[name]) for name in names if name in row), (None, None))


def _required(row: Mapping[str, Any], names: tuple[str, ...], what: str) -> Any:
    name, value = _field(row, names)
    if name is None:
        has = ", ".join(map(str, row)) or "nothing"
        raise _RowError(f"has no {what}: expected {_either(names)}, found {has}")
    return value


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))


def _text(value: Any, what: str) -> str:
    # VQA-RAD has numbers among its answers.
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _RowError(f"has no {what}, but {value!r}")
    if not str(value).strip():
        raise _RowError(f"has no {what}: it is empty")
    if encodable(str(value)) != str(value):  # a text that was cut within a character, which tokenizers do not take
        raise _RowError(f"has a {what} that is no text in Unicode: {str(value)[:80]!r}")
    return str(value)


def _expected(answer: Any) -> str:
    text = _text(answer, "true answer").strip()
    if not words(text):
        raise _RowError(f"has the true answer {text!r}, which has no words to compare with")
    if IMAGE_TOKEN in text:
        raise _RowError(f"has {IMAGE_TOKEN} in an answer; expected it in questions only")
    return text


def _kind(row: Mapping[str, Any], expected: str) -> str:
    """Returns what a row's `answer_type` says; without one, yes and no are closed, and all else is open."""
    told = row.get("answer_type")
    if told is None:
        return CLOSED if words(expected) in (["yes"], ["no"]) else OPEN
    kind = _KINDS.get(str(told).strip().lower())
    if kind is None:
        raise _RowError(f"has the answer_type {told!r}; expected OPEN or CLOSED")
    return kind


def _id(row: Mapping[str, Any]) -> str | None:
    _, value = _field(row, _ID_NAMES)
    return None if value is None else str(value)


__all__ = ["Question", "QuestionSet", "Unusable", "open_picture", "read_questions"]
