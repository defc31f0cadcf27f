# SPDX-License-Identifier: Apache-2.0
"""Pictures that nobody vouches for: opened in known formats alone, within limits, and doubted aloud.

What a picture becomes is decided in `processing/images_moellava.py`, which travels with a checkpoint. Here is what the
installed package adds: where the bytes come from, what Pillow may do with them, and what their user should know.
"""

import base64
import binascii
import http.client
import io
import os
import urllib.request
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFile
import torch
from transformers.utils import logging

from ..processing import images_moellava
from ..processing.images_moellava import (
    PICTURE_FORMATS,
    OutOfRangeError,
    channel_axis,
    file_bits,
    is_picture_source,
    picture_formats,
)


logger = logging.get_logger(__name__)


_MOST_BYTES = 512 * 1024**2  # of a file, and of a picture that is decoded
_SMALLER = (
    "Scale it down first; or, where you know where it is from, set PIL.Image.MAX_IMAGE_PIXELS to its number of pixels "
    "or more."
)
# Which doubts about pictures were logged: each once, and not those of a whole data set.
_said: set[str] = set()
_MOST_SAID = 50
_MOST_ELONGATED = 200
_FETCH_TIMEOUT_S = 60
_LONGEST_PATH = 4096


def load_picture(source: str | os.PathLike, name: str = "The picture") -> PIL.Image.Image:
    """Opens a picture from a file, an http(s) URL or base64 text (with or without a `data:image/...;base64,` head).

    Of a file with several frames the first one is taken.

    Args:
        source (`str` or `os.PathLike`): Where the picture is.
        name (`str`, *optional*): What error messages call the picture.

    Returns:
        `PIL.Image.Image`: The decoded picture, in the mode and orientation it is stored in: see [`to_rgb`].

    Raises:
        FileNotFoundError: There is no such file, and `source` is neither a URL nor base64 text of a picture.
        ValueError: The picture cannot be fetched or decoded.
    """
    if isinstance(source, os.PathLike):
        return decode_picture(_read_file(os.fspath(source), name), name, os.fspath(source))
    if source.startswith(("http://", "https://")):
        return decode_picture(_fetch(source, name), name, source)
    if source.startswith("data:"):
        head, _, text = source.partition(",")
        content = _decode_base64(text)
        if content is None or not head.startswith("data:image/"):
            raise ValueError(f"{name} ({_shortened(source)!r}) is no `data:image/...;base64,...` text of a picture.")
        return decode_picture(content, name, "base64 text")
    if os.path.isfile(source):
        return decode_picture(_read_file(source, name), name, source)
    content = _decode_base64(source)
    if content is not None:
        try:
            return decode_picture(content, name, "base64 text")
        except ValueError as error:
            # The path of a missing file can be valid base64 text too; then it holds nothing that Pillow knows.
            if not isinstance(error.__cause__, PIL.UnidentifiedImageError) or len(source) > _LONGEST_PATH:
                raise
    raise FileNotFoundError(
        f"{name}: there is no file {_shortened(source)!r}. Expected the path of a picture, an http(s) URL or base64 "
        "text."
    )


def decode_picture(content: bytes, name: str = "The picture", origin: str = "bytes") -> PIL.Image.Image:
    """Decodes the content of a picture file; nothing else in this package lets Pillow open anything.

    The formats are AVIF, BMP, GIF, JPEG, JPEG 2000, MPO, PNG, PPM, TIFF and WebP, and HEIF where a plug-in reads it.
    What a file is, its content says and not its name.

    Args:
        content (`bytes`): The file's content.
        name (`str`, *optional*): What error messages call the picture.
        origin (`str`, *optional*): Where it is from, for error messages.

    Returns:
        `PIL.Image.Image`: The first frame, in the mode and orientation it is stored in.

    Raises:
        ValueError: It is in no such format, damaged, or takes more than 512 MiB, decoded or not.
    """
    name = f"{name} ({origin!r})"
    limit = _byte_limit()
    if limit is not None and len(content) > limit:
        raise ValueError(f"{name} is a file of more than {limit:,} bytes. {_SMALLER}")
    try:
        image = PIL.Image.open(io.BytesIO(content), formats=picture_formats())
    except Exception as error:  # the decoders of Pillow raise whatever comes
        raise _not_decodable(name, error) from error
    _load(image, name)
    image.filename = origin  # `to_rgb` names it in its errors
    return image


