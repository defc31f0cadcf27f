# SPDX-License-Identifier: Apache-2.0
"""Chat: `processor.apply_chat_template`, and `pipeline("image-text-to-text")` with and without the package."""

import json
import logging
from contextlib import contextmanager
from threading import Thread

import pytest
import torch
from parts import picture, pictures, run_python
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    TextIteratorStreamer,
    pipeline,
)

from moellava import load_pretrained_model


NEW_TOKENS = 6
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


def save_assembled(language_model, vision_tower, folder):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = load_pretrained_model(language_model, mm_vision_tower=vision_tower, device="cpu").model
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)  # so that pictures matter
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """A checkpoint whose language model has a chat template of its own."""
    language_model = parts.language_model("llama", with_chat_template=True)
    return save_assembled(language_model, parts.vision_tower("clip"), tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("image-text-to-text", model=str(folder), trust_remote_code=True, device="cpu")


def message(role, *content):
    """A message of texts and pictures."""
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in content
    ]
    return {"role": role, "content": parts}


def conversations():
    """Unequal ones: a picture first, several pictures, a picture last, and several turns."""
    one, two, three, four, five = pictures(5)
    return [
        [message("user", one, "What is shown in this picture?")],
        [message("user", "Compare", two, "and", three, "in a few words.")],
        [message("user", "How many birds are there?", four)],
        [
            message("system", "Answer in one word."),
            message("user", five, "What colour is the door?"),
            message("assistant", "Green."),
            message("user", "And the wall?", one),
        ],
    ]


TEXT_CHAT = [message("user", "Describe the image in a few words.")]


def chat_inputs(processor, conversation, **kwargs):
    return processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


def answer(model, processor, conversation):
    """What the model says, without any pipeline; stripped, as a pipeline decodes a space in front differently."""
    inputs = chat_inputs(processor, conversation)
    new = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip()


