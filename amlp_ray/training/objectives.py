"""What happens in one step of each objective, before the optimiser's: from a batch to its loss.

Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from amlp_ray.config import PretrainConfig
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
MAX_SHAPES = 8  # torch.compile gives up on a model after as many


Values = dict[str, Tensor]


class Objective(Protocol):
    """Yields the loss of each piece of a batch and what is worth knowing of it, as scalars, and how many images it has.

    `loss` carries the gradient, which the caller takes before it asks for the next piece: then only one piece's
    activations are held. Masks are drawn for the batch as a whole, so they do not depend on the number of pieces.
    """

    def __call__(
        self, network: nn.Module, batch: Batch, now: TrainingStep, device: str, pieces: int = 1
    ) -> Iterator[tuple[Values, int]]: ...

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """Told before the batches of an epoch, `steps` of them."""
        ...


def make_objective(
    model: Model, config: PretrainConfig, truth: Mapping[int, Tensor] | None
) -> Objective:
    if isinstance(model, SimSiam):
        return SimSiamObjective(model, config)
    return ReconstructionObjective(Masking(model, config, truth))


class ReconstructionObjective:
    """Masked image modelling: crop, mask, reconstruct."""

    def __init__(self, masking: Masking) -> None:
        self.masking, self.config = masking, masking.config

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """Let the teacher catch up where whole images are about to be looked at."""
        if epoch == 1 and self.config.compile:
            self._check_shapes(steps)
        if epoch > 1 and self.masking.analysis_epoch(epoch) == epoch:
            before, now = (self.masking.analysis_epoch(epoch - 1) - 1) * steps, (epoch - 1) * steps
            update_teacher(
                self.masking.model,
                self.config.teacher_momentum,
                previous_step=before,
                step=now,
            )

    def _check_shapes(self, steps: int) -> None:
        patches = math.prod(self.masking.model.grid)
        moments = [
            TrainingStep(e, i, steps)
            for e in range(1, self.config.epochs + 1)
            for i in range(steps)
        ]
        ratios = {
            self.masking.ratio(now)
            for now in (moments if self.config.ratio.update_per == "step" else moments[::steps])
        }
        counts = {masked_count(ratio, patches, self.config.ratio.round_to) for ratio in ratios}
        if len(counts) > MAX_SHAPES:
            enough = math.ceil(
                (max(counts) - min(counts)) / (MAX_SHAPES - 2)
            )  # rounding adds one at either end
            raise ConfigError(
                f"compile meets {len(counts)} numbers of masked patches, of which torch keeps {MAX_SHAPES}; "
                f"set ratio.round_to to {enough} or more."
            )

    def __call__(
        self, network: nn.Module, batch: Batch, now: TrainingStep, device: str, pieces: int = 1
    ) -> Iterator[tuple[Values, int]]:
        spec = self.masking.model.spec
        keys = batch.keys.to(device, non_blocking=True)
        images = normalize(batch.images.to(device, non_blocking=True), spec)
        patches, chosen = self.masking.mask_augmented(images, keys, batch.keys, now)
        for rows in pieces_of(len(patches), pieces):
            yield (
                self._of(network, patches[rows], chosen.rows(rows), now, device),
                rows.stop - rows.start,
            )

    def _of(
        self, network: nn.Module, patches: Tensor, chosen: Selection, now: TrainingStep, device: str
    ) -> Values:
        config = self.config
        with autocast(config, device):
            prediction = network(patches, chosen.visible, chosen.masked)
        losses = pretraining_loss(
            prediction,
            gather(patches, chosen.masked),
            gather(chosen.lesion, chosen.masked),
            gather(chosen.tissue, chosen.masked),
            config.loss,
            warming_up=now.epoch <= config.loss.warmup * config.epochs,
        )
        return {
            "loss": losses.total,
            "loss_rec": losses.reconstruction,
            "loss_ccl": losses.ccl,
            "loss_rank": losses.ranking,
            "effective_patches": losses.effective_patches,
            "agreement": losses.agreement,
            "ratio": torch.full(
                (), self.masking.ratio(now), device=patches.device
            ),  # filled there, not copied
            **selection_statistics(chosen),
        }


class SimSiamObjective:
    """SimSiam: two crops of each image."""

    def __init__(self, model: SimSiam, config: PretrainConfig) -> None:
        self.model, self.config = model, config

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """Nothing to do: there is no mask to aim."""

    def __call__(
        self, network: nn.Module, batch: Batch, now: TrainingStep, device: str, pieces: int = 1
    ) -> Iterator[tuple[Values, int]]:
        keys = batch.keys.to(device, non_blocking=True)
        images = normalize(batch.images.to(device, non_blocking=True), self.model.spec)
        one, other = two_views(images, keys, self.config, self.model.patch_size, now.epoch)
        with autocast(self.config, device):
            loss, spread = network(one, other)
        yield {"loss": loss, "spread": spread, "ratio": torch.zeros_like(spread)}, len(keys)


def pieces_of(count: int, pieces: int) -> Iterator[slice]:
    """Cut `count` rows into as many pieces, as equal as can be; none is empty unless there are fewer rows.

    >>> list(pieces_of(5, 2))
    [slice(0, 2, None), slice(2, 5, None)]
    """
    for piece in range(pieces):
        rows = slice(piece * count // pieces, (piece + 1) * count // pieces)
        if rows.start < rows.stop:
            yield rows
