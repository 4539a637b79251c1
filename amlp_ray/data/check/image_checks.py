"""Check the images themselves: contents, brightness, sizes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from amlp_ray.data.check.burned_in_text import MIN_LETTERS, MIN_SIDE
from amlp_ray.data.check.finding import Finding
from amlp_ray.data.dataset import PatchDataset

MIN_SD = 0.05  # of the median SD of all images
MAX_BACKGROUND = 0.9
MAX_SATURATED = 0.05  # of an image's values
# Robust standard deviations, see `robust_z`; a normal distribution has one in a billion beyond.
MAX_Z = 6.0
# Factors from the median; a size is unusual if it exceeds both one of these and `MAX_Z`.
MAX_ASPECT = 1.5
MAX_AREA = 4.0
MAX_ENLARGEMENT = 1.25  # stored over original side, the geometric mean of both sides
MAX_SPACING = 1.25  # factor from the median

NOT_FINITE = Finding(
    "not-finite",
    "Values that are no numbers",
    "warning",
    "Images hold NaN or infinite values, which turn a loss into NaN.",
    "Replace them in the source, and prepare again.",
)
CONSTANT = Finding(
    "constant",
    "Constant or nearly constant images",
    "warning",
    f"Images vary less than {MIN_SD:.0%} of what is usual here: blank frames, lost files, covered "
    "lenses.",
    "Leave them out of the source.",
)
BACKGROUND = Finding(
    "background",
    "Mostly background",
    "note",
    f"More than {MAX_BACKGROUND:.0%} of the image is air, black border or padding, which teaches "
    "nothing.",
    "Crop the images, or raise min_foreground where tiles or slices are prepared.",
)
TEXT = Finding(
    "burned-in-text",
    "Burned-in text",
    "warning",
    f"Images seem to carry letters ({MIN_LETTERS} or more in a line). Burned-in text can name a "
    "patient, and a model can read off it what it should see in the tissue. A guess: about half of "
    "the images with text are found.",
    "Look at the examples. Names and dates must go before anyone else gets the data; crop or blank "
    "the text.",
)
BRIGHTNESS = Finding(
    "brightness",
    "Unusual brightness or contrast",
    "note",
    f"Mean or spread of the values lies more than {MAX_Z:g} robust standard deviations from the "
    "other images: another device, another unit, a broken file.",
    "Look at the examples; prepare other devices as their own dataset, or with values=percentile.",
)
SATURATED = Finding(
    "saturated",
    "Saturated images",
    "note",
    f"More than {MAX_SATURATED:.0%} of the values equal the image's largest: detail there is lost.",
    "Look for a narrow window (values=window) or an overexposed source.",
)
ODD_SIZES = Finding(
    "odd-sizes",
    "Unusual sizes",
    "note",
    f"The original's aspect differs from the median by a factor above {MAX_ASPECT:g}, or its area "
    f"by one above {MAX_AREA:g}, and by more than {MAX_Z:g} robust standard deviations: "
    "screenshots, crops, another device.",
    "Look at the examples; fit=pad keeps the aspect.",
)
ENLARGED = Finding(
    "enlarged",
    "Enlarged images",
    "note",
    "The original has fewer pixels than are stored, by a factor above "
    f"{MAX_ENLARGEMENT:g} a side: detail is made up.",
    "Prepare with a smaller size, unless few images are concerned.",
)
MIXED_SPACING = Finding(
    "mixed-spacing",
    "Mixed pixel spacing",
    "note",
    f"A stored pixel is more than {MAX_SPACING:g} times larger or smaller than the median one: a "
    "lesion of one size has several in pixels.",
    "Resample to one spacing before preparing, or keep devices apart.",
)


def findings(table: pd.DataFrame, dataset: PatchDataset) -> Iterator[Finding]:
    """Yield the findings about images in a table of `measure_dataset`."""
    sd = table["sd"].to_numpy(float)
    median_sd = float(np.median(sd)) if len(sd) else 0.0
    is_flat = (table["high"] == table["low"]).to_numpy()
    is_constant = is_flat | (sd < MIN_SD * median_sd)
    bad = table["bad"].to_numpy()
    yield NOT_FINITE.with_rows(
        table, bad > 0, badness=bad, describe=lambda row: f"{row.bad} values"
    )
    yield CONSTANT.with_rows(
        table,
        is_constant,
        badness=-sd,
        describe=lambda row: f"SD {row.sd:.3g}, usual {median_sd:.3g}",
    )
    background = table["background"].to_numpy(float)
    yield BACKGROUND.with_rows(
        table,
        (background > MAX_BACKGROUND) & ~is_constant,
        badness=background,
        describe=lambda row: f"{row.background:.1%} background",
    )
    yield _text(table)
    z_mean = np.abs(robust_z(table["mean"].to_numpy(float)))
    z = np.maximum(z_mean, np.abs(robust_z(sd)))
    yield BRIGHTNESS.with_rows(
        table,
        (z > MAX_Z) & ~is_constant,
        badness=z,
        describe=lambda row: f"mean {row.mean:.4g}, SD {row.sd:.4g}",
    )
    saturated = table["top"].to_numpy(float)
    yield SATURATED.with_rows(
        table,
        (saturated > MAX_SATURATED) & ~is_constant,
        badness=saturated,
        describe=lambda row: f"{row.top:.1%} at the maximum",
    )
    yield _odd_sizes(table)
    yield _enlarged(table, dataset)
    yield _mixed_spacing(table)


def robust_z(values: np.ndarray) -> np.ndarray:
    """Return the distance of each value from the median in standard deviations: (N,).

    The standard deviation comes from the median absolute deviation. It counts as at least 1 % of
    the median's size, so that small differences of equal images are none.
    """
    if not len(values):
        return values
    center = float(np.median(values))
    deviation = 1.4826 * float(np.median(np.abs(values - center)))
    return np.asarray((values - center) / max(deviation, 0.01 * abs(center), 1e-12))


def _text(table: pd.DataFrame) -> Finding:
    letters = table["text"].to_numpy(float)
    if np.isnan(letters).any():
        return TEXT.with_gap(
            f"letters are too small in images of less than {MIN_SIDE} pixels a side"
        )
    return TEXT.with_rows(
        table, letters > 0, badness=letters, describe=lambda row: f"{int(row.text)} letters"
    )


def _odd_sizes(table: pd.DataFrame) -> Finding:
    height = table["height"].to_numpy(float)
    width = table["width"].to_numpy(float)
    log_aspect = np.log(width / height)
    log_area = np.log(width * height)
    aspect_distance = _distance_if_odd(log_aspect, robust_z(np.exp(log_aspect)), MAX_ASPECT)
    area_distance = _distance_if_odd(log_area, robust_z(log_area), MAX_AREA)
    distance = np.maximum(aspect_distance, area_distance)
    return ODD_SIZES.with_rows(table, distance > 0, badness=distance, describe=_size)


def _distance_if_odd(log_values: np.ndarray, z: np.ndarray, factor: float) -> np.ndarray:
    """Return the distance of each value from the median if it exceeds both limits, else 0."""
    if not len(log_values):
        return log_values
    distance = np.abs(log_values - np.median(log_values))
    is_odd = (distance > np.log(factor)) & (np.abs(z) > MAX_Z)
    return np.where(is_odd, distance, 0)


def _enlarged(table: pd.DataFrame, dataset: PatchDataset) -> Finding:
    manifest = dataset.manifest
    if manifest.config.fit == "tiles":
        return ENLARGED.with_gap("tiles are never enlarged")
    height = table["height"].to_numpy(float)
    width = table["width"].to_numpy(float)
    if manifest.config.fit == "pad":
        factor = max(manifest.height, manifest.width) / np.maximum(height, width)
    else:
        factor = np.sqrt(manifest.height * manifest.width / (height * width))
    return ENLARGED.with_rows(table, factor > MAX_ENLARGEMENT, badness=factor, describe=_size)


def _mixed_spacing(table: pd.DataFrame) -> Finding:
    spacing = np.sqrt(table["spacing_y"].to_numpy(float) * table["spacing_x"].to_numpy(float))
    is_known = np.isfinite(spacing) & (spacing > 0)
    if not is_known.any():
        return MIXED_SPACING.with_gap("no spacing is known")
    distance = np.zeros(len(table))
    distance[is_known] = np.abs(np.log(spacing[is_known] / np.median(spacing[is_known])))
    return MIXED_SPACING.with_rows(
        table,
        distance > np.log(MAX_SPACING),
        badness=distance,
        of=int(is_known.sum()),
        describe=lambda row: f"{row.spacing_y:.3g} x {row.spacing_x:.3g} mm",
    )


def _size(row: pd.Series) -> str:
    return f"{row.width} x {row.height}"
