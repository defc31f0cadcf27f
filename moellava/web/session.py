# SPDX-License-Identifier: Apache-2.0
"""What the page keeps for one user: a conversation with every model, and where the last prompts went in them.

Nothing here is shared between users but the models, which answer one user at a time (the page's queue sees to that).
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..chatting import Chat
from ..chatting.prompting import chat_inputs
from ..loading import LoadedModel
from ..routing import RoutingTrace, trace_prompt
from .pictures import data_uri, open_picture, thumbnail


logger = logging.getLogger(__name__)

_ENDS = {"length": "cut off at the limit", "interrupted": "stopped"}


class ServedModel(NamedTuple):
    """A model that the page offers, and its name there."""

    name: str
    loaded: LoadedModel

    @property
    def is_sparse(self) -> bool:
        """Whether its routing can be shown; a model whose family is sparse by itself has routers of another kind."""
        return self.loaded.model.config.moe_config is not None


@dataclass
class Turn:
    """What is shown of a question or an answer.

    Attributes:
        role (`str`): `"user"` or `"assistant"`.
        text (`str`): The words.
        pictures (`list[tuple[str, str]]`): The name of each picture that came with them, and a small one as a `data:`
            address.
    """

    role: str
    text: str = ""
    pictures: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Conversation:
    """One user's conversation with one model.

    Attributes:
        model (`ServedModel`): The model.
        chat (`Chat`): What the model is asked with; it has the pictures and what was said so far.
        turns (`list[Turn]`): What is shown of it.
        pictures (`list[PIL.Image.Image]`): Those that go with the next question: `chat` does not have them yet.
        note (`str`): What is said below it: tokens and time, or an error.
        failed (`bool`): Whether the note is an error.
        trace (`RoutingTrace` or `None`): Where the tokens of the last prompt went.
    """

    model: ServedModel
    chat: Chat
    turns: list[Turn] = field(default_factory=list)
    pictures: list[Any] = field(default_factory=list)
    note: str = ""
    failed: bool = False
    trace: RoutingTrace | None = None


class Session:
    """One user's conversations.

    A question goes to all models, one after the other, so that their times can be compared. Its pictures are those
    that the page shows and that no earlier question of the conversation came with.

    Args:
        models (`Sequence[ServedModel]`): The page's models.
    """

    def __init__(self, models: Sequence[ServedModel]):
        self.conversations = [Conversation(model, Chat(model.loaded)) for model in models]
        self.is_busy = False
        self.is_left = False
        self._asked_about: list[str] = []
        self._next: str | None = None
        self._stopped = threading.Event()

    def pose(self, question: str, paths: Sequence[str]) -> None:
        """Notes a question, which `answers` then asks the models.

        Args:
            question (`str`): The question.
            paths (`Sequence[str]`): The files of all pictures that the page shows. Where one is gone that was asked
                about before, the conversation starts anew.

        Raises:
            ValueError: The question is empty, the one before is still being answered, or a file is no picture.
        """
        if self.is_busy:
            raise ValueError("The question before is still being answered. Wait for it, or stop it.")
        question = question.strip()
        if not question:
            raise ValueError("The question is empty. Write one, then ask.")
        known = len(self._asked_about)
        is_continued = list(paths[:known]) == self._asked_about
        new = list(paths[known:] if is_continued else paths)
        pictures = [open_picture(path) for path in new]
        if not is_continued:
            self._start_anew()
        shown = [(Path(path).name, data_uri(thumbnail(picture))) for path, picture in zip(new, pictures, strict=True)]
        for conversation in self.conversations:
            conversation.turns.append(Turn("user", question, shown))
            conversation.pictures.extend(pictures)
            conversation.note, conversation.failed = "Waiting for its turn …", False
        self._asked_about = list(paths)
        self._next = question
        self._stopped.clear()
        self.is_busy = True

    def answers(self, max_new_tokens: int, temperature: float, with_routing: bool) -> Iterator[None]:
        """Asks the models what was posed; comes back whenever there is more to show in `conversations`.

        Args:
            max_new_tokens (`int`): The length of an answer at most, in tokens.
            temperature (`float`): 0 for the most probable answer, above for one drawn at random.
            with_routing (`bool`): Whether to run the prompt of sparse models once more to see where its tokens go.
        """
        if self._next is None:
            return
        question, self._next = self._next, None
        try:
            for conversation in self.conversations:
                if self._stopped.is_set():
                    conversation.note = "Stopped before it answered."
                    continue
                conversation.chat.max_new_tokens = max_new_tokens
                conversation.chat.temperature = temperature
                conversation.trace = None
                conversation.note = "Reading the question …"
                yield
                yield from self._answer(conversation, question)
                is_over = conversation.failed or self._stopped.is_set()
                if with_routing and conversation.model.is_sparse and not is_over:
                    yield from self._trace(conversation)
        finally:
            self.is_busy = False

    def stop(self) -> None:
        """Ends the answer that is being made, and those that wait; what has come of it stays."""
        self._stopped.set()

    def leave(self) -> None:
        """Ends as `stop` does; nothing of the session is to be shown any more."""
        self.is_left = True
        self.stop()

    def _answer(self, conversation: Conversation, question: str) -> Iterator[None]:
        chat = conversation.chat
        answer = Turn("assistant")
        try:
            pieces = chat.ask(question, conversation.pictures)
            conversation.turns.append(answer)
            for piece in pieces:
                answer.text += piece
                conversation.note = "Answering …"
                yield
                if self._stopped.is_set():
                    pieces.close()
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: the device's memory is too small, say
            logger.warning("%s could not answer: %s", conversation.model.name, error)
            conversation.note, conversation.failed = f"{type(error).__name__}: {error}", True
            return
        conversation.pictures = []
        answer.text = chat.answer or "(an empty answer)"
        stats = chat.stats
        facts = [f"{stats.prompt_tokens} tokens in", f"{stats.new_tokens} out", f"{stats.seconds:.2f} s"]
        if stats.seconds > 0:
            facts.append(f"{stats.new_tokens / stats.seconds:.0f} tokens/s")
        conversation.note = " · ".join([*facts, *filter(None, [_ENDS.get(stats.finish_reason)])])
        yield

    def _trace(self, conversation: Conversation) -> Iterator[None]:
        model, note = conversation.model.loaded.model, conversation.note
        conversation.note = f"{note} · tracing the routing …"
        yield
        conversation.trace = trace_prompt(model, chat_inputs(model, conversation.chat.history[:-1]))
        conversation.note = note
        yield

    def _start_anew(self) -> None:
        for conversation in self.conversations:
            conversation.chat.reset()
            conversation.turns.clear()
            conversation.pictures.clear()
            conversation.trace = None


__all__ = ["Conversation", "ServedModel", "Session", "Turn"]
