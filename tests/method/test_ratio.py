from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlp_ray.config import RatioSettings
from amlp_ray.method.ratio import masked_count, masking_ratio

SHAPES = ("linear", "cosine", "power", "step")
share = st.floats(0.01, 0.99)
settings_of_any_kind = st.builds(
    RatioSettings,
    start=share,
    end=share,
    shape=st.sampled_from(SHAPES),
    power=st.floats(0.1, 10),
    levels=st.integers(2, 50),
    duration=st.floats(0.01, 1),
)


def course(settings: RatioSettings, epochs: int) -> list[float]:
    return [masking_ratio(settings, epoch, epochs) for epoch in range(1, epochs + 1)]


@given(settings_of_any_kind, st.integers(2, 200))
def test_any_schedule_starts_at_start_ends_at_end_and_never_turns_back(settings: RatioSettings, epochs: int) -> None:
    ratios = course(settings, epochs)
    assert ratios[0] == settings.start
    assert ratios[-1] == pytest.approx(settings.end, abs=1e-9)
    sign = math.copysign(1, settings.end - settings.start)
    assert all(sign * (b - a) >= -1e-12 for a, b in itertools.pairwise(ratios))


@given(settings_of_any_kind, st.integers(1, 200))
def test_every_ratio_and_the_mean_lie_between_start_and_end(settings: RatioSettings, epochs: int) -> None:
    low, high = sorted((settings.start, settings.end))
    for ratio in course(settings, epochs):
        assert low - 1e-9 <= ratio <= high + 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_ends_are_a_fixed_ratio_to_the_bit(shape: str) -> None:
    assert set(course(RatioSettings(start=0.75, end=0.75, shape=shape), 37)) == {0.75}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_epoch_has_the_start_ratio(shape: str) -> None:
    assert course(RatioSettings(start=0.3, end=0.6, shape=shape), 1) == [0.3]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_falling_schedule_mirrors_the_rising_one(shape: str) -> None:
    up = course(RatioSettings(start=0.25, end=0.75, shape=shape, power=2), 20)
    down = course(RatioSettings(start=0.75, end=0.25, shape=shape, power=2), 20)
    assert down == pytest.approx([1 - ratio for ratio in up])


def test_linear_cosine_and_power_have_their_formulas() -> None:
    u = [i / 8 for i in range(9)]
    ends = {"start": 0.2, "end": 0.6}
    assert course(RatioSettings(shape="linear", **ends), 9) == pytest.approx([0.2 + 0.4 * v for v in u])
    cosine = [0.2 + 0.4 * (1 - math.cos(math.pi * v)) / 2 for v in u]
    assert course(RatioSettings(shape="cosine", **ends), 9) == pytest.approx(cosine)
    power = [0.2 + 0.4 * v**3 for v in u]
    assert course(RatioSettings(shape="power", power=3, **ends), 9) == pytest.approx(power)


def test_power_1_is_linear() -> None:
    assert course(RatioSettings(shape="power", power=1), 50) == course(RatioSettings(shape="linear"), 50)


def test_step_has_as_many_even_plateaus_as_levels() -> None:
    ratios = course(RatioSettings(start=0.2, end=0.8, shape="step", levels=4), 41)
    assert [round(ratio, 9) for ratio in sorted(set(ratios))] == [0.2, 0.4, 0.6, 0.8]
    lengths = [sum(ratio == level for ratio in ratios) for level in sorted(set(ratios))]
    assert max(lengths) - min(lengths) <= 1


def test_a_short_duration_reaches_the_end_early_and_stays() -> None:
    ratios = course(RatioSettings(start=0.2, end=0.8, duration=0.25), 40)
    assert ratios[9:] == pytest.approx([0.8] * 31)
    assert ratios[8] < 0.8
    assert ratios[:10] == pytest.approx(course(RatioSettings(start=0.2, end=0.8), 10))


@given(st.floats(0, 1), st.integers(2, 5000))
def test_at_least_one_patch_is_masked_and_one_visible(ratio: float, patches: int) -> None:
    count = masked_count(ratio, patches)
    assert 1 <= count <= patches - 1
    if 1 <= ratio * patches <= patches - 1:
        assert abs(count - ratio * patches) <= 0.5


@pytest.mark.parametrize(("ratio", "count"), [(0.25, 49), (0.5, 98), (0.75, 147)])
def test_ratios_of_a_224_image_mask_the_usual_numbers_of_patches(ratio: float, count: int) -> None:
    assert masked_count(ratio, 196) == count
