"""Which rule the labels would choose, and its gain on groups that had no part in the choice."""

from __future__ import annotations

import numpy as np
import pytest

from amlp_ray.analysis.localization_candidates import DEFAULT_RULE, all_candidates
from amlp_ray.analysis.localization_measures import standard_error
from amlp_ray.analysis.rule_choice import FOLDS, choose_rule
from amlp_ray.config import SelectionConfig

PATIENTS = 24


def scores(gain: float, *, rules: int = 200, seed: int = 0) -> tuple[dict[str, np.ndarray], list]:
    """F1 of unequal numbers of alike slices: a default, one better rule, and many of pure luck."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(4, 30, PATIENTS)
    groups = np.repeat(np.arange(PATIENTS), sizes)
    f1 = {}
    for rule in range(rules):
        of_patient = 0.3 + 0.1 * rng.standard_normal(PATIENTS)
        f1[f"rule {rule}"] = of_patient[groups] + 0.01 * rng.standard_normal(len(groups))
    f1["good"] = f1["rule 0"] + gain + 0.02 * rng.standard_normal(PATIENTS)[groups]
    return f1, groups.tolist()


def test_a_rule_that_is_better_is_chosen_and_its_gain_covered() -> None:
    f1, groups = scores(gain=0.2)
    choice = choose_rule(f1, groups, "rule 0")
    assert choice.name == "good"
    assert choice.groups == PATIENTS
    assert choice.times_chosen == FOLDS
    assert choice.interval is not None
    assert choice.interval[0] < 0.2 < choice.interval[1]
    assert choice.f1 - choice.default_f1 == pytest.approx(0.2, abs=0.02)


def test_the_best_of_many_equal_rules_gains_nothing_where_it_was_not_chosen() -> None:
    apparent, excluding_zero, honest = [], 0, []
    for seed in range(60):
        f1, groups = scores(gain=0.0, seed=seed)
        choice = choose_rule(f1, groups, "rule 0")
        apparent.append(choice.f1 - choice.default_f1)
        honest.append(choice.difference)
        assert choice.interval is not None
        excluding_zero += choice.interval[0] > 0
    assert np.mean(apparent) > 0.04  # the luck of the best of 200
    assert abs(np.mean(honest)) < 0.015
    assert excluding_zero <= 6


def test_few_groups_give_no_interval() -> None:
    f1 = {"a": np.array([0.1, 0.2, 0.3]), "b": np.array([0.3, 0.4, 0.5])}
    assert choose_rule(f1, ["x", "y", "y"], "a").interval is None


def test_the_standard_error_counts_alike_images_once() -> None:
    values = np.array([0.1, 0.5, 0.4, 0.8])
    singles = standard_error(values, np.arange(4))
    assert singles == pytest.approx(np.std(values, ddof=1) / 2)
    copies = standard_error(np.repeat(values, 9), np.repeat(np.arange(4), 9))
    assert copies == pytest.approx(singles)
    assert standard_error(values, np.zeros(4)) is None


def test_settings_of_a_rule_give_that_rule() -> None:
    assert DEFAULT_RULE.selection == SelectionConfig()
    for candidate in all_candidates(encoder=True, decoder=True):
        if not candidate.can_be_chosen:
            continue
        values = {name.removeprefix("selection."): v for name, v in candidate.settings.items()}
        assert SelectionConfig(**values) == candidate.selection
