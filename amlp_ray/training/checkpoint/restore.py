"""Use a run's checkpoints: resume it, load its model, or fork another run from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.config.overrides import flatten
from amlp_ray.config.yaml_file import read_record
from amlp_ray.errors import CheckpointError
from amlp_ray.method.autoencoder import MaskedAutoencoder, build_autoencoder
from amlp_ray.training.checkpoint.manager import (
    State,
    checkpoints,
    epoch_of,
    is_intact,
    latest,
    read_checkpoint,
    write_checkpoint,
)
from amlp_ray.training.loggers.metrics_file import read_rows, to_text
from amlp_ray.utils import distributed
from amlp_ray.utils.event_log import EventLog
from amlp_ray.utils.files import atomic_write

# What a running model can change, and why: no weight gets another shape, the optimizer has no copy
# of it, and nothing that was done before would have been done at another epoch (as with loss.warmup
# or selection.analysis_interval).
PERTURBABLE: dict[str, str] = {
    "lr": "every step sets it anew, times warm-up and cosine",
    "clip_grad": "used in a step and forgotten",
    "intensity_jitter": "images are recolored step by step",
    "selection.strength": "masks are drawn step by step from scores that it does not change",
    "selection.lesion_share": "masks are drawn step by step",
    "selection.score_share_start": "as lesion_share",
    "selection.score_share_end": "as lesion_share",
    "loss.mix": "the loss has no memory",
    "loss.temperature": "as mix",
    "loss.gamma": "as mix",
    "loss.clip_min": "as mix",
    "loss.clip_max": "as mix",
    "loss.ccl_difficulty_share": "as mix",
    "loss.ccl_weight": "above 0, where the model has its head",
    "loss.ranking_weight": "above 0, where the model has its decoder",
}
# Weights of losses that need a part of the model; at 0 the model lacks it.
HEAD_WEIGHTS = ("loss.ccl_weight", "loss.ranking_weight")


def load_latest_on_all(folder: Path, events: EventLog, device: str) -> tuple[State, Path] | None:
    """Read the newest undamaged checkpoint, the same on all workers.

    The first worker chooses it, and all read it.

    Raises:
        CheckpointError: all are damaged, or a worker does not see the chosen one.
    """
    checkpoint = latest(folder, events) if distributed.rank() == 0 else None
    epoch = checkpoint[0]["epoch"] if checkpoint else 0
    epoch = distributed.broadcast_from_rank0(epoch, device)
    if checkpoint is not None or epoch == 0:
        return checkpoint
    for path in checkpoints(folder):
        if epoch_of(path) == epoch and is_intact(path):
            return read_checkpoint(path), path
    raise CheckpointError(
        f"{folder} has a checkpoint of epoch {epoch} on the first worker's node, but not on this "
        f"one; put the run into a folder that all nodes see."
    )


def read_run_config(folder: Path) -> PretrainConfig:
    """Read the config of the run in `folder`.

    Raises:
        CheckpointError: there is no run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        problem = "has no config.yaml" if folder.is_dir() else "does not exist"
        raise CheckpointError(
            f"{folder} {problem}; give the folder of a pretraining run or of one trial of a study."
        )
    return read_record(PretrainConfig, path)


def load_model(
    folder: Path, config: PretrainConfig, spec: ImageSpec
) -> tuple[MaskedAutoencoder, int]:
    """Load a run's latest model, with its teacher and centroids, for images of `spec`.

    Returns:
        The model in evaluation mode, and the epoch it was saved after.

    Raises:
        CheckpointError: there is no checkpoint, all are damaged, or the latest belongs to images of
            another shape.
    """
    checkpoint = latest(folder)
    if checkpoint is None:
        raise CheckpointError(f"{folder} has no checkpoint: the run has not finished an epoch yet.")
    state, path = checkpoint
    model = build_autoencoder(config, spec)
    try:
        model.load_state_dict(state["weight_ema"] if "weight_ema" in state else state["model"])
    except RuntimeError:
        raise CheckpointError(
            f"{path} was written for images of another size or number of channels; give the data "
            f"of the run."
        ) from None
    return model.eval(), state["epoch"]


def fork_checkpoint(source: Path, target: Path, config: PretrainConfig) -> int:
    """Let a run in `target` continue, with another config, from the run in `source`.

    The checkpoint is copied with the new config in it. The metrics up to its epoch are copied
    before it, marked `inherited`: a kill in between leaves no checkpoint, and the fork is repeated.
    `source` is only read.

    Returns:
        The epoch of the checkpoint.

    Raises:
        CheckpointError: `source` has no undamaged checkpoint, or differs in what no running model
            can change.
    """
    checkpoint = latest(source)
    if checkpoint is None:
        raise CheckpointError(f"{source} has no checkpoint to fork; run it first.")
    state, path = checkpoint
    old = flatten(state["config"])
    new = flatten(config.model_dump(mode="json"))
    changed = [name for name in new if old.get(name) != new[name]]
    refused = [name for name in changed if not _can_change(name, old, new)]
    if refused:
        raise CheckpointError(
            f"{path} cannot continue with another {', '.join(refused)}: a running model takes "
            f"another ratio, {', '.join(PERTURBABLE)}, where a part of it is neither added nor "
            f"dropped; start a run of its own."
        )
    target.mkdir(parents=True, exist_ok=True)
    rows = [
        row | {"inherited": True}
        for row in read_rows(source / "metrics.jsonl")
        if row["epoch"] <= state["epoch"]
    ]
    atomic_write(target / "metrics.jsonl", to_text(rows))
    write_checkpoint(target, state | {"config": config.model_dump(mode="json")}, state["epoch"])
    return int(state["epoch"])


def _can_change(name: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    if name in HEAD_WEIGHTS:
        return bool(old.get(name)) and bool(new[name])
    # How images are read does not change the result.
    return name in PERTURBABLE or name.startswith("ratio.") or name == "data"
