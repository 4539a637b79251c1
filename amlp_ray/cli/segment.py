"""amlp-ray segment: fine-tune a segmenter and score it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from amlp_ray.cli.output import Json, print_fields, print_json
from amlp_ray.cli.run_options import (
    DEFAULT_MAX_FAILURES,
    Accelerator,
    Address,
    CpusPerWorker,
    GpusPerWorker,
    MaxFailures,
    Placement,
    Set,
    Workers,
    build_resources,
    load_config,
)

Data = Annotated[
    str, Argument(help="Patch dataset with masks, by path or URI; any of the encoder's shape.")
]
Encoder = Annotated[
    str,
    Option(help="encoder.safetensors of a run, a timm checkpoint, or timm:NAME from the internet."),
]
Out = Annotated[Path, Option(help="Folder of the segmenter; one of equal settings is resumed.")]
EncoderName = Annotated[
    str | None, Option(help="The timm ViT of a timm checkpoint, such as vit_small_patch16_224.")
]
FromScratch = Annotated[bool, Option(help="The encoder's shape with random weights: the baseline.")]


def segment(
    data: Data,
    encoder: Encoder,
    out: Out,
    encoder_name: EncoderName = None,
    from_scratch: FromScratch = False,
    assign: Set = None,
    workers: Workers = "1",
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = 0,
    accelerator: Accelerator = None,
    placement: Placement = "pack",
    max_failures: MaxFailures = DEFAULT_MAX_FAILURES,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a segmenter on labeled training images and score it on validation images.

    Scores are DSC, IoU, HD95 and more of images with a lesion, and the share of images without one
    in which none is predicted. The encoder may be pretrained on another dataset;
    `amlp-ray data check A --against B` finds images that are in both.
    """
    from amlp_ray.config import SegmentConfig

    config = load_config(SegmentConfig, assign)
    resources, fault_tolerance = build_resources(
        address,
        max_failures,
        workers,
        cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
        accelerator=accelerator,
        placement=placement,
    )

    from amlp_ray.cli.progress import run_progress
    from amlp_ray.evaluation.segmentation import segment as run
    from amlp_ray.runtime.worker_group import this_process

    with run_progress(out, config.epochs, err=True) as report:
        scores = run(
            data,
            encoder,
            out,
            config,
            name=encoder_name,
            from_scratch=from_scratch,
            resources=resources,
            fault_tolerance=fault_tolerance,
            address=address,
            progress=report,
            device=this_process().device,
        )
    if as_json:
        print_json(scores)
    else:
        details = ("per_image", "per_group")
        print_fields({name: value for name, value in scores.items() if name not in details})
