"""amlp-ray predict: masks of new images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from amlp_ray.cli.output import Json, print_json
from amlp_ray.cli.pretrain import Set
from amlp_ray.config import PredictConfig
from amlp_ray.config.overrides import build_with_overrides

if TYPE_CHECKING:
    from tqdm import tqdm


def predict(
    images: Annotated[
        str, typer.Argument(help="Folder or URI of images, in any layout that can be prepared.")
    ],
    segmenter: Annotated[Path, typer.Option(help="Folder that `amlp-ray segment` made.")],
    out: Annotated[str, typer.Option(help="Folder or URI for the masks.")],
    probability: Annotated[
        bool, typer.Option(help="Write probabilities too, to OUT.probability.")
    ] = False,
    overlay: Annotated[
        bool, typer.Option(help="Draw outlines into the images too, in OUT.overlay.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option(help="Replace the predictions of another run in OUT.")
    ] = False,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Write a mask for every image: PNG for pictures and DICOM, NIfTI for volumes, of the same size and place.

    Masks in the folder are ignored. Run again, it goes on where it stopped. Files that cannot be used are listed in
    OUT.rejects.csv. `--set tiling=on` cuts large images into tiles; `amlp-ray settings predict` lists all settings.
    """
    base = {"probability": probability, "overlay": overlay}
    config = build_with_overrides(
        PredictConfig, {name: True for name, on in base.items() if on}, assign or []
    )

    import torch
    from tqdm import tqdm

    from amlp_ray.inference.predict import predict as run

    bar: tqdm | None = None  # drawn with the first image, so that an error stands alone

    def progress(done: int, of: int) -> None:
        nonlocal bar
        bar = (
            bar
            if bar is not None
            else tqdm(total=of, unit="image", dynamic_ncols=True, leave=False, disable=None)
        )
        bar.update(done - bar.n)

    made = run(
        images,
        segmenter,
        out,
        config,
        overwrite=overwrite,
        device="cuda" if torch.cuda.is_available() else "cpu",
        say=lambda sentence: None if as_json else typer.echo(sentence),
        progress=progress,
    )
    if bar is not None:
        bar.close()
    if as_json:
        print_json(made._asdict())
        return
    before = f"; {made.before} were there from before" if made.before else ""
    typer.echo(f"Wrote {made.out}: {made.predicted} predicted{before}.")
    if made.rejected:
        typer.echo(f"{made.rejected} files rejected, see {made.rejects}.")
