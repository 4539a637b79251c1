"""Compute lesion probabilities of frames: to the network's input, and back from its output.

Shapes: B images, C channels, H x W pixels of a frame, S x S of the network's input.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
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
from amlp_ray.inference.geometry import NetworkInput, fit_frame, restore
from amlp_ray.method.augment import normalize

logger = logging.getLogger(__name__)

# SDs between the mean of a frame and that of the training images, beyond which the scale must be
# another.
MAX_MEAN_SDS = 10


@dataclass(frozen=True)
class Inference:
    """A segmenter and how images are read and brought to it."""

    segmenter: LoadedSegmenter  # its model on `device`
    decoding: PrepareConfig
    fitting: PrepareConfig
    config: PredictConfig
    device: str

    def convert(self, item: SourceImage, frame: Frame) -> np.ndarray:
        """Return the image of a frame with the channels of the training images, (H, W, C).

        Raises:
            DataError: it has other channels, or values of another scale.
        """
        spec = self.segmenter.spec
        path = item.images[0]
        channels = frame.image.shape[2]
        is_gray_or_color = item.format != "nifti" and {channels, spec.channels} == {1, 3}
        if channels != spec.channels and not is_gray_or_color:
            raise DataError(
                f"{path} has {channels} channels, but the segmenter was trained on "
                f"{spec.channels}; give the same channels or modalities."
            )
        image = to_channels(frame.image, spec.channels)
        mean = np.array(spec.mean)
        std = np.array(spec.std)
        image_mean = image.mean(axis=(0, 1), dtype=np.float64)
        distance = np.abs(image_mean - mean)
        if (distance > MAX_MEAN_SDS * std).any():
            worst = int((distance / std).argmax())
            raise DataError(
                f"{path} has the mean value {image_mean[worst]:.4g}, but the segmenter is made for "
                f"images of mean {mean[worst]:.4g} and standard deviation {std[worst]:.4g}, so "
                f"this one is of another scale; convert it, such as from 16 bits to 8, or train on "
                f"a dataset prepared with values=percentile."
            )
        return image

    def lesion_probabilities(self, images: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Return the lesion probability (H, W) of each image (H, W, C)."""
        inputs = [fit_frame(image, self.fitting) for image in images]
        outputs: Iterable[np.ndarray]
        if self.fitting.fit == "tiles":
            outputs = (self._slide(network_input.image) for network_input in inputs)
        else:
            outputs = self._predict_whole(inputs)
        for image, network_input, output in zip(images, inputs, outputs, strict=True):
            yield restore(output, network_input, *image.shape[:2])

    @torch.inference_mode()
    def _predict_whole(self, inputs: list[NetworkInput]) -> np.ndarray:
        """Return probabilities (B, S, S) of whole images."""
        images = np.stack([each.image.astype(np.float32) for each in inputs])
        batch = normalize(torch.from_numpy(images).to(self.device), self.segmenter.spec)
        return np.asarray(self._forward(batch)[:, 0].cpu())

    @torch.inference_mode()
    def _slide(self, image: np.ndarray) -> np.ndarray:
        """Slide a window of S x S over an image (C, H', W'); return probabilities (H', W').

        The image stays on the CPU, where memory is larger.
        """
        from monai.inferers import sliding_window_inference  # takes seconds to import

        batch = torch.from_numpy(image[None].astype(np.float32))
        probability: Tensor = sliding_window_inference(
            normalize(batch, self.segmenter.spec),
            self.fitting.size,
            self.config.batch_size,
            self._forward,
            overlap=self.config.overlap,
            mode="gaussian",
            sw_device=self.device,
            device="cpu",
        )
        return np.asarray(probability[0, 0])

    def _forward(self, batch: Tensor) -> Tensor:
        """Return probabilities (B, 1, S, S) of normalized inputs (B, C, S, S)."""
        model = self.segmenter.model
        probability: Tensor = model(batch).sigmoid()
        if self.config.flip_tta:
            flipped: Tensor = model(batch.flip(-1)).sigmoid()
            probability = (probability + flipped.flip(-1)) / 2
        return probability


def load_inference(folder: Path, config: PredictConfig, device: str) -> Inference:
    """Load a segmenter for images in files.

    Raises:
        CheckpointError: it is missing, damaged, or of images that came from no files.
        ConfigError: `scale` would have no effect.
    """
    segmenter = load_segmenter(folder)
    prepare = segmenter.prepare
    if prepare is None:
        raise CheckpointError(
            f"{folder} does not say how its training images were prepared, so new ones cannot be "
            f"made alike; run `segment` again, on a dataset of `amlp-ray data prepare`."
        )
    fitting = choose_fitting(prepare, config)
    if config.scale and fitting.fit != "tiles":
        raise ConfigError(
            f"scale is {config.scale:g}, but images are taken whole here; "
            f"add tiling=on, or leave it."
        )
    if fitting.fit == "tiles" != prepare.fit:
        logger.warning(
            "%s was trained on whole images (%s): tiles suit it only where a tile of %s pixels "
            "shows as much as one of those did.",
            folder,
            prepare.fit,
            prepare.size,
        )
    segmenter.model.to(device).eval()
    decoding = prepare.model_copy(
        update={
            "layout": config.layout,
            "file_list": None,
            "mask_folder": None,
            "lesion_labels": (),
            "lesion_threshold": None,
        }
    )
    return Inference(segmenter, decoding, fitting, config, device)


def choose_fitting(prepare: PrepareConfig, config: PredictConfig) -> PrepareConfig:
    """Choose how frames are brought to the network's size.

    As its training images were, unless `tiling` says otherwise.
    """
    fit = prepare.fit
    if config.tiling == "on":
        fit = "tiles"
    elif config.tiling == "off" and fit == "tiles":
        fit = "pad"
    scale = (config.scale or prepare.scale) if fit == "tiles" else 1.0
    return prepare.model_copy(update={"fit": fit, "scale": scale})
