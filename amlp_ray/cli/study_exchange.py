"""amlp-ray study export, import: trials out of a study, and into one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from amlp_ray.cli.output import Json, print_json
from amlp_ray.cli.study_options import File, Name, Runs, begun_or_not, opened


def export(
    name: Name,
    out: Annotated[Path, typer.Option(help="File to write.")],
    format: Annotated[
        str | None, typer.Option(help="csv, parquet or json; none: by the file's ending.")
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Write all trials with parameters, rungs, facts and provenance to a file."""
    from amlp_ray.study.operations.transfer import export_trials

    count = export_trials(opened(name, runs), out, format)
    typer.echo(f"{count} trials: {out}")


def import_(
    file: File,
    source: Annotated[str, typer.Argument(help="CSV file, or the name or folder of a study.")],
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Give a study trials of elsewhere as prior knowledge; they count neither in the budget nor as best."""
    from amlp_ray.study.operations.transfer import import_trials

    store, config = begun_or_not(file, runs)
    found = import_trials(store, config, source, runs=runs)
    if as_json:
        print_json(vars(found))
        return
    typer.echo(f"{len(found.taken)} trials taken into {config.name!r}, {found.known} known already")
    for reason, count in Counter(found.left_out.values()).most_common():
        first = next(name for name, why in found.left_out.items() if why == reason)
        typer.echo(
            f"left out {first}" + (f" and {count - 1} more" if count > 1 else "") + f": {reason}"
        )
    for note in found.notes:
        typer.echo(f"note: {note}")
