# SPDX-License-Identifier: Apache-2.0
"""Saving and sending a config, a model or a processor, with all that belongs to it: code, dtype, card."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from ..hub_cards.saving import write_card_of_save
from ..stored_dtypes import write_stored_dtype
from .commit import commit_saved
from .export import export_code
from .staging import is_staging, staged_folder


@contextmanager
def saving(folder: str | os.PathLike, saved: Any) -> Iterator[Path]:
    """Yields where a config, a model or a processor is written. When the block ends well, all is in `folder`, with
    the code that loads it; when it raises, `folder` is what it was before.

    Args:
        folder (`str` or `os.PathLike`): Where the checkpoint goes. Within the block of another save: its own folder.
        saved: What is saved.

    Raises:
        OSError: The folder, or the disk that it is on, cannot be written to.
        ValueError: A part that a user has written is defined where it cannot travel.
    """
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


def _complete(folder: Path, target: Path, repo_id: str | None = None) -> None:
    write_stored_dtype(folder, target, repo_id)
    write_card_of_save(folder, target, repo_id)  # last: it names the dtype


__all__ = ["saving", "upload"]
