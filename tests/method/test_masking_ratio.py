from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlp_ray.config import RatioConfig
from amlp_ray.config.base import build as build_settings
from amlp_ray.errors import ConfigError
from amlp_ray.method.masking_ratio import masked_count, masking_ratio

SHAPES = ("linear", "cosine", "power", "step", "exponential")
share = st.floats(0.01, 0.99)
settings_of_any_kind = st.builds(
    RatioConfig,
    start=share,
    end=share,
    shape=st.sampled_from(SHAPES),
    power=st.floats(0.1, 10),
    levels=st.integers(2, 50),
    duration=st.floats(0.01, 1),
    update_per=st.sampled_from(["epoch", "step"]),
)


def course(config: RatioConfig, epochs: int) -> list[float]:
    return [masking_ratio(config, epoch, epochs) for epoch in range(1, epochs + 1)]


@given(settings_of_any_kind, st.integers(2, 200))
def test_any_schedule_starts_at_start_ends_at_end_and_never_turns_back(
    config: RatioConfig, epochs: int
) -> None:
    ratios = course(config, epochs)
    assert ratios[0] == pytest.approx(config.start)
    assert ratios[-1] == pytest.approx(config.end, abs=1e-9)
    sign = math.copysign(1, config.end - config.start)
    assert all(sign * (b - a) >= -1e-12 for a, b in itertools.pairwise(ratios))


@given(settings_of_any_kind, st.integers(1, 200))
def test_every_ratio_and_the_mean_lie_between_start_and_end(
    config: RatioConfig, epochs: int
) -> None:
    low, high = sorted((config.start, config.end))
    for ratio in course(config, epochs):
        assert low - 1e-9 <= ratio <= high + 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_ends_are_a_fixed_ratio_to_the_bit(shape: str) -> None:
    assert set(course(RatioConfig(start=0.75, end=0.75, shape=shape), 37)) == {0.75}


def test_fixed_keeps_start_whatever_the_end() -> None:
    assert set(course(RatioConfig(start=0.4, end=0.9, shape="fixed"), 37)) == {0.4}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_epoch_has_the_start_ratio(shape: str) -> None:
    assert course(RatioConfig(start=0.3, end=0.6, shape=shape), 1) == [0.3]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "exponential"])
def test_a_falling_schedule_mirrors_the_rising_one(shape: str) -> None:
    up = course(RatioConfig(start=0.25, end=0.75, shape=shape, power=2), 20)
    down = course(RatioConfig(start=0.75, end=0.25, shape=shape, power=2), 20)
    assert down == pytest.approx([1 - ratio for ratio in up])


def test_an_exponential_schedule_multiplies_by_one_factor_each_epoch_and_falls_as_it_rose() -> None:
    up = course(RatioConfig(start=0.1, end=0.8, shape="exponential"), 10)
    assert [b / a for a, b in itertools.pairwise(up)] == pytest.approx([8 ** (1 / 9)] * 9)
    down = course(RatioConfig(start=0.8, end=0.1, shape="exponential"), 10)
    assert down == pytest.approx(up[::-1])


def test_linear_cosine_and_power_have_their_formulas() -> None:
    u = [i / 8 for i in range(9)]
    ends = {"start": 0.2, "end": 0.6}
    assert course(RatioConfig(shape="linear", **ends), 9) == pytest.approx(
        [0.2 + 0.4 * v for v in u]
    )
    cosine = [0.2 + 0.4 * (1 - math.cos(math.pi * v)) / 2 for v in u]
    assert course(RatioConfig(shape="cosine", **ends), 9) == pytest.approx(cosine)
    power = [0.2 + 0.4 * v**3 for v in u]
    assert course(RatioConfig(shape="power", power=3, **ends), 9) == pytest.approx(power)


def test_power_1_is_linear() -> None:
    assert course(RatioConfig(shape="power", power=1), 50) == course(
        RatioConfig(shape="linear"), 50
    )


def test_step_has_as_many_even_plateaus_as_levels() -> None:
    ratios = course(RatioConfig(start=0.2, end=0.8, shape="step", levels=4), 41)
    assert [round(ratio, 9) for ratio in sorted(set(ratios))] == [0.2, 0.4, 0.6, 0.8]
    lengths = [sum(ratio == level for ratio in ratios) for level in sorted(set(ratios))]
    assert max(lengths) - min(lengths) <= 1


def test_a_short_duration_reaches_the_end_early_and_stays() -> None:
    ratios = course(RatioConfig(start=0.2, end=0.8, duration=0.25), 40)
    assert ratios[9:] == pytest.approx([0.8] * 31)
    assert ratios[8] < 0.8
    assert ratios[:10] == pytest.approx(course(RatioConfig(start=0.2, end=0.8), 10))


# per step


