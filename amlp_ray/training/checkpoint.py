"""Checkpoints to resume from, and the encoder to take away.

A checkpoint holds tensors and plain values and is loaded with `weights_only`: reading one never runs code.
Nothing random has a state (see `method.noise`), so weights, optimiser and epoch are all that an exact resume needs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from amlp_ray.config import ImageSpec, ModelSettings, PretrainSettings
from amlp_ray.errors import CheckpointError
from amlp_ray.files import write_whole
from amlp_ray.method.encoder import create_encoder, timm_arguments, timm_name
from amlp_ray.method.model import MaskedAutoencoder, build_autoencoder
from amlp_ray.settings import build, flat, read_yaml
from amlp_ray.training.metrics import read_rows

# What a running model can change, and why: no weight gets another shape, the optimiser keeps no copy of it, and nothing
# that was done before would have been done at another epoch (as with loss.warmup or selection.refresh).
PERTURBABLE: dict[str, str] = {
    "lr": "every step sets it anew, times warm-up and cosine",
    "clip_grad": "used in a step and forgotten",
    "intensity": "images are recoloured step by step",
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


def checkpoint_file(folder: Path) -> Path:
    """Path of the latest checkpoint of a run's folder."""
    return folder / "checkpoint" / "latest.pt"


def save_checkpoint(
    folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, settings: PretrainSettings
) -> Path:
    """Write the state after `epoch` atomically: a reader finds the old checkpoint or the new one, never half of one."""
    state = {
        "epoch": epoch,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "settings": settings.model_dump(mode="json"),
    }
    return _write_state(folder, state)


def _write_state(folder: Path, state: dict[str, Any]) -> Path:
    path = checkpoint_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


def run_settings(folder: Path) -> PretrainSettings:
    """Settings of the run in `folder`. Raises CheckpointError where there is none."""
    path = folder / "settings.yaml"
    if not path.is_file():
        found = "has no settings.yaml" if folder.is_dir() else "does not exist"
        raise CheckpointError(f"{folder} {found}; give the folder of a pretraining run or of one trial of a study.")
    return build(PretrainSettings, read_yaml(path), str(path))


def load_model(folder: Path, settings: PretrainSettings, spec: ImageSpec) -> tuple[MaskedAutoencoder, int]:
    """Load a run's latest model, its teacher and centroids with it, and the epoch it was saved after.

    Args:
        spec: of the images that it will be shown.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it belongs to images of another shape.
    """
    path = checkpoint_file(folder)
    if not path.is_file():
        raise CheckpointError(f"{folder} has no checkpoint/{path.name}: the run has not ended an epoch yet.")
    model = build_autoencoder(settings, spec)
    state = _read_state(path, "train the run again")
    _load_weights(model, state, path, "give the data of the run")
    return model.eval(), state["epoch"]


def load_checkpoint(
    path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, settings: PretrainSettings
) -> int:
    """Restore model and optimiser in place and return the epoch that the checkpoint was written after.

    Raises:
        CheckpointError: where the file is damaged, or belongs to other settings.
    """
    state = _read_state(path, "delete it to start from the first epoch")
    theirs, epoch = state["settings"], state["epoch"]
    ours = settings.model_dump(mode="json")
    changed = [key for key in ours if theirs.get(key) != ours[key] and key != "data"]  # how images are read
    if changed:
        raise CheckpointError(
            f"{path} was written with other settings ({', '.join(changed)}); "
            f"continue with the same settings or choose another folder."
        )
    _load_weights(model, state, path, "continue with the same data or choose another folder")
    optimizer.load_state_dict(state["optimizer"])
    return epoch


