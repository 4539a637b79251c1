"""Findings about the images themselves: contents, brightness, sizes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from amlp_ray.data.check.burned_in_text import IN_A_LINE, LEAST_SIDE
from amlp_ray.data.check.finding import Finding, counted, found
from amlp_ray.data.dataset import PatchDataset

NEARLY = 0.05  # of the median SD of all images
AIRY = 0.9  # background
SATURATED = 0.05  # of an image's values
FAR = 6.0  # robust standard deviations, see `robust_z`; a normal distribution has one in a billion beyond
ASPECT, AREA = 1.5, 4.0  # factors from the median; both these and `FAR` must be passed
ENLARGED = 1.25  # stored over original side, the geometric mean of both sides
SPACING = 1.25  # factor from the median

NOT_FINITE = Finding(
    "not-finite", "Values that are no numbers", "warning",
    "Images hold NaN or infinite values, which turn a loss into NaN.",
    "Replace them in the source, and prepare again.",
)  # fmt: skip
CONSTANT = Finding(
    "constant", "Constant or nearly constant images", "warning",
    f"Images vary less than {NEARLY:.0%} of what is usual here: blank frames, lost files, covered lenses.",
    "Leave them out of the source.",
)  # fmt: skip
BACKGROUND = Finding(
    "background", "Mostly background", "note",
    f"More than {AIRY:.0%} of the image is air, black border or padding, which teaches nothing.",
    "Crop the images, or raise min_foreground where tiles or slices are prepared.",
)  # fmt: skip
TEXT = Finding(
    "burnt-in-text", "Letters in the pixels", "warning",
    f"Images seem to carry letters ({IN_A_LINE} or more in a line). Burnt-in text can name a patient, and a model can "
    "read off it what it should see in the tissue. A guess: about half of the images with text are found.",
    "Look at the examples. Names and dates must go before anyone else gets the data; crop or blank the text.",
)  # fmt: skip
BRIGHTNESS = Finding(
    "brightness", "Unusual brightness or contrast", "note",
    f"Mean or spread of the values lies more than {FAR:g} robust standard deviations from the other images: another "
    "device, another unit, a broken file.",
    "Look at the examples; prepare other devices as their own dataset, or with values=percentile.",
)  # fmt: skip
OVEREXPOSED = Finding(
    "saturated", "Saturated images", "note",
    f"More than {SATURATED:.0%} of the values equal the image's largest: detail there is lost.",
    "Look for a narrow window (values=window) or an overexposed source.",
)  # fmt: skip
ODD = Finding(
    "odd-sizes", "Unusual sizes", "note",
    f"The original's aspect differs from the median by a factor above {ASPECT:g}, or its area by one above {AREA:g}, "
    f"and by more than {FAR:g} robust standard deviations: screenshots, crops, another device.",
    "Look at the examples; fit=pad keeps the aspect.",
)  # fmt: skip
UPSCALED = Finding(
    "enlarged", "Enlarged images", "note",
    f"The original has fewer pixels than are stored, by a factor above {ENLARGED:g} a side: detail is made up.",
    "Prepare with a smaller size, unless few images are concerned.",
)  # fmt: skip
SPACINGS = Finding(
    "mixed-spacing", "Mixed pixel spacing", "note",
    f"A stored pixel is more than {SPACING:g} times larger or smaller than the median one: a lesion of one size has "
    "several in pixels.",
    "Resample to one spacing before preparing, or keep devices apart.",
)  # fmt: skip


def findings(table: pd.DataFrame, dataset: PatchDataset) -> Iterator[Finding]:
    """Yield what is found about the images in a table of `measured`."""
    sd, mean = table["sd"].to_numpy(float), table["mean"].to_numpy(float)
    usual = float(np.median(sd)) if len(sd) else 0.0
    constant = (table["high"] == table["low"]).to_numpy() | (sd < NEARLY * usual)
    bad = table["bad"].to_numpy()
    yield found(NOT_FINITE, table, bad > 0, badness=bad, value=lambda row: f"{row.bad} values")
    yield found(
        CONSTANT,
        table,
        constant,
        badness=-sd,
        value=lambda row: f"SD {row.sd:.3g}, usual {usual:.3g}",
    )
    background = table["background"].to_numpy(float)
    yield found(
        BACKGROUND, table, (background > AIRY) & ~constant, badness=background,
        value=lambda row: f"{row.background:.1%} background",
    )  # fmt: skip
    text = table["text"].to_numpy(float)
    if np.isnan(text).any():
        yield counted(
            TEXT,
            0,
            0,
            gap=f"letters are too small in images of less than {LEAST_SIDE} pixels a side",
        )
    else:
        yield found(
            TEXT, table, text > 0, badness=text, value=lambda row: f"{int(row.text)} letters"
        )
    far = np.maximum(np.abs(robust_z(mean)), np.abs(robust_z(sd)))
    yield found(
        BRIGHTNESS,
        table,
        (far > FAR) & ~constant,
        badness=far,
        value=lambda row: f"mean {row.mean:.4g}, SD {row.sd:.4g}",
    )
    top = table["top"].to_numpy(float)
    yield found(
        OVEREXPOSED,
        table,
        (top > SATURATED) & ~constant,
        badness=top,
        value=lambda row: f"{row.top:.1%} at the maximum",
    )
    yield from _sizes(table, dataset)


def robust_z(values: np.ndarray) -> np.ndarray:
    """Distance from the median in standard deviations, taken from the median absolute deviation (N,).

    The deviation counts as at least 1 % of the median's size, so that small differences of equal images are none.
    """
    if not len(values):
        return values
    center = np.median(values)
    spread = max(
        1.4826 * float(np.median(np.abs(values - center))), 0.01 * abs(float(center)), 1e-12
    )
    return np.asarray((values - center) / spread)


def _sizes(table: pd.DataFrame, dataset: PatchDataset) -> Iterator[Finding]:
    size = lambda row: f"{row.width} x {row.height}"  # noqa: E731
    height, width = table["height"].to_numpy(float), table["width"].to_numpy(float)
    far = np.zeros(len(table))
    for values, factor in ((np.log(width / height), ASPECT), (np.log(width * height), AREA)):
        away = np.abs(values - np.median(values)) if len(values) else values
        z = np.abs(robust_z(np.exp(values) if factor == ASPECT else values))
        far = np.maximum(far, np.where((away > np.log(factor)) & (z > FAR), away, 0))
    yield found(ODD, table, far > 0, badness=far, value=size)
    m = dataset.manifest
    if m.config.fit == "tiles":
        yield counted(UPSCALED, 0, 0, gap="tiles are never enlarged")
    elif m.config.fit == "pad":
        larger = max(m.height, m.width) / np.maximum(height, width)
        yield found(UPSCALED, table, larger > ENLARGED, badness=larger, value=size)
    else:
        larger = np.sqrt(m.height * m.width / (height * width))
        yield found(UPSCALED, table, larger > ENLARGED, badness=larger, value=size)
    yield _spacing(table)


def _spacing(table: pd.DataFrame) -> Finding:
    spacing = np.sqrt(table["spacing_y"].to_numpy(float) * table["spacing_x"].to_numpy(float))
    known = np.isfinite(spacing) & (spacing > 0)
    if not known.any():
        return counted(SPACINGS, 0, 0, gap="no spacing is known")
    away = np.zeros(len(table))
    away[known] = np.abs(np.log(spacing[known] / np.median(spacing[known])))
    return found(
        SPACINGS, table, away > np.log(SPACING), badness=away, of=int(known.sum()),
        value=lambda row: f"{row.spacing_y:.3g} x {row.spacing_x:.3g} mm",
    )  # fmt: skip
