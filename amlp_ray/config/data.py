"""Settings of a patch dataset."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator

from amlp_ray.config.base import Config, Count, Share

Layout = Literal[
    "auto", "busi", "paired", "folders", "flat", "lgg", "dicom", "nifti", "decathlon", "coco"
]


class ImageSpec(Config):
    """What a model must know of a patch dataset: the shape of its images and how to normalize them.

    `mean` and `std` are per channel, in stored units (0-255 for uint8), over the training split.
    """

    channels: Count
    height: int = Field(ge=8)
    width: int = Field(ge=8)
    mean: tuple[float, ...]
    std: tuple[float, ...]


class PrepareConfig(Config):
    """How a folder of images becomes a patch dataset."""

    layout: Layout = "auto"
    """How the folder is organized. auto: detected from names and first bytes, and printed.
    docs/data.md describes them all."""
    file_list: str | None = None
    """Text file with one image per line, relative to the source; for layout flat."""
    mask_folder: str | None = None
    """Name of the folders whose masks mark lesions, where several hold masks of the same images,
    such as fields of view; for layout paired. null: asked about unless names tell."""
    size: int = Field(96, ge=16, le=2048)
    """Side of the stored images in pixels. 96 with patch 8 is 144 tokens, the least a patch head
    needs."""
    fit: Literal["stretch", "pad", "tiles"] = "stretch"
    """stretch: to a square, as in all figures of docs/. pad: keep the aspect ratio and add borders.
    tiles: cut at full detail, several patches per image."""
    overlap: float = Field(0.0, ge=0, le=0.9)
    """tiles: share of a tile's side that its neighbor repeats."""
    scale: float = Field(1.0, gt=0, le=1)
    """tiles: factor that shrinks images before tiles are cut, such as 0.25 for photographs of 4000
    pixels."""
    min_foreground: Share = 0.1
    """Least share of tissue: tiles and slices with less are skipped unless they hold a lesion,
    because air teaches nothing. 0 keeps all."""
    channels: Literal["auto"] | int = "auto"
    """Number of channels. auto: 1 if every image is gray, as exported ultrasound is."""
    values: Literal["keep", "window", "percentile"] = "keep"
    """keep: as stored, DICOM in its rescaled units. window: the range `window` to 0-255.
    percentile: 0.5 % to 99.5 % of what lies above the minimum of each image, volume or series to
    0-255, for MRI, whose scale means nothing."""
    window: tuple[float, float] | None = None
    """Lowest and highest value for values=window. null: the window in the DICOM header."""
    axis: Literal["axial", "coronal", "sagittal"] = "axial"
    """Axis across which NIfTI volumes are cut into slices."""
    lesion_labels: tuple[int, ...] = ()
    """Values of a mask that are lesion. Empty: all above zero."""
    lesion_threshold: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Lesion is what lies above this value of a mask, for probabilities, soft edges and remains of
    JPEG. null: all above zero; masks of many values that may be anything are asked about, because
    above zero they would swell."""
    group_by: Literal["auto", "patient", "near-duplicates", "image"] = "auto"
    """What stays in one split. auto: by patient where the layout knows patients, else by
    near-duplicates, because public sets hold many near-copies."""
    group_file: str | None = None
    """CSV with a column id; replaces group_by."""
    group_column: str = "group"
    """Column of group_file with the group of each image."""
    balance_columns: tuple[str, ...] = ()
    """Columns of group_file whose values every split gets its share of, such as site."""
    split_file: str | None = None
    """JSON {"train": [ids], "val": ..., "test": ...}; replaces fractions."""
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Shares of train, val and test."""
    hash_names: bool = False
    """Store ids, groups and sources as salted hashes; always so for DICOM."""
    seed: NonNegativeInt = 0
    """Seed of the split."""

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
                f"lesion_labels must be whole numbers from 1, not {self.lesion_labels}; "
                f"0 is background"
            )
        if self.balance_columns and not self.group_file:
            raise ValueError("balance_columns needs a group_file that holds them")
        if self.lesion_labels and self.lesion_threshold is not None:
            raise ValueError("lesion_labels and lesion_threshold exclude each other; give one")
        if self.mask_folder and (self.layout not in ("auto", "paired") or self.file_list):
            raise ValueError("mask_folder needs layout=paired and no file_list")
        if self.file_list and self.layout not in ("auto", "flat"):
            raise ValueError(f"file_list needs layout=flat, not {self.layout}")
        return self
