"""Pruners at our rungs, on studies whose scores are written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.study.search.pruning import Pruning, hyperband_bracket
from amlp_ray.study.storage.trial_record import finite

IMAGES = 320  # 10 steps per epoch of 32
RUNGS = (10, 20, 30, 40)


def make_config(name: str, **more: Any) -> StudyConfig:
    rules = {"name": name, "rungs": 4, "min_steps": 0, "n_startup_trials": 0} | more.pop(
        "pruner", {}
    )
    values = {
        "name": "s",
        "pretrain": {"epochs": 40, "batch_size": 32},
        "pruner": rules,
        "baselines": [],
    }
    values["space"] = {"ratio.start": {"low": 0.1, "high": 0.6}}
    return build(StudyConfig, values | more, "test")


class Run:
    """A study and its pruning; `play` scores a trial rung by rung until it is pruned or
    complete."""

    def __init__(self, s: StudyConfig, folder: Path = Path("/nowhere")) -> None:
        self.config, self.folder = s, folder
        # In memory and with one study, a trial's id is its number.
        self.storage = optuna.storages.InMemoryStorage()
        self.study = optuna.create_study(
            study_name="s", storage=self.storage, directions=list(s.objectives.values())
        )
        self.pruning = self.restarted()

    def restarted(self) -> Pruning:
        return Pruning(self.study, self.config, IMAGES, lambda number: self.folder / str(number))

    def begin(self) -> optuna.Trial:
        trial = self.study.ask()
        trial.suggest_float("ratio.start", 0.1, 0.6)
        return trial

    def report(self, trial: optuna.Trial, epoch: int, value: float | None) -> None:
        """Store a score as the store does: a finite one only."""
        if finite(value) is not None:
            self.storage.set_trial_intermediate_value(trial.number, epoch, value or 0.0)

    def score(self, trial: optuna.Trial, epoch: int, value: float | None) -> bool:
        """Report, and say whether the trial is to go on; a new Pruning on the same store must
        say the same."""
        self.report(trial, epoch, value)
        stop = self.pruning.should_prune(trial.number, epoch)
        assert self.restarted().should_prune(trial.number, epoch) == stop
        return not stop

    def end(self, trial: optuna.Trial, state: TrialState, value: float = 0.0) -> None:
        several = len(self.study.directions) > 1
        values = ([value, 1.0] if several else [value]) if state == TrialState.COMPLETE else None
        self.storage.set_trial_state_values(trial.number, state, values)

    def play(self, *scores: float | None) -> int:
        """Return after how many rungs the trial ended."""
        trial = self.begin()
        for rung, (epoch, value) in enumerate(zip(RUNGS, scores, strict=True)):
            if not self.score(trial, epoch, value):
                self.end(trial, TrialState.PRUNED)
                return rung + 1
        self.end(trial, TrialState.COMPLETE, scores[-1] or 0.0)
        return len(scores)


# Each in its own way


def test_median_prunes_below_the_median_of_the_same_rung() -> None:
    run = Run(make_config("median"))
    for level in (0.3, 0.5, 0.7):
        assert run.play(*[level] * 4) == 4 or level == 0.3
    assert run.play(0.6, 0.4, 0.45, 0.4) == 4, "the best so far counts"
    assert run.play(0.45, 0.6, 0.6, 0.6) == 1


def test_percentile_keeps_its_share() -> None:
    run = Run(make_config("percentile", pruner={"percentile": 90.0, "n_startup_trials": 10}))
    for i in range(10):
        assert run.play(*[i / 10] * 4) == 4
    assert run.play(*[0.05] * 4) == 1
    assert run.play(*[0.15] * 4) == 4


def test_each_rung_is_a_halving() -> None:
    """Trials that arrive at a rung in the order of their scores, poorest first: 8, 4, 2 and 1 of
    8 get through."""
    run = Run(make_config("halving"))
    going = [(run.begin(), level / 10) for level in range(8)]
    reached = [len(going)]
    for epoch in RUNGS[:3]:
        for trial, level in going:
            run.report(trial, epoch, level)
        going = [(t, level) for t, level in going if not run.pruning.should_prune(t.number, epoch)]
        reached.append(len(going))
    assert reached == [8, 4, 2, 1]
    assert going[0][1] == 0.7


def test_asynchronous_halving_lets_the_first_through_and_then_the_best_half() -> None:
    run = Run(make_config("halving"))
    assert run.play(0.5, 0.5, 0.5, 0.5) == 4
    assert run.play(0.4, 0.9, 0.9, 0.9) == 1
    assert run.play(0.6, 0.4, 0.9, 0.9) == 2
    assert run.play(0.7, 0.7, 0.7, 0.7) == 4


def test_reduction_three_keeps_a_third() -> None:
    run = Run(make_config("halving", pruner={"reduction_factor": 3}))
    going = [(run.begin(), level / 10) for level in range(9)]
    for trial, level in going:
        run.report(trial, 10, level)
    assert sum(not run.pruning.should_prune(t.number, 10) for t, _ in going) == 3


def test_brackets_of_hyperband_follow_from_the_number_in_optunas_proportions() -> None:
    from optuna.pruners import HyperbandPruner

    optunas = HyperbandPruner(min_resource=1, max_resource=9, reduction_factor=2)
    study = optuna.create_study(study_name="s", pruner=optunas)
    trial = study.ask()
    trial.report(0.5, 1)
    trial.should_prune()  # works out its brackets
    dealt = [hyperband_bracket("s", number, n_rungs=4, factor=2) for number in range(200)]
    assert set(dealt) == {0, 1, 2, 3}
    for number in range(200):
        frozen = optuna.trial.create_trial(value=0.0)
        frozen.number = number
        assert dealt[number] == optunas._get_bracket_id(study, frozen)


def test_hyperband_spares_a_bracket_its_first_rungs_and_compares_within_it() -> None:
    run = Run(make_config("hyperband"))
    ended: dict[int, set[int]] = {}
    for number in range(60):
        level = 0.5 - number / 1000  # each poorer than all before
        ended.setdefault(hyperband_bracket("s", number, n_rungs=4, factor=2), set()).add(
            run.play(*[level] * 4)
        )
    assert ended == {0: {1, 4}, 1: {2, 4}, 2: {3, 4}, 3: {4}}


def test_patient_prunes_what_gains_nothing_for_longer_than_its_patience() -> None:
    assert Run(make_config("patient")).play(0.5, 0.4, 0.4, 0.6) == 3
    assert Run(make_config("patient")).play(0.5, 0.4, 0.5, 0.4) == 4
    assert Run(make_config("patient", pruner={"patience": 2})).play(0.5, 0.4, 0.4, 0.6) == 4
    assert Run(make_config("patient", pruner={"min_delta": 0.2})).play(0.5, 0.4, 0.4, 0.6) == 4


def test_none_prunes_nothing() -> None:
    run = Run(make_config("none"))
    assert [run.play(*[0.5 - i / 10] * 4) for i in range(4)] == [4] * 4


def write_images(folder: Path, number: int, epoch: int, scores: dict[str, float | None]) -> None:
    (folder / str(number) / "rungs").mkdir(parents=True, exist_ok=True)
    (folder / str(number) / "rungs" / f"{epoch}.json").write_text(json.dumps({"per_group": scores}))


def images(level: float, many: int = 20) -> dict[str, float | None]:
    return {f"i{i}": level + i / 100 for i in range(many)}


def test_wilcoxon_compares_images_with_those_of_the_best_at_the_same_rung(tmp_path: Path) -> None:
    run = Run(make_config("wilcoxon"), tmp_path)
    for epoch, level in zip(RUNGS, (0.2, 0.3, 0.4, 0.5), strict=True):
        write_images(tmp_path, 0, epoch, images(level))
    assert run.play(0.2, 0.3, 0.4, 0.5) == 4
    write_images(tmp_path, 1, 10, images(0.25))
    write_images(tmp_path, 1, 20, images(0.25))
    assert run.play(0.25, 0.25, 0.25, 0.25) == 2, (
        "better than the best at rung 1, worse on every image at rung 2"
    )
    write_images(tmp_path, 2, 10, images(0.19) | {f"i{i}": 0.9 for i in range(9)})
    assert run.play(*[0.2] * 4) == 4, "better on some images, worse on others"


def test_wilcoxon_without_images_to_compare_prunes_nothing(tmp_path: Path) -> None:
    run = Run(make_config("wilcoxon"), tmp_path)
    assert run.play(*[0.9] * 4) == 4, "nothing is complete"
    assert run.play(*[0.1] * 4) == 4, "the best has no files, as if it were imported"
    write_images(tmp_path, 2, 10, images(0.5))
    assert run.play(*[0.5] * 4) == 4
    write_images(tmp_path, 3, 10, {f"other{i}": 0.1 for i in range(9)})
    assert run.play(*[0.1] * 4) == 4, "no image in common"
    write_images(tmp_path, 4, 10, {"i0": 0.1, **{f"i{i}": None for i in range(1, 9)}})
    assert run.play(*[0.1] * 4) == 4, "one image with a score is too few for a test"
    (tmp_path / "5" / "rungs").mkdir(parents=True)
    (tmp_path / "5" / "rungs" / "10.json").write_text('{"per_group": {')
    assert run.play(*[0.1] * 4) == 4, "a damaged file"
    write_images(tmp_path, 6, 10, images(0.1))
    assert run.play(*[0.1] * 4) == 1, "the best that has images is trial 2"


# What holds for all


ALL = ["median", "percentile", "halving", "hyperband", "patient", "wilcoxon"]


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_pruned_before_min_steps_nor_at_the_last_rung(tmp_path: Path, name: str) -> None:
    run = Run(make_config(name, pruner={"min_steps": 250}), tmp_path)  # 25 epochs
    for number in range(12):
        level = 0.9 - number / 20
        for epoch in RUNGS:
            write_images(tmp_path, number, epoch, images(level))
        falling = [level, level - 0.01, level - 0.02, level - 0.03]
        assert run.play(*falling) in (3, 4)
    assert TrialState.PRUNED in {t.state for t in run.study.trials}


def test_fewer_steps_per_epoch_mean_later_pruning() -> None:
    space = {"batch_size": {"choices": [32, 160]}}
    run = Run(make_config("median", space=space, pruner={"min_steps": 40}))
    for level in (0.9, 0.1, 0.1):
        trial = run.study.ask()
        size = 32 if level == 0.9 or trial.number == 1 else 160
        run.storage.set_trial_param(
            trial.number,
            "batch_size",
            [32, 160].index(size),
            optuna.distributions.CategoricalDistribution([32, 160]),
        )
        going = [run.score(trial, epoch, level) for epoch in RUNGS]
        run.end(trial, TrialState.COMPLETE, level)
        if trial.number:
            assert going == [size == 160, False, False, True]


@pytest.mark.parametrize("name", [*ALL, "none"])
def test_nothing_is_pruned_before_enough_trials_are_complete(tmp_path: Path, name: str) -> None:
    run = Run(make_config(name, pruner={"n_startup_trials": 3}), tmp_path)
    for number in range(3):
        for epoch in RUNGS:
            write_images(tmp_path, number, epoch, images(0.9 - number / 10))
        assert run.play(*[0.9 - number / 10 - rung / 100 for rung in range(4)]) == 4


@pytest.mark.parametrize("name", ["median", "halving", "patient"])
def test_with_several_objectives_the_metric_is_compared(name: str) -> None:
    objectives = {"gpu_seconds": "minimize", "dsc": "maximize"}
    run = Run(make_config(name, objectives=objectives, pruner={"metric": "dsc"}))
    assert run.play(0.5, 0.6, 0.7, 0.8) == 4
    assert run.play(0.4, 0.3, 0.3, 0.3) == (3 if name == "patient" else 1)
    assert run.play(0.6, 0.7, 0.8, 0.9) == 4
    assert run.study.trials[1].intermediate_values[10] == 0.4


@pytest.mark.parametrize("name", ["median", "percentile", "halving", "hyperband", "patient"])
@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_a_missing_score_is_not_stored_and_prunes_nothing(name: str, missing: float | None) -> None:
    run = Run(make_config(name))
    run.play(*[0.9] * 4)
    trial = run.begin()
    run.report(trial, 10, missing)
    assert not run.pruning.should_prune(trial.number, 10)
    assert run.study.trials[1].intermediate_values == {}


def test_after_a_missing_score_a_trial_is_judged_at_its_next_rung_there_only() -> None:
    run = Run(make_config("halving"))
    run.play(0.9, 0.2, 0.9, 0.9)
    trial = run.begin()
    assert run.score(trial, 10, None)
    assert run.score(trial, 20, 0.3), (
        "0.3 against 0.2 of the same rung, not against 0.9 of the first"
    )


@pytest.mark.parametrize("name", ["median", "halving"])
def test_others_without_a_score_at_the_rung_are_passed_over(name: str) -> None:
    run = Run(make_config(name))
    run.play(None, 0.9, 0.9, 0.9)
    trial = run.begin()
    assert run.score(trial, 10, 0.1)
    assert not run.score(trial, 20, 0.1)


def test_an_epoch_that_is_no_rung_prunes_nothing() -> None:
    run = Run(make_config("median"))
    run.play(*[0.9] * 4)
    trial = run.begin()
    run.report(trial, 10, 0.1)
    run.report(trial, 15, 0.1)
    assert not run.pruning.should_prune(trial.number, 15)
    assert run.pruning.should_prune(trial.number, 10)


def test_trials_answered_from_the_store_count_once() -> None:
    run = Run(make_config("percentile", pruner={"percentile": 60.0}))
    for level in (0.1, 0.5):
        run.play(*[level] * 4)
    for _ in range(5):
        trial = run.begin()
        trial.set_user_attr("copy_of", 1)
        for epoch in RUNGS:
            run.report(trial, epoch, 0.5)
        run.end(trial, TrialState.COMPLETE, 0.5)
    assert run.play(*[0.3] * 4) == 4


def test_a_trial_that_failed_at_a_later_rung_still_counts_at_an_earlier_one() -> None:
    run = Run(make_config("halving"))
    trial = run.begin()
    run.score(trial, 10, 0.9)
    run.end(trial, TrialState.FAIL)
    assert run.play(*[0.5] * 4) == 1
