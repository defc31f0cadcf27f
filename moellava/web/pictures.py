# SPDX-License-Identifier: Apache-2.0
"""Pictures on their way in (an uploaded file, decoded) and out (as a part of the page)."""

import base64
import io
from pathlib import Path

import PIL.Image

from ..checks.pictures import load_picture, range_doubt, to_rgb


def open_picture(path: str) -> PIL.Image.Image:
    """Decodes an uploaded picture, to 8-bit RGB.

    Raises:
        ValueError: The file is no picture, or not a complete one. The message has the name that the file was uploaded
            under, not where it lies on this machine.
    """
    try:
        return to_rgb(load_picture(Path(path)))
    except (OSError, ValueError) as error:
        raise ValueError(str(error).replace(path, Path(path).name)) from error


def doubt(path: str) -> str | None:
    """Says why an uploaded picture that can be opened may be shown far too dark; `None` of most."""
    return range_doubt(load_picture(Path(path)), repr(Path(path).name))


def thumbnail(picture: PIL.Image.Image, side: int = 160) -> PIL.Image.Image:
    """Returns a picture that is at most `side` pixels wide and high; a smaller one as it is."""
    small = picture.copy()
    small.thumbnail((side, side))
    return small


def data_uri(picture: PIL.Image.Image) -> str:
    """Returns a picture as an address that holds it whole, so that the page has nothing to fetch."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


__all__ = ["data_uri", "doubt", "open_picture", "thumbnail"]
