from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.models import GRAY, random_images, spec_of, tiny
from torch import Tensor

from amlp_ray.config import ModelConfig
from amlp_ray.method.augment import apply_crop, random_crop
from amlp_ray.method.encoder import encoder_tokens
from amlp_ray.method.patches import patchify, unpatchify
from amlp_ray.method.simsiam import SimSiam, two_views

SETTINGS = tiny({"variant": "simsiam"})
KEYS = torch.arange(8)


def network(seed: int = 0, **model: Any) -> SimSiam:
    torch.manual_seed(seed)
    return SimSiam(ModelConfig(**(SETTINGS.model.model_dump() | model)), spec_of(GRAY))


def views(count: int = 8, **config: Any) -> tuple[Tensor, Tensor]:
    chosen = SETTINGS.model_copy(update=config)
    return two_views(random_images(GRAY, count), KEYS[:count], chosen, 8, 1)


def test_the_loss_is_the_mean_negative_cosine_to_the_other_view() -> None:
    model = (
        network().eval()
    )  # batch norm by its running statistics, so that views can be computed apart
    one, other = views()
    loss, _ = model(one, other)
    z = [
        model.projector(encoder_tokens(model.encoder, view)[:, 1:].mean(1)) for view in (one, other)
    ]
    p = [model.predictor(each) for each in z]
    cosine = F.cosine_similarity(p[0], z[1]).mean() + F.cosine_similarity(p[1], z[0]).mean()
    torch.testing.assert_close(loss, -cosine / 2)
    assert -1 <= loss.item() <= 1


def test_projections_serve_as_targets_without_a_gradient() -> None:
    """With a constant predictor only targets could carry a gradient, and they do not."""
    model = network()
    with torch.no_grad():
        model.predictor[-1].weight.zero_()
        model.predictor[-1].bias.fill_(1.0)
    model(*views())[0].backward()
    assert not any(p.grad.any() for p in model.projector.parameters())
    assert not model.encoder.patch_embed.proj.weight.grad.any()


def test_the_views_exchanged_give_the_same_loss() -> None:
    model = network().eval()
    one, other = views()
    torch.testing.assert_close(model(one, other)[0], model(other, one)[0])


def test_the_spread_is_0_for_a_collapsed_network_and_about_1_for_a_fresh_one() -> None:
    model = network()
    assert 0.3 < float(model(*views())[1]) < 1.5
    same = views(1)[0].expand(8, -1, -1)
    assert float(model(same, same)[1]) < 0.01


def test_training_brings_views_together_without_collapse() -> None:
    """On smooth images, of which two crops share more than brightness and contrast."""
    coarse = random_images((1, 4, 4), 16)
    images, keys = F.interpolate(coarse, size=64, mode="bicubic"), torch.arange(16)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for epoch in range(1, 61):
        loss, spread = model(*two_views(images, keys, SETTINGS, 8, epoch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3
    assert float(spread) > 0.2


def test_the_encoder_is_told_from_projector_and_predictor_and_has_no_mask() -> None:
    names = {name.split(".")[0] for name in network().state_dict()}
    assert names == {"encoder", "projector", "predictor"}


@pytest.mark.parametrize("width", [16, 256, 1024])
def test_widths_follow_the_encoder_s_up_to_those_published(width: int) -> None:
    model = network(width=width, heads=2)
    wide = min(2048, 4 * width)
    assert model.projector[-1].num_features == wide
    assert model.predictor[0].out_features == wide // 4
    assert model.predictor[-1].out_features == wide


def test_the_views_are_two_different_crops_by_key_and_epoch() -> None:
    one, other = views()
    assert one.shape == other.shape == (8, 64, 64)
    assert not torch.allclose(one, other)
    again = views()
    assert torch.equal(one, again[0])
    assert torch.equal(other, again[1])
    rows = torch.tensor([5, 2])
    part = two_views(random_images(GRAY, 8)[rows], KEYS[rows], SETTINGS, 8, 1)
    assert torch.equal(part[0], one[rows])
    assert torch.equal(part[1], other[rows])
    assert not torch.allclose(two_views(random_images(GRAY, 8), KEYS, SETTINGS, 8, 2)[0], one)


def test_a_view_is_a_crop_with_its_own_contrast_and_brightness() -> None:
    images = random_images(GRAY, 8)
    crop = random_crop(KEYS, SETTINGS, 1)
    plain = patchify(apply_crop(images, crop), 8).flatten(1)
    view = two_views(images, KEYS, SETTINGS, 8, 1)[0].flatten(1)
    slopes = []
    for jittered, cropped in zip(view, plain, strict=True):
        slope = float(jittered.std() / cropped.std())
        shift = float(jittered.mean() - slope * cropped.mean())
        torch.testing.assert_close(jittered, slope * cropped + shift, atol=1e-4, rtol=0)
        assert 0.6 <= slope <= 1.4
        assert abs(shift) <= 0.4
        slopes.append(slope)
    assert max(slopes) - min(slopes) > 0.2


def test_without_crop_and_flip_views_differ_in_contrast_and_brightness_alone() -> None:
    one, other = (unpatchify(v, 8, (8, 8)) for v in views(min_crop_area=1.0, flip=False))
    for a, b in zip(one.flatten(1), other.flatten(1), strict=True):
        assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.999
        assert not torch.allclose(a, b)
