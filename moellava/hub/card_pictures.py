# SPDX-License-Identifier: Apache-2.0
"""The pictures that a model card shows, as they are published: without what a camera or an editor wrote beside them.

A picture is decoded and encoded anew, so nothing of its file is kept but the pixels: no EXIF with place and names, no
XMP, IPTC, comments or texts, no thumbnail, and nothing behind its end.
"""

import io
import logging
from typing import Any

import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
import PIL.ImageSequence

from ..checks.pictures import decode_picture


logger = logging.getLogger(__name__)

# What else of a picture belongs to what it shows: its transparent colour, and how it is animated.
_SHOWN = ("transparency", "duration", "loop", "background", "disposal", "blend", "default_image")
# Of formats that lose something each time they are written; PNG, GIF, BMP, PPM and TIFF lose nothing.
_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95},
    "WEBP": {"quality": 95},
    "AVIF": {"quality": 90},
    "TIFF": {"compression": "tiff_adobe_deflate"},
}
_ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")  # a browser shows the first page of any other


def without_metadata(content: bytes, name: str) -> bytes:
    """Returns a picture's file without its metadata, upright, in its own format.

    Args:
        content (`bytes`): The file's content.
        name (`str`): Its name, for error messages.

    Raises:
        ValueError: It cannot be decoded; or Pillow reads its format and does not write it.
    """
    image = decode_picture(content, "The picture", name)
    kind = "JPEG" if image.format == "MPO" else image.format  # JPEGs in one file: of them the first is shown
    if kind == "WEBP" and b"VP8L" in content[:64]:
        options: dict[str, Any] = {"lossless": True, "exact": True}
    else:
        options = dict(_OPTIONS.get(kind, {}))
    is_animated = kind in _ANIMATED and getattr(image, "is_animated", False)
    frames = [_clean(frame) for frame in PIL.ImageSequence.Iterator(image)] if is_animated else [_clean(image)]
    if is_animated:
        durations = [frame.info.get("duration", 0) for frame in frames]
        options |= {"save_all": True, "append_images": frames[1:], "duration": durations}
        options |= {"loop": image.info["loop"]} if "loop" in image.info else {}
        if kind == "GIF":
            options |= {"disposal": 2, "optimize": False}
    file = io.BytesIO()
    try:
        frames[0].save(file, kind, **options)
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(
            f"The card shows {name}, a picture in the format {kind}, which cannot be written without the metadata in "
            f"it ({type(error).__name__}: {error}). Nothing was sent. Show it as a PNG or JPEG file instead."
        ) from error
    return file.getvalue()


def _clean(image: PIL.Image.Image) -> PIL.Image.Image:
    """Returns a frame's pixels upright, in sRGB, with no other information than how it is shown."""
    profile = image.info.get("icc_profile")  # names devices and people too
    clean = PIL.ImageOps.exif_transpose(image).copy()
    if profile and clean.mode in ("RGB", "RGBA", "CMYK"):
        mode = "RGBA" if clean.mode == "RGBA" else "RGB"
        try:
            colours = PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile))
            clean = PIL.ImageCms.profileToProfile(clean, colours, PIL.ImageCms.createProfile("sRGB"), outputMode=mode)
        except (OSError, PIL.ImageCms.PyCMSError) as error:
            logger.warning("The colour profile of a picture of the card cannot be read and is left out (%s).", error)
    clean.info = {key: value for key, value in image.info.items() if key in _SHOWN}
    return clean


__all__ = ["without_metadata"]
