# SPDX-License-Identifier: Apache-2.0
"""The words of an answer, and whether some of them are said: the rules of the VQA benchmark (Antol et al. 2015,
arXiv:1505.00468; its published evaluation code)."""

import re
import unicodedata


_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_BETWEEN_DIGITS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NO_DECIMAL_POINT = re.compile(r"(?<!\d)\.|\.(?!\d)")
# Scripts that put no blanks between words: Chinese, Japanese, Thai, Lao, Burmese, Khmer.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# An A that is a name, not an article: "type A dissection", "vitamin A".
_NAME_A = re.compile(r"(?<=\w[ -])(?:A(?!\w)|a(?=\W*\Z))")
_LAST_A = re.compile(r"(?<=\w[ -])[Aa](?=\W*\Z)")
_KEPT_A = "\ue000"
# What denies the word behind it, in English, Chinese and Thai: 不是 does not say 是, nor 没有 有.
_DENYING_WORDS = ("no", "not", "non", "isnt", "neither", "nor", "without")
_DENIALS = (*"不没沒無无非未", "ไม่")
# What denies the Japanese word before it: 肺炎ではない.
_DENIED = re.compile("(?:では|じゃ|は|が|も)?(?:な[いくし]|(?:あり|見られ|みられ|認め)ません)")


def words(text: str) -> list[str]:
    """Returns the words of an answer, as they are compared.

    In lower case; `zero` to `ten` and `none` as digits; without the articles `a`, `an` and `the`, unless nothing else
    is there (the A of "type A" is none); without apostrophes (`don't` is `dont`) and commas within numbers. The point
    of a decimal number and the per cent sign stay. All other punctuation separates words: `X-ray` is two.
    """
    text = unicodedata.normalize("NFKC", text)
    text = (_LAST_A if text.isupper() else _NAME_A).sub(_KEPT_A, text).lower()
    text = _BETWEEN_DIGITS.sub("", re.sub("['\u2019]", "", text))
    text = _NO_DECIMAL_POINT.sub(" ", text)
    text = "".join(" " if unicodedata.category(sign)[0] in "PS" and sign not in ".%" else sign for sign in text)
    found = text.split()
    found = [word for word in found if word not in _ARTICLES] or found
    return [_DIGITS.get(word, word).replace(_KEPT_A, "a") for word in found]


def says(said: list[str], expected: list[str]) -> bool:
    """Whether expected words are among those said, one after the other, and no word before them denies them.

    Scripts without blanks between words have no words to compare: there the text is looked for, and not where the signs
    beside it deny it.
    """
    if not _UNSPACED.search("".join(expected)):
        places = [start for start in range(len(said)) if said[start : start + len(expected)] == expected]
        return any(not start or said[start - 1] not in _DENYING_WORDS for start in places)
    text, wanted = "".join(said), "".join(expected)
    places = [place for place in range(len(text)) if text.startswith(wanted, place)]
    return any(not text[:place].endswith(_DENIALS) and not _DENIED.match(text, place + len(wanted)) for place in places)


__all__ = ["says", "words"]