def to_rgb(image: Any, name: str = "The picture", input_data_format: str | None = None) -> PIL.Image.Image:
    """Converts a picture to 8-bit RGB, as `images_moellava.to_rgb` does; text and paths are read by `load_picture`.

    A warning tells of values that use 14 of 16 bits or fewer without the file saying so.

    Raises:
        FileNotFoundError: No such file.
        TypeError: Not a picture, or an array of a type whose range is not known.
        ValueError: The picture cannot be decoded, has values outside its range, or an array has another shape.
    """
    if is_picture_source(image):
        image = load_picture(image, name)
    if not isinstance(image, PIL.Image.Image):
        converted = images_moellava.to_rgb(image, name, input_data_format)
        _warn(_array_doubt(image, name, input_data_format))
        return converted
    file_name = getattr(image, "filename", "")
    if file_name:
        name = f"{name} ({os.fspath(file_name)!r})"
    if 0 not in image.size:
        _load(image, name)
        _warn(range_doubt(image, name))
    try:
        return images_moellava.to_rgb(image, name)
    except OutOfRangeError:
        raise
    except Exception as error:  # Pillow raises whatever comes
        if 0 in image.size:
            raise
        raise _not_decodable(name, error) from error


def range_doubt(image: Any, name: str = "The picture") -> str | None:
    """Says why a 16-bit picture may come out far too dark: its values use 14 bits or fewer. `None` of any other.

    Scanners have 10 to 14 bits, and many programs store their values in 16 bits as they are. Nothing in such a file
    says so, and a photograph at night looks the same; so it is said, and not guessed.

    Args:
        image (`PIL.Image.Image` or `np.ndarray`): The picture.
        name (`str`, *optional*): What the text calls it.
    """
    if isinstance(image, PIL.Image.Image):
        if not image.mode.startswith("I") or file_bits(image) is not None:
            return None
        image = np.asarray(image)
    lowest, highest = int(image.min()), int(image.max())
    return None if lowest == highest else _dark(highest, name)


def _array_doubt(values: np.ndarray | torch.Tensor, name: str, input_data_format: str | None) -> str | None:
    """The text of `range_doubt` for an array or a tensor, whose fourth channel is alpha."""
    if isinstance(values, torch.Tensor) and values.dtype == torch.uint16:
        values = values.cpu().numpy()
    if not isinstance(values, np.ndarray) or (values.dtype.kind, values.dtype.itemsize) != ("u", 2):
        return None
    if values.ndim == 3:
        values = np.moveaxis(values, channel_axis(values.shape, name, input_data_format), 0)[:3]
    return range_doubt(values, name)


def check_shape(width: int, height: int, aspect_ratio: str, name: str = "The picture") -> None:
    """Checks that a picture of such a shape takes no far larger one on its way to the vision tower.

    Args:
        width, height (`int`): In pixels.
        aspect_ratio (`str`): `"pad"` or `"square"`.
        name (`str`, *optional*): What error messages call the picture.

    Raises:
        ValueError: It is more than 200 times as long as wide, which resizing its shorter side would make huge; or, with
            `"pad"`, its square has more pixels than Pillow opens (twice `PIL.Image.MAX_IMAGE_PIXELS`).
    """
    long, short = max(width, height), min(width, height)
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is None:  # switched off by the caller
        return
    if long > _MOST_ELONGATED * short:
        raise ValueError(
            f"{name} is {width}x{height} pixels, more than {_MOST_ELONGATED} times as long as wide. Crop it first."
        )
    if aspect_ratio == "pad" and long * long > 2 * limit:
        raise ValueError(
            f"{name} is {width}x{height} pixels, and padded to a square it would have {long * long:,}; expected at "
            f"most {2 * limit:,}. Scale it down first, pass `image_aspect_ratio='square'`, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS."
        )


def _read_file(path: str, name: str) -> bytes:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name}: there is no file {path!r}.")
    try:
        with open(path, "rb") as file:
            return _read(file)
    except OSError as error:
        raise ValueError(f"{name} ({path!r}) cannot be read: {type(error).__name__}: {error.strerror}.") from error


