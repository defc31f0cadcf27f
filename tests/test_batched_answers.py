# SPDX-License-Identifier: Apache-2.0
"""Batched answers: what is set on a tokenizer survives every way of saving, and padding is where generation needs it.

The published tokenizers of SmolLM2, Qwen2, GPT-2 and GPT-NeoX do not say on which side they pad.
"""

import json
import os
import shutil

import pytest
from older import write_older, write_tower
from parts import run_python
from transformers import AutoTokenizer

from moellava import MoellavaProcessor, convert, load_pretrained_model, train, upcycle


QUESTIONS = ("What is the capital of France?", "Name three colours that a rainbow has, please.")
PARIS = "The capital of France is Paris."
TOKENS = 7


def ask(model, processor, *questions):
    chats = [[{"role": "user", "content": question}] for question in questions]
    text = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(text=text, padding=True, return_tensors="pt")
    answers = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(answers, skip_special_tokens=True)


@pytest.fixture(scope="module")
def saved(smollm2, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("batched") / "model"
    assert "padding_side" not in json.loads((smollm2 / "tokenizer_config.json").read_text())
    model = load_pretrained_model(smollm2, mm_vision_tower=parts.vision_tower("clip"), device="cpu").model
    model.save_pretrained(folder)
    return folder


def without_the_key(saved, folder):
    """A copy of a checkpoint as it was saved before the padding side was written."""
    shutil.copytree(saved, folder, copy_function=os.link)
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("padding_side") == "left"
    path.unlink()  # a link to the other folder's file
    path.write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("says_side", [True, False])
def test_a_reloaded_batch_answers_as_each_row_alone(saved, tmp_path, says_side):
    folder = saved if says_side else without_the_key(saved, tmp_path / "model")
    model = load_pretrained_model(folder, device="cpu").model
    alone = ask(model, model.processor, QUESTIONS[0])
    assert alone == [PARIS]
    assert ask(model, model.processor, *QUESTIONS)[:1] == alone


def test_a_pipeline_of_the_code_that_travels_pads_left_too(saved, tmp_path):
    folder = without_the_key(saved, tmp_path / "model")
    chats = [[{"role": "user", "content": [{"type": "text", "text": question}]}] for question in QUESTIONS]
    program = f"""
from transformers import pipeline
pipe = pipeline("image-text-to-text", model={str(folder)!r}, trust_remote_code=True)
said = pipe(text={chats!r}, batch_size=2, return_full_text=False, generate_kwargs={{"max_new_tokens": {TOKENS}}})
print(said[0][0]["generated_text"])
pipe.processor.save_pretrained({str(tmp_path / "again")!r})
"""
    assert run_python(program).strip().splitlines()[-1] == PARIS
    assert AutoTokenizer.from_pretrained(tmp_path / "again").padding_side == "left"


@pytest.mark.parametrize("style", ["llama", "gpt2", "qwen2"])
def test_what_is_set_on_a_tokenizer_is_saved(parts, tmp_path, style):
    family = {"gpt2": "phi"}.get(style, style)
    loaded = load_pretrained_model(
        parts.language_model(family), mm_vision_tower=parts.vision_tower("clip"), device="cpu"
    )
    tokenizer = loaded.tokenizer
    chosen = {
        "padding_side": "right",
        "truncation_side": "left",
        "model_max_length": 77,
        "pad_token": tokenizer.convert_ids_to_tokens(9),
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids"],
    }
    for name, value in chosen.items():
        assert getattr(tokenizer, name) != value
        setattr(tokenizer, name, value)
    loaded.model.processor.save_pretrained(tmp_path)
    for reloaded in (MoellavaProcessor.from_pretrained(tmp_path).tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert {name: getattr(reloaded, name) for name in chosen} == chosen


def test_the_tokenizer_alone_keeps_its_side(parts, tmp_path):
    loaded = load_pretrained_model(
        parts.language_model("qwen2"), mm_vision_tower=parts.vision_tower("clip"), device="cpu"
    )
    loaded.tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"


@pytest.fixture(scope="module")
def checkpoints(parts, tmp_path_factory):
    """A function: the tokenizer's folder of a checkpoint that was written in one of the ways there are."""
    root = tmp_path_factory.mktemp("written")
    language = parts.language_model("qwen2")
    model = load_pretrained_model(language, mm_vision_tower=parts.vision_tower("clip"), device="cpu").model
    model.save_pretrained(root / "assembled")

    def write(way):
        folder = root / way
        if way == "upcycled":
            upcycle(root / "assembled", num_experts=2).save_pretrained(folder)
        elif way == "processor":
            model.processor.save_pretrained(folder)
        elif way == "llava-hf":
            convert(parts.llava_hf(), folder)
        elif way == "older":
            older = write_older(root / "source", "phi", tower_folder=write_tower(root / "tower"))
            convert(older.folder, folder)
        elif way in ("trained", "while training"):
            turns = [{"from": "human", "value": "Only words?"}, {"from": "gpt", "value": "Yes."}]
            (root / "rows.json").write_text(json.dumps([{"id": 1, "conversations": turns}]))
            report = train({
                "model": root / "assembled", "data": root / "rows.json", "output_dir": folder, "stage": "align",
                "max_steps": 1, "save_steps": 1, "use_cpu": True, "disable_tqdm": True, "report_to": "none",
            })  # fmt: skip
            return report.checkpoint if way == "trained" else next(folder.rglob("checkpoint-1"))
        return folder

    return write


@pytest.mark.parametrize(
    "way", ["assembled", "upcycled", "processor", "llava-hf", "older", "trained", "while training"]
)
def test_every_way_of_writing_says_the_side(checkpoints, way):
    folder = checkpoints(way)
    assert json.loads((folder / "tokenizer_config.json").read_text())["padding_side"] == "left"
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"
