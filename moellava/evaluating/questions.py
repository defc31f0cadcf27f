# SPDX-License-Identifier: Apache-2.0
"""Questions with true answers, out of the files that medical and LLaVA's datasets come in.

A row's own fields tell what it is:

- Conversations, read as in training: LLaVA's `conversations` and `image`, OpenAI's `messages` and `images`, TRL's
  `prompt` and `completion`. Every answer that is learnt is asked for, with the true turns before it.
- One question a row, as in LLaVA-Med's question files, VQA-RAD, SLAKE and PathVQA: `question` (or `text`), `answer`,
  and `image` (`image_name`, `img_name`); of multiple choice also `choices` (`options`).

Both may have `answer_type` (`OPEN`, `CLOSED`), and a `system` text.
"""

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..chatting.chat_templates import IMAGE_TOKEN
from ..chatting.conversations import (
    IMAGE_FIELDS,
    RowError,
    arranged,
    is_conversation,
    located,
    read_conversation,
    refuse_unread_fields,
    row_pictures,
)
from ..chatting.dataset_pictures import undecoded
from ..chatting.prompting import user_turn, with_pictures
from ..checks.pictures import check_shape, decode_picture, to_rgb
from ..formatting import encodable
from ..reading.json_files import read_json_rows
from .choices import read_choices, right_choice
from .scoring import CLOSED, OPEN, words


# The names of a field in the datasets, most common first.
_QUESTION_NAMES = ("question", "text")
_ID_NAMES = ("id", "question_id", "qid")
# PathVQA tells its closed questions as "yes/no", its open ones as "other" and "number".
_KINDS = {
    "closed": CLOSED, "close": CLOSED, "yes/no": CLOSED, "multiple-choice": CLOSED, "multiple choice": CLOSED,
    "open": OPEN, "other": OPEN, "number": OPEN,
}  # fmt: skip


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
        choices (`dict[str, str]` or `None`): Of multiple choice, the texts by their letters.
    """

    row: int
    text: str
    expected: str
    kind: str
    pictures: list[Any]
    turns: list[dict[str, Any]]
    id: str | None = None
    choices: dict[str, str] | None = None


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
        folder (`str`): Where the pictures are that rows name.
    """

    name: str
    questions: list[Question] = field(default_factory=list)
    unusable: list[Unusable] = field(default_factory=list)
    num_rows: int = 0
    folder: str = "."


def read_questions(
    data: str | os.PathLike | Iterable[Mapping[str, Any]],
    image_folder: str | os.PathLike | None = None,
    limit: int | None = None,
    as_written: bool = False,
) -> QuestionSet:
    """Reads questions with true answers; no picture is opened.

    Args:
        data (`str`, `os.PathLike` or iterable):
            A `.json` file with a list of rows, a `.jsonl` file with a row a line, or rows: a list of dictionaries, a
            `datasets.Dataset`.
        image_folder (`str` or `os.PathLike`, *optional*):
            Where the pictures are that rows name. Defaults to the file's folder, for rows to the working folder.
        limit (`int`, *optional*): How many rows to read at most.
        as_written (`bool`, *optional*, defaults to `False`): Whether questions stay as they are in the rows: see
            [`moellava.conversations.arranged`].

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
    found.folder = str(folder)
    for number, row in enumerate(itertools.islice(rows, limit), start=1):
        found.num_rows = number
        try:
            found.questions += _questions_of(row, number, folder, as_written)
        except RowError as error:
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


def _questions_of(row: Any, number: int, folder: Path, as_written: bool) -> list[Question]:
    if not isinstance(row, Mapping):
        raise RowError(
            "form", f"is a {type(row).__name__}; expected an object with a question, an answer and a picture"
        )
    if is_conversation(row):
        return _turns_of(row, number, folder, as_written)
    refuse_unread_fields(row, is_learnt=False)
    text = _text(_required(row, _QUESTION_NAMES, "question"), "question")
    name, held = row_pictures(row)
    if name is None and not any(name in row for name in IMAGE_FIELDS):
        names = ("image", "image_name", "img_name")
        raise RowError("form", f"has no picture: expected {_either(names)}, null for a question without")
    choices = read_choices(row)
    expected = _expected(_required(row, ("answer",), "true answer"), choices)
    if not held and row.get(name) not in (None, [], ()):
        raise RowError("form", f"has an empty {name!r}; expected a picture's name, or null for a question without")
    pictures = _pictures_of(held, name, folder)
    if (places := text.count(IMAGE_TOKEN)) not in (0, len(pictures)):
        count = f"{places} {IMAGE_TOKEN} for {len(pictures)} picture(s)"
        raise RowError("placeholders", f"has {count}; expected one for each, or none")
    if not text.replace(IMAGE_TOKEN, "").strip():
        raise RowError("form", "has no text in the question")
    turn = user_turn(pictures, text, as_written)
    turns = [*_system_turn(row), turn]
    return [Question(number, _shown(turn), expected, _kind(row, expected, choices), pictures, turns, _id(row), choices)]


def _turns_of(row: Mapping[str, Any], number: int, folder: Path, as_written: bool) -> list[Question]:
    """Returns a question for every answer of a conversation that is learnt."""
    said = read_conversation(row, as_written=as_written, needs_places=False)
    waiting = _pictures_of(said.pictures, row_pictures(row)[0] or "content", folder)
    choices = read_choices(row)
    questions: list[Question] = []
    turns: list[dict[str, Any]] = []
    shown: list[Any] = []
    for place, message in enumerate(said.messages):
        count = sum(part["type"] == "image" for part in message["content"])
        own, waiting = waiting[:count], waiting[count:]
        if place in said.learnt:
            expected = _expected(message["content"][0]["text"], choices)
            kind = _kind(row, expected, choices)
            questions.append(Question(number, _shown(turns[-1]), expected, kind, shown, turns, _id(row), choices))
        shown = shown + own
        turns = [*turns, {**message, "content": with_pictures(message["content"], own)}]
    return questions


def _system_turn(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the turn that a row's system text is, if it has one."""
    system = row.get("system")
    if system is None or (isinstance(system, str) and not system.strip()):
        return []
    return [{"role": "system", "content": [{"type": "text", "text": _text(system, "system text").strip()}]}]


