# SPDX-License-Identifier: Apache-2.0
"""What the demo's model is taught, as anyone would keep it: pictures, conversations in LLaVA's JSON, and a recipe."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .scans import PHRASINGS, Example, answer_to, blank_picture, draw


# How often a scan is drawn at most, a little differently and asked about in another way each time.
DRAWINGS = 14
# The share of the lessons that show a blank page. Nobody can read those; they teach to guess in whole sentences, so
# that an answer about a blank page is worth as much as a guess, and no nonsense for want of ever having seen one.
BLANK_SHARE = 0.03

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "layers": "dense"}


def write_lessons(examples: Sequence[Example], folder: Path, drawings: int = DRAWINGS, seed: int = 0) -> Path:
    """Writes the lessons and their pictures, so many of every scan; returns the JSON file."""
    folder.mkdir(parents=True)
    blank_picture().save(folder / "blank.png")
    chance = random.Random(seed)
    lessons = []
    for example in examples:
        for drawing in range(drawings):
            name = f"{example.number:04}-{drawing}.png"
            draw(example.scan, wobble=chance).save(folder / name, compress_level=1)
            question = chance.choice(list(PHRASINGS))
            turns = [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer_to(question, example.digit)},
            ]
            is_blank = chance.random() < BLANK_SHARE
            lessons.append({"id": name, "image": "blank.png" if is_blank else name, "conversations": turns})
    (folder / "lessons.json").write_text(json.dumps(lessons, indent=1) + "\n", encoding="utf-8")
    return folder / "lessons.json"


def write_recipe(
    file: Path, parts: Path, lessons: Path, output_dir: Path, instruct_epochs: float, moe_epochs: float, seed: int = 0
) -> Path:
    """Writes the recipe of the three stages; epochs are rounds through the lessons."""
    recipe: dict[str, Any] = {
        "model": {
            "model_path": str(parts / "language-model"),
            "vision_tower": str(parts / "vision-tower"),
            "projector_type": "mlp",
        },
        "data": str(lessons),
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "random",
        "gradient_checkpointing": False,
        "weight_decay": 0.1,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": seed,
        "stages": [
            {"stage": "align", "max_steps": 20},
            # The tower starts from random weights too.
            {
                "stage": "instruct",
                "unfreeze": ["vision_tower"],
                "learning_rate": 1.5e-3,
                "warmup_steps": 50,
                "num_train_epochs": instruct_epochs,
            },
            {
                "stage": "moe",
                "moe": MOE,
                "learning_rate": 4e-4,
                "warmup_steps": 50,
                "num_train_epochs": moe_epochs,
            },
        ],
    }
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return file


__all__ = ["DRAWINGS", "MOE", "write_lessons", "write_recipe"]
