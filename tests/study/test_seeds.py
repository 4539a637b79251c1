"""Seeds of a study never change: another seed would be another result under the same study file."""

from __future__ import annotations

from amlp_ray.study.seeds import baseline_seed, derived_seed


def test_seeds_of_baselines_and_trials_are_those_of_every_earlier_version() -> None:
    assert baseline_seed(0, 0) == 2128918879
    assert baseline_seed(3, 1) == 411077323
    assert derived_seed(0, "trial", 7) == 1899783445
