# SPDX-License-Identifier: Apache-2.0
"""A conversation as tokens, with the places of the answers: what is learnt, and nothing else."""

import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..chatting.prompting import chat_tokens
from .rows import Row, RowError


logger = logging.getLogger(__name__)

# How many chats a template's tokens are remembered of: prompts recur, such as the one of all captions.
_REMEMBERED = 1024
# The value of labels that count for nothing.
IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """A conversation's tokens.

    Attributes:
        input_ids (`list[int]`): The tokens, each picture as many times its token as it has places in the model.
        answers (`list[tuple[int, int]]`): First and behind the last token of every answer that is learnt, its end token
            with it.
    """

    input_ids: list[int]
    answers: list[tuple[int, int]]

    @property
    def labels(self) -> list[int]:
        """`input_ids` where an answer stands, -100 elsewhere."""
        labels = [IGNORED] * len(self.input_ids)
        for start, end in self.answers:
            labels[start:end] = self.input_ids[start:end]
        return labels


class Encoder:
    """Encodes conversations by the model's own chat template.

    An answer begins where the tokens of the prompt before it end, which are those that a user's question becomes, and
    ends behind the template's last special token. That the conversation begins with the tokens of each of its prompts
    is checked: nothing is searched for in a text, and nothing is counted in one.

    Args:
        processor (`MoellavaProcessor`): The model's processor.
        max_length (`int`, *optional*): How many tokens, pictures with them, a conversation may have.
    """

    def __init__(self, processor: Any, max_length: int | None = None):
        self.processor = processor
        self.max_length = max_length
        tokenizer = processor.tokenizer
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._end_tokens = (special | set(tokenizer.all_special_ids)) - set(processor.image_token_ids)
        self._has_warned = False
        # Of an encoder, since it goes by the processor; by text, since messages cannot be hashed.
        self._tokens_of = lru_cache(_REMEMBERED)(
            lambda messages, asks: tuple(chat_tokens(processor, json.loads(messages), add_generation_prompt=asks))
        )

    def encode(self, row: Row) -> Encoded:
        """Encodes a conversation.

        Raises:
            RowError: It is too long, or the template does not write it as the continuation of its prompts.
        """
        messages = row.messages
        input_ids = self._tokens(messages)
        if self.max_length is not None and len(input_ids) > self.max_length:
            raise RowError("too long", f"has {len(input_ids)} tokens, of which {self.max_length} fit")
        answers = []
        for index in sorted(row.learnt):
            prompt = self._tokens(messages[:index], asks=True)
            is_last = index == len(messages) - 1
            upto = input_ids if is_last else self._tokens(messages[: index + 1])
            end = self._end_of(upto, len(prompt))
            if input_ids[: len(prompt)] != prompt or input_ids[:end] != upto[:end] or end <= len(prompt):
                raise RowError(
                    "template",
                    f"the chat template writes message {index} otherwise in the conversation than behind its prompt: "
                    "its tokens are not those that the model is to say",
                )
            answers.append((len(prompt), end))
        return Encoded(input_ids, answers)

    def prompt(self, row: Row) -> list[int]:
        """Returns the tokens of a conversation's first question, up to where its answer begins."""
        first = next(index for index, message in enumerate(row.messages) if message["role"] == "assistant")
        return self._tokens(row.messages[:first], asks=True)

    def _tokens(self, messages: list[dict[str, Any]], asks: bool = False) -> list[int]:
        """Returns the tokens of a chat, up to where its next answer begins if it `asks` for one."""
        return list(self._tokens_of(json.dumps(messages), asks))

    def _end_of(self, input_ids: list[int], start: int) -> int:
        """Returns where an answer ends that begins at `start`: behind the last special token."""
        for index in range(len(input_ids) - 1, start - 1, -1):
            if input_ids[index] in self._end_tokens:
                return index + 1
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "The chat template closes answers with no special token: the model will not learn where to end. "
                "Everything up to the next turn is learnt."
            )
        return len(input_ids)


__all__ = ["IGNORED", "Encoded", "Encoder"]
