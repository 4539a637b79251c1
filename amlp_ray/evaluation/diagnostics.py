"""Compute diagnostics of a model after every epoch, on a few fixed images it is not trained on.

Nothing here changes the weights or the masks. True lesions are read, where there are masks, to
measure how well the lesion map finds them. They are never learned from.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from amlp_ray.config import PretrainConfig
from amlp_ray.data.dataset import PatchDataset, Split
from amlp_ray.errors import ConfigError
from amlp_ray.evaluation.labels import by_part, lesion_pixels, spread
from amlp_ray.method import counter_rng
from amlp_ray.method.augment import normalize
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.method.cluster_rules import true_lesion_patches
from amlp_ray.method.lesion_map import LesionMap
from amlp_ray.method.masking import Masking, TrainingStep
from amlp_ray.method.masking_ratio import masked_count
from amlp_ray.method.patches import gather, lesion_shares, patchify
from amlp_ray.method.visualization import denormalize
from amlp_ray.training.loggers.metrics_file import Metrics
from amlp_ray.training.objectives import Model

REFERENCE_IMAGES = 32  # a pass over them costs about as much as one training step of them
REFERENCE_RATIO = 0.75  # MAE's


def held_out(dataset: PatchDataset, count: int) -> Split:
    """Load up to `count` images that are not trained on, spread evenly over their split.

    Images of val (of train, where val is empty), never of test. Only images with a lesion, where
    any is labeled.
    """
    split = "val" if dataset.count("val") else "train"
    rows = np.flatnonzero(lesion_pixels(dataset, split) > 0)
    if not len(rows):
        rows = np.arange(dataset.count(split))
    return dataset.load(split, spread(rows, count))


def true_lesions(dataset: PatchDataset, config: PretrainConfig) -> dict[int, Tensor] | None:
    """Load the lesion share per patch (h, w) of the training images, by image key, for oracles.

    Returns:
        None where the config has no oracle.

    Raises:
        ConfigError: training images have no mask.
    """
    if not config.selection.uses_ground_truth:
        return None
    unlabeled = int(np.isnan(lesion_pixels(dataset, "train")).sum())
    if unlabeled:
        raise ConfigError(
            f"An oracle needs true lesions, but {unlabeled} of {dataset.count('train')} training "
            f"images in {dataset.path} have no mask; use another selection.rule or "
            f"selection.score. (It is for diagnosis only.)"
        )
    patch_size = config.model.patch_size
    shares_by_key: dict[int, Tensor] = {}
    for rows in by_part(dataset, "train"):
        part = dataset.load("train", rows)
        grid_height = part.masks.shape[1] // patch_size
        shares = lesion_shares(part.masks, patch_size).unflatten(1, (grid_height, -1))
        shares_by_key |= dict(zip(part.keys.tolist(), shares, strict=True))
    return shares_by_key


class Diagnostics:
    """Compute metrics that are comparable over epochs and between variants.

    The images are those of the labeled dataset where there is one apart from the pretraining one.
    They are normalized by the model's mean and SD.
    """

    def __init__(self, dataset: PatchDataset, config: PretrainConfig) -> None:
        split = held_out(dataset, REFERENCE_IMAGES)
        self.config = config
        self.images = torch.from_numpy(split.images)
        self.keys = torch.from_numpy(split.keys)
        self.share: Tensor | None = None
        if split.labeled.all():
            self.share = lesion_shares(split.masks, config.model.patch_size)
        # Computing a lesion map costs more than all else here, so the latest is cached.
        self._analysis_epoch = 0
        self._lesion_map: LesionMap | None = None

    @torch.inference_mode()
    def __call__(self, model: Model, epoch: int) -> Metrics:
        """Return metrics of a model after `epoch`.

        - `loss_reference`: see `reference_loss`.
        - `true_lesion_masked`: share of the true lesion patches that this epoch's masks hide.
        - `lesion_precision`, `lesion_recall`: of the probable lesion against the true lesion
          patches, means over images. An image with no probable lesion has precision 0.
        - `lesion_recall_small`, `lesion_recall_large`: the recall in the halves of the images with
          the smaller and with the larger lesions.

        All but the first only where true masks are known.
        """
        if not isinstance(model, MaskedAutoencoder):
            return {}
        device = model.mask_token.device
        images = normalize(self.images.to(device), model.spec)
        keys = self.keys.to(device)
        metrics: Metrics = {"loss_reference": reference_loss(model, images, keys, self.config)}
        if self.share is None or self.config.selection.uses_ground_truth:
            return metrics
        return metrics | self._lesion_metrics(model, images, keys, self.share.to(device), epoch)

    def _lesion_metrics(
        self, model: MaskedAutoencoder, images: Tensor, keys: Tensor, share: Tensor, epoch: int
    ) -> Metrics:
        masking = Masking(model, self.config)
        analysis_epoch = masking.analysis_epoch(epoch)
        if analysis_epoch != self._analysis_epoch:
            self._lesion_map = None
        self._analysis_epoch = analysis_epoch
        _, self._lesion_map, selection = masking.mask_whole_images(
            images, keys, TrainingStep(epoch), self._lesion_map
        )
        truth = true_lesion_patches(share)
        masked = torch.zeros_like(truth).scatter(1, selection.masked, True)
        masked_share = (masked & truth).sum() / truth.sum().clamp_min(1)
        metrics: Metrics = {"true_lesion_masked": float(masked_share)}
        if not self.config.selection.names_lesion:
            return metrics
        hits = (selection.lesion & truth).sum(1)
        precision = hits / selection.lesion.sum(1).clamp_min(1)
        recall = hits / truth.sum(1).clamp_min(1)
        is_small = share.sum(1) <= share.sum(1).median()
        large_recall = recall if bool(is_small.all()) else recall[~is_small]
        return metrics | {
            "lesion_precision": float(precision.mean()),
            "lesion_recall": float(recall.mean()),
            "lesion_recall_small": float(recall[is_small].mean()),
            "lesion_recall_large": float(large_recall.mean()),
        }


def reference_loss(
    model: MaskedAutoencoder, images: Tensor, keys: Tensor, config: PretrainConfig
) -> float:
    """Return the mean squared error under one random mask of 75 % that never changes.

    In the scale of the image. With `norm_pix` the model is given mean and SD of every patch, so
    compare within one setting of it.

    Args:
        images: (B, C, H, W), normalized, uncropped.
        keys: (B,) int64, one identity per image.
    """
    patches = patchify(images, model.patch_size)
    noise = counter_rng.uniform(
        keys, patches.shape[1], seed=0, epoch=0, stream=counter_rng.REFERENCE
    )
    order = noise.argsort(1)
    count = masked_count(REFERENCE_RATIO, patches.shape[1])
    masked = order[:, :count]
    visible = order[:, count:]
    target = gather(patches, masked)
    prediction = model(patches, visible, masked).pixels.float()
    return float((denormalize(prediction, target, config.loss) - target).square().mean())
