"""Draw examples, and the contact sheet: a row for each finding, as one PNG."""

from __future__ import annotations

import io
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from amlp_ray.data.check.finding import MAX_EXAMPLES, Finding, ImageRef
from amlp_ray.data.check.report import Report
from amlp_ray.data.prepare.near_duplicates import stretch_to_uint8
from amlp_ray.utils.files import atomic_write

SIDE = 160  # pixels of the longer side of a picture
GAP = 8
MARGIN = 20
LINE = 15
MIN_HEIGHT = 120
OUTLINE = (255, 176, 0)
COLORS = {"leak": (176, 32, 32), "warning": (166, 101, 0), "note": (60, 95, 140)}
INK = (31, 41, 51)
SOFT = (82, 96, 109)

Pictures = dict[ImageRef, Image.Image]


def draw_examples(report: Report) -> Pictures:
    """Draw every image that a finding shows, in stored order, so that a row group is read once."""
    images: set[ImageRef] = set()
    for finding in report.findings:
        for example in finding.examples:
            images.add(example.image)
            if example.like is not None:
                images.add(example.like)
    in_order = sorted(images, key=lambda image: (image.other, image.split, image.row))
    pictures: Pictures = {}
    for (is_other, split), refs in groupby(in_order, lambda image: (image.other, image.split)):
        dataset = report.against if is_other else report.dataset
        assert dataset is not None
        samples = dataset.split(split)
        for image in refs:
            sample = samples[image.row]
            pictures[image] = draw_picture(sample.image, sample.mask)
    return pictures


def draw_picture(image: np.ndarray, mask: np.ndarray | None) -> Image.Image:
    """Draw an image with the outline of its mask.

    Args:
        image: (C, H, W); three channels are RGB, of any other number the first is drawn.
        mask: (H, W) of 0 and 1, or None.
    """
    planes = image[:3] if image.shape[0] == 3 else image[:1]
    if planes.dtype != np.uint8:
        planes = stretch_to_uint8(planes.astype(np.float32))
    pixels = planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0)
    picture = Image.fromarray(pixels).convert("RGB")
    scale = SIDE / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    method = Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.BILINEAR
    picture = picture.resize(size, method)
    if mask is None or not mask.any():
        return picture
    lesion = Image.fromarray(mask * np.uint8(255))
    scaled_mask = np.asarray(lesion.resize(size, Image.Resampling.BILINEAR)) > 127
    if not scaled_mask.any():  # too small to survive
        scaled_mask = np.asarray(lesion.resize(size, Image.Resampling.BOX)) > 0
    drawn = np.array(picture)
    drawn[ndimage.binary_dilation(scaled_mask) & ~scaled_mask] = OUTLINE
    return Image.fromarray(drawn)


def write_sheet(report: Report, pictures: Pictures, file: Path) -> Path:
    """Write the contact sheet."""
    width = 2 * MARGIN + MAX_EXAMPLES * (SIDE + GAP) - GAP
    findings = [finding for finding in report.findings if finding.examples]
    height = 3 * MARGIN + 30
    for finding in findings:
        num_lines = len(_wrap(finding, width)) + 2
        height += 30 + LINE * num_lines + _row_height(finding, pictures) + MARGIN + 8
    sheet = Image.new("RGB", (width, max(height, MIN_HEIGHT)), "white")
    draw = ImageDraw.Draw(sheet)
    name = report.dataset.name
    if report.against is not None:
        name += f" against {report.against.name}"
    draw.text((MARGIN, MARGIN - 4), f"Check of {name}", fill=INK, font=_font(22))
    y = MARGIN + 38
    if not findings:
        draw.text((MARGIN, y), "No finding with examples.", fill=SOFT, font=_font(14))
    for finding in findings:
        y = _draw_title(draw, finding, y, width)
        y = _draw_cells(draw, sheet, finding, pictures, y)
    buffer = io.BytesIO()
    sheet.crop((0, 0, width, max(y, MIN_HEIGHT))).save(buffer, "PNG")
    atomic_write(file, buffer.getvalue())
    return file


def _draw_title(draw: ImageDraw.ImageDraw, finding: Finding, y: int, width: int) -> int:
    """Draw title, severity and explanation of a finding; return where the pictures begin."""
    color = COLORS[finding.severity]
    draw.rectangle((MARGIN, y + 3, MARGIN + 4, y + 20), fill=color)
    x = MARGIN + 12
    title = f"{finding.title}: {finding.count} of {finding.of} {finding.what}"
    draw.text((x, y), title, fill=INK, font=_font(17))
    end = x + draw.textlength(title, font=_font(17)) + 12
    draw.text((end, y + 3), finding.severity, fill=color, font=_font(13))
    y += 28
    for line in _wrap(finding, width):
        draw.text((x, y), line, fill=SOFT, font=_font(12))
        y += LINE
    return y + 6


def _draw_cells(
    draw: ImageDraw.ImageDraw, sheet: Image.Image, finding: Finding, pictures: Pictures, y: int
) -> int:
    """Draw the pictures of a finding with their captions; return where the next one begins."""
    bottom = y + _row_height(finding, pictures)
    for number, (image, text) in enumerate(_cells(finding)):
        x = MARGIN + number * (SIDE + GAP)
        sheet.paste(pictures[image], (x, y))
        draw.text((x, bottom + 2), _shorten(image.id, SIDE), fill=INK, font=_font(12))
        draw.text((x, bottom + 2 + LINE), _shorten(text, SIDE), fill=SOFT, font=_font(12))
    return bottom + 2 * LINE + MARGIN + 2


def _cells(finding: Finding) -> list[tuple[ImageRef, str]]:
    """List the pictures of a finding with their texts, as many as fit in a row; a pair has two."""
    cells: list[tuple[ImageRef, str]] = []
    for example in finding.examples:
        image, like = example.image, example.like
        pair = [(image, f"{image.split} · {example.value}".rstrip(" ·"))]
        if like is not None:
            origin = ", other dataset" if like.other else ""
            pair.append((like, f"{like.split}{origin}"))
        if len(cells) + len(pair) <= MAX_EXAMPLES:
            cells += pair
    return cells


def _row_height(finding: Finding, pictures: Pictures) -> int:
    return max(pictures[image].height for image, _ in _cells(finding))


def _wrap(finding: Finding, width: int) -> list[str]:
    """Break the explanation of a finding into lines that fit on a sheet of `width` pixels."""
    room = width - 2 * MARGIN - 12
    lines = [""]
    for word in f"{finding.meaning} {finding.todo}".split():
        if _font(12).getlength(f"{lines[-1]} {word}") > room:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _shorten(text: str, width: int) -> str:
    """Shorten text in its middle, because names of images differ at their ends."""
    font = _font(12)
    if font.getlength(text) <= width:
        return text
    for half in range(len(text) // 2, 1, -1):
        short = f"{text[:half]}…{text[-half:]}"
        if font.getlength(short) <= width:
            return short
    return f"{text[:1]}…{text[-1:]}"


def _font(size: int) -> ImageFont.FreeTypeFont:
    # The font comes with Pillow, so any machine draws the same.
    return ImageFont.load_default(size)  # type: ignore[return-value]
