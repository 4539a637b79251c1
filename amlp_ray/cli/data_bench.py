"""amlp-ray data bench: whether a model would wait for its data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from amlp_ray.cli.output import Json, print_json, print_table
from amlp_ray.cli.run_options import Set, load_config

COLUMNS = (
    "mode",
    "auto",
    "images_per_second",
    "model_images_per_second",
    "waiting",
    "restart_seconds",
    "first_batch_seconds",
    "failed",
)


def bench(
    dataset: Annotated[str, Argument(help="Patch dataset, by path or URI.")],
    config_file: Annotated[
        Path | None,
        Option("--config", help="YAML file of pretraining settings: the model to feed."),
    ] = None,
    assign: Set = None,
    batch_size: Annotated[
        int | None, Option(min=1, help="Images per step; none: as in the settings.")
    ] = None,
    seconds: Annotated[float, Option(min=0.1, help="Duration of each measurement.")] = 5.0,
    device: Annotated[
        str | None, Option(help="cpu or cuda; none: a GPU where there is one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how fast each way to read a dataset is, and whether a model would wait for it."""
    from amlp_ray.analysis.throughput import bench_reading
    from amlp_ray.config import PretrainConfig
    from amlp_ray.data.dataset import PatchDataset

    config = load_config(PretrainConfig, assign, config_file)
    patches = PatchDataset.open(dataset)
    config.check_image(patches.spec)
    rows = bench_reading(patches, config, batch_size=batch_size, seconds=seconds, device=device)
    if as_json:
        print_json(rows)
        return
    print_table([_table_row(row) for row in rows])
    typer.echo("x: the way that data=auto chooses here.")
    typer.echo("The model's own speed is measured on images that are in memory already.")


def _table_row(row: dict[str, Any]) -> dict[str, Any]:
    cells = {name: row.get(name) for name in COLUMNS}
    for name in ("images_per_second", "model_images_per_second"):
        if cells[name] is not None:
            cells[name] = f"{cells[name]:,.0f}"
    if cells["waiting"] is not None:
        cells["waiting"] = f"{cells['waiting']:.1%}"
    return cells
