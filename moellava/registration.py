# SPDX-License-Identifier: Apache-2.0
"""Telling transformers' Auto classes of MoELLaVA, without loading transformers for it.

`configuration/`, `modeling/` and `processing/` each register their classes when they are imported, and the config
imports `modeling/` when the first one is made. What is left is to import `configuration/` and `processing/` once
transformers' tables exist. Those tables come with PyTorch, which takes seconds to load; so this is done right after
transformers has imported them by itself, and `import moellava` stays cheap.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable


# transformers' module that holds a table -> our room that enters itself into it
_ROOM_OF_TABLE = {
    "transformers.models.auto.configuration_auto": "moellava.configuration",
    "transformers.models.auto.processing_auto": "moellava.processing",
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Imports a room of ours right after transformers has imported the table that the room registers in."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _ROOM_OF_TABLE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _then_import(spec.loader.exec_module, _ROOM_OF_TABLE[fullname])
        return spec


def _then_import(exec_module: Callable, room: str) -> Callable:
    def exec_module_and_register(module):
        exec_module(module)
        importlib.import_module(room)

    return exec_module_and_register


def register() -> None:
    """Registers the model's classes with the Auto classes that `AUTO_MAP` names: now, as far as transformers has loaded
    them, and otherwise when it does."""
    for table, room in _ROOM_OF_TABLE.items():
        if table in sys.modules:
            importlib.import_module(room)
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


__all__ = ["register"]
