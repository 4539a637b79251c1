"""amlp-ray pretrain: one pretraining run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    build_fault_tolerance,
    build_resources,
)

Data = Annotated[str, typer.Argument(help="Patch dataset, by path or URI.")]
Out = Annotated[
    Path, typer.Option(help="Folder of the run; an unfinished run of equal settings is resumed.")
]
EvalData = Annotated[
    str | None, typer.Option(help="Another dataset, with masks: for pictures and diagnostics.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")]
MLflow = Annotated[str | None, typer.Option(help="URI of an MLflow server or database.")]
WandB = Annotated[str | None, typer.Option(help="Project of Weights & Biases.")]


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
    """Pretrain an encoder on unlabelled images: encoder.safetensors, metrics, pictures."""
    from amlp_ray.config import PretrainConfig, TrackingConfig
    from amlp_ray.config.base import build
    from amlp_ray.config.overrides import build_with_overrides
    from amlp_ray.config.yaml_file import read_yaml

    values = read_yaml(config_file) if config_file else {}
    config = build_with_overrides(PretrainConfig, values, assign or [])
    resources = build_resources(
        workers,
        cpus_per_worker,
        gpus_per_worker,
        accelerator=accelerator,
        placement=placement,
        address=address,
        micro_batch=micro_batch,
        sharding=sharding,
    )
    fault_tolerance = build_fault_tolerance(max_failures)
    tracking = build(TrackingConfig, {"mlflow": mlflow, "wandb": wandb}, "options")

    from amlp_ray.cli.progress import EpochProgress, resumable
    from amlp_ray.launch.launcher import pretrain_dataset

    with resumable(out), EpochProgress(config.epochs) as progress:
        encoder = pretrain_dataset(
            data,
            out,
            config,
            eval_data=eval_data,
            resources=resources,
            fault_tolerance=fault_tolerance,
            tracking=tracking,
            address=address,
            report=progress.update,
        )
    if not progress.was_updated:
        typer.echo(f"{out} was finished before: {config.epochs} epochs.")
    _print_events(out)
    typer.echo(f"encoder: {encoder}")
    if (out / "pictures").is_dir():
        typer.echo(f"pictures: {out / 'pictures'}")


def _print_events(out: Path) -> None:
    """Print how often the run recovered, by kind of event."""
    from amlp_ray.utils.event_log import count_events

    counts = count_events(out)
    events = []
    for kind in sorted(counts):
        if kind not in ("started", "weights"):
            events.append(f"{kind} ({counts[kind]})")
    if events:
        typer.echo(f"recovered: {', '.join(events)}")
