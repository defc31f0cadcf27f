# SPDX-License-Identifier: Apache-2.0
"""`evaluate`: one call from a checkpoint and a file of questions to a report."""

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..authoring.load_request import read_request
from ..configuration import MoellavaConfig
from ..converting import is_legacy
from ..loading import LoadedModel, load_pretrained_model
from ..reading.sources import Source
from .answering import Answer, answer_questions
from .questions import QuestionSet, Unusable, read_questions
from .report import EvaluationReport
from .scored import ScoredAnswer


logger = logging.getLogger(__name__)


def evaluate(
    checkpoint: str | os.PathLike | LoadedModel,
    data: str | os.PathLike | Iterable[Mapping[str, Any]],
    *,
    image_folder: str | os.PathLike | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    limit: int | None = None,
    as_written: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **load_options,
) -> EvaluationReport:
    r"""
    Asks a checkpoint questions whose true answers are known, and scores what it says.

    Closed questions (yes or no, or a choice) are scored by accuracy; open ones by exact match, and by the F1 and the
    recall of their words. `docs/evaluating.md` says how each is counted. Answers are never sampled: the same questions
    get the same answers.

    Args:
        checkpoint (`str`, `os.PathLike` or `LoadedModel`):
            The checkpoint, as a folder or a Hub id, or what `load_pretrained_model` returns.
        data (`str`, `os.PathLike` or iterable):
            A `.json` or `.jsonl` file of questions, or rows: a list of dictionaries, a `datasets.Dataset`. LLaVA's
            conversations, and rows of VQA-RAD, SLAKE, PathVQA and of LLaVA-Med's question files are known by their
            fields.
        image_folder (`str` or `os.PathLike`, *optional*): Where the pictures are that rows name. Defaults to the file's
            folder.
        batch_size (`int`, *optional*, defaults to 8): How many questions are answered together. Changes no answer.
        max_new_tokens (`int`, *optional*, defaults to 128): The length of an answer at most, in tokens.
        limit (`int`, *optional*): How many rows to evaluate, from the first.
        as_written (`bool`, *optional*, defaults to `False`): Whether questions stay as they are in the rows, their
            images where they stand: for models that were trained so.
        device, dtype (*optional*): Where and in which precision the checkpoint is loaded.
        load_options: The other arguments of `load_pretrained_model`: `revision`, `load_4bit`, `model_base`, ...

    Returns:
        [`EvaluationReport`]: The metrics with their intervals, every answer with its scores, and the rows that could
        not be evaluated, which are in no metric.

    Raises:
        FileNotFoundError: There is no such file, folder or checkpoint.
        TypeError: `data` is neither a path nor rows, or a loaded model comes with options for loading.
        ValueError: A number is below 1, no row can be evaluated, or the checkpoint is none that answers questions about
            pictures. No weight has been read by then, unless it shows only in pictures or in the prompts' length.

    Example:

    ```python
    >>> from moellava import evaluate

    >>> report = evaluate("my-model", "vqa-rad/test.json", image_folder="vqa-rad/images")
    >>> print(*report.lines(), sep="\n")
    >>> report.save_html("wrong-answers.html")
    ```"""
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected a number of at least 1.")
    is_loaded = isinstance(checkpoint, LoadedModel)
    options = {"device": device, "dtype": dtype, **load_options}
    given = {name: value for name, value in options.items() if value is not None}
    if is_loaded and given:
        raise TypeError(
            f"The model is loaded already, and {', '.join(given)} would have to be known before. Give the checkpoint's "
            "path, or leave it out."
        )
    if not is_loaded:
        _check_answers(checkpoint, given)
    questions = read_questions(data, image_folder, limit, as_written)
    loaded = checkpoint if is_loaded else load_pretrained_model(checkpoint, **given)
    model = loaded.model.eval()
    started = time.perf_counter()
    answers = answer_questions(model, loaded.context_len, questions.questions, batch_size, max_new_tokens)
    seconds = time.perf_counter() - started
    scored, unusable = _scored(questions, answers)
    return EvaluationReport(
        checkpoint=model.name_or_path or type(model).__name__ if is_loaded else os.fspath(checkpoint),
        dataset=questions.name,
        answers=scored,
        unusable=unusable,
        num_rows=questions.num_rows,
        settings={
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            **({"as_written": True} if as_written else {}),
            **_capacity(model.config),
        },
        seconds=seconds,
        places=_places(questions),
    )


def _capacity(config: MoellavaConfig) -> dict[str, Any]:
    """Says where experts take a limited number of tokens, and so drop some, and what that number is counted over."""
    moe = config.moe_config
    if moe is None or moe.eval_capacity_factor is None:
        return {}
    over = "row" if moe.eval_capacity_per_row else "batch"
    return {"eval_capacity_factor": moe.eval_capacity_factor, "eval_capacity_over": over}


def _places(questions: QuestionSet) -> list[str]:
    """Returns the folders that pictures lie in."""
    paths = [picture for question in questions.questions for picture in question.pictures]
    folders = {os.path.dirname(path) for path in paths if isinstance(path, str | os.PathLike) and os.path.isabs(path)}
    common = os.path.commonpath(folders) if folders else ""
    return [questions.folder, *([common] if len(common) > 1 else [])]


def _scored(questions: QuestionSet, answers: Sequence[Answer | str]) -> tuple[list[ScoredAnswer], list[Unusable]]:
    """Returns the answers with their scores, and the rows that could not be evaluated, of which is warned."""
    scored, unusable = [], list(questions.unusable)
    for question, answer in zip(questions.questions, answers, strict=True):
        if isinstance(answer, str):
            unusable.append(Unusable(question.row, answer))
        else:
            scored.append(ScoredAnswer(question, answer.text, answer.cut_off))
    unusable.sort(key=lambda fault: fault.row)
    if unusable:
        logger.warning(
            "%d of %d rows of %s could not be evaluated and are left out: the report tells why.",
            len({fault.row for fault in unusable}), questions.num_rows, questions.name,
        )  # fmt: skip
    if not scored:
        raise ValueError(
            f"No row of {questions.name} can be evaluated ({questions.num_rows} read): row {unusable[0].row} "
            f"{unusable[0].reason}."
        )
    return scored, unusable


def _check_answers(checkpoint: str | os.PathLike, options: Mapping[str, Any]) -> None:
    """Refuses what `load_pretrained_model` would make a new, untrained model of."""
    request = read_request(checkpoint, options)
    if request.model_base is not None:
        return
    source = Source(request.model_path, request.hub_options)
    fields = source.config_dict()
    if fields["model_type"] != MoellavaConfig.model_type and not is_legacy(fields):
        raise ValueError(
            f"{source} is a model of type {fields['model_type']!r}, not a checkpoint of this package, so that it "
            "cannot be evaluated. A language model becomes one by `moellava assemble`, and by training."
        )


__all__ = ["evaluate"]
