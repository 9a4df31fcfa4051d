"""An image folder for measurements: JPEG files of different sizes, the same on every machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIDES = (96, 256)
"""Range of the sides, in pixels"""
CLASSES = 4


def write_images(folder: Path, count: int) -> None:
    """Write FOLDER/classK/*.jpg: noise whose amplitude falls with the frequency, as in photographs."""
    generator = np.random.default_rng(0)
    for number in range(count):
        width, height = (int(side) for side in generator.integers(*SIDES, size=2, endpoint=True))
        pixels = np.full((height, width, 3), 128.0)
        for octave in range(7):
            cells = generator.normal(0, 40 / 1.35**octave, (2 ** (octave + 1), 2 ** (octave + 1), 3))
            for channel in range(3):
                layer = Image.fromarray(cells[:, :, channel].astype(np.float32))
                pixels[:, :, channel] += np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
        place = folder / f"class{number % CLASSES}" / f"{number:04}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place, quality=90)
