"""The page of a check: one HTML file that needs no network and no server."""

from __future__ import annotations

import base64
import io
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from amlp_ray.data.check.contact_sheet import Pictures
from amlp_ray.data.check.finding import SEVERITIES, Shown
from amlp_ray.data.manifest import SPLITS
from amlp_ray.utils.files import atomic_write

if TYPE_CHECKING:
    from amlp_ray.data.check.report import Report

HERE = Path(__file__).parent


def write_page(report: Report, pictures: Pictures, file: Path) -> Path:
    """Write the page with the pictures in it."""
    # Everything is escaped but the style sheet.
    jinja = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = jinja.get_template("check.html").render(
        css=Markup((HERE / "check.css").read_text(encoding="utf-8")),
        report=report,
        header=_header(report),
        verdict=_verdict(report),
        pictures={_key(shown): _uri(picture) for shown, picture in pictures.items()},
        key=_key,
    )
    atomic_write(file, text)
    return file


def _header(report: Report) -> list[tuple[str, str]]:
    m = report.dataset.manifest
    counts = ", ".join(f"{m.counts[split].images} {split}" for split in SPLITS)
    labeled = sum(m.counts[split].labeled for split in SPLITS)
    rows = [
        ("Dataset", report.dataset.path),
        (
            "Images",
            f"{counts}; {labeled} labelled; {m.channels} x {m.height} x {m.width} {m.dtype}",
        ),
        ("Groups", m.group_rule),
        ("Splits", m.split_rule),
    ]
    if report.against is not None:
        rows.append(("Against", report.against.path))
    return [*rows, ("Checked", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"))]


def _verdict(report: Report) -> dict[str, Any]:
    """A sentence for the top of the page, and the severity that colours it."""
    counts = {
        severity: sum(f.severity == severity for f in report.findings) for severity in SEVERITIES
    }
    told = ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in counts.items() if n)
    worst = next((name for name, n in counts.items() if n), "clear")
    sentences = {
        "leak": "Scores on this dataset would be too good: see the leaks first.",
        "warning": "Look at the warnings before you train.",
        "note": "Nothing stands in the way; the notes are worth a look.",
        "clear": "Nothing was found.",
    }
    return {"kind": worst, "text": f"{told}. {sentences[worst]}" if told else sentences[worst]}


def _key(shown: Shown) -> str:
    return f"{int(shown.other)}/{shown.split}/{shown.row}"


def _uri(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
