"""Choose which values of a set's mask files are lesion: one rule for all, never file by file.

- Palettes count by their indices where these are labels, and else by their gray values.
- Alpha counts where the colors mark nothing.
- All above zero is lesion where a mask has one value above it, or is a label map. Masks of many
  values, such as remains of JPEG, are cut at half of the highest value.

`mask_questions` says what users are told or asked of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.image_file import TRANSPARENCY_IGNORED
from amlp_ray.data.decoders.mask_file import MaskFile
from amlp_ray.data.decoders.mask_values import MaskValues, Plane, PlaneValues
from amlp_ray.data.decoders.masks import select_lesion
from amlp_ray.errors import DataError

MAX_LABEL = 31  # whole values up to here are labels; the next ones may be grays
# The highest values that a number format stands for. What reaches three quarters of one is on it.
FULL_SCALES = (1, 255, 65535)
BRIGHT = 0.75
WHITE = 255


class MaskRule(NamedTuple):
    """How all masks of a set are read; plain, as it travels to workers."""

    palettes: Literal["colors", "indices"] = "colors"
    reads_alpha: bool = False  # also of masks whose alpha is the same everywhere
    threshold: float = 0.0  # of masks that have many values


class Reading(NamedTuple):
    """How one mask is read."""

    plane: Plane
    threshold: float  # what lies above is lesion; not used with lesion_labels


def choose_rule(masks: Sequence[MaskValues], config: PrepareConfig) -> MaskRule:
    """Choose the rule for the masks of a set, in any order. Nothing is asked here."""
    reads_alpha = any(
        mask.alpha_use == "only" and mask.alpha is not None and mask.alpha.num_values > 1
        for mask in masks
    )
    rule = MaskRule(_choose_palettes(masks, config), reads_alpha)
    planes = [(mask, chosen_values(mask, rule, config)) for mask in masks]
    if not any(has_many_values(mask, values) for mask, values in planes):
        return rule
    scale = full_scale(values for mask, values in planes if not mask.is_one_bit)
    return rule._replace(threshold=float(scale // 2) if scale > 1 else scale / 2)


def read_mask_as(mask: MaskValues, rule: MaskRule, config: PrepareConfig) -> Reading:
    """Say how one mask is read under the rule of its set."""
    plane = _choose_plane(mask, rule, config)
    values = chosen_values(mask, rule, config)
    if config.lesion_threshold is not None:
        threshold = config.lesion_threshold
    elif values.is_exact or is_label_map(mask, values):
        threshold = 0.0
    else:
        threshold = rule.threshold
    return Reading(plane, threshold)


def find_lesion(
    file: MaskFile, rule: MaskRule, config: PrepareConfig
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the lesion of a mask file (H, W), uint8 of 0 and 1, and notes.

    Raises:
        DataError: the values of this file cannot be what `config` says of them.
    """
    values = file.values
    reading = read_mask_as(values, rule, config)
    notes = list(file.notes)
    if values.alpha is not None and values.alpha.lowest < WHITE and reading.plane != "alpha":
        if values.alpha_use == "conflict" and not config.lesion_labels:
            raise DataError(
                f"{values.path} is a mask whose colors and transparency mark different pixels; "
                "export it without transparency, or give lesion_labels, which are colors."
            )
        notes.append(TRANSPARENCY_IGNORED)
    plane = file.planes[reading.plane]
    if not config.lesion_labels:
        if values.is_one_bit:
            plane = plane * np.uint8(WHITE)
        return (plane > reading.threshold).astype(np.uint8), tuple(notes)
    _check_labels(values, reading.plane, config.lesion_labels)
    if values.lossy_kind:
        return (plane > WHITE // 2).astype(np.uint8), tuple(notes)
    # What is set in a 1-bit mask is 1 in arrays and 255 in viewers, and BUSI mixes such masks with
    # 8-bit ones.
    if values.is_one_bit and WHITE in config.lesion_labels and 1 not in config.lesion_labels:
        plane = plane * np.uint8(WHITE)
    lesion, label_notes = select_lesion(plane, config.lesion_labels)
    return lesion, (*notes, *label_notes)


def chosen_values(mask: MaskValues, rule: MaskRule, config: PrepareConfig) -> PlaneValues:
    """Return the values of the plane that is read."""
    plane = _choose_plane(mask, rule, config)
    if plane == "alpha" and mask.alpha is not None:
        return mask.alpha
    if plane == "indices" and mask.indices is not None:
        return mask.indices
    return mask.colors


def is_label_map(mask: MaskValues, values: PlaneValues) -> bool:
    """Return whether all values of a plane can be labels."""
    if values is mask.indices:
        return True
    is_small = values.is_whole and values.lowest >= 0 and values.highest <= MAX_LABEL
    return is_small and not (mask.lossy_kind and values.num_values > 2)


def has_many_values(mask: MaskValues, values: PlaneValues) -> bool:
    """Return whether a plane has more than two values, or no zero, and is no label map."""
    return not (values.is_exact or values.num_values == 1 or is_label_map(mask, values))


def full_scale(planes: Iterable[PlaneValues]) -> float:
    """Return the highest value that planes can hold, judged by the highest that they do.

    >>> [full_scale([PlaneValues((), 9, 0, highest, 0, True)]) for highest in (253, 65535, 76)]
    [255.0, 65535.0, 76.0]
    """
    highest = max((values.highest for values in planes), default=0.0)
    for scale in FULL_SCALES:
        if BRIGHT * scale <= highest <= scale:
            return float(scale)
    return highest


def palette_colors(masks: Iterable[MaskValues]) -> dict[int, int] | None:
    """Return the color of each used index; None if the palettes of a set contradict each other."""
    colors: dict[int, int] = {}
    for mask in masks:
        for index, color in mask.palette:
            if colors.setdefault(index, color) != color:
                return None
    return colors


def is_gray_color(color: int) -> bool:
    """Return whether the channels of 0xRRGGBB are equal."""
    return color == (color & 0xFF) * 0x010101


def _choose_palettes(
    masks: Sequence[MaskValues], config: PrepareConfig
) -> Literal["colors", "indices"]:
    """Choose whether palettes count by indices or colors, from all palettes of a set."""
    palettes = [mask for mask in masks if mask.palette]
    used: set[tuple[int, int]] = set()
    for mask in palettes:
        used.update(mask.palette)
    labels = set(config.lesion_labels)
    is_gray = all(is_gray_color(color) for _, color in used)
    if not is_gray and labels:
        return "indices"
    if not is_gray:
        colors = palette_colors(palettes)
        has_background = colors is not None and 0 in colors
        return "indices" if has_background and config.lesion_threshold is None else "colors"
    in_colors = bool(labels & {color & 0xFF for _, color in used})
    in_indices = bool(labels & {index for index, _ in used})
    if labels and in_colors != in_indices:
        return "colors" if in_colors else "indices"
    # Unused entries in color, such as those of PASCAL VOC, tell of labels.
    is_ramp = all(mask.has_gray_palette for mask in palettes)
    return "indices" if labels and not is_ramp else "colors"


def _choose_plane(mask: MaskValues, rule: MaskRule, config: PrepareConfig) -> Plane:
    if mask.palette and config.lesion_labels:
        return rule.palettes
    is_flat = mask.colors.num_values == 1
    if mask.alpha_use == "only" or (mask.alpha is not None and rule.reads_alpha and is_flat):
        return "alpha"
    return rule.palettes if mask.palette else "colors"


def _check_labels(values: MaskValues, plane: Plane, lesion_labels: tuple[int, ...]) -> None:
    """Raise DataError if lesion_labels cannot name values of this file."""
    if values.lossy_kind and lesion_labels != (WHITE,):
        raise DataError(
            f"{values.path} is {values.lossy_kind}, which blurs label values, so lesion_labels "
            f"{', '.join(map(str, lesion_labels))} cannot be told apart; export the mask as PNG."
        )
    if values.is_colored and not values.lossy_kind and plane == "colors":
        raise DataError(
            f"{values.path} is a mask in colors, but lesion_labels need one value a pixel; "
            "export it as gray or with a palette."
        )
