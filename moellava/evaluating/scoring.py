# SPDX-License-Identifier: Apache-2.0
"""What an answer scores against the true one, and how sure the mean of many scores is.

Answers are compared word by word. Which words, `words` says: the rules are those of the VQA benchmark (Antol et al.
2015, arXiv:1505.00468; its published evaluation code), which LLaVA-Med (arXiv:2306.00890) and Med-MoE
(arXiv:2404.10237) evaluate by.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .choices import chosen, label_of, letters_of, split_choice, stated_letter
from .comparing import says, words


CLOSED, OPEN = "closed", "open"

# What is measured of each kind of question; the last of each kind only for comparison with published tables.
METRICS = {
    CLOSED: ("accuracy", "published_accuracy"),
    OPEN: ("exact_match", "f1", "recall", "published_recall"),
}
_PROPORTIONS = ("accuracy", "published_accuracy", "exact_match")

_CONFIDENCE = 0.95
_RESAMPLES = 2000


def score(expected: str, answer: str, kind: str, choices: Mapping[str, str] | None = None) -> dict[str, float]:
    """Scores an answer, each score from 0 to 1.

    - `accuracy` of a closed question. Yes or no: the first `yes` or `no` among the answer's words is the expected one.
      With choices: the answer names the right one and no other, by its letter or by its text. One letter without
      them: the answer states that letter (see [`stated_letter`]); several ("A, C"): it is the same letters. Else: the
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
        choices (`Mapping[str, str]`, *optional*): Of multiple choice, the texts by their letters; the true answer is
            one of the two.

    Raises:
        ValueError: Another kind, or the expected answer has no words or is none of the choices.
    """
    if kind not in METRICS:
        raise ValueError(f"The kind of the question is {kind!r}; expected {CLOSED!r} or {OPEN!r}.")
    true, said = words(expected), words(answer)
    if not true and not choices:
        raise ValueError(f"The expected answer {expected!r} has no words to compare with.")
    if kind == CLOSED:
        return {
            "accuracy": float(_is_right(expected, answer, choices)),
            "published_accuracy": float(expected.strip().lower() in answer.lower()),
        }
    true_counts, said_counts = Counter(true), Counter(said)
    common = (true_counts & said_counts).total()
    hits = sum(said_counts[word] for word in true_counts)
    missed = sum(count for word, count in true_counts.items() if word not in said_counts)
    return {
        "exact_match": float(true == said),
        "f1": 2 * common / max(1, len(true) + len(said)),
        "recall": common / max(1, len(true)),
        "published_recall": hits / max(1, hits + missed),
    }


def _is_right(expected: str, answer: str, choices: Mapping[str, str] | None) -> bool:
    if choices:
        right = label_of(expected, choices)
        if right is None:
            raise ValueError(f"The expected answer {expected!r} is none of the choices {dict(choices)}.")
        return chosen(answer, choices) == right
    true, said = words(expected), words(answer)
    if true in (["yes"], ["no"]):
        return next((word for word in said if word in ("yes", "no")), None) == true[0]
    if several := letters_of(expected):
        return letters_of(answer) == several
    letter, text = split_choice(expected)
    if letter is not None:
        stated = stated_letter(answer, letter)
        return stated == letter or (stated is None and bool(text) and says(said, words(text)))
    return says(said, true)


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
