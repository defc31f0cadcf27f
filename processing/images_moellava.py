# SPDX-License-Identifier: Apache-2.0
"""Turning whatever a caller calls a picture into 8-bit RGB, and padding it to a square.

Image processors call `image.convert("RGB")`, which clips 16-bit pictures to white, and read float arrays as 0..255.
Medical pictures are often 16-bit, so the conversion is done here, before an image processor sees them.
"""

import base64
import binascii
import http.client
import io
import os
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What Pillow is let open, as far as it can. What is not here stays out on purpose: EPS, whatever the file is called, is
# a program that Pillow runs in Ghostscript. HEIF is that of a plug-in.
_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_MOST_BYTES = 512 * 1024**2  # of a file, and of a picture that is decoded
_SMALLER = (
    "Scale it down first; or, where you know where it is from, set PIL.Image.MAX_IMAGE_PIXELS to its number of pixels "
    "or more."
)
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_WHITE = 255
# Which doubts about pictures were logged: each once, and not those of a whole data set.
_said: set[str] = set()
_MOST_SAID = 50
_MOST_ELONGATED = 200
_FETCH_TIMEOUT_S = 60
_LONGEST_PATH = 4096
# Interpolation and half precision leave values a little outside 0..1.
_UNIT_TOLERANCE = 1e-3


def is_picture_source(image: Any) -> bool:
    """Whether `image` says where a picture is (a path, a URL or base64 text) instead of being one."""
    return isinstance(image, str | os.PathLike)


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
        image = PIL.Image.open(io.BytesIO(content), formats=_formats())
    except Exception as error:  # the decoders of Pillow raise whatever comes
        raise _not_decodable(name, error) from error
    _load(image, name)
    image.filename = origin  # `to_rgb` names it in its errors
    return image


def range_doubt(image: Any, name: str = "The picture") -> str | None:
    """Says why a 16-bit picture may come out far too dark: its values use 14 bits or fewer. `None` of any other.

    Scanners have 10 to 14 bits, and many programs store their values in 16 bits as they are. Nothing in such a file
    says so, and a photograph at night looks the same; so it is said, and not guessed.

    Args:
        image (`PIL.Image.Image` or `np.ndarray`): The picture.
        name (`str`, *optional*): What the text calls it.
    """
    if isinstance(image, PIL.Image.Image):
        if not image.mode.startswith("I") or _file_bits(image) is not None:
            return None
        image = np.asarray(image)
    lowest, highest = int(image.min()), int(image.max())
    return None if lowest == highest else _dark(highest, name)


def to_rgb(image: Any, name: str = "The picture", input_data_format: str | None = None) -> PIL.Image.Image:
    """Converts a picture to 8-bit RGB.

    - Transparency (an alpha channel, a transparent palette entry or colour) is composited over white.
    - The EXIF orientation is applied.
    - Modes `I;16*`, and `uint16` arrays: 0..65535 becomes 0..255 linearly. Nothing is clipped. A TIFF file that says
      that its values have 12 bits is read as 0..4095, and one that says that 0 is white is inverted. A warning tells
      of values that use 14 bits or fewer without the file saying so.
    - Mode `I` (32-bit): read as 16-bit values too, because that is what Pillow decodes 16-bit files to in this mode.
    - Mode `F`, and float arrays: read as 0..1.
    - Other modes: as Pillow converts them. Embedded colour profiles are not applied.

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `str` or `os.PathLike`):
            The picture. Arrays and tensors are (height, width), (height, width, channels) or (channels, height, width)
            with 1, 3 or 4 channels, of type bool, uint8, uint16 or float. Text and paths: see [`load_picture`].
        name (`str`, *optional*): What error messages call the picture.
        input_data_format (`str`, *optional*):
            `"channels_first"` or `"channels_last"`, for arrays and tensors whose shape allows both.

    Returns:
        `PIL.Image.Image`: A new picture in mode RGB.

    Raises:
        FileNotFoundError: No such file.
        TypeError: Not a picture, or an array of a type whose range is not known.
        ValueError: The picture cannot be decoded, has values outside its range, or an array has another shape.
    """
    if is_picture_source(image):
        image = load_picture(image, name)
    if isinstance(image, PIL.Image.Image):
        return _pil_to_rgb(image, name)
    return _array_to_rgb(_as_array(image, name), name, input_data_format)


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


