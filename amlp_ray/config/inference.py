"""Settings of predictions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from amlp_ray.config.base import Config, Count
from amlp_ray.config.data import Layout


class PredictConfig(Config):
    """`predict`: masks of new images by a segmenter, in the geometry of their files."""

    layout: Layout = "auto"
    """Layout of the new images, whatever the training images had. auto: detected, and printed."""
    tiling: Literal["auto", "off", "on"] = "auto"
    """auto: tiles where the segmenter was trained on tiles, else the whole image at once. on: tiles
    in any case, for images that show more than the training images did, at their pixel spacing,
    such as a slide or a stitched scan. off: the whole image, shrunk, where a lesion is larger than
    a tile."""
    overlap: float = Field(0.5, ge=0, le=0.9)
    """Share of a tile's side that its neighbor repeats. At one half every pixel lies near the
    middle of some tile, where predictions are best; a Gaussian gives that tile the most weight."""
    scale: float | None = Field(None, gt=0, le=1)
    """Factor that shrinks images before tiles are cut. null: as in training."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """Probability above which a pixel is lesion; scores use 0.5."""
    flip_tta: bool = False
    """Average with the prediction of the mirrored image: twice the time, for little."""
    batch_size: Count = 16
    """Slices of a volume or tiles of an image at once; changes no result."""
    probability: bool = False
    """Also write probabilities: 16-bit PNG, of which 65535 is 1, or float32 NIfTI."""
    overlay: bool = False
    """Also write the image with the outline of the mask as PNG, to look at."""

    @field_validator("tiling", mode="before")
    @classmethod
    def _read_switch(cls, value: Any) -> Any:
        """YAML reads on and off as booleans."""
        if isinstance(value, bool):
            return "on" if value else "off"
        return value
