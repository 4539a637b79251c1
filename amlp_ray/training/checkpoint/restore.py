"""From a run's checkpoints: going on, taking the model out, and letting another run fork off.

What they hold is in `state_to_keep`, how they are kept in `keeper.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.config.base import build
from amlp_ray.config.overrides import flatten
from amlp_ray.config.yaml_file import read_yaml
from amlp_ray.errors import CheckpointError
from amlp_ray.method.autoencoder import MaskedAutoencoder, build_autoencoder
from amlp_ray.training.checkpoint.manager import (
    State,
    checkpoints,
    epoch_of,
    is_whole,
    latest,
    read_checkpoint,
    write_checkpoint,
)
from amlp_ray.training.loggers.metrics_file import read_rows
from amlp_ray.utils import distributed
from amlp_ray.utils.event_log import EventLog
from amlp_ray.utils.files import atomic_write

# What a running model can change, and why: no weight gets another shape, the optimiser keeps no copy of it, and nothing
# that was done before would have been done at another epoch (as with loss.warmup or selection.analysis_interval).
PERTURBABLE: dict[str, str] = {
    "lr": "every step sets it anew, times warm-up and cosine",
    "clip_grad": "used in a step and forgotten",
    "intensity_jitter": "images are recoloured step by step",
    "selection.strength": "masks are drawn step by step from scores that it does not change",
    "selection.lesion_share": "masks are drawn step by step",
    "selection.aim_start": "as lesion_share",
    "selection.aim_end": "as lesion_share",
    "loss.mix": "the loss has no memory",
    "loss.temperature": "as mix",
    "loss.gamma": "as mix",
    "loss.clip_min": "as mix",
    "loss.clip_max": "as mix",
    "loss.ccl_difficulty_share": "as mix",
    "loss.ccl_weight": "above 0, where the model has its head",
    "loss.ranking_weight": "above 0, where the model has its decoder",
}
HEADED = ("loss.ccl_weight", "loss.ranking_weight")  # 0 is a model without that part


def state_to_keep(state: State, epoch: int, config: PretrainConfig) -> State:
    """What a checkpoint holds of a learner's `state` after `epoch`: nothing random has a state (see `method.noise`)."""
    return {**state, "epoch": epoch, "config": config.model_dump(mode="json")}


def agreed_checkpoint(folder: Path, events: EventLog, device: str) -> tuple[State, Path] | None:
    """The newest whole checkpoint, the same on all workers: the first says which one, and all read it.

    Raises:
        CheckpointError: none is whole, or a worker does not see it.
    """
    first = distributed.rank() == 0
    found = latest(folder, lambda text: events.record("damaged checkpoint", text)) if first else None
    epoch = distributed.broadcast_from_rank0(found[0]["epoch"] if found else 0, device)
    return found or (_read(folder, epoch) if epoch else None)


def _read(folder: Path, epoch: int) -> tuple[State, Path]:
    path = next(
        (path for path in checkpoints(folder) if epoch_of(path) == epoch and is_whole(path)), None
    )
    if path is None:
        raise CheckpointError(
            f"{folder} has a checkpoint of epoch {epoch} on the first worker's node, but not on this one; put the run "
            f"into a folder that all nodes see."
        )
    return read_checkpoint(path), path


def run_settings(folder: Path) -> PretrainConfig:
    """Settings of the run in `folder`. Raises CheckpointError where there is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        found = "has no config.yaml" if folder.is_dir() else "does not exist"
        raise CheckpointError(
            f"{folder} {found}; give the folder of a pretraining run or of one trial of a study."
        )
    return build(PretrainConfig, read_yaml(path), str(path))


def load_model(
    folder: Path, config: PretrainConfig, spec: ImageSpec
) -> tuple[MaskedAutoencoder, int]:
    """Load a run's latest model, its teacher and centroids with it, and the epoch it was saved after.

    Args:
        spec: of the images that it will be shown.

    Raises:
        CheckpointError: there is no checkpoint, none is whole, or it belongs to images of another shape.
    """
    found = latest(folder)
    if found is None:
        raise CheckpointError(f"{folder} has no checkpoint: the run has not ended an epoch yet.")
    state, path = found
    model = build_autoencoder(config, spec)
    try:
        model.load_state_dict(state["weight_ema"] if "weight_ema" in state else state["model"])
    except RuntimeError:
        raise CheckpointError(
            f"{path} was written for images of another size or number of channels; give the data of the run."
        ) from None
    return model.eval(), state["epoch"]


def fork_checkpoint(source: Path, target: Path, config: PretrainConfig) -> int:
    """Let a run in folder `target` go on, with `settings`, from where the run in `source` is; return that epoch.

    The checkpoint is copied with the new settings in it, and before it the metrics up to its epoch, marked `inherited`:
    a kill in between leaves no checkpoint, and the fork is made again. `source` is only read.

    Raises:
        CheckpointError: where `source` has no whole checkpoint, or was trained with what no running model can change.
    """
    found = latest(source)
    if found is None:
        raise CheckpointError(f"{source} has no checkpoint to go on from; run it before its fork.")
    state, path = found
    theirs, ours = flatten(state["config"]), flatten(config.model_dump(mode="json"))
    changed = [
        name
        for name in ours
        if theirs.get(name) != ours[name] and not _can_change(name, theirs, ours)
    ]
    if changed:
        raise CheckpointError(
            f"{path} cannot go on with another {', '.join(changed)}: a running model takes another ratio, "
            f"{', '.join(PERTURBABLE)}, where a part of it is neither added nor dropped; start a run of its own."
        )
    target.mkdir(parents=True, exist_ok=True)
    rows = [
        row | {"inherited": True}
        for row in read_rows(source / "metrics.jsonl")
        if row["epoch"] <= state["epoch"]
    ]
    atomic_write(target / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_checkpoint(target, state | {"config": config.model_dump(mode="json")}, state["epoch"])
    return int(state["epoch"])


def _can_change(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    if name in HEADED:
        return bool(theirs.get(name)) and bool(ours[name])
    return (
        name in PERTURBABLE or name.startswith("ratio.") or name == "data"
    )  # data: how images are read
