# SPDX-License-Identifier: Apache-2.0
"""Answers a model's questions in batches: the same answers as one by one, in less time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from ..chatting.prompting import GREEDY, chat_tokens, end_tokens
from .questions import Question, open_picture


# A bar is of use only where there is something to wait for.
_SECONDS_WITHOUT_BAR = 3


@dataclass(frozen=True)
class Answer:
    """What a model answers.

    Attributes:
        text (`str`): The answer.
        cut_off (`bool`): Whether it was as long as it may be, and not ended by the model.
    """

    text: str
    cut_off: bool


def answer_questions(
    model: Any, context_len: int, questions: Sequence[Question], batch_size: int, max_new_tokens: int
) -> list[Answer | str]:
    """Answers questions without sampling.

    Questions of about one length are answered together, the longest first: where memory is short, it shows at once.
    Prompts are padded on the left, and padding changes no answer (but for the rounding of 16-bit numbers).

    Args:
        model (`MoellavaForCausalLM`): The model, in evaluation mode, with its processor.
        context_len (`int`): The positions that its language model takes.
        questions (`Sequence[Question]`): The questions.
        batch_size (`int`): How many are answered together.
        max_new_tokens (`int`): The length of an answer at most, in tokens.

    Returns:
        `list`: For every question its [`Answer`], or what is wrong with it as text: a picture that cannot be decoded,
        or a prompt that leaves no room for the answer.
    """
    lengths = [len(chat_tokens(model.processor, question.turns, add_generation_prompt=True)) for question in questions]
    answers: list[Any] = [None] * len(questions)
    for place, length in enumerate(lengths):
        if length + max_new_tokens > context_len:
            answers[place] = (
                f"has a prompt of {length} tokens, which with {max_new_tokens} for the answer is more than the "
                f"{context_len} that the language model takes"
            )
    places = sorted((place for place, answer in enumerate(answers) if answer is None), key=lambda p: -lengths[p])
    with logging.tqdm(total=len(places), desc="Answering", unit="question", delay=_SECONDS_WITHOUT_BAR) as bar:
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            chats = {}
            for place in batch:
                try:
                    chats[place] = _with_open_pictures(questions[place].turns, model.processor.image_aspect_ratio)
                except (OSError, TypeError, ValueError) as error:
                    answers[place] = f"has a picture that cannot be used: {error}"
            if chats:
                for place, answer in zip(chats, _answer(model, list(chats.values()), max_new_tokens), strict=True):
                    answers[place] = answer
            bar.update(len(batch))
    return answers


def _with_open_pictures(turns: Sequence[dict[str, Any]], aspect_ratio: str) -> list[dict[str, Any]]:
    return [
        {**turn, "content": [
            {**part, "image": open_picture(part["image"], aspect_ratio)} if part["type"] == "image" else part
            for part in turn["content"]
        ]}
        for turn in turns
    ]  # fmt: skip


def _answer(model: Any, chats: list[list[dict[str, Any]]], max_new_tokens: int) -> list[Answer]:
    inputs = model.processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, **GREEDY, max_new_tokens=max_new_tokens)
    ends = end_tokens(model)
    new_tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
    texts = model.processor.batch_decode(new_tokens, skip_special_tokens=True)
    return [Answer(text.strip(), not ends & set(row)) for text, row in zip(texts, new_tokens, strict=True)]


__all__ = ["Answer", "answer_questions"]
