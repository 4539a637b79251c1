"""How a search went: rank correlations, saved epochs, idle slots; and large studies."""

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import optuna
import pytest
from helpers.finished_studies import add_baseline, add_trial, new_study
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy.stats import spearmanr

from amlp_ray.study.report import write_report
from amlp_ray.study.report.progress import budget, efficiency, gantt, outcome, timeline
from amlp_ray.study.report.report_data import collect
from amlp_ray.study.report.rung_correlation import meaning, rung_correlations, table
from amlp_ray.study.report.tables import Table
from amlp_ray.study.storage.study_store import StudyStore

NOON = datetime(2026, 3, 1, 12)


def rows(table: Table) -> dict[str, list[str]]:
    return {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}


def add_scored(store: StudyStore, rungs: dict[int, float]) -> None:
    last = rungs[max(rungs)]
    store.search().add_trial(
        create_trial(
            value=last, intermediate_values=rungs, user_attrs={"stats": {"scores": {"dsc": last}}}
        )
    )


def add_timed(
    study: optuna.Study,
    start: float,
    minutes: float,
    *,
    state: str = "COMPLETE",
    value: float = 0.5,
    epochs: int = 100,
) -> None:
    """A trial that starts `start` minutes after noon."""
    study.add_trial(
        FrozenTrial(
            number=-1,
            trial_id=-1,
            state=TrialState[state],
            value=None if state == "FAIL" else value,
            params={},
            distributions={},
            intermediate_values={},
            system_attrs={},
            user_attrs={"stats": {"epochs": epochs}},
            datetime_start=NOON + timedelta(minutes=start),
            datetime_complete=NOON + timedelta(minutes=start + minutes),
        )
    )


def study_with_ranks(folder: Path, **config) -> StudyStore:
    """Scores at epoch 10 are chance, those at epoch 20 nearly final."""
    store = new_study(folder, **config)
    rng = np.random.default_rng(0)
    for final in rng.normal(0.5, 0.05, 40):
        add_scored(
            store,
            {
                10: float(rng.normal(0.4, 0.05)),
                20: float(final + rng.normal(0, 0.01)),
                30: float(final),
            },
        )
    return store


def test_every_rung_is_correlated_with_the_final_score(tmp_path: Path) -> None:
    data = collect(study_with_ranks(tmp_path / "s"))
    correlations = rung_correlations(data)
    assert [rung.position for rung in correlations.rungs] == [10, 20]
    assert correlations.trials == 40
    for rung in correlations.rungs:
        pairs = [(run.rungs[rung.position], run.rungs[30]) for run in data.search]
        assert rung.correlation == pytest.approx(spearmanr(pairs).statistic)
        assert rung.interval[0] < rung.correlation < rung.interval[1]
    assert correlations.rungs[1].interval[0] > 0.8
    assert correlations.rungs[1].best_fifth_kept == 1.0


def test_pruning_at_a_rung_that_does_not_rank_is_called_chance(tmp_path: Path) -> None:
    config = {
        "pruner": {"name": "median", "min_steps": 60}
    }  # 6 steps per epoch, so from epoch 10 on
    data = collect(study_with_ranks(tmp_path / "s", **config))
    sentences = meaning(data, rung_correlations(data))
    assert sentences[0].startswith(
        "At epoch 10 the rank correlation with the final score is below 0.5"
    )
    assert sentences[1].startswith("At epoch 20 it is 0.5 or more")
    assert sentences[2].startswith("The pruner median may act at epoch 10 all the same")
    assert "pruner.schedule: fixed" in sentences[3]
    assert [row[-2:] for row in rows(table(rung_correlations(data))).values()] == [
        ["yes", "close to chance"],
        ["yes", "follows the final order"],
    ]


def test_rungs_before_the_least_steps_are_known_not_to_prune(tmp_path: Path) -> None:
    data = collect(study_with_ranks(tmp_path / "s", pruner={"name": "median", "min_steps": 70}))
    assert [rung.is_prunable for rung in rung_correlations(data).rungs] == [False, True]
    assert not any(
        "all the same" in sentence for sentence in meaning(data, rung_correlations(data))
    )


def test_a_compressed_schedule_is_said_to_be_seen_whole_by_every_rung(tmp_path: Path) -> None:
    data = collect(new_study(tmp_path / "s", pruner={"schedule": "compress"}))
    assert (
        "Each rung has seen the whole masking-ratio schedule"
        in meaning(data, rung_correlations(data))[-1]
    )


