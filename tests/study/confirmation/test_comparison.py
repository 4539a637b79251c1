"""What a comparison is said to be of, and what few groups can show."""

from __future__ import annotations

import numpy as np
import pytest

from amlp_ray.study.confirmation.comparison import (
    MIN_TESTED_GROUPS,
    Sample,
    few_groups_caution,
    read_difference,
)
from amlp_ray.study.confirmation.statistics import compare


@pytest.mark.parametrize(
    ("sample", "words", "unit"),
    [
        (Sample(63, 63, "image"), "63 test images", "images"),
        (Sample(63, 63, "patient"), "63 test images", "images"),
        (Sample(183, 12, "patient"), "183 test images of 12 patients", "patients"),
        (Sample(63, 58, "group"), "63 test images of 58 groups", "groups"),
    ],
)
def test_a_sample_names_images_and_what_counts_once(sample: Sample, words: str, unit: str) -> None:
    assert sample.describe("test") == words
    assert sample.unit_words == unit


def test_few_patients_weigh_heavily_and_five_can_show_nothing() -> None:
    assert few_groups_caution(Sample(183, 12, "patient"), "test") == (
        "Only 183 test images of 12 patients have a lesion and are scored; each of the patients "
        "weighs heavily."
    )
    assert "fewer than 6 patients can show no difference" in few_groups_caution(
        Sample(90, 5, "patient")
    )


@pytest.mark.parametrize("groups", [MIN_TESTED_GROUPS - 1, MIN_TESTED_GROUPS])
def test_the_least_number_of_groups_is_that_of_wilcoxons_test(groups: int) -> None:
    clear = 0.3 + np.random.default_rng(0).normal(0, 0.001, (3, groups))
    difference = compare(clear, np.zeros((3, groups)))
    reading = read_difference(difference, difference.p, equivalence_margin=0.02)
    assert (reading == "better") == (groups >= MIN_TESTED_GROUPS)


def test_many_alike_slices_of_few_patients_show_no_difference_that_their_patients_do_not() -> None:
    """Twelve patients of 15 slices, as in LGG: over slices it would pass for better."""
    rng = np.random.default_rng(3)
    by_patient = rng.normal(size=12)
    by_patient = 0.03 + 0.07 * (by_patient - by_patient.mean()) / by_patient.std()
    slices = np.repeat(by_patient, 15) + rng.normal(0, 0.01, (3, 180))
    patients = slices.reshape(3, 12, 15).mean(2)
    over_slices = compare(slices, np.zeros_like(slices))
    over_patients = compare(patients, np.zeros_like(patients))
    assert over_slices.mean == pytest.approx(over_patients.mean)
    assert read_difference(over_slices, over_slices.p, 0.01) == "better"
    assert read_difference(over_patients, over_patients.p, 0.01) == "no difference shown"
