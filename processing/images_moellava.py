# SPDX-License-Identifier: Apache-2.0
"""From whatever a user gives as a picture to 8-bit RGB.

Image processors call `image.convert("RGB")`, which clips 16-bit pictures to white, and read float arrays as 0..255.
Medical pictures are often 16-bit, so the conversion is done here, before an image processor sees them.
"""

import os
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.image_utils import load_image


# What Pillow is let open, as far as it can. What is not here stays out on purpose: EPS, whatever the file is called, is
# a program that Pillow runs in Ghostscript. HEIF is that of a plug-in.
PICTURE_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_WHITE = 255
# Interpolation and half precision leave values a little outside 0..1.
_UNIT_TOLERANCE = 1e-3


class OutOfRangeError(ValueError):
    """The values of a picture are outside the range that its type stands for."""


def is_picture_source(image: Any) -> bool:
    """Whether `image` says where a picture is (a path, a URL or base64 text) instead of being one."""
    return isinstance(image, str | os.PathLike)


def load_picture(source: str | os.PathLike, name: str = "The picture") -> PIL.Image.Image:
    """Opens a picture: a file, in the mode that it is stored in; what else there is, by transformers, in 8-bit RGB.

    Args:
        source (`str` or `os.PathLike`): The path of a file; or an http(s) URL, or base64 text.
        name (`str`, *optional*): What error messages call the picture.
    """
    if not os.path.isfile(source):
        return load_image(os.fspath(source))
    return PIL.Image.open(source, formats=picture_formats())


def picture_formats() -> list[str]:
    """The formats that this Pillow reads, of those that it may."""
    PIL.Image.init()
    return [known for known in PICTURE_FORMATS if known in PIL.Image.OPEN]


def to_rgb(image: Any, name: str = "The picture", input_data_format: str | None = None) -> PIL.Image.Image:
    """Converts a picture to 8-bit RGB.

    - Transparency (an alpha channel, a transparent palette entry or colour) is composited over white.
    - The EXIF orientation is applied.
    - Modes `I;16*`, and `uint16` arrays: 0..65535 becomes 0..255 linearly. Nothing is clipped. A TIFF file that says
      that its values have 12 bits is read as 0..4095, and one that says that 0 is white is inverted.
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
        TypeError: Not a picture, or an array of a type whose range is not known.
        ValueError: The picture cannot be decoded, has values outside its range, or an array has another shape.
    """
    if is_picture_source(image):
        image = load_picture(image, name)
    if isinstance(image, PIL.Image.Image):
        return _pil_to_rgb(image, name)
    return _array_to_rgb(_as_array(image, name), name, input_data_format)


def pad_to_square(image: PIL.Image.Image | torch.Tensor, color: tuple[int, int, int]) -> Any:
    """Centres a picture on a square of the length of its longer side.

    Args:
        image (`PIL.Image.Image` or `torch.Tensor`): In mode RGB; or (3, height, width), of floats from 0 to 1.
        color (`tuple[int, int, int]`): The colour of the square, 0..255.

    Returns:
        Of the same type. Of an odd number of pixels to add, the larger half goes below or to the right.
    """
    width, height = image.size if isinstance(image, PIL.Image.Image) else (image.shape[2], image.shape[1])
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    if isinstance(image, PIL.Image.Image):
        square = PIL.Image.new("RGB", (side, side), color)
        square.paste(image, (left, top))
    else:
        square = (image.new_tensor(color) / 255)[:, None, None].repeat(1, side, side)
        square[:, top : top + height, left : left + width] = image
    return square


def scaled_to_tensor(image: Any, name: str = "The picture", input_data_format: str | None = None) -> torch.Tensor:
    """Lays out float values as they are, without rescaling: for a caller who has scaled them to 0..1 already.

    The arguments are those of [`to_rgb`]. Returns (3, height, width), float32, on the device of `image`. Grey is
    repeated, a fourth channel is taken for alpha and composited over 1 (white).
    """
    tensor = torch.as_tensor(image).to(torch.float32)
    if tensor.ndim == 2:
        tensor = tensor[None]
    elif channel_axis(tuple(tensor.shape), name, input_data_format) == 2:
        tensor = tensor.permute(2, 0, 1)
    if tensor.shape[0] == 4:
        tensor = tensor[:3] * tensor[3:] + (1 - tensor[3:])
    return tensor.expand(3, -1, -1).contiguous()


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
    # transformers passes either the text or its `ChannelDimension`.
    said = getattr(input_data_format, "value", input_data_format)
    if said is not None and said not in layouts:
        raise ValueError(f"`input_data_format` is {input_data_format!r}; expected one of {sorted(layouts)}.")
    candidates = [0, 2] if said is None else [layouts[said]]
    fitting = [axis for axis in candidates if len(shape) == 3 and 0 not in shape and shape[axis] in (1, 3, 4)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(
            f"{name} has shape {shape}, where the first or the last axis can be the channels. Pass "
            "`input_data_format='channels_first'` or `input_data_format='channels_last'`."
        )
    raise ValueError(
        f"{name} has shape {shape}{f' with `input_data_format={said!r}`' if said else ''}; expected (height, width), "
        "(height, width, channels) or (channels, height, width) with 1, 3 or 4 channels."
    )


def _pil_to_rgb(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: its size is {image.size}.")
    image.load()
    bits = file_bits(image)
    # Of TIFF files with 0 for white, Pillow inverts those of 8 bits and fewer.
    is_inverted = image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values, key = np.asarray(image), image.info.get("transparency")
        if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
            raise OutOfRangeError(
                f"{name} holds values from {values.min()} to {values.max()} in mode I, which is read as 16-bit: 0 to "
                "65535. Scale the values to that range first."
            )
        if bits is not None:
            values = values.astype(np.uint32) * 65535 // (2**bits - 1)
        grey = _round_16_to_8(65535 - values if is_inverted else values)
        if key is not None:
            grey[values == key] = _WHITE
        image = PIL.Image.fromarray(grey)
    elif image.mode == "F":
        image = PIL.Image.fromarray(_from_unit(np.asarray(image), name))
    elif _has_transparency(image):
        image = _over_white(image)
    return image.convert("RGB")


def file_bits(image: PIL.Image.Image) -> int | None:
    """How many bits the values of a picture have, where its file says that they are fewer than those of its mode."""
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE)
    return bits[0] if bits in ((10,), (12,), (14,)) else None


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


def _round_16_to_8(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _from_unit(values: np.ndarray, name: str) -> np.ndarray:
    lowest, highest = float(values.min()), float(values.max())
    # Written so that NaN fails too.
    if not (lowest >= -_UNIT_TOLERANCE and highest <= 1 + _UNIT_TOLERANCE):
        raise OutOfRangeError(
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
