"""The probability of lesion in frames as they were read: brought to the network's input, and back from its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amlp_ray.config import PredictConfig, PrepareConfig
from amlp_ray.data.decoders import Frame
from amlp_ray.data.decoders.image import to_channels
from amlp_ray.data.layouts import SourceImage
from amlp_ray.errors import CheckpointError, ConfigError, DataError
from amlp_ray.evaluation.segmenter import LoadedSegmenter, load_segmenter
from amlp_ray.inference.geometry import Fitted, fitted, restored
from amlp_ray.method.augment import normalize

FAR = 10  # SDs between the mean of a frame and that of the training images, beyond which the scale must be another


@dataclass(frozen=True)
class Inference:
    """A segmenter, and how images come to it and are read: what all images of a run have in common."""

    segmenter: LoadedSegmenter  # its model on `device`
    decoding: PrepareConfig
    fitting: PrepareConfig
    config: PredictConfig
    device: str


def load_inference(
    folder: Path, config: PredictConfig, device: str, say: Callable[[str], None]
) -> Inference:
    """Load a segmenter for images in files.

    Raises:
        CheckpointError: it is missing, damaged, or of images that came from no files. ConfigError: `scale` would
        have no effect.
    """
    loaded = load_segmenter(folder)
    prepare = loaded.prepare
    if prepare is None:
        raise CheckpointError(
            f"{folder} does not say how its training images were prepared, so new ones cannot be made alike; run "
            f"`segment` again, on a dataset of `amlp-ray data prepare`."
        )
    fitting = fitting_of(prepare, config)
    if config.scale and fitting.fit != "tiles":
        raise ConfigError(
            f"scale is {config.scale:g}, but images are taken whole here; add tiling=on, or leave it."
        )
    if fitting.fit == "tiles" != prepare.fit:
        say(
            f"{folder} was trained on whole images ({prepare.fit}): tiles suit it only where a tile of {prepare.size} "
            f"pixels shows as much as one of those did."
        )
    loaded.model.to(device).eval()
    decoding = prepare.model_copy(
        update={"layout": config.layout, "file_list": None, "lesion_labels": ()}
    )
    return Inference(loaded, decoding, fitting, config, device)


def fitting_of(prepare: PrepareConfig, config: PredictConfig) -> PrepareConfig:
    """How frames are brought to the network: as its training images were, unless `tiling` says otherwise."""
    fit = {
        "auto": prepare.fit,
        "on": "tiles",
        "off": "pad" if prepare.fit == "tiles" else prepare.fit,
    }[config.tiling]
    scale = (config.scale or prepare.scale) if fit == "tiles" else 1.0
    return prepare.model_copy(update={"fit": fit, "scale": scale})


def as_trained(item: SourceImage, frame: Frame, trial_spec: Inference) -> np.ndarray:
    """The image of a frame with the channels of the training images. Raises DataError where it is unlike them."""
    spec, image, path = trial_spec.segmenter.spec, frame.image, item.images[0]
    if image.shape[2] != spec.channels and (
        item.format == "nifti" or {image.shape[2], spec.channels} != {1, 3}
    ):
        raise DataError(
            f"{path} has {image.shape[2]} channels, but the segmenter was trained on {spec.channels}; give the same "
            f"channels or modalities."
        )
    image = to_channels(image, spec.channels)
    mean, std = np.array(spec.mean), np.array(spec.std)
    found = image.mean(axis=(0, 1), dtype=np.float64)
    if (np.abs(found - mean) > FAR * std).any():
        worst = int((np.abs(found - mean) / std).argmax())
        raise DataError(
            f"{path} has the mean value {found[worst]:.4g}, but the segmenter is made for images of mean "
            f"{mean[worst]:.4g} and standard deviation {std[worst]:.4g}, so this one is of another scale; convert it, "
            f"such as from 16 bits to 8, or train on a dataset prepared with values=percentile."
        )
    return image


def lesion_probabilities(images: list[np.ndarray], trial_spec: Inference) -> Iterator[np.ndarray]:
    """The probability of lesion (H, W) in each image (H, W, C)."""
    fits = [fitted(image, trial_spec.fitting) for image in images]
    found: Iterable[np.ndarray]
    if trial_spec.fitting.fit == "tiles":
        found = (_sliding(fit, trial_spec) for fit in fits)
    else:
        found = _looked(np.stack([fit.image.astype(np.float32) for fit in fits]), trial_spec)
    for image, fit, values in zip(images, fits, found, strict=True):
        yield restored(values, fit, *image.shape[:2])


@torch.inference_mode()
def _looked(images: np.ndarray, trial_spec: Inference) -> np.ndarray:
    """Whole inputs (B, C, S, S) as they are stored -> (B, S, S)."""
    batch = normalize(torch.from_numpy(images).to(trial_spec.device), trial_spec.segmenter.spec)
    return np.asarray(_forward(batch, trial_spec)[:, 0].cpu())


@torch.inference_mode()
def _sliding(fit: Fitted, trial_spec: Inference) -> np.ndarray:
    """A window of the network's size, slid over (C, H', W') -> (H', W'). The image stays where memory is larger."""
    from monai.inferers import sliding_window_inference  # takes seconds to import

    image = normalize(
        torch.from_numpy(fit.image[None].astype(np.float32)), trial_spec.segmenter.spec
    )
    found: Tensor = sliding_window_inference(
        image,
        trial_spec.fitting.size,
        trial_spec.config.batch_size,
        lambda tiles: _forward(tiles, trial_spec),
        overlap=trial_spec.config.overlap,
        mode="gaussian",
        sw_device=trial_spec.device,
        device="cpu",
    )
    return np.asarray(found[0, 0])


def _forward(batch: Tensor, trial_spec: Inference) -> Tensor:
    """Normalised inputs (B, C, S, S) -> probabilities (B, 1, S, S)."""
    model = trial_spec.segmenter.model
    probability: Tensor = model(batch).sigmoid()
    if trial_spec.config.flip_tta:
        probability = (probability + model(batch.flip(-1)).sigmoid().flip(-1)) / 2
    return probability
