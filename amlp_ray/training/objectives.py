"""Compute the loss of a batch for each pretraining objective, without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.data.loading.batches import Batch
from amlp_ray.errors import ConfigError
from amlp_ray.method.augment import normalize
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.method.ema_teacher import update_teacher
from amlp_ray.method.losses import pretraining_loss
from amlp_ray.method.masking import Masking, TrainingStep
from amlp_ray.method.masking_ratio import masked_count
from amlp_ray.method.patch_selection import Selection, selection_statistics
from amlp_ray.method.patches import gather
from amlp_ray.method.precision import autocast
from amlp_ray.method.simsiam import SimSiam, two_views

Model = MaskedAutoencoder | SimSiam
Values = dict[str, Tensor]

# torch.compile gives up on a model after as many shapes.
MAX_SHAPES = 8


class ReconstructionObjective:
    """Masked image modeling: crop, mask, reconstruct.

    Masks are sampled for a batch as a whole: they do not depend on the number of pieces.
    """

    def __init__(self, masking: Masking) -> None:
        self.masking = masking
        self.config = masking.config

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """Update the teacher in the epochs in which it analyzes whole images."""
        if epoch == 1 and self.config.compile:
            self._check_shapes(steps)
        if epoch > 1 and self.masking.analysis_epoch(epoch) == epoch:
            previous_epoch = self.masking.analysis_epoch(epoch - 1)
            update_teacher(
                self.masking.model,
                self.config.teacher_momentum,
                previous_step=(previous_epoch - 1) * steps,
                step=(epoch - 1) * steps,
            )

    def _check_shapes(self, steps: int) -> None:
        """Raise ConfigError if the masking ratio meets more shapes than torch.compile takes."""
        config = self.config.ratio
        patches = math.prod(self.masking.model.grid)
        steps_to_check = range(steps) if config.update_per == "step" else range(1)
        counts = set()
        for epoch in range(1, self.config.epochs + 1):
            for step in steps_to_check:
                ratio = self.masking.ratio(TrainingStep(epoch, step, steps))
                counts.add(masked_count(ratio, patches, config.round_to))
        if len(counts) > MAX_SHAPES:
            # Rounding adds one count at either end.
            round_to = math.ceil((max(counts) - min(counts)) / (MAX_SHAPES - 2))
            raise ConfigError(
                f"compile meets {len(counts)} numbers of masked patches, of which torch keeps "
                f"{MAX_SHAPES}; set ratio.round_to to {round_to} or more."
            )

    def __call__(
        self,
        network: nn.Module,
        batch: Batch,
        training_step: TrainingStep,
        device: str,
        pieces: int = 1,
    ) -> Iterator[tuple[Values, int]]:
        """Yield each piece's metrics, scalars with the `loss` among them, and its number of images.

        The caller takes the gradient of a piece's `loss` before it asks for the next one, so that
        only one piece's activations are held.

        Args:
            network: the model as a step calls it.
            batch: this worker's share.
            pieces: how many to cut the batch into, at most.
        """
        images, keys = _to_device(batch, self.masking.model.spec, device)
        patches, selection = self.masking.mask_augmented(images, keys, batch.keys, training_step)
        for rows in pieces_of(len(patches), pieces):
            values = self._loss(network, patches[rows], selection.rows(rows), training_step, device)
            yield values, rows.stop - rows.start

    def _loss(
        self,
        network: nn.Module,
        patches: Tensor,
        selection: Selection,
        training_step: TrainingStep,
        device: str,
    ) -> Values:
        """Compute the loss of a piece, and its metrics."""
        config = self.config
        with autocast(config, device):
            prediction = network(patches, selection.visible, selection.masked)
        losses = pretraining_loss(
            prediction,
            gather(patches, selection.masked),
            gather(selection.lesion, selection.masked),
            gather(selection.tissue, selection.masked),
            config.loss,
            warming_up=training_step.epoch <= config.loss.warmup * config.epochs,
        )
        # Filled on the device: a copy would wait for it.
        ratio = torch.full((), self.masking.ratio(training_step), device=patches.device)
        return {
            "loss": losses.total,
            "loss_rec": losses.reconstruction,
            "loss_ccl": losses.ccl,
            "loss_rank": losses.ranking,
            "effective_patches": losses.effective_patches,
            "agreement": losses.agreement,
            "ratio": ratio,
            **selection_statistics(selection),
        }


class SimSiamObjective:
    """SimSiam: two crops of each image."""

    def __init__(self, model: SimSiam, config: PretrainConfig) -> None:
        self.model = model
        self.config = config

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """Do nothing: there are no masks."""

    def __call__(
        self,
        network: nn.Module,
        batch: Batch,
        training_step: TrainingStep,
        device: str,
        pieces: int = 1,
    ) -> Iterator[tuple[Values, int]]:
        """Yield the loss and metrics of the whole batch at once, whatever `pieces`."""
        images, keys = _to_device(batch, self.model.spec, device)
        first, second = two_views(
            images, keys, self.config, self.model.patch_size, training_step.epoch
        )
        with autocast(self.config, device):
            loss, spread = network(first, second)
        yield {"loss": loss, "spread": spread, "ratio": torch.zeros_like(spread)}, len(keys)


Objective = ReconstructionObjective | SimSiamObjective


def make_objective(
    model: Model, config: PretrainConfig, truth: Mapping[int, Tensor] | None
) -> Objective:
    """Create the objective of a model; `truth` is the lesion share of patches by image key."""
    if isinstance(model, SimSiam):
        return SimSiamObjective(model, config)
    return ReconstructionObjective(Masking(model, config, truth))


def _to_device(batch: Batch, spec: ImageSpec, device: str) -> tuple[Tensor, Tensor]:
    """Return normalized images (B, C, H, W) and their keys (B,)."""
    images = batch.images.to(device, non_blocking=True)
    return normalize(images, spec), batch.keys.to(device, non_blocking=True)


def pieces_of(count: int, pieces: int) -> Iterator[slice]:
    """Cut `count` rows into pieces of nearly equal size; none is empty if there are enough rows.

    >>> list(pieces_of(5, 2))
    [slice(0, 2, None), slice(2, 5, None)]
    """
    for piece in range(pieces):
        yield slice(piece * count // pieces, (piece + 1) * count // pieces)
