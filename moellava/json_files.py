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
"""JSON files that hold an object: a config, an index, the fields that a user has written down."""

import json
import os
from pathlib import Path
from typing import Any


def read_json_object(path: str | os.PathLike, advice: str = "") -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Args:
        path (`str` or `os.PathLike`): The file.
        advice (`str`, *optional*): What to do about a damaged one, a sentence of the error.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no valid JSON, or holds something other than an object.
    """
    advice = f" {advice}" if advice else ""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
        raise ValueError(f"{path} is no valid JSON ({error}).{advice}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object.{advice}")
    return content


def write_json_object(path: Path, content: dict[str, Any]) -> None:
    """Writes an object to a JSON file, whose earlier content stays until the new one is whole."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


__all__ = ["read_json_object", "write_json_object"]
