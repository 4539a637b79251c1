"""Settings of a patch dataset."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from amlp_ray.settings import Settings


class ImageSpec(Settings):
    """What a model must know of a patch dataset: the shape of its images and how to normalise them.

    `mean` and `std` are per channel, in stored units (0-255 for uint8), over the training split.
    """

    channels: int = Field(ge=1)
    height: int = Field(ge=8)
    width: int = Field(ge=8)
    mean: tuple[float, ...]
    std: tuple[float, ...]


class PrepareSettings(Settings):
    """How a folder of images becomes a patch dataset."""

    layout: Literal["busi", "paired"]  # busi: `x (1).png` and `x (1)_mask.png`; paired: folders images and masks
    size: int = Field(96, ge=16, le=2048)  # pixels a side; 96 with patch 8 is 144 tokens, the least a patch head needs
    channels: Literal["auto", 1, 3] = "auto"  # auto: 1 if every image is grey, as exported ultrasound is
    group_by: Literal["near-duplicates", "image"] = "near-duplicates"  # public sets hold many near-copies
    group_file: str | None = None  # CSV with columns id, group; takes the place of group_by
    split_file: str | None = None  # JSON {"train": [ids], "val": ..., "test": ...}; takes the place of fractions
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)  # train, val, test
    seed: int = Field(0, ge=0)  # of the split

    @model_validator(mode="after")
    def _check_fractions(self) -> PrepareSettings:
        if min(self.fractions) < 0 or self.fractions[0] == 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions must be train > 0, val, test >= 0 with sum 1, not {self.fractions}")
        return self
