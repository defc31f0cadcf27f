# SPDX-License-Identifier: Apache-2.0
"""`push`: a saved checkpoint to the Hub, whole, in one commit, and nothing else of its folder."""

import dataclasses
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, save_torch_state_dict
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import httpx
from safetensors import SafetensorError
from transformers.dynamic_module_utils import get_relative_import_files

from ..hub_cards import write_card
from ..hub_cards.writing import read_card
from ..inspecting import inspect_checkpoint
from ..reading.sources import CONFIG_NAME, Source
from ..saving.commit import commit_checkpoint
from .card_pictures import without_metadata
from .published_files import CARD_NAME, PROCESSOR_NAME, check_links, left_out, published_files, shown_in_card


logger = logging.getLogger(__name__)

_ADAPTER_NAME = "adapter_config.json"
_ADVICE = {
    401: "Log in with `hf auth login`, or give a token that may write to it.",
    403: "Log in with `hf auth login`, or give a token that may write to it.",
    412: "Somebody else has pushed in the meantime: push again.",
    429: "Wait for some minutes, then push again.",
}


@dataclasses.dataclass(frozen=True)
class PushReport:
    """What `push` did.

    Attributes:
        url (`str`): The repository's page.
        commit (`str`): The id of the commit that holds the checkpoint, to be loaded as `revision`.
        changed (`bool`): Whether that commit is a new one; `False` where the repository held the same files already.
        files (`list[str]`): The files of the checkpoint.
        pull_request (`str`, *optional*): The page of the pull request that was opened.
        left_out (`list[str]`): What else lies in the folder and was not sent; folders end in `/`.
        deleted (`list[str]`): Weight files of an earlier checkpoint that the commit deletes.
    """

    url: str
    commit: str
    changed: bool
    files: list[str]
    pull_request: str | None
    left_out: list[str]
    deleted: list[str]


def push(
    checkpoint: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | bool | None = None,
    max_shard_size: int | str | None = None,
    include: str | Iterable[str] = (),
) -> PushReport:
    r"""
    Pushes a saved checkpoint to the Hub: model, processor, code and card in one commit.

    The card is the folder's `README.md`, completed as `write_card` does it, where you wrote it; else the one that
    somebody wrote in the repository; else a new one. In the folder nothing is changed.

    Files are sent by what they are: weights, config, tokenizer, processor, code, the card with the pictures that it
    shows, and licences. Those pictures are sent without metadata (place, names, comments). What else lies in the folder
    is listed in a warning and in the report, and stays.

    What is wrong with the checkpoint is found before anything is sent. The commit comes last, after the large files
    have been uploaded: until then the repository is what it was. (A repository or a branch that is made for the push
    is there before, and stays.)

    Args:
        checkpoint (`str` or `os.PathLike`): A folder that `save_pretrained`, `moellava assemble` or `moellava convert`
            wrote.
        repo_id (`str`): Where to, such as `"me/my-model"`; made if it is not there.
        private (`bool`, *optional*): Whether only you see a new repository. It does not change one that exists.
        revision (`str`, *optional*): The branch, made from `main` if it is not there. Defaults to `main`.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead, against `revision`.
        commit_message (`str`, *optional*, defaults to `"Upload model"`), commit_description (`str`, *optional*):
            As in huggingface_hub.
        token (`str` or `bool`, *optional*): As in huggingface_hub; by default that of `hf auth login`.
        max_shard_size (`int` or `str`, *optional*): Weights are written anew in files of at most this size, such as
            `"5GB"`, to a temporary folder that has to have room for them. By default they are sent in the files that
            they lie in.
        include (`str` or `Iterable[str]`, *optional*): Patterns of more files of the folder to send, such as `"*.csv"`
            or `"results/"`. Files and folders that begin with a dot are not sent, whatever they say.

    Returns:
        [`PushReport`]

    Raises:
        FileNotFoundError: The folder, weights or code that the checkpoint needs are not there.
        ValueError: It is no complete checkpoint of this package, a file of it is damaged or a link to one elsewhere, a
            pattern has no file, a picture of the card cannot be written without its metadata, or a repository exists
            that is not `private` as asked for.
        OSError: The Hub cannot be reached or refuses; `PermissionError` where the token does not suffice.

    Example:

    ```python
    >>> from moellava.hub import push

    >>> report = push("my-model", "me/my-model", private=True)
    >>> report.changed, report.commit, report.left_out
    ```"""
    source = Source(checkpoint)
    files = checkpoint_files(source, [include] if isinstance(include, str) else include)
    staying = left_out(Path(source.name), files)
    if staying:
        logger.warning(
            "Not sent, since it is no part of the checkpoint: %s. Name in include what is to be public too.",
            ", ".join(staying),
        )
    with tempfile.TemporaryDirectory() as staging, _told_in_a_sentence(repo_id):
        _stage(source, files, Path(staging), max_shard_size)
        hub = HfApi(token=token)
        repository = hub.create_repo(repo_id, private=private, exist_ok=True)
        if private is not None and bool(hub.model_info(repository.repo_id).private) != private:
            raise ValueError(
                f"{repository.repo_id} exists and is {'public' if private else 'private'}; private={private} can only "
                "be had of a new repository. Nothing was sent. Change it in the repository's settings, or leave "
                "private out."
            )
        write_card(staging, repo_id=repository.repo_id, on_hub=_card_on_hub(hub, repository.repo_id, revision))
        files = sorted(path.relative_to(staging).as_posix() for path in Path(staging).rglob("*") if path.is_file())
        sent = commit_checkpoint(
            staging,
            files,
            repository.repo_id,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            token=token,
        )
    if not sent.changed:
        logger.info("%s holds the same files already; there is nothing to commit.", repository.repo_id)
    return PushReport(
        url=str(repository),
        commit=sent.commit.oid,
        changed=sent.changed,
        files=files,
        pull_request=sent.commit.pr_url,
        left_out=staying,
        deleted=sent.deleted if sent.changed else [],
    )


