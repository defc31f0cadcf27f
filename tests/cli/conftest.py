# SPDX-License-Identifier: Apache-2.0
"""What the tests of the commands share: a checkpoint, pictures, and the answers that transformers gives."""

import sys

import pytest
from parts import picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from moellava import load_pretrained_model


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    """`--import` adds to it, for the rest of the process."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="session")
def checkpoint(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "my-model"
    language, tower = str(parts.language_model("llama")), str(parts.vision_tower("clip"))
    load_pretrained_model(language, vision_tower=tower, device="cpu").model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    picture(1).save(folder / "first.png")
    picture(2, mode="RGBA").save(folder / "second.png")
    (folder / "notes.png").write_text("no picture")
    return folder


@pytest.fixture(scope="session")
def stock(checkpoint):
    """The same answers by transformers' own classes."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)

    def answer(pictures, question, max_new_tokens):
        content = [{"type": "image", "path": str(path)} for path in pictures] + [{"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        tokens = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        return processor.decode(tokens, skip_special_tokens=True).strip(), tokens

    return answer
