"""Settings of predictions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from amlp_ray.config.base import Config
from amlp_ray.config.data import Layout


class PredictConfig(Config):
    """`predict`: masks of new images by a segmenter, in the geometry of their files."""

    layout: Layout = (
        "auto"  # of the new images, whatever the training images had; auto: recognised, and said
    )
    # auto: tiles where the segmenter was trained on tiles, else the whole image in one look, as it was trained. on:
    # tiles in any case, for images that show more than the training images did, at their pixel spacing, such as a
    # slide or a stitched scan; off: the whole image, shrunken, where a lesion is larger than a tile
    tiling: Literal["auto", "off", "on"] = "auto"
    # share of a tile's side that its neighbour repeats; half: every pixel lies near the middle of some tile, where
    # predictions are best, and a Gaussian weighs it most there
    overlap: float = Field(0.5, ge=0, le=0.9)
    scale: float | None = Field(
        None, gt=0, le=1
    )  # shrinks images before tiles are cut; none: as in training
    threshold: float = Field(
        0.5, gt=0, lt=1
    )  # probability above which a pixel is lesion; 0.5 is what scores use
    flip_tta: bool = (
        False  # the mean with the mirrored image's prediction: twice the time, for little
    )
    batch_size: int = Field(
        16, ge=1
    )  # slices of a volume or tiles of an image at once; changes no result
    probability: bool = False  # also written: 16-bit PNG, of which 65535 is 1, or float32 NIfTI
    overlay: bool = False  # also written: the image with the outline of the mask as PNG, to look at

    @field_validator("tiling", mode="before")
    @classmethod
    def _read_switch(cls, given: Any) -> Any:
        """YAML takes on and off for booleans."""
        return {True: "on", False: "off"}.get(given, given) if isinstance(given, bool) else given
