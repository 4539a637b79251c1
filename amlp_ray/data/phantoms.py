"""Generate images with lesion masks for demonstrations and tests: ultrasound-, MRI- and PET-like.

They show the modality's own difficulties (speckle and shadows, black borders, hot organs beside hot
lesions), so that code meets them. They are no substitute for real images in any claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from scipy import ndimage

from amlp_ray.errors import ConfigError
from amlp_ray.utils.files import local_path

Kind = Literal["ultrasound", "mri", "pet"]
EMPTY_SHARE = 1 / 6  # of the images has no lesion
LESION_AREA = (0.012, 0.12)  # share of the image, drawn log-uniformly: most lesions are small


def write_phantoms(
    folder: str | Path,
    *,
    kind: Kind = "ultrasound",
    count: int,
    size: int = 128,
    seed: int = 0,
    empty_share: float = EMPTY_SHARE,
) -> Path:
    """Write gray images in the paired layout: images/*.png and masks/*.png.

    Image i depends on kind, size, seed, share and i only, so a larger set begins with the smaller
    one. Images without a lesion have an all-zero mask. Lesions cover 1-15 % of the image.

    Args:
        folder: to write to; made if missing.
        kind: modality to imitate.
        count: number of images.
        size: height and width in pixels.
        seed: of the random numbers.
        empty_share: share of the images that have no lesion, 0 to 1.

    Returns:
        The folder.

    Raises:
        ConfigError: an unknown kind, a count below 1, a size below 32 or a share outside 0 to 1.
    """
    check_phantoms(kind, count, size, empty_share)
    folder = local_path(folder)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        image, mask = draw_phantom(kind, size, rng, lesion=not is_empty(i, empty_share))
        name = f"{kind}_{i:05d}.png"
        Image.fromarray(image).save(folder / "images" / name)
        Image.fromarray(mask * np.uint8(255)).save(folder / "masks" / name)
    return folder


def check_phantoms(kind: str, count: int, size: int, empty_share: float, slices: int = 1) -> None:
    """Raise ConfigError if a kind is unknown or a number is out of range."""
    if kind not in DRAW:
        raise ConfigError(f"There are no phantoms of kind {kind!r}; known are {', '.join(DRAW)}.")
    if count < 1 or size < 32:
        raise ConfigError(
            "Phantoms need a count of at least 1 and a size of at least 32, "
            f"not {count} and {size}."
        )
    if slices < 1:
        raise ConfigError(f"A patient needs at least 1 slice, not {slices}.")
    if not 0 <= empty_share <= 1:
        raise ConfigError(
            f"The share of phantoms without a lesion must be from 0 to 1, not {empty_share}."
        )


def is_empty(i: int, share: float) -> bool:
    """Return whether image i has no lesion; those that have none are evenly spaced.

    >>> [i for i in range(20) if is_empty(i, 0.3)]
    [0, 4, 7, 10, 14, 17]
    """
    exact = Fraction(share).limit_denominator(1000)
    return math.ceil((i + 1) * exact) > math.ceil(i * exact)


def draw_phantom(
    kind: Kind, size: int, rng: np.random.Generator, *, lesion: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image.

    Returns:
        Image (size, size) uint8 and mask (size, size) uint8 of 0 and 1.
    """
    brightness, mask = DRAW[kind](size, rng, lesion)
    return (brightness.clip(0, 1) * 255).round().astype(np.uint8), mask.astype(np.uint8)


def _ultrasound(size: int, rng: np.random.Generator, lesion: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draw what a linear probe shows.

    Wavy layers of tissue lie under speckle, darker with depth, with a dark lesion in the middle
    layers.
    """
    y, x = _grid(size)
    echo = _tissue_layers(y, x, rng)
    echo = ndimage.gaussian_filter(echo, size * 0.005)
    echo += 3.0 * _blotches(size, rng, 0.05)  # lobules
    # Bright fibrous strands lie flat.
    echo += 7.0 * np.clip(_blotches(size, rng, (0.008, 0.06)) - 1.3, 0, 2)
    echo -= rng.uniform(8, 18) * y  # attenuation left after time-gain compensation

    mask = np.zeros((size, size), bool)
    if lesion:
        mask = _lesion_mask(
            size, rng, x_range=(0.28, 0.72), y_range=(0.33, 0.58), flatness=(0.55, 0.95)
        )
        inside = rng.uniform(-32, -22) + 1.5 * _blotches(size, rng, 0.03)
        soft = ndimage.gaussian_filter(mask.astype(float), size * rng.uniform(0.004, 0.014))
        echo = echo * (1 - soft) + np.minimum(inside, echo - 7) * soft
        # Sound is weakened less in fluid (bright band below) and more in dense tissue (shadow).
        below = np.maximum.accumulate(mask, axis=0) & ~mask
        band = ndimage.gaussian_filter(below.astype(float), (size * 0.02, size * 0.025))
        behind = rng.choice([rng.uniform(5, 10), 0.0, rng.uniform(-9, -4)], p=[0.5, 0.3, 0.2])
        echo += behind * band * ~mask * np.exp(-1.5 * np.maximum(y - 0.5, 0))

    decibel = echo + 10 * np.log10(_speckle(size, rng) + 1e-3)
    decibel = ndimage.gaussian_filter(decibel, 0.4)
    dynamic_range = 46.0
    return 1 + (decibel - 2) / dynamic_range, mask


def _tissue_layers(y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw layers from skin to chest wall, in dB below the brightest reflector."""
    echo = np.full(y.shape, -6.0)
    tops = (0.0, 0.06, rng.uniform(0.18, 0.3), rng.uniform(0.62, 0.75), rng.uniform(0.85, 0.92))
    levels = (-3.0, rng.uniform(-18, -14), rng.uniform(-10, -6), rng.uniform(-18, -13), -24.0)
    for top, level in zip(tops, levels, strict=True):
        echo[y > top + 0.03 * _waves(x, rng) * (top > 0.1)] = level
    return echo


def _speckle(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the power of fully developed speckle, of mean 1.

    It is the envelope of complex noise seen through a pulse, short in depth and wide across. Three
    images are compounded, as scanners do, which fills the nulls of a single one.
    """
    noise = rng.standard_normal((3, 2, size, size))
    pulse = (0, 0, size * 0.005 + 0.15, size * 0.01 + 0.3)
    power = (ndimage.gaussian_filter(noise, pulse) ** 2).sum(axis=(0, 1))
    return power / power.mean()


def _mri(size: int, rng: np.random.Generator, lesion: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draw an axial FLAIR-like head.

    It has a black border, bright scalp, dark skull and ventricles, and a bright lesion.
    """
    y, x = _grid(size)
    cy, cx = 0.5 + rng.uniform(-0.02, 0.02, 2)
    ry = rng.uniform(0.42, 0.46)
    rx = rng.uniform(0.33, 0.37)
    radius = np.hypot((y - cy) / ry, (x - cx) / rx) + 0.012 * _blotches(size, rng, 0.08)
    brain = radius < 0.84
    folds = np.abs(_blotches(size, rng, 0.022)) < 0.45
    cortex = brain & (radius > 0.62 + 0.1 * _blotches(size, rng, 0.05))
    image = np.zeros((size, size))
    image[radius < 1] = rng.uniform(0.55, 0.75)  # scalp fat
    image[radius < 0.93] = 0.08  # skull
    image[brain] = rng.uniform(0.36, 0.42)  # white matter
    image[cortex] = rng.uniform(0.48, 0.56)
    image[cortex & folds & (radius > 0.7)] = 0.22  # fluid in the folds
    image[brain & (np.abs(x - cx) < 0.006) & (np.abs(y - cy) > 0.12)] = 0.2  # midline
    for side in (-1, 1):  # ventricles, curved outward at both ends
        offset = x - cx - side * (0.035 + 0.9 * (y - cy) ** 2)
        across = offset / rng.uniform(0.022, 0.04)
        image[np.hypot(across, (y - cy) / rng.uniform(0.12, 0.17)) < 1] = 0.08

    mask = np.zeros((size, size), bool)
    if lesion:
        mask = _lesion_mask(
            size, rng, x_range=(0.35, 0.65), y_range=(0.3, 0.7), flatness=(0.6, 1.0), inside=brain
        )
        soft = ndimage.gaussian_filter(mask.astype(float), size * 0.008)
        bright = rng.uniform(0.72, 0.88) + 0.05 * _blotches(size, rng, 0.02)
        image = image * (1 - soft) + bright * soft

    image = ndimage.gaussian_filter(image, size * 0.004)
    image *= 1 + 0.1 * _blotches(size, rng, 0.3)  # coil sensitivity
    real, imaginary = rng.normal(0, rng.uniform(0.012, 0.025), (2, size, size))
    image = np.hypot(image + real, imaginary)  # Rician
    image[radius > 1.08] *= 0.15  # scanners blank the air, not quite
    return image, mask


def _pet(size: int, rng: np.random.Generator, lesion: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draw an axial FDG-like slice of the trunk.

    It has a faint body, warm organs, cool lungs and a hot lesion, and is blurred and noisy.
    """
    y, x = _grid(size)
    cy, cx = 0.5 + rng.uniform(-0.02, 0.02, 2)
    body = np.hypot((y - cy) / rng.uniform(0.3, 0.36), (x - cx) / rng.uniform(0.42, 0.46)) < 1
    uptake = np.where(body, rng.uniform(0.12, 0.16), 0.0)
    for side in (-1, 1):
        lung = np.hypot((y - cy + 0.02) / 0.2, (x - cx - side * 0.21) / 0.14) < 1
        uptake[lung] = rng.uniform(0.04, 0.06)
    # Heart with its cavity, spine, mediastinum.
    organs = (
        (0.06, 0.1, 0.11, 0.1, 0.3, 0.42),
        (0.24, 0.0, 0.05, 0.05, 0.2, 0.26),
        (-0.08, -0.12, 0.1, 0.1, 0.18, 0.3),
    )
    for dy, dx, ry, rx, low, high in organs:
        radius = np.hypot((y - cy - dy) / ry, (x - cx - dx) / rx)
        uptake[radius < 1] = rng.uniform(low, high)
        if dx == 0.1:
            uptake[radius < 0.5] = 0.16

    mask = np.zeros((size, size), bool)
    if lesion:
        mask = _lesion_mask(
            size, rng, x_range=(0.2, 0.8), y_range=(0.33, 0.65), flatness=(0.7, 1.0), inside=body
        )
        core = ndimage.gaussian_filter(mask.astype(float), size * 0.015)
        uptake = np.maximum(uptake, core * rng.uniform(0.6, 0.95))

    blur = size * rng.uniform(0.012, 0.018)  # 5-7 mm, the resolution of a scanner
    uptake = ndimage.gaussian_filter(uptake, blur)
    counts = rng.poisson(uptake * 60 + 0.4) / 60
    return ndimage.gaussian_filter(counts, size * 0.008) * 1.05, mask


def _lesion_mask(
    size: int,
    rng: np.random.Generator,
    *,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    flatness: tuple[float, float],
    inside: np.ndarray | None = None,
) -> np.ndarray:
    """Draw a lobed ellipse of random area within `inside` (size, size) bool.

    Its center lies in `x_range` and `y_range`, and its height over its width in `flatness`.
    """
    y, x = _grid(size)
    tilt = rng.uniform(-0.4, 0.4)
    flat = rng.uniform(*flatness)
    cy = rng.uniform(*y_range)
    cx = rng.uniform(*x_range)
    across = (x - cx) * np.cos(tilt) + (y - cy) * np.sin(tilt)
    down = ((y - cy) * np.cos(tilt) - (x - cx) * np.sin(tilt)) / flat
    angle = np.arctan2(down, across)
    lobes = np.zeros((size, size))
    for n in range(2, 7):
        lobes += rng.normal(0, 0.22 / n) * np.cos(n * angle + rng.uniform(0, 2 * np.pi))
    distance = np.hypot(across, down) / np.clip(1 + lobes, 0.5, 1.5)
    if inside is not None:
        core = ndimage.binary_erosion(inside, iterations=max(1, size // 50))
        distance = np.where(core, distance, np.inf)
    low, high = LESION_AREA
    area = low * (high / low) ** rng.uniform()
    pixel_count = int(area * size * size)
    return distance <= np.partition(distance, pixel_count, axis=None)[pixel_count]


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pixel centers as (y, x), each (size, size), from 0 at the top left to 1."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    return y, x


def _waves(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a sum of four sine waves across the image."""
    waves = []
    for n in (0.5, 1, 2, 3):
        waves.append(rng.normal(0, 1) * np.sin(2 * np.pi * (n * x + rng.uniform())) / n)
    return np.sum(waves, axis=0)


def _blotches(
    size: int, rng: np.random.Generator, width: float | tuple[float, float]
) -> np.ndarray:
    """Draw smooth noise of mean 0 and SD 1; `width` is a share of the image (down, across)."""
    noise = rng.standard_normal((size, size))
    field = ndimage.gaussian_filter(noise, np.multiply(width, size), mode="reflect")
    return (field - field.mean()) / field.std()


DRAW: dict[str, Callable[[int, np.random.Generator, bool], tuple[np.ndarray, np.ndarray]]] = {
    "ultrasound": _ultrasound,
    "mri": _mri,
    "pet": _pet,
}
