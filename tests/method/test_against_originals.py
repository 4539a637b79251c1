"""Our model, losses and masks against the public code of MAE and HPM, weight for weight.

Set AMLP_RAY_ORIGINALS to a folder that holds clones of facebookresearch/mae as `mae` and
Haochen-Wang409/HPM as `HPM`.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from amlp_ray.config import ImageSpec, LossConfig, ModelConfig, PretrainConfig
from amlp_ray.method.autoencoder import MaskedAutoencoder, build_autoencoder
from amlp_ray.method.encoder import sincos_positions
from amlp_ray.method.losses import patch_errors, pretraining_loss, ranking_loss
from amlp_ray.method.masking import Masking, TrainingStep
from amlp_ray.method.patches import gather, patchify

ORIGINALS = os.environ.get("AMLP_RAY_ORIGINALS", "")
IMPORTER = Path(__file__).parents[2] / "benchmarks" / "originals.py"
SIZE, PATCH, IMAGES = 64, 8, 4
VALUES = 3 * PATCH**2
SPEC = ImageSpec(channels=3, height=SIZE, width=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
SIZES = ModelConfig(
    patch_size=PATCH, width=48, depth=2, heads=3, decoder_width=32, decoder_depth=2, decoder_heads=2
)
PLAIN = LossConfig(weighting="none", ccl_weight=0.0)

# Theirs are rows of (p, p, C), ours of (C, p, p): row i of ours is row ORDER[i] of theirs.
ORDER = torch.arange(VALUES).reshape(PATCH, PATCH, 3).permute(2, 0, 1).flatten()
NAMES = {
    "cls_token": "encoder.cls_token",
    "pos_embed": "encoder.pos_embed",
    "patch_embed": "encoder.patch_embed",
    "blocks": "encoder.blocks",
    "norm": "encoder.norm",
    "decoder_embed": "decoder_embed",
    "mask_token": "mask_token",
    "decoder_blocks": "decoder.blocks",
    "decoder_norm": "decoder.norm",
    "decoder_pred": "predict",
    "decoder_blocks_losspred": "ranking.blocks",
    "decoder_norm_losspred": "ranking.norm",
    "decoder_pred_losspred": "rank",
}

Original = Callable[[Path, str], AbstractContextManager[ModuleType]]


def ours_of(reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an original under our names and in our order.

    HPM's P predictions per patch, averaged, are our one.
    """
    renamed = {}
    for name, value in reference.items():
        part, dot, rest = name.partition(".")
        if part == "decoder_pred":
            value = value[ORDER]
        elif part == "decoder_pred_losspred":
            value = value.mean(0, keepdim=True)
        if part != "decoder_pos_embed":  # a buffer of ours that is not saved
            renamed[NAMES[part] + dot + rest] = value
    return renamed


