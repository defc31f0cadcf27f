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
"""What an answer scores against the true one, and how sure the mean of many scores is.

Answers are compared word by word. Which words, `words` says: the rules are those of the VQA benchmark (Antol et al.
2015, arXiv:1505.00468; its published evaluation code), which LLaVA-Med (arXiv:2306.00890) and Med-MoE
(arXiv:2404.10237) evaluate by.
"""

import math
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


CLOSED, OPEN = "closed", "open"

# What is measured of each kind of question; the last of each kind only for comparison with published tables.
METRICS = {
    CLOSED: ("accuracy", "published_accuracy"),
    OPEN: ("exact_match", "f1", "recall", "published_recall"),
}
_PROPORTIONS = ("accuracy", "published_accuracy", "exact_match")

_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_BETWEEN_DIGITS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NO_DECIMAL_POINT = re.compile(r"(?<!\d)\.|\.(?!\d)")
_LETTER = re.compile(r"\W*([A-Za-z])(?:\W|$)")

_CONFIDENCE = 0.95
_RESAMPLES = 2000


def words(text: str) -> list[str]:
    """Returns the words of an answer, as they are compared.

    In lower case; `zero` to `ten` and `none` as digits; without the articles `a`, `an` and `the`, unless nothing else
    is there; without apostrophes (`don't` is `dont`) and commas within numbers. The point of a decimal number and the
    per cent sign stay. All other punctuation separates words: `X-ray` is two.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = _BETWEEN_DIGITS.sub("", re.sub("['\u2019]", "", text))
    text = _NO_DECIMAL_POINT.sub(" ", text)
    text = "".join(" " if unicodedata.category(sign)[0] in "PS" and sign not in ".%" else sign for sign in text)
    found = text.split()
    return [_DIGITS.get(word, word) for word in found if word not in _ARTICLES] or found


def score(expected: str, answer: str, kind: str) -> dict[str, float]:
    """Scores an answer, each score from 0 to 1.

    - `accuracy` of a closed question. Yes or no: the first `yes` or `no` among the answer's words is the expected one.
      One letter, of multiple choice: the answer begins with that letter, alone or before punctuation. Else: the
      expected words stand in the answer, one after the other.
    - `exact_match` of an open question: the same words in the same order.
    - `recall`: the share of the expected words that the answer has; `f1`: the harmonic mean of that and the share of
      the answer's words that are expected. A word counts as often as it stands in both, as for SQuAD (Rajpurkar et al.
      2016, arXiv:1606.05250).
    - `published_accuracy`: the expected text stands anywhere in the answer, in lower case, be it within a word, as
      Med-MoE's script counts. "No" is right there wherever "not" or "nodule" is said.
    - `published_recall`: as LLaVA-Med's and Med-MoE's scripts count. It differs from `recall` where an answer repeats
      words: each of an expected word's places in the answer is a hit.

    Args:
        expected (`str`): The true answer.
        answer (`str`): The answer to score.
        kind (`str`): `"closed"` or `"open"`.

    Raises:
        ValueError: Another kind, or the expected answer has no words.
    """
    if kind not in METRICS:
        raise ValueError(f"The kind of the question is {kind!r}; expected {CLOSED!r} or {OPEN!r}.")
    true, said = words(expected), words(answer)
    if not true:
        raise ValueError(f"The expected answer {expected!r} has no words to compare with.")
    if kind == CLOSED:
        return {
            "accuracy": float(_is_right_choice(expected, true, answer, said)),
            "published_accuracy": float(expected.strip().lower() in answer.lower()),
        }
    true_counts, said_counts = Counter(true), Counter(said)
    common = (true_counts & said_counts).total()
    hits = sum(said_counts[word] for word in true_counts)
    missed = sum(count for word, count in true_counts.items() if word not in said_counts)
    return {
        "exact_match": float(true == said),
        "f1": 2 * common / (len(true) + len(said)),
        "recall": common / len(true),
        "published_recall": hits / (hits + missed),
    }


def _is_right_choice(expected: str, true: list[str], answer: str, said: list[str]) -> bool:
    if true in (["yes"], ["no"]):
        return next((word for word in said if word in ("yes", "no")), None) == true[0]
    if len(expected.strip(" .()")) == 1 and expected.strip(" .()").isalpha():
        letter = _LETTER.match(answer)
        return letter is not None and letter[1].lower() == expected.strip(" .()").lower()
    return any(said[start : start + len(true)] == true for start in range(len(said) - len(true) + 1))


@dataclass(frozen=True)
class Metric:
    """The mean of a score over all questions of its kind.

    Attributes:
        value (`float`): The mean, from 0 to 1.
        low, high (`float`): The 95 % confidence interval.
        n (`int`): The number of questions.
        kind (`str`): The questions' kind, `"closed"` or `"open"`.
        interval (`str`): How the interval is computed, `"Wilson"` or `"bootstrap"`.
    """

    value: float
    low: float
    high: float
    n: int
    kind: str
    interval: str


def mean_scores(scores: Sequence[tuple[str, dict[str, float]]]) -> dict[str, Metric]:
    """Returns the metrics of scored questions, by name; a kind of which there is none has none.

    Args:
        scores (`Sequence`): For every question its kind and its scores, as [`score`] returns them.
    """
    metrics = {}
    for kind, names in METRICS.items():
        for name in names:
            values = [scored[name] for of, scored in scores if of == kind]
            if not values:
                continue
            way, bounds = ("Wilson", wilson) if name in _PROPORTIONS else ("bootstrap", bootstrap)
            metrics[name] = Metric(statistics.fmean(values), *bounds(values), len(values), kind, way)
    return metrics


def wilson(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % score interval of a proportion (Wilson 1927, J. Am. Stat. Assoc. 22, p. 209).

    With `p` the share of ones among `n` values and `z` the normal quantile: `(p + z^2/2n -+ z sqrt(p(1-p)/n +
    z^2/4n^2)) / (1 + z^2/n)`. Unlike `p -+ z sqrt(p(1-p)/n)` it stays within 0 and 1, and means something at both ends.
    """
    n, p = len(values), statistics.fmean(values)
    z = statistics.NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
    center, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((center + side * half) / (1 + z**2 / n) for side in (-1, 1))
    # Where all values are the same, one end is p; rounding must not put it on the other side.
    return max(0.0, min(low, p)), min(1.0, max(high, p))


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of a mean (Efron 1979, Ann. Stat. 7, p. 1).

    The mean is taken of 2000 draws, with replacement, of as many values as there are; the interval is between their
    2.5th and their 97.5th percentile. The seed is fixed: the same scores get the same interval.
    """
    values, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [generator.choice(values, size=len(values)).mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)


__all__ = ["CLOSED", "METRICS", "OPEN", "Metric", "bootstrap", "mean_scores", "score", "wilson", "words"]
