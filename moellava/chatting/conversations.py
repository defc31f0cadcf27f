# SPDX-License-Identifier: Apache-2.0
"""The one reader of conversations, for training, evaluating and asking: what is said, what is shown, what is learnt.

It takes LLaVA's and ShareGPT's `conversations`, OpenAI's `messages` and TRL's `prompt` with `completion`. A field of
theirs that would change what is learnt is either read or refused by name.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..formatting import encodable
from .chat_templates import IMAGE_TOKEN


# What rows call those who speak.
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "developer": "system",
}  # fmt: skip
_CONVERSATIONS = ("conversations", "conversatons")  # the latter in some of LLaVA-Med's files
# Whether a turn is learnt: ms-swift's, OpenAI's and Mistral's, and Axolotl's names for it.
_LEARNT_NAMES = ("loss", "weight", "train", "training")
# What would change what is asked or learnt, and is not read: of any row; of one that is learnt; and of a turn.
_REFUSED_IN_QUESTIONS = (
    "tools", "functions", "function_call", "parallel_tool_calls", "video", "videos", "audio", "audios",
    "chat_template", "chat_template_kwargs", "system_prompt", "system_message",
)  # fmt: skip
_REFUSED_IN_CONVERSATIONS = (
    *_REFUSED_IN_QUESTIONS, "chosen", "rejected", "kto_tag", "mask_history", "loss_scale", "loss_weight",
    "sample_weight", "loss_mask", "assistant_masks", "completion_mask",
)  # fmt: skip
_REFUSED_IN_TURNS = (
    "tool_calls", "function_call", "tool_call_id", "functions", "tools", "reasoning_content", "reasoning", "thinking",
    "refusal", "audio", "video", "image", "images", "loss_scale", "loss_weight", "loss_mask", "train_detail",
    "training_detail",
)  # fmt: skip
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image")
_SOURCE_NAMES = ("image", "image_url", "path", "url", "base64", "source")
# The fields of a row's images: LLaVA's and TRL's, VQA-RAD's, SLAKE's.
IMAGE_FIELDS = ("images", "image", "image_name", "img_name")


class RowError(ValueError):
    """Says why a row cannot be used: in a word, `kind`, and in a sentence."""

    def __init__(self, kind: str, detail: str):
        super().__init__(encodable(detail))
        self.kind = kind


@dataclass(frozen=True)
class Conversation:
    """What a row says.

    Attributes:
        messages (`list[dict]`): `role` and `content`, a list of parts: `{"type": "image"}` and
            `{"type": "text", "text": ...}`.
        pictures (`list`): In the order of their places, as the row has them.
        learnt (`frozenset[int]`): The numbers, from 0, of the messages that are learnt.
        unread (`frozenset[str]`): The fields that are not read, and are not known to change anything.
    """

    messages: list[dict[str, Any]]
    pictures: list[Any]
    learnt: frozenset[int]
    unread: frozenset[str] = frozenset()


def is_conversation(row: Mapping[str, Any]) -> bool:
    """Whether a row holds a conversation, and not one question with its answer."""
    return any(row.get(name) is not None for name in (*_CONVERSATIONS, "messages", "completion"))


def read_conversation(row: Mapping[str, Any], *, as_written: bool = False, needs_places: bool = True) -> Conversation:
    """Reads a row.

    Args:
        row (`Mapping`): The row.
        as_written (`bool`, *optional*, defaults to `False`): Whether questions stay as they are: see [`arranged`].
        needs_places (`bool`, *optional*, defaults to `True`):
            Whether `conversations` have to say where images stand. Without that, as with `messages` always, images
            that no place is named for stand before the first question.

    Raises:
        RowError: The row cannot be used.
    """
    refuse_unread_fields(row)
    unread = _unread_weights(row)
    form, turns, num_prompt = _turns_of(row)
    messages: list[dict[str, Any]] = []
    sources: list[Any] = []
    learnt: set[int] = set()
    for number, turn in enumerate(turns):
        role, content = _said(form, turn, number)
        unread |= _unread(turn, number)
        is_learnt = _is_learnt(turn, role, number)
        if role == "assistant" and is_learnt and number >= num_prompt:
            learnt.add(number)
        parts, own = _parts_of(content, number)
        sources += own
        messages.append({"role": role, "content": parts})
    if _add_system(row, messages):
        learnt = {number + 1 for number in learnt}
    _, pictures = row_pictures(row)
    inline = [source for source in sources if source is not None]
    if inline and len(inline) == len(sources) and pictures == inline:
        pictures = []  # the row has them twice
    if pictures and not sources and not (needs_places and form in _CONVERSATIONS):
        sources = _put_first(messages, len(pictures))
    for message in messages:
        is_question = message["role"] == "user"
        message["content"] = arranged(message["content"], as_written) if is_question else _stripped(message["content"])
    _check_turns(messages)
    _check_text(messages)
    if not learnt:
        raise RowError("nothing learnt", "has no answer that is learnt: all are marked with loss false or weight 0")
    if (places := sum(source is None for source in sources)) != len(pictures):
        raise RowError("placeholders", f"has {places} {IMAGE_TOKEN} placeholder(s) and {len(pictures)} picture(s)")
    waiting = iter(pictures)
    shown = [next(waiting) if source is None else source for source in sources]
    return Conversation(messages, shown, frozenset(learnt), frozenset(unread))


def refuse_unread_fields(row: Mapping[str, Any], is_learnt: bool = True) -> None:
    """Refuses a row by a field that would change what is asked or learnt, and that nothing here reads.

    Args:
        row (`Mapping`): The row.
        is_learnt (`bool`, *optional*, defaults to `True`): Whether it is a conversation that may be learnt; of a single
            question, fields of training have no meaning.

    Raises:
        RowError: It has one.
    """
    for name in _REFUSED_IN_CONVERSATIONS if is_learnt else _REFUSED_IN_QUESTIONS:
        if _is_given(row.get(name)):
            advice = "; call it system" if name in ("system_prompt", "system_message") else "; take it out"
            changed = "learnt" if is_learnt else "asked"
            raise RowError(
                "field", f"has the field {name!r}, which is not read and would change what is {changed}{advice}"
            )


def _unread_weights(row: Mapping[str, Any]) -> set[str]:
    """Returns the fields of a row that are called as a weight is, and seem to be none; a row's weight is refused.

    A row that counts for nothing, or for less than others, is to be left out of the file. A patient's weight or a loss
    that somebody has noted is no such thing.

    Raises:
        RowError: It has a weight.
    """
    found = set()
    for name in _LEARNT_NAMES:
        value = row.get(name)
        if not isinstance(value, int | float) or value == 1:
            continue
        if value == 0 or (name == "weight" and 0 < value < 1):
            raise RowError("field", f"has the {name} {value!r}; a row is learnt as a whole: take it out, or mark turns")
        found.add(name)
    return found


def row_pictures(row: Mapping[str, Any]) -> tuple[str | None, list[Any]]:
    """Returns the name of the field that holds a row's images, and the images.

    Raises:
        RowError: Two fields hold different ones.
    """
    found: dict[str, list[Any]] = {}
    for name in IMAGE_FIELDS:
        value = row.get(name)
        if value is not None:
            found[name] = [held for held in (value if isinstance(value, list | tuple) else [value]) if _is_shown(held)]
    held = [name for name in found if found[name]] or list(found)
    for name in held[1:]:
        if name in ("image", "images") and found[name] != found[held[0]]:
            raise RowError("placeholders", f"has different images as {held[0]!r} and as {name!r}; expected one of them")
    return (held[0], found[held[0]]) if held else (None, [])


def _is_shown(picture: Any) -> bool:
    """Whether an entry of a row's images is one; None, "" and pandas' NaN stand for none."""
    return picture is not None and picture != "" and not (isinstance(picture, float) and math.isnan(picture))


def located(picture: Any, folder: Path) -> Any:
    """Returns an image of a row as what opens it: a path from `folder` on, or what the row holds itself.

    Raises:
        RowError: It is somewhere on the net.
    """
    if isinstance(picture, Mapping) and not picture.get("bytes"):
        picture = picture.get("path")
    if isinstance(picture, str):
        if picture.startswith("data:"):
            return picture
        if picture.startswith(("http://", "https://")):
            raise RowError("missing picture", f"names {picture}; download it, nothing is fetched")
        if picture.startswith("file://"):
            picture = unquote(picture.removeprefix("file://"))
    return folder / picture if isinstance(picture, str | os.PathLike) else picture


def text_parts(text: str) -> list[dict[str, Any]]:
    """Takes a text apart where images stand in it."""
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(IMAGE_TOKEN)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def arranged(parts: Sequence[dict[str, Any]], as_written: bool = False) -> list[dict[str, Any]]:
    """Returns the parts of a question as a model is trained with them and asked.

    As LLaVA's `preprocess_multimodal` has it, images at either end of the text stand before it, and blanks around both
    are gone. Unlike there, where an image stands within the text, all stay where they are, as what is said of them
    depends on that. A line end behind an image is the chat template's, and is not written twice.

    Args:
        parts (`Sequence[dict]`): Images and texts; never in another order than that of the images.
        as_written (`bool`, *optional*, defaults to `False`): Whether nothing is moved, and no blank taken away.
    """
    parts = [dict(part) for part in parts]
    if not as_written:
        said = [place for place, part in enumerate(parts) if part["type"] == "text" and part["text"].strip()]
        if not said:
            return [part for part in parts if part["type"] == "image"]
        first, last = said[0], said[-1]
        is_within = any(part["type"] == "image" for part in parts[first:last])
        before, text, behind = parts[:first], parts[first : last + 1], parts[last + 1 :]
        before, behind = ([part for part in group if part["type"] == "image"] for group in (before, behind))
        if not is_within:
            text = [{"type": "text", "text": "".join(part["text"] for part in text).strip()}]
            return [*before, *behind, *text]
        text[0]["text"] = text[0]["text"].lstrip()
        if not behind:
            text[-1]["text"] = text[-1]["text"].rstrip()
        parts = [*before, *text, *behind]
    for part, following in zip(parts, parts[1:], strict=False):
        if part["type"] == "image" and following["type"] == "text":
            following["text"] = following["text"].removeprefix("\r").removeprefix("\n")
    return [part for part in parts if part.get("text") != ""]


def _is_given(value: Any) -> bool:
    """Whether a field says anything; JSON's empty values, also within a text, say nothing."""
    return value is not None and value is not False and value not in ("", [], {}, "[]", "{}", "null")


