"""Decode the files of an item to frames, with a module per file format.

Frames come in stored units and are never resized.
"""

from __future__ import annotations

from collections.abc import Iterator

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.frame import DTYPES, Frame, ReadFile, common_dtype
from amlp_ray.data.decoders.image import read_image
from amlp_ray.data.decoders.mask_rule import MaskRule
from amlp_ray.data.layouts.item import SourceImage
from amlp_ray.data.path import read_bytes

__all__ = ["DTYPES", "Frame", "MaskRule", "common_dtype", "read_frames"]


def read_frames(
    item: SourceImage,
    config: PrepareConfig,
    read: ReadFile = read_bytes,
    mask_rule: MaskRule | None = None,
) -> Iterator[Frame]:
    """Yield the frames of an item in order: one of a picture, the slices of a series or volume.

    Args:
        item: what to decode. An item with any fault is rejected whole.
        config: which values and which plane are wanted.
        read: returns the content of a file. Preparing passes one that hashes on the way.
        mask_rule: how mask files are read; None: as those of this item suggest.

    Raises:
        DataError: the item cannot be used; the sentence names the file.
    """
    if item.format == "picture":
        return read_image(item, config, read, mask_rule)
    # Imported on use: DICOM and NIfTI bring packages that pictures do not need.
    if item.format == "dicom":
        from amlp_ray.data.decoders.dicom import read_dicom

        return read_dicom(item, config, read)
    from amlp_ray.data.decoders.nifti import read_nifti

    return read_nifti(item, config, read, mask_rule)