def pad_to_square(image: PIL.Image.Image, color: tuple[int, int, int]) -> PIL.Image.Image:
    """Centres a picture on a square of the length of its longer side.

    Args:
        image (`PIL.Image.Image`): A picture in mode RGB, (width, height) pixels.
        color (`tuple[int, int, int]`): The colour of the square, 0..255.

    Returns:
        `PIL.Image.Image`: (max(width, height), max(width, height)) pixels; a picture that is square already is
        returned as it is. Of an odd number of pixels to add, the larger half goes below or to the right.
    """
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = PIL.Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def scaled_to_tensor(image: Any, name: str = "The picture", input_data_format: str | None = None) -> torch.Tensor:
    """Lays out float values as they are, without rescaling: for a caller who has scaled them to 0..1 already.

    Args:
        image (`np.ndarray` or `torch.Tensor`): Floats; the shapes of [`to_rgb`].
        name (`str`, *optional*): What error messages call the picture.
        input_data_format (`str`, *optional*): As for [`to_rgb`].

    Returns:
        `torch.Tensor`: (3, height, width), float32, on the device of `image`. Grey is repeated, a fourth channel is
        taken for alpha and composited over 1 (white).

    Raises:
        ValueError: Another shape.
    """
    tensor = torch.as_tensor(image).to(torch.float32)
    if tensor.ndim == 2:
        tensor = tensor[None]
    elif channel_axis(tuple(tensor.shape), name, input_data_format) == 2:
        tensor = tensor.permute(2, 0, 1)
    if tensor.shape[0] == 4:
        tensor = tensor[:3] * tensor[3:] + (1 - tensor[3:])
    return tensor.expand(3, -1, -1).contiguous()


def pad_tensor_to_square(tensor: torch.Tensor, color: tuple[float, float, float]) -> torch.Tensor:
    """Does to a (3, height, width) tensor what [`pad_to_square`] does to a picture, with `color` on its scale."""
    _, height, width = tensor.shape
    side = max(height, width)
    if height == width:
        return tensor
    square = tensor.new_tensor(color)[:, None, None].repeat(1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = tensor
    return square


def is_float_array(image: Any) -> bool:
    """Whether `image` is an array or a tensor of floats."""
    if isinstance(image, torch.Tensor):
        return image.is_floating_point()
    return isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating)


def channel_axis(shape: tuple[int, ...], name: str, input_data_format: str | None = None) -> int:
    """Returns where the channels are in a 3-D shape: 0 or 2.

    Raises:
        ValueError: No axis can be the channels, or both can and `input_data_format` does not say which.
    """
    layouts = {"channels_first": 0, "channels_last": 2}
    if input_data_format is not None:
        # transformers passes either the text or its `ChannelDimension`.
        axis = layouts.get(getattr(input_data_format, "value", input_data_format))
        if axis is None:
            raise ValueError(f"`input_data_format` is {input_data_format!r}; expected one of {sorted(layouts)}.")
        candidates = [axis]
    else:
        candidates = [0, 2]
    if len(shape) == 3 and 0 not in shape:
        candidates = [axis for axis in candidates if shape[axis] in (1, 3, 4)]
        if len(candidates) == 1:
            return candidates[0]
        if len(candidates) == 2:
            raise ValueError(
                f"{name} has shape {shape}, where the first or the last axis can be the channels. Pass "
                "`input_data_format='channels_first'` or `input_data_format='channels_last'`."
            )
    raise ValueError(
        f"{name} has shape {shape}"
        + (f" with `input_data_format={input_data_format!r}`" if input_data_format is not None else "")
        + "; expected (height, width), (height, width, channels) or (channels, height, width) with 1, 3 or 4 channels."
    )


def _read_file(path: str, name: str) -> bytes:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{name}: there is no file {path!r}.")
    try:
        with open(path, "rb") as file:
            return _read(file)
    except OSError as error:  # a disk, rights, or one of the system's own files
        raise ValueError(f"{name} ({path!r}) cannot be read: {type(error).__name__}: {error.strerror}.") from error


def _fetch(url: str, name: str) -> bytes:
    # Not transformers' `load_image`: it returns 8-bit RGB, with 16-bit values clipped and transparency dropped.
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


def _formats() -> list[str]:
    """The formats that this Pillow reads, of those that it may."""
    PIL.Image.init()
    return [known for known in _FORMATS if known in PIL.Image.OPEN]


def _load(image: PIL.Image.Image, name: str) -> None:
    """Decodes a picture that has been opened, here or by the caller, whose decoder may be any of Pillow's."""
    is_file = isinstance(image, PIL.ImageFile.ImageFile)
    is_deep = is_file and any(";16" in str(tile[3]) for tile in image.tile)
    if is_file and image.tile and image.format not in _FORMATS:
        raise ValueError(
            f"{name} is a picture in the format {image.format}, which is not decoded here; expected one of "
            f"{', '.join(_formats())}. Convert it to one of them; or, where you know where it is from, decode it "
            "yourself first: picture.load()."
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
            f"one of the formats {', '.join(_formats())}."
        )
    return ValueError(f"{name} cannot be decoded: {type(error).__name__}: {error}. Expected a complete picture file.")


