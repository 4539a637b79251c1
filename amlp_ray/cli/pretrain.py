"""amlp-ray pretrain: one pretraining run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from amlp_ray.cli.run_options import (
    DEFAULT_MAX_FAILURES,
    Accelerator,
    Address,
    CpusPerWorker,
    GpusPerWorker,
    MaxFailures,
    MicroBatch,
    Placement,
    Set,
    Sharding,
    Workers,
    build_resources,
    load_config,
)

Data = Annotated[str, Argument(help="Patch dataset, by path or URI.")]
Out = Annotated[
    Path, Option(help="Folder of the run; an unfinished run of equal settings is resumed.")
]
EvalData = Annotated[
    str | None, Option(help="Another dataset, with masks: for pictures and diagnostics.")
]
ConfigFile = Annotated[Path | None, Option("--config", help="YAML file of settings.")]
MLflow = Annotated[str | None, Option(help="URI of an MLflow server or database.")]
WandB = Annotated[str | None, Option(help="Project of Weights & Biases.")]


def pretrain(
    data: Data,
    out: Out,
    eval_data: EvalData = None,
    config_file: ConfigFile = None,
    assign: Set = None,
    workers: Workers = "1",
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = 0,
    accelerator: Accelerator = None,
    placement: Placement = "pack",
    micro_batch: MicroBatch = None,
    sharding: Sharding = "auto",
    max_failures: MaxFailures = DEFAULT_MAX_FAILURES,
    address: Address = None,
    mlflow: MLflow = None,
    wandb: WandB = None,
) -> None:
    """Pretrain an encoder on unlabeled images: encoder.safetensors, metrics, pictures."""
    from amlp_ray.config import PretrainConfig, TrackingConfig
    from amlp_ray.config.base import build

    config = load_config(PretrainConfig, assign, config_file)
    resources, fault_tolerance = build_resources(
        address,
        max_failures,
        workers,
        cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
        accelerator=accelerator,
        placement=placement,
        micro_batch=micro_batch,
        sharding=sharding,
    )
    tracking = build(TrackingConfig, {"mlflow": mlflow, "wandb": wandb}, "options")

    from amlp_ray.cli.progress import run_progress
    from amlp_ray.launch.launcher import pretrain_dataset

    with run_progress(out, config.epochs) as report:
        encoder = pretrain_dataset(
            data,
            out,
            config,
            eval_data=eval_data,
            resources=resources,
            fault_tolerance=fault_tolerance,
            tracking=tracking,
            address=address,
            report=report,
        )
    _print_events(out)
    typer.echo(f"encoder: {encoder}")
    if (out / "pictures").is_dir():
        typer.echo(f"pictures: {out / 'pictures'}")


def _print_events(out: Path) -> None:
    """Print how often the run recovered, by kind of event."""
    from amlp_ray.utils.event_log import count_events

    counts = sorted(count_events(out).items())
    events = [f"{kind} ({count})" for kind, count in counts if kind not in ("started", "weights")]
    if events:
        typer.echo(f"recovered: {', '.join(events)}")
