# SPDX-License-Identifier: Apache-2.0
"""Med-MoE's routers: a classifier of rows on the features of a frozen model, written as a router's file."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from ..loading import load_pretrained_model
from .data import Collator
from .encoding import Encoder
from .rows import RowError, open_data, row_name


@dataclass
class RouterReport:
    """What the training of a router has given.

    Attributes:
        path (`Path`): The file.
        classes (`list[str]`): The classes, in the order of the experts.
        rows (`dict[str, int]`): How many rows each class has.
        accuracy (`float`): The share of the rows that were held out for which it names the right class.
        held_out (`int`): How many these were.
    """

    path: Path
    classes: list[str]
    rows: dict[str, int]
    accuracy: float
    held_out: int


class _Classifier(nn.Module):
    """One linear layer, and its loss."""

    def __init__(self, num_features: int, num_classes: int):
        super().__init__()
        self.fc1 = nn.Linear(num_features, num_classes)

    def forward(self, features: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.fc1(features)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def train_router(
    model: str | os.PathLike,
    data: Any,
    out: str | os.PathLike,
    *,
    label: str = "modality",
    classes: list[str] | None = None,
    image_folder: str | os.PathLike | None = None,
    as_written: bool = False,
    batch_size: int = 8,
    num_train_epochs: float = 10,
    learning_rate: float = 1e-3,
    held_out: float = 0.1,
    seed: int = 42,
    use_cpu: bool = False,
) -> RouterReport:
    """Trains a router to tell the kind of a row, such as the modality of its picture, as Med-MoE does.

    The features of a row are the mean of all hidden states, the embeddings with them, of its first question with its
    picture, over all positions. The model stays as it is. `upcycle(model, router_path=out)` puts the router into every
    sparse layer, with as many experts as there are classes.

    Args:
        model (`str` or `os.PathLike`): A dense checkpoint.
        data: Rows as for `train`, each with the field `label`.
        out (`str` or `os.PathLike`): The file to write, `.safetensors`; its metadata name the classes.
        label (`str`, *optional*, defaults to `"modality"`): The field that holds a row's class.
        classes (`list[str]`, *optional*): The classes in the order of the experts; by default those of the data,
            sorted.
        image_folder (`str` or `os.PathLike`, *optional*): Where relative paths of pictures begin.
        as_written (`bool`, *optional*, defaults to `False`): Whether questions stay as they are in the rows.
        batch_size (`int`, *optional*, defaults to 8): How many rows run through the model at once.
        num_train_epochs (`float`, *optional*, defaults to 10): How often the classifier sees every row.
        learning_rate (`float`, *optional*, defaults to 1e-3): Adam's.
        held_out (`float`, *optional*, defaults to 0.1): The share of the rows that it is tested on.
        seed (`int`, *optional*, defaults to 42): For the choice of those, and for the training.
        use_cpu (`bool`, *optional*, defaults to `False`): Whether to leave an accelerator alone.

    Raises:
        FileNotFoundError: The model or the data is not there.
        ValueError: `out` is no `.safetensors` file, a row cannot be used or has no class that is known, or there are
            fewer than two classes.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"out is {out}; expected a .safetensors file.")
    rows, kinds = _labelled(open_data(data, image_folder, as_written), label)
    classes = sorted(set(kinds)) if classes is None else list(classes)
    if strange := sorted(set(kinds) - set(classes)):
        raise ValueError(f"Rows have the {label} {strange}, which classes does not name: {classes}.")
    if len(classes) < 2:
        raise ValueError(f"The rows have the one {label} {classes}; a router tells at least two apart.")
    loaded = load_pretrained_model(model, **({"device": "cpu"} if use_cpu else {})).model
    features = _features(loaded, rows, batch_size)
    labels = torch.tensor([classes.index(kind) for kind in kinds])

    set_seed(seed)
    order = torch.randperm(len(rows))
    split = max(1, round(held_out * len(rows))) if held_out else 0
    test, train = order[:split], order[split:]
    classifier = _Classifier(features.shape[1], len(classes))
    arguments = TrainingArguments(
        output_dir=str(out.parent),
        num_train_epochs=num_train_epochs,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=32,
        seed=seed,
        use_cpu=use_cpu,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    )
    examples = [{"features": features[index], "labels": labels[index]} for index in train.tolist()]
    Trainer(model=classifier, args=arguments, train_dataset=examples).train()
    classifier.cpu().eval()
    with torch.no_grad():
        right = classifier(features[test])["logits"].argmax(dim=-1) == labels[test]
    state = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, out, metadata={"format": "pt", "classes": ", ".join(classes)})
    return RouterReport(
        out, classes, dict(Counter(kinds)), right.double().mean().item() if split else float("nan"), split
    )


def _labelled(rows: Any, label: str) -> tuple[list[Any], list[str]]:
    """Returns the rows and their classes; here every row counts, so that none is left out."""
    found, kinds = [], []
    for index, raw in rows.raw():
        try:
            found.append(rows.parse(raw, index))
        except RowError as error:
            raise ValueError(f"{row_name(raw, index)} cannot be used: {error}. Take it out, or mend it.") from error
        if not isinstance(raw.get(label), str):
            raise ValueError(f"{row_name(raw, index)} has no {label}: expected its class, a text, in this field.")
        kinds.append(raw[label])
    return found, kinds


@torch.no_grad()
def _features(model: Any, rows: list[Any], batch_size: int) -> torch.Tensor:
    """Returns the features of rows, `(rows, hidden_size)`, in fp32 on the CPU."""
    encoder, collate = Encoder(model.processor), Collator(model.processor)
    features = []
    for start in range(0, len(rows), batch_size):
        examples = []
        for row in rows[start : start + batch_size]:
            tokens = encoder.prompt(row)
            examples.append(
                {"input_ids": tokens, "labels": [-100] * len(tokens), "pictures": row.pictures, "name": row.name}
            )
        batch = {name: tensor.to(model.device) for name, tensor in collate(examples).items() if name != "labels"}
        outputs = model(**batch, output_hidden_states=True, logits_to_keep=1)
        mean = torch.stack([state.float() for state in outputs.hidden_states]).mean(dim=0)
        mask = batch["attention_mask"].unsqueeze(-1).float()
        features.append(((mean * mask).sum(dim=1) / mask.sum(dim=1)).cpu())
    return torch.cat(features)


__all__ = ["RouterReport", "train_router"]