def _fetch(url: str, name: str) -> bytes:
    # Not transformers' `load_image`: it opens any format, clips 16-bit values and drops transparency. Nor the session
    # of huggingface_hub: it connects to nothing with HF_HUB_OFFLINE=1, which says nothing of pictures.
    request = urllib.request.Request(url, headers={"User-Agent": "moellava"})
    try:
        with urllib.request.urlopen(request, timeout=_FETCH_TIMEOUT_S) as response:
            return _read(response)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"{name} ({url!r}) cannot be fetched: {type(error).__name__}: {error}.") from error


def _read(file: Any) -> bytes:
    """Reads a file to its end, or one byte more than is decoded."""
    limit = _byte_limit()
    return file.read() if limit is None else file.read(limit + 1)


def _byte_limit() -> int | None:
    """How many bytes a picture may have; a caller who lets Pillow open larger ones lets us."""
    pixels = PIL.Image.MAX_IMAGE_PIXELS
    return None if pixels is None else max(_MOST_BYTES, 4 * pixels)


def _decode_base64(text: str) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def _load(image: PIL.Image.Image, name: str) -> None:
    """Decodes a picture that has been opened, here or by the caller, whose decoder may be any of Pillow's."""
    is_file = isinstance(image, PIL.ImageFile.ImageFile)
    is_deep = is_file and any(";16" in str(tile[3]) for tile in image.tile)
    if is_file and image.tile and image.format not in PICTURE_FORMATS:
        raise ValueError(
            f"{name} is a picture in the format {image.format}, which is not decoded here; expected one of "
            f"{', '.join(picture_formats())}. Convert it to one of them; or, where you know where it is from, decode "
            "it yourself first: picture.load()."
        )
    limit = _byte_limit()
    size = image.width * image.height * (1 if image.mode in ("1", "L", "P") else 2 if ";16" in image.mode else 4)
    if is_file and limit is not None and size > limit:
        raise ValueError(
            f"{name} is {image.width}x{image.height} pixels, {size:,} bytes when it is decoded; expected at most "
            f"{limit:,}. {_SMALLER}"
        )
    try:
        image.load()
        if is_deep and image.mode in ("L", "LA", "RGB", "RGBA"):  # of 16 bits a channel, Pillow keeps the upper 8
            extrema = np.array(image.getextrema()).reshape(-1, 2)[: 1 if image.mode[0] == "L" else 3]
            if extrema[:, 0].min() < extrema[:, 1].max():
                _warn(_dark(int(extrema[:, 1].max()) * 256 + 255, name, is_whole=False))
    except Exception as error:
        raise _not_decodable(name, error) from error


def _not_decodable(name: str, error: Exception) -> ValueError:
    if isinstance(error, PIL.Image.DecompressionBombError):
        return ValueError(
            f"{name} cannot be decoded: {type(error).__name__}: {error} Scale it down first; or, where you know where "
            "it is from, set PIL.Image.MAX_IMAGE_PIXELS to half of its pixels or more."
        )
    if isinstance(error, PIL.UnidentifiedImageError):  # whose own message names an object in memory
        return ValueError(
            f"{name} cannot be decoded: {type(error).__name__}: no known format. Expected a complete picture file, in "
            f"one of the formats {', '.join(picture_formats())}."
        )
    return ValueError(f"{name} cannot be decoded: {type(error).__name__}: {error}. Expected a complete picture file.")


def _dark(highest: int, name: str, is_whole: bool = True) -> str | None:
    """The text of `range_doubt`; `is_whole` says whether the picture in memory has all 16 bits still."""
    bits = next((depth for depth in (8, 10, 12, 14) if highest < 2**depth), None)
    if bits is None:
        return None
    advice = f"pass np.asarray(picture) / {2**bits - 1}, or " if is_whole else ""
    return (
        f"{name} is a 16-bit picture, and its values end at {highest}. Read as 0 to 65535 it is nearly black: 0 to "
        f"{highest * 255 // 65535} of 255. If its values have {bits} bits, scale them first: {advice}save it with its "
        f"values times {2 ** (16 - bits)}."
    )


def _warn(doubt: str | None) -> None:
    if doubt is None or doubt in _said or len(_said) > _MOST_SAID:
        return
    _said.add(doubt)
    logger.warning(doubt if len(_said) <= _MOST_SAID else "More 16-bit pictures are nearly black; they are not named.")


__all__ = ["check_shape", "decode_picture", "load_picture", "range_doubt", "to_rgb"]
