"""The teacher: an exponential moving average of the model that is evaluated on whole images.

It is updated just before whole images are analyzed, by what a decay per step would have left.
Between analyses every image is judged alike, whatever batch or worker it falls to and wherever a
run was resumed, and steps pay nothing.

Shapes: B images, N patches, P values per patch.
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
def update_teacher(
    model: MaskedAutoencoder, momentum: float, *, previous_step: int, step: int
) -> None:
    """Move the teacher, which averages the steps up to `previous_step`, on to `step`.

    The weights of the average fall by `momentum` a step, over the models that the teacher was
    updated with. The random weights of the start have none, or a short run would be taught by
    them. So the first update takes the model as it is:
    teacher <- teacher + (1 - momentum^(step - previous)) / (1 - momentum^step) (model - teacher).

    Source: our reconstruction; a bias-corrected average as in Adam.
    """
    if model.teacher is None:
        return
    weights = dict(model.named_parameters())
    share = (1 - momentum ** (step - previous_step)) / (1 - momentum**step)
    for name, parameter in model.teacher.named_parameters():
        parameter.lerp_(weights[name].to(parameter.dtype), share)


@torch.no_grad()
def teacher_view(
    model: MaskedAutoencoder, patches: Tensor, keys: Tensor, config: PretrainConfig, epoch: int
) -> TeacherView:
    """Evaluate the teacher on patches (B, N, P) for the outputs that `config` uses."""
    teacher = model.teacher
    selection = config.selection
    assert teacher is not None
    has_ranking = config.loss.ranking_weight > 0
    needs_difficulty = (selection.uses_score and selection.score == "difficulty") or (
        selection.uses_clusters and selection.rule == "hardest"
    )
    tokens = attention = difficulty = category = None
    if config.uses_feedback or (needs_difficulty and not has_ranking):
        difficulty, category = predict_complementary_halves(teacher, patches, keys, config, epoch)
    if needs_difficulty and has_ranking:
        difficulty = teacher.predicted_difficulty(patches).float()
    if selection.features == "tokens":
        tokens = encoder_tokens(teacher.encoder, patches)[:, teacher.prefix :]
    if selection.uses_score and selection.score == "attention":
        attention = patch_attention(teacher.encoder, patches).float()
    return TeacherView(tokens, attention, difficulty, category)


def predict_complementary_halves(
    teacher: MaskedAutoencoder,
    patches: Tensor,
    keys: Tensor,
    config: PretrainConfig,
    epoch: int,
) -> tuple[Tensor, Tensor | None]:
    """Return error and lesion probability of every patch, (B, N) each, from two passes.

    A patch has an error only where it was masked. Two complementary random halves mask each patch
    exactly once, so that none has error 0 for having been visible. A model without a category head
    gives no probability.

    Args:
        keys: (B,) int64, one identity per image.

    Source: our reconstruction.
    """
    b, n, _ = patches.shape
    noise = counter_rng.uniform(keys, n, seed=config.seed, epoch=epoch, stream=counter_rng.TEACHER)
    order = noise.argsort(1)
    first_half = order[:, : n // 2]
    second_half = order[:, n // 2 :]
    error = patches.new_zeros(b, n)
    category = patches.new_zeros(b, n)
    for masked, visible in ((first_half, second_half), (second_half, first_half)):
        prediction = teacher(patches, visible, masked)
        target = gather(patches, masked)
        errors = patch_errors(prediction.pixels.float(), target, config.loss)
        error.scatter_(1, masked, errors.difficulty)
        if prediction.category is not None:
            category.scatter_(1, masked, prediction.category.float().sigmoid())
    return error, category if teacher.category is not None else None