@given(settings_of_any_kind, st.integers(2, 30), st.integers(2, 7))
def test_per_step_a_schedule_of_e_epochs_is_that_of_as_many_epochs_as_there_are_steps(
    config: RatioConfig, epochs: int, steps: int
) -> None:
    per_step = config.model_copy(update={"update_per": "step"})
    fine = [
        masking_ratio(per_step, epoch, epochs, step=step, steps=steps)
        for epoch in range(1, epochs + 1)
        for step in range(steps)
    ]
    assert fine == pytest.approx(course(config, epochs * steps))
    assert fine[-1] == pytest.approx(config.end, abs=1e-9)


@pytest.mark.parametrize("shape", [*SHAPES, "fixed", "random", "points"])
def test_per_epoch_the_ratio_stays_the_same_within_an_epoch(shape: str) -> None:
    config = RatioConfig(shape=shape, points=((0, 0.2), (1, 0.6)))
    for epoch in (1, 4, 10):
        assert len({masking_ratio(config, epoch, 10, step=step, steps=5) for step in range(5)}) == 1


# points


def test_points_are_joined_by_lines_and_level_before_the_first_and_after_the_last() -> None:
    config = RatioConfig(shape="points", points=((0.2, 0.3), (0.4, 0.7), (0.8, 0.5)))
    expected = [0.3, 0.3, 0.3, 0.5, 0.7, 0.65, 0.6, 0.55, 0.5, 0.5, 0.5]
    assert course(config, 11) == pytest.approx(expected)


def test_points_at_both_ends_are_hit_and_two_of_them_are_linear() -> None:
    points = course(RatioConfig(shape="points", points=((0, 0.25), (1, 0.75))), 30)
    assert points == pytest.approx(course(RatioConfig(), 30))
    assert course(RatioConfig(shape="points", points=((0, 0.25), (1, 0.75))), 1) == [0.25]


@pytest.mark.parametrize(
    "points",
    [(), ((0, 0.3),), ((0.5, 0.3), (0.2, 0.6)), ((0, 0.3), (1, 1.0)), ((0, 0.3), (2, 0.5))],
)
def test_points_that_are_no_schedule_are_refused(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ConfigError, match="points"):
        build_settings(RatioConfig, {"shape": "points", "points": points}, "ratio")


# random


@pytest.mark.parametrize("update_per", ["epoch", "step"])
def test_random_ratios_fill_the_range_and_repeat_for_equal_seeds(update_per: str) -> None:
    config = RatioConfig(start=0.2, end=0.6, shape="random", update_per=update_per)

    def drawn(seed: int) -> list[float]:
        return [
            masking_ratio(config, epoch, 50, step=step, steps=4, seed=seed)
            for epoch in range(1, 51)
            for step in range(4)
        ]

    ratios = drawn(0)
    assert ratios == drawn(0)
    assert ratios != drawn(1)
    assert len(set(ratios)) == (50 if update_per == "epoch" else 200)
    assert 0.2 < min(ratios) < 0.25 < 0.55 < max(ratios) < 0.6
    assert sum(ratios) / len(ratios) == pytest.approx(0.4, abs=0.06)  # SD 0.016 over 50 draws


def test_random_ratios_of_a_resumed_run_are_those_of_an_uninterrupted_one() -> None:
    """A ratio follows from its own epoch and step, whatever was drawn before."""
    config = RatioConfig(shape="random", update_per="step")
    later = masking_ratio(config, 7, 50, step=2, steps=4, seed=3)
    course(config, 6)
    assert masking_ratio(config, 7, 50, step=2, steps=4, seed=3) == later


# How many patches


@given(st.floats(0, 1), st.integers(2, 5000), st.integers(1, 300))
def test_round_to_gives_the_nearest_multiple_but_keeps_one_patch_masked_and_one_visible(
    ratio: float, patches: int, round_to: int
) -> None:
    count = masked_count(ratio, patches, round_to)
    assert 1 <= count <= patches - 1
    if 1 < count < patches - 1:
        assert count % round_to == 0
        assert abs(count - ratio * patches) <= round_to / 2


def test_round_to_leaves_few_numbers_of_masked_patches() -> None:
    config = RatioConfig(start=0.25, end=0.75, round_to=14)
    counts = {masked_count(ratio, 196, config.round_to) for ratio in course(config, 400)}
    assert sorted(counts) == [
        56,
        70,
        84,
        98,
        112,
        126,
        140,
    ]  # 49 is rounded to 56: to the even multiple


@given(st.floats(0, 1), st.integers(2, 5000))
def test_at_least_one_patch_is_masked_and_one_visible(ratio: float, patches: int) -> None:
    count = masked_count(ratio, patches)
    assert 1 <= count <= patches - 1
    if 1 <= ratio * patches <= patches - 1:
        assert abs(count - ratio * patches) <= 0.5


@pytest.mark.parametrize(("ratio", "count"), [(0.25, 49), (0.5, 98), (0.75, 147)])
def test_ratios_of_a_224_image_mask_the_usual_numbers_of_patches(ratio: float, count: int) -> None:
    assert masked_count(ratio, 196) == count
