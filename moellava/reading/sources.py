# SPDX-License-Identifier: Apache-2.0
"""Where parts come from: a folder or a Hub repository, its config and its weights, read once and memory-mapped.

Nothing here decides what a part is; it finds files, opens them, and says clearly what is wrong with them.
"""

import errno
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from ..checks import processor_files
from .json_files import read_json_object


CONFIG_NAME = "config.json"
OPEN_CLIP_CONFIG_NAME = "open_clip_config.json"
_AGAIN = "Save or download the model again."
_WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
# What a full disk, quota or limit on a file's size is told by.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What torch.load's parsers raise on files that are cut off or no weight files at all.
_DAMAGE = (
    ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError, struct.error
)  # fmt: skip


class Source:
    """A folder, or one revision of a Hub repository.

    Args:
        name (`str`): The folder's path or the repository's id.
        hub_options (`dict`, *optional*): `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`,
            `proxies` and `trust_remote_code`, as given by the caller.

    Raises:
        FileNotFoundError: The name is a path, and nothing is there.
    """

    def __init__(self, name: str | os.PathLike, hub_options: dict[str, Any] | None = None):
        self.name = os.path.expanduser(os.fspath(name))
        self.hub_options = dict(hub_options or {})
        self.trust_remote_code = bool(self.hub_options.pop("trust_remote_code", False))
        self.is_local = os.path.isdir(self.name)
        if not self.is_local and _looks_like_a_path(self.name):
            kind = "is a file" if os.path.isfile(self.name) else "does not exist"
            raise FileNotFoundError(
                f"{self.name} {kind}: expected a folder with a model, or a Hub id such as 'owner/name'."
            )

    def find(self, filename: str) -> Path | None:
        """Returns the local path of a file, downloaded where needed, or `None` when the source has no such file.

        Raises:
            OSError: The repository does not exist, cannot be reached, or may not be read; or the disk is full.
        """
        if self.is_local:
            path = Path(self.name) / filename
            return path if path.is_file() else None
        try:
            found = cached_file(self.name, filename, _raise_exceptions_for_missing_entries=False, **self.hub_options)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            cache = self.hub_options.get("cache_dir") or constants.HF_HUB_CACHE
            raise OSError(
                f"{filename} of {self.name} cannot be stored in {cache} ({error.strerror}). Free space there, or set "
                "HF_HOME or cache_dir to a folder on another disk. The files that are there already stay."
            ) from error
        return None if found is None else Path(found)

    def read_json(self, filename: str) -> dict[str, Any] | None:
        """Returns the content of a JSON file, or `None` when the source has no such file."""
        path = self.find(filename)
        return None if path is None else read_json_object(path, _AGAIN)

    def config_dict(self) -> dict[str, Any]:
        """Returns the content of `config.json`.

        Raises:
            FileNotFoundError: It is no folder, and no file of that name could be had from the Hub.
            ValueError: There is none: the source is no model. Or it does not tell the `model_type`.
        """
        config = self.read_json(CONFIG_NAME)
        if config is None and not self.is_local:
            raise FileNotFoundError(
                f"There is no folder {self.name!r}, and no {CONFIG_NAME} of a Hub repository of that name could be "
                "had: it has none, or the Hub cannot be reached or refuses it, and the local cache does not hold it. "
                "Give the path of a folder with a model, or check the id, the connection and the token."
            )
        if config is None:
            held = ", ".join(sorted(os.listdir(self.name))[:8]) or "nothing"
            raise ValueError(
                f"{self.name} is no model: it has no {CONFIG_NAME}. It holds: {held}. Expected what save_pretrained "
                "writes."
            )
        if not isinstance(config.get("model_type"), str):
            raise ValueError(
                f"The {CONFIG_NAME} of {self.name} does not tell what the model is: its model_type is "
                f"{config.get('model_type')!r}. Expected what save_pretrained writes, such as 'llama'."
            )
        return config

    def weight_files(self) -> list[Path]:
        """Returns the files that hold the weights: safetensors before `.bin`, shards as their index lists them.

        Raises:
            FileNotFoundError: There are none, or a shard of the index is missing.
            ValueError: The index names a file outside the source.
        """
        for name in _WEIGHT_NAMES:
            single = self.find(name)
            if single is not None:
                return [single]
            index = self.find(f"{name}.index.json")
            if index is not None:
                return shards_of(index, self.name, self.find)
        raise FileNotFoundError(
            f"{self.name} has no weights: expected {' or '.join(_WEIGHT_NAMES)}, or an index of shards of one of them."
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns all weights by name, memory-mapped: none is read before it is used."""
        return {name: tensor for path in self.weight_files() for name, tensor in read_tensors(path)}

    def __str__(self) -> str:
        return self.name


def _looks_like_a_path(name: str) -> bool:
    return name.count("/") > 1 or name.startswith((".", "/", "~")) or os.path.isabs(name) or os.path.exists(name)


def shards_of(
    index: Path, origin: str, find: Callable[[str], Path | None], wanted: Callable[[str], bool] = lambda weight: True
) -> list[Path]:
    """Returns the files of those weights, by name, that an index of shards lists and that are wanted.

    Args:
        index (`Path`): The index.
        origin (`str`): Whose it is, for error messages.
        find (callable): Returns the path of a file of that origin, or `None`.
        wanted (callable, *optional*): Which weights.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: The index is damaged, or names a file that is not beside it.
    """
    weight_map = read_json_object(index, _AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index.name} of {origin} has no weight_map from weights to files. {_AGAIN}")
    paths = []
    for shard in sorted({str(shard) for weight, shard in weight_map.items() if wanted(weight)}):
        if shard != os.path.basename(shard) or shard in ("", ".", ".."):
            raise ValueError(
                f"{index.name} of {origin} names {shard!r}; expected the plain name of a file beside it. Nothing "
                "outside the folder is read."
            )
        path = find(shard)
        if path is None:
            raise FileNotFoundError(f"{origin} lacks {shard}, which its {index.name} lists. Download it again.")
        paths.append(path)
    return paths


def read_tensors(path: str | os.PathLike) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of one weight file by name, memory-mapped.

    Args:
        path (`str` or `os.PathLike`): A safetensors file, or any other name for what `torch.save` writes.

    Raises:
        ValueError: The file is damaged, or a pickle of more than tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    tensor = file.get_tensor(name)
                    tensor.mapped_from = (path, name)  # for `unmapped`
                    yield name, tensor
        except SafetensorError as error:
            raise ValueError(
                f"{path} cannot be read as safetensors ({error}): it is truncated or damaged. Save or download it "
                "again."
            ) from error
        return
    yield from _read_pickle(path).items()


def unmapped(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of `read_tensors` in memory of its own, read without the mapping that it came from.

    What is copied out of a mapping leaves its pages resident until the file is closed, beside the copy.
    """
    if not hasattr(tensor, "mapped_from"):
        return tensor
    path, name = tensor.mapped_from
    if path.suffix != ".safetensors":
        return _read_pickle(path)[name].clone()  # out of a mapping that ends with this line
    with safe_open(path, framework="pt", backend="pread") as file:
        return file.get_tensor(name)


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    with path.open("rb") as file:
        # torch can only map its zip format. Files of torch before 1.6 are read into memory, and as safely.
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        content = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text advises to load it all the same.
        asked_for = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} holds Python objects other than tensors, which are never loaded, since they could run code"
            f"{f' (it asks for {asked_for[1]})' if asked_for else ''}. Convert it to safetensors where you trust it."
        ) from error
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {str(error).partition('. ')[0]}"
        raise ValueError(
            f"{path} cannot be read as a file of tensors ({reason}): it is truncated, damaged, or no weight file. Save "
            "or download it again."
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a state dict, from names to tensors.")
    tensors = {
        name: tensor for name, tensor in content.items() if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }
    if content and not tensors:
        raise ValueError(f"{path} holds no tensors by name; expected a state dict, from names to tensors.")
    if is_zip:
        for name, tensor in tensors.items():
            tensor.mapped_from = (path, name)
    return tensors


def load_image_processor(source: Source) -> Any:
    """Returns the image processor of a source.

    Raises:
        ValueError: It has none; or, a `RefusedFileError`, it asks for one that no vision tower uses.
    """
    try:
        return processor_files.load_image_processor(
            source.name, trust_remote_code=source.trust_remote_code, **source.hub_options
        )
    except processor_files.RefusedFileError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source} has no image processor ({str(error).splitlines()[0]}). Expected a preprocessor_config.json "
            "beside the vision tower's weights."
        ) from error


def are_same_weights(held: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> bool:
    """Whether the weights that a model holds, in its own dtype, are those of a part that is given. A name tells little.

    Args:
        held (`Mapping[str, torch.Tensor]`): What the model holds, by the part's names; it may leave some out.
        given (`Mapping[str, torch.Tensor]`): The weights of the part.
    """
    return bool(held) and all(
        name in given and given[name].shape == tensor.shape and given[name].to(tensor.dtype).equal(tensor)
        for name, tensor in held.items()
    )


__all__ = [
    "CONFIG_NAME",
    "OPEN_CLIP_CONFIG_NAME",
    "Source",
    "are_same_weights",
    "load_image_processor",
    "read_tensors",
    "shards_of",
    "unmapped",
]
