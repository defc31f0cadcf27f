# SPDX-License-Identifier: Apache-2.0
"""Renders a checkpoint's model card: its metadata and its text."""

import os
import re
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants
from transformers.utils.quantization_config import QuantizationMethod

from ..formatting import number_text, size_text
from ..reading.provenance import UPCYCLED
from ..reading.sources import Source
from .citing import citations
from .facts import CardFacts, code, linked, plain, read_facts


TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"
# As long as this line is in a card, the card is written anew.
MARKER = "<!-- Written by moellava, and anew at every save and push. Delete this line to keep what you write here. -->"
PIPELINE_TAG = "image-text-to-text"
_RESULT_FIELDS = ("dataset", "metric", "value")
_RESULT_OPTIONS = ("dataset_id", "split", "low", "high", "n")
_SPREAD = ("low", "high", "n")  # kept as the metric's `args`, where the Hub's metadata has room for them


def render_card(
    checkpoint: str | os.PathLike,
    *,
    repo_id: str | None = None,
    evaluation: list[dict[str, Any]] | None = None,
    **hub_options,
) -> ModelCard:
    r"""
    Returns the model card of a saved checkpoint, from its config and the headers of its weights.

    Args:
        checkpoint (`str` or `os.PathLike`): A folder or a Hub id.
        repo_id (`str`, *optional*): The Hub id that the card's code loads. Defaults to `checkpoint`, of a folder to
            its name.
        evaluation (`list[dict]`, *optional*): What was measured: each entry has `dataset`, `metric` and `value`, and
            may have a `split`, the dataset's Hub id as `dataset_id`, the ends of an interval as `low` and `high`, and
            the number of questions as `n` (what `EvaluationReport.for_card` returns). By default what the checkpoint's
            present card says, where this package wrote it, as the weights are the same; `[]` for none.
        hub_options: `revision`, `token`, `cache_dir` and `local_files_only`, as in transformers' `from_pretrained`.

    Raises:
        FileNotFoundError: A path that does not exist, or a checkpoint without weights.
        OSError: A Hub repository that does not exist, cannot be reached or may not be read.
        TypeError: `evaluation` is no list of dictionaries.
        ValueError: A folder that is no checkpoint of this package, or an entry of `evaluation` without what it needs.

    Example:

    ```python
    >>> from moellava.hub_cards import render_card

    >>> card = render_card("my-model", repo_id="me/my-model")
    >>> card.data.pipeline_tag
    'image-text-to-text'
    ```"""
    source = Source(checkpoint, hub_options)
    results = _eval_results(_present_evaluation(source) if evaluation is None else evaluation)
    facts = read_facts(source, repo_id)
    card = ModelCard.from_template(
        _metadata(facts, results),
        template_path=str(TEMPLATE),
        facts=facts,
        summary=facts.summary,
        language=facts.summary.language_model,
        rows=list(facts.part_rows()),
        terms=facts.license,
        precision=_precision(facts),
        history=list(_history(facts)),
        results=results,
        citations=citations(facts),
        marker=MARKER,
        plain=plain,
        code=code,
        amount=number_text,
        size=size_text,
    )
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip() + "\n"
    return card


def is_ours(content: str) -> bool:
    """Whether a card was written by this package and its user has not taken it over."""
    return MARKER in content.splitlines()


def _present_evaluation(source: Source) -> list[dict[str, Any]]:
    """Returns what the card of a checkpoint says was measured, as `render_card` takes it."""
    path = source.find(constants.REPOCARD_NAME)
    content = "" if path is None else path.read_text(encoding="utf-8", errors="replace")
    if not is_ours(content):
        return []
    return [
        {"dataset": result.dataset_name, "metric": result.metric_type, "value": result.metric_value}
        | ({"split": result.dataset_split} if result.dataset_split else {})
        | ({"dataset_id": result.dataset_type} if result.dataset_type != result.dataset_name else {})
        | (result.metric_args or {})
        for result in ModelCard(content).data.eval_results or ()
    ]


def _eval_results(evaluation: list[dict[str, Any]]) -> list[EvalResult]:
    if not isinstance(evaluation, list):
        raise TypeError(f"evaluation is a {type(evaluation).__name__}; expected a list of dictionaries.")
    return [_eval_result(entry) for entry in evaluation]


