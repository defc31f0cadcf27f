# SPDX-License-Identifier: Apache-2.0
"""Pictures of every kind become the RGB values that they stand for, and unusable ones give a clear error."""

import ast
import base64
import colorsys
import http.server
import io
import os
import re
import struct
import threading
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, UnidentifiedImageError

from moellava.checks import pictures as checked_pictures
from moellava.checks.pictures import decode_picture, load_picture, to_rgb
from moellava.configuration.tools_moellava import tools
from moellava.evaluating import questions
from moellava.installed import InstalledTools
from moellava.processing import images_moellava
from moellava.processing.images_moellava import pad_to_square, scaled_to_tensor
from moellava.training import rows
from moellava.web import pictures as page_pictures


RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (5, 7), dtype=np.uint8)
GREY = np.random.default_rng(2).integers(0, 256, (5, 7), dtype=np.uint8)
DEEP = np.concatenate(
    [
        np.array([0, 1, 128, 129, 256, 257, 300], dtype=np.uint16),
        np.array([32767, 32768, 40000, 65278, 65406, 65407, 65535], dtype=np.uint16),
        np.random.default_rng(3).integers(0, 65536, 21, dtype=np.uint16),
    ]
).reshape(5, 7)


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def grey3(values):
    return np.repeat(np.asarray(values).astype(int)[:, :, None], 3, axis=2)


def eight_bit(values):
    """0..65535 to 0..255, in exact arithmetic."""
    exact = [int(Fraction(int(value) * 255, 65535) + Fraction(1, 2)) for value in values.flat]
    return np.array(exact).reshape(values.shape)


def over_white(color, alpha):
    alpha = alpha[:, :, None] / 255
    return color * alpha + 255 * (1 - alpha)


