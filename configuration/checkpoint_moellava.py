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
"""Writing a checkpoint: the code that travels in it, and the move of a finished folder into place.

A saved folder holds flat copies of the source files of `configuration/`, `modeling/` and `processing/`, so that
`from_pretrained(folder, trust_remote_code=True)` works where the package is not installed. transformers' own copier
cannot do this from a layout of several folders, so this file does; it travels too, because a checkpoint loaded without
the package must be able to save itself again.
"""

import ctypes
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from .custom_code_moellava import CUSTOM_MODULE, custom_sources


logger = logging.get_logger(__name__)

ENTRY_MODULE = "moellava_entry"
ROOMS = ("configuration", "modeling", "processing")

# One entry file for all five: with several, transformers imports the same class once per file from a local folder, and
# `type(config) is model.config_class` no longer holds.
AUTO_MAP = {
    "AutoConfig": f"{ENTRY_MODULE}.MoellavaConfig",
    "AutoModel": f"{ENTRY_MODULE}.MoellavaModel",
    "AutoModelForCausalLM": f"{ENTRY_MODULE}.MoellavaForCausalLM",
    "AutoModelForImageTextToText": f"{ENTRY_MODULE}.MoellavaForCausalLM",
    "AutoProcessor": f"{ENTRY_MODULE}.MoellavaProcessor",
}

_ENTRY_SOURCE = '''"""What `auto_map` of this checkpoint names: MoELLaVA's classes, and its author's own parts."""

from .configuration_moellava import MoellavaConfig
from .modeling_moellava import MoellavaForCausalLM, MoellavaModel, MoellavaPreTrainedModel
from .moellava_custom import CUSTOM_PARTS
from .processing_moellava import MoellavaProcessor


__all__ = [
    "CUSTOM_PARTS",
    "MoellavaConfig",
    "MoellavaForCausalLM",
    "MoellavaModel",
    "MoellavaPreTrainedModel",
    "MoellavaProcessor",
]
'''

# Called with the folder of a checkpoint whose files are all written, before it comes to its place; with the folder that
# it comes to; and with the Hub id that it is pushed to, or None. The package enters itself here, to write the card; a
# checkpoint that is loaded without it has no such hook.
SAVE_HOOKS: list[Callable[[Path, Path, str | None], None]] = []

# `from .x import`, `from ..room.x import` and `from moellava.room.x import` all become `from .x import`.
_ROOM_IMPORT = re.compile(
    rf"^(\s*)from (?:\.|\.\.(?:{'|'.join(ROOMS)})\.|moellava\.(?:{'|'.join(ROOMS)})\.)(\w+) import", flags=re.MULTILINE
)
_WEIGHT_FILE = re.compile(
    r"(model|pytorch_model)(\.[\w-]+)?(-\d{5}-of-\d{5})?\.(safetensors|bin)|[^/]+\.(safetensors|bin)\.index\.json"
)


def is_weight_file(name: str) -> bool:
    """Whether a file holds a checkpoint's weights, or tells which files hold them; those of a subfolder are others."""
    return _WEIGHT_FILE.fullmatch(name) is not None


def is_flat() -> bool:
    """Whether this file runs from a checkpoint (or transformers' cache of one) instead of from the package."""
    return (Path(__file__).parent / f"{ENTRY_MODULE}.py").exists()


def travelling_files() -> dict[str, Path]:
    """Returns the flat name of every travelling source file, and where it lies now.

    Raises:
        RuntimeError: Two files of the package would get the same flat name.
    """
    here = Path(__file__).parent
    if is_flat():
        return {path.name: path for path in sorted(here.glob("*.py")) if path.name != "__init__.py"}
    files: dict[str, Path] = {}
    for room in ROOMS:
        for path in sorted((here.parent / room).glob("*.py")):
            if path.name == "__init__.py":
                continue
            if path.name in files:
                raise RuntimeError(f"{path} and {files[path.name]} would overwrite one another in a checkpoint.")
            files[path.name] = path
    return files


def flatten_imports(source: str) -> str:
    """Rewrites the imports of the travelling files of one another to imports of flat siblings."""
    return _ROOM_IMPORT.sub(r"\1from .\2 import", source)


