"""Settings of a patch dataset."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from amlp_ray.config.base import Config

Layout = Literal["auto", "busi", "paired", "flat", "lgg", "dicom", "nifti", "decathlon", "coco"]


class ImageSpec(Config):
    """What a model must know of a patch dataset: the shape of its images and how to normalise them.

    `mean` and `std` are per channel, in stored units (0-255 for uint8), over the training split.
    """

    channels: int = Field(ge=1)
    height: int = Field(ge=8)
    width: int = Field(ge=8)
    mean: tuple[float, ...]
    std: tuple[float, ...]


class PrepareConfig(Config):
    """How a folder of images becomes a patch dataset."""

    layout: Layout = (
        "auto"  # auto: recognised from names and first bytes, and said; docs/data.md has them all
    )
    file_list: str | None = None  # text file, one image a line, relative to the source; layout flat
    size: int = Field(
        96, ge=16, le=2048
    )  # pixels a side; 96 with patch 8 is 144 tokens, the least a patch head needs
    # stretch: to a square, what the figures in docs/ were measured with; pad: aspect kept, borders added; tiles: cut
    # at full detail, several patches of an image
    fit: Literal["stretch", "pad", "tiles"] = "stretch"
    overlap: float = Field(
        0.0, ge=0, le=0.9
    )  # share of a tile's side that its neighbour repeats; tiles
    scale: float = Field(
        1.0, gt=0, le=1
    )  # shrinks images before tiles are cut: 0.25 for photographs of 4000 pixels
    # Tiles and slices with less tissue are left out, unless they hold a lesion; air teaches nothing. 0 keeps all.
    min_foreground: float = Field(0.1, ge=0, le=1)
    channels: Literal["auto"] | int = (
        "auto"  # auto: 1 if every picture is grey, as exported ultrasound is
    )
    # keep: as stored, DICOM in its rescaled units; window: the range `window` to 0-255; percentile: 0.5 % to 99.5 % of
    # what lies above the minimum of each picture, volume or series to 0-255, for MRI, whose scale means nothing
    values: Literal["keep", "window", "percentile"] = "keep"
    window: tuple[float, float] | None = (
        None  # lowest and highest value kept; none: the window in the DICOM header
    )
    axis: Literal["axial", "coronal", "sagittal"] = "axial"  # NIfTI volumes are cut across this
    lesion_labels: tuple[
        int, ...
    ] = ()  # values of a mask that are lesion; none given: all above zero
    # auto: by patient where the layout knows patients, else near-duplicates: public sets hold many near-copies
    group_by: Literal["auto", "patient", "near-duplicates", "image"] = "auto"
    group_file: str | None = None  # CSV with a column id; takes the place of group_by
    group_column: str = "group"  # the column of group_file that says what belongs together
    split_file: str | None = (
        None  # JSON {"train": [ids], "val": ..., "test": ...}; takes the place of fractions
    )
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)  # train, val, test
    hash_names: bool = False  # ids, groups and sources become salted hashes; always so for DICOM
    seed: int = Field(0, ge=0)  # of the split

    @model_validator(mode="after")
    def _check(self) -> PrepareConfig:
        if min(self.fractions) < 0 or self.fractions[0] == 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(
                f"fractions must be train > 0, val, test >= 0 with sum 1, not {self.fractions}"
            )
        if self.channels != "auto" and not 1 <= self.channels <= 64:
            raise ValueError(f"channels must be auto or 1 to 64, not {self.channels}")
        if self.fit != "tiles" and (self.overlap > 0 or self.scale < 1):
            raise ValueError("overlap and scale need fit=tiles")
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError(f"window must be a low and a higher value, not {self.window}")
        if self.window is not None and self.values != "window":
            raise ValueError("window needs values=window")
        if any(label < 1 for label in self.lesion_labels):
            raise ValueError(
                f"lesion_labels must be whole numbers from 1, not {self.lesion_labels}; 0 is background"
            )
        if self.file_list and self.layout not in ("auto", "flat"):
            raise ValueError(f"file_list needs layout=flat, not {self.layout}")
        return self
