# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in lmms-eval: `--model moellava`, by an entry point that lmms-eval looks for.

Only lmms-eval imports this file, so that what it imports is there.
"""

from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from ..loading import load_pretrained_model
from .answering import answer_questions
from .questions import Question, asked_turns
from .scoring import OPEN


MAX_NEW_TOKENS = 128  # where a task does not say


def manifest() -> ModelManifest:
    """What lmms-eval is told of the model: its name, and where its class is."""
    return ModelManifest("moellava", chat_class_path=f"{__name__}.MoellavaHarness")


class MoellavaHarness(lmms):
    """A checkpoint as lmms-eval asks one: by chats with pictures, with the most probable answers.

    Args:
        pretrained (`str`): The checkpoint, as a folder or a Hub id.
        batch_size (`int` or `str`, *optional*, defaults to 1): How many questions are answered together.
        device (`str`, *optional*): Where the model goes. Defaults to the best device there is.
        max_batch_size (*optional*): Without effect: lmms-eval gives it to every model.
        load_options: The other arguments of `load_pretrained_model`.
    """

    is_simple = False  # tasks give chats, and not one text with pictures beside it

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | torch.device | None = None,
        max_batch_size: Any = None,
        **load_options,
    ):
        super().__init__()
        self.loaded = load_pretrained_model(pretrained, device=device, **load_options)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers questions.

        Raises:
            ValueError: A task wants its answers sampled, a picture cannot be decoded, or a prompt is too long.
        """
        answers: list[str] = [""] * len(requests)
        by_limit: dict[int, list[int]] = {}
        for place, request in enumerate(requests):
            by_limit.setdefault(_limit(request), []).append(place)
        for limit, places in by_limit.items():
            questions = [self._question(place, requests[place]) for place in places]
            found = answer_questions(self.loaded.model, self.loaded.context_len, questions, self.batch_size, limit)
            for place, answer in zip(places, found, strict=True):
                if isinstance(answer, str):
                    raise ValueError(f"Question {place} of {requests[place].task_name} {answer}.")
                answers[place] = _until(answer.text, requests[place].args[2].get("until"))
        return answers

    def _question(self, place: int, request: Instance) -> Question:
        _, messages_of, _, doc_id, task, split = request.args
        turns = []
        for message in messages_of(self.task_dict[task][split][doc_id]):
            parts = [
                {"type": "image", "image": part["url"]} if part["type"] == "image" else part
                for part in message["content"]
            ]
            turns.append({**message, "content": parts})
        return Question(place, "", "", OPEN, [], asked_turns(turns))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Is not offered: no task with true answers needs it."""
        raise NotImplementedError("Tasks of several rounds are not supported.")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Is not offered: the tasks about pictures generate their answers."""
        raise NotImplementedError("Tasks that compare the likelihood of answers are not supported.")


def _limit(request: Instance) -> int:
    options = request.args[2]
    if options.get("do_sample") or (options.get("temperature") or 0) > 0 or (options.get("num_beams") or 1) > 1:
        raise ValueError(
            f"{request.task_name} asks for {options}; answers are the most probable ones here. Give --gen_kwargs "
            "temperature=0,do_sample=False,num_beams=1."
        )
    return options.get("max_new_tokens") or MAX_NEW_TOKENS


def _until(text: str, ends: str | list[str] | None) -> str:
    for end in [ends] if isinstance(ends, str) else ends or []:
        text = text.partition(end)[0]
    return text


__all__ = ["MoellavaHarness", "manifest"]
