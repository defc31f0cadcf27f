# SPDX-License-Identifier: Apache-2.0
"""What it takes to ask a model, for the command line, the page and evaluating: turns, inputs, and how to generate."""

from collections.abc import Sequence
from typing import Any

from .chat_templates import IMAGE_TOKEN
from .conversations import arranged, text_parts


# For `generate`: the most probable answer, token by token. A checkpoint's generation config may say otherwise, and then
# has settings that go with sampling only.
GREEDY = {
    "do_sample": False, "num_beams": 1, "temperature": None, "top_k": None, "top_p": None, "min_p": None,
    "typical_p": None,
}  # fmt: skip


def user_turn(pictures: Sequence[Any], question: str, as_written: bool = False) -> dict[str, Any]:
    """Returns a question about pictures as a user's turn of a chat, arranged as in training: see [`arranged`].

    Args:
        pictures (`Sequence`): Where the question does not say by `<image>` where they stand, they come before it.
        question (`str`): The question.
        as_written (`bool`, *optional*, defaults to `False`): Whether it stays as it is.

    Raises:
        ValueError: It has `<image>`, but not once for each picture.
    """
    parts = text_parts(question)
    places = sum(part["type"] == "image" for part in parts)
    if places not in (0, len(pictures)):
        raise ValueError(
            f"The question has {places} {IMAGE_TOKEN} for {len(pictures)} picture(s); expected one for each, or none."
        )
    if not places:
        parts = [{"type": "image"} for _ in pictures] + parts
    return {"role": "user", "content": with_pictures(arranged(parts, as_written), pictures)}


def with_pictures(parts: Sequence[dict[str, Any]], pictures: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns the parts of a message with the pictures in their places."""
    waiting = iter(pictures)
    return [{**part, "image": next(waiting)} if part["type"] == "image" else part for part in parts]


def chat_inputs(model: Any, turns: Sequence[dict[str, Any]]) -> Any:
    """Returns the inputs, on the model's device, of a chat that is the model's turn to go on with."""
    return model.processor.apply_chat_template(
        list(turns), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)


def question_inputs(model: Any, pictures: Sequence[Any], question: str) -> Any:
    """Returns the inputs, on the model's device, of a chat of one question about pictures."""
    return chat_inputs(model, [user_turn(pictures, question)])


def chat_tokens(processor: Any, turns: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> list[int]:
    """Returns the tokens of a chat as `apply_chat_template(tokenize=True)` does, without opening a picture."""
    text = processor.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=add_generation_prompt)
    # The template has written the beginning itself, or leaves it to the tokenizer: transformers' own rule.
    bos = processor.tokenizer.bos_token
    adds_bos = bos is None or not text.startswith(bos)
    count = text.count(processor.image_token)
    if count:
        (text,), _ = processor.get_text_with_replacements([text], [processor.replace_image_token()] * count)
    return processor.tokenizer(text, add_special_tokens=adds_bos)["input_ids"]


def end_tokens(model: Any) -> set[int]:
    """Returns the tokens that end an answer of a model."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


__all__ = ["GREEDY", "chat_inputs", "chat_tokens", "end_tokens", "question_inputs", "user_turn", "with_pictures"]
