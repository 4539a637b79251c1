from pathlib import Path

import optuna
import pytest
from helpers.finished_studies import add_baseline, add_trial, new_study

from amlp_ray.study.confirmation.comparison import read_size
from amlp_ray.study.report.comparison import compare_with_baselines, finished_baselines
from amlp_ray.study.report.report_data import collect
from amlp_ray.study.report.rung_correlation import (
    FirstRungCorrelation,
    first_rung_correlation,
)
from amlp_ray.study.report.summary import Verdict, summarize_search
from amlp_ray.study.storage.study_store import StudyStore


def verdict_of(store: StudyStore) -> Verdict:
    data = collect(store)
    baselines = finished_baselines(data)
    comparisons = compare_with_baselines(data, baselines)
    return summarize_search(data, baselines, comparisons, first_rung_correlation(data))


def study_with(folder: Path, best: float, **baselines: tuple[float, ...]) -> StudyStore:
    store = new_study(folder)
    add_trial(store, best - 0.05)
    add_trial(store, best)
    for baseline, values in baselines.items():
        for repeat, dsc in enumerate(values):
            add_baseline(store, baseline, repeat, dsc)
    return store


def test_better_than_mae_is_said_with_difference_spread_and_interval(tmp_path: Path) -> None:
    verdict = verdict_of(study_with(tmp_path / "s", 0.52, mae=(0.47, 0.48), scratch=(0.40, 0.42)))
    assert verdict.kind == "open"  # one seed, and the best of two
    assert verdict.headline.startswith("Not confirmed, the best of 2 trials, with one seed.")
    assert "scores higher than plain MAE here: DSC 0.520 against 0.475, +0.045." in verdict.headline
    assert "higher than a random encoder (0.520 against 0.410)" in verdict.headline
    (mae,) = [text for text in verdict.comparisons if "baseline mae" in text]
    assert "mean of 2 runs, range 0.470 to 0.480): +0.045 DSC, better." in mae
    assert "Paired over 60 images, the 95 % interval is +0.04" in mae
    assert "leaves out zero" in mae
    assert any(
        "mean training mask" in text and "(0.350): +0.170 DSC, better" in text
        for text in verdict.comparisons
    )


def test_three_repeats_have_an_sd(tmp_path: Path) -> None:
    verdict = verdict_of(study_with(tmp_path / "s", 0.52, mae=(0.46, 0.47, 0.48)))
    assert any(
        "mean of 3 runs, SD 0.010, range 0.460 to 0.480" in text for text in verdict.comparisons
    )


@pytest.mark.parametrize(
    ("best", "words"),
    [
        (0.50, "includes zero, so this is not shown to be more than chance"),
        (0.44, "it is worse by 0.030"),
    ],
    ids=["better", "worse"],
)
def test_nothing_is_claimed_where_the_interval_includes_zero(
    tmp_path: Path, best: float, words: str
) -> None:
    store = new_study(tmp_path / "s")
    add_trial(store, best, images=12, noise=0.2)
    add_baseline(store, "mae", 0, 0.47, images=12, noise=0.2)
    verdict = verdict_of(store)
    assert verdict.kind == "open"
    assert words in verdict.headline
    assert any("Only 12 images have a lesion and are scored" in text for text in verdict.cautions)
    assert any("One run each of mae" in text for text in verdict.cautions)


def test_difference_under_the_limit_is_a_tie_in_both_directions(tmp_path: Path) -> None:
    for name, mae in (("above", 0.515), ("below", 0.535)):
        verdict = verdict_of(study_with(tmp_path / name, 0.52, mae=(mae, mae)))
        assert verdict.kind == "tie"
        assert "AMLP is not better than plain MAE here" in verdict.headline
        assert "is a tie" in verdict.headline
        assert any("a tie (under 0.02 counts as noise)" in text for text in verdict.comparisons)


def test_limit_of_a_tie_is_that_of_the_settings(tmp_path: Path) -> None:
    assert read_size(round(0.42 - 0.40, 6), 0.02) == "better"
    assert read_size(0.0199, 0.02) == "tie"
    assert read_size(-0.02, 0.02) == "worse"
    assert read_size(0.0, 0.0) == "tie"
    store = new_study(tmp_path / "s", equivalence_margin=0.1)
    add_trial(store, 0.52)
    add_baseline(store, "mae", 0, 0.45)
    assert verdict_of(store).kind == "tie"


def test_worse_than_mae_and_scratch_is_said_plainly(tmp_path: Path) -> None:
    verdict = verdict_of(study_with(tmp_path / "s", 0.42, mae=(0.47, 0.48), scratch=(0.46, 0.46)))
    assert verdict.kind == "worse"
    assert "AMLP is not better than plain MAE here" in verdict.headline
    assert "it is worse by 0.055" in verdict.headline
    assert (
        "worse than a random encoder (0.420 against 0.460): this pretraining did harm"
        in verdict.headline
    )


