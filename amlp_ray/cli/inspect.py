"""amlp-ray inspect: what a run aims at, masks and rebuilds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amlp_ray.cli.output import Json, print_facts, print_json, print_table


def inspect(
    run: Annotated[
        Path, typer.Argument(help="Folder of a pretraining run, or of one trial of a study.")
    ],
    data: Annotated[
        str | None, typer.Option(help="Patch dataset, by path or URI; none: the run's own.")
    ] = None,
    count: Annotated[int, typer.Option(help="Images of val; test is never read.")] = 8,
    epoch: Annotated[
        int | None, typer.Option(help="Whose masks and ratio; none: the latest, as the weights.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; none: inspect/ in the run's.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of masks and clusters; none: the run's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw held-out images as a run aims at, masks and rebuilds them, and tell how well."""
    from amlp_ray.analysis.inspect_run import FIGURES, inspect_run

    found = inspect_run(run, data=data, count=count, epoch=epoch, out=out, seed=seed)
    folder = out or run / "inspect"
    if as_json:
        print_json(found | {"sheet": str(folder / "sheet.png")})
        return
    print_facts({name: found[name] for name in ("variant", "data", "split", "epoch", "ratio")})
    if not found["own_data"]:
        typer.echo("not the data of the run: it may have been trained on some of these images")
    rows = [
        {"image": row["id"], **{name: row[name] for name in FIGURES}} for row in found["images"]
    ]
    typer.echo()
    print_table([*rows, {"image": "mean", **found["mean"]}])
    if found["metrics"]:
        typer.echo()
        print_table([{"metric": name, **values} for name, values in found["metrics"].items()])
    typer.echo(f"\npictures: {folder / 'sheet.png'}")
