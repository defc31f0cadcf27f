# Copyright 2026 The MoELLaVA authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Training with `transformers.Trainer`: what turns examples into batches, and the run itself."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from .scans import PHRASINGS, Example, answer_to, blank_picture, draw


def conversation(question: str, answer: str | None = None) -> list[dict[str, Any]]:
    """A question about a picture, with or without its answer, in the form that chat templates take."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


# The share of the lessons that show a blank page. Nobody can read those; they teach to guess in whole sentences, so
# that an answer about a blank page is worth as much as a guess, and no nonsense for want of ever having seen one.
BLANK_SHARE = 0.03


class Lessons(Dataset):
    """The training examples, drawn a little differently and asked about in another way each time."""

    def __init__(self, examples: Sequence[Example], seed: int = 0):
        self.examples = examples
        self.random = random.Random(seed)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        question = self.random.choice(list(PHRASINGS))
        is_blank = self.random.random() < BLANK_SHARE
        return {
            "picture": blank_picture() if is_blank else draw(example.scan, wobble=self.random),
            "question": question,
            "answer": answer_to(question, example.digit),
        }


class AnswerCollator:
    """Makes a batch with the model's processor; only the answers are to be learnt."""

    def __init__(self, processor: Any):
        self.processor = processor
        self._written: dict[tuple[str, str], tuple[str, int]] = {}

    def __call__(self, lessons: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns the model's inputs, and `labels` (batch, tokens) that are -100 except where an answer stands."""
        written = [self.write(lesson["question"], lesson["answer"]) for lesson in lessons]
        batch = self.processor(
            images=[lesson["picture"] for lesson in lessons],
            text=[text for text, _ in written],
            add_special_tokens=False,  # the chat template has written them
            padding=True,
            return_tensors="pt",
        )
        labels = torch.full_like(batch["input_ids"], -100)
        for row, (_, answer_length) in enumerate(written):
            tokens = batch["attention_mask"][row].nonzero().flatten()  # all but the padding, on whichever side it is
            answer = tokens[-answer_length:]
            labels[row, answer] = batch["input_ids"][row, answer]
        return {**batch, "labels": labels}

    def write(self, question: str, answer: str) -> tuple[str, int]:
        """Returns the conversation as text, and how many of its last tokens are the answer and the end of its turn."""
        if (question, answer) not in self._written:
            prompt = self.processor.apply_chat_template(conversation(question), add_generation_prompt=True)
            text = self.processor.apply_chat_template(conversation(question, answer))
            before, tokens = self.processor.tokenizer([prompt, text], add_special_tokens=False)["input_ids"]
            if tokens[: len(before)] != before or len(tokens) == len(before):
                raise ValueError(f"The prompt of {question!r} is not where the conversation with {answer!r} begins.")
            self._written[question, answer] = text, len(tokens) - len(before)
        return self._written[question, answer]


class LossInBar(ProgressCallback):
    """The Trainer's progress bar, with the loss at its end instead of a line for each log."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description("    training")
        self.training_bar.unit = " steps"

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")


def train(
    model: PreTrainedModel,
    examples: Sequence[Example],
    folder: str,
    epochs: float,
    seed: int = 0,
    learning_rate: float = 1.5e-3,
) -> Trainer:
    """Trains all parts of `model`, which holds its processor, in place."""
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        remove_unused_columns=False,
        use_cpu=True,
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Lessons(examples, seed),
        data_collator=AnswerCollator(model.processor),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossInBar)
    trainer.train()
    return trainer
