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