@contextmanager
def library_log():
    """Collects what transformers logs; its loggers do not hand on to pytest's."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


# ---------------------------------------------------------------------------------------------------------------------
# apply_chat_template
# ---------------------------------------------------------------------------------------------------------------------


def test_chat_template_places_pictures_where_they_stand(processor):
    single, several, last, turns = conversations()
    render = processor.apply_chat_template
    eos = processor.tokenizer.eos_token
    assert render(single, add_generation_prompt=True) == (
        f"<|user|>\n<image>\nWhat is shown in this picture?{eos}\n<|assistant|>\n"
    )
    assert render(single) == f"<|user|>\n<image>\nWhat is shown in this picture?{eos}\n"
    assert render(several) == f"<|user|>\nCompare<image>\nand<image>\nin a few words.{eos}\n"
    assert render(last) == f"<|user|>\nHow many birds are there?<image>\n{eos}\n"
    assert render(turns, add_generation_prompt=True) == (
        f"<|system|>\nAnswer in one word.{eos}\n<|user|>\n<image>\nWhat colour is the door?{eos}\n"
        f"<|assistant|>\nGreen.{eos}\n<|user|>\nAnd the wall?<image>\n{eos}\n<|assistant|>\n"
    )


def test_vicuna_template_where_the_tokenizer_has_none(parts, tmp_path):
    folder = save_assembled(parts.language_model("llama"), parts.vision_tower("clip"), tmp_path / "model")
    assert AutoTokenizer.from_pretrained(parts.language_model("llama")).chat_template is None
    processor = AutoProcessor.from_pretrained(folder)
    *_, turns = conversations()
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        "Answer in one word. USER: <image>\nWhat colour is the door? ASSISTANT: Green.</s>USER: And the wall?<image>\n "
        "ASSISTANT:"
    )


def test_chat_inputs_are_those_of_text_and_pictures(processor):
    for conversation in conversations():
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        images = [part["image"] for turn in conversation for part in turn["content"] if part["type"] == "image"]
        expected = processor(text=text, images=images, return_tensors="pt")
        inputs = chat_inputs(processor, conversation)
        assert set(inputs) == set(expected) == {"input_ids", "attention_mask", "pixel_values"}
        for name, tensor in expected.items():
            assert torch.equal(inputs[name], tensor)
        count = (inputs["input_ids"] == processor.image_token_id).sum().item()
        assert count == len(images) * processor.num_image_tokens == 16 * inputs["pixel_values"].shape[0]


def test_chat_in_a_batch_equals_chat_alone(model, processor):
    chats = [*conversations(), TEXT_CHAT]
    inputs = chat_inputs(processor, chats, processor_kwargs={"padding": True})
    assert inputs["input_ids"].shape[0] == len(chats) and inputs["pixel_values"].shape[0] == 6
    new = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    said = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    assert said == [answer(model, processor, chat) for chat in chats]
    assert len(set(said)) > 2


def test_pictures_of_a_chat_by_path(processor, tmp_path):
    path = tmp_path / "scan.png"
    picture(3).save(path)
    opened = chat_inputs(processor, [message("user", picture(3), "What is it?")])
    for part in ({"type": "image", "path": str(path)}, {"type": "image", "url": str(path)}):
        content = [part, {"type": "text", "text": "What is it?"}]
        inputs = chat_inputs(processor, [{"role": "user", "content": content}])
        assert torch.equal(inputs["pixel_values"], opened["pixel_values"])
        assert torch.equal(inputs["input_ids"], opened["input_ids"])


def test_chat_with_contents_that_are_plain_text(processor):
    plain = [{"role": "user", "content": "Describe the image in a few words."}]
    inputs = chat_inputs(processor, plain)
    assert "pixel_values" not in inputs
    assert torch.equal(inputs["input_ids"], chat_inputs(processor, TEXT_CHAT)["input_ids"])


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline
# ---------------------------------------------------------------------------------------------------------------------


def said_by(pipe, chats, **kwargs):
    results = pipe(text=chats, return_full_text=False, **GREEDY, **kwargs)
    results = results if isinstance(results[0], list) else [results]
    return [result[0]["generated_text"].strip() for result in results]


def test_pipeline_says_what_generate_says(pipe, model, processor):
    expected = [answer(model, processor, chat) for chat in conversations()]
    assert all(expected) and len(set(expected)) > 1
    for chat, text in zip(conversations(), expected, strict=True):
        assert said_by(pipe, chat) == [text]
    assert said_by(pipe, conversations()) == expected
    assert said_by(pipe, conversations(), batch_size=4) == expected
    assert said_by(pipe, conversations(), batch_size=2) == expected


def test_pipeline_looks_at_the_picture(pipe):
    chats = [[message("user", seen, "What is it?")] for seen in pictures(4)]
    assert len(set(said_by(pipe, chats))) > 1


def test_pipeline_on_text_alone(pipe, model, processor):
    expected = answer(model, processor, TEXT_CHAT)
    assert said_by(pipe, TEXT_CHAT) == [expected]
    assert said_by(pipe, [TEXT_CHAT, TEXT_CHAT], batch_size=2) == [expected] * 2
    # Chats with and without pictures one after the other; transformers' own batching wants them of one kind.
    assert said_by(pipe, [conversations()[0], TEXT_CHAT])[1] == expected


def test_pipeline_without_chat(pipe, model, processor):
    images, texts = pictures(3), ["<image> What is it?", "one <image> two <image>"]
    expected = []
    for text, row in zip(texts, (images[:1], images[1:]), strict=True):
        inputs = processor(text=text, images=row, return_tensors="pt")
        new = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(new, skip_special_tokens=True).strip())
    for text, row, said in zip(texts, (images[:1], images[1:]), expected, strict=True):
        (result,) = pipe(images=row, text=text, return_full_text=False, **GREEDY)
        assert result["input_text"] == text
        assert result["generated_text"].strip() == said
    together = pipe(images=images, text=texts, return_full_text=False, **GREEDY)
    assert [result["generated_text"].strip() for result in together] == expected


def test_pipeline_returns_the_conversation(pipe, model, processor):
    chat = conversations()[0]
    (result,) = pipe(text=chat, **GREEDY)
    *turns, last = result["generated_text"]
    assert turns == result["input_text"] == chat
    assert last["role"] == "assistant" and last["content"].strip() == answer(model, processor, chat)


def test_pipeline_completes_a_begun_answer(pipe):
    begun = [*conversations()[0], message("assistant", "A red")]
    (result,) = pipe(text=begun, **GREEDY)
    assert result["generated_text"][-1]["role"] == "assistant"
    assert result["generated_text"][-1]["content"][-1]["text"].startswith("A red")
    assert len(result["generated_text"][-1]["content"][-1]["text"]) > len("A red")


def test_pipeline_knows_the_model(folder, model, processor):
    expected = [answer(model, processor, chat) for chat in conversations()]
    with library_log() as records:
        by_name = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
        by_object = pipeline("image-text-to-text", model=model, processor=processor)
        assert said_by(by_name, conversations()) == expected
        assert said_by(by_object, conversations(), batch_size=2) == expected
    assert not [text for text in records if "not supported" in text]
    assert type(by_name.model) is type(model)


def test_pipeline_streams(pipe):
    chat = conversations()[1]
    streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=600)
    results = []
    call = {"text": chat, "return_full_text": False, "generate_kwargs": {**GREEDY, "streamer": streamer}}
    thread = Thread(target=lambda: results.append(pipe(**call)))
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces).strip() == results[0][0]["generated_text"].strip() == said_by(pipe, chat)[0]
    assert len(pieces) > 2


def test_pipeline_in_bfloat16(folder):
    small = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in small.model.parameters()} == {torch.bfloat16}
    alone = [said_by(small, chat)[0] for chat in conversations()]
    assert all(isinstance(text, str) and text for text in alone)


def test_text_generation_pipeline(folder, model, processor):
    # The language model's own task: no picture, no template of pictures.
    ids = processor.tokenizer("The sky is", return_tensors="pt")
    new = model.generate(**ids, **GREEDY)[0, ids["input_ids"].shape[1] :]
    with library_log() as records:
        text = pipeline("text-generation", model=str(folder), trust_remote_code=True)
        (result,) = text("The sky is", return_full_text=False, **GREEDY)
    assert result["generated_text"].strip() == processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert not [record for record in records if "not supported" in record]


FRESH = """
import json, logging, sys
from PIL import Image

