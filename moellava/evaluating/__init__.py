# SPDX-License-Identifier: Apache-2.0
"""Evaluating a checkpoint: its answers to questions whose true answers are known, scored as medical benchmarks do."""

from .evaluation import evaluate
from .report import EvaluationReport
from .scored import ScoredAnswer
from .scoring import Metric, score


__all__ = ["EvaluationReport", "Metric", "ScoredAnswer", "evaluate", "score"]
