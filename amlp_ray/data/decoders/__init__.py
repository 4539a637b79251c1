"""One decoder per file format: from the files of an item to its frames. Frames come in stored units, never resized."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.frame import DTYPES, Frame, holding_all
from amlp_ray.data.layouts.item import SourceImage
from amlp_ray.data.path import read_bytes

__all__ = ["DTYPES", "Frame", "holding_all", "read_frames"]


def read_frames(
    item: SourceImage, config: PrepareConfig, read: Callable[[str], bytes] = read_bytes
) -> Iterator[Frame]:
    """Yield the frames of an item in order: one of a picture, the slices of a series or volume.

    Args:
        read: gives the content of a file; preparing hands in one that hashes on the way.

    Raises:
        DataError: the item cannot be used; the sentence names the file. An item with any fault is rejected whole.
    """
    if item.format == "dicom":
        from amlp_ray.data.decoders.dicom import read_dicom as decode
    elif item.format == "nifti":
        from amlp_ray.data.decoders.nifti import read_nifti as decode
    else:
        from amlp_ray.data.decoders.image import read_picture as decode
    return decode(item, config, read)
