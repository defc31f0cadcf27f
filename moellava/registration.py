# SPDX-License-Identifier: Apache-2.0
"""Makes transformers know the model's classes as soon as the package is imported.

The tables of the Auto classes come with PyTorch, which takes seconds to load; so our classes enter themselves right
after transformers has imported a table by itself, and `import moellava` stays cheap. What the package adds to a model's
own code comes first (`installed.py`), so that no config is made without it.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys


# transformers' module that holds a table -> our modules that enter themselves into it
_ENTERED_IN = {
    "transformers.models.auto.configuration_auto": ("moellava.installed", "moellava.configuration"),
    "transformers.models.auto.modeling_auto": ("moellava.modeling",),
    "transformers.models.auto.processing_auto": ("moellava.processing",),
}


class _TableLoader(importlib.machinery.SourceFileLoader):
    """Loads a table of transformers, and then what is to be entered in it."""

    def exec_module(self, module):
        super().exec_module(module)
        _enter(module.__name__)


class _TableFinder(importlib.abc.MetaPathFinder):
    """Finds the tables of transformers where everybody does."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _ENTERED_IN:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _TableLoader(fullname, spec.origin)
        return spec


def _enter(table: str) -> None:
    for name in _ENTERED_IN[table]:
        importlib.import_module(name)


def register() -> None:
    """Registers the model's classes with the Auto classes that `AUTO_MAP` names: now, as far as transformers has loaded
    them, and otherwise when it does."""
    for table in _ENTERED_IN:
        if table in sys.modules:
            _enter(table)
    if not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


__all__ = ["register"]