def saved(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def lab_to_rgb(lab):
    """CIE L*a*b* (D50, 8-bit encoding) to sRGB by the formulas of the standards."""
    lightness = lab[..., 0].astype(float) * 100 / 255
    a, b = (lab[..., 1].astype(float) - 128, lab[..., 2].astype(float) - 128)
    fy = (lightness + 16) / 116
    f = np.stack([fy + a / 500, fy, fy - b / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.96422, 1.0, 0.82521]
    # From XYZ under D50 to linear sRGB (Bradford adaptation included).
    matrix = np.array(
        [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    )
    linear = np.clip(xyz @ matrix.T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


# --- Modes ---


def test_one_bit():
    bits = GREY > 100
    assert (pixels(to_rgb(Image.fromarray(bits))) == grey3(bits * 255)).all()


def test_grey_and_rgb_are_kept():
    assert (pixels(to_rgb(Image.fromarray(GREY))) == grey3(GREY)).all()
    assert (pixels(to_rgb(Image.fromarray(RGB))) == RGB).all()


@pytest.mark.parametrize("mode", ["RGBA", "RGBa"])
def test_alpha_is_composited_over_white(mode):
    image = Image.fromarray(np.dstack([RGB, ALPHA]))
    assert image.mode == "RGBA"
    # Premultiplied values lose precision where the alpha is small, but not after the multiplication.
    assert np.abs(pixels(to_rgb(image.convert(mode))) - over_white(RGB, ALPHA)).max() <= 1.5


@pytest.mark.parametrize("mode", ["LA", "La"])
def test_grey_with_alpha_is_composited_over_white(mode):
    image = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    assert np.abs(pixels(to_rgb(image.convert(mode))) - over_white(grey3(GREY), ALPHA)).max() <= 1.5


def test_fully_transparent_black_becomes_white():
    assert (pixels(to_rgb(Image.new("RGBA", (4, 3), (0, 0, 0, 0)))) == 255).all()


def palette_image():
    image = Image.frombytes("P", (7, 5), (GREY % 3).tobytes())
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
    return image, np.array([[10, 20, 30], [200, 100, 50], [0, 0, 0]])[GREY % 3]


def test_palette_without_transparency():
    image, expected = palette_image()
    assert (pixels(to_rgb(image)) == expected).all()


@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
def test_palette_with_a_transparent_entry(image_format):
    image, expected = palette_image()
    image = Image.open(io.BytesIO(saved(image, image_format, transparency=1)))
    expected[GREY % 3 == 1] = 255
    assert (pixels(to_rgb(image)) == expected).all()


def test_palette_with_alpha_per_entry():
    image, expected = palette_image()
    image = Image.open(io.BytesIO(saved(image, "PNG", transparency=bytes([255, 0, 51]))))
    assert image.mode == "P" and isinstance(image.info["transparency"], bytes)
    alpha = np.array([255, 0, 51])[GREY % 3]
    assert np.abs(pixels(to_rgb(image)) - over_white(expected, alpha)).max() <= 1


def test_palette_with_rgba_palette():
    image = Image.frombytes("P", (7, 5), (GREY % 2).tobytes())
    image.putpalette([10, 20, 30, 255, 200, 100, 50, 0], "RGBA")
    expected = np.array([[10, 20, 30], [255, 255, 255]])[GREY % 2]
    assert (pixels(to_rgb(image)) == expected).all()


@pytest.mark.parametrize("mode, key", [("L", 0), ("RGB", (1, 2, 3))])
def test_transparent_colour_of_a_picture_without_alpha(mode, key):
    image = Image.new(mode, (2, 1), 77 if mode == "L" else (77, 78, 79))
    image.putpixel((1, 0), key)
    image = Image.open(io.BytesIO(saved(image, "PNG", transparency=key)))
    assert image.mode == mode
    assert pixels(to_rgb(image))[0].tolist() == [[77, 77, 77] if mode == "L" else [77, 78, 79], [255, 255, 255]]


def test_cmyk():
    values = np.dstack([RGB, GREY])
    image = Image.frombytes("CMYK", (7, 5), values.tobytes())
    expected = (255 - RGB.astype(float)) * (255 - GREY.astype(float))[:, :, None] / 255
    assert np.abs(pixels(to_rgb(image)) - expected).max() <= 1


def test_ycbcr():
    image = Image.frombytes("YCbCr", (7, 5), RGB.tobytes())
    y, cb, cr = (RGB[..., channel].astype(float) - (128 if channel else 0) for channel in range(3))
    expected = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)
    assert np.abs(pixels(to_rgb(image)) - np.clip(expected, 0, 255)).max() <= 1.5


def test_hsv():
    image = Image.frombytes("HSV", (7, 5), RGB.tobytes())
    expected = [[255 * c for c in colorsys.hsv_to_rgb(*(pixel / 255))] for pixel in RGB.reshape(-1, 3)]
    assert np.abs(pixels(to_rgb(image)).reshape(-1, 3) - np.array(expected)).max() <= 4


def test_lab():
    # Colours inside sRGB: outside, every converter may map them differently.
    lab = np.array([[[0, 128, 128], [255, 128, 128], [128, 128, 128], [140, 160, 150], [90, 118, 100]]], dtype=np.uint8)
    image = Image.merge("LAB", [Image.fromarray(lab[..., channel]) for channel in range(3)])
    assert np.abs(pixels(to_rgb(image)) - lab_to_rgb(lab)).max() <= 3


@pytest.mark.parametrize("mode, dtype", [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2")])
def test_16_bit_is_mapped_linearly_in_every_byte_order(mode, dtype):
    image = Image.frombytes(mode, (7, 5), DEEP.astype(dtype).tobytes())
    assert (pixels(to_rgb(image)) == grey3(eight_bit(DEEP))).all()


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_files(tmp_path, image_format):
    path = tmp_path / f"deep.{image_format.lower()}"
    Image.fromarray(DEEP).save(path, image_format)
    assert (pixels(to_rgb(path)) == grey3(eight_bit(DEEP))).all()


def test_16_bit_transparent_value_becomes_white():
    content = saved(Image.fromarray(DEEP), "PNG", transparency=40000)
    expected = grey3(eight_bit(DEEP))
    expected[DEEP == 40000] = 255
    assert (pixels(to_rgb(Image.open(io.BytesIO(content)))) == expected).all()


def test_mode_i_is_read_as_16_bit():
    assert (pixels(to_rgb(Image.fromarray(DEEP.astype(np.int32)))) == grey3(eight_bit(DEEP))).all()


@pytest.mark.parametrize("value", [-1, 65536])
def test_mode_i_outside_16_bit_is_an_error(value):
    with pytest.raises(ValueError, match=rf"Picture 3 holds values from .*{value}.* in mode I, .* 0 to 65535"):
        to_rgb(Image.fromarray(np.array([[7, value]], dtype=np.int32)), "Picture 3")


def test_mode_f_is_read_as_0_to_1():
    assert (pixels(to_rgb(Image.fromarray((GREY / 255).astype(np.float32)))) == grey3(GREY)).all()


@pytest.mark.parametrize("values", [[0.0, 200.0], [-0.5, 1.0], [0.5, float("nan")], [0.5, float("inf")]])
def test_mode_f_outside_0_to_1_is_an_error(values):
    with pytest.raises(ValueError, match="holds floats from .* floats are read as 0 to 1"):
        to_rgb(Image.fromarray(np.array([values], dtype=np.float32)))


# --- Orientation and frames ---


UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("values", [RGB, DEEP], ids=["RGB", "I;16"])
def test_exif_orientation_is_applied(orientation, values):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.open(io.BytesIO(saved(Image.fromarray(values), "PNG", exif=exif)))
    expected = RGB if values is RGB else grey3(eight_bit(DEEP))
    assert (pixels(to_rgb(image)) == UPRIGHT[orientation](expected)).all()
    assert image.size == (7, 5), "the caller's picture is left alone"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0not a tiff head", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_picture_with_broken_exif_is_taken_as_stored(exif):
    image = Image.open(io.BytesIO(saved(Image.fromarray(GREY), "JPEG", quality=95, exif=exif)))
    assert (pixels(to_rgb(image)) == grey3(np.asarray(image))).all()


@pytest.mark.parametrize("image_format", ["GIF", "TIFF", "PNG", "WEBP"])
def test_first_frame_of_a_file(tmp_path, image_format):
    frames = [Image.new("RGB", (6, 4), color) for color in [(250, 0, 0), (0, 250, 0), (0, 0, 250)]]
    path = tmp_path / "frames"
    options = {"lossless": True} if image_format == "WEBP" else {}
    frames[0].save(path, image_format, save_all=True, append_images=frames[1:], **options)
    assert (pixels(to_rgb(path)) == [250, 0, 0]).all()


# --- Sources ---


def test_paths(tmp_path):
    path = tmp_path / "a picture.png"
    Image.fromarray(RGB).save(path)
    assert (pixels(to_rgb(path)) == RGB).all()
    assert (pixels(to_rgb(str(path))) == RGB).all()


def test_base64():
    text = base64.b64encode(saved(Image.fromarray(RGB), "PNG")).decode()
    assert (pixels(to_rgb(text)) == RGB).all()
    assert (pixels(to_rgb(f"data:image/png;base64,{text}")) == RGB).all()
    wrapped = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    assert (pixels(to_rgb(wrapped)) == RGB).all()


@pytest.fixture
def served(tmp_path):
    """A folder and its http address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(tmp_path), **kwargs)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield tmp_path, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_url_gives_what_the_file_gives(served, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder, address = served
    Image.fromarray(DEEP).save(folder / "deep.png")
    Image.fromarray(np.dstack([RGB, ALPHA])).save(folder / "alpha.png")
    for name in ("deep.png", "alpha.png"):
        assert (pixels(to_rgb(f"{address}/{name}")) == pixels(to_rgb(folder / name))).all()


@pytest.mark.parametrize("values", [DEEP, RGB, GREY, np.dstack([RGB, ALPHA])])
@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_a_checkpoints_own_code_reads_files_alike(tmp_path, values, image_format):
    """Where the package is not installed, `images_moellava` alone opens them: 16 bits, transparency and all."""
    path = tmp_path / "picture"
    Image.fromarray(values).save(path, image_format)
    for picture in (path, str(path), Image.open(path), values):
        assert (pixels(images_moellava.to_rgb(picture)) == pixels(to_rgb(picture))).all()
    path.write_bytes(EPS)
    with pytest.raises(UnidentifiedImageError):
        images_moellava.to_rgb(path)


def test_a_checkpoints_own_code_reads_addresses_by_transformers(served, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder, address = served
    Image.fromarray(RGB).save(folder / "picture.png")
    text = base64.b64encode((folder / "picture.png").read_bytes()).decode()
    for source in (f"{address}/picture.png", text, f"data:image/png;base64,{text}"):
        assert (pixels(images_moellava.to_rgb(source)) == RGB).all()


def test_url_errors(served, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder, address = served
    (folder / "page.html").write_text("<html>no picture</html>")
    with pytest.raises(ValueError, match=r"Picture 1 \('http.*/gone.png'\) cannot be fetched: HTTPError.*404"):
        load_picture(f"{address}/gone.png", "Picture 1")
    with pytest.raises(ValueError, match=r"Picture 1 \('http.*/page.html'\) cannot be decoded: UnidentifiedImageError"):
        load_picture(f"{address}/page.html", "Picture 1")
    with pytest.raises(ValueError, match="cannot be fetched: URLError"):
        load_picture("http://127.0.0.1:1/refused.png")


# --- What cannot be used ---


@pytest.mark.parametrize("as_path", [True, False])
@pytest.mark.parametrize("name", ["missing.png", "folder/missing", "abcd"])
def test_missing_file_is_named(tmp_path, monkeypatch, as_path, name):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / name if as_path else name
    with pytest.raises(FileNotFoundError, match=rf"Picture 2: there is no file '.*{name}'"):
        to_rgb(source, "Picture 2")


def test_folder_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        to_rgb(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        to_rgb(str(tmp_path))


def test_no_picture_file(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    for source in (path, str(path)):
        with pytest.raises(ValueError, match=r"Picture 0 \('.*notes.png'\) cannot be decoded: UnidentifiedImageError"):
            to_rgb(source, "Picture 0")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP"])
def test_truncated_file(tmp_path, image_format):
    noise = np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = saved(Image.fromarray(noise), image_format)
    path = tmp_path / "half"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"The picture \('.*half'\) cannot be decoded: \w+: .+ complete picture file"):
        to_rgb(path)


def test_truncated_base64_is_not_taken_for_a_path():
    noise = np.random.default_rng(5).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    content = saved(Image.fromarray(noise), "JPEG")
    text = base64.b64encode(content[: len(content) // 2]).decode()
    for source in (text, f"data:image/jpeg;base64,{text}"):
        with pytest.raises(ValueError, match=r"\('base64 text'\) cannot be decoded"):
            to_rgb(source)
    with pytest.raises(ValueError, match=r"no `data:image/"):
        to_rgb("data:image/png;base64,$$$")
    with pytest.raises(ValueError, match=r"no `data:image/"):
        to_rgb("data:text/plain;base64,YWJj")


def test_picture_opened_by_the_caller_and_truncated(tmp_path):
    content = saved(Image.fromarray(RGB).resize((64, 64)), "JPEG", quality=95)
    path = tmp_path / "half.jpg"
    path.write_bytes(content[: len(content) // 2])
    image = Image.open(path)
    with pytest.raises(ValueError, match=r"Picture 1 of row 0 \('.*half.jpg'\) cannot be decoded: OSError"):
        to_rgb(image, "Picture 1 of row 0")


def test_decompression_bomb(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("L", (50, 50)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"bomb.png'\) cannot be decoded: DecompressionBombError"):
        to_rgb(path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions stop")
def test_unreadable_file_says_so(tmp_path):
    path = tmp_path / "secret.png"
    Image.new("L", (5, 5)).save(path)
    path.chmod(0)
    with pytest.raises(ValueError, match=r"secret.png'\) cannot be read: .*Permission denied"):
        to_rgb(path)


def test_picture_without_pixels():
    with pytest.raises(ValueError, match=r"Picture 4 has no pixels: its size is \(0, 5\)"):
        to_rgb(Image.new("RGB", (0, 5)), "Picture 4")


@pytest.mark.parametrize("thing", [3, {"path": "a.png"}, [1, 2], b"bytes", None])
def test_no_picture_at_all(thing):
    with pytest.raises(TypeError, match=rf"Picture 0 is of type {type(thing).__name__}; expected a PIL picture"):
        to_rgb(thing, "Picture 0")


# --- Arrays ---


@pytest.mark.parametrize("make", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_array_layouts(make):
    assert (pixels(to_rgb(make(GREY))) == grey3(GREY)).all()
    assert (pixels(to_rgb(make(GREY[:, :, None]))) == grey3(GREY)).all()
    assert (pixels(to_rgb(make(GREY[None]))) == grey3(GREY)).all()
    assert (pixels(to_rgb(make(RGB))) == RGB).all()
    assert (pixels(to_rgb(make(np.ascontiguousarray(RGB.transpose(2, 0, 1))))) == RGB).all()
    rgba = np.dstack([RGB, ALPHA])
    for layout in (rgba, np.ascontiguousarray(rgba.transpose(2, 0, 1))):
        assert np.abs(pixels(to_rgb(make(layout))) - over_white(RGB, ALPHA)).max() <= 1


@pytest.mark.parametrize("make", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_array_types(make):
    assert (pixels(to_rgb(make(GREY > 100))) == grey3((GREY > 100) * 255)).all()
    assert (pixels(to_rgb(make(DEEP))) == grey3(eight_bit(DEEP))).all()
    for dtype in (np.float32, np.float64, np.float16):
        assert (pixels(to_rgb(make((RGB / 255).astype(dtype)))) == RGB).all()
    deep_rgb = np.dstack([DEEP, DEEP[::-1], DEEP])
    assert (pixels(to_rgb(make(deep_rgb))) == np.stack([eight_bit(deep_rgb[..., c]) for c in range(3)], -1)).all()


def test_bfloat16_tensor():
    values = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.bfloat16)
    assert pixels(to_rgb(values))[0, :, 0].tolist() == [0, 128, 255]


def test_tensor_with_gradient_is_read():
    assert pixels(to_rgb(torch.ones(2, 5, requires_grad=True))).min() == 255


def test_values_a_little_outside_the_unit_range_are_cut():
    assert pixels(to_rgb(np.array([[-0.0005, 1.0005]])))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("values", [[0.0, 255.0], [-2.1, 2.6], [0.0, float("nan")]])
def test_floats_outside_the_unit_range_are_an_error(values):
    with pytest.raises(ValueError, match="Picture 1 holds floats from .*convert to uint8.*`do_rescale=False`"):
        to_rgb(np.array([values]), "Picture 1")


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint32, np.int8, np.complex64])
def test_integers_of_unknown_range_are_an_error(dtype):
    with pytest.raises(TypeError, match=rf"Picture 1 is an array of {np.dtype(dtype)}, .* uint8 \(0 to 255\), uint16"):
        to_rgb(np.zeros((6, 5, 3), dtype=dtype), "Picture 1")


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5), (5, 6, 7), (2, 6, 5), (0, 5), (0, 5, 3), (5, 0, 3)])
def test_other_shapes_are_an_error(shape):
    with pytest.raises(ValueError, match=r"Picture 1 has shape \(.*\); expected \(height, width\)"):
        to_rgb(np.zeros(shape, dtype=np.uint8), "Picture 1")


def test_ambiguous_shape_needs_to_be_told():
    values = np.random.default_rng(7).integers(0, 256, (3, 9, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"shape \(3, 9, 3\), where the first or the last axis.*input_data_format"):
        to_rgb(values)
    assert (pixels(to_rgb(values, input_data_format="channels_last")) == values).all()
    assert (pixels(to_rgb(values, input_data_format="channels_first")) == values.transpose(1, 2, 0)).all()
    with pytest.raises(ValueError, match=r"shape \(5, 7, 3\) with `input_data_format='channels_first'`"):
        to_rgb(RGB, input_data_format="channels_first")
    with pytest.raises(ValueError, match=r"`input_data_format` is 'last'; expected one of \['channels_first'"):
        to_rgb(RGB, input_data_format="last")


def test_read_only_and_strided_arrays():
    values = np.frombuffer(RGB.tobytes(), dtype=np.uint8).reshape(RGB.shape)
    assert (pixels(to_rgb(values)) == RGB).all()
    assert (pixels(to_rgb(values[::-1, ::2])) == RGB[::-1, ::2]).all()


# --- Padding ---


@pytest.mark.parametrize(
    "size, corner", [((10, 4), (0, 3)), ((10, 5), (0, 2)), ((4, 10), (3, 0)), ((5, 10), (2, 0)), ((6, 6), (0, 0))]
)
def test_pad_to_square(size, corner):
    width, height = size
    values = np.random.default_rng(8).integers(0, 256, (height, width, 3), dtype=np.uint8)
    result = np.asarray(pad_to_square(Image.fromarray(values), (122, 116, 104)))
    side = max(size)
    left, top = corner
    expected = np.full((side, side, 3), (122, 116, 104), dtype=np.uint8)
    expected[top : top + height, left : left + width] = values
    assert (result == expected).all()
    # The same on a tensor.
    tensor = torch.tensor(values / 255, dtype=torch.float32).permute(2, 0, 1)
    padded = pad_to_square(tensor, (122, 116, 104))
    torch.testing.assert_close(padded.permute(1, 2, 0) * 255, torch.tensor(expected, dtype=torch.float32))


def test_scaled_values_are_laid_out_and_not_changed():
    values = np.random.default_rng(9).normal(size=(5, 7, 3)).astype(np.float32)
    expected = torch.tensor(values).permute(2, 0, 1)
    assert torch.equal(scaled_to_tensor(values), expected)
    assert torch.equal(scaled_to_tensor(torch.tensor(values).permute(2, 0, 1)), expected)
    assert torch.equal(scaled_to_tensor(values[:, :, 0]), expected[:1].expand(3, -1, -1))
    assert torch.equal(scaled_to_tensor(values[:, :, :1]), expected[:1].expand(3, -1, -1))
    alpha = np.full((5, 7, 1), 0.25, dtype=np.float32)
    torch.testing.assert_close(scaled_to_tensor(np.dstack([values, alpha])), expected * 0.25 + 0.75)


# --- What is opened, and by what ---


ROOT = Path(__file__).parent.parent
# What opens a picture: by the call, or by the import.
OPENERS = re.compile(
    r"\bImage\.open\(|\bload_images?\(|\bfetch_images\(|\bimread\(|\bdecode_image\(|\bread_image\(|"
    r"\b(?:import|from) (?:cv2|imageio|torchvision\.io|skimage)"
)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file of Linux")
def test_a_file_that_the_system_does_not_let_read():
    for source in ("/proc/self/mem", Path("/proc/self/mem")):
        with pytest.raises(ValueError, match=r"The picture \('/proc/self/mem'\) cannot be read: OSError: Input/output"):
            load_picture(source)


def test_one_function_opens_pictures():
    """Nothing but `decode_picture` lets Pillow, or another library, open one, templates of pages among it; and the
    travelling file's `load_picture`, in whose place the installed package puts its own."""
    found = []
    for room in ("configuration", "hub_cards", "modeling", "moellava", "parts", "processing"):
        for path in [*(ROOT / room).rglob("*.py"), *(ROOT / room).rglob("*.jinja")]:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".py":  # without comments
                text = ast.unparse(ast.parse(text))
            found += [(path.name, match) for match in OPENERS.findall(text)]
    travelling = [("images_moellava.py", "load_image("), ("images_moellava.py", "Image.open(")]
    assert sorted(found) == sorted([("pictures.py", "Image.open("), *travelling])
    for name in ("load_picture", "to_rgb"):
        assert getattr(tools(), name).__module__ == InstalledTools.__module__


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
(pwned) print showpage
%%EOF
"""


def rows_of_a_dataset(path):
    """A picture as `datasets` would decode it when the row is read."""
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "scans": datasets.List(datasets.Image()), "messages": datasets.Value("string")}
    )
    held = {"bytes": path.read_bytes(), "path": None}
    return datasets.Dataset.from_list([{"image": held, "scans": [held], "messages": None}], features=features)


DOORS = {
    "path": to_rgb,
    "text": lambda path: to_rgb(str(path)),
    "base64": lambda path: to_rgb(base64.b64encode(path.read_bytes()).decode()),
    "data": lambda path: to_rgb(f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"),
    "opened by the caller": lambda path: to_rgb(Image.open(path)),
    "page": lambda path: page_pictures.open_picture(str(path)),
    "row": rows.open_picture,
    "row of bytes": lambda path: rows.open_picture({"bytes": path.read_bytes()}),
    "question": questions.open_picture,
    "question of bytes": lambda path: questions.open_picture({"bytes": path.read_bytes()}),
    "dataset to train": lambda path: rows.open_picture(next(rows.Rows(rows_of_a_dataset(path)).raw())[1]["image"]),
    "dataset to evaluate": lambda path: questions.open_picture(
        questions.read_questions(
            rows_of_a_dataset(path).map(lambda row: {"question": "What?", "answer": "That."}).remove_columns("messages")
        ).questions[0].pictures[0]
    ),
}  # fmt: skip


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program that Pillow takes for Ghostscript; returns the file that is there once it has run."""
    trace = tmp_path / "ran"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{trace}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return trace


@pytest.mark.skipif(os.name != "posix", reason="the program is a shell script")
@pytest.mark.parametrize("door", DOORS)
def test_no_picture_starts_a_program(tmp_path, ghostscript, door):
    path = tmp_path / "scan.png"
    path.write_bytes(EPS)
    said = "no known format|is a picture in the format EPS, which is not decoded here|there is no file 'JSFQ"
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        DOORS[door](path)
    assert not ghostscript.exists()
    with pytest.raises(OSError):  # Pillow alone: the test would see it
        Image.open(path).load()
    assert ghostscript.exists()


@pytest.mark.parametrize("door", DOORS)
def test_every_door_opens_a_picture(tmp_path, door):
    path = tmp_path / "scan.png"
    Image.fromarray(RGB).save(path)
    assert (pixels(DOORS[door](path)) == RGB).all()


@pytest.mark.parametrize(
    "image_format", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"]
)
def test_formats_that_people_use(image_format):
    content = saved(Image.fromarray(RGB).resize((32, 32)), image_format)
    assert to_rgb(decode_picture(content)).size == (32, 32)


@pytest.mark.parametrize("image_format", ["DDS", "EPS", "ICNS", "ICO", "IM", "PCX", "SGI", "SPIDER", "TGA"])
def test_other_formats_are_not_opened(image_format):
    image = Image.fromarray(GREY, "L").resize((32, 32)).convert("F" if image_format == "SPIDER" else "RGB")
    with pytest.raises(
        ValueError, match="no known format. Expected a complete picture file, in one of the formats AVIF"
    ):
        decode_picture(saved(image, image_format))


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it finds odd
@pytest.mark.parametrize("image_format", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"])
def test_whatever_a_decoder_raises_is_an_error_of_ours(image_format):
    noise = np.random.default_rng(6).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    content = saved(Image.fromarray(noise), image_format)
    chance, refused = np.random.default_rng(7), 0
    for _ in range(300):
        broken = bytearray(content[: chance.integers(1, len(content) + 1)] if chance.random() < 0.3 else content)
        for place in chance.integers(0, len(broken), chance.integers(1, 6)):
            broken[place] = chance.integers(0, 256)
        try:
            to_rgb(decode_picture(bytes(broken)))
        except ValueError as error:
            refused += 1
            assert re.match(r"The picture( \('bytes'\))?.* (cannot be decoded|pixels|holds)", str(error))
    assert refused > 10


@pytest.mark.parametrize("error", [AssertionError, MemoryError, RecursionError, RuntimeError, struct.error])
def test_unusual_errors_of_a_decoder(monkeypatch, error):
    def fail(self):
        raise error("from within")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ValueError, match=rf"cannot be decoded: {error.__name__}: from within"):
        decode_picture(saved(Image.fromarray(RGB), "PNG"))


def test_what_takes_too_many_bytes(served, monkeypatch):
    folder, address = served
    monkeypatch.setattr(checked_pictures, "_MOST_BYTES", 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow opens twice as many
    path = folder / "large.png"
    Image.new("RGB", (50, 50)).save(path)
    for picture in (path, Image.open(path)):
        with pytest.raises(ValueError, match="50x50 pixels, 10,000 bytes when it is decoded; expected at most 8,000"):
            to_rgb(picture)
    Image.new("L", (50, 50)).save(path)
    assert to_rgb(path).size == (50, 50)
    path.write_bytes(bytes(8001))
    for source in (path, f"{address}/large.png"):
        with pytest.raises(ValueError, match="is a file of more than 8,000 bytes. Scale it down first"):
            to_rgb(source)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # the caller's word
    Image.new("RGB", (50, 50)).save(path)
    assert to_rgb(path).size == (50, 50)


# --- What 16 bits mean ---


@pytest.fixture
def warned(monkeypatch):
    """The warnings that were logged."""
    texts = []
    monkeypatch.setattr(checked_pictures, "_said", set())
    monkeypatch.setattr(checked_pictures.logger, "warning", texts.append)
    return texts


RAMP = np.linspace(0, 4095, 35).astype(np.uint16).reshape(5, 7)


def tiff(values, bits: int, photometric: int) -> bytes:
    """A TIFF file without compression; values of 12 bits are packed."""
    if bits == 12:
        text = "".join(
            "".join(f"{value:012b}" for value in row).ljust(-(-len(row) * 12 // 8) * 8, "0") for row in values
        )
        data = int(text, 2).to_bytes(len(text) // 8, "big")
    else:
        data = values.astype("<u2").tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8)]
    tags += [(277, 1), (278, height), (279, len(data))]
    data = data.ljust(-(-len(data) // 2) * 2, b"\0")
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_12_bits_in_a_16_bit_file_are_said(tmp_path, warned, image_format):
    path = tmp_path / "scan"
    path.write_bytes(saved(Image.fromarray(RAMP), image_format))
    assert pixels(to_rgb(path)).max() == 16  # nothing is guessed
    (text,) = warned
    assert "scan') is a 16-bit picture, and its values end at 4095" in text and "0 to 15 of 255" in text
    # What it recommends is right.
    scaled = eval(re.search(r"pass (np.*) / ", text)[1], {"np": np, "picture": load_picture(path)}) / 4095
    assert np.abs(pixels(to_rgb(scaled)) - grey3(RAMP / 4095 * 255)).max() <= 1
    assert np.abs(pixels(to_rgb(Image.fromarray(RAMP * 16))) - grey3(RAMP / 4096 * 255)).max() <= 1
    assert len(warned) == 1


@pytest.mark.parametrize(
    "picture, bits",
    [
        (RAMP, 12),
        (np.dstack([RAMP] * 3), 12),
        (np.dstack([RAMP] * 3 + [np.full_like(RAMP, 65535)]), 12),
        (RAMP // 4, 10),
        (RAMP * 4, 14),
        (RAMP.astype(">u2"), 12),
        (torch.tensor(RAMP), 12),
        (torch.tensor(np.stack([RAMP] * 3 + [np.full_like(RAMP, 65535)])), 12),
        (Image.fromarray(RAMP.astype(np.int32)), 12),
        (Image.fromarray(RAMP), 12),
    ],
)
def test_values_of_few_bits_are_said_of_arrays_and_pictures(warned, picture, bits):
    to_rgb(picture)
    assert len(warned) == 1 and f"If its values have {bits} bits" in warned[0]


@pytest.mark.parametrize(
    "picture",
    [DEEP, RAMP * 5, np.zeros_like(RAMP), np.full_like(RAMP, 4095), RAMP / 4095, (RAMP // 16).astype(np.uint8)],
)
def test_nothing_is_said_of_what_is_clear(warned, picture):
    to_rgb(picture)
    assert warned == []


def test_pictures_of_a_whole_data_set_are_not_all_named(warned):
    for number in range(100):
        to_rgb(RAMP, f"Picture {number % 80}")
    assert len(warned) == 51
    assert warned[0].startswith("Picture 0 is") and warned[49].startswith("Picture 49 is")
    assert warned[50] == "More 16-bit pictures are nearly black; they are not named."


def test_colours_of_16_bits(warned):
    """Pillow keeps the upper half of each; PNG has its numbers from the high byte on."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for scale in (1, 16):
        values = np.dstack([RAMP * scale] * 3).astype(">u2")
        lines = b"".join(b"\0" + row.tobytes() for row in values)
        head = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
        content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines))
        to_rgb(decode_picture(content + chunk(b"IEND", b""), "Picture 0"))
        (text,) = warned
        assert text.endswith("If its values have 12 bits, scale them first: save it with its values times 16.")


def test_a_tiff_of_12_bits_says_so_itself(warned):
    picture = decode_picture(tiff(RAMP, 12, 1))
    assert (np.asarray(picture) == RAMP).all()
    assert np.abs(pixels(to_rgb(picture)) - grey3(RAMP / 4095 * 255)).max() <= 1
    assert warned == []


def test_a_tiff_in_which_0_is_white_is_inverted():
    assert (pixels(to_rgb(decode_picture(tiff(DEEP, 16, 1)))) == grey3(eight_bit(DEEP))).all()
    assert (pixels(to_rgb(decode_picture(tiff(DEEP, 16, 0)))) == grey3(eight_bit(65535 - DEEP))).all()


def test_pnm_of_12_bits_is_scaled_by_pillow(warned):
    content = b"P5 7 5 4095\n" + RAMP.astype(">u2").tobytes()
    assert np.abs(pixels(to_rgb(decode_picture(content))) - grey3(RAMP / 4095 * 255)).max() <= 1
    assert warned == []


def test_the_page_says_it(tmp_path):
    path = tmp_path / "scan.png"
    Image.fromarray(RAMP).save(path)
    assert page_pictures.doubt(str(path)).startswith("'scan.png' is a 16-bit picture, and its values end at 4095")
    Image.fromarray(RGB).save(path)
    assert page_pictures.doubt(str(path)) is None
