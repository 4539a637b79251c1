"""amlp-ray pretrain: one pretraining run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from amlp_ray.config import PretrainSettings, ResourceSettings
from amlp_ray.settings import build, from_assignments, read_yaml

Set = Annotated[list[str] | None, typer.Option("--set", help="name=value, such as ratio.start=0.3; repeatable.")]


def pretrain(
    data: Annotated[str, typer.Argument(help="Patch dataset, by path or URI.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; one that holds a run of the same settings is resumed.")],
    labels: Annotated[str | None, typer.Option(help="Another dataset, with masks: for pictures and diagnosis.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    assign: Set = None,
    workers: Annotated[int, typer.Option(help="Ray Train workers; 1 trains in this process, without Ray.")] = 1,
    cpus_per_worker: Annotated[float | None, typer.Option(help="None: all cores, shared by the workers.")] = None,
    gpus_per_worker: Annotated[float, typer.Option(help="With several workers; one worker takes a GPU it sees.")] = 0,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join, with several workers.")] = None,
) -> None:
    """Pretrain an encoder on the unlabelled training images: encoder.safetensors, metrics, pictures."""
    given = read_yaml(config) if config else {}
    build(PretrainSettings, given, str(config))  # so that a fault of the file is told as the file's
    settings = from_assignments(PretrainSettings, given, assign or [])

    cores = os.cpu_count() or 1
    if cpus_per_worker is None:
        # Below whole cores for a group: its controller needs a sliver too.
        cpus_per_worker = cores if workers == 1 else 0.9 * cores / max(1, workers)
    resources = build(
        ResourceSettings,
        {
            "workers": workers,
            "cpus_per_worker": cpus_per_worker,
            "gpus_per_worker": gpus_per_worker,
        },
        "pretrain",
    )
    from tqdm import tqdm

    from amlp_ray.training.runners import pretrain_dataset

    bar: tqdm | None = None  # drawn with the first epoch, so that an error stands alone

    def report(metrics: dict[str, Any]) -> None:
        nonlocal bar
        bar = bar if bar is not None else tqdm(total=settings.epochs, unit="epoch", dynamic_ncols=True)
        if metrics["epoch"]:  # 0: the random encoder of variant=scratch, which is not trained
            bar.set_postfix_str(
                f"loss {metrics['loss']:.4f}, ratio {metrics['ratio']:.2f}, "
                f"{metrics['images_per_second']:.0f} img/s, waiting {metrics['wait_share']:.0%}"
            )
            bar.update(metrics["epoch"] - bar.n)

    encoder = pretrain_dataset(data, out, settings, labels=labels, resources=resources, address=address, report=report)
    if bar is None:
        typer.echo(f"{out} was finished before: {settings.epochs} epochs.")
    else:
        bar.close()
    typer.echo(f"encoder: {encoder}")
    if (out / "pictures").is_dir():
        typer.echo(f"pictures: {out / 'pictures'}")
