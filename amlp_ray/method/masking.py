"""From stored images to what a step trains on: normalised crops as patches, and which of them are masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from amlp_ray.config import PretrainConfig
from amlp_ray.errors import ConfigError
from amlp_ray.method.augment import cropped, random_crop, recolored
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.method.ema_teacher import teacher_view
from amlp_ray.method.lesion_map import LesionMap, TeacherView, locate_lesion
from amlp_ray.method.masking_ratio import masked_count, masking_ratio
from amlp_ray.method.patch_features import tissue_of
from amlp_ray.method.patch_selection import Selection, select_patches
from amlp_ray.method.patches import patchify
from amlp_ray.method.precision import autocast


class TrainingStep(NamedTuple):
    """When in training a mask is drawn: `epoch` counts from 1, `step` from 0 within it."""

    epoch: int
    step: int = 0
    steps: int = 1


class Masking:
    """Masks batches of one run, and keeps between looks what was found on whole images.

    What is kept follows from the images, the settings, the epoch of the look, and the teacher and centroids as they
    were then, which stay until the next. So nothing here need be saved: a resumed run looks again and finds the same.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        config: PretrainConfig,
        truth: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Masks for `model`.

        Args:
            truth: lesion share of every patch, (h, w), by image key; for oracles, which are diagnosis only.
        """
        self.model, self.config, self.truth = model, config, truth
        self._kept = torch.zeros(
            0
        )  # (n, 3, h, w) float16; at least as many rows as images looked at
        self._filled = 0
        self._rows: dict[int, int] = {}
        self._looked = 0  # epoch of the look that `_kept` belongs to

    def ratio(self, now: TrainingStep) -> float:
        """The masking ratio of a step."""
        s = self.config
        return masking_ratio(
            s.ratio, now.epoch, s.epochs, step=now.step, steps=now.steps, seed=s.seed
        )

    def augmented(
        self, images: Tensor, keys: Tensor, host_keys: Tensor, now: TrainingStep
    ) -> tuple[Tensor, Selection]:
        """Augment normalised images (B, C, H, W) at random; return their patches (B, N, P) and the selection.

        What was found on whole images is cropped along. Between looks the aim is that of the image as it is stored,
        whatever its brightness is now; with `refresh` 0 it is that of the augmented one.

        Args:
            keys: (B,) on the images' device. host_keys: the same numbers on the CPU, so that nothing waits for it.
        """
        s = self.config
        crop = random_crop(
            keys,
            min_crop_area=s.min_crop_area,
            flip=s.flip,
            flip_vertical=s.flip_vertical,
            seed=s.seed,
            epoch=now.epoch,
        )
        shown = recolored(
            cropped(images, crop), keys, s.intensity_jitter, seed=s.seed, epoch=now.epoch
        )
        patches = patchify(shown, self.model.patch_size)
        if s.selection.mode == "random":
            return patches, self._select(_no_aim(patches), patches, keys, now)
        self._begin_look(now.epoch)
        if s.selection.analysis_interval == 0:
            aim = self._look(
                patches, keys, now.epoch, self._truth(host_keys, patches, crop), learn=True
            )
        else:
            aim = LesionMap.of(
                cropped(self._maps(images, keys, host_keys, now.epoch), crop, mode="nearest")
            )
        return patches, self._select(aim, patches, keys, now)

    def whole(
        self, images: Tensor, keys: Tensor, now: TrainingStep, aim: LesionMap | None = None
    ) -> tuple[Tensor, LesionMap, Selection]:
        """The same without cropping, for pictures and diagnosis: nothing is kept and no centroid moves.

        Args:
            aim: what an earlier call found, which holds until `analysis_epoch` changes; None looks (again).
        """
        patches = patchify(images, self.model.patch_size)
        if self.config.selection.mode == "random":
            aim = _no_aim(patches)
        elif aim is None:
            truth = self._truth(keys.cpu(), patches, None)
            aim = self._look(patches, keys, self.analysis_epoch(now.epoch), truth, learn=False)
        return patches, aim, self._select(aim, patches, keys, now)

    def analysis_epoch(self, epoch: int) -> int:
        """The last epoch at which whole images were looked at: 1, 1 + refresh, ..., and the end of the warm-up."""
        analysis_interval, warm = self.config.selection.analysis_interval, self._warm_from()
        if analysis_interval == 0:
            return epoch
        look = epoch - (epoch - 1) % analysis_interval
        return max(look, warm) if warm <= epoch else look

    def _warm_from(self) -> int:
        """First epoch after the warm-up; with a teacher never the very first, when its weights are still random."""
        warm = int(self.config.loss.warmup * self.config.epochs) + 1
        return warm if self.model.teacher is None else max(2, warm)

    def _begin_look(self, epoch: int) -> None:
        look = self.analysis_epoch(epoch)
        if look == self._looked:
            return
        self._rows, self._filled, self._looked = {}, 0, look
        if self.model.centroids is not None and epoch == look:
            self.model.centroids.commit()

    def _maps(self, images: Tensor, keys: Tensor, host_keys: Tensor, epoch: int) -> Tensor:
        """What is thought of whole images, (B, 3, h, w); looked at where nothing of this look is kept."""
        look = self._looked
        wanted = host_keys.tolist()
        # Centroids are learnt by all workers together, so each looks at every batch, whatever it has seen of it.
        learn = self.model.centroids is not None and epoch == look
        new = [i for i, key in enumerate(wanted) if learn or key not in self._rows]
        if new:
            index = torch.tensor(new, device=images.device)
            patches = patchify(images[index], self.model.patch_size)
            truth = self._truth(host_keys[new], patches, None)
            maps = (
                self._look(patches, keys[index], look, truth, learn=learn)
                .maps(self.model.grid)
                .half()
            )
            start, end = self._filled, self._filled + len(new)
            if end > len(self._kept):  # doubling, so that growing costs no more than filling
                larger = maps.new_zeros(max(2 * len(self._kept), end), *maps.shape[1:])
                self._kept = (
                    torch.cat([self._kept, larger[len(self._kept) :]])
                    if len(self._kept)
                    else larger
                )
            self._kept[start:end] = maps
            self._rows |= {wanted[i]: start + row for row, i in enumerate(new)}
            self._filled = end
        rows = torch.tensor([self._rows[key] for key in wanted])
        return self._kept[rows.to(images.device, non_blocking=True)].float()

    def _look(
        self, patches: Tensor, keys: Tensor, epoch: int, truth: Tensor | None, *, learn: bool
    ) -> LesionMap:
        s, model = self.config, self.model
        told: TeacherView | None = None
        if model.teacher is not None and epoch >= self._warm_from():
            with autocast(s, patches.device.type):
                told = teacher_view(model, patches, keys, s, epoch)
        return locate_lesion(
            patches,
            keys,
            model.grid,
            model.spec.channels,
            s.selection,
            seed=s.seed,
            epoch=epoch,
            teacher=told,
            feedback=s.selection.feedback if s.uses_feedback else 0.0,
            truth=truth,
            # The teacher's tokens have other dimensions than the raw patches that stand in for them at first.
            centroids=model.centroids
            if told is not None or s.selection.features != "tokens"
            else None,
            learn=learn,
        )

    def _select(
        self, aim: LesionMap, patches: Tensor, keys: Tensor, now: TrainingStep
    ) -> Selection:
        s = self.config
        return select_patches(
            aim,
            tissue_of(patches, s.selection),
            keys,
            masked_count(self.ratio(now), patches.shape[1], s.ratio.round_to),
            s.selection,
            seed=s.seed,
            epoch=now.epoch,
            progress=now.epoch / s.epochs,
            ratio_over=s.ratio.ratio_over,
        )

    def _truth(self, host_keys: Tensor, patches: Tensor, crop: Tensor | None) -> Tensor | None:
        if not self.config.selection.uses_truth:
            return None
        if self.truth is None:
            raise ConfigError(
                "An oracle aims by true lesions, but none were given; use another selection.rule or selection.score."
            )
        share = torch.stack([self.truth[key] for key in host_keys.tolist()]).to(patches.device)
        return cropped(share[:, None], crop)[:, 0].flatten(1)


def _no_aim(patches: Tensor) -> LesionMap:
    zero = torch.zeros_like(patches[..., 0])
    return LesionMap(zero, zero, zero - 1)
