# SPDX-License-Identifier: Apache-2.0
"""What goes into a checkpoint beside its weights: the code that travels in it, and what is called before it is there.

A saved folder holds flat copies of the source files of `configuration/`, `modeling/` and `processing/`, so that
`from_pretrained(folder, trust_remote_code=True)` works where the package is not installed. transformers' own copier
cannot do this from a layout of several folders, so this file does; it travels too, because a checkpoint loaded without
the package must be able to save itself again.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from .custom_code_moellava import CUSTOM_MODULE, custom_sources


ENTRY_MODULE = "moellava_entry"
ROOMS = ("configuration", "modeling", "processing")

# One entry file for all: with several, transformers imports the same class once per file from a local folder, and
# `type(config) is model.config_class` no longer holds.
AUTO_MAP = {
    "AutoConfig": f"{ENTRY_MODULE}.MoellavaConfig",
    "AutoModel": f"{ENTRY_MODULE}.MoellavaModel",
    "AutoModelForCausalLM": f"{ENTRY_MODULE}.MoellavaForCausalLM",
    "AutoModelForImageTextToText": f"{ENTRY_MODULE}.MoellavaForCausalLM",
    "AutoModelForMultimodalLM": f"{ENTRY_MODULE}.MoellavaForCausalLM",
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
    r"(?:model|pytorch_model)(?:\.([\w-]+?))?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
    r"|[^/]+\.(?:safetensors|bin)\.index(?:\.([\w-]+))?\.json"
)


def is_weight_file(name: str) -> bool:
    """Whether a file holds a checkpoint's weights, or tells which files hold them; those of a subfolder are others."""
    return _WEIGHT_FILE.fullmatch(name) is not None


def replaced_weights(held: Iterable[str], saved: Iterable[str]) -> list[str]:
    """Returns which of the files of an earlier checkpoint must not stay beside those of a save: its weights, of every
    `variant` that has been saved anew. transformers would read an earlier `model.safetensors` rather than new shards.

    Args:
        held (`Iterable[str]`): The files of the earlier checkpoint.
        saved (`Iterable[str]`): Those of the save: with weights, of a processor alone, or of an adapter.
    """
    saved = set(saved)
    variants = {_variant(name) for name in saved if is_weight_file(name)}
    return [name for name in held if name not in saved and is_weight_file(name) and _variant(name) in variants]


def _variant(name: str) -> str | None:
    file, index = _WEIGHT_FILE.fullmatch(name).groups()
    return file or index


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


def run_save_hooks(folder: str | os.PathLike, target: str | os.PathLike, repo_id: str | None = None) -> None:
    """Calls every one of `SAVE_HOOKS`, once a checkpoint's own files are written.

    Args:
        folder (`str` or `os.PathLike`): Where they lie.
        target (`str` or `os.PathLike`): The folder that `folder` is about to replace; `folder` itself for a push.
        repo_id (`str`, *optional*): The Hub id that it is about to be pushed to.
    """
    for hook in SAVE_HOOKS:
        hook(Path(folder), Path(target), repo_id)


__all__ = [
    "AUTO_MAP",
    "ENTRY_MODULE",
    "SAVE_HOOKS",
    "export_code",
    "is_flat",
    "is_weight_file",
    "replaced_weights",
    "run_save_hooks",
    "travelling_files",
]