def _turns_of(row: Mapping[str, Any]) -> tuple[str, list[Any], int]:
    """Returns the form of a row, its turns, and how many of them are a prompt that is not learnt."""
    forms = [name for name in (*_CONVERSATIONS, "messages", "completion") if _is_given(row.get(name))]
    if len(forms) > 1:
        raise RowError("form", f"has both {forms[0]} and {forms[1]}; expected one of them")
    if not forms:
        raise RowError("form", f"has neither conversations nor messages, but {', '.join(map(str, row)) or 'nothing'}")
    (form,) = forms
    if form != "completion":
        return form, _list_of_turns(row, form), 0
    if isinstance(row.get("label"), bool):
        raise RowError(
            "field", "has the field 'label' beside a completion, as for preferences; answers are learnt only"
        )
    for name in ("prompt", "completion"):
        if isinstance(row.get(name), str):
            raise RowError("form", f"has a text as its {name}; expected a list of messages, with role and content")
    prompt = _list_of_turns(row, "prompt")
    return form, prompt + _list_of_turns(row, "completion"), len(prompt)


def _list_of_turns(row: Mapping[str, Any], name: str) -> list[Any]:
    turns = row.get(name)
    if not isinstance(turns, list | tuple):
        raise RowError("form", f"has a {type(turns).__name__} as its {name}; expected a list of turns")
    return list(turns)


