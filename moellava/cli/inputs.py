# SPDX-License-Identifier: Apache-2.0
"""What commands are given, opened: pictures, and checkpoints that can be asked about them."""

import importlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .logs import debug_options, logging_shown
from .options import Loading, TrustedHub


def import_parts(names: Iterable[str] | None) -> None:
    """Imports files or modules of the user, which register the parts of their own.

    Raises:
        ImportError: A module is not there, or another one has the name of a file.
        OSError: There is no such file.
    """
    for name in names or ():
        _import(name)


def _import(name: str) -> None:
    if not name.endswith(".py"):
        sys.path.insert(0, os.getcwd())
        importlib.import_module(name)
        return
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"There is no Python file {name} to import.")
    root, module = path.parent, path.stem
    while (root / "__init__.py").exists():  # a file of a package is imported as such, so that its siblings are found
        root, module = root.parent, f"{root.name}.{module}"
    sys.path.insert(0, os.fspath(root))
    found = importlib.import_module(module).__file__
    if found is None or Path(found).resolve() != path:
        raise ImportError(f"{name} cannot be imported: {module!r} is the name of {found} too. Rename the file.")


def open_pictures(names: Iterable[str]) -> list[Any]:
    """Opens picture files and URLs.

    Raises:
        OSError: There is no such file, or it cannot be fetched.
        ValueError: It is no picture.
    """
    from ..checks.pictures import load_picture

    pictures = []
    for name in names:
        if name.startswith(("http://", "https://", "data:")):
            pictures.append(load_picture(name))
            continue
        path = Path(name).expanduser()
        if path.is_dir():
            raise IsADirectoryError(f"{name} is a folder; expected a picture file.")
        if not path.exists():
            raise FileNotFoundError(f"There is no picture {name}. Expected a picture file or an http(s) URL.")
        pictures.append(load_picture(path))
    return pictures


def check_no_input(out: Path, inputs: Iterable[str | Path]) -> None:
    """Raises a ValueError where a file that is to be written is one of those that are read."""
    for name in inputs:
        if out.exists() and os.path.exists(name) and out.samefile(name):
            raise ValueError(f"{out} would be written over {name}, which is read. Give another file to write.")


def check_is_checkpoint(name: str, hub: TrustedHub) -> dict[str, Any]:
    """Finds out before the work whether a name is a checkpoint of this package, and returns its config.

    Raises:
        OSError: There is no such folder or repository.
        ValueError: It is another model, or none.
    """
    from ..reading.sources import Source

    source = Source(name, hub.options())
    fields = source.config_dict()
    model_type = fields["model_type"]
    if model_type != "moellava":
        raise ValueError(
            f"{source} is a model of type {model_type!r}, not a checkpoint of this package, so that it cannot be asked "
            "about pictures. A language model becomes one by `moellava assemble`, and by training."
        )
    return fields


def load_checkpoint(name: str, loading: Loading, hub: TrustedHub, verbose: bool) -> Any:
    """Loads a checkpoint, or an adapter on its base; see `load_pretrained_model`."""
    from ..loading import load_pretrained_model

    if loading.model_base is None:
        check_is_checkpoint(name, hub)
    with logging_shown(verbose):
        return load_pretrained_model(name, **loading.options(), **debug_options(verbose), **hub.options())


__all__ = ["check_is_checkpoint", "check_no_input", "import_parts", "load_checkpoint", "open_pictures"]
