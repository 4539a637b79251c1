"""Fine-tune and score one run of a confirmation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from amlp_ray.config import SegmentConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.utils.files import atomic_write

SEGMENTER = "segmenter"  # folder of a run's fine-tuned segmenter


def finish_confirmation_run(
    folder: Path,
    labels: PatchDataset,
    finetune: SegmentConfig,
    *,
    sizes: tuple[float, float],
    device: str = "cpu",
) -> dict[str, Any]:
    """Fine-tune the encoder of a confirmation run, in its own process, and score it on val; finished once, it is kept.

    Args:
        labels: the data set that scores, which is the pretraining one where there is none apart.
        sizes: `probe.sizes`.

    Returns:
        The score, also written to `finetune.json`; the segmenter lies in a folder beside it.
    """
    from amlp_ray.evaluation.segmentation import segment

    done = folder / "finetune.json"
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    encoder = folder / "encoder.safetensors"
    score = segment(labels, encoder, folder / SEGMENTER, finetune, sizes=sizes, device=device)
    atomic_write(done, json.dumps(score | {"encoder": encoder.name}, indent=1))
    return score
