"""Fine-tune and score one run of a confirmation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amlp_ray.config import SegmentConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.training.checkpoint.export import ENCODER
from amlp_ray.utils.files import atomic_write
from amlp_ray.utils.json_files import read_json, seal_json

SEGMENTER = "segmenter"  # folder of a run's fine-tuned segmenter


def finish_confirmation_run(
    folder: Path,
    eval_data: PatchDataset,
    finetune: SegmentConfig,
    *,
    sizes: tuple[float, float],
    device: str = "cpu",
) -> dict[str, Any]:
    """Fine-tune the encoder of a confirmation run in this process, and score it on val.

    A finished run is not repeated.

    Args:
        folder: of the run.
        eval_data: the dataset that scores; the pretraining dataset if there is no other.
        sizes: `probe.sizes`.

    Returns:
        The score, also in `finetune.json`; the segmenter lies in a folder beside it.
    """
    # Imports Ray, which a caller that only needs SEGMENTER does without.
    from amlp_ray.evaluation.segmentation import segment

    path = folder / "finetune.json"
    if (finished := read_json(path)) is not None:
        return finished
    score = segment(
        eval_data, folder / ENCODER, folder / SEGMENTER, finetune, sizes=sizes, device=device
    )
    score |= {"encoder": ENCODER}
    atomic_write(path, seal_json(score))
    return score
