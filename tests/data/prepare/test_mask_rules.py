"""All masks of a set are read by one rule: what comes out right, what is told, what is asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageFilter

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts import SourceImage
from amlp_ray.data.prepare import mask_rules
from amlp_ray.data.prepare.mask_rules import check_lesions, read_masks_alike
from amlp_ray.data.prepare.scan import ItemScan, MaskArea, ScannedItem, scan_item
from amlp_ray.errors import DataError

SIDE = 32
LESION = np.zeros((SIDE, SIDE), np.uint8)
LESION[5:17, 7:18] = 1  # 132 pixels, not on the 8x8 blocks of JPEG
AREA = 132
OTHER = np.zeros((SIDE, SIDE), np.uint8)
OTHER[20:25, 20:25] = 1
NOTHING = np.zeros((SIDE, SIDE), np.uint8)
ALL = NOTHING + 1

MakeMask = Callable[[int], np.ndarray | Image.Image]


class Result(NamedTuple):
    pixels: list[int]  # of lesion, per image
    told: str


@pytest.fixture
def read_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Return a function that reads four images with masks as `data prepare` does, without Ray."""

    def run_here(jobs: Mapping[int, Any], work: Callable[[Any], Any]) -> Iterator[tuple[int, Any]]:
        return ((key, work(job)) for key, job in jobs.items())

    def read(make: MakeMask, suffix: str = "png", **config: Any) -> Result:
        save_options = config.pop("save", {})
        prepare_config = PrepareConfig(size=SIDE, **config)
        image = tmp_path / "image.png"
        Image.fromarray(NOTHING).save(image)
        scanned = []
        for number in range(4):
            path = tmp_path / f"mask{number}.{suffix}"
            mask = make(number)
            if suffix == "npy":
                np.save(path, np.asarray(mask))
            else:
                picture = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
                picture.save(path, **save_options)
            item = SourceImage(str(number), "picture", (str(image),), (str(path),), path.name)
            scanned.append(ScannedItem(item, scan_item(item, prepare_config)))
        alike, _ = read_masks_alike(scanned, prepare_config)
        warnings = check_lesions(alike, prepare_config)
        pixels = [scan.mask_area.lesion_pixels for _, scan in alike]
        return Result(pixels, " ".join([*caplog.messages, *warnings]))

    monkeypatch.setattr(mask_rules, "run_jobs", run_here)
    caplog.set_level(logging.INFO, "amlp_ray")
    return read


