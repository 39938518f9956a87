"""Every kind of picture is read as what one sees, or refused by name; no other reader is used."""

import contextlib
import io
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import accel.evaluation
from accel.evaluation.errors import AccelWarning, PictureError
from accel.evaluation.picture_files import load_picture, load_pictures, picture_files

Y, X = np.mgrid[0:24, 0:32]
RGB = np.stack([X * 8 % 256, Y * 10 % 256, (X + Y) * 4 % 256], -1).astype(np.uint8)
GREY = RGB[..., 0]


def saved(tmp_path, array_or_image, name="p.png", **options):
    image = array_or_image
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(tmp_path / name, **options)
    return load_picture(tmp_path / name).permute(1, 2, 0).numpy()


def test_greys_of_any_depth_are_the_same_grey(tmp_path):
    expected = np.repeat(GREY[..., None], 3, -1)
    for image in (GREY, GREY.astype(np.uint16) * 257):
        assert np.array_equal(saved(tmp_path, image), expected)
        assert np.array_equal(saved(tmp_path, image, "p.tif"), expected)
    assert np.array_equal(saved(tmp_path, (GREY / np.float32(255)).astype(np.float32), "f.tiff"), expected)
    # What the range is not known of is refused: the same greys, but as 0 to 255.
    with pytest.raises(PictureError, match=r"g\.tif: floating-point numbers outside \[0, 1\]"):
        saved(tmp_path, GREY.astype(np.float32), "g.tif")
    with pytest.raises(PictureError, match=r"i\.tif: 32-bit integers"):
        saved(tmp_path, GREY.astype(np.int32), "i.tif")
    with pytest.raises(PictureError, match="outside"):
        saved(tmp_path, np.full((4, 4), np.nan, np.float32), "n.tif")


def test_sixteen_bit_levels_are_rounded_not_cut(tmp_path):
    levels = np.array([[0, 128, 129, 32768, 65535 - 129, 65535]], np.uint16)
    assert saved(tmp_path, levels)[0, :, 0].tolist() == [0, 0, 1, 128, 254, 255]


def test_colours_come_through_every_mode(tmp_path):
    picture = Image.fromarray(RGB)
    assert np.array_equal(saved(tmp_path, picture), RGB)
    few = picture.quantize(16)
    assert np.array_equal(saved(tmp_path, few), np.array(few.convert("RGB")))
    opaque = np.dstack([RGB, np.full(GREY.shape, 255, np.uint8)])
    assert np.array_equal(saved(tmp_path, opaque), RGB)
    assert np.array_equal(saved(tmp_path, Image.fromarray(GREY).convert("LA"))[..., 1], GREY)
    black_and_white = Image.fromarray(GREY).convert("1")
    assert set(np.unique(saved(tmp_path, black_and_white))) == {0, 255}
    inks = saved(tmp_path, picture.convert("CMYK"), "c.jpg", quality=100, subsampling=0)
    assert np.abs(inks.astype(int) - RGB).mean() < 2


def test_what_is_behind_a_hole_is_not_guessed(tmp_path):
    half = np.dstack([RGB, np.where(X < 16, 255, 254).astype(np.uint8)])
    with pytest.raises(PictureError, match=r"p\.png: is partly transparent"):
        saved(tmp_path, half)
    for image, transparent in ((Image.fromarray(GREY), 8), (Image.fromarray(RGB).quantize(16), 3)):
        with pytest.raises(PictureError, match="partly transparent"):
            saved(tmp_path, image, transparency=transparent)
    with pytest.raises(PictureError, match="partly transparent"):
        saved(tmp_path, GREY.astype(np.uint16) * 257, transparency=8 * 257)
    assert np.array_equal(
        saved(tmp_path, Image.fromarray(GREY), transparency=1)[..., 0], GREY
    )  # no pixel has it


def test_a_photo_stands_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(saved(tmp_path, RGB, exif=exif), np.rot90(RGB, -1))


def test_animations_are_refused_and_a_still_is_not(tmp_path):
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    with pytest.raises(PictureError, match=r"a\.webp: has several frames"):
        saved(tmp_path, frames[0], "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(saved(tmp_path, frames[0], "s.webp", lossless=True), RGB)


def bomb():
    """A PNG of 60000 x 60000 pixels in a hundred bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_what_cannot_be_decoded_is_named_with_the_reason_and_the_rest_is_read(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "png")
    whole = buffer.getvalue()
    (tmp_path / "good.png").write_bytes(whole)
    contents = {
        "empty": (b"", "it is empty"),
        "half": (whole[: len(whole) // 2], "truncated"),
        "text": (b"not a picture at all", "not a PNG, JPEG"),
        "script": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a PNG, JPEG"),
        "bomb": (bomb(), "exceeds limit"),
        "flipped": (whole[:60] + bytes(8) + whole[68:], "cannot be decoded"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    (tmp_path / "link.png").symlink_to(tmp_path / "absent.png")
    os.mkfifo(tmp_path / "pipe.png")
    reasons = {name: reason for name, (_, reason) in contents.items()}
    reasons |= {"link": "a link to .*absent.png, which is not there", "pipe": "not a file"}
    for name, reason in reasons.items():
        with pytest.raises(PictureError, match=rf"{name}\.png: .*{reason}") as caught:
            load_picture(tmp_path / f"{name}.png")
        assert "\n" not in str(caught.value)
    with pytest.warns(AccelWarning) as caught:
        read = list(load_pictures(picture_files(tmp_path)))
    assert [file.name for file, _ in read] == ["good.png"]
    assert len(caught) == len(reasons)
    assert torch.equal(read[0][1], torch.from_numpy(RGB).permute(2, 0, 1))


@pytest.mark.filterwarnings("ignore")  # Pillow's own, on what it finds odd
def test_damage_anywhere_is_a_picture_error_or_a_picture(tmp_path):
    """Pillow's decoders raise whatever they stumble over; 300 random changes of five formats."""
    rng = np.random.default_rng(0)
    originals = []
    for kind in ("png", "jpeg", "webp", "bmp", "tiff"):
        buffer = io.BytesIO()
        Image.fromarray(RGB).save(buffer, kind)
        originals.append(buffer.getvalue())
    read = 0
    for number in range(300):
        content = bytearray(originals[number % len(originals)])
        for place in rng.integers(0, len(content), 4):
            content[place] = rng.integers(256)
        if number % 2:
            content = content[: rng.integers(1, len(content))]
        (tmp_path / "p.png").write_bytes(content)
        # Any other exception ends the test.
        with contextlib.suppress(PictureError):
            assert load_picture(tmp_path / "p.png").shape[0] == 3
            read += 1
    assert 20 < read < 150


def test_hidden_files_are_no_pictures(tmp_path):
    for name in (
        "a.png",
        "b.JPG",
        ".c.png",
        "._a.png",
        "sub/d.webp",
        "__MACOSX/e.png",
        ".cache/f.png",
        "notes.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [file.name for file in picture_files(tmp_path)] == ["a.png", "b.JPG"]
    assert [file.name for file in picture_files(tmp_path, deep=True)] == ["a.png", "b.JPG", "d.webp"]
    assert picture_files(tmp_path / "absent") == []


def test_there_is_one_reader():
    root = Path(accel.evaluation.__file__).parent
    opening = [p.name for p in root.rglob("*.py") if re.search(r"Image\.open\(|imread\(", p.read_text())]
    assert opening == ["picture_files.py"]