def test_trials_below_the_floor_of_steps_are_said_to_be_so_first(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s", pruner={"min_steps": 1000})
    add_trial(store, 0.52)
    add_baseline(store, "mae", 0, 0.45)
    assert verdict_of(store).headline.startswith(
        "Not confirmed, one trial, trained for 600 steps, and scores say little before 1000, with "
        "one seed."
    )


def test_better_than_mae_but_no_better_than_scratch_is_no_success(tmp_path: Path) -> None:
    verdict = verdict_of(study_with(tmp_path / "s", 0.52, mae=(0.47, 0.48), scratch=(0.51, 0.52)))
    assert verdict.kind == "tie"
    assert "no use of this pretraining is shown" in verdict.headline


def test_without_baselines_there_is_nothing_to_compare(tmp_path: Path) -> None:
    verdict = verdict_of(study_with(tmp_path / "s", 0.52))
    assert verdict.kind == "open"
    assert "No baseline has finished" in verdict.headline
    assert "Baseline mae has no finished run (none started)." in verdict.comparisons


def test_failed_baseline_is_named_and_not_averaged(tmp_path: Path) -> None:
    store = study_with(tmp_path / "s", 0.52, scratch=(0.40,))
    add_baseline(store, "mae", 0, 0.5, state="FAIL")
    verdict = verdict_of(store)
    assert "cannot say whether masking probable lesions helps" in verdict.headline
    assert "Baseline mae has no finished run (1 FAIL)." in verdict.comparisons


def test_without_complete_trials_the_states_are_named(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    assert verdict_of(store).headline.startswith("No trial has started yet")
    add_trial(store, 0.4, state="RUNNING")
    verdict = verdict_of(store)
    assert verdict.kind == "open"
    assert "No trial has run to full length yet (1 INTERRUPTED)" in verdict.headline
    assert any("not over" in text for text in verdict.cautions)


def test_choosing_and_single_seeds_are_cautioned_about(tmp_path: Path) -> None:
    store = study_with(tmp_path / "s", 0.52, mae=(0.47, 0.48))
    add_trial(store, 0.40, state="PRUNED")
    add_trial(store, 0.0, state="FAIL")
    cautions = " ".join(verdict_of(store).cautions)
    assert (
        "The best of 3 trials is optimistic" in cautions
    )  # a failed trial had no chance to be best
    assert "one run with one seed" in cautions
    assert "neither seeds nor the choice of the best" in cautions
    alone = new_study(tmp_path / "alone")
    add_trial(alone, 0.5)
    assert "optimistic" not in " ".join(verdict_of(alone).cautions)


def test_unequal_budgets_and_random_masks_are_cautioned_about(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    folder = add_trial(store, 0.5, epochs=100)
    folder.joinpath("config.yaml").write_text("selection:\n  mode: random\n")
    store.baselines(create=True).add_trial(
        store.search().trials[0]
    )  # carries no baseline: not counted as one
    add_baseline(store, "mae", 0, 0.45)
    assert "different numbers of epochs" not in " ".join(verdict_of(store).cautions)
    assert any("masks at random, as MAE does" in text for text in verdict_of(store).cautions)
    add_baseline(store, "amlp", 0, 0.45, epochs=50)
    assert (
        "The best trial and amlp ran different numbers of epochs: not the same budget."
        in verdict_of(store).cautions
    )
    folder.joinpath("config.yaml").write_text("- broken")
    assert not any("masks at random" in text for text in verdict_of(store).cautions)


@pytest.mark.parametrize(
    ("values", "finals", "words"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5], "+1.00 for DSC"),
        ([0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1], "hardly rank"),
        ([0.1, 0.1, 0.1, 0.1, 0.1], [0.5, 0.4, 0.3, 0.2, 0.1], "too little varies"),
    ],
)
def test_agreement_of_rungs_is_worded(
    tmp_path: Path, values: list[float], finals: list[float], words: str
) -> None:
    store = new_study(tmp_path / "s")
    for early, late in list(zip(values, finals, strict=True)) * 4:
        rungs = {
            25: 0.3,
            75: early,
            100: late,
        }  # 6 steps an epoch: pruning from 400 steps on, so from epoch 75
        store.search(create=True).add_trial(
            optuna.create_trial(value=late, intermediate_values=rungs)
        )
    agreement = first_rung_correlation(collect(store))
    assert agreement.trials == 20
    assert agreement.epochs == (75,)
    assert agreement.ap is None  # no metrics.jsonl
    text = verdict_of(store).pruning
    assert words in text
    assert "Over 20 complete trials" in text
    assert "the first rung that may prune (epoch 75)" in text


def test_agreement_needs_five_trials(tmp_path: Path) -> None:
    store = study_with(tmp_path / "s", 0.5)
    assert first_rung_correlation(collect(store)) == FirstRungCorrelation(
        trials=2, epochs=(75,), dsc=None, ap=None, is_prunable=True
    )
    assert "Not known: 2 complete trials" in verdict_of(store).pruning


@pytest.mark.parametrize(
    ("trials", "reading"),
    [(19, "fewer than 20 trials are too few to read it"), (20, "rank these trials fairly well")],
)
def test_a_correlation_of_few_trials_is_not_put_into_words(
    trials: int, reading: str, tmp_path: Path
) -> None:
    data = collect(study_with(tmp_path / "s", 0.5, mae=(0.4,)))
    first_rung = FirstRungCorrelation(trials, (35,), dsc=0.9, ap=0.6, is_prunable=True)
    verdict = summarize_search(data, finished_baselines(data), [], first_rung)
    assert reading in verdict.pruning


def test_agreement_covers_average_precision_and_names_the_rung_where_steps_are_unknown(
    tmp_path: Path,
) -> None:
    store = new_study(tmp_path / "s")
    for i in range(5):
        add_trial(store, 0.4 + 0.02 * i)
    store.folder.joinpath("environments.jsonl").unlink()  # so nobody knows the number of images
    agreement = first_rung_correlation(collect(store))
    assert agreement.epochs == (25,)
    assert agreement.ap == pytest.approx(1)
    assert not agreement.is_prunable
    assert "between the first rung (epoch 25)" in verdict_of(store).pruning