def fork_checkpoint(source: Path, target: Path, settings: PretrainSettings) -> int:
    """Let a run in folder `target` go on, with `settings`, from where the run in `source` is; return that epoch.

    The checkpoint is copied with the new settings in it, and before it the metrics up to its epoch, marked `inherited`:
    a kill in between leaves no checkpoint, and the fork is made again. `source` is only read.

    Raises:
        CheckpointError: where `source` has no whole checkpoint, or was trained with what no running model can change.
    """
    path = checkpoint_file(source)
    if not path.is_file():
        raise CheckpointError(f"{source} has no checkpoint/{path.name} to go on from; run it before its fork.")
    state = _read_state(path, "train that run again")
    theirs, ours = flat(state["settings"]), flat(settings.model_dump(mode="json"))
    changed = [name for name in ours if theirs.get(name) != ours[name] and not _can_change(name, theirs, ours)]
    if changed:
        raise CheckpointError(
            f"{path} cannot go on with another {', '.join(changed)}: a running model takes another ratio, "
            f"{', '.join(PERTURBABLE)}, where a part of it is neither added nor dropped; start a run of its own."
        )
    target.mkdir(parents=True, exist_ok=True)
    rows = [row | {"inherited": True} for row in read_rows(source / "metrics.jsonl") if row["epoch"] <= state["epoch"]]
    write_whole(target / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    _write_state(target, state | {"settings": settings.model_dump(mode="json")})
    return int(state["epoch"])


def _can_change(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    if name in HEADED:
        return bool(theirs.get(name)) and bool(ours[name])
    return name in PERTURBABLE or name.startswith("ratio.") or name == "data"  # data: how images are read


def _read_state(path: Path, advice: str) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {**state, "settings": dict(state["settings"]), "epoch": int(state["epoch"])}
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({type(error).__name__}); {advice}.") from None


def _load_weights(model: nn.Module, state: dict[str, Any], path: Path, advice: str) -> None:
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:
        raise CheckpointError(
            f"{path} was written for images of another size or number of channels; {advice}."
        ) from None


def export_encoder(encoder: VisionTransformer, path: Path, settings: ModelSettings, spec: ImageSpec) -> None:
    """Write the encoder as safetensors with timm's own keys, and how to build and feed it in the header.

    `timm.create_model(name, checkpoint_path=path, **arguments)` loads it with every key matched; name and arguments
    are in the header under `timm_name` and `timm_arguments`.
    """
    header = {
        "timm_name": timm_name(settings),
        "timm_arguments": json.dumps(timm_arguments(settings, spec)),
        "model": settings.model_dump_json(),
        "image": spec.model_dump_json(),
    }
    write_tensors(path, encoder.state_dict(), header)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole, and readable for colleagues: the library itself makes private files."""
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_whole(path, save(plain, metadata=header))


def read_encoder_header(path: str | Path) -> tuple[ModelSettings, ImageSpec]:
    """Return the model settings and image shape an exported encoder was trained with.

    Raises:
        CheckpointError: where the file is missing or is no encoder exported here.
    """
    header = _header(path)
    return ModelSettings.model_validate_json(header["model"]), ImageSpec.model_validate_json(header["image"])


def load_encoder(path: str | Path) -> VisionTransformer:
    """Load an exported encoder as a timm model, in evaluation mode.

    It takes images (B, C, H, W) normalised by the `mean` and `std` of `read_encoder_header`, and `forward_features`
    gives tokens (B, R + N, D), the R prefix tokens (class token, registers) first.
    """
    header = _header(path)
    arguments: dict[str, Any] = json.loads(header["timm_arguments"])
    encoder = create_encoder(header["timm_name"], arguments)
    with safe_open(str(path), framework="pt") as file:
        encoder.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118  (not a dict)
    return encoder.eval()


def _header(path: str | Path) -> dict[str, str]:
    if not Path(path).is_file():
        raise CheckpointError(f"There is no encoder file {path}; check the path.")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError:
        header = {}
    if "timm_arguments" not in header:
        raise CheckpointError(f"{path} is not an encoder exported by amlp-ray; give the encoder.safetensors of a run.")
    return dict(header)