def test_rungs_of_trials_of_other_lengths_are_compared_at_shares_of_the_length(
    tmp_path: Path,
) -> None:
    store = new_study(tmp_path / "s")
    for i in range(6):
        length = 20 if i % 2 else 40
        add_scored(store, {length // 2: 0.3 + 0.01 * i, length: 0.4 + 0.01 * i})
    correlations = rung_correlations(collect(store))
    assert [(rung.position, rung.trials, rung.correlation) for rung in correlations.rungs] == [
        (50, 6, pytest.approx(1.0))
    ]
    assert correlations.label(correlations.rungs) == "50 % of the length"


@pytest.mark.parametrize("trials", [0, 4])
def test_few_complete_trials_rank_nothing(tmp_path: Path, trials: int) -> None:
    store = new_study(tmp_path / "s")
    for i in range(trials):
        add_scored(store, {5: 0.3 + 0.01 * i, 10: 0.4 + 0.01 * i})
    assert rung_correlations(collect(store)).rungs == []
    assert f"Not known yet: {trials} complete trials" in write_report(store).read_text()


def test_imported_trials_and_copies_rank_nothing(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    for i in range(10):
        add_trial(
            store,
            0.4 + 0.01 * i,
            attributes={"source": "import a.csv"} if i < 5 else {"copy_of": 0},
        )
    assert rung_correlations(collect(store)).trials == 0


def test_pruning_saves_the_epochs_up_to_full_length(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s", pretrain={"epochs": 100})
    add_trial(store, 0.5)
    add_trial(store, 0.4, state="PRUNED")  # after epoch 50
    cells = rows(outcome(collect(store)))
    assert cells["Run to full length"] == ["1 of 2"]
    assert cells["Pruned"] == ["1 (50 %), which saved 50 of 200 epochs (25 %)"]


def test_best_so_far_is_drawn_against_the_epochs_of_all_trials_that_had_ended(
    tmp_path: Path,
) -> None:
    store = new_study(tmp_path / "s", pretrain={"epochs": 100})
    study = store.search()
    add_timed(study, 0, 9, value=0.4)
    add_timed(study, 0, 3, state="PRUNED", value=0.3, epochs=20)
    add_timed(study, 10, 5, value=0.5)
    drawn = efficiency(collect(store)).figure
    assert drawn is not None
    lines = {trace.name: (list(trace.x), list(trace.y)) for trace in drawn.data}
    assert lines["best so far"] == ([120, 220, 220], [0.4, 0.5, 0.5])
    assert lines["without pruning"][0] == [200, 300, 300]


def test_budget_is_shown_as_used_of_allowed(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s", budget={"trials": 4, "gpu_hours": 2.0})
    add_trial(store, 0.5, attributes={"stats": {"gpu_seconds": 1800.0}})
    add_baseline(store, "mae", 0, 0.4)
    cells = rows(budget(collect(store)))
    assert cells["Trials of the search"] == ["1", "4", "25 %"]
    assert cells["GPU-hours"] == ["0.50", "2", "25 %"]
    assert cells["Epochs"] == ["200", "no limit", "\u2013"]
    assert "Hours run" not in cells


def test_timeline_puts_overlapping_trials_in_slots_and_counts_idle_time(tmp_path: Path) -> None:
    store = new_study(tmp_path / "s")
    study = store.search()
    add_timed(study, 0, 10)
    add_timed(study, 0, 4)
    add_timed(study, 4, 6, state="PRUNED")  # into the slot that was just freed
    add_timed(study, 15, 5)
    bars = timeline(collect(store))
    assert bars is not None
    assert bars.slots == 2
    assert [bar.slot for bar in bars.bars] == [0, 1, 1, 0]
    assert bars.busy == pytest.approx(25 / 40)
    assert bars.idle == timedelta(minutes=5)
    figure = gantt(bars)
    assert "slots were busy for 62 % of the time; nothing ran at all for 5 min" in figure.caption
    assert figure.figure is not None
    assert {bar.name: (list(bar.base), list(bar.x), list(bar.y)) for bar in figure.figure.data} == {
        "complete": ([0.0, 0.0, 15.0], [10.0, 4.0, 5.0], [1, 2, 1]),
        "pruned": ([4.0], [6.0], [2]),
    }


def test_a_study_of_5000_trials_is_written_within_its_size_and_says_what_it_left_out(
    tmp_path: Path,
) -> None:
    store = new_study(tmp_path / "s")
    store._storage = optuna.storages.InMemoryStorage()  # to store them takes longer than the report
    store.search(create=True)
    rng = np.random.default_rng(0)
    trials = []
    for number in range(5000):
        start = float(rng.uniform(0.1, 0.6))
        state = TrialState.COMPLETE if number % 5 < 2 else TrialState.PRUNED
        reached = (25, 50, 75, 100) if state == TrialState.COMPLETE else (25,)
        value = start / 2
        scores = {"dsc": value, "ppv": 0.5, "sensitivity": 0.5, "ap": 0.5}
        trials.append(
            create_trial(
                state=state,
                value=value,
                params={"ratio.start": start},
                distributions={"ratio.start": FloatDistribution(0.1, 0.6)},
                intermediate_values={
                    epoch: value + float(rng.normal(0, 0.02)) for epoch in reached
                },
                user_attrs={"stats": {"epochs": max(reached), "seconds": 9.0, "scores": scores}},
            )
        )
    store.search().add_trials(trials)
    path = write_report(store)
    page = path.read_text()
    assert path.stat().st_size < 15e6
    assert "Only the best 60 of 5000 trials are drawn." in page
    assert "4,500 runs are left out here" in page
    assert page.count("<td>COMPLETE</td>") == 500
