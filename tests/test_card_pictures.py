# SPDX-License-Identifier: Apache-2.0
"""Pictures that a model card shows are published without what a camera or an editor wrote beside them."""

import io

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.PngImagePlugin
import pytest

from moellava.hub.card_pictures import without_metadata


NAME, PLACE = b"Jane Roe", b"51.5N"
PIXELS = np.kron(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
UPRIGHT = np.rot90(PIXELS, -1)  # what orientation 6 shows


def exif() -> PIL.Image.Exif:
    fields = PIL.Image.Exif()
    fields[0x013B], fields[0x010E], fields[0x0112] = NAME.decode(), PLACE.decode(), 6
    fields.get_ifd(0x8825)[29] = PLACE.decode()
    return fields


def texts() -> PIL.PngImagePlugin.PngInfo:
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text("Author", NAME.decode())
    info.add_itxt("XML:com.adobe.xmp", PLACE.decode())
    return info


def profile() -> bytes:
    return PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()


FORMATS = {
    "JPEG": {"exif": exif, "comment": NAME, "xmp": PLACE, "icc_profile": profile, "subsampling": 0, "quality": 95},
    "MPO": {"exif": exif, "save_all": True, "append_images": [PIL.Image.fromarray(PIXELS)], "subsampling": 0},
    "PNG": {"exif": exif, "pnginfo": texts, "icc_profile": profile},
    "WEBP": {"exif": exif, "xmp": PLACE, "lossless": True},
    "TIFF": {"exif": exif, "description": PLACE.decode()},
    "AVIF": {"exif": exif, "xmp": PLACE, "subsampling": "4:4:4"},
    "GIF": {"comment": NAME + PLACE},
    "JPEG2000": {"comment": NAME + PLACE},
    "BMP": {},
    "PPM": {},
}


def saved(image: PIL.Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **{key: value() if callable(value) else value for key, value in options.items()})
    return file.getvalue()


def opened(content: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(content))


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_but_the_pixels_is_kept(kind):
    image = PIL.Image.fromarray(PIXELS)
    content = saved(image.quantize() if kind == "GIF" else image, kind, **FORMATS[kind]) + NAME  # behind its end
    cleaned = without_metadata(content, "scan")
    assert NAME in content and NAME not in cleaned and PLACE not in cleaned
    found = opened(cleaned)
    assert found.format == ("JPEG" if kind == "MPO" else kind)
    assert not {0x013B, 0x010E, 0x0112, 0x8825} & set(found.getexif())
    assert not {"exif", "xmp", "icc_profile", "photoshop", "Author"} & set(found.info)
    shown = np.asarray(found.convert("RGB")).astype(int)
    expected = UPRIGHT if "exif" in FORMATS[kind] else np.asarray(opened(content).convert("RGB"))
    assert shown.shape == expected.shape
    is_lossy = kind in ("JPEG", "MPO", "AVIF")
    assert np.abs(shown - expected).mean() < (20 if is_lossy else 1e-9)
    assert without_metadata(content, "scan") == cleaned  # so a second push has nothing to commit


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF"])
def test_an_animation_stays_one(kind):
    frames = [PIL.Image.fromarray(np.rot90(PIXELS, turns)[:32, :32].copy()).quantize() for turns in range(3)]
    frames = frames if kind == "GIF" else [frame.convert("RGB") for frame in frames]
    options = {"save_all": True, "append_images": frames[1:], "duration": [100, 200, 300], "loop": 2}
    found = opened(without_metadata(saved(frames[0], kind, **options), "turning"))
    durations = []
    for number, frame in enumerate(frames):
        found.seek(number)
        found.load()
        durations.append(found.info["duration"])
        difference = np.abs(np.asarray(found.convert("RGB")).astype(int) - np.asarray(frame.convert("RGB")))
        assert difference.mean() < 20
    assert durations == [100, 200, 300] and found.n_frames == 3
    assert kind == "AVIF" or found.info["loop"] == 2  # of which AVIF keeps nothing


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_every_mode(mode, kind):
    try:
        content = saved(PIL.Image.new(mode, (6, 4)), kind, exif=exif())
    except OSError:
        pytest.skip(f"{kind} has no mode {mode}")
    assert opened(without_metadata(content, "scan")).size == (4, 6)


def test_transparency_and_colours_stay():
    clear = PIL.Image.new("P", (4, 4), 1)
    clear.putpalette([255, 0, 0, 0, 255, 0])
    found = opened(without_metadata(saved(clear, "PNG", transparency=1), "clear"))
    assert np.asarray(found.convert("RGBA"))[..., 3].max() == 0
    broken = saved(PIL.Image.fromarray(PIXELS), "PNG", icc_profile=b"no profile at all")
    assert (np.asarray(opened(without_metadata(broken, "scan"))) == PIXELS).all()


def test_what_cannot_be_written_is_an_error(monkeypatch):
    content = saved(PIL.Image.fromarray(PIXELS), "PPM")
    monkeypatch.delitem(PIL.Image.SAVE, "PPM")
    with pytest.raises(ValueError, match=r"The card shows scan\.ppm, a picture in the format PPM.*Show it as a PNG"):
        without_metadata(content, "scan.ppm")
