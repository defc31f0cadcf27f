# SPDX-License-Identifier: Apache-2.0
"""A conversation with a loaded model, its answers streamed as they are made."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from .prompting import GREEDY, chat_inputs, end_tokens, user_turn


@dataclass(frozen=True)
class AnswerStats:
    """What the last answer of a [`Chat`] took.

    Attributes:
        prompt_tokens (`int`): The tokens of the whole conversation before the answer, pictures among them.
        new_tokens (`int`): The tokens of the answer.
        seconds (`float`): How long it took to make it.
        finish_reason (`str`): `"stop"`, the model ended it; `"length"`, it was as long as it may be;
            `"interrupted"`, whoever read it stopped.
    """

    prompt_tokens: int
    new_tokens: int
    seconds: float
    finish_reason: str

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by name, for JSON."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}


class Chat:
    """One conversation with a model: questions, pictures, follow-up questions.

    Args:
        loaded (`LoadedModel`): What `load_pretrained_model` returns.
        max_new_tokens (`int`, *optional*, defaults to 256): The length of an answer at most, in tokens.
        temperature (`float`, *optional*, defaults to 0.0):
            Above 0, answers are drawn at random, the more freely the higher it is. At 0 they are the most probable
            ones, word by word: the same questions get the same answers.
        top_p (`float`, *optional*, defaults to 1.0): Of what share of the probability words are drawn.
        as_written (`bool`, *optional*, defaults to `False`): Whether questions stay as they are, blanks with them: for
            models that were trained so.

    Attributes:
        history (`list[dict]`): The turns so far, as `apply_chat_template` takes them.
        answer (`str`): The last answer.
        stats ([`AnswerStats`] or `None`): What the last answer took.

    Raises:
        ValueError: `max_new_tokens` is below 1, `temperature` below 0, or `top_p` not within 0 and 1.

    Example:

    ```python
    >>> from moellava import load_pretrained_model
    >>> from moellava.chatting import Chat

    >>> chat = Chat(load_pretrained_model("my-model"))
    >>> for text in chat.ask("What is shown here?", ["scan.png"]):
    ...     print(text, end="", flush=True)
    >>> print(*chat.ask("And on the left?"), sep="")
    ```"""

    def __init__(
        self,
        loaded: Any,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        as_written: bool = False,
    ):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected a number of at least 1.")
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}; expected 0, for the most probable answer, or more.")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; expected a share above 0, up to 1.")
        self.model = loaded.model
        self.context_len = loaded.context_len
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        self.as_written = as_written
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation, pictures included."""
        self.history: list[dict[str, Any]] = []
        self.answer = ""
        self.stats: AnswerStats | None = None

    def ask(self, question: str, pictures: Sequence[Any] = ()) -> Iterator[str]:
        """Asks a question, and yields the answer in pieces as it is made.

        Question and answer join the history when the answer ends. One that its reader stops (`close()`, or an exception
        such as Ctrl-C) ends there and stays as far as it came; after an error the history is what it was.

        Args:
            question (`str`): The question.
            pictures (`Sequence`, *optional*): Pictures that come with it, in any form that the processor takes.
                They come before its text, unless `<image>` stands within that for each of them.

        Raises:
            FileNotFoundError: There is no such picture file.
            ValueError: The question is empty, a picture cannot be decoded, or the conversation is longer than the
                language model takes. Raised by the call, before any text.
        """
        if not question.strip():
            raise ValueError("The question is empty; expected some text.")
        turns = [*self.history, user_turn(pictures, question, self.as_written)]
        inputs = chat_inputs(self.model, turns)
        room = self.context_len - inputs["input_ids"].shape[1]
        if room < 1:
            advice = "start a new one" if self.history else "Ask a shorter question, or about fewer pictures"
            whole = "The conversation is" if self.history else "Question and pictures are"
            raise ValueError(
                f"{whole} {inputs['input_ids'].shape[1]} tokens, but the language model takes {self.context_len} with "
                f"the answer. {advice[0].upper()}{advice[1:]}."
            )
        return self._stream(turns, inputs, min(self.max_new_tokens, room))

    def _stream(self, turns: list[dict[str, Any]], inputs: Any, limit: int) -> Iterator[str]:
        tokenizer = self.model.processor.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped, started, begun = threading.Event(), time.perf_counter(), False
        with ThreadPoolExecutor(1, "moellava-answer") as pool:
            generating = pool.submit(self._generate, inputs, limit, streamer, stopped)
            try:
                for text in streamer:
                    text = text if begun else text.lstrip()
                    if text:
                        begun = True
                        yield text
            finally:
                stopped.set()
                tokens = generating.result()[0, inputs["input_ids"].shape[1] :].tolist()  # raises what went wrong
                self.answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                self.history = [*turns, {"role": "assistant", "content": [{"type": "text", "text": self.answer}]}]
                self.stats = AnswerStats(
                    prompt_tokens=inputs["input_ids"].shape[1],
                    new_tokens=len(tokens),
                    seconds=time.perf_counter() - started,
                    finish_reason=self._why_ended(tokens, limit),
                )

    def _generate(self, inputs: Any, limit: int, streamer: TextIteratorStreamer, stopped: threading.Event) -> Any:
        def is_stopped(input_ids: torch.Tensor, scores: Any, **kwargs) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), stopped.is_set(), dtype=torch.bool, device=input_ids.device)

        sampled = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        try:
            return self.model.generate(
                **inputs,
                **(GREEDY | sampled if self.temperature > 0 else GREEDY),
                max_new_tokens=limit,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([is_stopped]),
            )
        except BaseException:
            streamer.end()  # or its reader would wait for ever
            raise

    def _why_ended(self, tokens: list[int], limit: int) -> str:
        if tokens and tokens[-1] in end_tokens(self.model):
            return "stop"
        return "length" if len(tokens) >= limit else "interrupted"


__all__ = ["AnswerStats", "Chat"]
