from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

from amlp_ray.data.phantoms import draw_phantom
from amlp_ray.method.patch_scores import patch_score
from amlp_ray.method.patches import patchify, tissue_patches

SCORES = ("row_contrast", "blob", "border_saliency", "geodesic", "texture", "combined")
SIGNED = ("row_contrast", "blob")


def scored(
    images: Tensor,
    p: int = 8,
    *,
    score: str = "combined",
    sign: str = "dark",
    prior: float = 0.0,
    border: bool = False,
) -> Tensor:
    """Scores (B, N) of images (B, C, H, W); `border` filters the black border away."""
    patches = patchify(images, p)
    grid = (images.shape[2] // p, images.shape[3] // p)
    tissue = torch.ones(patches.shape[:2], dtype=torch.bool)
    if border:
        tissue = tissue_patches(patches, mean_above=0.02, std_above=0.01)
    return patch_score(patches, tissue, grid, score=score, sign=sign, center_prior=prior)


def auc(value: Tensor, masks: Tensor, p: int = 8) -> float:
    """Mean over images of the AUC for patches of a quarter lesion or more against those of none.

    The rest is rim.
    """
    share = F.avg_pool2d(masks[:, None].float(), p)[:, 0].flatten(1)
    aucs = []
    for v, s in zip(value, share, strict=True):
        clear = (s >= 0.25) | (s == 0)
        if (s >= 0.25).any():
            aucs.append(roc_auc_score(s[clear] >= 0.25, v[clear]))
    return float(np.mean(aucs))


def phantoms(kind: str, count: int, size: int = 96) -> tuple[Tensor, Tensor]:
    drawn = [
        draw_phantom(kind, size, np.random.default_rng([11, i]), lesion=True) for i in range(count)
    ]  # type: ignore[arg-type]
    images, masks = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*drawn, strict=True))
    return images[:, None].float() / 64, masks


@pytest.mark.parametrize(
    ("score", "least"),
    [
        ("row_contrast", 0.75),
        ("blob", 0.75),
        ("border_saliency", 0.65),
        ("geodesic", 0.65),
        ("combined", 0.8),
    ],
)
def test_every_score_ranks_dark_lesions_of_ultrasound_phantoms_high(
    score: str, least: float
) -> None:
    images, masks = phantoms("ultrasound", 30)
    assert auc(scored(images, score=score), masks) > least


def test_the_wrong_sign_ranks_dark_lesions_low() -> None:
    images, masks = phantoms("ultrasound", 20)
    for score in ("row_contrast", "blob"):
        assert auc(scored(images, score=score, sign="bright"), masks) < 0.5


def test_bright_lesions_of_pet_phantoms_are_found_with_the_bright_sign() -> None:
    images, masks = phantoms("pet", 20)
    assert auc(scored(images, sign="bright", border=True), masks) > 0.7
    assert auc(scored(images, score="blob", sign="free", border=True), masks) > 0.6


@pytest.mark.real
def test_combined_finds_real_breast_lesions_without_any_training(real_data: Path) -> None:
    folder = next(iter(sorted((real_data / "busi").glob("*/benign")))).parent
    images, masks = [], []
    for path in sorted(folder.glob("[bm]*/*_mask.png"))[:100]:
        image = (
            Image.open(path.with_name(path.name.replace("_mask", "")))
            .convert("L")
            .resize((96, 96), 2)
        )
        images.append(np.asarray(image, np.float32) / 64)
        masks.append(np.asarray(Image.open(path).convert("L").resize((96, 96), 0)) > 0)
    batch, truth = torch.from_numpy(np.stack(images))[:, None], torch.from_numpy(np.stack(masks))
    assert auc(scored(batch, border=True), truth) > 0.7
    assert auc(scored(batch, border=True, prior=0.8), truth) > 0.7


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("side", [64, 56])  # an even and an odd number of patches a row
def test_dark_on_an_image_equals_bright_on_its_negative(score: str, side: int) -> None:
    images, _ = phantoms("ultrasound", 6, side)
    dark, bright = scored(images, score=score), scored(-images, score=score, sign="bright")
    torch.testing.assert_close(dark, bright, atol=1e-3, rtol=0)


