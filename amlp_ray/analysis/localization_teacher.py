"""The trained model that some candidates of the localization benchmark use."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

from amlp_ray.config import PretrainConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import CheckpointError
from amlp_ray.evaluation.labels import check_fits
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.training.checkpoint.export import load_encoder, read_encoder_header
from amlp_ray.training.checkpoint.restore import load_model, read_run_config


class Teacher(NamedTuple):
    """A trained model that is evaluated as a run's teacher is.

    `has_decoder` is false for an encoder alone.
    """

    model: MaskedAutoencoder
    config: PretrainConfig
    has_decoder: bool


def read_teacher(path: Path, dataset: PatchDataset, patch_size: int) -> Teacher:
    """Load the model of a finished run's folder, or an encoder alone.

    Raises:
        CheckpointError: there is none.
        ConfigError: it was trained on images of another shape or scale.
    """
    is_run = path.is_dir()
    model_config, spec = read_encoder_header(path / "encoder.safetensors" if is_run else path)
    check_fits(dataset, spec, f"{path} was trained on")
    if model_config.patch_size != patch_size:
        raise CheckpointError(
            f"{path} has patches of {model_config.patch_size} pixels; "
            f"use --patch-size {model_config.patch_size}."
        )
    if is_run:
        config = read_run_config(path)
        if config.objective != "reconstruction":
            raise CheckpointError(
                f"{path} holds a run that rebuilds no images; give its encoder.safetensors alone."
            )
        model, _ = load_model(path, config, spec)
    else:
        config = PretrainConfig(model=model_config)
        model = MaskedAutoencoder(model_config, spec)
        model.encoder = load_encoder(path)
    if model.teacher is None:
        model.teacher = deepcopy(model)
    # Difficulty is the error of two masked passes in the image's scale, whatever the run was
    # trained with.
    loss = config.loss.model_copy(update={"difficulty": "raw", "ranking_weight": 0.0})
    return Teacher(model.eval(), config.model_copy(update={"loss": loss}), is_run)
