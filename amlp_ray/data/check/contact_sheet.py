"""Pictures of examples, and the contact sheet: a row for each finding, as one PNG."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from amlp_ray.data.check.finding import EXAMPLES, Example, Finding, Shown
from amlp_ray.utils.files import atomic_write

if TYPE_CHECKING:
    from amlp_ray.data.check.report import Report

SIDE = 160  # pixels of the longer side of a picture
GAP, MARGIN, LINE = 8, 20, 15
STRETCH = (0.5, 99.5)  # percentiles that become black and white where pixels are not 8 bits
OUTLINE = (255, 176, 0)
COLOURS = {"leak": (176, 32, 32), "warning": (166, 101, 0), "note": (60, 95, 140)}
INK, SOFT = (31, 41, 51), (82, 96, 109)

Pictures = dict[Shown, Image.Image]


class Cell(NamedTuple):
    """A picture of the sheet with its two lines of caption."""

    shown: Shown
    caption: str
    below: str


def read_pictures(report: Report) -> Pictures:
    """Draw every image that a finding shows, in the order of the dataset, so that a row group is read once."""
    wanted = {
        shown
        for finding in report.findings
        for example in finding.examples
        for shown in (example.image, example.like)
        if shown is not None
    }
    pictures: Pictures = {}
    opened: tuple[bool, str] | None = None
    for shown in sorted(wanted, key=lambda s: (s.other, s.split, s.row)):
        if opened != (shown.other, shown.split):  # one at a time: samples keep row groups
            dataset = report.against if shown.other else report.dataset
            assert dataset is not None
            samples, opened = dataset.split(shown.split), (shown.other, shown.split)
        sample = samples[shown.row]
        pictures[shown] = picture_of(sample.image, sample.mask)
    return pictures


def picture_of(image: np.ndarray, mask: np.ndarray | None) -> Image.Image:
    """Draw an image (C, H, W), three channels as RGB and else the first, with the outline of its mask (H, W)."""
    planes = image[:3] if image.shape[0] == 3 else image[:1]
    if planes.dtype != np.uint8:
        planes = _stretched(planes)
    picture = Image.fromarray(planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0)).convert(
        "RGB"
    )
    scale = SIDE / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    picture = picture.resize(
        size, Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.BILINEAR
    )
    if mask is None or not mask.any():
        return picture
    large = (
        np.asarray(Image.fromarray(mask * np.uint8(255)).resize(size, Image.Resampling.BILINEAR))
        > 127
    )
    if not large.any():  # too small to survive
        large = (
            np.asarray(Image.fromarray(mask * np.uint8(255)).resize(size, Image.Resampling.BOX)) > 0
        )
    pixels = np.array(picture)
    pixels[ndimage.binary_dilation(large) & ~large] = OUTLINE
    return Image.fromarray(pixels)


def write_sheet(report: Report, pictures: Pictures, file: Path) -> Path:
    """Write the contact sheet."""
    width = 2 * MARGIN + EXAMPLES * (SIDE + GAP) - GAP
    shown = [finding for finding in report.findings if finding.examples]
    heads = {finding.key: _wrapped(finding, width - 2 * MARGIN) for finding in shown}
    tall = 3 * MARGIN + 30 + sum(
        30 + LINE * len(heads[finding.key]) + _height(finding, pictures) + 2 * LINE + MARGIN + 8 for finding in shown
    )  # fmt: skip
    sheet = Image.new("RGB", (width, max(tall, 120)), "white")
    draw = ImageDraw.Draw(sheet)
    name = f"{report.dataset.name}" + (f" against {report.against.name}" if report.against else "")
    draw.text((MARGIN, MARGIN - 4), f"Check of {name}", fill=INK, font=_font(22))
    y = MARGIN + 38
    if not shown:
        draw.text((MARGIN, y), "No finding with examples.", fill=SOFT, font=_font(14))
    for finding in shown:
        color = COLOURS[finding.severity]
        draw.rectangle((MARGIN, y + 3, MARGIN + 4, y + 20), fill=color)
        title = f"{finding.title}: {finding.count} of {finding.of} {finding.what}"
        draw.text((MARGIN + 12, y), title, fill=INK, font=_font(17))
        at = MARGIN + 12 + draw.textlength(title, font=_font(17)) + 12
        draw.text((at, y + 3), finding.severity, fill=color, font=_font(13))
        y += 28
        for line in heads[finding.key]:
            draw.text((MARGIN + 12, y), line, fill=SOFT, font=_font(12))
            y += LINE
        y += 6
        tallest = _height(finding, pictures)
        for number, cell in enumerate(_cells(finding)):
            x = MARGIN + number * (SIDE + GAP)
            sheet.paste(pictures[cell.shown], (x, y))
            draw.text((x, y + tallest + 2), _fitted(cell.caption, SIDE), fill=INK, font=_font(12))
            draw.text(
                (x, y + tallest + 2 + LINE), _fitted(cell.below, SIDE), fill=SOFT, font=_font(12)
            )
        y += tallest + 2 * LINE + MARGIN + 2
    buffer = io.BytesIO()
    sheet.crop((0, 0, width, max(y, 120))).save(buffer, "PNG")
    atomic_write(file, buffer.getvalue())
    return file


def _cells(finding: Finding) -> Iterator[Cell]:
    """What is drawn of a finding, at most as many as fit in a row; two for a pair."""
    cells: list[Cell] = []
    for example in finding.examples:
        new = list(_cells_of(example))
        if len(cells) + len(new) <= EXAMPLES:
            cells += new
    yield from cells


def _cells_of(example: Example) -> Iterator[Cell]:
    yield Cell(
        example.image, example.image.id, f"{example.image.split} · {example.value}".rstrip(" ·")
    )
    if example.like is not None:
        of = ", other dataset" if example.like.other else ""
        yield Cell(example.like, example.like.id, f"{example.like.split}{of}")


def _height(finding: Finding, pictures: Pictures) -> int:
    return max(pictures[cell.shown].height for cell in _cells(finding))


def _wrapped(finding: Finding, width: int) -> list[str]:
    lines = [""]
    for word in f"{finding.meaning} {finding.todo}".split():
        if _font(12).getlength(f"{lines[-1]} {word}") > width - 12:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _fitted(text: str, width: int) -> str:
    """Shorten text in its middle, since names of images differ at their ends."""
    font = _font(12)
    if font.getlength(text) <= width:
        return text
    keep = len(text)
    while (
        keep > 2 and font.getlength(short := f"{text[: keep // 2]}…{text[-(keep // 2) :]}") > width
    ):
        keep -= 1
    return short


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # type: ignore[return-value]  # comes with Pillow, so any machine draws the same


def _stretched(planes: np.ndarray) -> np.ndarray:
    values = planes.astype(np.float32)
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, STRETCH) if finite.size else (0.0, 0.0)
    if high <= low:
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if high <= low:
        return np.zeros(planes.shape, np.uint8)
    return (
        np.nan_to_num((values - low) * (255 / (high - low)), nan=0)
        .clip(0, 255)
        .round()
        .astype(np.uint8)
    )
