"""amlp-ray pretrain: one pretraining run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from amlp_ray.cli.resources import (
    Accelerator,
    Address,
    CpusPerWorker,
    GpusPerWorker,
    MicroBatch,
    Placement,
    Retries,
    Workers,
    fault_tolerance_from,
    resources_of,
)
from amlp_ray.config import FaultToleranceConfig, PretrainConfig, TrackingConfig
from amlp_ray.config.base import build
from amlp_ray.config.overrides import build_with_overrides
from amlp_ray.config.yaml_file import read_yaml

Set = Annotated[
    list[str] | None, typer.Option("--set", help="name=value, such as ratio.start=0.3; repeatable.")
]


def pretrain(
    data: Annotated[str, typer.Argument(help="Patch dataset, by path or URI.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of the run; one that holds a run of the same settings is resumed."
        ),
    ],
    eval_data: Annotated[
        str | None, typer.Option(help="Another dataset, with masks: for pictures and diagnosis.")
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="YAML file of settings.")
    ] = None,
    assign: Set = None,
    workers: Workers = "1",
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = 0,
    accelerator: Accelerator = None,
    placement: Placement = "pack",
    micro_batch: MicroBatch = None,
    sharding: Annotated[
        str, typer.Option(help="Several workers: ddp, fsdp; auto: fsdp from ViT-L on.")
    ] = "auto",
    max_failures: Retries = FaultToleranceConfig().max_failures,
    address: Address = None,
    mlflow: Annotated[str | None, typer.Option(help="URI of an MLflow server or database.")] = None,
    wandb: Annotated[str | None, typer.Option(help="Project of Weights & Biases.")] = None,
) -> None:
    """Pretrain an encoder on the unlabelled training images: encoder.safetensors, metrics, pictures."""
    given = read_yaml(config_file) if config_file else {}
    build(
        PretrainConfig, given, str(config_file)
    )  # so that a fault of the file is told as the file's
    config = build_with_overrides(PretrainConfig, given, assign or [])
    resources = resources_of(
        workers,
        cpus_per_worker,
        gpus_per_worker,
        accelerator=accelerator,
        placement=placement,
        micro_batch=micro_batch,
        sharding=sharding,
        address=address,
    )
    tracking = build(TrackingConfig, {"mlflow": mlflow, "wandb": wandb}, "options")

    from amlp_ray.cli.progress import Progress, noted, resumable
    from amlp_ray.launch.launcher import pretrain_dataset
    from amlp_ray.utils.event_log import count_events

    progress, trained = Progress(config.epochs), False

    def report(metrics: dict[str, Any]) -> None:
        nonlocal trained
        trained = True
        progress.update(metrics)

    with resumable(out), noted(logging.getLogger("amlp_ray"), progress):
        encoder = pretrain_dataset(
            data,
            out,
            config,
            eval_data=eval_data,
            resources=resources,
            fault_tolerance=fault_tolerance_from(max_failures),
            tracking=tracking,
            address=address,
            report=report,
        )
    progress.close()
    if not trained:
        typer.echo(f"{out} was finished before: {config.epochs} epochs.")
    lost = {
        kind: count
        for kind, count in count_events(out).items()
        if kind not in ("started", "weights")
    }
    if lost:
        typer.echo(
            "borne: " + ", ".join(f"{kind} {count}x" for kind, count in sorted(lost.items()))
        )
    typer.echo(f"encoder: {encoder}")
    if (out / "pictures").is_dir():
        typer.echo(f"pictures: {out / 'pictures'}")
