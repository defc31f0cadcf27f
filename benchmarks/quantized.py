# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint of the demo loses in 8 and in 4 bits: accuracy, likeness of the logits, bytes.

Every row is loaded from the same full-precision checkpoint. Accuracy is that of the answers to the questions about the
held-out scans, in full and word by word; the cosine is that of the logits to those in bf16, token by token, over the
same conversations with the right answers written behind the questions. Bytes are those of all weights in memory after a
pass, scales and tables included.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader

from moellava import load_pretrained_model, quantization_coverage, resident_bytes
from moellava.chatting.prompting import user_turn
from moellava.demo.scans import draw, load_examples
from moellava.training.data import Collator, Examples
from moellava.training.encoding import Encoder
from moellava.training.rows import open_data


ROOT = Path(__file__).resolve().parents[1]

PRECISIONS = {
    "bf16": {},
    "8 bits": {"load_8bit": True},
    "4 bits": {"load_4bit": True},
}


@dataclass
class Row:
    """One precision of a checkpoint.

    Attributes:
        precision (`str`): Its name.
        accuracy (`float`): The share of right answers.
        cosine (`float`): The mean cosine to the logits in bf16, over the tokens of the conversations.
        answer_cosine (`float`): The same over the tokens of the answers.
        bytes (`int`): Of all weights.
        experts (`float`, *optional*): The experts' bytes as a share of those in bf16; `None` for a dense model.
    """

    precision: str
    accuracy: float
    cosine: float
    answer_cosine: float
    bytes: int
    experts: float | None


@torch.no_grad()
def logits_of(model, examples, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns, for every batch, the logits of all tokens and which of them predict an answer."""
    rows = [
        {
            "messages": [{"role": "user", "content": r.question}, {"role": "assistant", "content": r.answer}],
            "images": [draw(r.scan)],
        }
        for r in examples
    ]
    lessons = Examples(open_data(rows), Encoder(model.processor), check_pictures=False)
    batches = []
    for batch in DataLoader(lessons, batch_size, collate_fn=Collator(model.processor)):
        labels = batch.pop("labels")
        kept = batch["attention_mask"].bool()
        predicts = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100
        batches.append((model(**batch).logits[kept].float(), predicts[kept]))
    return batches


@torch.no_grad()
def accuracy_of(model, examples, batch_size: int) -> float:
    processor, right = model.processor, 0
    for start in range(0, len(examples), batch_size):
        rows = examples[start : start + batch_size]
        inputs = processor.apply_chat_template(
            [[user_turn([draw(r.scan)], r.question)] for r in rows],
            add_generation_prompt=True, tokenize=True, return_dict=True, padding=True, return_tensors="pt",
        )  # fmt: skip
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(answer.strip() == row.answer for answer, row in zip(answers, rows, strict=True))
    return right / len(examples)


def measure(checkpoint: str, examples: list, batch_size: int) -> list[Row]:
    """Measures every precision of a checkpoint, bf16 first."""
    rows, reference = [], None
    for precision, options in track(PRECISIONS.items(), description=checkpoint):
        model = load_pretrained_model(checkpoint, device="cpu", dtype="bfloat16", **options).model
        logits = logits_of(model, examples, batch_size)
        reference = logits if reference is None else reference
        cosines = torch.cat(
            [torch.cosine_similarity(own, ref, dim=-1) for (own, _), (ref, _) in zip(logits, reference, strict=True)]
        )
        answers = torch.cat([predicts for _, predicts in logits])
        experts = None
        if options and model.config.moe_config is not None:
            experts = next(part for part in quantization_coverage(model).parts if part.name == "experts")
            experts = experts.bytes / experts.bytes_bf16
        rows.append(
            Row(
                precision=precision,
                accuracy=accuracy_of(model, examples, batch_size),
                cosine=cosines.mean().item(),
                answer_cosine=cosines[answers].mean().item(),
                bytes=resident_bytes(model),
                experts=experts,
            )
        )
    return rows


def table_of(checkpoint: str, rows: list[Row]) -> Table:
    table = Table(
        "weights", "accuracy", "cosine", "of answers", "bytes", "of bf16", "experts, of bf16", title=checkpoint
    )
    for row in rows:
        table.add_row(
            row.precision, f"{row.accuracy:.2%}", f"{row.cosine:.4f}", f"{row.answer_cosine:.4f}", f"{row.bytes:,}",
            f"{row.bytes / rows[0].bytes:.3f}", "" if row.experts is None else f"{row.experts:.3f}",
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = [str(ROOT / "build" / "demo" / name) for name in ("sparse-checkpoint", "checkpoint")]
    parser.add_argument("checkpoints", nargs="*", default=default, help="checkpoints that `make demo` has trained")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    _, examples = load_examples()
    console = Console(highlight=False)
    for checkpoint in arguments.checkpoints:
        console.print(table_of(checkpoint, measure(checkpoint, examples, arguments.batch_size)))


if __name__ == "__main__":
    main()
