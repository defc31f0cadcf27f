# SPDX-License-Identifier: Apache-2.0
"""Numbers of parameters and bytes in the words of people, for the command line, the page and the cards; and text that
can be written anywhere."""

from collections.abc import Iterable


def number_text(number: int) -> str:
    """Returns a number of parameters as it is read, such as 2.70 billion."""
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:,}"


def size_text(size: int) -> str:
    """Returns a number of bytes as it is read, such as 5.1 GiB."""
    value, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{size:,} bytes" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


def first_few(entries: Iterable[str], separator: str = ", ") -> str:
    """Returns the first six of some entries in their order, and how many more there are, for a message."""
    entries = sorted(entries)
    return separator.join(entries[:6]) + (f" and {len(entries) - 6} more" if len(entries) > 6 else "")


def encodable(text: str) -> str:
    r"""Returns a text with escapes, such as `\ud83d`, for what UTF-8 cannot hold: the halves of characters in JSON."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


__all__ = ["encodable", "first_few", "number_text", "size_text"]
