# SPDX-License-Identifier: Apache-2.0
"""JSON files: an object, as configs and indices are, or rows of data."""

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


def read_json_rows(path: Path) -> list[Any]:
    """Returns the rows that a `.json` file lists, or that a `.jsonl` file has one a line.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no UTF-8 or no valid JSON, or a `.json` file holds something other than a list.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}). Save it again as UTF-8.") from error
    if path.suffix.lower() == ".jsonl":
        # Not splitlines, which also ends lines at characters that JSON strings may hold as they are.
        lines = enumerate(text.split("\n"), start=1)
        return [_parsed(line, f"Line {number} of {path}") for number, line in lines if line.strip()]
    rows = _parsed(text, str(path))
    if not isinstance(rows, list):
        kind = "object" if isinstance(rows, dict) else type(rows).__name__
        raise ValueError(f"{path} holds a JSON {kind}; expected a list of rows.")
    return rows


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
        raise ValueError(f"{name} is no valid JSON ({error}). Correct it, or save the file again.") from error


def write_json_object(path: Path, content: dict[str, Any]) -> None:
    """Writes an object to a JSON file, whose earlier content stays until the new one is whole."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


__all__ = ["read_json_object", "read_json_rows", "write_json_object"]
