# SPDX-License-Identifier: Apache-2.0
"""A conversation: what it remembers, how it streams, how it is stopped, and what it refuses."""

import pytest
import torch
from parts import picture

from moellava import load_pretrained_model
from moellava.chatting import Chat


@pytest.fixture(scope="module")
def loaded(parts):
    """A model whose answers depend on its pictures."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        loaded = load_pretrained_model(
            str(parts.language_model("llama")), vision_tower=str(parts.vision_tower("clip")), device="cpu"
        )
        for parameter in loaded.model.model.multi_modal_projector.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return loaded


def by_transformers(loaded, *turns, max_new_tokens):
    """The tokens of the prompt, and the answer, of a conversation; by `generate` alone."""
    processor = loaded.model.processor
    messages = []
    for role, pictures, text in turns:
        content = [{"type": "image", "image": one} for one in pictures] + [{"type": "text", "text": text}]
        messages.append({"role": role, "content": content})
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return length, processor.decode(tokens[0, length:], skip_special_tokens=True).strip()


def test_a_conversation_goes_on_with_its_pictures(loaded):
    chat = Chat(loaded, max_new_tokens=9)
    first, second = picture(1), picture(2)

    pieces = list(chat.ask(" What is shown? ", [first]))
    length, answer = by_transformers(loaded, ("user", [first], "What is shown?"), max_new_tokens=9)
    assert "".join(pieces).strip() == chat.answer == answer
    assert len(pieces) > 1
    assert (chat.stats.prompt_tokens, chat.stats.new_tokens, chat.stats.finish_reason) == (length, 9, "length")
    assert chat.stats.seconds > 0

    list(chat.ask("What has changed?", [second]))
    turns = [("user", [first], "What is shown?"), ("assistant", [], answer), ("user", [second], "What has changed?")]
    length, follow_up = by_transformers(loaded, *turns, max_new_tokens=9)
    assert (chat.answer, chat.stats.prompt_tokens) == (follow_up, length)
    assert [turn["role"] for turn in chat.history] == ["user", "assistant"] * 2

    chat.reset()
    assert (chat.history, chat.answer, chat.stats) == ([], "", None)
    list(chat.ask("What is shown?", [first]))
    assert chat.answer == answer


def test_a_reader_who_leaves_stops_the_answer(loaded):
    chat = Chat(loaded, max_new_tokens=1500)
    pieces = chat.ask("What is shown?", [picture(1)])
    begun = next(pieces)
    pieces.close()
    assert chat.stats.finish_reason == "interrupted"
    assert chat.stats.new_tokens < 1500
    assert chat.answer.startswith(begun.strip())
    assert chat.history[-1]["content"][0]["text"] == chat.answer
    assert len(list(Chat(loaded, max_new_tokens=4).ask("And now?"))) > 0  # the model is as it was


def test_temperature_draws_answers_at_random(loaded):
    answers = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        chat = Chat(loaded, max_new_tokens=8, temperature=2.0, top_p=0.95)
        answers.add("".join(chat.ask("What is shown?", [picture(1)])))
    assert len(answers) == 2
    assert loaded.model.generation_config.temperature != 2.0


def test_what_cannot_be_asked_leaves_the_conversation_as_it_was(loaded, tmp_path):
    chat = Chat(loaded, max_new_tokens=2)
    with pytest.raises(ValueError, match="The question is empty"):
        chat.ask(" ")
    with pytest.raises(ValueError, match=r"Question and pictures are \d+ tokens, .* 2048 with the answer. Ask a"):
        chat.ask("why? " * 3000)
    with pytest.raises(FileNotFoundError, match="absent.png"):
        chat.ask("What?", [tmp_path / "absent.png"])
    assert chat.history == []
    list(chat.ask("What?"))
    history = list(chat.history)
    with pytest.raises(ValueError, match=r"The conversation is \d+ tokens, .* 2048 with the answer. Start a new one"):
        chat.ask("why? " * 3000)
    assert chat.history == history


def test_an_error_while_answering_reaches_the_reader(loaded, monkeypatch):
    chat = Chat(loaded, max_new_tokens=2)
    monkeypatch.setattr(loaded.model.generation_config, "cache_implementation", "nothing")
    with pytest.raises(ValueError, match="nothing"):
        list(chat.ask("What?"))
    assert (chat.history, chat.stats) == ([], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 2}, "top_p is 2"),
    ],
)
def test_settings_that_do_not_work(loaded, options, message):
    with pytest.raises(ValueError, match=message):
        Chat(loaded, **options)
