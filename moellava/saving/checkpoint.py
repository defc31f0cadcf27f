# SPDX-License-Identifier: Apache-2.0
"""Saving and sending a config, a model or a processor, with all that belongs to it: code, dtype, card."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from ..hub_cards.saving import write_card_of_save
from .commit import commit_saved
from .export import export_code
from .staging import is_staging, staged_folder
from .stored_dtypes import write_stored_dtype


@contextmanager
def saving(folder: str | os.PathLike, saved: Any, is_main_process: bool = True) -> Iterator[Path]:
    """Yields where a config, a model or a processor is written. When the block ends well, all is in `folder`, with
    the code that loads it; when it raises, `folder` is what it was before.

    Args:
        folder (`str` or `os.PathLike`): Where the checkpoint goes. Within the block of another save: its own folder.
        saved: What is saved.
        is_main_process (`bool`, *optional*, defaults to `True`): Whether this process writes the files.

    Raises:
        OSError: The folder, or the disk that it is on, cannot be written to.
        ValueError: A part that a user has written is defined where it cannot travel.
    """
    if isinstance(saved, PreTrainedModel):
        _check_processor(saved)
    if not is_main_process:
        yield Path(folder)
        _wait_for_the_save(saved)
        return
    if is_staging(folder):  # part of a save that adds the code itself
        yield Path(folder)
        return
    with staged_folder(folder) as staging:
        try:
            yield staging
        except SafetensorError as error:  # which is no OSError, though it tells of one
            raise OSError(
                f"The weights cannot be written to {folder}: {error}. Nothing there has changed; a save "
                "needs room for the new checkpoint beside the earlier one."
            ) from error
        config = saved if isinstance(saved, PreTrainedConfig) else getattr(saved, "config", None)
        export_code(staging, config, earlier=folder)
        if isinstance(saved, PreTrainedModel):
            _complete(staging, Path(folder))
    _wait_for_the_save(saved)


def upload(saved: Any, folder: str | os.PathLike, repo_id: str, **options: Any) -> Any:
    """Sends what `push_to_hub` has saved into a folder in one commit, which leaves no weights and no code of an earlier
    push behind. transformers deletes nothing: of a repository that held one `model.safetensors`, it would go on to read
    that one after the model has been pushed in shards.
    """
    if isinstance(saved, PreTrainedModel):
        # transformers has by now put the repository's own card, or a blank one, in the place of the one of the save.
        _complete(Path(folder), Path(folder), repo_id)
    else:
        options.setdefault("commit_message", "Upload processor")
    return commit_saved(folder, repo_id, **options)


def _check_processor(model: PreTrainedModel) -> None:
    expected = model.config.image_seq_length
    tokens = getattr(model.processor, "num_image_tokens", expected)
    if tokens != expected:
        raise ValueError(
            f"The model's processor makes {tokens} tokens of a picture, its config {expected}. Set "
            "model.processor.num_image_tokens too, and its picture size."
        )


def _wait_for_the_save(saved: Any) -> None:
    """Of a model that is divided among processes, which all save it, lets each go on when the folder is in place."""
    is_divided = getattr(getattr(saved, "config", None), "distributed_config", None) is not None
    if is_divided and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _complete(folder: Path, target: Path, repo_id: str | None = None) -> None:
    write_stored_dtype(folder, target, repo_id)
    write_card_of_save(folder, target, repo_id)  # last: it names the dtype


__all__ = ["saving", "upload"]
