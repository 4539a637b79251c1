from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.errors import ConfigError
from amlp_ray.method.autoencoder import MaskedAutoencoder, build_autoencoder
from amlp_ray.method.visualization import (
    Panels,
    analyze,
    draw_heatmap,
    draw_outline,
    draw_panels,
    draw_sheet,
    draw_strip,
    picture_strips,
    resize_map,
)

SIDE, TITLE, GAP = 192, 22, 8
SHAPES = [(1, 64, 64), (2, 48, 64), (3, 64, 32)]
SQUARE = np.s_[..., 16:32, 16:32]  # the lesion: 2 x 2 patches of 8 pixels
KEYS = torch.tensor([5, 9])


def setting(
    shape: tuple[int, int, int] = (1, 64, 64), **overrides: Any
) -> tuple[MaskedAutoencoder, PretrainConfig]:
    channels, height, width = shape
    spec = ImageSpec(
        channels=channels, height=height, width=width, mean=(120,) * channels, std=(60,) * channels
    )
    model = {"patch_size": 8, "width": 24, "depth": 1, "heads": 2, "decoder_width": 16}
    config = PretrainConfig.model_validate({"epochs": 3, "model": model, **overrides})
    torch.manual_seed(0)
    return build_autoencoder(config, spec).eval(), config


