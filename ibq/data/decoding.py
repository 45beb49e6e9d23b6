"""Decoding of one picture: from its file to an upright, opaque square of RGB bytes, or why it cannot be used."""

from __future__ import annotations

import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ibq.data.images import either, one_line
from ibq.data.resizing import Pixels, Place, released_square
from ibq.schema import Resize

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Told by a file's content, whatever its ending; foreign files get at none of Pillow's other readers."""
MAX_PIXELS = 2**27
"""Width times height that a file may declare (134 million): a larger image is refused by its header, before a pixel is
decoded."""
_one_at_a_time = threading.Lock()  # warnings are silenced for the whole process while images are decoded


@contextmanager
def decoding() -> Iterator[None]:
    """Silences what Pillow warns of in metadata and size: what matters of it is said in a sentence of our own."""
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def centre(width: int, height: int) -> tuple[float, float]:
    """Left and top of the square in the middle."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2


def read_square(
    path: Path, resolution: int, place: Place = centre, *, enlarge: bool = False, resize: Resize = "antialiased"
) -> Pixels | str:
    """One image file as a square of bytes; `decoding` must be around it.

    Args:
        path: the file.
        resolution: R, pixels a side.
        place: where the square is.
        enlarge: scale up what is smaller than R, instead of refusing it.
        resize: how it is scaled.

    Returns:
        The square, uint8 (3, R, R), or the words that say, after the file's name, why it cannot be used.
    """

    def square(image: Image.Image) -> Pixels | str:
        width, height = image.size
        if min(width, height) < resolution and not enlarge:
            return f"is {width}×{height} pixels, smaller than resolution={resolution}"
        return np.asarray(square_rgb(image, resolution, place, resize)).transpose(2, 0, 1)

    return read_image(path, square)


def read_image(path: Path, use: Callable[[Image.Image], Pixels | str]) -> Pixels | str:
    """Result of `use` on the opened image, or the words that say, after the file's name, why it cannot be used.

    Args:
        path: any path; what is no image of FORMATS within MAX_PIXELS does not reach `use`.
        use: gets the image before its pixels are decoded; whatever it raises becomes words.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for ever
            return "is not a regular file"
        # By its bytes, not its name: Pillow would map a raw file into memory, and mapped it turns a TIFF on its side
        # into noise.
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                return f"declares {width:,}×{height:,} pixels, over the limit of {MAX_PIXELS:,} in all"
            return use(image)
    except Image.DecompressionBombError as error:  # Pillow's own limit, met while opening
        return f"declares too many pixels ({one_line(error)})"
    except UnidentifiedImageError:
        return f"has not the content of a {either(FORMATS)} image"
    except OSError as error:
        return f"cannot be read ({one_line(error.strerror or error)})"
    except Exception as error:  # decoders answer damaged bytes with errors of every type
        return f"cannot be decoded ({one_line(error)})"


def square_rgb(
    image: Image.Image, resolution: int, place: Place = centre, resize: Resize = "antialiased"
) -> Image.Image:
    """Any image, not decoded yet, as an RGB square: the centre square of `upright_rgb` or another, scaled by Pillow's
    antialiased bicubic filter; or, as released, of the image as it lies in the file, by `released_square`.

    An image of resolution×resolution keeps its pixels. (Where it is antialiased, a JPEG of 6 times the resolution or
    more is decoded at a half, a quarter or an eighth, to no less than 3 times it.)

    Args:
        image: of any size.
        resolution: R, pixels a side.
        place: of the square that is as large as the shorter side.
        resize: how it is scaled.

    Returns:
        An RGB image of R×R pixels.

    Raises:
        as `upright_rgb`.
    """
    if resize == "released":
        return Image.fromarray(released_square(np.asarray(opaque_rgb(image)), resolution, place))
    image.draft(None, (3 * resolution, 3 * resolution))
    image = upright_rgb(image)
    side = min(image.size)
    left, top = place(*image.size)
    box = (left, top, left + side, top + side)
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)


def upright_rgb(image: Image.Image) -> Image.Image:
    """`opaque_rgb`, upright as the EXIF orientation says."""
    image.load()
    return opaque_rgb(_upright(image))


def opaque_rgb(image: Image.Image) -> Image.Image:
    """Any image as RGB.

    Transparent parts stand on white; grey, palette and CMYK become RGB; 16-bit grey is scaled from 0 to 65,535 down to
    0 to 255 and rounded. Colour profiles are not applied.

    Raises:
        ValueError: its pixels are floating-point numbers or exceed 16 bits: what would be white is not known.
        OSError and others: the file is truncated or damaged.
    """
    image.load()
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known")
    if image.mode.startswith("I"):  # I;16, I;16B, and I, which also carries 16 bits from some formats
        grey_HW = np.asarray(image).astype(np.int32)
        if grey_HW.min() < 0 or grey_HW.max() > 65535:
            raise ValueError("its pixels are whole numbers beyond 16 bits, whose range is not known")
        image = Image.fromarray(((grey_HW + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """A loaded image turned as its EXIF says; as it is where that is damaged, since the pixels may be sound."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as various as the damage
        return image
