"""amlp-ray data check: what may be wrong with a patch dataset, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from amlp_ray.cli.output import Json, print_json, print_table

if TYPE_CHECKING:
    from amlp_ray.data.check import Report


def check(
    dataset: Annotated[str, Argument(help="Patch dataset, a folder or URI.")],
    against: Annotated[
        str | None,
        Option(help="Another patch dataset, such as the one pretrained on: finds images in both."),
    ] = None,
    out: Annotated[
        Path | None,
        Option(help="Folder for check.html and check.png; none: <dataset>.check beside it."),
    ] = None,
    strict: Annotated[
        bool, Option("--strict", help="Exit with 1 if there is a leak or a warning.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Look for leaks, doubtful labels and images, burned-in text and uneven splits."""
    from amlp_ray.data.check import check_dataset
    from amlp_ray.data.check.html import write_report

    report = check_dataset(dataset, against=against)
    folder = out or _default_folder(report)
    files = [] if folder is None else [str(file) for file in write_report(report, folder)]
    if as_json:
        print_json({**report.as_dict(), "files": files})
    else:
        _print_report(report, files)
    if strict and not report.clean:
        raise typer.Exit(1)


def _default_folder(report: Report) -> Path | None:
    """Return the folder beside a dataset on this machine; None for one in an object store."""
    root = report.dataset.root
    return root.local.with_name(f"{root.name}.check") if root.is_local else None


def _print_report(report: Report, files: Sequence[str]) -> None:
    rows: list[dict[str, Any]] = []
    for finding in report.findings:
        row: dict[str, Any] = {"kind": finding.severity, "finding": finding.title}
        row["count"] = f"{finding.count} of {finding.of} {finding.what}"
        examples = [example.image.id for example in finding.examples[:2]]
        row["examples"] = ", ".join(examples) or None
        row["what_to_do"] = finding.todo
        rows.append(row)
    if rows:
        print_table(rows)
    else:
        typer.echo("Nothing was found.")
    clear = ", ".join(finding.title.lower() for finding in report.clear)
    typer.echo(f"\nChecked, nothing found: {clear or 'none'}.")
    for finding in report.gaps:
        typer.echo(f"Not checked: {finding.title.lower()}, since {finding.gap}.")
    if files:
        typer.echo(f"See {files[0]} and {files[1]}; they hold images of the dataset.")
    else:
        typer.echo("Give --out FOLDER to write pictures and a page.")