def _said(form: str, turn: Any, number: int) -> tuple[str, Any]:
    """Returns the role and the content of a turn."""
    names = ("from", "value") if form in _CONVERSATIONS else ("role", "content")
    if isinstance(turn, Mapping) and turn.get(names[0]) is None:  # datasets fills in what a turn does not have
        names = ("role", "content") if names[0] == "from" else ("from", "value")
    if not isinstance(turn, Mapping) or names[0] not in turn or (names[1] not in turn and names[1] == "value"):
        wanted = "'from' and 'value'" if form in _CONVERSATIONS else "role"
        raise RowError("form", f"{'turn' if form in _CONVERSATIONS else 'message'} {number} has no {wanted}")
    role = _ROLES.get(turn[names[0]]) if isinstance(turn[names[0]], str) else None
    if role is None:
        raise RowError("roles", f"message {number} is of {turn[names[0]]!r}; expected one of {', '.join(_ROLES)}")
    return role, turn.get(names[1])


def _unread(turn: Mapping[str, Any], number: int) -> set[str]:
    """Returns the fields of a turn that are not read; those that would change what is learnt are refused."""
    for name in _REFUSED_IN_TURNS:
        if _is_given(turn.get(name)):
            advice = "; put it into the content, or into the row's images" if name in ("image", "images") else ""
            raise RowError(
                "field",
                f"message {number} has the field {name!r}, which is not read and would change what is learnt{advice}",
            )
    names = ("from", "value") if turn.get("from") is not None else ("role", "content")
    return {name for name in turn if name not in (*names, *_LEARNT_NAMES) and _is_given(turn[name])}


