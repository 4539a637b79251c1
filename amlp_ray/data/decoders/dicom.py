"""DICOM series and multi-frame objects -> frames, one file or frame at a time; nothing but pixels and spacing leaves.

Values come in the units the header means (`values=keep`): rescaled, so CT in Hounsfield units. Colours come as RGB.
MONOCHROME1 shows high values dark, so its values are turned round: value -> low + high - value, where low and high are
the ends of the range that the header allows (bits stored, rescaled). Air is low then, as in all other images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import numpy as np
from pydicom import Dataset

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders.dicom_pixels import (
    EXACT,
    Header,
    Pixels,
    brief,
    decode,
    frame_count,
    header_of,
    load,
    window_of,
)
from amlp_ray.data.decoders.dicom_seg import SegmentationMasks, SourceSlice
from amlp_ray.data.decoders.frame import Frame
from amlp_ray.data.decoders.intensity import percentile_range, smallest_exact, to_bytes
from amlp_ray.data.layouts.item import SourceImage
from amlp_ray.errors import DataError

LOOKED_AT = 16  # frames, evenly spaced, that the percentiles of a series are taken from

ConfigValues = Callable[[str], bytes]
Range = tuple[float, float]
P = ParamSpec("P")
T = TypeVar("T")


def read_dicom(item: SourceImage, config: PrepareConfig, read: ConfigValues) -> Iterator[Frame]:
    """Yield the slices of a series, or the frames of an object, in order; one file is in memory at a time.

    Images are (H, W, 1), or (H, W, 3) for colour, and of the smallest type of uint8, uint16 and int16 that holds all
    values the header allows, else float32. Pixels outside of what was scanned become the least value inside.

    With `values=window` grey becomes uint8 by `settings.window`, else by look-up table or window of the header; with
    `values=percentile` by percentiles of at most 16 evenly spaced frames, which are read for that first. Colour is
    meant to be shown as it is: it stays, but for more than 8 bits becoming 8.

    A mask covers the series: slices that no segmentation lies on have an all-zero one.

    Raises:
        DataError: a file cannot be read or decoded, its header names no window where one is asked for, or a
            segmentation does not fit. The sentence names the file.
    """
    span = _span(item, read) if config.values == "percentile" else config.window
    masks = (
        _quiet(SegmentationMasks, item.masks, config.lesion_labels, read) if item.masks else None
    )
    index = 0
    for path in item.images:
        dataset = _quiet(load, path, read)
        for number in range(frame_count(dataset)):
            frame = _quiet(_frame, dataset, path, number, index, config, span, masks)
            if index == 0 and masks is not None:
                frame = frame._replace(notes=frame.notes + masks.notes)
            yield frame
            index += 1
    if masks is not None:
        masks.finish()


def _frame(
    dataset: Dataset,
    path: str,
    number: int,
    index: int,
    config: PrepareConfig,
    span: Range | None,
    masks: SegmentationMasks | None,
) -> Frame:
    header, pixels = _decoded(dataset, path, number)
    image, notes = _valued(pixels, header, path, config, span)
    if pixels.padding is not None:
        image[pixels.padding] = image[~pixels.padding].min()
    mask = None
    if masks is not None:
        several = frame_count(dataset) > 1
        instance, shape = str(dataset.get("SOPInstanceUID", "")), (image.shape[0], image.shape[1])
        place = (header.position, header.orientation, header.spacing)
        mask = masks.on(SourceSlice(instance, number + 1 if several else None, shape, *place))
    return Frame(image.reshape(*image.shape[:2], -1), mask, index, header.spacing, notes)


def _valued(
    pixels: Pixels, header: Header, path: str, config: PrepareConfig, span: Range | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Bring values to what the settings ask for, with notes."""
    values = pixels.values
    if config.values != "keep":
        if pixels.is_color:
            return (values if values.dtype == np.uint8 else to_bytes(values, 0, pixels.high)), ()
        image = to_bytes(values, *span) if span else window_of(values, header, path)
        return (255 - image if pixels.is_inverted else image), ()
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
    if image.dtype == np.float32 and max(abs(int(values.min())), abs(int(values.max()))) > EXACT:
        return image, ("has values of more than 24 bits, which were rounded",)
    return image, ()


def _decoded(dataset: Dataset, path: str, number: int) -> tuple[Header, Pixels]:
    try:
        header = header_of(dataset, number)
        return header, decode(dataset, number, header)
    except (
        Exception
    ) as error:  # decoders raise many types on damaged pixels, and all mean the same here
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise DataError(
            f"{path} cannot be decoded ({syntax}: {brief(error)}); export it again, uncompressed if possible, "
            f"or remove it."
        ) from None


def _span(item: SourceImage, read: ConfigValues) -> Range:
    """Return what becomes 0 and 255, from evenly spaced frames. 16 slices tell a series of 1000 apart from none."""
    if len(item.images) > 1:
        chosen = _spread(len(item.images))
        found = [_quiet(_sample, item.images[i], 0, read) for i in chosen]
    else:
        path = item.images[0]
        dataset = _quiet(load, path, read)
        chosen = _spread(frame_count(dataset))
        found = [_quiet(_gray, dataset, path, i) for i in chosen]
    values = [one for one in found if one.size]
    return percentile_range(np.concatenate(values)) if values else (0, 255)


def _spread(count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, LOOKED_AT))})


def _sample(path: str, number: int, read: ConfigValues) -> np.ndarray:
    return _gray(load(path, read), path, number)


def _gray(dataset: Dataset, path: str, number: int) -> np.ndarray:
    """Return the grey values of a frame that are inside of what was scanned, flat; of colour none."""
    pixels = _decoded(dataset, path, number)[1]
    if pixels.is_color:
        return np.empty(0, np.float32)
    inside = pixels.values if pixels.padding is None else pixels.values[~pixels.padding]
    return inside.astype(np.float32).ravel()


def _quiet(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call without the warnings of pydicom and highdicom: every odd value in a header gives some."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return work(*args, **kwargs)
