"""What happens in one step of each objective, before the optimiser's: from a batch to its loss.

Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from amlp_ray.config import PretrainSettings
from amlp_ray.data.loading.batches import Batch
from amlp_ray.errors import SettingsError
from amlp_ray.method.augment import normalise
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.method.ema_teacher import move_teacher
from amlp_ray.method.losses import pretraining_loss
from amlp_ray.method.masking import Masking, Moment
from amlp_ray.method.masking_ratio import masked_count
from amlp_ray.method.patch_selection import Selection, selection_statistics
from amlp_ray.method.patches import gather
from amlp_ray.method.precision import autocast
from amlp_ray.method.simsiam import SimSiam, two_views

Model = MaskedAutoencoder | SimSiam
MAX_SHAPES = 8  # torch.compile gives up on a model after as many


Values = dict[str, Tensor]


class Step(Protocol):
    """Yields the loss of each piece of a batch and what is worth knowing of it, as scalars, and how many images it has.

    `loss` carries the gradient, which the caller takes before it asks for the next piece: then only one piece's
    activations are held. Masks are drawn for the batch as a whole, so they do not depend on the number of pieces.
    """

    def __call__(
        self, network: nn.Module, batch: Batch, now: Moment, device: str, pieces: int = 1
    ) -> Iterator[tuple[Values, int]]: ...

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """Told before the batches of an epoch, `steps` of them."""
        ...


def step_of(model: Model, settings: PretrainSettings, truth: Mapping[int, Tensor] | None) -> Step:
    if isinstance(model, SimSiam):
        return SiameseStep(model, settings)
    return ReconstructionStep(Masking(model, settings, truth))


class ReconstructionStep:
    """Masked image modelling: crop, mask, reconstruct."""

    def __init__(self, masking: Masking) -> None:
        self.masking, self.settings = masking, masking.settings

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """Let the teacher catch up where whole images are about to be looked at."""
        if epoch == 1 and self.settings.compile:
            self._check_shapes(steps)
        if epoch > 1 and self.masking.epoch_of_look(epoch) == epoch:
            before, now = (self.masking.epoch_of_look(epoch - 1) - 1) * steps, (epoch - 1) * steps
            move_teacher(self.masking.model, self.settings.ema, before=before, now=now)

    def _check_shapes(self, steps: int) -> None:
        patches = math.prod(self.masking.model.grid)
        moments = [
            Moment(e, i, steps) for e in range(1, self.settings.epochs + 1) for i in range(steps)
        ]
        ratios = {
            self.masking.ratio(now)
            for now in (moments if self.settings.ratio.per == "step" else moments[::steps])
        }
        counts = {masked_count(ratio, patches, self.settings.ratio.quantum) for ratio in ratios}
        if len(counts) > MAX_SHAPES:
            enough = math.ceil(
                (max(counts) - min(counts)) / (MAX_SHAPES - 2)
            )  # rounding adds one at either end
            raise SettingsError(
                f"compile meets {len(counts)} numbers of masked patches, of which torch keeps {MAX_SHAPES}; "
                f"set ratio.quantum to {enough} or more."
            )

    def __call__(
        self, network: nn.Module, batch: Batch, now: Moment, device: str, pieces: int = 1
    ) -> Iterator[tuple[Values, int]]:
        spec = self.masking.model.spec
        keys = batch.keys.to(device, non_blocking=True)
        images = normalise(batch.images.to(device, non_blocking=True), spec)
        patches, chosen = self.masking.augmented(images, keys, batch.keys, now)
        for rows in pieces_of(len(patches), pieces):
            yield (
                self._of(network, patches[rows], chosen.rows(rows), now, device),
                rows.stop - rows.start,
            )

    def _of(
        self, network: nn.Module, patches: Tensor, chosen: Selection, now: Moment, device: str
    ) -> Values:
        settings = self.settings
        with autocast(settings, device):
            prediction = network(patches, chosen.visible, chosen.masked)
        losses = pretraining_loss(
            prediction,
            gather(patches, chosen.masked),
            gather(chosen.lesion, chosen.masked),
            gather(chosen.tissue, chosen.masked),
            settings.loss,
            warming_up=now.epoch <= settings.loss.warmup * settings.epochs,
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


class SiameseStep:
    """SimSiam: two crops of each image."""

    def __init__(self, model: SimSiam, settings: PretrainSettings) -> None:
        self.model, self.settings = model, settings

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """Nothing to do: there is no mask to aim."""

    def __call__(
        self, network: nn.Module, batch: Batch, now: Moment, device: str, pieces: int = 1
    ) -> Iterator[tuple[Values, int]]:
        keys = batch.keys.to(device, non_blocking=True)
        images = normalise(batch.images.to(device, non_blocking=True), self.model.spec)
        one, other = two_views(images, keys, self.settings, self.model.patch_size, now.epoch)
        with autocast(self.settings, device):
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
