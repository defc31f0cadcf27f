# SPDX-License-Identifier: Apache-2.0
"""Sending a checkpoint to the Hub: one commit that makes the repository hold it, and no weights of an earlier one."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RevisionNotFoundError

from ..configuration.tools_moellava import ENTRY_MODULE
from .weight_names import is_code_file, is_weight_file, replaced_code


class SentCheckpoint(NamedTuple):
    """What `commit_checkpoint` did.

    Attributes:
        commit (`CommitInfo`): The commit that holds the checkpoint now.
        changed (`bool`): Whether it is a new one; `False` where the repository held the very same files already.
        deleted (`list[str]`): The files of an earlier checkpoint that it deletes: weights, and code.
    """

    commit: CommitInfo
    changed: bool
    deleted: list[str]


def commit_saved(folder: str | os.PathLike, repo_id: str, **options: Any) -> CommitInfo:
    """Makes one commit of all that `save_pretrained` has written into a folder; see `commit_checkpoint`."""
    saved = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return commit_checkpoint(folder, [path.relative_to(folder).as_posix() for path in saved], repo_id, **options).commit


def commit_checkpoint(
    folder: str | os.PathLike,
    files: Iterable[str],
    repo_id: str,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | bool | None = None,
) -> SentCheckpoint:
    """Makes one commit of a checkpoint, or of its processor alone, on a repository that exists.

    Large files are uploaded first. Until the commit, which comes last, nobody sees any of it.

    Args:
        folder (`str` or `os.PathLike`): Where the files lie.
        files (`Iterable[str]`): Their names in the folder and in the repository. Where there are weights among them,
            other weight files of the repository are deleted: transformers would read a `model.safetensors` that an
            earlier push left there rather than the shards of this one; and code that this one does not have. Where
            there are none, code that is in the repository stays as it is, since a processor does not know the model.
        repo_id (`str`): The repository.
        revision (`str`, *optional*): The branch; made from `main` if it is not there. Defaults to `main`.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request against the branch instead,
            which has to exist then.
        commit_message, commit_description, token (*optional*): As in huggingface_hub.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: The Hub refuses, or somebody else has pushed in the meantime.
    """
    files = list(files)
    hub = HfApi(token=token)
    branch_is_new = False
    try:
        head = hub.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        if create_pr:
            raise
        branch_is_new = True
        head = hub.model_info(repo_id)
    held = [file.rfilename for file in head.siblings]
    deleted = []
    if any(is_weight_file(name) for name in files):
        weights = [name for name in held if is_weight_file(name) and name not in files]
        deleted = [*weights, *replaced_code(held, files)]
    elif f"{ENTRY_MODULE}.py" in held:
        files = [name for name in files if not is_code_file(name)]
    additions = [CommitOperationAdd(name, os.path.join(folder, name)) for name in files]
    # Nor does a .gitignore in the repository keep files out: a checkpoint without its weights is none.
    base = None if branch_is_new else revision
    hub.preupload_lfs_files(repo_id, additions, revision=base, create_pr=create_pr, gitignore_content="")
    if branch_is_new:
        hub.create_branch(repo_id, branch=revision, revision=head.sha)
    commit = hub.create_commit(
        repo_id,
        [*additions, *(CommitOperationDelete(name, is_folder=False) for name in deleted)],
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        parent_commit=head.sha,
    )
    return SentCheckpoint(commit, commit.oid != head.sha, deleted)


__all__ = ["SentCheckpoint", "commit_checkpoint", "commit_saved"]
