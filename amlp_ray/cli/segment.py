"""amlp-ray segment: fine-tune a segmenter and score it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from amlp_ray.cli.output import Json, print_facts, print_json
from amlp_ray.cli.pretrain import Set
from amlp_ray.cli.resources import (
    Accelerator,
    Address,
    CpusPerWorker,
    GpusPerWorker,
    Placement,
    Retries,
    Workers,
    fault_tolerance_from,
    resources_of,
)
from amlp_ray.config import FaultToleranceConfig, SegmentConfig
from amlp_ray.config.overrides import build_with_overrides


def segment(
    data: Annotated[
        str,
        typer.Argument(
            help="Patch dataset with masks, by path or URI; any of the encoder's shape."
        ),
    ],
    encoder: Annotated[
        str,
        typer.Option(
            help="encoder.safetensors of a run, a timm checkpoint, or timm:NAME from the internet."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the segmenter; one of the same settings is resumed.")
    ],
    encoder_name: Annotated[
        str | None,
        typer.Option(help="The timm ViT of a timm checkpoint, such as vit_small_patch16_224."),
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option(help="The encoder's shape with random weights: the baseline.")
    ] = False,
    assign: Set = None,
    workers: Workers = "1",
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = 0,
    accelerator: Accelerator = None,
    placement: Placement = "pack",
    max_failures: Retries = FaultToleranceConfig().max_failures,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a segmenter on labelled training images and score it on validation: DSC, IoU, HD95 and more.

    The encoder may be pretrained on another dataset; `amlp-ray data check A --against B` tells of images in both.
    """
    config = build_with_overrides(SegmentConfig, {}, assign or [])
    resources = resources_of(
        workers,
        cpus_per_worker,
        gpus_per_worker,
        accelerator=accelerator,
        placement=placement,
        address=address,
    )

    import torch

    from amlp_ray.cli.progress import Progress, noted, resumable
    from amlp_ray.data.dataset import PatchDataset
    from amlp_ray.evaluation.segmentation import segment as run

    progress = Progress(config.epochs)
    with resumable(out), noted(logging.getLogger("amlp_ray"), progress):
        score = run(
            PatchDataset.open(data),
            encoder,
            out,
            config,
            name=encoder_name,
            from_scratch=from_scratch,
            resources=resources,
            fault_tolerance=fault_tolerance_from(max_failures),
            address=address,
            progress=progress.update,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    progress.close()
    if not progress.drawn:
        typer.echo(f"{out} was finished before: {config.epochs} epochs.", err=True)
    shown = {name: value for name, value in score.items() if name not in ("per_image", "per_group")}
    print_json(score) if as_json else print_facts(shown)
