"""amlp-ray inspect: which patches a run selects, masks and reconstructs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from amlp_ray.cli.output import Json, print_fields, print_json, print_table


def inspect(
    run: Annotated[Path, Argument(help="Folder of a pretraining run, or of one trial of a study.")],
    data: Annotated[
        str | None, Option(help="Patch dataset, by path or URI; none: the run's own.")
    ] = None,
    count: Annotated[int, Option(help="Images of val; test is never read.")] = 8,
    epoch: Annotated[
        int | None, Option(help="Epoch of masks and ratio; none: the latest, as the weights.")
    ] = None,
    out: Annotated[
        Path | None, Option(help="Folder for the pictures; none: inspect/ in the run's.")
    ] = None,
    seed: Annotated[
        int | None, Option(help="Seed of masks and clusters; none: the run's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw held-out images with a run's masks and reconstructions, and measure both."""
    from amlp_ray.analysis.inspect_run import FIGURES, inspect_run

    inspection = inspect_run(run, data=data, count=count, epoch=epoch, out=out, seed=seed)
    sheet = (out or run / "inspect") / "sheet.png"
    if as_json:
        print_json(inspection | {"sheet": str(sheet)})
        return
    header = ("variant", "data", "split", "epoch", "ratio")
    print_fields({name: inspection[name] for name in header})
    if not inspection["own_data"]:
        typer.echo("not the data of the run: it may have been trained on some of these images")
    rows = []
    for image in inspection["images"]:
        rows.append({"image": image["id"]} | {name: image[name] for name in FIGURES})
    rows.append({"image": "mean"} | inspection["mean"])
    typer.echo()
    print_table(rows)
    if inspection["metrics"]:
        typer.echo()
        metrics = inspection["metrics"].items()
        print_table([{"metric": name} | values for name, values in metrics])
    typer.echo(f"\npictures: {sheet}")