def checkpoint_files(source: Source, include: Iterable[str] = ()) -> list[str]:
    """Returns the names of the files that make up a checkpoint; no weight is read and none of its code is run.

    These are the weights, as the index lists them where there is one; the code that transformers fetches for them; and
    what [`published_files`] returns.

    Args:
        source (`Source`): The checkpoint's folder.
        include (`Iterable[str]`, *optional*): Patterns of more files of the folder.

    Raises:
        FileNotFoundError: There is no such folder, or weights or code are missing in it.
        ValueError: It is no complete checkpoint of this package, a file of it is damaged or a link to one elsewhere, or
            a pattern has no file.
    """
    if not source.is_local:
        raise FileNotFoundError(
            f"There is no folder {source.name!r}: expected a checkpoint that was saved on this machine."
        )
    folder = Path(source.name)
    if source.find(CONFIG_NAME) is None and source.find(_ADAPTER_NAME) is not None:
        raise ValueError(
            f"{folder} is an adapter, which is no model by itself. Push it with PEFT's push_to_hub; or load it with "
            "model_base, save the merged model and push that."
        )
    inspect_checkpoint(folder)
    if source.find(PROCESSOR_NAME) is None:
        raise ValueError(
            f"{folder} has no {PROCESSOR_NAME}: whoever loads it could not ask it about pictures. Save the processor "
            f"there first: model.processor.save_pretrained({str(folder)!r})."
        )
    weights = _weight_names(source)
    hidden = sorted(name for name in weights if name.startswith("."))
    if hidden:
        raise ValueError(
            f"The index of {folder} names {hidden[0]!r}; a file that begins with a dot is never sent. Load the model "
            "and save it again."
        )
    names = {*weights, *_code_names(source)}
    check_links(folder, names)
    return sorted(names | published_files(folder, include))


def _weight_names(source: Source) -> set[str]:
    names = {path.name for path in source.weight_files()}
    if names.isdisjoint(("model.safetensors", "pytorch_model.bin")):
        indices = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
        names.add(next(name for name in indices if source.find(name) is not None))
    return names


def _code_names(source: Source) -> set[str]:
    """The files that `auto_map` names, and those that transformers fetches because of their imports."""
    references = (source.read_json(CONFIG_NAME) or {}).get("auto_map")
    if not isinstance(references, dict) or any("--" in str(reference) for reference in references.values()):
        raise ValueError(
            f"The {CONFIG_NAME} of {source} names no code in the checkpoint (its auto_map is {references!r}), so that "
            "transformers could not load it without this package. Load the model and save it again."
        )
    names = {f"{str(reference).partition('.')[0]}.py" for reference in references.values()}
    try:
        for name in list(names):
            names |= {Path(file).name for file in get_relative_import_files(Path(source.name) / name)}
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{source} lacks {Path(error.filename).name}, which its code needs. Load the model and save it again."
        ) from error
    return names


def _stage(source: Source, files: list[str], staging: Path, max_shard_size: int | str | None) -> None:
    """Links the files into a folder, where weights to be sharded, and pictures of the card, are written anew."""
    linked = set(files)
    if max_shard_size is not None:
        linked -= _weight_names(source)
        try:
            save_torch_state_dict(source.tensors(), staging, max_shard_size=max_shard_size, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(
                f"The shards of {source} could not be written to {staging} ({error}). Free space there, or set TMPDIR "
                "to a folder on a larger disk. Nothing was sent."
            ) from error
    pictures = shown_in_card(Path(source.name))
    for name in linked:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        path = Path(source.name, name).resolve()
        if name in pictures:
            (staging / name).write_bytes(without_metadata(path.read_bytes(), name))
        else:
            (staging / name).symlink_to(path)


def _card_on_hub(hub: HfApi, repo_id: str, revision: str | None) -> str | None:
    try:
        return read_card(Path(hub.hf_hub_download(repo_id, CARD_NAME, revision=revision)))
    except (EntryNotFoundError, RevisionNotFoundError):
        return None


@contextmanager
def _told_in_a_sentence(repo_id: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into one sentence that says what state the repository is in."""
    try:
        yield
    except (httpx.HTTPError, RuntimeError) as error:
        # A large file that could not be uploaded is a RuntimeError with the reason as its cause.
        reason = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(reason, httpx.HTTPError):
            raise
        raise _in_a_sentence(repo_id, reason) from error


def _in_a_sentence(repo_id: str, error: Exception) -> OSError:
    state = "The repository is as it was."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status is None or status >= 500:
        state = "The repository is as it was, or holds the whole commit where only the answer to it was lost."
    advice = "Push again: what the repository holds already is not sent twice."
    if status is None:
        reason = f"the connection to the Hub failed: {str(error) or type(error).__name__}"
        return ConnectionError(f"The push to {repo_id} broke off ({reason}). {state} {advice}")
    if status < 500:
        advice = _ADVICE.get(status, "Check the names of the repository and of the revision.")
    said = " ".join((error.server_message or str(error)).split())
    kind = PermissionError if status in (401, 403) else OSError
    return kind(f"The push to {repo_id} broke off (the Hub answered {status}: {said}). {state} {advice}")


__all__ = ["PushReport", "checkpoint_files", "push"]
