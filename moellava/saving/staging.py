# SPDX-License-Identifier: Apache-2.0
"""Saving a checkpoint as a whole: its files are written to a folder of their own, which then takes the target's place.

A reader at any moment, and whoever comes after a save that was killed, finds the earlier checkpoint or the new one. The
section "Saving" of docs/design.md says which systems cannot do that, and what happens there.
"""

import ctypes
import errno
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from .weight_names import replaced_code, replaced_weights


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.get_logger(__name__)

_LOCK_TIMEOUT_S = 60
# The files that make a folder a model or a processor to its readers.
_HEADS = ("processor_config.json", "config.json")
_STAGING = re.compile(r"\..*\.[0-9a-f]{12}\.saving")
# Why folders cannot be swapped, or files not be linked, while the files could be replaced one by one.
_NO_SWAP = (errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV)


@contextmanager
def staged_folder(save_directory: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty folder to save into, and puts it in the place of `save_directory` when the block ends well.

    Whatever else lies in `save_directory` is kept, but for weights and code that those of the block replace. When the
    block raises, or the process dies, `save_directory` is what it was before. Several processes may save to one folder:
    it becomes what the last one has saved. Within the block, a save to the yielded folder writes into it directly.

    Args:
        save_directory (`str` or `os.PathLike`): Where the checkpoint goes; made if it is not there.

    Raises:
        NotADirectoryError: `save_directory` is a file.
        OSError: It cannot be written to; or its files had to be replaced one by one, and one could not be.
    """
    target = Path(os.path.realpath(save_directory))
    if is_staging(target):
        yield target
        return
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(
            f"{save_directory} is a file; a checkpoint is saved into a folder. Give a folder's path."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    home = target if _has_to_stay(target) else target.parent
    for folder in (home, target):
        if folder.exists() and not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written to, so nothing is saved there. Give another folder.")
    staging = home / f".{target.name}.{uuid.uuid4().hex[:12]}.saving"
    with _locked(home) as is_locked:
        if is_locked:
            _clear_up(home, target)
        staging.mkdir()
        alive = _lock(staging)
    keeps_rest = False
    try:
        yield staging
        names = sorted(path.name for path in staging.iterdir())
        with _locked(home):
            if home == target or not _swap(staging, target):
                logger.warning("%s cannot be replaced in one step; its files are replaced one by one.", target)
                keeps_rest = True
                _replace_files(staging, target, names)
                keeps_rest = False
            shutil.rmtree(staging, ignore_errors=True)  # what it holds now is of no use to anybody
    except BaseException:
        if not keeps_rest:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        if alive is not None:
            os.close(alive)


def is_staging(folder: str | os.PathLike) -> bool:
    """Whether a folder is one that `staged_folder` has yielded."""
    return _STAGING.fullmatch(Path(folder).name) is not None


def _has_to_stay(target: Path) -> bool:
    """Whether a folder cannot be exchanged for another: a mount point, in a read-only place, or where we are."""
    if not target.is_dir():
        return False
    try:
        is_here = Path(os.getcwd()).is_relative_to(target)
    except FileNotFoundError:  # the working folder itself has been deleted
        is_here = False
    return is_here or os.path.ismount(target) or not os.access(target.parent, os.W_OK)


def _swap(staging: Path, target: Path) -> bool:
    """Puts the new folder in the place of the earlier one, which then lies in its; returns whether that can be done."""
    if not target.exists():
        staging.rename(target)
        return True
    try:
        _carry_over(target, staging)
        _exchange(staging, target)
    except OSError as error:
        if error.errno not in _NO_SWAP:
            raise
        return False
    return True


def _carry_over(earlier: Path, staging: Path) -> None:
    """Links what the earlier folder holds and the new one does not into the new one."""
    shutil.copymode(earlier, staging)
    files = [path.name for path in earlier.iterdir() if path.is_file()]
    stale = _replaced(files, [path.name for path in staging.iterdir()])
    for path in earlier.iterdir():
        if path.name not in stale and not _STAGING.fullmatch(path.name) and not os.path.lexists(staging / path.name):
            _link(path, staging / path.name)


def _replaced(held: list[str], saved: list[str]) -> list[str]:
    return [*replaced_weights(held, saved), *replaced_code(held, saved)]


def _link(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    elif source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            _link(path, target / path.name)
        shutil.copystat(source, target)
    else:
        os.link(source, target)


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


def _replace_files(staging: Path, target: Path, names: list[str]) -> None:
    """Moves files into a folder that has to stay. Its config goes first and comes last: what is half one checkpoint and
    half another is none to a reader."""
    heads = [name for name in _HEADS if name in names]
    stale = _replaced([path.name for path in target.iterdir()], names)
    try:
        for name in [*reversed(heads), *stale]:
            (target / name).unlink(missing_ok=True)
        for name in [*(name for name in names if name not in heads), *heads]:
            if (target / name).is_dir() and not (target / name).is_symlink():
                shutil.rmtree(target / name)
            os.replace(staging / name, target / name)
    except OSError as error:
        raise OSError(
            f"{target} is incomplete, since {error.filename2 or error.filename} could not be replaced "
            f"({error.strerror}). Once it can be, move what is left in {staging} there."
        ) from error


def _clear_up(home: Path, target: Path) -> None:
    """Removes what saves to a folder have left behind whose processes were killed; the caller holds the lock."""
    mine = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{12}}\.saving(\.earlier)?")
    left = sorted(path for path in home.iterdir() if mine.fullmatch(path.name))
    for path in left:
        if path.name.endswith(".earlier") and not target.exists():
            path.rename(target)  # killed between two renames
            left.remove(path)
            break
    if not any((target / name).exists() for name in _HEADS):
        return  # one of them may be all that there is
    for path in left:
        unused = _lock(path)
        if unused is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(unused)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Keeps other savers out of a folder for a block; yields whether it could, which not every file system can."""
    lock = _lock(folder, _LOCK_TIMEOUT_S)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, timeout_s: float = 0) -> int | None:
    """Locks a folder until the descriptor that is returned is closed, or the process ends.

    Returns:
        `int`, *optional*: The descriptor; `None` where the lock is not to be had in time, or there are none.
    """
    if fcntl is None:
        return None
    end = time.monotonic() + timeout_s
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written to and not be read
        return None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError as error:
            if not isinstance(error, BlockingIOError) or time.monotonic() >= end:
                os.close(descriptor)
                return None
            time.sleep(0.01)


__all__ = ["is_staging", "staged_folder"]
