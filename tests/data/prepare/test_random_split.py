"""The random split: no group is cut, every group can get every split, and kinds are balanced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlp_ray.data.manifest import SPLITS
from amlp_ray.data.prepare.random_split import split_by_group
from amlp_ray.data.prepare.splits import find_cut_groups
from amlp_ray.errors import DataError

FRACTIONS = (0.7, 0.1, 0.2)
SEEDS = range(200)

random_fractions = st.tuples(st.integers(1, 10), st.integers(0, 5), st.integers(0, 5)).map(
    lambda parts: tuple(part / sum(parts) for part in parts)
)


def kinds(classes: Sequence[str] | np.ndarray, images: Sequence[int] | None = None) -> np.ndarray:
    """Count the images of each item: all, and those of each class."""
    values = np.asarray(classes)
    counts = np.ones(len(values), int) if images is None else np.asarray(images)
    of_class = [counts * (values == name) for name in np.unique(values)]
    return np.stack([counts, *of_class], axis=1)


def splits_by_seed(
    sizes: Sequence[int], classes: np.ndarray, fractions: tuple[float, float, float] = FRACTIONS
) -> np.ndarray:
    """Return the split of every group for each seed, (seeds, groups) strings."""
    groups = [str(i) for i, size in enumerate(sizes) for _ in range(size)]
    first = np.cumsum([0, *sizes[:-1]])
    rows = [split_by_group(groups, kinds(classes), fractions, seed) for seed in SEEDS]
    return np.array(rows)[:, first]


@given(
    members=st.lists(
        st.tuples(st.integers(0, 30), st.sampled_from("xyz")), min_size=1, max_size=150
    ),
    fractions=random_fractions,
    seed=st.integers(0, 5),
)
def test_no_group_is_ever_cut(
    members: list[tuple[int, str]], fractions: tuple[float, float, float], seed: int
) -> None:
    groups = [str(group) for group, _ in members]
    counts = kinds([name for _, name in members])
    largest = Counter(groups).most_common(1)[0][1]
    try:
        splits = split_by_group(groups, counts, fractions, seed)
    except DataError:
        assert largest * 2 > len(groups)
        return
    assert splits == split_by_group(groups, counts, fractions, seed)
    assert not find_cut_groups(dict(enumerate(splits)), dict(enumerate(groups)))
    assert "train" in splits
    for split, fraction in zip(SPLITS, fractions, strict=True):
        count = splits.count(split)
        assert count == 0 or fraction > 0
        assert abs(count - fraction * len(groups)) <= 2 * largest


def test_every_patient_can_get_every_split_and_fractions_are_met() -> None:
    """The sizes of whole LGG: 110 patients of 20 to 88 slices, 5 sites, a third with a lesion."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(20, 89, 110)
    site = rng.choice(list("ABCDE"), 110, p=[0.15, 0.4, 0.02, 0.15, 0.28])
    groups = np.repeat(np.arange(110), sizes).astype(str).tolist()
    has_lesion = np.concatenate([np.arange(n) < n * rng.uniform(0.1, 0.6) for n in sizes])
    counts = np.column_stack([kinds(np.repeat(site, sizes)), has_lesion])
    first = np.cumsum([0, *sizes[:-1]])
    drawn = []
    for seed in SEEDS:
        splits = np.array(split_by_group(groups, counts, FRACTIONS, seed))
        drawn.append(splits[first])
        for split, fraction in zip(SPLITS, FRACTIONS, strict=True):
            share = counts[splits == split].sum(axis=0) / counts.sum(axis=0)
            assert share[0] == pytest.approx(fraction, abs=0.02)
            assert share[-1] == pytest.approx(fraction, abs=0.05)  # images with a lesion
            images_per_patient = sizes[splits[first] == split].mean()
            assert images_per_patient == pytest.approx(sizes.mean(), rel=0.25)
    for split, fraction in zip(SPLITS, FRACTIONS, strict=True):
        times = (np.array(drawn) == split).mean(axis=0)  # of each patient
        assert times.min() > 0
        largest = times[np.argsort(-sizes)[:6]].mean()
        assert largest == pytest.approx(fraction, abs=0.1)


def test_groups_of_several_images_are_not_all_in_train() -> None:
    """The sizes of BUSI: most images alone, some pairs, and a few long chains."""
    sizes = [18, 9, 4, 4, *[3] * 15, *[2] * 40, *[1] * 300]
    classes = np.repeat(["benign", "malignant", "normal"], [262, 100, 98])[: sum(sizes)]
    drawn = splits_by_seed(sizes, np.resize(classes, sum(sizes)))
    for split in SPLITS:
        times = (drawn == split).mean(axis=0)
        assert times.min() > 0
    in_train = (drawn[:, :59] == "train").mean()
    assert in_train == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("sizes", [[22, 18, 16, 17, 15, 12, 20, 14, 13, 11, 13, 12], [1] * 10])
def test_few_patients_get_every_split_too(sizes: list[int]) -> None:
    drawn = splits_by_seed(sizes, np.repeat("x", sum(sizes)))
    for split in SPLITS:
        assert (drawn == split).any(axis=0).all()
        assert (drawn == split).any(axis=1).all()


def test_fractions_are_met_within_each_class() -> None:
    groups = [str(i) for i in range(200)]
    counts = kinds(["benign"] * 120 + ["malignant"] * 80)
    splits = split_by_group(groups, counts, FRACTIONS, seed=3)
    for rows in (slice(0, 120), slice(120, 200)):
        shares = Counter(splits[rows])
        total = shares.total()
        for split, fraction in zip(SPLITS, FRACTIONS, strict=True):
            assert shares[split] == pytest.approx(fraction * total, abs=4)
    assert splits != split_by_group(groups, counts, FRACTIONS, seed=4)


def test_a_group_of_nearly_everything_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"'slice' holds 9 of 10 images .*; cut the volume\."):
        split_by_group(
            ["slice"] * 9 + ["other"], kinds(["x"] * 10), FRACTIONS, seed=0, advice="cut the volume"
        )


@pytest.mark.parametrize(
    ("sizes", "filled"),
    [([50, 50], 2), ([20] * 5, 3), ([30, 30, 40], 3), ([1] * 4, 3), ([5, 200, 5, 200, 5], 3)],
)
def test_no_split_stays_empty_while_another_has_two_groups(sizes: list[int], filled: int) -> None:
    groups = [f"g{i}" for i, size in enumerate(sizes) for _ in range(size)]
    for seed in range(20):
        splits = split_by_group(groups, kinds(["x"] * len(groups)), FRACTIONS, seed)
        assert "train" in splits
        assert len(set(splits)) == filled
        assert len(set(zip(groups, splits, strict=True))) == len(sizes)


def test_fractions_count_the_images_of_a_volume() -> None:
    groups = [f"case {i}" for i in range(12)]
    images = np.array([200, 200, *[40] * 10])
    splits = np.array(split_by_group(groups, kinds(["x"] * 12, images), (0.5, 0.25, 0.25), 0))
    counts = {split: images[splits == split].sum() for split in SPLITS}
    assert counts["train"] == pytest.approx(400, abs=80)
    assert counts["val"] == pytest.approx(200, abs=80)
