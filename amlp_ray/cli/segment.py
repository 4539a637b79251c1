"""amlp-ray segment: fine-tune a segmenter and score it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amlp_ray.cli.output import Json, print_facts, print_json
from amlp_ray.cli.pretrain import Set
from amlp_ray.config import SegmentSettings
from amlp_ray.settings import from_assignments


def segment(
    data: Annotated[str, typer.Argument(help="Patch dataset with masks, by path or URI; any of the encoder's shape.")],
    encoder: Annotated[Path, typer.Option(help="encoder.safetensors of a pretraining run or trial.")],
    out: Annotated[Path, typer.Option(help="Folder for the segmenter and its score.")],
    from_scratch: Annotated[bool, typer.Option(help="The encoder's shape with random weights: the baseline.")] = False,
    assign: Set = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a segmenter on labelled training images and score it on validation: DSC, PPV, sensitivity.

    The encoder may be pretrained on another dataset; `amlp-ray data check A --against B` tells of images in both.
    """
    settings = from_assignments(SegmentSettings, {}, assign or [])

    import torch
    from tqdm import tqdm

    from amlp_ray.data.dataset import PatchDataset
    from amlp_ray.training.segment import segment as run

    dataset = PatchDataset.open(data)
    bar: tqdm | None = None  # drawn with the first epoch, so that an error stands alone

    def progress(metrics: dict[str, float]) -> None:
        nonlocal bar
        bar = bar if bar is not None else tqdm(total=settings.epochs, unit="epoch", dynamic_ncols=True)
        bar.set_postfix_str(f"loss {metrics['loss']:.4f}")
        bar.update()

    score = run(
        dataset,
        encoder,
        out,
        settings,
        from_scratch=from_scratch,
        progress=progress,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    if bar is not None:
        bar.close()
    shown = {name: value for name, value in score.items() if name != "per_image"}
    print_json(score) if as_json else print_facts(shown)
