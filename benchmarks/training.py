# SPDX-License-Identifier: Apache-2.0
"""Training, from files on the disk to the last step, against a plain `transformers.Trainer` run of transformers' LLaVA.

    python benchmarks/training.py
    python benchmarks/training.py --quick      # tiny: only to see that it runs

Both have the same weights, data, batches, attention, arguments and trained parameters (all but the vision tower), and
their losses are checked to be equal. The plain run gets its conversations encoded for nothing; ours includes it.
"""

import argparse
import copy
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import THREADS, Row, alternating, compared, machine, print_progress, show, word_tokenizer, write
from PIL import Image
from tokenizers import pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from vision import PEER, Sizes, llava_config, ours_like

from moellava.processing import MoellavaProcessor
from moellava.training.data import Collator, Examples
from moellava.training.encoding import Encoder
from moellava.training.parts import set_trained
from moellava.training.rows import open_data
from moellava.training.trainer import MoellavaTrainer


AIM = 1.05
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{% for part in message['content'] %}"
    "{{ ' <image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}"
    "{{ ' </s>' if message['role'] == 'assistant' }}{% endfor %}"
)


@dataclass(frozen=True)
class Run:
    """Sizes of the models, and how much is trained."""

    num_layers: int = 6
    hidden_size: int = 384
    text_layers: int = 6
    text_hidden_size: int = 512
    image_size: int = 224
    batch: int = 4
    steps: int = 6
    words: int = 40
    repeats: int = 5
    seconds: float = 180  # beyond three repeats


TINY = Run(2, 32, 1, 32, 28, batch=2, steps=2, words=8, repeats=1)


def write_data(folder: Path, run: Run) -> Path:
    """Writes conversations about photographs of noise, in LLaVA's JSON."""
    chance = random.Random(0)
    rows = []
    for number in range(run.batch * run.steps):
        noise = Image.frombytes("RGB", (40, 30), chance.randbytes(3600))
        noise.resize((run.image_size * 3 // 2, run.image_size)).save(folder / f"{number}.jpg")
        said = [" ".join(f"word{chance.randrange(3, 64)}" for _ in range(run.words)) for _ in range(2)]
        turns = [{"from": "human", "value": f"<image>\n{said[0]}"}, {"from": "gpt", "value": said[1]}]
        rows.append({"image": f"{number}.jpg", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "rows.json"


def make_models(run: Run) -> tuple[Any, LlavaForConditionalGeneration]:
    """Returns both models, ours with its processor, of the same weights."""
    tokenizer = word_tokenizer(64)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens({"pad_token": "</s>", "additional_special_tokens": ["<image>"]})
    heads = max(2, run.hidden_size // 64)
    config = llava_config(Sizes(run.num_layers, run.hidden_size, heads, run.image_size, run.text_hidden_size))
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config.text_config.update(
        {
            "vocab_size": len(tokenizer),
            "intermediate_size": 3 * run.text_hidden_size,
            "num_hidden_layers": run.text_layers,
            "num_attention_heads": max(2, run.text_hidden_size // 64),
            "num_key_value_heads": max(2, run.text_hidden_size // 64),
        }
    )
    torch.manual_seed(0)
    peer = LlavaForConditionalGeneration(config)
    ours = ours_like(copy.deepcopy(peer), config.vision_feature_layer)
    crop = {"height": run.image_size, "width": run.image_size}
    ours.processor = MoellavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": run.image_size}, crop_size=crop),
        tokenizer,
        num_image_tokens=(run.image_size // 14) ** 2,
        image_aspect_ratio="square",
        chat_template=CHAT_TEMPLATE,
    )
    set_trained(ours, "instruct", [], [])
    peer.model.vision_tower.requires_grad_(False)
    return ours, peer


def plain_collator(image_processor: Any, padding: int) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Returns what anyone would write: it opens the pictures of encoded rows, and pads."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pictures = [Image.open(path).convert("RGB") for row in rows for path in row["pictures"]]
        input_ids = [torch.as_tensor(row["input_ids"]).long() for row in rows]
        labels = [torch.as_tensor(row["labels"]).long() for row in rows]
        ones = [torch.ones_like(row) for row in input_ids]
        return {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=padding),
            "attention_mask": pad_sequence(ones, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "pixel_values": image_processor(pictures, return_tensors="pt")["pixel_values"],
        }

    return collate


def rows(quick: bool = False, tell: Callable[[str], None] = lambda what: None, run: Run | None = None) -> list[Row]:
    """Measures; `tell` is told what comes next."""
    run = run or (TINY if quick else Run())
    with tempfile.TemporaryDirectory(prefix="moellava-training-") as folder:
        data = write_data(Path(folder), run)
        ours, peer = make_models(run)
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=run.batch, max_steps=run.steps, learning_rate=1e-4,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=True, remove_unused_columns=False,
        )  # fmt: skip
        encoded = list(Examples(open_data(data), Encoder(ours.processor)))
        losses: dict[str, list[float]] = {"ours": [], "peer": []}

        def train_ours() -> None:
            trainer = MoellavaTrainer(
                ours,
                arguments,
                train_dataset=Examples(open_data(data), Encoder(ours.processor)),
                data_collator=Collator(ours.processor),
            )
            take("ours", trainer)

        def train_peer() -> None:
            collate = plain_collator(ours.processor.image_processor, ours.processor.tokenizer.pad_token_id)
            take("peer", Trainer(peer, arguments, train_dataset=encoded, data_collator=collate))

        def take(name: str, trainer: Trainer) -> None:
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            losses[name] += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

        tell(f"{run.steps} steps of {run.batch} pictures")
        times = alternating({"ours": train_ours, "peer": train_peer}, run.repeats, seconds=run.seconds)
    torch.testing.assert_close(losses["ours"], losses["peer"], rtol=1e-4, atol=1e-4)
    pictures = run.batch * run.steps
    found = compared(
        "training", f"a picture, {run.batch} in a batch, float32", PEER, times["ours"], times["peer"], per=pictures,
        peer_per=pictures, aim=AIM,
    )  # fmt: skip
    found.note = f"{1000 / found.value:.2f} pictures a second, the peer {1000 / found.peer_value:.2f}"
    return [found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--repeats", type=int, default=Run.repeats)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    described = {"machine": machine(arguments.threads)}
    found = rows(arguments.quick, print_progress, run=None if arguments.quick else Run(repeats=arguments.repeats))
    show(found, "training")
    if arguments.out:
        write(found, described, arguments.out)


if __name__ == "__main__":
    main()
