# SPDX-License-Identifier: Apache-2.0

"""Small checkpoints that know their answers: random weights answer by near ties, which two programs break differently.

Run by the environment that has the package; nothing here knows of vLLM.
"""

from pathlib import Path

import torch
from parts import Parts, picture
from PIL import Image

from moellava import load_pretrained_model


# vLLM's attention on the CPU takes few sizes of heads; 32 is one of them.
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
QFORMER = {"type": "qformer", "num_query_tokens": 4, "qformer_hidden_size": 32}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "layers": "dense"}

# name -> vision tower, language model's family, further arguments of `load_pretrained_model`
CHECKPOINTS = {
    "clip-mlp-llama": ("clip", "llama", {}),
    "siglip-qformer-phi": ("siglip", "phi", {"projector_config": QFORMER}),
    "clip-mlp-llama-sparse": ("clip", "llama", {"moe_config": MOE}),
    "clip-mlp-llama-sparse-shared": (
        "clip",
        "llama",
        {"moe_config": {**MOE, "layers": [1], "num_experts_per_tok": 1, "use_residual": True, "use_meta_expert": True}},
    ),
    "clip-mlp-phi-sparse": ("clip", "phi", {"moe_config": MOE}),
}

TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# pictures of each question, the question, its answer
QUESTIONS = [
    ([0], "What is shown in this picture?", " A red bus stands beside two blue cars."),
    ([1], "What is shown in this picture?", " There are 3 birds on the branch."),
    ([2], "Is there a fracture?", " No, the bone of the left arm is intact."),
    ([3, 0], "Which organ is marked by the arrow?", " The arrow points at the pancreas."),
    ([], "What colour is the door?", " The door is green, and the wall is white."),
    ([], "Where is the bicycle?", " I see a boat on the lake, a bridge over the river."),
]


def shown(index: int) -> Image.Image:
    """One of the pictures that the questions are about."""
    return picture(index, [(48, 36), (30, 44), (40, 40), (97, 33)][index])


def prompt(pictures: list[int], question: str) -> str:
    """A question as the model reads it; the same as the chat template makes."""
    return "USER: " + "<image>\n" * len(pictures) + f"{question} ASSISTANT:"


def write_checkpoint(name: str, root: Path, parts: Parts) -> Path:
    """Assembles a checkpoint, teaches it its answers and saves it in bf16."""
    tower, family, arguments = CHECKPOINTS[name]
    torch.manual_seed(0)
    model = load_pretrained_model(
        parts.language_model(family, overrides=HEADS),
        mm_vision_tower=parts.vision_tower(tower),
        device="cpu",
        **arguments,
    ).model
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # assembled weights are mapped from their files
    _teach(model)
    model.processor.chat_template = TEMPLATE
    model.to(torch.bfloat16).save_pretrained(root / name)
    return root / name


def _teach(model, steps: int = 150) -> None:
    processor = model.processor
    end = processor.tokenizer.eos_token
    batch = processor(
        images=[[shown(index) for index in pictures] for pictures, _, _ in QUESTIONS],
        text=[prompt(pictures, question) + answer + end for pictures, question, answer in QUESTIONS],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, (pictures, question, _) in enumerate(QUESTIONS):
        asked = processor(images=[shown(i) for i in pictures] or None, text=prompt(pictures, question))
        labels[row, : len(asked["input_ids"][0])] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    if loss > 0.1:
        raise RuntimeError(f"The model has not learnt its answers: the loss is {loss:.2f} after {steps} steps.")
