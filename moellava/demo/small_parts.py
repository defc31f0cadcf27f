# SPDX-License-Identifier: Apache-2.0
"""The parts of the demo's model, small and untrained, written in the formats of the published ones."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)

from .scans import IMAGE_SIZE, PHRASINGS, WORDS, answer_to


# The parts are narrow, so their weights start larger than in wide models.
INITIALIZER_RANGE = 0.08

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def make_vision_tower(folder: Path) -> CLIPVisionModel:
    """A tower like CLIP's: 4 layers of width 64, which sees a picture as 16 patches."""
    config = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=INITIALIZER_RANGE,
    )
    tower = CLIPVisionModel(config)
    tower.save_pretrained(folder)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side).save_pretrained(folder)
    return tower


def make_language_model(folder: Path) -> tuple[LlamaForCausalLM, LlamaTokenizer]:
    """A language model like LLaMA, 2 layers of width 96, with a tokenizer trained on the demo's sentences."""
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=INITIALIZER_RANGE,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model, tokenizer


def train_tokenizer() -> LlamaTokenizer:
    """Trains a byte-pair encoding on everything that is said in the demo; other words are spelled in pieces."""
    sentences = [
        f"USER: {question} ASSISTANT: {answer_to(question, digit)}"
        for question in PHRASINGS
        for digit in range(len(WORDS))
    ]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    return LlamaTokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )
