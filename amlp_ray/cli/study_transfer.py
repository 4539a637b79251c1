"""amlp-ray study export, import: copy trials out of a study, and into one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from amlp_ray.cli.output import Json, print_json
from amlp_ray.cli.study_options import (
    DEFAULT_RUNS,
    AllowCode,
    File,
    Name,
    Runs,
    find_study,
    open_store,
)
from amlp_ray.utils.text import counted


def export(
    name: Name,
    out: Annotated[Path, Option(help="File to write.")],
    format: Annotated[
        str | None, Option(help="csv, parquet or json; none: by the file's suffix.")
    ] = None,
    runs: Runs = DEFAULT_RUNS,
) -> None:
    """Write all trials with parameters, scores at rungs, figures and provenance to a file."""
    from amlp_ray.study.operations.transfer import export_trials

    count = export_trials(open_store(name, runs), out, format)
    typer.echo(f"{counted(count, 'trial')}: {out}")


def import_(
    file: File,
    source: Annotated[str, Argument(help="CSV file, or the name or folder of a study.")],
    runs: Runs = DEFAULT_RUNS,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Import trials as prior knowledge; they count neither in the budget nor as best."""
    from amlp_ray.study.operations.transfer import import_trials

    store, config = find_study(file, runs, allow_code=allow_code)
    imported = import_trials(store, config, source, runs=runs, allow_code=allow_code)
    if as_json:
        print_json(vars(imported))
        return
    typer.echo(
        f"{counted(len(imported.taken), 'trial')} imported into {config.name!r}, "
        f"{imported.known} known already"
    )
    for reason, count in Counter(imported.left_out.values()).most_common():
        first = next(name for name, text in imported.left_out.items() if text == reason)
        others = f" and {count - 1} more" if count > 1 else ""
        typer.echo(f"skipped {first}{others}: {reason}")
    for note in imported.notes:
        typer.echo(f"note: {note}")
