"""Decode DICOM series and multi-frame objects to frames, one file or frame at a time.

Nothing but pixels and spacing leaves this module.

With `values=keep`, values come in the units that the header means: rescaled, so CT in Hounsfield
units. Colors come as RGB. MONOCHROME1 shows high values dark, so its values are turned: value ->
low + high - value, where low and high are the ends of the range that the header allows (bits
stored, rescaled). So air is low, as in all other images.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from warnings import catch_warnings

import numpy as np
from pydicom import Dataset

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.dicom_pixels import (
    Header,
    Pixels,
    apply_window,
    decode,
    frame_count,
    load,
    read_header,
)
from amlp_ray.data.decoders.dicom_seg import SegmentationMasks, SourceSlice
from amlp_ray.data.decoders.frame import MAX_EXACT, Frame, ReadFile
from amlp_ray.data.decoders.intensity import percentile_range, smallest_exact, to_bytes
from amlp_ray.data.layouts.item import SourceImage
from amlp_ray.errors import DataError, describe_error

# Evenly spaced frames that the percentiles of a series are taken from: 16 slices are enough to tell
# a series of 1000 apart from none.
SAMPLED_FRAMES = 16

Range = tuple[float, float]


class _FileFrame(NamedTuple):
    """One frame of a parsed file."""

    dataset: Dataset
    path: str
    number: int  # within the file, from 0


def read_dicom(item: SourceImage, config: PrepareConfig, read: ReadFile) -> Iterator[Frame]:
    """Yield the slices of a series, or the frames of an object, in order.

    One file is in memory at a time. Images are (H, W, 1), or (H, W, 3) for color, and of the
    smallest type of uint8, uint16 and int16 that holds all values the header allows, else float32.
    Pixels outside of what was scanned become the least value inside.

    With `values=window` gray becomes uint8 by `config.window`, else by the header's look-up table
    or window. With `values=percentile` it does by percentiles of at most 16 evenly spaced frames,
    which are read for that first. Color is meant to be shown as it is: it stays, but more than 8
    bits become 8.

    A mask covers the series: slices that no segmentation lies on have an all-zero one.

    Raises:
        DataError: a file cannot be read or decoded, its header names no window if one is needed,
            or a segmentation does not fit. The sentence names the file.
    """
    value_range = config.window
    masks = None
    # pydicom and highdicom warn of every odd value in a header. The filters must not be held while
    # this generator waits.
    with catch_warnings(action="ignore"):
        if config.values == "percentile":
            value_range = _percentile_range(item, read)
        if item.masks:
            masks = SegmentationMasks(item.masks, config.lesion_labels, read)
    index = 0
    for path in item.images:
        with catch_warnings(action="ignore"):
            dataset = load(path, read)
        for number in range(frame_count(dataset)):
            source = _FileFrame(dataset, path, number)
            with catch_warnings(action="ignore"):
                frame = _read_frame(source, index, config, value_range, masks)
            yield frame
            index += 1
    if masks is not None:
        masks.finish()


def _read_frame(
    source: _FileFrame,
    index: int,
    config: PrepareConfig,
    value_range: Range | None,
    masks: SegmentationMasks | None,
) -> Frame:
    """Decode frame `index` of an item; without a `value_range` the header says what is 0 to 255."""
    header, pixels = _decode(source)
    image, value_notes = _map_values(pixels, header, source.path, config, value_range)
    notes = pixels.notes + value_notes
    if pixels.padding is not None:
        image[pixels.padding] = image[~pixels.padding].min()
    height, width = image.shape[:2]
    mask = None
    if masks is not None:
        is_multi_frame = frame_count(source.dataset) > 1
        mask = masks.mask_on(
            SourceSlice(
                instance=str(source.dataset.get("SOPInstanceUID", "")),
                frame=source.number + 1 if is_multi_frame else None,
                shape=(height, width),
                geometry=header.geometry,
            )
        )
        notes += masks.notes if index == 0 else ()
    spacing = header.geometry.spacing
    return Frame(
        image=image.reshape(height, width, -1),
        mask=mask,
        number=index,
        spacing=None if spacing is None else (spacing[0], spacing[1]),
        notes=notes,
    )


def _map_values(
    pixels: Pixels, header: Header, path: str, config: PrepareConfig, value_range: Range | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Bring values to the scale that the config names; return them with notes."""
    if config.values == "keep":
        return _keep_values(pixels, path)
    values = pixels.values
    if pixels.is_color:
        is_small = values.dtype == np.uint8
        return values if is_small else to_bytes(values, 0, pixels.high), ()
    image = to_bytes(values, *value_range) if value_range else apply_window(values, header, path)
    return 255 - image if pixels.is_inverted else image, ()


def _keep_values(pixels: Pixels, path: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return values in the smallest stored type that holds them, with notes."""
    values = pixels.values
    if pixels.is_inverted:
        values = pixels.low + pixels.high - values
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            image = values.astype(np.float32)
        if not np.isfinite(image).all():
            raise DataError(
                f"{path} holds values that are no finite numbers, but such are needed; remove it."
            )
        return image, ()
    image = smallest_exact(values, int(pixels.low), int(pixels.high))
    if image.dtype == np.float32:
        farthest = max(abs(int(values.min())), abs(int(values.max())))
        if farthest > MAX_EXACT:
            return image, ("has values of more than 24 bits, which were rounded",)
    return image, ()


def _decode(source: _FileFrame) -> tuple[Header, Pixels]:
    try:
        header = read_header(source.dataset, source.number)
        return header, decode(source.dataset, source.number, header)
    except Exception as error:  # decoders raise many types on damaged pixels
        syntax = source.dataset.file_meta.TransferSyntaxUID.name
        raise DataError(
            f"{source.path} cannot be decoded ({syntax}: {describe_error(error)}); "
            "export it again, uncompressed if possible, or remove it."
        ) from None


def _percentile_range(item: SourceImage, read: ReadFile) -> Range:
    """Return what becomes 0 and 255, from evenly spaced frames."""
    samples = []
    if len(item.images) > 1:
        for i in _spread(len(item.images)):
            path = item.images[i]
            samples.append(_scanned_values(_FileFrame(load(path, read), path, 0)))
    else:
        path = item.images[0]
        dataset = load(path, read)
        for number in _spread(frame_count(dataset)):
            samples.append(_scanned_values(_FileFrame(dataset, path, number)))
    values = np.concatenate(samples)
    return percentile_range(values) if values.size else (0, 255)


def _spread(count: int) -> list[int]:
    """Return positions of at most SAMPLED_FRAMES evenly spaced ones of `count`."""
    positions = np.linspace(0, count - 1, min(count, SAMPLED_FRAMES))
    return sorted({round(position) for position in positions})


def _scanned_values(source: _FileFrame) -> np.ndarray:
    """Return the gray values of what was scanned, flat float32; none if the frame is in color."""
    _, pixels = _decode(source)
    if pixels.is_color:
        return np.empty(0, np.float32)
    inside = pixels.values if pixels.padding is None else pixels.values[~pixels.padding]
    return inside.astype(np.float32).ravel()
