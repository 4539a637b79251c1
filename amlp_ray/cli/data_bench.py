"""amlp-ray data bench: whether a model would wait for its data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from amlp_ray.cli.output import Json, print_json, print_table
from amlp_ray.config import PretrainConfig
from amlp_ray.config.overrides import build_with_overrides
from amlp_ray.config.yaml_file import read_yaml


def bench(
    dataset: Annotated[str, typer.Argument(help="Patch dataset, by path or URI.")],
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="YAML file of pretraining settings: the model to feed."),
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value, such as model.width=384; repeatable."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per step; none: as the settings say.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to measure each way for.")] = 5.0,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; none: a GPU where there is one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure images per second of each way to read a dataset, and the share of its time that a model would wait."""
    from amlp_ray.analysis.throughput import bench as measured
    from amlp_ray.data.dataset import PatchDataset

    config = build_with_overrides(
        PretrainConfig, read_yaml(config_file) if config_file else {}, assign or []
    )
    opened = PatchDataset.open(dataset)
    config.check_image(opened.spec)
    rows = measured(opened, config, batch_size=batch_size, seconds=seconds, device=device)
    if as_json:
        print_json(rows)
        return
    print_table([_shown(row) for row in rows])
    typer.echo(
        "x: what data=auto takes here. The model's own pace is on images that are in memory already."
    )


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    names = ("mode", "auto", "images_per_second", "model_images_per_second", "waiting")
    shown = {
        name: row.get(name) for name in (*names, "restart_seconds", "first_batch_seconds", "failed")
    }
    for name in ("images_per_second", "model_images_per_second"):
        shown[name] = None if shown[name] is None else f"{shown[name]:,.0f}"
    shown["waiting"] = None if shown["waiting"] is None else f"{shown['waiting']:.1%}"
    return shown