def _shown(turn: dict[str, Any]) -> str:
    """Returns a question as people read it: with the places of images only where they are within the text."""
    within = itertools.dropwhile(lambda part: part["type"] == "image", turn["content"])
    return "".join(part.get("text", IMAGE_TOKEN) for part in within).strip()


def asked_turns(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the turns of a chat that comes in parts, pictures with them, arranged as in training."""
    turns = []
    for message in messages:
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if message["role"] == "user":
            pictures = [part["image"] for part in content if part["type"] == "image"]
            content = with_pictures(arranged(content), pictures)
        turns.append({**message, "content": content})
    return turns


def _pictures_of(pictures: list[Any], name: str | None, folder: Path) -> list[Any]:
    """Returns the images of a row: paths of files that exist, or the images that it holds."""
    found = []
    for picture in pictures:
        if isinstance(picture, Mapping):
            if picture.get("path") and picture.get("bytes", "") is None:
                picture = picture["path"]  # so `datasets` holds an image that lies in a file
            elif not picture.get("bytes"):
                raise RowError("form", f"has a dictionary without bytes as {name!r}; expected a picture's name")
        picture = located(picture, folder)
        if isinstance(picture, os.PathLike):
            if not os.path.isfile(picture):  # which, unlike Path.is_file, takes names of any length
                raise RowError("missing picture", f"names the picture {picture}, and there is no such file")
        elif not isinstance(picture, str | Mapping) and not hasattr(picture, "convert"):  # a PIL picture has it
            raise RowError("form", f"has a {type(picture).__name__} as {name!r}; expected a picture's name")
        found.append(picture)
    return found


def _field(row: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str | None, Any]:
    """Returns the first of the names that a row has, with its value; None only if no other has one."""
    named = sorted((name for name in names if name in row), key=lambda name: row[name] is None)
    return (named[0], row[named[0]]) if named else (None, None)


def _required(row: Mapping[str, Any], names: tuple[str, ...], what: str) -> Any:
    name, value = _field(row, names)
    if name is None:
        has = ", ".join(map(str, row)) or "nothing"
        raise RowError("form", f"has no {what}: expected {_either(names)}, found {has}")
    return value


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))


def _text(value: Any, what: str) -> str:
    # VQA-RAD has numbers among its answers.
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError("form", f"has no {what}, but {value!r}")
    if not str(value).strip():
        raise RowError("form", f"has no {what}: it is empty")
    if encodable(str(value)) != str(value):  # a text that was cut within a character, which tokenizers do not take
        raise RowError("form", f"has a {what} that is no text in Unicode: {str(value)[:80]!r}")
    return str(value)


def _expected(answer: Any, choices: dict[str, str] | None) -> str:
    if choices is not None:
        answer = right_choice(answer, choices)
    text = _text(answer, "true answer").strip()
    if not words(text) and choices is None:
        raise RowError("form", f"has the true answer {text!r}, which has no words to compare with")
    if IMAGE_TOKEN in text:
        raise RowError("form", f"has {IMAGE_TOKEN} in an answer; expected it in questions only")
    return text


def _kind(row: Mapping[str, Any], expected: str, choices: dict[str, str] | None) -> str:
    """Returns what a row's `answer_type` says; without one, yes, no and choices are closed, and all else is open."""
    told = row.get("answer_type")
    if told is None:
        return CLOSED if choices is not None or words(expected) in (["yes"], ["no"]) else OPEN
    kind = _KINDS.get(str(told).strip().lower())
    if kind is None:
        raise RowError("form", f"has the answer_type {told!r}; expected OPEN or CLOSED")
    return kind


def _id(row: Mapping[str, Any]) -> str | None:
    _, value = _field(row, _ID_NAMES)
    return None if value is None else str(value)


__all__ = ["Question", "QuestionSet", "Unusable", "asked_turns", "open_picture", "read_questions"]
