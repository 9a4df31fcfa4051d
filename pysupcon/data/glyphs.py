"""Capital letters in ten typefaces: coarse classes are letters, fine classes a letter in a typeface.

The images are drawn from the fonts that matplotlib's package contains, so they need no files and no network.
FreeType, the library that draws them, may change single pixels between its versions.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING

import numpy as np
import torch

from pysupcon.data.samples import Source, samples_from_images

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

TYPEFACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold", "STIXGeneral",
    "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10",
)  # fmt: skip
IMAGES_PER_CLASS = 20
SIDE = 28
_SCALE = 3  # a glyph is drawn larger and averaged, so that its edges are smooth
_SIZES = tuple(range(18, 25))  # of the font, in pixels of the image
_SHIFT, _ROTATION = 2.0, 8.0  # largest, in pixels and degrees
_CONTRAST, _NOISE = (0.6, 1.0), (2.0, 15.0)  # of 1 and of 255


@lru_cache(maxsize=1)  # drawing takes seconds, and evaluation reads the images after training
def glyphs() -> Source:
    """26 letters x 10 typefaces x 20 images: uint8 [5200, 1, 28, 28].

    Every image has a random size, place, rotation and contrast, and noise of its own; the seed is fixed.
    """
    import matplotlib
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    generator = np.random.default_rng(0)
    names = [f"{letter}, {typeface}" for letter in ascii_uppercase for typeface in TYPEFACES]
    layout = ImageFont.Layout.BASIC  # the other one depends on a library that may be missing
    fonts = {
        typeface: [
            ImageFont.truetype(str(folder / f"{typeface}.ttf"), size * _SCALE, layout_engine=layout)
            for size in _SIZES
        ]
        for typeface in TYPEFACES
    }
    images = [
        _draw(letter, fonts[typeface][generator.integers(len(_SIZES))], generator)
        for letter in ascii_uppercase
        for typeface in TYPEFACES
        for _ in range(IMAGES_PER_CLASS)
    ]
    pixels = torch.from_numpy(np.stack(images)).unsqueeze(1)
    fine = torch.arange(len(names)).repeat_interleave(IMAGES_PER_CLASS)
    letters = {
        letter: [name for name in names if name.startswith(f"{letter}, ")] for letter in ascii_uppercase
    }
    mean, std = pixels.double().mean().item() / 255, pixels.double().std().item() / 255
    samples = samples_from_images(pixels, fine, names, letters)
    # Family "digits": a mirrored letter is another shape, so the images are never flipped.
    return Source(samples, None, names, list(letters), "digits", 1, SIDE, (mean,), (std,))


def _draw(letter: str, font: FreeTypeFont, generator: np.random.Generator) -> np.ndarray:
    from PIL import Image, ImageDraw

    side = SIDE * _SCALE
    image = Image.new("L", (side, side))
    left, top, right, bottom = font.getbbox(letter)
    x, y = side / 2 + generator.uniform(-_SHIFT, _SHIFT, 2) * _SCALE
    ImageDraw.Draw(image).text((x - (left + right) / 2, y - (top + bottom) / 2), letter, 255, font)
    angle = generator.uniform(-_ROTATION, _ROTATION)
    image = image.rotate(angle, Image.Resampling.BILINEAR, center=(x, y))
    image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(image, dtype=np.float64) * generator.uniform(*_CONTRAST)
    pixels += generator.normal(0, generator.uniform(*_NOISE), pixels.shape)
    return pixels.round().clip(0, 255).astype(np.uint8)