records = []
handler = logging.Handler()
handler.emit = lambda record: records.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)

from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, pictures = {folder!r}, {pictures!r}
chats = []
for chat in json.loads({chats!r}):
    for turn in chat:
        for part in turn["content"]:
            if part["type"] == "image":
                part["image"] = Image.open(pictures + "/" + part["image"])
    chats.append(chat)
greedy = dict(max_new_tokens={new_tokens}, do_sample=False, return_full_text=False)

def texts(results):
    return [(result[0] if isinstance(result, list) else result)["generated_text"].strip() for result in results]

pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
said = dict(
    module=type(pipe.model).__module__,
    alone=[texts(pipe(text=chat, **greedy))[0] for chat in chats],
    listed=texts(pipe(text=chats, **greedy)),
    batched=texts(pipe(text=chats[:-1], batch_size=4, **greedy)),
)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
said["any_to_any"] = texts(pipeline("any-to-any", model=folder, trust_remote_code=True)(text=chats, **greedy))
said["by_object"] = texts(pipeline("image-text-to-text", model=model, processor=processor)(text=chats, **greedy))
said["unsupported"] = [text for text in records if "not supported" in text]
print(json.dumps(said))
"""


def test_pipeline_in_a_fresh_process_without_the_package(folder, model, processor, tmp_path):
    chats = [*conversations(), TEXT_CHAT]
    expected = [answer(model, processor, chat) for chat in chats]
    written = []
    for chat in chats:
        turns = []
        for turn in chat:
            parts = []
            for part in turn["content"]:
                if part["type"] == "image":
                    name = f"{len(list(tmp_path.iterdir()))}.png"
                    part["image"].save(tmp_path / name)
                    part = {"type": "image", "image": name}
                parts.append(part)
            turns.append({"role": turn["role"], "content": parts})
        written.append(turns)
    code = FRESH.format(folder=str(folder), pictures=str(tmp_path), chats=json.dumps(written), new_tokens=NEW_TOKENS)
    said = json.loads(run_python(code).splitlines()[-1])
    assert said["module"].startswith("transformers_modules.")
    assert said["alone"] == said["listed"] == said["by_object"] == said["any_to_any"] == expected
    assert said["batched"] == expected[:-1]
    assert said["unsupported"] == []