def _pil_to_rgb(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    file_name = getattr(image, "filename", "")
    if file_name:
        name = f"{name} ({os.fspath(file_name)!r})"
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: its size is {image.size}.")
    _load(image, name)
    try:
        bits, is_inverted = _file_bits(image), _is_inverted(image)
        image = PIL.ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            values, key = np.asarray(image), image.info.get("transparency")
            if image.mode == "I":
                values = _in_range(values, 65535, name)
            if bits is None:
                _warn(range_doubt(values, name))
            else:
                values = values.astype(np.uint32) * 65535 // (2**bits - 1)
            image = _from_16_bit(65535 - values if is_inverted else values, key)
        elif image.mode == "F":
            image = PIL.Image.fromarray(_from_unit(np.asarray(image), name))
        elif _has_transparency(image):
            image = _over_white(image)
        return image.convert("RGB")
    except Exception as error:
        if isinstance(error, _OutOfRange):
            raise
        raise _not_decodable(name, error) from error


def _file_bits(image: PIL.Image.Image) -> int | None:
    """How many bits the values of a picture have, where its file says that they are fewer than those of its mode."""
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE)
    return bits[0] if bits in ((10,), (12,), (14,)) else None


def _is_inverted(image: PIL.Image.Image) -> bool:
    """Whether 0 is white in a 16-bit TIFF file; of 8 bits and fewer, Pillow inverts it."""
    return image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0


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


def _has_transparency(image: PIL.Image.Image) -> bool:
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or image.info.get("transparency") is not None:
        return True
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


def _over_white(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode == "La":  # Pillow converts this mode to no other
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = PIL.Image.new("RGBA", image.size, (_WHITE, _WHITE, _WHITE, _WHITE))
    return PIL.Image.alpha_composite(white, image)


class _OutOfRange(ValueError):
    """The values of a picture are outside the range that its type stands for."""


def _in_range(values: np.ndarray, highest: int, name: str) -> np.ndarray:
    if values.min() < 0 or values.max() > highest:
        raise _OutOfRange(
            f"{name} holds values from {values.min()} to {values.max()} in mode I, which is read as 16-bit: 0 to "
            f"{highest}. Scale the values to that range first."
        )
    return values


def _from_16_bit(values: np.ndarray, transparency: int | None = None) -> PIL.Image.Image:
    grey = _round_16_to_8(values)
    if transparency is not None:
        grey[values == transparency] = _WHITE
    return PIL.Image.fromarray(grey)


def _round_16_to_8(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _from_unit(values: np.ndarray, name: str) -> np.ndarray:
    lowest, highest = float(values.min()), float(values.max())
    # Written so that NaN fails too.
    if not (lowest >= -_UNIT_TOLERANCE and highest <= 1 + _UNIT_TOLERANCE):
        raise _OutOfRange(
            f"{name} holds floats from {lowest:g} to {highest:g}; floats are read as 0 to 1. Divide by the largest "
            "possible value or convert to uint8; for values that are scaled already pass `do_rescale=False` (and "
            "`do_normalize=False` if they are normalised too)."
        )
    return np.rint(np.clip(values.astype(np.float32), 0, 1) * 255).astype(np.uint8)


def _as_array(image: Any, name: str) -> np.ndarray:
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        if image.is_floating_point():
            image = image.to(torch.float32)  # numpy has no bfloat16
        return image.numpy()
    if isinstance(image, np.ndarray):
        return image
    raise TypeError(
        f"{name} is of type {type(image).__name__}; expected a PIL picture, a numpy array, a torch tensor, a path, an "
        "http(s) URL or base64 text."
    )


def _array_to_rgb(values: np.ndarray, name: str, input_data_format: str | None) -> PIL.Image.Image:
    if values.ndim == 2 and 0 not in values.shape:
        values = values[:, :, None]
    elif channel_axis(values.shape, name, input_data_format) == 0:
        values = np.moveaxis(values, 0, 2)
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    elif values.dtype.kind == "u" and values.dtype.itemsize == 2:
        _warn(range_doubt(values[..., :3], name))
        values = _round_16_to_8(values)
    elif np.issubdtype(values.dtype, np.floating):
        values = _from_unit(values, name)
    elif values.dtype != np.uint8:
        raise TypeError(
            f"{name} is an array of {values.dtype}, whose range is not known; expected uint8 (0 to 255), uint16 (0 to "
            "65535), bool, or floats (0 to 1). Convert it to one of these."
        )
    values = np.ascontiguousarray(values)
    if values.shape[2] == 4:
        return _over_white(PIL.Image.fromarray(values)).convert("RGB")
    return PIL.Image.fromarray(np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3))))


__all__ = [
    "channel_axis",
    "check_shape",
    "decode_picture",
    "is_float_array",
    "is_picture_source",
    "load_picture",
    "pad_tensor_to_square",
    "pad_to_square",
    "range_doubt",
    "scaled_to_tensor",
    "to_rgb",
]
