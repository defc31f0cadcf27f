# SPDX-License-Identifier: Apache-2.0
"""What the Hub shows of a checkpoint: its model card, and a Space to try it in.

Importing this package is cheap; everything public is imported when it is first asked for.
"""

import importlib
from pathlib import Path


_HOMES = {
    "complete_card": "writing",
    "render_card": "cards",
    "render_space": "spaces",
    "write_card": "writing",
}

__all__ = [*sorted(_HOMES), "write_card_of_save"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'moellava.hub_cards' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def write_card_of_save(folder: Path, target: Path, repo_id: str | None = None) -> None:
    """The hook of every save and push; see `hub_cards/saving.py`."""
    from .saving import write_card_of_save

    write_card_of_save(folder, target, repo_id)
