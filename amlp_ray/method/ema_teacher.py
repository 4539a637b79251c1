"""The teacher: a moving average of the model that is asked about whole images.

It moves just before whole images are looked at, by what a decay per step would have left: between looks every image
is judged alike, whatever batch or worker it falls to and wherever a run was resumed, and steps pay nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amlp_ray.config import PretrainConfig
from amlp_ray.method import counter_rng
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.method.encoder import encoder_tokens, patch_attention
from amlp_ray.method.lesion_map import TeacherView
from amlp_ray.method.losses import patch_errors
from amlp_ray.method.patches import gather


@torch.no_grad()
def move_teacher(model: MaskedAutoencoder, decay: float, *, before: int, now: int) -> None:
    """Move the teacher, which stands for the steps up to `before`, on to `now`.

    An average with weights that fall by `decay` a step, over the models that it was shown; the random weights of the
    start have none, or a short run would be taught by them. So the first move takes the model as it is:
    teacher <- teacher + (1 - decay^(now - before)) / (1 - decay^now) (model - teacher).
    """
    if model.teacher is None:
        return
    own = dict(model.named_parameters())
    share = (1 - decay ** (now - before)) / (1 - decay**now)
    for name, parameter in model.teacher.named_parameters():
        parameter.lerp_(own[name].to(parameter.dtype), share)


@torch.no_grad()
def teacher_view(
    model: MaskedAutoencoder, patches: Tensor, keys: Tensor, config: PretrainConfig, epoch: int
) -> TeacherView:
    """Ask the teacher about patches (B, N, P) for what the settings use, and for nothing else."""
    teacher, s = model.teacher, config.selection
    assert teacher is not None
    ranked = config.loss.ranking_weight > 0
    wants_difficulty = (s.uses_score and s.score == "difficulty") or (
        s.uses_clusters and s.rule == "hardest"
    )
    difficulty = category = None
    if config.uses_feedback or (wants_difficulty and not ranked):
        difficulty, category = masked_once(teacher, patches, keys, config, epoch)
    if wants_difficulty and ranked:
        difficulty = teacher.predicted_difficulty(patches).float()
    prefix = teacher.prefix
    return TeacherView(
        tokens=encoder_tokens(teacher.encoder, patches)[:, prefix:]
        if s.features == "tokens"
        else None,
        attention=patch_attention(teacher.encoder, patches).float()
        if s.uses_score and s.score == "attention"
        else None,
        difficulty=difficulty,
        category=category,
    )


def masked_once(
    teacher: MaskedAutoencoder,
    patches: Tensor,
    keys: Tensor,
    config: PretrainConfig,
    epoch: int,
) -> tuple[Tensor, Tensor | None]:
    """Error and category probability of every patch, (B, N) each, from two passes that hide one half each.

    A patch has an error only where it was masked. Two complementary random halves mask each exactly once, so that none
    reads 0 for having been visible. Our reconstruction.
    """
    b, n, _ = patches.shape
    order = counter_rng.uniform(
        keys, n, seed=config.seed, epoch=epoch, stream=counter_rng.TEACHER
    ).argsort(1)
    halves = order[:, : n // 2], order[:, n // 2 :]
    error, category = patches.new_zeros(b, n), patches.new_zeros(b, n)
    for hidden, shown in (halves, halves[::-1]):
        told = teacher(patches, shown, hidden)
        errors = patch_errors(told.pixels.float(), gather(patches, hidden), config.loss)
        error.scatter_(1, hidden, errors.difficulty)
        if told.category is not None:
            category.scatter_(1, hidden, told.category.float().sigmoid())
    return error, category if teacher.category is not None else None