def built(folder: str, module: str, *, norm_pix: bool = False) -> Any:
    """An original's model with weights that are far from those it starts with."""
    path = Path(ORIGINALS) / folder
    if not ORIGINALS or not path.is_dir():
        pytest.skip(
            f"AMLP_RAY_ORIGINALS names no folder that holds {folder}/, "
            "a clone of the public repository"
        )
    if folder == "HPM":
        pytest.importorskip("einops", reason="HPM's code imports einops")
    original: Original = runpy.run_path(str(IMPORTER))["original"]
    torch.manual_seed(0)
    with original(path, module) as loaded:
        model = loaded.MaskedAutoencoderViT(
            SIZE,
            PATCH,
            3,
            SIZES.width,
            SIZES.depth,
            SIZES.heads,
            SIZES.decoder_width,
            SIZES.decoder_depth,
            SIZES.decoder_heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            norm_pix_loss=norm_pix,
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def converted(reference: Any, *, ranking: bool = False) -> MaskedAutoencoder:
    ours = MaskedAutoencoder(SIZES, SPEC, ranking=ranking)
    ours.load_state_dict(ours_of(reference.state_dict()))
    return ours


def split(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Visible and masked indices of a mask (B, N), true where masked, equally many in each row."""
    rows = mask.shape[0]
    return (~mask).nonzero()[:, 1].view(rows, -1), mask.nonzero()[:, 1].view(rows, -1)


def close_gradients(reference: Any, ours: nn.Module, *, but: str = "none") -> None:
    """Every gradient of ours equals that of the reference, to 1e-4 of the largest of its tensor.

    Some are 0 but for rounding.
    """
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    expected = {
        name: value for name, value in ours_of(gradients).items() if not name.startswith(but)
    }
    assert len(expected) > 40
    parameters = dict(ours.named_parameters())
    for name, value in expected.items():
        assert_close(
            parameters[name].grad,
            value,
            rtol=0,
            atol=1e-6 + 1e-4 * value.abs().max().item(),
            msg=name,
        )


@pytest.fixture
def images() -> Tensor:
    """Smooth images, so that patches differ in how hard they are."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(IMAGES, 3, 9, 9, generator=generator)
    smooth = nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic")
    return smooth + 0.1 * torch.randn(smooth.shape, generator=generator)


def test_positions_are_those_of_mae() -> None:
    reference = built("mae", "models_mae")
    assert_close(
        sincos_positions((8, 8), SIZES.width, 1), reference.pos_embed.data, rtol=0, atol=1e-6
    )
    assert_close(
        sincos_positions((8, 8), SIZES.decoder_width, 1),
        reference.decoder_pos_embed.data,
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_predictions_and_gradients_are_those_of_mae(images: Tensor, norm_pix: bool) -> None:
    reference = built("mae", "models_mae", norm_pix=norm_pix)
    ours = converted(reference)
    loss, pixels, mask = reference(images, 0.75)
    visible, masked = split(mask.bool())
    patches = patchify(images, PATCH)
    prediction = ours(patches, visible, masked)
    nothing = torch.zeros_like(masked, dtype=torch.bool)
    config = PLAIN.model_copy(update={"norm_pix": norm_pix})
    target = gather(patches, masked)
    losses = pretraining_loss(prediction, target, nothing, ~nothing, config, warming_up=False)
    assert masked.shape == (IMAGES, 48)
    assert_close(prediction.pixels, gather(pixels[..., ORDER], masked), rtol=1e-5, atol=1e-5)
    assert_close(losses.total, loss, rtol=1e-6, atol=0)
    loss.backward()
    losses.total.backward()
    close_gradients(reference, ours)


def test_ranking_and_its_gradients_are_those_of_hpm(images: Tensor) -> None:
    reference = built("HPM", "models_mae_learn_loss")
    ours = converted(reference, ranking=True)
    mask = reference.generate_mask(
        torch.rand(IMAGES, 64), 0.75, guide=True, epoch=0, total_epoch=100
    ).bool()
    out = reference(images, mask)
    count = out["mask_num"]
    reconstruction = reference.forward_loss(images, out["pix_pred"][:, -count:], mask)
    learning = reference.forward_learning_loss(
        out["loss_pred"][:, -count:], mask, reconstruction["matrix"].detach(), relative=True
    )
    visible, masked = split(mask)
    patches = patchify(images, PATCH)
    prediction = ours(patches, visible, masked)
    errors = patch_errors(prediction.pixels, gather(patches, masked), PLAIN)
    ranking = ranking_loss(prediction.difficulty, errors.difficulty)
    assert_close(errors.loss, reconstruction["matrix"], rtol=1e-5, atol=1e-6)
    assert_close(prediction.difficulty, out["loss_pred"][:, -count:], rtol=1e-4, atol=1e-6)
    assert_close(ranking, learning, rtol=1e-5, atol=0)
    (reconstruction["mean"] + learning).backward()
    (errors.loss.mean() + ranking).backward()
    # Averaging P predictions divides the gradient of each row by P.
    gradient, rows = (
        ours.get_parameter("rank.weight").grad,
        reference.decoder_pred_losspred.weight.grad,
    )
    assert_close(gradient, rows.sum(0, keepdim=True), rtol=1e-4, atol=1e-6)
    close_gradients(reference, ours, but="rank.")


def test_difficulty_of_whole_images_is_that_of_the_teacher_of_hpm(images: Tensor) -> None:
    reference = built("HPM", "models_mae_learn_loss").eval()
    ours = converted(reference, ranking=True)
    with torch.no_grad():
        expected = reference(images, torch.zeros(IMAGES, 64, dtype=torch.bool))["loss_pred"]
        actual = ours.predicted_difficulty(patchify(images, PATCH))
    assert expected.std() > 1e-3
    assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("epoch", [1, 3, 50, 99, 100])
def test_at_every_epoch_the_patches_that_hpm_masks_for_their_difficulty_are_masked(
    images: Tensor, epoch: int
) -> None:
    reference = built("HPM", "models_mae_learn_loss").eval()
    config = PretrainConfig(variant="hpm", epochs=100, model=SIZES, min_crop_area=1.0, flip=False)
    ours = build_autoencoder(config, SPEC)
    assert ours.teacher is not None
    ours.teacher.load_state_dict(ours_of(reference.state_dict()))
    with torch.no_grad():
        difficulty = reference(images, torch.zeros(IMAGES, 64, dtype=torch.bool))["loss_pred"]
    keys = torch.arange(IMAGES)
    _, chosen = Masking(ours, config).mask_augmented(images, keys, keys, TrainingStep(epoch))
    their_masks = [
        reference.generate_mask(
            difficulty, 0.75, guide=True, epoch=epoch - 1, total_epoch=100
        ).bool()
        for _ in range(64)
    ]
    our_mask = torch.zeros(IMAGES, 64, dtype=torch.bool).scatter(1, chosen.masked, True)
    assert {int(count) for mask in [our_mask, *their_masks] for count in mask.sum(1)} == {48}
    always = torch.stack(their_masks).all(
        0
    )  # 64 draws leave next to nothing masked by chance alone
    assert always.sum(1).tolist() == [int(48 * 0.5 * epoch / 100)] * IMAGES
    assert (our_mask | ~always).all()
