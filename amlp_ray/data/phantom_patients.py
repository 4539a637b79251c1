"""Phantoms of patients: slices of one patient are alike, as those of a volume are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from amlp_ray.data.phantoms import Kind, check_phantoms, draw_phantom
from amlp_ray.utils.files import local_path

FIRST_NOISE = 1_000_000  # seeds of slices follow those of patients
NOISE_SD = 0.02  # of a slice, in brightness from 0 to 1


def write_phantom_patients(
    folder: str | Path,
    *,
    kind: Kind = "mri",
    count: int,
    slices: int,
    size: int = 128,
    seed: int = 0,
    empty_share: float = 0.5,
) -> Path:
    """Write gray slices in the layout lgg: a folder per patient with x.tif and x_mask.tif.

    Patients have from half to one and a half times `slices`. The slices of a patient show one
    anatomy and one lesion, each a little moved, turned and scaled, under noise of its own. So their
    scores are alike, and a set of many slices of few patients shows little.

    Args:
        folder: to write to; made if missing.
        kind: modality to imitate.
        count: number of images in total; the last patient may have fewer.
        slices: mean number of slices of a patient.
        size: height and width in pixels.
        seed: of the random numbers.
        empty_share: mean share of a patient's slices without a lesion; it differs among patients.

    Returns:
        The folder.

    Raises:
        ConfigError: an unknown kind, a count or a number of slices below 1, a size below 32 or a
            share outside 0 to 1.
    """
    check_phantoms(kind, count, size, empty_share, slices)
    folder = local_path(folder)
    written = 0
    patient = 0
    while written < count:
        name = f"PHANTOM_{patient:04d}"
        (folder / name).mkdir(parents=True, exist_ok=True)
        drawn = _draw_slices(kind, size, (seed, patient), slices, empty_share)
        for i, (image, mask) in enumerate(drawn, 1):
            if written == count:
                break
            Image.fromarray(image).save(folder / name / f"{name}_{i}.tif")
            Image.fromarray(mask * np.uint8(255)).save(folder / name / f"{name}_{i}_mask.tif")
            written += 1
        patient += 1
    return folder


def _draw_slices(
    kind: Kind, size: int, seed: tuple[int, int], mean_slices: int, empty_share: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw the slices of a patient from first to last; the lesion is in those in the middle."""
    # The same random numbers give the same anatomy, with a lesion and without.
    with_lesion = draw_phantom(kind, size, np.random.default_rng(seed), lesion=True)
    healthy = draw_phantom(kind, size, np.random.default_rng(seed), lesion=False)
    rng = np.random.default_rng([*seed, FIRST_NOISE])
    number = int(rng.integers((mean_slices + 1) // 2, mean_slices * 3 // 2 + 1))
    # Shares of patients spread around the mean, but none and all stay what they are.
    empty = empty_share ** rng.uniform(0.5, 2)
    positions = np.linspace(-1, 1, number) if number > 1 else np.zeros(1)
    order = np.argsort(np.abs(positions), kind="stable")
    lesion_slices = set(order[: round(number * (1 - empty))].tolist())
    for i, position in enumerate(positions.tolist()):
        image, mask = with_lesion if i in lesion_slices else healthy
        yield _as_slice(image, mask, position, rng)


def _as_slice(
    image: np.ndarray, mask: np.ndarray, position: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Move, turn and scale a picture as its position in the patient, from -1 to 1, asks for."""
    angle = np.deg2rad(4 * position)
    scale = 1 + 0.12 * position**2  # anatomy is smaller toward the ends
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    center = (np.array(image.shape) - 1) / 2
    offset = center - matrix @ center + 0.02 * position * np.array(image.shape)
    moved = ndimage.affine_transform(image.astype(float), matrix, offset, order=1, mode="nearest")
    moved += 255 * NOISE_SD * rng.standard_normal(image.shape)
    moved_mask = ndimage.affine_transform(mask, matrix, offset, order=0)
    return moved.clip(0, 255).round().astype(np.uint8), moved_mask
