# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found: every answer with its scores, the metrics, and what could not be evaluated."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..authoring.older_names import public_name
from ..reading.provenance import without_places
from .page import render_page
from .questions import Unusable
from .scored import TITLES, ScoredAnswer
from .scoring import Metric, mean_scores


# How many rows that could not be evaluated are told in lines of text; `to_dict` and the page tell all.
_MOST_LINES = 20


@dataclass
class EvaluationReport:
    """What [`evaluate`] returns.

    Attributes:
        checkpoint (`str`): The name of what was evaluated.
        dataset (`str`): The name of the questions.
        answers (`list[ScoredAnswer]`): Every question with its answer, in the order of the rows.
        unusable (`list[Unusable]`): Rows that could not be evaluated, with the reason; in no metric.
        num_rows (`int`): How many rows were read.
        settings (`dict`): What else decides the answers: `max_new_tokens`, `batch_size`, `dtype`, `device`;
            of experts with a limited capacity also `eval_capacity_factor` and `eval_capacity_over`, `"row"` or
            `"batch"`.
        seconds (`float`): How long the answers took.
        places (`list[str]`): The folders of pictures, which are left out of paths in what is written.
        metrics (`dict[str, Metric]`): The metrics by name; those of a kind of question that is not there are left out.
    """

    checkpoint: str
    dataset: str
    answers: list[ScoredAnswer]
    unusable: list[Unusable]
    num_rows: int
    settings: dict[str, Any]
    seconds: float
    places: list[str] = field(default_factory=list)
    metrics: dict[str, Metric] = field(init=False)

    def __post_init__(self):
        self.metrics = mean_scores([(answer.question.kind, answer.scores) for answer in self.answers])

    @property
    def wrong(self) -> list[ScoredAnswer]:
        """The answers that are not right, in the order of the rows."""
        return [answer for answer in self.answers if not answer.is_right]

    @property
    def num_cut_off(self) -> int:
        """How many answers were cut off; above a few, `max_new_tokens` is too small or the model does not end."""
        return sum(answer.cut_off for answer in self.answers)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON; of paths on this machine, their ends."""
        fields = {
            "checkpoint": public_name(self.checkpoint),
            "dataset": self.dataset,
            "metrics": {name: _rounded(dataclasses.asdict(metric)) for name, metric in self.metrics.items()},
            "num_rows": self.num_rows,
            "num_questions": len(self.answers),
            "num_cut_off": self.num_cut_off,
            "settings": self.settings,
            "seconds": round(self.seconds, 2),
            "unusable": [dataclasses.asdict(row) for row in self.unusable],
            "rows": [answer.to_dict() for answer in self.answers],
        }
        return without_places(fields, self.places)

    def for_card(self) -> list[dict[str, Any]]:
        """Returns the metrics for a model card: `dataset`, `metric` (a title) and `value`; also `low`, `high`, `n`."""
        return [
            {"dataset": self.dataset, "metric": TITLES[name], **_rounded(_numbers(metric))}
            for name, metric in self.metrics.items()
            if not name.startswith("published")
        ]

    def lines(self) -> list[str]:
        """Returns the metrics as lines of text, and what else a reader has to know."""
        width = max(len(title) for title in TITLES.values())
        lines = [
            f"{TITLES[name]:{width}}  {100 * metric.value:5.1f} %  ({100 * metric.low:.1f} to {100 * metric.high:.1f}; "
            f"{metric.n} {metric.kind})"
            for name, metric in self.metrics.items()
        ]
        if "eval_capacity_factor" in self.settings:
            over = self.settings["eval_capacity_over"]
            depends = ", so answers depend on the batch size" if over == "batch" else ""
            lines.append(
                f"The experts' capacity was limited (eval_capacity_factor {self.settings['eval_capacity_factor']}), "
                f"counted per {over}{depends}."
            )
        if self.num_cut_off:
            limit = self.settings["max_new_tokens"]
            lines.append(f"{self.num_cut_off} of {len(self.answers)} answers were cut off after {limit} tokens.")
        if self.unusable:
            lines.append(
                f"{len({fault.row for fault in self.unusable})} of {self.num_rows} rows could not be evaluated:"
            )
            lines += [f"  row {fault.row} {fault.reason}." for fault in self.unusable[:_MOST_LINES]]
            if len(self.unusable) > _MOST_LINES:
                lines.append(f"  and {len(self.unusable) - _MOST_LINES} more.")
        return lines

    def save_html(self, path: str | os.PathLike, limit: int = 500) -> Path:
        """Writes the metrics and the wrong answers with their pictures as a page: one file that needs no other.

        Args:
            path (`str` or `os.PathLike`): The file.
            limit (`int`, *optional*, defaults to 500): How many wrong answers are shown at most.
        """
        path = Path(path)
        # Unpaired surrogates, which JSON can hold, have no place in UTF-8.
        path.write_text(render_page(self, limit), encoding="utf-8", errors="replace")
        return path


def _numbers(metric: Metric) -> dict[str, Any]:
    return {"value": metric.value, "low": metric.low, "high": metric.high, "n": metric.n}


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


__all__ = ["EvaluationReport"]
