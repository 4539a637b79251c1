from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from amlp_ray.config import ImageSpec, PretrainSettings
from amlp_ray.method.augment import normalise
from amlp_ray.method.model import MaskedAutoencoder
from amlp_ray.method.patches import patchify
from amlp_ray.method.pictures import picture_strips
from amlp_ray.method.ratio import masked_count
from amlp_ray.method.selection import select_patches

SIDE, TITLE, GAP = 192, 22, 8
SHAPES = [(1, 64, 64), (2, 48, 64), (3, 64, 32)]


def draw(
    shape: tuple[int, int, int] = (1, 64, 64), *, masks: bool = False, epoch: int = 1, **settings: Any
) -> tuple[list[Any], Tensor, PretrainSettings]:
    """(strips, images, settings) of two stored images of noise with a dark square."""
    channels, height, width = shape
    spec = ImageSpec(channels=channels, height=height, width=width, mean=(120,) * channels, std=(60,) * channels)
    model = {"patch_size": 8, "width": 24, "depth": 1, "heads": 2, "decoder_width": 16}
    chosen = PretrainSettings.model_validate({"epochs": 3, "model": model, **settings})
    torch.manual_seed(0)
    net = MaskedAutoencoder(chosen.model, spec).eval()
    images = torch.randint(60, 255, (2, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[..., 16:32, 16:32] = 5
    truth = None
    if masks:
        truth = np.zeros((2, height, width), np.uint8)
        truth[:, 16:32, 16:32] = 1
    return picture_strips(net, images, torch.tensor([5, 9]), truth, chosen, epoch), images, chosen


def columns_of(strip: Any, shape: tuple[int, int, int]) -> list[np.ndarray]:
    """The pictures of a strip, each (height, width, 3), without their titles."""
    _, height, width = shape
    shown = (round(SIDE * width / max(height, width)), round(SIDE * height / max(height, width)))
    assert strip.height == shown[1] + TITLE
    assert (strip.width + GAP) % (shown[0] + GAP) == 0
    pixels = np.asarray(strip)[TITLE:]
    return [pixels[:, left : left + shown[0]] for left in range(0, strip.width, shown[0] + GAP)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("variant", "masks", "columns"), [("amlp", False, 4), ("amlp", True, 5), ("mae", False, 3), ("mae", True, 4)]
)
def test_a_strip_has_a_column_per_picture_and_random_masking_names_no_probable_lesion(
    shape: tuple[int, int, int], variant: str, masks: bool, columns: int
) -> None:
    strips, _, _ = draw(shape, masks=masks, variant=variant)
    assert len(strips) == 2
    for strip in strips:
        assert len(columns_of(strip, shape)) == columns


@pytest.mark.parametrize("norm_pix", [True, False])
def test_visible_regions_of_the_reconstruction_are_the_input_and_masked_ones_are_grey_in_the_mask(
    norm_pix: bool,
) -> None:
    shape = (1, 64, 64)
    strips, images, chosen = draw(shape, variant="mae", loss={"norm_pix": norm_pix})
    spec = ImageSpec(channels=1, height=64, width=64, mean=(120,), std=(60,))
    picked = select_patches(
        patchify(normalise(images, spec), 8), torch.tensor([5, 9]), masked_count(0.75, 64), (8, 8), 1,
        chosen.selection, seed=chosen.seed, epoch=1,
    )  # fmt: skip
    for i, strip in enumerate(strips):
        whole, masked, again = columns_of(strip, shape)
        visible = torch.ones(64).scatter(0, picked.masked[i], 0).view(8, 8).bool().numpy()
        # Every patch is shown 24 pixels wide; bicubic resizing mixes some pixels at its rim.
        for row in range(8):
            for column in range(8):
                inside = np.s_[row * 24 + 8 : row * 24 + 16, column * 24 + 8 : column * 24 + 16]
                if visible[row, column]:
                    assert np.abs(whole[inside].astype(int) - masked[inside]).max() <= 1
                else:
                    assert (masked[inside] == 128).all()
                    if whole[inside].std() > 0:  # a flat patch has nothing to standardise: its mean is its picture
                        assert not np.array_equal(whole[inside], again[inside])
        # Both pictures have a scale of their own (percentiles), so the input is recovered by a line.
        seen = np.kron(visible, np.pad(np.ones((8, 8)), 8)).astype(bool)
        a, b = (x[..., 0][seen].astype(float) for x in (whole, again))
        clear = (a > 5) & (a < 250) & (b > 5) & (b < 250)
        assert np.corrcoef(a[clear], b[clear])[0, 1] > 0.999


def test_predictions_of_standardised_patches_are_put_back_to_the_patch_s_own_mean_and_contrast() -> None:
    """A prediction of 0 is then the mean of each patch: bright on the right, dark on the left."""
    spec = ImageSpec(channels=1, height=32, width=32, mean=(120,), std=(60,))
    model = {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16}
    chosen = PretrainSettings.model_validate({"variant": "mae", "model": model, "loss": {"norm_pix": True}})
    net = MaskedAutoencoder(chosen.model, spec).eval()
    torch.nn.init.zeros_(net.predict.weight)
    image = torch.randint(40, 60, (1, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image[..., 16:] += 150
    (strip,) = picture_strips(net, image, torch.tensor([1]), None, chosen, 1)
    again = columns_of(strip, (1, 32, 32))[-1]
    assert again[:, :88].max() < 60
    assert again[:, 104:].min() > 195


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_constant_image_gives_a_picture(norm_pix: bool) -> None:
    spec = ImageSpec(channels=1, height=32, width=32, mean=(120,), std=(60,))
    chosen = PretrainSettings.model_validate(
        {"model": {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16}, "loss": {"norm_pix": norm_pix}}
    )
    net = MaskedAutoencoder(chosen.model, spec).eval()
    (strip,) = picture_strips(net, torch.full((1, 1, 32, 32), 7, dtype=torch.uint8), torch.tensor([1]), None, chosen, 1)
    assert strip.width > strip.height


def test_the_masked_column_shows_the_ratio_of_the_epoch() -> None:
    shape = (1, 64, 64)
    shares = []
    for epoch in (1, 3):
        strips, _, _ = draw(shape, epoch=epoch, selection={"mode": "random"}, ratio={"start": 0.25, "end": 0.75})
        masked = columns_of(strips[0], shape)[1]
        shares.append(float((masked.reshape(8, 24, 8, 24, 3)[:, 8:16, :, 8:16] == 128).all((1, 3, 4)).mean()))
    assert shares == [0.25, 0.75]


def test_the_true_lesion_is_tinted_green_where_the_mask_says() -> None:
    shape = (3, 64, 64)
    strips, _, _ = draw(shape, masks=True, variant="mae")
    whole, *_, true = columns_of(strips[0], shape)
    greener = true.astype(int)[..., 1] - true[..., 0] > 20
    assert greener[60:84, 60:84].all()
    assert np.abs(true[120:].astype(int) - whole[120:]).max() <= 1
