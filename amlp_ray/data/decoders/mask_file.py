"""Decode the file of a mask to its planes, and sum up their values."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from amlp_ray.data.decoders.frame import ReadFile
from amlp_ray.data.decoders.image_file import DecodedImage, decode_image_file
from amlp_ray.data.decoders.mask_values import AlphaUse, MaskValues, Plane, plane_values
from amlp_ray.errors import DataError

MAX_COLORS = 8  # that are counted


class MaskFile(NamedTuple):
    """A decoded mask."""

    values: MaskValues
    planes: dict[Plane, np.ndarray]  # each (H, W)
    notes: tuple[str, ...]  # repairs, as sentences without the file's name


def decode_mask_file(path: str, shape: tuple[int, int], read: ReadFile) -> MaskFile:
    """Read and decode the mask of an image of `shape`.

    Raises:
        DataError: the file cannot be read, or has another size than its image.
    """
    decoded = decode_image_file(path, read, is_mask=True)
    pixels = decoded.pixels
    if pixels.shape[:2] != shape:
        raise DataError(
            f"{path} is a mask of {pixels.shape[1]}x{pixels.shape[0]} pixels, but its image has "
            f"{shape[1]}x{shape[0]}; both must have the same size, so export the mask again."
        )
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise DataError(
            f"{path} is a mask with NaN or infinite values, but labels are numbers; "
            "export it again."
        )
    colors = pixels.max(axis=2)
    is_colored = decoded.indices is None and not (pixels == pixels[:, :, :1]).all()
    values = MaskValues(
        path=path,
        colors=plane_values(colors),
        num_colors=_count_colors(pixels) if is_colored else 0,
        is_colored=is_colored,
        lossy_kind=decoded.lossy_kind,
        is_one_bit=decoded.is_one_bit,
    )
    planes: dict[Plane, np.ndarray] = {"colors": colors}
    if decoded.indices is not None:
        planes["indices"] = decoded.indices
        values = values._replace(
            palette=_used_palette(decoded.indices, pixels),
            has_gray_palette=decoded.has_gray_palette,
            indices=plane_values(decoded.indices),
        )
    if decoded.alpha is not None:
        planes["alpha"] = decoded.alpha
        values = values._replace(
            alpha=plane_values(decoded.alpha), alpha_use=_alpha_use(colors, decoded)
        )
    return MaskFile(values, planes, decoded.notes)


def _alpha_use(colors: np.ndarray, decoded: DecodedImage) -> AlphaUse:
    """Say whether alpha marks what the colors do not."""
    if decoded.alpha is None or decoded.alpha.min() > 0:
        return "unused"
    is_visible = decoded.alpha > 0
    is_colored = colors > 0
    if not is_visible.any():
        # An empty drawing on white, or an alpha that was never filled in.
        return "only" if colors.min() == colors.max() else "unused"
    if is_colored.all() or not is_colored.any():
        return "only"
    # Outside of what is visible, black is background: masks that were turned have such corners.
    if not (is_colored & ~is_visible).any():
        return "unused"
    if decoded.indices is not None and np.array_equal(decoded.indices > 0, is_visible):
        return "unused"
    return "conflict"


def _count_colors(pixels: np.ndarray) -> int:
    """Count the colors of pixels (H, W, C), up to MAX_COLORS."""
    rest = pixels.reshape(-1, pixels.shape[2])
    count = 0
    while len(rest) and count < MAX_COLORS:
        rest = rest[(rest != rest[0]).any(axis=1)]
        count += 1
    return count


def _used_palette(indices: np.ndarray, pixels: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Return the used indices (H, W), each with its color from the pixels (H, W, 3)."""
    used, first = np.unique(indices, return_index=True)
    red, green, blue = pixels.reshape(-1, 3)[first].astype(int).T
    colors = red << 16 | green << 8 | blue
    return tuple(zip(used.tolist(), colors.tolist(), strict=True))