def export_code(
    folder: str | os.PathLike, parts: Iterable[type] | None = None, earlier: str | os.PathLike | None = None
) -> list[Path]:
    """Writes the travelling code into `folder`.

    Args:
        folder (`str` or `os.PathLike`): Where to write; exists.
        parts (`Iterable[type]`, *optional*): The classes that the model's encoder and projector are made of. Those
            that are not of this package are copied with the files that define them. `None` says that the caller does
            not know the model (a processor saved alone): the custom parts of `earlier` are then kept.
        earlier (`str` or `os.PathLike`, *optional*): The checkpoint that `folder` is going to replace.

    Returns:
        `list[Path]`: The files written.

    Raises:
        ValueError: A custom part is defined where its source cannot travel (a script run as `__main__`, a notebook),
            or its file imports a module that no installed distribution provides.
    """
    folder = Path(folder)
    files = travelling_files()
    if is_flat():
        sources = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    else:
        sources = {name: flatten_imports(path.read_text(encoding="utf-8")) for name, path in files.items()}
        if parts is not None or earlier is None or not (Path(earlier) / f"{CUSTOM_MODULE}.py").exists():
            sources |= custom_sources(parts or (), files)
    sources[f"{ENTRY_MODULE}.py"] = _ENTRY_SOURCE
    for name, source in sources.items():
        (folder / name).write_text(source, encoding="utf-8")
    return [folder / name for name in sources]


@contextmanager
def staged_folder(save_directory: str | os.PathLike, replaces_weights: bool = False) -> Iterator[Path]:
    """Yields an empty folder to save into, and moves it to `save_directory` in one step when the block ends well.

    Whatever else lies in `save_directory` is kept. When the block raises, or the process dies, `save_directory` is what
    it was before.

    Args:
        save_directory (`str` or `os.PathLike`): Where the checkpoint goes; made if it is not there.
        replaces_weights (`bool`, *optional*, defaults to `False`): Whether the block writes weights, so that the weight
            files of an earlier checkpoint must not stay.

    Raises:
        NotADirectoryError: `save_directory` is a file.
    """
    target = Path(os.path.realpath(save_directory))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(
            f"{save_directory} is a file; a checkpoint is saved into a folder. Give a folder's path."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    inside = target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK))
    staging = (target if inside else target.parent) / f".{target.name}.{uuid.uuid4().hex[:12]}.saving"
    staging.mkdir()
    try:
        yield staging
        if inside:
            # A mount point or a folder in a read-only place cannot be swapped as a whole: file by file, config last.
            logger.warning("%s cannot be replaced in one step; its files are replaced one by one.", target)
            for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
                _replace(path, target / path.name)
        elif not target.exists():
            staging.rename(target)
        else:
            left_behind = _carry_over(target, staging, replaces_weights)
            _exchange(staging, target)
            for name in left_behind:
                (staging / name).rename(target / name)
    finally:
        if staging.exists():
            shutil.rmtree(staging)


def run_save_hooks(folder: str | os.PathLike, target: str | os.PathLike, repo_id: str | None = None) -> None:
    """Calls every one of `SAVE_HOOKS`, once a checkpoint's own files are written.

    Args:
        folder (`str` or `os.PathLike`): Where they lie.
        target (`str` or `os.PathLike`): The folder that `folder` is about to replace; `folder` itself for a push.
        repo_id (`str`, *optional*): The Hub id that it is about to be pushed to.
    """
    for hook in SAVE_HOOKS:
        hook(Path(folder), Path(target), repo_id)


def _replace(source: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    os.replace(source, target)


def _carry_over(earlier: Path, staging: Path, replaces_weights: bool) -> list[str]:
    """Links what the earlier folder holds and the new one does not; returns what has to be moved afterwards instead."""
    shutil.copymode(earlier, staging)
    left_behind = []
    for path in earlier.iterdir():
        if (staging / path.name).exists() or path.name.endswith(".saving"):
            continue
        if replaces_weights and path.is_file() and is_weight_file(path.name):
            continue
        try:
            if path.is_symlink():
                os.symlink(os.readlink(path), staging / path.name)
            elif path.is_dir():
                shutil.copytree(path, staging / path.name, symlinks=True, copy_function=os.link)
            else:
                os.link(path, staging / path.name)
        except (OSError, shutil.Error):  # a file system without hard links
            if (staging / path.name).is_dir():
                shutil.rmtree(staging / path.name)
            left_behind.append(path.name)
    return left_behind


def _exchange(staging: Path, target: Path) -> None:
    """Swaps two folders, atomically where the system can (Linux's `renameat2`), else by two renames."""
    if sys.platform == "linux":
        at_fdcwd, rename_exchange = -100, 2
        libc = ctypes.CDLL(None, use_errno=True)
        renameat2 = getattr(libc, "renameat2", None)
        if renameat2 is not None:
            done = renameat2(at_fdcwd, os.fsencode(staging), at_fdcwd, os.fsencode(target), rename_exchange)
            if done == 0:
                return
            code = ctypes.get_errno()
            if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise OSError(code, os.strerror(code), str(target))
    aside = staging.with_name(f"{staging.name}.earlier")
    target.rename(aside)
    try:
        staging.rename(target)
    except OSError:
        aside.rename(target)
        raise
    aside.rename(staging)


__all__ = [
    "AUTO_MAP",
    "ENTRY_MODULE",
    "SAVE_HOOKS",
    "export_code",
    "is_flat",
    "is_weight_file",
    "run_save_hooks",
    "staged_folder",
    "travelling_files",
]
