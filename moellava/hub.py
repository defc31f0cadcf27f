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
"""`push`: a saved checkpoint to the Hub, whole, in one commit, and nothing else of its folder."""

import dataclasses
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, save_torch_state_dict
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import httpx
from safetensors import SafetensorError
from transformers.dynamic_module_utils import get_relative_import_files

from .configuration.hub_moellava import commit_checkpoint
from .hub_cards import write_card
from .hub_cards.writing import read_card
from .inspecting import inspect_checkpoint
from .sources import CONFIG_NAME, Source


logger = logging.getLogger(__name__)

_ADAPTER_NAME = "adapter_config.json"
_CARD_NAME = "README.md"
_PROCESSOR_NAME = "processor_config.json"
# What transformers reads of a checkpoint beside weights and code, and what people read of it.
_OTHER_FILES = (
    CONFIG_NAME, "generation_config.json", _PROCESSOR_NAME, "preprocessor_config.json", "chat_template.json",
    "chat_template.jinja", "additional_chat_templates/*.jinja", "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "*.tiktoken", _CARD_NAME, "LICENSE*", "NOTICE*",
)  # fmt: skip
_ADVICE = {
    401: "Log in with `hf auth login`, or give a token that may write to it.",
    403: "Log in with `hf auth login`, or give a token that may write to it.",
    412: "Somebody else has pushed in the meantime: push again.",
    429: "Wait for some minutes, then push again.",
}
_PICTURE_IN_CARD = re.compile(r"""!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img\b[^>]*?\bsrc=["']([^"']+)["']""")


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
) -> PushReport:
    r"""
    Pushes a saved checkpoint to the Hub: model, processor, code and card in one commit.

    The card is the folder's `README.md`, completed as `write_card` does it, where you wrote it; else the one that
    somebody wrote in the repository; else a new one. In the folder nothing is changed.

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

    Returns:
        [`PushReport`]

    Raises:
        FileNotFoundError: The folder, weights or code that the checkpoint needs are not there.
        ValueError: It is no complete checkpoint of this package, a file of it is damaged, or a repository exists that
            is not `private` as asked for.
        OSError: The Hub cannot be reached or refuses; `PermissionError` where the token does not suffice.

    Example:

    ```python
    >>> from moellava.hub import push

    >>> report = push("my-model", "me/my-model", private=True)
    >>> report.changed, report.commit, report.left_out
    ```"""
    source = Source(checkpoint)
    files = checkpoint_files(source)
    folder = Path(source.name)
    left_out = _left_out(folder, files)
    if left_out:
        logger.info("Not sent, since the checkpoint does not need it: %s", ", ".join(left_out))
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
        left_out=left_out,
        deleted=sent.deleted if sent.changed else [],
    )


def checkpoint_files(source: Source) -> list[str]:
    """Returns the names of the files that make up a checkpoint; no weight is read and none of its code is run.

    These are the weights, as the index lists them where there is one; the code that transformers fetches for them; the
    files of config, processor and tokenizer; the card with the pictures of the folder that it shows, and licences.

    Args:
        source (`Source`): The checkpoint's folder.

    Raises:
        FileNotFoundError: There is no such folder, or weights or code are missing in it.
        ValueError: It is no complete checkpoint of this package, or a file of it is damaged.
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
    if source.find(_PROCESSOR_NAME) is None:
        raise ValueError(
            f"{folder} has no {_PROCESSOR_NAME}: whoever loads it could not ask it about pictures. Save the processor "
            f"there first: model.processor.save_pretrained({str(folder)!r})."
        )
    names = {*_weight_names(source), *_code_names(source), *_pictures_in_card(folder)}
    for pattern in _OTHER_FILES:
        names |= {path.relative_to(folder).as_posix() for path in folder.glob(pattern) if path.is_file()}
    _check_links(folder, names)
    return sorted(names)


def _check_links(folder: Path, names: set[str]) -> None:
    """Raises a ValueError where a file of a checkpoint is a link to a file elsewhere, which a push would publish."""
    home = folder.resolve()
    # In the Hub's cache the files of a snapshot are links to those that its repository has.
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for name in sorted(names):
        target = (folder / name).resolve()
        if not any(target.is_relative_to(place) for place in homes):
            raise ValueError(
                f"{folder / name} is a link to {target}, outside of the checkpoint. Nothing was sent. Put the file "
                "itself there where it is to be public."
            )


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


def _pictures_in_card(folder: Path) -> set[str]:
    """The files of the folder that its card shows."""
    card = folder / _CARD_NAME
    if not card.is_file():
        return set()
    shown = {
        markdown or html
        for markdown, html in _PICTURE_IN_CARD.findall(card.read_text(encoding="utf-8", errors="replace"))
    }
    paths = {os.path.normpath(name) for name in shown if not os.path.isabs(name)}
    return {Path(path).as_posix() for path in paths if not path.startswith("..") and (folder / path).is_file()}


def _left_out(folder: Path, files: list[str]) -> list[str]:
    """What of a folder is not among the files: folders of which nothing is, and files elsewhere."""
    sent, sent_from = set(files), {name.partition("/")[0] for name in files}
    left_out = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        top = name.partition("/")[0]
        if path.is_file() and name not in sent:
            left_out.add(name if top in (name, *sent_from) else f"{top}/")
    return sorted(left_out)


def _stage(source: Source, files: list[str], staging: Path, max_shard_size: int | str | None) -> None:
    """Links the files into a folder, where the weights are written anew if they have to be sharded."""
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
    for name in linked:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).symlink_to(Path(source.name, name).resolve())


def _card_on_hub(hub: HfApi, repo_id: str, revision: str | None) -> str | None:
    try:
        return read_card(Path(hub.hf_hub_download(repo_id, _CARD_NAME, revision=revision)))
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