def voc_palette() -> list[int]:
    """Return the colors of PASCAL VOC, of which entry 7 is gray."""
    colors = []
    for index in range(256):
        channels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                channels[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        colors += channels
    return colors


def palette(indices: np.ndarray, *colors: int) -> Image.Image:
    picture = Image.fromarray(indices).copy()
    picture.putpalette(list(colors))
    return picture


def soft(radius: float) -> Image.Image:
    return Image.fromarray(LESION * 255).filter(ImageFilter.GaussianBlur(radius))


def layered(color: int, alpha: np.ndarray) -> Image.Image:
    """Return a drawing in one gray, which only alpha tells from its background."""
    return Image.merge("LA", [Image.fromarray(NOTHING + color), Image.fromarray(alpha)])


def rgb(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    return np.dstack([red, green, blue]) * np.uint8(255)


def rgba(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.dstack([colors, alpha])


BLACK_WHITE = (0, 0, 0, 255, 255, 255)
WHITE_BLACK = (255, 255, 255, 0, 0, 0)
BLACK_RED = (0, 0, 0, 255, 0, 0)
RED_BLACK = (255, 0, 0, 0, 0, 0)
WHITE_RED = (255, 255, 255, 255, 0, 0)


RIGHT: dict[str, tuple[MakeMask, dict[str, Any]]] = {
    "0 and 1": (lambda i: LESION, {}),
    "0 and 7": (lambda i: LESION * 7, {}),
    "1 bit": (lambda i: Image.fromarray(LESION * 255).convert("1"), {}),
    "16 bits": (lambda i: LESION.astype(np.uint16) * 65535, {}),
    "16 bits, 300": (lambda i: LESION.astype(np.uint16) * 300, {}),
    "float": (lambda i: LESION.astype(np.float32), {"suffix": "npy"}),
    "bool": (lambda i: LESION > 0, {"suffix": "npy"}),
    "1 and 2 with a label": (lambda i: LESION + 1, {"lesion_labels": (2,)}),
    "three grays with a label": (
        lambda i: LESION * 255 + OTHER * 128,
        {"lesion_labels": (255,)},
    ),
    "black and white palette": (lambda i: palette(LESION, *BLACK_WHITE), {}),
    "white first, by color": (
        lambda i: palette(1 - LESION, *WHITE_BLACK),
        {"lesion_labels": (255,)},
    ),
    "white first, by index": (lambda i: palette(LESION, *WHITE_BLACK), {"lesion_labels": (1,)}),
    "red palette": (lambda i: palette(LESION, *BLACK_RED), {}),
    "red on white palette": (lambda i: palette(LESION, *WHITE_RED), {}),
    "VOC, label 7 alone": (lambda i: palette(LESION * 7, *voc_palette()), {"lesion_labels": (7,)}),
    "VOC, label 7 beside others": (
        lambda i: palette(LESION * 7 + OTHER * (i % 2), *voc_palette()),
        {"lesion_labels": (7,)},
    ),
    "web palette": (
        lambda i: Image.fromarray(rgb(LESION, LESION, LESION)).convert("P"),
        {},
    ),
    "palette with a transparent background": (
        lambda i: palette(LESION, *WHITE_RED),
        {"save": {"transparency": 0}},
    ),
    "opaque alpha": (lambda i: rgba(rgb(LESION, LESION, LESION), ALL * 255), {}),
    "red drawn on clear black": (
        lambda i: rgba(rgb(LESION, NOTHING, NOTHING), LESION * 255),
        {},
    ),
    "red drawn on clear white": (
        lambda i: rgba(rgb(ALL, 1 - LESION, 1 - LESION), LESION * 255),
        {},
    ),
    "alpha that was never filled in": (lambda i: rgba(rgb(LESION, LESION, LESION), NOTHING), {}),
    "red": (lambda i: rgb(LESION, NOTHING, NOTHING), {}),
    "CMYK": (
        lambda i: Image.fromarray(rgb(LESION, LESION, LESION)).convert("CMYK"),
        {"suffix": "tif"},
    ),
    "white is zero": (
        lambda i: Image.fromarray(LESION * 255).convert("1"),
        {"suffix": "tif", "save": {"compression": "group4", "tiffinfo": {262: 0}}},
    ),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_masks_of_two_values_come_out_right(kind: str, read_set: Callable[..., Result]) -> None:
    make, options = RIGHT[kind]
    assert read_set(make, **options).pixels == [AREA] * 4


TOLD: dict[str, tuple[MakeMask, dict[str, Any], list[int], str]] = {
    "PNG that was JPEG": (
        lambda i: np.clip(LESION * 250.0 + np.arange(SIDE) % 6, 0, 255).astype(np.uint8),
        {},
        [AREA] * 4,
        "4 of 4 masks have many values, as remains of JPEG or soft edges: what lies above 127, half"
        " of the highest, is lesion; --lesion-threshold sets another value.",
    ),
    "soft edges": (lambda i: soft(0.5), {}, [AREA] * 4, "above 127"),
    "JPEG of 255": (lambda i: LESION * 255, {"suffix": "jpg"}, [AREA] * 4, "above 127"),
    "JPEG of 76": (
        lambda i: LESION * 76,
        {"suffix": "jpg", "save": {"quality": 95}},
        [AREA] * 4,
        "4 of 4 masks have many values",
    ),
    "empty ones among JPEG": (
        lambda i: LESION * (255 * (i % 2)),
        {"suffix": "jpg"},
        [0, AREA, 0, AREA],
        "2 of 4 masks have many values",
    ),
    "two labels": (
        lambda i: LESION + OTHER * 2,
        {},
        [AREA + 25] * 4,
        "The masks hold the values 1, 2: all are lesion; --lesion-labels takes some of them.",
    ),
    "another value in each": (lambda i: LESION * (100 + i), {}, [AREA] * 4, "values 100, 101, 102"),
    "two colors": (
        lambda i: rgb(LESION, OTHER, NOTHING),
        {},
        [AREA + 25] * 4,
        "4 of 4 masks have several colors: all but black is lesion.",
    ),
    "white on alpha": (
        lambda i: layered(255, LESION * 255),
        {},
        [AREA] * 4,
        "4 of 4 masks have one color: what is not transparent is lesion.",
    ),
    "black on alpha": (lambda i: layered(0, LESION * 255), {}, [AREA] * 4, "not transparent"),
    "white on alpha, some empty": (
        lambda i: layered(255, LESION * np.uint8(255 * (i % 2))),
        {},
        [0, AREA, 0, AREA],
        "not transparent",
    ),
    "palettes in both orders": (
        lambda i: palette(LESION, *BLACK_WHITE) if i % 2 else palette(1 - LESION, *WHITE_BLACK),
        {},
        [AREA] * 4,
        "The palettes of 4 of 4 masks differ, so their colors count: all but black is lesion.",
    ),
    "one label is nowhere": (
        lambda i: LESION * 3,
        {"lesion_labels": (2, 3)},
        [AREA] * 4,
        "No mask holds 2 of lesion_labels; they hold 3.",
    ),
    "a label in PNG that was JPEG": (
        lambda i: np.clip(LESION * 250.0 + np.arange(SIDE) % 6, 0, 255).astype(np.uint8),
        {"lesion_labels": (255,)},
        [24] * 4,
        "only what is exactly one of lesion_labels is lesion; --lesion-threshold takes a range.",
    ),
    "inverted": (
        lambda i: (1 - LESION) * 255,
        {},
        [SIDE**2 - AREA] * 4,
        "4 of 4 masks mark most of the image and its border as lesion",
    ),
    "one is full": (
        lambda i: LESION * 255 if i else ALL * 255,
        {},
        [SIDE**2, AREA, AREA, AREA],
        "1 of 4 masks mark the whole image as lesion",
    ),
    "most are empty": (
        lambda i: NOTHING if i else LESION,
        {},
        [AREA, 0, 0, 0],
        "3 of 4 masks hold no lesion.",
    ),
    "threshold": (lambda i: soft(3), {"lesion_threshold": 100}, [120] * 4, ""),
}


@pytest.mark.parametrize("kind", TOLD)
def test_guesses_and_odd_results_are_told(kind: str, read_set: Callable[..., Result]) -> None:
    make, options, pixels, sentence = TOLD[kind]
    result = read_set(make, **options)
    if kind == "threshold":
        pixels = [int((np.asarray(soft(3)) > 100).sum())] * 4
    assert result.pixels == pixels
    assert sentence in result.told


ASKED: dict[str, tuple[MakeMask, dict[str, Any], str]] = {
    "probabilities": (
        lambda i: np.random.default_rng(i).integers(0, 256, (SIDE, SIDE), np.uint8),
        {},
        r"4 of 4 masks have values between dark and bright.* --lesion-threshold 127 takes all ab",
    ),
    "probabilities of 16 bits": (
        lambda i: np.random.default_rng(i).integers(0, 65536, (SIDE, SIDE), np.uint16),
        {},
        "--lesion-threshold 32767 takes",
    ),
    "probabilities in floats": (
        lambda i: np.asarray(soft(2), np.float32) / 255,
        {"suffix": "npy"},
        r"--lesion-threshold 0\.5 takes all above 0\.5",
    ),
    "blurred": (lambda i: soft(2), {}, "values between dark and bright"),
    "blurred alpha": (
        lambda i: layered(255, np.asarray(soft(2))),
        {},
        "values between dark and bright",
    ),
    "three grays": (
        lambda i: LESION * 255 + OTHER * 128,
        {},
        r"have few grays, .*\(0, 128, 255\).* --lesion-labels 255 takes one value \(there are 128",
    ),
    "label 1 and 255": (lambda i: LESION + OTHER * 255, {}, r"few grays.*\(0, 1, 255\)"),
    "no background": (lambda i: LESION + 1, {}, r"no background 0, such as .*\(1, 2\).*-labels 2 "),
    "no background in a palette": (
        lambda i: palette(LESION + 1, *voc_palette()),
        {},
        "neither an index 0 nor black as background; --lesion-labels takes some of the indices 1",
    ),
    "red on white": (
        lambda i: rgb(ALL, 1 - LESION, 1 - LESION),
        {},
        "no background 0.* export them as white on black",
    ),
    "white palette first": (
        lambda i: palette(1 - LESION, *WHITE_BLACK),
        {},
        "0 is bright and 1 is black.*labels 1 takes what is black, and --lesion-labels 255 what",
    ),
    "red palette first": (
        lambda i: palette(1 - LESION, *RED_BLACK),
        {},
        "0 is bright and 1 is black",
    ),
    "labels in palettes that differ": (
        lambda i: palette(LESION, *(BLACK_RED if i % 2 else RED_BLACK)),
        {"lesion_labels": (1,)},
        "one index has different colors",
    ),
    "threshold for colors": (
        lambda i: palette(LESION, *BLACK_RED),
        {"lesion_threshold": 127},
        "are in color, so no threshold can be applied",
    ),
    "JPEG of 1": (
        lambda i: LESION,
        {"suffix": "jpg"},
        "have faint values, which JPEG blurs.* --lesion-threshold 0 takes them",
    ),
    "JPEG of 7": (lambda i: LESION * 7, {"suffix": "jpg"}, "Say what is lesion: --lesion-thresh"),
    "faint JPEG among bright ones": (
        lambda i: LESION * (76 if i else 255),
        {"suffix": "jpg", "save": {"quality": 90}},
        "3 of 4 masks have faint values, though others reach 255",
    ),
    "colors against alpha": (
        lambda i: rgba(rgb(LESION, LESION, LESION), (1 - LESION) * 255),
        {},
        "4 of 4 images with masks cannot be used.*colors and transparency mark different pixels",
    ),
    "all are full": (lambda i: ALL, {}, "4 of 4 masks mark the whole image as lesion"),
    "threshold that no mask reaches": (
        lambda i: LESION * 100,
        {"lesion_threshold": 127},
        "None of 4 masks has a value above lesion_threshold 127; the highest is 100",
    ),
    "labels that no mask holds": (
        lambda i: LESION * 3,
        {"lesion_labels": (1, 2)},
        "None of 4 masks holds lesion_labels 1, 2; they hold 3",
    ),
}


@pytest.mark.parametrize("kind", ASKED)
def test_what_cannot_be_guessed_is_asked(kind: str, read_set: Callable[..., Result]) -> None:
    make, options, sentence = ASKED[kind]
    with pytest.raises(DataError, match=sentence) as caught:
        read_set(make, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("item_format", ["picture", "dicom", "nifti"])
def test_masks_of_every_format_that_are_lost_or_full_stop_the_set(item_format: Any) -> None:
    item = SourceImage("x", item_format, ("x",), ("x_mask",), "x")
    config = PrepareConfig()
    fault = ScannedItem(item, ItemScan(fault="x_mask has another size."))
    good = ScannedItem(item, ItemScan(mask_area=MaskArea(100, 9, 36, 0)))
    full = ScannedItem(item, ItemScan(mask_area=MaskArea(100, 100, 36, 36)))
    unlabeled = ScannedItem(SourceImage("y", item_format, ("y",), (), "y"), ItemScan(fault="bad."))
    assert check_lesions([unlabeled, unlabeled, good], config) == []
    assert check_lesions([fault, good, good], config) == [
        "1 of 3 images with masks cannot be used."
    ]
    with pytest.raises(DataError, match=r"2 of 3 images .* cannot be used\. The first: x_mask has"):
        check_lesions([fault, fault, good], config)
    with pytest.raises(DataError, match="2 of 3 masks mark the whole image"):
        check_lesions([full, full, good], config)
