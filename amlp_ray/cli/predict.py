"""amlp-ray predict: masks of new images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from amlp_ray.cli.output import Json, print_json
from amlp_ray.cli.run_options import Set
from amlp_ray.utils.text import counted


def predict(
    images: Annotated[
        str, Argument(help="Folder or URI of images, in any layout that can be prepared.")
    ],
    segmenter: Annotated[Path, Option(help="Folder that `amlp-ray segment` made.")],
    out: Annotated[str, Option(help="Folder or URI for the masks.")],
    probability: Annotated[
        bool, Option(help="Also write probabilities, to OUT.probability.")
    ] = False,
    overlay: Annotated[
        bool, Option(help="Also draw outlines into the images, in OUT.overlay.")
    ] = False,
    overwrite: Annotated[
        bool, Option(help="Replace the predictions of another run in OUT.")
    ] = False,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Write a mask for every image: PNG for pictures and DICOM, NIfTI for volumes.

    Masks have the size and position of their images. Masks in the folder are ignored. The same
    command resumes after an interruption. Files that cannot be used are listed in OUT.rejects.csv.
    `--set tiling=on` cuts large images into tiles; `amlp-ray settings predict` lists all settings.
    """
    from amlp_ray.config import PredictConfig
    from amlp_ray.config.overrides import build_with_overrides

    switches = {"probability": probability, "overlay": overlay}
    config = build_with_overrides(PredictConfig, switches, assign or [])

    from amlp_ray.cli.progress import count_progress
    from amlp_ray.inference.predict import predict as run
    from amlp_ray.runtime.worker_group import this_process

    with count_progress() as update:
        predictions = run(
            images,
            segmenter,
            out,
            config,
            overwrite=overwrite,
            device=this_process().device,
            progress=lambda done, total: update("images", done, total),
        )
    if as_json:
        print_json(predictions._asdict())
        return
    before = f"; {predictions.before} were there from before" if predictions.before else ""
    typer.echo(f"Wrote {predictions.out}: {predictions.predicted} predicted{before}.")
    if predictions.rejected:
        typer.echo(f"{counted(predictions.rejected, 'file')} rejected, see {predictions.rejects}.")
