# SPDX-License-Identifier: Apache-2.0
"""What the stages of a run were begun with, kept in their folders: a run goes on with the same, or not at all."""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..reading.json_files import write_json_object
from ..reading.provenance import path_labels
from .checkpoints import last_checkpoint
from .recipe import Recipe, Stage


logger = logging.getLogger(__name__)

_RECORD = "recipe.json"
# What has no part in the losses: what is written down and when, and how pictures are fetched.
_FREE = (
    "check_pictures", "dataloader_", "disable_tqdm", "hub_", "log_level", "logging_", "name", "push_to_hub",
    "report_to", "run_name", "save_",
)  # fmt: skip


def write_record(plan: Recipe, stage: Stage, folder: Path) -> None:
    """Writes down what a stage is begun with."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_object(folder / _RECORD, _record(plan, stage))


def check_records(plan: Recipe) -> None:
    """Compares a recipe with what the stages were begun with that an earlier run has left.

    Raises:
        ValueError: It is another recipe; there are checkpoints that no run can go on from; or a stage's folder holds
            what no run has made.
    """
    changes = []
    for stage in plan.stages:
        folder = plan.output_dir / stage.name
        if not (folder / _RECORD).is_file():
            if folder.is_dir() and any(folder.iterdir()):
                # What a cut-off run has left is cleared away, and the Trainer deletes old checkpoints: only our own.
                raise ValueError(
                    f"{folder} holds files and no {_RECORD}, so that no run of a recipe has made them. Nothing was "
                    "deleted. Give another output_dir, or move them away."
                )
            continue
        if stage.arguments.get("save_only_model") and (checkpoint := last_checkpoint(folder)) is not None:
            raise ValueError(
                f"{checkpoint} holds weights alone (save_only_model), so that no run can go on from it. Give it as the "
                "model of a new run, in another output_dir."
            )
        then = path_labels(json.loads((folder / _RECORD).read_text(encoding="utf-8")))
        now = _record(plan, stage)
        changes += [
            f"{stage.name}: {key} is {now.get(key)!r} and was {then.get(key)!r}"
            for key in sorted(then.keys() | now.keys())
            if now.get(key) != then.get(key) and not key.startswith(_FREE)
        ]
    if changes and not plan.allow_changes:
        raise ValueError(
            f"The run in {plan.output_dir} was begun with another recipe ({'; '.join(changes)}). Take the changes "
            "back, give another output_dir, or go on with them by allow_changes: true."
        )
    for change in changes:
        logger.warning("Going on with another recipe: %s", change)


def _record(plan: Recipe, stage: Stage) -> dict[str, Any]:
    fields = {field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)}
    fields |= {"model": plan.model, **fields.pop("arguments")}
    for key in ("data", "eval_data"):  # rows that are given themselves are not written down
        if fields[key] is not None and not isinstance(fields[key], str | os.PathLike | Mapping):
            fields[key] = f"a {type(fields[key]).__name__}"
    return path_labels(json.loads(json.dumps(fields, default=_plain)))


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)


__all__ = ["check_records", "write_record"]
