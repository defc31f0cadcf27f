# SPDX-License-Identifier: Apache-2.0
"""Training data for `transformers.Trainer`: datasets of encoded conversations, their batches, and the check of them."""

import base64
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from ..configuration import MoellavaConfig
from ..reading.language_model import context_length
from ..reading.processor import read_processor
from ..reading.sources import Source
from .encoding import IGNORED, Encoder
from .rows import RowError, Rows, open_data, open_picture, row_name


logger = logging.getLogger(__name__)

# How many of the rows that cannot be used are named in a log line.
_NAMED = 5


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used: what it is called, what is wrong in a word, and in a sentence."""

    row: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.row}: {self.kind}: {self.detail}"


@dataclass
class DataReport:
    """What a check of training data has found.

    Attributes:
        rows (`int`): How many there are.
        problems (`list[Problem]`): Those that cannot be used, in their order.
        pictures (`int`): The pictures of the rows that can be used.
        tokens (`int`): Their tokens, pictures with them; 0 if there was no processor to count them.
        answer_tokens (`int`): Those of them that are learnt.
        longest (`int`): The tokens of the longest of them.
        unread (`dict[str, int]`): The fields that are not read, and of how many rows.
    """

    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    pictures: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    longest: int = 0
    unread: Counter[str] = field(default_factory=Counter)

    @property
    def usable(self) -> int:
        """How many rows can be used."""
        return self.rows - len(self.problems)

    @property
    def kinds(self) -> dict[str, int]:
        """How many rows have each kind of problem, the most frequent first."""
        return dict(Counter(problem.kind for problem in self.problems).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        return {
            "rows": self.rows,
            "usable": self.usable,
            "pictures": self.pictures,
            "tokens": self.tokens,
            "answer_tokens": self.answer_tokens,
            "longest": self.longest,
            "unread": dict(self.unread),
            "kinds": self.kinds,
            "problems": [vars(problem) for problem in self.problems],
        }

    def lines(self, most: int = 20) -> list[str]:
        """Returns the report as lines of text, with at most so many of the rows named."""
        lines = [f"{self.usable} of {self.rows} rows can be used, with {self.pictures} pictures"]
        if self.tokens:
            lines.append(
                f"{self.tokens} tokens, {self.answer_tokens} of them learnt; the longest row has {self.longest}"
            )
        if self.unread:
            lines.append(self.unread_line)
        lines += [f"{kind}: {count} row(s)" for kind, count in self.kinds.items()]
        lines += [str(problem) for problem in self.problems[:most]]
        if len(self.problems) > most:
            lines.append(f"... and {len(self.problems) - most} more")
        return lines

    @property
    def unread_line(self) -> str:
        """Names the fields that are not read."""
        return "fields that are not read: " + ", ".join(
            f"{name} ({count} rows)" for name, count in self.unread.most_common()
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes the report as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


class Examples(Dataset):
    """Encoded conversations in memory; pictures stay where they are until a batch is made.

    Args:
        rows (`Rows`): The data, of a known length.
        encoder (`Encoder`): What makes tokens of it.
        check_pictures (`bool`): Whether every picture is opened now, so that none fails in the middle of training.

    Raises:
        ValueError: No row can be used.
    """

    def __init__(self, rows: Rows, encoder: Encoder, check_pictures: bool = True):
        self.rows = rows
        self.report = DataReport()
        self._kept: list[tuple[int, np.ndarray, list[tuple[int, int]]]] = []
        for index, encoded, _ in _encoded(rows, encoder, self.report, check_pictures):
            self._kept.append((index, np.asarray(encoded.input_ids, dtype=np.int32), encoded.answers))
        _require_some(self.report)

    @property
    def lengths(self) -> list[int]:
        """The tokens of every conversation."""
        return [len(input_ids) for _, input_ids, _ in self._kept]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, input_ids, answers = self._kept[index]
        labels = np.full_like(input_ids, IGNORED)
        for start, end in answers:
            labels[start:end] = input_ids[start:end]
        row = self.rows[number]
        return {"input_ids": input_ids, "labels": labels, "pictures": row.pictures, "name": row.name}


class StreamedExamples(IterableDataset):
    """Encoded conversations one after the other, as they come; rows that cannot be used are named and left out.

    Args:
        rows (`Rows`): The data.
        encoder (`Encoder`): What makes tokens of it.
    """

    def __init__(self, rows: Rows, encoder: Encoder):
        self.rows = rows
        self.encoder = encoder
        self.report = DataReport()

    def set_epoch(self, epoch: int) -> None:
        """Lets a dataset that shuffles do so anew."""
        if hasattr(self.rows.source, "set_epoch"):
            self.rows.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.report = report = DataReport()
        for _, encoded, row in _encoded(self.rows, self.encoder, report, check_pictures=True, log=True):
            yield {
                "input_ids": np.asarray(encoded.input_ids, dtype=np.int32),
                "labels": np.asarray(encoded.labels, dtype=np.int32),
                "pictures": row.pictures,
                "name": row.name,
            }
        if report.unread:
            logger.warning("The data: %s", report.unread_line)
        _require_some(report)


def _encoded(
    rows: Rows, encoder: Encoder | None, report: DataReport, check_pictures: bool, log: bool = False
) -> Iterator[tuple[int, Any, Any]]:
    """Yields the number, the tokens and the row of what can be used, and notes the rest in a report."""
    aspect_ratio = "square" if encoder is None else encoder.processor.image_aspect_ratio
    for index, raw in rows.raw():
        report.rows += 1
        try:
            row = rows.parse(raw, index)
            encoded = None if encoder is None else encoder.encode(row)
            for picture in row.pictures:
                if check_pictures:
                    open_picture(picture, aspect_ratio)
                elif isinstance(picture, os.PathLike) and not os.path.isfile(picture):
                    raise RowError("missing picture", f"there is no file {picture}")
        except RowError as error:
            problem = Problem(row_name(raw, index), error.kind, str(error))
            report.problems.append(problem)
            if log:
                logger.warning("Left out: %s", problem)
            continue
        report.pictures += len(row.pictures)
        report.unread.update(row.unread)
        if encoded is not None:
            report.tokens += len(encoded.input_ids)
            report.answer_tokens += sum(end - start for start, end in encoded.answers)
            report.longest = max(report.longest, len(encoded.input_ids))
        yield index, encoded, row


def _require_some(report: DataReport) -> None:
    if report.rows == len(report.problems):
        reasons = "; ".join(map(str, report.problems[:_NAMED])) or "there are none"
        raise ValueError(f"None of the {report.rows} rows can be used: {reasons}. Expected rows with conversations.")


def log_problems(report: DataReport, origin: str) -> None:
    """Logs how many rows of some data are left out, and names the first of them."""
    if report.problems:
        first = "; ".join(map(str, report.problems[:_NAMED]))
        rest = len(report.problems) - _NAMED
        logger.warning(
            "%d of the %d rows of %s are left out: %s%s", len(report.problems), report.rows, origin, first,
            f"; and {rest} more" if rest > 0 else "",
        )  # fmt: skip
    if report.unread:
        logger.warning("%s: %s", origin, report.unread_line)


def overlapping(examples: Examples, others: Examples) -> list[str]:
    """Returns the names of the rows of `examples` that are rows of `others` too: the same tokens and the same images.

    Images are compared by their files' content, and only of rows whose tokens are the same.
    """
    rows_of: dict[bytes, list[int]] = {}
    for place, (_, input_ids, _) in enumerate(others._kept):
        rows_of.setdefault(input_ids.tobytes(), []).append(place)
    shown_in: dict[bytes, set[tuple[bytes, ...]]] = {}
    found = []
    for number, input_ids, _ in examples._kept:
        key = input_ids.tobytes()
        if key not in rows_of:
            continue
        if key not in shown_in:
            shown_in[key] = {_contents(others.rows[others._kept[place][0]]) for place in rows_of[key]}
        row = examples.rows[number]
        if _contents(row) in shown_in[key]:
            found.append(row.name)
    return found


def _contents(row: Any) -> tuple[bytes, ...]:
    return tuple(_digest(picture) for picture in row.pictures)


def _digest(picture: Any) -> bytes:
    """Returns what tells the content of an image: that of its file, or else its pixels."""
    if isinstance(picture, Mapping):
        return hashlib.sha256(picture["bytes"]).digest()
    if isinstance(picture, os.PathLike):
        return hashlib.sha256(Path(picture).read_bytes()).digest()
    if isinstance(picture, str):  # data:image/...;base64,...
        try:
            return hashlib.sha256(base64.b64decode(picture.partition(",")[2])).digest()
        except ValueError:
            return hashlib.sha256(picture.encode()).digest()
    return hashlib.sha256(open_picture(picture).tobytes()).digest()


def log_overlap(examples: Examples, others: Examples, origin: str) -> None:
    """Logs a warning if rows to evaluate on are rows to train on too."""
    if names := overlapping(examples, others):
        logger.warning(
            "%d of the %d rows of %s are rows of data too: %s%s. The loss on them tells nothing of rows that the model "
            "has not seen.", len(names), len(examples), origin, ", ".join(names[:_NAMED]),
            f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "",
        )  # fmt: skip


class Collator:
    """Makes a batch of encoded conversations: opens their pictures and pads them.

    Args:
        processor (`MoellavaProcessor`): The model's processor.
    """

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `attention_mask` and `labels`, (rows, tokens), and, if there are pictures,
        `pixel_values`, (pictures, 3, height, width).

        Raises:
            ValueError: A picture cannot be opened; the message names the row.
        """
        length = max(len(example["input_ids"]) for example in examples)
        padding = self.processor.tokenizer.pad_token_id or 0  # whatever it is, the mask hides it
        input_ids = torch.full((len(examples), length), padding)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORED)
        pictures = []
        for row, example in enumerate(examples):
            count = len(example["input_ids"])
            input_ids[row, :count] = torch.as_tensor(example["input_ids"])
            attention_mask[row, :count] = 1
            labels[row, :count] = torch.as_tensor(example["labels"])
            try:
                aspect_ratio = self.processor.image_aspect_ratio
                pictures += [open_picture(picture, aspect_ratio) for picture in example["pictures"]]
            except RowError as error:
                raise ValueError(f"{example['name']}: {error}. Take the row out, or mend the picture.") from error
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if pictures:
            batch["pixel_values"] = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        return batch


