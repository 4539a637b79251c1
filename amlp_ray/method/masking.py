"""Turn stored images into what a step trains on: crops as patches, and which of them are masked.

Shapes: B images, C channels, N patches, P values per patch, h x w the patch grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from amlp_ray.config import PretrainConfig
from amlp_ray.errors import ConfigError
from amlp_ray.method.augment import apply_crop, jitter_intensity, random_crop
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.method.ema_teacher import teacher_view
from amlp_ray.method.lesion_map import LesionMap, TeacherView, locate_lesion
from amlp_ray.method.masking_ratio import masked_count, masking_ratio
from amlp_ray.method.patch_features import tissue_mask
from amlp_ray.method.patch_selection import Selection, select_patches
from amlp_ray.method.patches import patchify
from amlp_ray.method.precision import autocast


class TrainingStep(NamedTuple):
    """Position in training: `epoch` counts from 1, `step` from 0 within it, of `steps`."""

    epoch: int
    step: int = 0
    steps: int = 1


class Masking:
    """Sample the masks of one run, with a cache of lesion maps of whole images.

    The cached maps follow from the images, the config, the epoch of the analysis, and the teacher
    and centroids as they were then, which stay until the next analysis. So nothing here need be
    saved: a resumed run analyzes again and finds the same.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        config: PretrainConfig,
        truth: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Mask images for `model`.

        Args:
            truth: lesion share per patch, (h, w), by image key; for oracles, which are for
                diagnosis only.
        """
        self.model = model
        self.config = config
        self.truth = truth
        # Lesion maps of whole images by key, (3, h, w) float16 on the images' device.
        self._cached_maps: dict[int, Tensor] = {}
        self._cached_epoch = 0  # analysis epoch that the cached maps belong to

    def ratio(self, step: TrainingStep) -> float:
        """Return the masking ratio of a step."""
        config = self.config
        return masking_ratio(config.ratio, epochs=config.epochs, seed=config.seed, **step._asdict())

    def mask_augmented(
        self, images: Tensor, keys: Tensor, host_keys: Tensor, step: TrainingStep
    ) -> tuple[Tensor, Selection]:
        """Augment images at random, and select the patches to mask.

        Lesion maps of whole images are cropped along. Between analyses the map is that of the
        stored image, whatever its brightness is now. With `analysis_interval` 0 it is that of the
        augmented image.

        Args:
            images: (B, C, H, W), normalized.
            keys: (B,) int64 on the images' device.
            host_keys: the same numbers on the CPU, so that nothing waits for the device.

        Returns:
            Patches (B, N, P) of the augmented images, and the selection.
        """
        config = self.config
        crop = random_crop(keys, config, step.epoch)
        augmented = jitter_intensity(apply_crop(images, crop), keys, config, step.epoch)
        patches = patchify(augmented, self.model.patch_size)
        if config.selection.mode == "random":
            return patches, self._select(LesionMap.empty(patches), patches, keys, step)
        self._begin_analysis(step.epoch)
        if config.selection.analysis_interval == 0:
            truth = self._true_shares(host_keys, patches, crop)
            lesion_map = self._analyze(patches, keys, step.epoch, truth, learn=True)
        else:
            maps = self._whole_image_maps(images, keys, host_keys, step.epoch)
            lesion_map = LesionMap.from_images(apply_crop(maps, crop, mode="nearest"))
        return patches, self._select(lesion_map, patches, keys, step)

    def mask_whole_images(
        self,
        images: Tensor,
        keys: Tensor,
        step: TrainingStep,
        lesion_map: LesionMap | None = None,
    ) -> tuple[Tensor, LesionMap, Selection]:
        """Select the patches to mask without augmentation, for pictures and diagnostics.

        Nothing is cached and no centroid moves.

        Args:
            images: (B, C, H, W), normalized.
            keys: (B,) int64 on the images' device.
            lesion_map: of an earlier call, valid until `analysis_epoch` changes. None analyzes.

        Returns:
            Patches (B, N, P), the lesion map and the selection.
        """
        patches = patchify(images, self.model.patch_size)
        if self.config.selection.mode == "random":
            lesion_map = LesionMap.empty(patches)
        elif lesion_map is None:
            truth = self._true_shares(keys.cpu(), patches, None)
            epoch = self.analysis_epoch(step.epoch)
            lesion_map = self._analyze(patches, keys, epoch, truth, learn=False)
        return patches, lesion_map, self._select(lesion_map, patches, keys, step)

    def analysis_epoch(self, epoch: int) -> int:
        """Return the last epoch, up to `epoch`, at which whole images are analyzed.

        These are 1, 1 + `analysis_interval`, ..., and the first after the warm-up.
        """
        interval = self.config.selection.analysis_interval
        if interval == 0:
            return epoch
        regular = epoch - (epoch - 1) % interval
        after_warmup = self._first_epoch_after_warmup()
        return max(regular, after_warmup) if after_warmup <= epoch else regular

    def _first_epoch_after_warmup(self) -> int:
        """With a teacher never the very first epoch, when its weights are still random."""
        first = int(self.config.loss.warmup * self.config.epochs) + 1
        return first if self.model.teacher is None else max(2, first)

    def _begin_analysis(self, epoch: int) -> None:
        """Discard the maps of an earlier analysis, and commit the centroids of a new one."""
        analysis_epoch = self.analysis_epoch(epoch)
        if analysis_epoch == self._cached_epoch:
            return
        self._cached_maps.clear()
        self._cached_epoch = analysis_epoch
        if self.model.centroids is not None and epoch == analysis_epoch:
            self.model.centroids.commit()

    def _whole_image_maps(
        self, images: Tensor, keys: Tensor, host_keys: Tensor, epoch: int
    ) -> Tensor:
        """Return lesion maps (B, 3, h, w) of whole images; analyze those that are not cached."""
        all_keys = host_keys.tolist()
        # Centroids are learned by all workers together, so each analyzes every batch, whatever it
        # has cached of it.
        learn = self.model.centroids is not None and epoch == self._cached_epoch
        new = [i for i, key in enumerate(all_keys) if learn or key not in self._cached_maps]
        if new:
            index = torch.tensor(new, device=images.device)
            patches = patchify(images[index], self.model.patch_size)
            truth = self._true_shares(host_keys[new], patches, None)
            lesion_map = self._analyze(patches, keys[index], self._cached_epoch, truth, learn=learn)
            maps = lesion_map.to_images(self.model.grid).half()
            self._cached_maps.update(zip(host_keys[new].tolist(), maps, strict=True))
        return torch.stack([self._cached_maps[key] for key in all_keys]).float()

    def _analyze(
        self, patches: Tensor, keys: Tensor, epoch: int, truth: Tensor | None, *, learn: bool
    ) -> LesionMap:
        config = self.config
        model = self.model
        teacher: TeacherView | None = None
        if model.teacher is not None and epoch >= self._first_epoch_after_warmup():
            with autocast(config, patches.device.type):
                teacher = teacher_view(model, patches, keys, config, epoch)
        # At first raw patches replace the teacher's tokens, with other dimensions.
        has_features = teacher is not None or config.selection.features != "tokens"
        return locate_lesion(
            patches,
            keys,
            model.grid,
            model.spec.channels,
            config.selection,
            seed=config.seed,
            epoch=epoch,
            teacher=teacher,
            feedback=config.selection.feedback if config.uses_feedback else 0.0,
            truth=truth,
            centroids=model.centroids if has_features else None,
            learn=learn,
        )

    def _select(
        self, lesion_map: LesionMap, patches: Tensor, keys: Tensor, step: TrainingStep
    ) -> Selection:
        config = self.config
        return select_patches(
            lesion_map,
            tissue_mask(patches, config.selection),
            keys,
            masked_count(self.ratio(step), patches.shape[1], config.ratio.round_to),
            config.selection,
            seed=config.seed,
            epoch=step.epoch,
            progress=step.epoch / config.epochs,
            ratio_over=config.ratio.ratio_over,
        )

    def _true_shares(
        self, host_keys: Tensor, patches: Tensor, crop: Tensor | None
    ) -> Tensor | None:
        """Return the lesion share per patch (B, N) where an oracle needs it, cropped along."""
        if not self.config.selection.uses_ground_truth:
            return None
        if self.truth is None:
            raise ConfigError(
                "An oracle needs true lesions, but there are none; "
                "use another selection.rule or selection.score."
            )
        share = torch.stack([self.truth[key] for key in host_keys.tolist()]).to(patches.device)
        return apply_crop(share[:, None], crop)[:, 0].flatten(1)