def _is_learnt(turn: Mapping[str, Any], role: str, number: int) -> bool:
    """Whether a turn says that it is learnt, which answers are unless they say otherwise."""
    told = {name: turn[name] for name in _LEARNT_NAMES if turn.get(name) is not None}
    for name, value in told.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise RowError("field", f"message {number} has the {name} {value!r}; expected true or false, or 1 or 0")
        # A weight of 1 is the weight of every turn by default; the others ask for it.
        if role != "assistant" and value and name != "weight":
            raise RowError(
                "field", f"message {number}, of the {role}, has the {name} {value!r}; only answers are learnt"
            )
    if role == "assistant" and len({bool(value) for value in told.values()}) > 1:
        raise RowError("field", f"message {number} has {told}, which contradict each other")
    return all(told.values())


def _parts_of(content: Any, number: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """Returns the parts of a message, and for each of its images what it is, or None: one of the row's."""
    if isinstance(content, str):
        content = [content]
    if not isinstance(content, list | tuple):
        raise RowError("form", f"message {number} has a {type(content).__name__} as its content")
    parts, sources = [], []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, Mapping) else ""
        if kind is None:
            kind = "text" if isinstance(part.get("text"), str) else "image" if _source_of(part) is not None else ""
        if kind in _TEXT_TYPES and isinstance(part.get("text"), str):
            pieces = text_parts(part["text"])
            sources += [None for piece in pieces if piece["type"] == "image"]
            parts += pieces
        elif kind in _IMAGE_TYPES:
            parts.append({"type": "image"})
            sources.append(_source_of(part))
        else:
            raise RowError("form", f"message {number} has a part that is neither text nor image")
    return parts, sources


def _source_of(part: Mapping[str, Any]) -> Any:
    """Returns what an image part holds or names; None if it is only a place."""
    name = next((name for name in _SOURCE_NAMES if part.get(name) is not None and part[name] != ""), None)
    value = None if name is None else part[name]
    if isinstance(value, Mapping) and name in ("image_url", "source"):
        if value.get("data") is not None:
            return f"data:{value.get('media_type', 'image/*')};base64,{value['data']}"
        return value.get("url") or None
    if name == "base64" and not value.startswith("data:"):
        return f"data:image/*;base64,{value}"
    return value


def _add_system(row: Mapping[str, Any], messages: list[dict[str, Any]]) -> bool:
    """Puts a row's system text before its messages; returns whether there was one to put there."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise RowError("form", f"has a {type(system).__name__} as its system; expected a text")
    if system is None or not system.strip():
        return False
    if messages and messages[0]["role"] == "system":
        told = "".join(part.get("text", "") for part in messages[0]["content"])
        if told.strip() != system.strip():
            raise RowError("roles", "has a system text and a first turn of the system that says something else")
        return False
    messages.insert(0, {"role": "system", "content": text_parts(system)})
    return True


def _put_first(messages: list[dict[str, Any]], count: int) -> list[None]:
    """Puts places of images before the first question, as TRL has it; returns a list with None for each."""
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is None:
        return []
    first["content"] = [{"type": "image"}] * count + first["content"]
    return [None] * count


def _stripped(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the parts of a message that is no question; the blanks around it are the template's."""
    if any(part["type"] == "image" for part in parts):
        return arranged(parts)
    text = "".join(part["text"] for part in parts).strip()
    return [{"type": "text", "text": text}] if text else []


def _check_text(messages: list[dict[str, Any]]) -> None:
    """Refuses what tokenizers do not take: halves of characters, where a text was cut within one."""
    for number, message in enumerate(messages):
        for part in message["content"]:
            if part["type"] == "text" and encodable(part["text"]) != part["text"]:
                raise RowError("form", f"message {number} is no text in Unicode: {part['text'][:80]!r}")


def _check_turns(messages: list[dict[str, Any]]) -> None:
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for number, message in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if message["role"] != expected:
            raise RowError("roles", f"turn {number} is of the {message['role']}; expected the {expected}")
        if expected == "user":
            continue
        if any(part["type"] == "image" for part in message["content"]):
            raise RowError("placeholders", f"turn {number}, an answer, has a picture")
        if not message["content"]:
            raise RowError("empty answer", f"turn {number} of the assistant is empty")
    if not turns or len(turns) % 2:
        raise RowError("roles", "ends without an answer")


__all__ = [
    "Conversation",
    "RowError",
    "arranged",
    "is_conversation",
    "located",
    "read_conversation",
    "refuse_unread_fields",
    "row_pictures",
    "text_parts",
]