def check_data(
    data: Any,
    *,
    model: str | os.PathLike | None = None,
    processor: Any = None,
    image_folder: str | os.PathLike | None = None,
    max_length: int | None = None,
    check_pictures: bool = True,
    as_written: bool = False,
) -> DataReport:
    """Checks training data row by row, before any training.

    Args:
        data: The rows, in any form that `open_data` takes.
        model (`str` or `os.PathLike`, *optional*): A checkpoint, whose processor tells how long the rows are, and whose
            config how long they may be. Without it, lengths and templates are not checked.
        processor (`MoellavaProcessor`, *optional*): The processor itself, instead of `model`.
        image_folder (`str` or `os.PathLike`, *optional*): Where relative paths of pictures begin.
        max_length (`int`, *optional*): How many tokens a row may have; the model's positions by default.
        check_pictures (`bool`, *optional*, defaults to `True`): Whether pictures are opened; without it, only whether
            their files are there is checked.
        as_written (`bool`, *optional*, defaults to `False`): Whether questions stay as they are in the rows.

    Returns:
        [`DataReport`]: Rows that cannot be used, by name, and counts.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no list of rows.
    """
    if model is not None:
        processor, context = processor_and_context(model)
        max_length = max_length or context
    encoder = None if processor is None else Encoder(processor, max_length)
    report = DataReport()
    for _ in _encoded(open_data(data, image_folder, as_written), encoder, report, check_pictures):
        pass
    return report


def processor_and_context(model: str | os.PathLike) -> tuple[Any, int]:
    """Returns a checkpoint's processor and its number of positions, without reading a weight.

    Raises:
        ValueError: It is no checkpoint of this package.
    """
    source = Source(model)
    fields = source.config_dict()
    if fields.get("model_type") != MoellavaConfig.model_type:
        raise ValueError(
            f"{source} is a model of type {fields.get('model_type')!r}, not a checkpoint of this package. Assemble it "
            "first (`moellava assemble`)."
        )
    return read_processor(source), context_length(MoellavaConfig.from_dict(dict(fields)).text_config)


__all__ = [
    "Collator",
    "DataReport",
    "Examples",
    "Problem",
    "StreamedExamples",
    "check_data",
    "log_overlap",
    "log_problems",
    "overlapping",
    "processor_and_context",
]
