# SPDX-License-Identifier: Apache-2.0
"""An answer with its scores, and what the metrics are called."""

import os
from dataclasses import dataclass, field
from typing import Any

from .questions import Question
from .scoring import CLOSED, score


# What the metrics are called where people read them.
TITLES = {
    "accuracy": "Accuracy",
    "published_accuracy": "Accuracy as Med-MoE's script counts",
    "exact_match": "Exact match",
    "f1": "Token F1",
    "recall": "Token recall",
    "published_recall": "Token recall as LLaVA-Med's script counts",
}


@dataclass(frozen=True)
class ScoredAnswer:
    """A question with the model's answer and its scores.

    Attributes:
        question (`Question`): The question.
        answer (`str`): The model's answer.
        cut_off (`bool`): Whether the answer was as long as it may be, and not ended by the model.
        scores (`dict[str, float]`): The scores by name, from 0 to 1; which, the question's kind says.
    """

    question: Question
    answer: str
    cut_off: bool
    scores: dict[str, float] = field(init=False)

    def __post_init__(self):
        scores = score(self.question.expected, self.answer, self.question.kind, self.question.choices)
        object.__setattr__(self, "scores", scores)  # the way to compute a field of a frozen dataclass

    @property
    def is_right(self) -> bool:
        """Whether a closed question has the right answer, an open one exactly the expected words."""
        return self.scores["accuracy" if self.question.kind == CLOSED else "exact_match"] == 1

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return {
            "row": self.question.row,
            "id": self.question.id,
            "question": self.question.text,
            "pictures": [picture_name(picture) for picture in self.question.pictures],
            "expected": self.question.expected,
            "answer": self.answer,
            "kind": self.question.kind,
            **({} if self.question.choices is None else {"choices": self.question.choices}),
            "cut_off": self.cut_off,
            "scores": {name: round(value, 4) for name, value in self.scores.items()},
        }


def picture_name(picture: Any) -> str:
    """What a picture of a question is called: its path, or the name that it brings, if any."""
    if isinstance(picture, dict):
        return picture.get("path") or "picture"
    return str(picture) if isinstance(picture, str | os.PathLike) else getattr(picture, "filename", "") or "picture"


__all__ = ["TITLES", "ScoredAnswer", "picture_name"]