@pytest.mark.parametrize("score", SCORES)
def test_the_free_sign_does_not_care_for_inversion(score: str) -> None:
    images, _ = phantoms("mri", 6, 64)
    torch.testing.assert_close(
        scored(images, score=score, sign="free"),
        scored(-images, score=score, sign="free"),
        atol=1e-3,
        rtol=0,
    )


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("prior", [0.0, 0.8])
@pytest.mark.parametrize("border", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.3, -7.1])
def test_an_image_whose_patches_are_all_alike_scores_0(
    score: str, prior: float, border: bool, value: float
) -> None:
    texture = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).tile(1, 1, 6, 6)
    images = torch.cat([torch.full((1, 1, 48, 48), value), texture + value])
    assert not scored(images, score=score, prior=prior, border=border).any()


def test_patches_that_are_alike_get_like_scores_wherever_they_lie() -> None:
    """A saturated image has many equal patches.

    Ranked by position they would be masked from the bottom up.
    """
    image = torch.zeros(1, 1, 64, 64)
    image[..., 24:40, 24:40] = -1
    value = scored(image, score="combined")[0].view(8, 8)
    torch.testing.assert_close(value, value.flip(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(value, value.flip(1), atol=1e-4, rtol=0)
    assert value.argmax() in (27, 28, 35, 36)


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_z_scores_over_tissue_and_border_patches_get_the_lowest(score: str) -> None:
    images, _ = phantoms("mri", 4)
    tissue = tissue_patches(patchify(images, 8), mean_above=0.02, std_above=0.01)
    assert int((~tissue).sum()) > 0
    value = scored(images, score=score, sign="bright", border=True)
    for v, t in zip(value, tissue, strict=True):
        assert abs(float(v[t].mean())) < 1e-4
        assert float(v[t].std(correction=0)) == pytest.approx(1, abs=1e-3)
        assert (v[~t] == v[t].min()).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (2, 3), (12, 4)])
def test_any_grid_is_scored_with_finite_values(score: str, grid: tuple[int, int]) -> None:
    images = torch.rand(3, 2, grid[0] * 4, grid[1] * 4, generator=torch.Generator().manual_seed(0))
    images[0] = 0
    value = scored(images, 4, score=score, prior=0.5, border=True)
    assert value.shape == (3, grid[0] * grid[1])
    assert value.isfinite().all()


def test_a_narrow_center_prior_moves_the_score_to_the_center() -> None:
    images, _ = phantoms("ultrasound", 6)
    images = torch.cat([images, images.roll(40, 3)])
    corner = torch.zeros(12, 12, dtype=torch.bool)
    corner[:3, :3] = corner[-3:, -3:] = True
    without, wide, narrow = (
        scored(images, prior=sd).view(-1, 12, 12)[:, corner].mean() for sd in (0.0, 0.8, 0.3)
    )
    assert narrow < wide < without


def test_row_contrast_takes_out_attenuation_with_depth() -> None:
    images, _ = phantoms("ultrasound", 6)
    deeper = images - 3 * torch.arange(96).div(8, rounding_mode="floor")[:, None] / 12
    middle = torch.zeros(12, 12, dtype=torch.bool)
    middle[1:-1] = True  # the first and last rows have neighbors on one side only
    a, b = (scored(x, score="row_contrast").view(-1, 12, 12)[:, middle] for x in (images, deeper))
    assert float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) > 0.95


@pytest.mark.parametrize("score", SCORES)
def test_the_units_of_an_image_and_its_batch_do_not_change_its_scores(score: str) -> None:
    images, _ = phantoms("ultrasound", 5, 64)
    whole = scored(images, score=score)
    torch.testing.assert_close(scored(images * 40 + 5, score=score), whole, atol=1e-2, rtol=0)
    assert torch.equal(scored(images[[3, 1]], score=score), whole[[3, 1]])
