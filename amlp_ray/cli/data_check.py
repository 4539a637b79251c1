"""amlp-ray data check: what may be wrong with a patch dataset, before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amlp_ray.cli.output import Json, print_json, print_table

if TYPE_CHECKING:
    from amlp_ray.data.check import Report


def check(
    dataset: Annotated[str, typer.Argument(help="Patch dataset, a folder or URI.")],
    against: Annotated[
        str | None,
        typer.Option(
            help="Another patch dataset, such as the one pretrained on: tells images in both."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for check.html and check.png; none: <dataset>.check beside it."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Leave with 1 if there is a leak or a warning.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Look for leaks, doubtful labels and images, burnt-in text and uneven splits; show examples."""
    from amlp_ray.data.check import check_dataset

    report = check_dataset(
        dataset, against=against, progress=lambda sentence: typer.echo(sentence, err=True)
    )
    folder = out or _beside(report)
    files = [] if folder is None else [str(file) for file in report.write(folder)]
    print_json({**report.as_dict(), "files": files}) if as_json else _print(report, files)
    if strict and not report.clean:
        raise typer.Exit(1)


def _beside(report: Report) -> Path | None:
    """The folder beside a dataset on this machine; None for one in an object store."""
    place = report.dataset.place
    return place.local.with_name(f"{place.name}.check") if place.is_local else None


def _print(report: Report, files: list[str]) -> None:
    rows: list[dict[str, Any]] = [
        {
            "kind": finding.severity,
            "finding": finding.title,
            "count": f"{finding.count} of {finding.of} {finding.what}",
            "examples": ", ".join(example.image.id for example in finding.examples[:2]) or None,
            "what_to_do": finding.todo,
        }
        for finding in report.findings
    ]
    if rows:
        print_table(rows)
    else:
        typer.echo("Nothing was found.")
    typer.echo(
        f"\nLooked for and not found: {', '.join(f.title.lower() for f in report.clear) or 'nothing'}."
    )
    for finding in report.gaps:
        typer.echo(f"Not looked for: {finding.title.lower()}, since {finding.gap}.")
    if files:
        typer.echo(f"See {files[0]} and {files[1]}; they hold images of the dataset.")
    else:
        typer.echo("Pictures and a page are written with --out FOLDER.")
