"""What a run shows of itself after every epoch, on a few fixed images it is not trained on.

Nothing here reaches the weights or the mask: true lesions are read, where there are masks, to tell how well the aim
finds them, and are never learnt from.
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
from amlp_ray.method.cluster_rules import truth_patches
from amlp_ray.method.lesion_map import LesionMap
from amlp_ray.method.masking import Masking, TrainingStep
from amlp_ray.method.masking_ratio import masked_count
from amlp_ray.method.patches import gather, patchify
from amlp_ray.method.visualization import denormalized
from amlp_ray.training.loggers.metrics_file import Metrics
from amlp_ray.training.objectives import Model

REFERENCE_IMAGES = 32  # a pass over as many costs about as much as one training step of them
REFERENCE_RATIO = 0.75  # MAE's


def held_out(dataset: PatchDataset, count: int) -> Split:
    """Up to `count` images to look at: of val (train, where val is empty), spread evenly, with a lesion where known.

    Never of test.
    """
    split = "val" if dataset.count("val") else "train"
    lesion = np.flatnonzero(lesion_pixels(dataset, split) > 0)
    return dataset.load(
        split, spread(lesion if len(lesion) else np.arange(dataset.count(split)), count)
    )


def lesion_shares(masks: np.ndarray, patch_size: int) -> Tensor:
    """Lesion share of every patch, (B, N), from masks (B, H, W)."""
    return patchify(torch.from_numpy(masks > 0).float()[:, None], patch_size).mean(-1)


def true_lesions(dataset: PatchDataset, config: PretrainConfig) -> dict[int, Tensor] | None:
    """Lesion shares (h, w) of the training images by key, for settings that aim by them; None for all others.

    Raises:
        ConfigError: where training images have no mask.
    """
    if not config.selection.uses_truth:
        return None
    if missing := int(np.isnan(lesion_pixels(dataset, "train")).sum()):
        raise ConfigError(
            f"An oracle aims by true lesions, but {missing} of {dataset.count('train')} training images in "
            f"{dataset.path} have no mask; use another selection.rule or selection.score. (It is for diagnosis only.)"
        )
    p = config.model.patch_size
    found: dict[int, Tensor] = {}
    for rows in by_part(dataset, "train"):
        part = dataset.load("train", rows)
        shares = lesion_shares(part.masks, p).unflatten(1, (part.masks.shape[1] // p, -1))
        found |= dict(zip(part.keys.tolist(), shares, strict=True))
    return found


class Diagnostics:
    """Called after every epoch with the model: metrics that can be compared over epochs and between baselines.

    On a labelled data set where there is one apart from the pretraining one; normalised by the model's mean and SD.
    """

    def __init__(self, dataset: PatchDataset, config: PretrainConfig) -> None:
        chosen = held_out(dataset, REFERENCE_IMAGES)
        self.config = config
        self.images, self.keys = torch.from_numpy(chosen.images), torch.from_numpy(chosen.keys)
        self.share = (
            lesion_shares(chosen.masks, config.model.patch_size) if chosen.labeled.all() else None
        )
        self._aim: tuple[int, LesionMap] | None = (
            None  # of the latest look: looking costs more than all else here
        )

    @torch.inference_mode()
    def __call__(self, model: Model, epoch: int) -> Metrics:
        """Return `loss_reference` and, where true masks are known, how well the aim finds lesions.

        - `loss_reference`: mean squared error in the image's scale, under one fixed random mask of 75 %. With
          `norm_pix` the model is given mean and SD of every patch, so compare within one setting of it.
        - `aim_precision`, `aim_recall`: of the probable lesion against the true lesion patches, means over images (an
          image with no probable lesion has precision 0); `_small`, `_large`: the recall in the half of the images with
          the smaller and with the larger lesions.
        - `true_lesion_masked`: share of the true lesion patches that this epoch's masks hide.
        """
        if not isinstance(model, MaskedAutoencoder):
            return {}
        device = model.mask_token.device
        images, keys = normalize(self.images.to(device), model.spec), self.keys.to(device)
        metrics: Metrics = {"loss_reference": reference_loss(model, images, keys, self.config)}
        if self.share is None or self.config.selection.uses_truth:
            return metrics
        masking = Masking(model, self.config)
        look = masking.analysis_epoch(epoch)
        kept = self._aim[1] if self._aim and self._aim[0] == look else None
        _, aim, chosen = masking.whole(images, keys, TrainingStep(epoch), kept)
        self._aim = look, aim
        share = self.share.to(device)
        truth = truth_patches(share)
        masked = torch.zeros_like(truth).scatter(1, chosen.masked, True)
        metrics["true_lesion_masked"] = float((masked & truth).sum() / truth.sum().clamp_min(1))
        if not self.config.selection.names_lesion:
            return metrics
        hit = (chosen.lesion & truth).sum(1) / truth.sum(1).clamp_min(1)
        small = share.sum(1) <= share.sum(1).median()
        return metrics | {
            "aim_precision": float(
                ((chosen.lesion & truth).sum(1) / chosen.lesion.sum(1).clamp_min(1)).mean()
            ),
            "aim_recall": float(hit.mean()),
            "aim_recall_small": float(hit[small].mean()),
            "aim_recall_large": float(hit[~small].mean())
            if bool((~small).any())
            else float(hit.mean()),
        }


def reference_loss(
    model: MaskedAutoencoder, images: Tensor, keys: Tensor, config: PretrainConfig
) -> float:
    """Mean squared error of normalised images (B, C, H, W), uncropped, under one random mask that never changes."""
    patches = patchify(images, model.patch_size)
    noise = counter_rng.uniform(
        keys, patches.shape[1], seed=0, epoch=0, stream=counter_rng.REFERENCE
    )
    order = noise.argsort(1)
    count = masked_count(REFERENCE_RATIO, patches.shape[1])
    masked, visible = order[:, :count], order[:, count:]
    target = gather(patches, masked)
    pixels = model(patches, visible, masked).pixels.float()
    return float((denormalized(pixels, target, config.loss) - target).square().mean())
