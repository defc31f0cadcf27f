# SPDX-License-Identifier: Apache-2.0
"""A page to try checkpoints on: pictures, questions, streamed answers, and the routing of sparse models.

It needs the extra `web` (`pip install 'moellava[web]'`), which is imported when a page is made and not before.
"""

import importlib


__all__ = ["build_page", "launch"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'moellava.web' has no attribute {name!r}")
    return getattr(importlib.import_module(".page", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