def _eval_result(entry: dict[str, Any]) -> EvalResult:
    if not isinstance(entry, Mapping):
        raise TypeError(f"evaluation holds a {type(entry).__name__}; expected dictionaries.")
    wrong = [name for name in _RESULT_FIELDS if name not in entry]
    strange = sorted(set(entry) - {*_RESULT_FIELDS, *_RESULT_OPTIONS})
    if wrong or strange:
        fault = f"has no {' and no '.join(wrong)}" if wrong else f"has {', '.join(map(repr, strange))}"
        raise ValueError(
            f"An entry of evaluation {fault}: {dict(entry)}. Expected {', '.join(_RESULT_FIELDS)}, and where known "
            f"{', '.join(_RESULT_OPTIONS)}."
        )
    spread = {name: _number(name, entry[name]) for name in _SPREAD if entry.get(name) is not None}
    return EvalResult(
        task_type=PIPELINE_TAG,
        dataset_type=entry.get("dataset_id") or entry["dataset"],
        dataset_name=entry["dataset"],
        dataset_split=entry.get("split"),
        metric_type=entry["metric"],
        metric_value=_number("value", entry["value"]),
        metric_args=spread or None,
    )


def _number(name: str, value: Any) -> int | float:
    """Returns a plain number, which YAML has words for, also of one of NumPy's."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"The {name} of an entry of evaluation is {value!r}; expected a number.")
    return value if isinstance(value, int) else float(value)


def is_tag_of_facts(tag: str) -> bool:
    """Whether a tag tells what a model is, so that it goes when the model is another."""
    methods = {str(method.value) for method in QuantizationMethod}
    return tag in {"moe", "medical", *methods} or re.fullmatch(r"\d+-bit", tag) is not None


def _metadata(facts: CardFacts, results: list[EvalResult]) -> ModelCardData:
    summary = facts.summary
    tags = ["moellava", "vision-language", "custom_code"]
    tags += ["moe"] if summary.sparse else []
    tags += ["medical"] if facts.is_medical else []
    if summary.coverage is not None:
        tags += [summary.coverage.method] + ([f"{summary.coverage.bits}-bit"] if summary.coverage.bits else [])
    base = facts.base_models
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        base_model=base[0] if len(base) == 1 else base or None,
        tags=tags,
        model_name=facts.title if results else None,
        eval_results=results or None,
        **facts.license,
    )


def _precision(facts: CardFacts) -> str:
    summary, coverage = facts.summary, facts.summary.coverage
    if coverage is None:
        return summary.dtype
    quantization = facts.quantization or {}
    kind = quantization.get("bnb_4bit_quant_type") if coverage.bits == 4 else None
    words = [f"{coverage.bits} bits"] if coverage.bits else []
    words += [f"({', '.join(plain(word) for word in (coverage.method, kind) if word)})"]
    share = coverage.quantized_parameters / coverage.parameters
    return f"{' '.join(words)} for {share:.0%} of the parameters, {summary.dtype} for the rest"


def _history(facts: CardFacts) -> Iterator[str]:
    """Tells how the model came to be, as far as the config and the folder tell."""
    if facts.is_converted:
        yield f"Converted by MoELLaVA from {linked(facts.origin_of('converted_from'))}, whose weights it has."
    elif facts.is_assembled:
        yield "Assembled by MoELLaVA from the parts above."
    else:
        yield "The config does not tell what it was made from."
    if facts.has_new_projector:
        yield "The projector was initialised anew."
    if facts.origins.get("experts") == UPCYCLED:
        yield "The experts of a layer began as copies of its dense MLP, with new routers in front of them."
    for record in facts.training:
        stage, steps, epochs, data = (record.get(name) for name in ("stage", "steps", "epochs", "data"))
        told = [f"{steps:,} steps"] if isinstance(steps, int) else []
        told += [f"{epochs:.3g} {'epoch' if epochs == 1 else 'epochs'}"] if isinstance(epochs, int | float) else []
        told += [f"on {', '.join(linked(name) if '/' in name else code(name) for name in data)}"] if data else []
        named = f", stage {code(stage)}" if stage else ""
        yield f"Trained with transformers' `Trainer`{named}{': ' if told else ''}{', '.join(told)}."
    if facts.summary.coverage is not None:
        yield f"Quantised with {code(facts.summary.coverage.method)}."
    if facts.summary.transformers_version:
        yield f"Saved with transformers {plain(facts.summary.transformers_version)}."


__all__ = ["MARKER", "is_ours", "is_tag_of_facts", "render_card"]
