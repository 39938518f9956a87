"""Picture files that others made: which files are pictures, and their pixels as (3, H, W) uint8.

Every place that opens a picture does it here. Pixels are converted by the range of the file's format, or the
picture is refused with a reason: a 16-bit picture cut at 255 is white, and a metric of it looks like a number.
"""

from __future__ import annotations

import functools
import hashlib
import io
import stat
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .errors import AccelWarning, PictureError
from .textfiles import first_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff")
# What those files may hold, whatever their names say; Pillow would also start Ghostscript for an EPS.
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF")
_STACKS = ("PNG", "WEBP", "AVIF", "TIFF")  # an MPO's further frames are the same photo once more


def is_picture(file: Path, root: Path | None = None) -> bool:
    """By name. Hidden files are none, nor what macOS packs beside pictures (`._x.png`, `__MACOSX/`).

    Below `root`, folders are looked at, too.
    """
    parts = file.relative_to(root).parts if root is not None else (file.name,)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return file.suffix.lower() in SUFFIXES and not hidden and not file.is_dir()


def picture_files(folder: Path, *, deep: bool = False) -> list[Path]:
    """Pictures in `folder` (`deep`: and below it), sorted; empty if there is no such folder."""
    if not folder.is_dir():
        return []
    files: Iterable[Path] = folder.rglob("*") if deep else folder.iterdir()
    return sorted(file for file in files if is_picture(file, folder))


def load_picture(file: Path, sha256: str | None = None) -> torch.Tensor:
    """A picture's pixels: (3, H, W) uint8.

    Greyscale, palettes, CMYK, 16 bits and floats in [0, 1] become 8-bit RGB, an opaque alpha channel is
    dropped, and the camera's note which side is up is followed.

    Raises:
        PictureError: it cannot be read, its hash is not `sha256`, it cannot be decoded for whatever reason, or
            what colours it has is not known: partly transparent, animated, numbers without a range.
    """
    content = _content(file)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise PictureError(f"{file}: content differs from what was recorded")
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as picture:
            array = _rgb(picture)
    except PictureError as error:
        raise PictureError(f"{file}: {error}") from None
    except Image.UnidentifiedImageError:
        what = "it is empty" if not content else "not a PNG, JPEG, WebP, AVIF, BMP or TIFF file"
        raise PictureError(f"{file}: cannot be decoded: {what}") from None
    # Pillow's decoders raise whatever they stumble over: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        raise PictureError(f"{file}: cannot be decoded: {first_line(error)}") from error
    return torch.from_numpy(np.array(array)).permute(2, 0, 1)


def picture_hash(file: Path) -> str:
    """SHA-256 of the file; `PictureError` if it cannot be read."""
    return hashlib.sha256(_content(file)).hexdigest()


def load_pictures(files: Iterable[Path]) -> Iterator[tuple[Path, torch.Tensor]]:
    """Those that can be read; the others are named in a warning."""
    for file in files:
        try:
            yield file, load_picture(file)
        except PictureError as error:
            left_out(error)


def left_out(error: PictureError, hint: str = "") -> None:
    """Name a picture that is left out. From this place, whoever reads: "once" is once a module."""
    warnings.warn(f"{error}; left out{hint}", AccelWarning, stacklevel=1)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow was built with: naming another one is an error, whatever the file is."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _content(file: Path) -> bytes:
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would wait for ever
            raise PictureError(f"{file}: cannot be read: not a file")
        return file.read_bytes()
    except OSError as error:
        broken = file.is_symlink() and not file.exists()
        reason = f"a link to {file.readlink()}, which is not there" if broken else error.strerror
        raise PictureError(f"{file}: cannot be read: {reason}") from None


def _rgb(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8."""
    if picture.format in _STACKS and getattr(picture, "n_frames", 1) > 1:
        raise PictureError("has several frames: save the one that is meant")
    ImageOps.exif_transpose(picture, in_place=True)
    mode = picture.mode
    if mode.startswith("I;16"):
        return _grey(np.asarray(picture).astype(np.float64) / 65535, picture.info.get("transparency"))
    if mode == "I" and picture.format == "PNG":  # 16 bits, as Pillow below 11.3 opens them
        return _grey(np.asarray(picture).astype(np.float64) / 65535, picture.info.get("transparency"))
    if mode == "F":
        values = np.asarray(picture)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise PictureError(
                "floating-point numbers outside [0, 1], whose range is not known: save it as 8-bit PNG"
            )
        return _grey(values.astype(np.float64))
    if mode == "I":
        raise PictureError("32-bit integers, whose range is not known: save it as 8-bit or 16-bit PNG")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        return _without_alpha(picture)
    return np.asarray(picture.convert("RGB"))


def _grey(values: np.ndarray, transparent: object = None) -> np.ndarray:
    """(H, W) in [0, 1]; `transparent`: the 16-bit grey that stands for nothing."""
    levels = np.rint(values * 255).astype(np.uint8)
    if isinstance(transparent, int) and (np.rint(values * 65535) == transparent).any():
        raise PictureError(_SEE_THROUGH)
    return np.repeat(levels[..., None], 3, -1)


_SEE_THROUGH = (
    "is partly transparent, and what is behind it is not known: save it on the ground it is seen on"
)


def _without_alpha(picture: Image.Image) -> np.ndarray:
    if picture.mode in ("La", "RGBa", "PA"):
        picture = picture.convert({"La": "LA"}.get(picture.mode, "RGBA"))
    pixels = np.asarray(picture.convert("RGBA"))
    if (pixels[..., 3] < 255).any():
        raise PictureError(_SEE_THROUGH)
    return pixels[..., :3]