def noise_with_a_square(shape: tuple[int, int, int] = (1, 64, 64)) -> tuple[Tensor, np.ndarray]:
    """Two stored images of noise with a dark square, and the masks of the square."""
    images = torch.randint(
        60, 255, (2, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    images[SQUARE] = 5
    masks = np.zeros((2, *shape[1:]), np.uint8)
    masks[SQUARE] = 1
    return images, masks


def draw(
    shape: tuple[int, int, int] = (1, 64, 64),
    *,
    masks: bool = True,
    epoch: int = 1,
    **overrides: Any,
) -> list[Panels]:
    model, config = setting(shape, **overrides)
    images, truth = noise_with_a_square(shape)
    true_masks = truth if masks else None
    return draw_panels(
        analyze(model, images, KEYS, true_masks, config, epoch), model, true_masks, config
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("variant", "masks", "columns"),
    [("amlp", False, 4), ("amlp", True, 5), ("mae", False, 3), ("mae", True, 4)],
)
def test_a_run_s_own_strip_has_a_column_per_picture_and_random_masking_names_no_probable_lesion(
    shape: tuple[int, int, int], variant: str, masks: bool, columns: int
) -> None:
    model, config = setting(shape, variant=variant)
    images, truth = noise_with_a_square(shape)
    strips = picture_strips(model, images, KEYS, truth if masks else None, config, 1)
    longest = max(shape[1:])
    height, width = (round(SIDE * side / longest) for side in shape[1:])
    assert [each.size for each in strips] == [(columns * (width + GAP) - GAP, height + TITLE)] * 2


@pytest.mark.parametrize(
    ("overrides", "titles"),
    [
        ({"variant": "mae"}, {"masked", "error,"}),
        ({"variant": "mps-ams"}, {"masked", "error,", "clusters", "probable lesion"}),
        (
            {"variant": "amlp"},
            {"masked", "error,", "clusters", "probable lesion", "teacher's probability"},
        ),
        (
            {"variant": "amlp", "selection": {"feedback": 0.0}},
            {"masked", "error,", "clusters", "probable lesion", "learned probability"},
        ),
        ({"variant": "amlp-soft"}, {"masked", "error,", "probable lesion", "score: geodesic"}),
        ({"variant": "hpm"}, {"masked", "error,", "probable lesion", "score: difficulty"}),
        ({"variant": "semmae"}, {"masked", "error,", "clusters"}),
        (
            {"variant": "amlp-soft", "selection": {"score": "cluster"}},
            {"masked", "error,", "clusters", "probable lesion", "cluster probability"},
        ),
        (
            {"selection": {"hard_by": "score", "score": "blob"}},
            {"masked", "error,", "probable lesion", "score: blob"},
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_the_full_panels_are_those_that_the_settings_have_something_to_show_for(
    overrides: dict[str, Any], titles: set[str]
) -> None:
    for image in draw(**overrides):
        drawn_titles = {
            "masked" if t.startswith("masked") else "error," if t.startswith("error,") else t
            for t in image
        }
        assert drawn_titles == titles | {"input", "reconstruction", "true lesion"}
        assert {(pixels.shape, pixels.dtype) for pixels in image.values()} == {
            ((SIDE, SIDE, 3), np.dtype(np.uint8))
        }


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_reconstruction_is_the_input_where_visible_and_another_where_the_mask_is_gray(
    norm_pix: bool,
) -> None:
    overrides = {"variant": "mae", "loss": {"norm_pix": norm_pix}}
    model, config = setting(**overrides)
    analysis = analyze(model, noise_with_a_square()[0], KEYS, None, config, 1)
    for i, image in enumerate(draw(masks=False, **overrides)):
        for row in range(8):
            for column in range(8):
                # Every patch is 24 pixels wide; bicubic resizing mixes some pixels at its rim.
                inside = np.s_[row * 24 + 8 : row * 24 + 16, column * 24 + 8 : column * 24 + 16]
                whole, again, masked = (
                    image[name][inside] for name in ("input", "reconstruction", "masked 75%")
                )
                if analysis.masked[i, row * 8 + column]:
                    assert (masked == 128).all()
                    if (
                        whole.std() > 0
                    ):  # a flat patch has nothing to standardize: its mean is its picture
                        assert not np.array_equal(whole, again)
                else:
                    np.testing.assert_array_equal(whole, masked)
                    np.testing.assert_array_equal(whole, again)


def test_predictions_of_standardized_patches_get_the_patch_s_own_mean_and_contrast_back() -> None:
    """A prediction of 0 is then the mean of each patch: bright on the right, dark on the left."""
    model, config = setting((1, 32, 32), variant="mae", loss={"norm_pix": True})
    torch.nn.init.zeros_(model.predict.weight)
    image = torch.randint(
        40, 60, (1, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    image[..., 16:] += 150
    analysis = analyze(model, image, KEYS[:1], None, config, 1)
    again = draw_panels(analysis, model, None, config)[0]["reconstruction"]
    assert again[:, :88].max() < 60
    assert again[:, 104:].min() > 195
    assert float(analysis.error.max()) < 0.02, (
        "the spread of 6 of 255 within patches, in images of SD 60"
    )


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("variant", ["amlp", "amlp-soft", "mae"])
def test_a_constant_image_gives_a_picture(variant: str, norm_pix: bool) -> None:
    model, config = setting((1, 32, 32), variant=variant, loss={"norm_pix": norm_pix})
    image, mask = torch.full((1, 1, 32, 32), 7, dtype=torch.uint8), np.zeros((1, 32, 32), np.uint8)
    (panels,) = draw_panels(analyze(model, image, KEYS[:1], mask, config, 1), model, mask, config)
    assert draw_strip(panels).width > 4 * SIDE


def test_the_masked_column_shows_the_ratio_of_the_epoch() -> None:
    for epoch, ratio in ((1, 0.25), (3, 0.75)):
        overrides = {"selection": {"mode": "random"}, "ratio": {"start": 0.25, "end": 0.75}}
        masked = draw(epoch=epoch, masks=False, **overrides)[0][f"masked {ratio:.0%}"]
        assert (masked.reshape(8, 24, 8, 24, 3)[:, 8:16, :, 8:16] == 128).all(
            (1, 3, 4)
        ).mean() == ratio


def test_errors_are_those_of_the_masked_patches_in_the_image_s_scale() -> None:
    model, config = setting(variant="mae")
    torch.nn.init.zeros_(model.predict.weight)
    images = noise_with_a_square()[0]
    analysis = analyze(model, images, KEYS, None, config, 1)
    scaled = (images[:, 0].double() - 120) / 60
    power = (
        scaled.square().reshape(2, 8, 8, 8, 8).mean((2, 4)).flatten(1)
    )  # a prediction of 0 misses all of it
    torch.testing.assert_close(
        analysis.error.double(), torch.where(analysis.masked, power, 0.0), rtol=1e-5, atol=1e-6
    )


def test_colors_of_an_rgb_image_are_kept() -> None:
    model, config = setting((3, 32, 32), variant="mae")
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    images[:, 0], images[:, 1] = 200, 100
    images[..., 16:] //= 2
    panel = draw_panels(analyze(model, images, KEYS[:1], None, config, 1), model, None, config)[0][
        "input"
    ]
    np.testing.assert_array_equal(panel[96, 48], [255, 128, 0])
    np.testing.assert_array_equal(panel[96, 144], [128, 64, 0])


def test_clusters_have_the_same_color_in_every_image_by_brightness() -> None:
    model, config = setting(selection={"clusters": 2})
    images = torch.full((2, 1, 64, 64), 50, dtype=torch.uint8)
    images[0, ..., 32:], images[1, ..., :32] = 200, 200  # bright on the right, bright on the left
    images += torch.randint(
        0, 9, images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    one, other = (
        each["clusters"]
        for each in draw_panels(analyze(model, images, KEYS, None, config, 1), model, None, config)
    )
    hue = [
        pixels[:, half].mean((0, 1)).argmax()
        for pixels in (one, other)
        for half in (np.s_[:90], np.s_[100:])
    ]
    assert hue[0] == hue[3] != hue[1] == hue[2]


def test_the_true_lesion_is_tinted_green_where_the_mask_says() -> None:
    image = draw((3, 64, 64), variant="mae")[0]
    true, whole = image["true lesion"].astype(int), image["input"]
    assert (true[..., 1] - true[..., 0] > 20)[60:84, 60:84].all()
    np.testing.assert_array_equal(true[120:], whole[120:])


def test_true_lesions_are_outlined_on_what_is_laid_over_the_image_and_nowhere_else() -> None:
    with_masks, without_masks = draw(masks=True)[0], draw(masks=False)[0]
    changed = {
        title
        for title in without_masks
        if not np.array_equal(with_masks[title], without_masks[title])
    }
    assert changed == set(without_masks) - {"input", "reconstruction"}
    rim = np.zeros((SIDE, SIDE), bool)
    rim[48:96, 48:96] = True
    rim[50:94, 50:94] = False
    lined = (with_masks["masked 25%"] != without_masks["masked 25%"]).any(-1)
    np.testing.assert_array_equal(lined, rim)


def test_an_outline_of_the_whole_picture_or_of_nothing_is_none() -> None:
    image = np.full((20, 20, 3), 9, np.uint8)
    for where in (np.zeros((20, 20), np.float32), np.ones((20, 20), np.float32)):
        np.testing.assert_array_equal(draw_outline(image, where), image)


def test_heat_rises_in_brightness_and_is_clipped_to_its_ends() -> None:
    colors = draw_heatmap(np.linspace(-0.5, 1.5, 41, dtype=np.float32)[None])[0].astype(float)
    luminance = colors @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance[10:31]) > 0).all()
    assert (colors[:10] == colors[10]).all()
    assert (colors[31:] == colors[30]).all()


def test_a_map_of_patches_lies_where_its_patches_are_when_sizes_do_not_divide() -> None:
    resized = resize_map(torch.arange(6), (2, 3), (10, 10))
    assert resized.shape == (10, 10)
    assert [resized[y, x] for y in (0, 9) for x in (0, 5, 9)] == [0, 1, 2, 3, 4, 5]


def test_settings_that_aim_by_true_lesions_are_drawn_with_masks_and_refused_without() -> None:
    model, config = setting(
        selection={"rule": "oracle", "feedback": 0.0, "background_filter": False}
    )
    images, masks = noise_with_a_square()
    analysis = analyze(model, images, KEYS, masks, config, 1)
    assert analysis.selection.lesion.reshape(2, 8, 8)[:, 2:4, 2:4].all()
    with pytest.raises(ConfigError, match="oracle"):
        analyze(model, images, KEYS, None, config, 1)


def test_looking_at_images_leaves_the_model_as_it_was() -> None:
    model, config = setting(selection={"scope": "dataset"})
    assert model.centroids is not None
    model.centroids.centers.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analyze(model, noise_with_a_square()[0], KEYS, None, config, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_sheet_holds_all_strips_under_one_row_of_titles() -> None:
    strips = [draw_strip(image) for image in draw(variant="mae")]
    whole = draw_sheet(strips, ["first", "second"])
    assert whole.width == strips[0].width
    pixels, first, second = (np.asarray(x) for x in (whole, *strips))
    np.testing.assert_array_equal(pixels[: TITLE + SIDE], first)
    below = TITLE + (whole.height - TITLE) // 2
    np.testing.assert_array_equal(pixels[below : below + SIDE], second[TITLE:])
    assert (pixels[TITLE + SIDE : below] < 128).any(), "a caption"
