"""Write the page of a check: one HTML file that needs no network and no server."""

from __future__ import annotations

import base64
import io
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from amlp_ray.data.check.contact_sheet import Pictures, draw_examples, write_sheet
from amlp_ray.data.check.finding import SEVERITIES, ImageRef
from amlp_ray.data.check.report import Report
from amlp_ray.data.manifest import SPLITS
from amlp_ray.errors import DataError
from amlp_ray.utils.files import atomic_write, local_path

TEMPLATES = Path(__file__).parent
ADVICE = {
    "leak": "Scores on this dataset would be too good: see the leaks first.",
    "warning": "Look at the warnings before you train.",
    "note": "Nothing stands in the way; the notes are worth a look.",
    "clear": "Nothing was found.",
}


def write_report(report: Report, folder: str | Path) -> tuple[Path, Path]:
    """Write check.html and check.png into a folder, which is created; return their paths.

    Both hold images of the dataset: they are as private as it is.

    Raises:
        DataError: the folder cannot be written, or a part of the dataset is damaged.
    """
    folder = local_path(folder)
    pictures = draw_examples(report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        page = write_page(report, pictures, folder / "check.html")
        sheet = write_sheet(report, pictures, folder / "check.png")
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written ({error.strerror}); choose another with --out."
        ) from None
    return page, sheet


def write_page(report: Report, pictures: Pictures, file: Path) -> Path:
    """Write the page with its pictures inside."""
    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    style = Markup((TEMPLATES / "check.css").read_text(encoding="utf-8"))  # not escaped
    text = jinja.get_template("check.html").render(
        css=style,
        report=report,
        header=_header(report),
        verdict=_verdict(report),
        pictures={_key(image): _data_uri(picture) for image, picture in pictures.items()},
        key=_key,
    )
    atomic_write(file, text)
    return file


def _header(report: Report) -> list[tuple[str, str]]:
    manifest = report.dataset.manifest
    counts = ", ".join(f"{manifest.counts[split].images} {split}" for split in SPLITS)
    labeled = sum(manifest.counts[split].labeled for split in SPLITS)
    size = f"{manifest.channels} x {manifest.height} x {manifest.width} {manifest.dtype}"
    rows = [
        ("Dataset", report.dataset.path),
        ("Images", f"{counts}; {labeled} labeled; {size}"),
        ("Groups", manifest.group_rule),
        ("Splits", manifest.split_rule),
    ]
    if report.against is not None:
        rows.append(("Against", report.against.path))
    return [*rows, ("Checked", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"))]


def _verdict(report: Report) -> dict[str, Any]:
    """Return a sentence for the top of the page, and the severity that colors it."""
    counts = Counter(finding.severity for finding in report.findings)
    present = [severity for severity in SEVERITIES if counts[severity]]
    if not present:
        return {"kind": "clear", "text": ADVICE["clear"]}
    words = []
    for severity in present:
        plural = "s" if counts[severity] > 1 else ""
        words.append(f"{counts[severity]} {severity}{plural}")
    return {"kind": present[0], "text": f"{', '.join(words)}. {ADVICE[present[0]]}"}


def _key(image: ImageRef) -> str:
    return f"{int(image.other)}/{image.split}/{image.row}"


def _data_uri(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
