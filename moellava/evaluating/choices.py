# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: the choices that a row gives, which of them is right, and which of them an answer names.

The evaluation code of MMMU (Yue et al. 2024, arXiv:2311.16502) looks for letters in brackets, then for letters that
stand alone, then for the texts of the choices, and guesses if it finds none. Here it is the same, but that a letter
that may be a word ("A large mass", "I think") has to be stated as an answer, and that nothing is guessed.
"""

import ast
import re
import string
import unicodedata
from collections.abc import Mapping
from typing import Any

from ..chatting.conversations import RowError
from .comparing import says, words


_NAMES = ("choices", "options")
# Letters of scripts that have capitals; those of other scripts are words here.
_ALPHABETS = (string.ascii_uppercase, "АБВГДЕЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯ", "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩ")
_WORD = "0-9A-Za-z\u00c0-\u024f\u0370-\u052f"
# What an answer is called, and what may stand between that and its letter.
_ANSWER = (
    r"answer|\bans\b\.?|antwort|respuesta|r[eé]ponse|risposta|resposta|ответ|答案|正解|答え|정답|답은|(?:ال)?[إا]جابة|"
    r"(?:ال)?جواب"
)
_OPTION = (
    r"option|choice|alternative|\bletter|choose|chose|pick|select|go with|going with|вариант|选项|選項|选择|選擇|"
    r"应选|选|選"
)
_BETWEEN = (
    r"(?:[\s:=>\"'“‘(\[–—-]|\b(?:is|be|was|would|should|must|most|likely|probably|definitely|correct|right|best|therefore|the|"
    r"letter|option|choice|answer|number|ist|es|est|è|é|la|correcta|correta|corretta|это|هي|هو|الصحيحة)\b|"
    r"[是为為はが은는])*"
)
_CORRECT = r"\)?\s+(?:is|was|ist|es|est)\s+(?:(?:the|most|likely|probably)\s+)*(?:correct|right|best|true|answer)\b"
_NOT_DENIED = r"(?!\s*(?:is|was)\s+(?:not|wrong|incorrect|false)\b)"
_THINKS = (
    r"\b(?:it|this|that|think|believe|guess|say)\b"
    r"(?:\s|['’]s\b|\b(?:it|is|was|must|be|would|should|likely|probably)\b)*"
)
# Behind a letter that may be a word: the end of the sentence, or what no noun follows.
_ENDS = re.compile(r"\s*(?:$|[).,;:!?\]\"'。、\n]|[–—-]\s|(?:because|since|is|as)\b)")
_ALONE = re.compile(r"\)?\s*(?:$|[.,;:!?\"'。、\n])")
_MAY_BE_WORDS = ("A", "I")


def read_choices(row: Mapping[str, Any]) -> dict[str, str] | None:
    """Returns the texts of a row's `choices` or `options` by their letters, or None.

    A list has the letters A, B, ...; an object its own; `{"label": [...], "text": [...]}`, as in ARC, those that it
    lists.

    Raises:
        RowError: They are of another form, or two are the same.
    """
    name = next((name for name in _NAMES if row.get(name) not in (None, "", [], {})), None)
    if name is None:
        return None
    value = row[name]
    if isinstance(value, str):  # MMMU's are lists written as text
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = row[name]
    if isinstance(value, Mapping) and {"label", "text"} <= set(value) and isinstance(value["text"], list | tuple):
        pairs = list(zip(value["label"], value["text"], strict=False))
    elif isinstance(value, Mapping):
        pairs = [(label, text) for label, text in value.items() if text is not None]
    elif isinstance(value, list | tuple) and len(value) <= len(string.ascii_uppercase):
        pairs = list(zip(string.ascii_uppercase, value, strict=False))
        if all(isinstance(entry, Mapping) for entry in value):
            pairs = [(entry.get("label", letter), entry.get("text")) for letter, entry in pairs]
    else:
        raise RowError(
            "form", f"has a {type(value).__name__} as its {name}; expected a list of texts, or texts by letter"
        )
    choices = {}
    for label, text in pairs:
        if not isinstance(text, str | int | float) or not str(text).strip():
            raise RowError("form", f"has {text!r} among its {name}; expected texts")
        choices[_trimmed(str(label)) or str(label)] = str(text).strip()
    if len(choices) != len(pairs) or len({_exact(text) for text in choices.values()}) != len(pairs):
        raise RowError("form", f"has the same twice among its {name}")
    # Texts that bring their letters.
    bare = {label: _without_label(text, label) for label, text in choices.items()}
    return bare if all(bare.values()) else choices


def right_choice(answer: Any, choices: Mapping[str, str]) -> Any:
    """Returns the true answer of a row with choices: as it is a letter or a text, of an index (from 0) the text.

    Raises:
        RowError: It is none of the choices, or one by its text and another by its letter or index.
    """
    if not isinstance(answer, str | int | float) or not str(answer).strip():
        return answer
    text = str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer).strip()
    named = label_of(text, choices)
    labels = list(choices)
    if re.fullmatch(r"-?\d+", text) and not any(label.isdigit() for label in labels):
        if 0 <= int(text) < len(labels):
            by_index = labels[int(text)]
            if named not in (None, by_index):
                raise RowError("form", f"has the answer {text}, one of its choices and the index of another")
            return choices[by_index]
        if named is None:
            raise RowError("form", f"has the answer {text}; expected an index from 0 to {len(labels) - 1}")
    if named is None:
        listed = "; ".join(f"{label}: {choice}" for label, choice in choices.items())
        raise RowError("form", f"has the answer {text!r}, which is none of its choices ({listed})")
    return text


def label_of(answer: str, choices: Mapping[str, str]) -> str | None:
    """Returns the letter of the choice that a true answer is, by letter, by text or by both ("B. left"), or None.

    Raises:
        RowError: It is the text of one and the letter of another.
    """
    by_text = _by_text(answer, choices)
    by_label = next((label for label in choices if label.casefold() == _trimmed(answer).casefold()), None)
    if by_label is None:
        by_label = next(
            (
                label
                for label, text in choices.items()
                if (bare := _without_label(answer, label)) and _comparable(bare) == _comparable(text)
            ),
            None,
        )
    if None not in (by_text, by_label) and by_text != by_label:
        raise RowError("form", f"has the answer {answer!r}, the text of one of its choices and the letter of another")
    return by_text if by_text is not None else by_label


def chosen(answer: str, choices: Mapping[str, str]) -> str | None:
    """Returns the letter of the choice that an answer names, or None if it names none or several.

    In this order: the answer is the text of a choice; it states a letter; it has the text of one choice in it, and of
    no other but such as lie within that one.
    """
    if (label := _by_text(answer, choices)) is not None:
        return label
    letter = _stated(answer, list(choices))
    if letter is not None:
        return letter
    said, texts = words(answer), {label: words(text) for label, text in choices.items()}
    if sorted(texts.values()) == [["no"], ["yes"]]:
        first = next((word for word in said if word in ("yes", "no")), None)
        return next((label for label, text in texts.items() if text == [first]), None)
    found = [label for label, text in texts.items() if text and says(said, text)]
    found = [
        label for label in found
        if not any(other != label and says(texts[other], texts[label]) for other in found)
    ]  # fmt: skip
    return found[0] if len(found) == 1 else None


def split_choice(expected: str) -> tuple[str | None, str]:
    """Returns the capital letter and the text of a true answer such as "B", "(b)", "**B**" or "B. left", else None."""
    letter = _trimmed(expected).upper()
    if len(letter) == 1 and _alphabet(letter):
        return letter, ""
    marked = re.match(r"\s*\(?([A-Z])[).:]\s+(?=\S)", _plain(expected))
    return (marked[1], _plain(expected)[marked.end() :]) if marked else (None, "")


def letters_of(text: str) -> set[str]:
    """Returns the letters of a text that is nothing but several capitals ("A, C", "(A) and (C)"), else none."""
    letter, between = r"\(?[A-Z]\)?", r"\s*(?:,|;|/|&|\+|\band\b|\s)\s*(?:and\s+)?"
    is_several = re.fullmatch(rf"{letter}(?:{between}{letter})+[.]?", _plain(text).strip())
    return set(re.findall(r"\b[A-Z]\b", _plain(text))) if is_several else set()


def stated_letter(answer: str, like: str = "A") -> str | None:
    """Returns the capital letter that an answer states, of the alphabet that `like` is of, or None.

    It is stated if it is the whole answer ("b", "(B)", "**B**"); begins it with a mark behind ("B. text", "b) text");
    is what the answer, an option or a choice is said to be ("The answer is B", "Option B", "I think it is C", "B is
    correct"); stands in brackets, and no other does; begins it as a capital ("B because"), but for A and I, which may
    be words; or is its last sentence. Two that are named together ("A or B") are none.
    """
    return _stated(answer, list(_alphabet(like)))


def _stated(answer: str, labels: list[str]) -> str | None:
    text = _plain(answer).strip()
    either = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    label = rf"(?<![{_WORD}])(?<![{_WORD}][-'’])({either})(?![{_WORD}]|[-'’][{_WORD}])"
    second = "|".join(re.escape(name) for name in labels if name.upper() not in _MAY_BE_WORDS) or "(?!)"
    together = re.compile(
        rf"\)?\s*(?:or\b|and\b|&|/|,|或|和)\s*\(?(?:(?:{second})(?![{_WORD}'’-])|(?:{either})\s*(?:$|[).,;:/\]]))"
        rf"|\s+(?:{either})\s*$"
    )

    def found(pattern: str) -> list[re.Match]:
        matches = re.finditer(pattern, text, re.IGNORECASE)
        return [match for match in matches if not together.match(text[match.end(1) :])]

    def named(matches: list[re.Match]) -> set[str]:
        return {match[1].casefold() for match in matches}

    def is_no_word(match: re.Match) -> bool:
        is_capital = match[1].isupper() and match[1] not in _MAY_BE_WORDS
        return is_capital or not match[1].isalpha() or _ENDS.match(text[match.end(1) :]) is not None

    by_answer = [match for match in found(rf"(?:{_ANSWER}){_BETWEEN}{label}") if is_no_word(match)]
    options = [match for match in found(rf"(?:{_OPTION}){_BETWEEN}{label}") if is_no_word(match)]
    options += found(rf"{label}(?:{_CORRECT}|\s*(?:选项|選項|是?正确|是?正確|是对的))")
    thoughts = [
        match for match in found(rf"{_THINKS}\s\(?{label}")
        if not match[1].islower() and _ALONE.match(text[match.end(1) :])
    ]  # fmt: skip
    begins = rf"\A[\W_]*{label}"
    marked = found(rf"{begins}\s*(?:[):\]。、]|\.(?=\s|$|(?-i:[A-Z])|[a-z]{{2}}|[^\x00-\x7f])|\s[–—-]+\s|\n)")
    marked += [match for match in found(rf"{begins}[,;]\s") if match[1].isupper() and match[1] != "I"]
    leading = [
        match for match in found(rf"{begins}\s{_NOT_DENIED}") if match[1].isupper() and match[1] not in _MAY_BE_WORDS
    ]  # fmt: skip
    last = found(rf"(?:[\n.!?:;。]\s*|\A)(?:(?:so|thus|hence|therefore|then)[\s,:]+)?\(?{label}\)?[.!。]?\s*\Z")
    ways = (
        named(found(rf"\A[\W_]*{label}[\W_]*\Z")),
        named(marked),
        named(by_answer[-1:]),
        named(options) or named(thoughts),
        named(found(rf"(?<![{_WORD}])[(\[]{label}[)\]]")),
        named(leading),
        named([match for match in last if not match[1].islower()]),
    )
    for names in ways:
        if len(names) == 1:
            (name,) = names
            return next(label for label in labels if label.casefold() == name)
        if names:
            return None
    return None


def _alphabet(letter: str) -> str:
    """Returns the capital letters of the alphabet that a letter is of, or nothing."""
    return next((letters for letters in _ALPHABETS if letter.upper() in letters), "")


def _plain(text: str) -> str:
    """Returns a text without what sets it off: emphasis, tags, boxes, letters of full width."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"\\(?:boxed|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:boxed|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"</?[A-Za-z]+>", " ", re.sub(r"[*`$]|__", "", text))


def _trimmed(text: str) -> str:
    """Returns a text without the marks around it."""
    return re.sub(r"\A[\W_]+|[\W_]+\Z", "", _plain(text))


def _without_label(text: str, label: str) -> str:
    """Returns a text behind its letter, or nothing if it does not bring that."""
    marked = re.match(rf"\s*\(?{re.escape(label)}\s*[).:]+\s*(?=\S)", _plain(text), re.IGNORECASE)
    return _plain(text)[marked.end() :].strip() if marked else ""


def _by_text(answer: str, choices: Mapping[str, str]) -> str | None:
    """Returns the letter of the choice whose text an answer is: to the sign, or else by its words, as no other's."""
    found = [label for label, text in choices.items() if _exact(text) == _exact(answer)]
    found = found or [label for label, text in choices.items() if _comparable(text) == _comparable(answer)]
    return found[0] if len(found) == 1 else None


def _exact(text: str) -> str:
    """Returns a text with its signs ("<5", "-1"), but for those that end a sentence."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.rstrip(" .,;:!?") or text


def _comparable(text: str) -> tuple[str, ...]:
    return tuple(words(text)) or (_exact(text),)


__all__ = ["chosen", "label_of", "letters_of", "read_choices", "right_choice", "split_choice", "stated_letter"]
