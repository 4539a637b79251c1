"""The replay of searches from a table, which benchmarks/search.py compares methods by."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.study.operations.transfer import export_trials
from amlp_ray.study.storage.study_store import StudyStore

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # last: its modules have everyday names

from search import methods, quartiles_of, shares  # noqa: E402
from search_replay import (  # noqa: E402
    Bowl,
    Nearest,
    Smooth,
    Step,
    Table,
    distances,
    needed,
    places,
    read_table,
    replay,
)

STUDY: dict[str, Any] = {
    "name": "made",
    "pretrain": {"epochs": 27, "batch_size": 16},
    "space": {
        "lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "selection.mode": {"choices": ["random", "hard"]},
    },
    "budget": {"trials": 40},
}
RUNGS = tuple(range(3, 28, 3))
NONE, HALVING = methods(9)["random"][1], methods(9)["random+halving"][1]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """40 settings, better with a higher lr, whose rungs all rank as the last one does."""
    store = StudyStore(tmp_path_factory.mktemp("table"))
    write_yaml(build(StudyConfig, STUDY, "made"), store.folder / "study.yaml")
    space = {
        "lr": FloatDistribution(1e-4, 1e-2, log=True),
        "selection.mode": CategoricalDistribution(["random", "hard"]),
    }
    search, baselines = (
        store.search(create=True),
        store.baselines(create=True),
    )
    attributes = {"stats": {"seconds": 9.0}}
    for i, lr in enumerate(np.geomspace(1e-4, 1e-2, 40)):
        params = {"lr": float(lr), "selection.mode": ("random", "hard")[i % 2]}
        scores = {rung: 0.3 + i / 400 + rung / 1000 for rung in RUNGS}
        values: dict[str, Any] = {
            "params": params,
            "distributions": space,
            "intermediate_values": scores,
        }
        search.add_trial(create_trial(value=scores[RUNGS[-1]], user_attrs=attributes, **values))
    search.add_trial(
        create_trial(
            state=TrialState.FAIL, user_attrs=attributes, params=params, distributions=space
        )
    )
    baselines.add_trial(
        create_trial(
            value=0.31,
            user_attrs={**attributes, "baseline": "mae", "repeat": 0},
            intermediate_values={0: 0.31},
        )
    )
    export_trials(store, store.folder / "table.csv")
    return read_table(store.folder / "table.csv", store.folder / "study.yaml")


def run(
    table: Table, pruner: dict[str, Any], *, workers: int = 1, budget: float = 10_000, seed: int = 0
) -> list[Step]:
    config = table.config("made", seed, {"name": "random"}, pruner)
    return replay(table, config, Nearest(table), images=320, workers=workers, budget=budget)


def test_an_exported_study_is_a_table_of_its_complete_trials_with_baselines_apart(
    table: Table,
) -> None:
    assert table.scores.shape == (40, 9)
    assert table.rungs == RUNGS
    assert table.baselines == {"mae": [0.31]}


def test_a_row_is_its_own_nearest_and_answers_once(table: Table) -> None:
    answer = Nearest(table)
    params = table.params[7]
    first, second = answer(params), answer(params)
    assert first is not None
    assert second is not None
    assert first[0] == params
    assert second[0] != params
    assert Nearest(table, again=True)(params) is not None
    left = [answer(params) for _ in range(39)]
    assert left[-2] is not None
    assert left[-1] is None


def test_another_choice_is_as_far_as_the_whole_range_and_a_log_range_is_compared_by_logarithms(
    table: Table,
) -> None:
    queries = [
        {"lr": 1e-4, "selection.mode": "hard"},
        {"lr": 1e-4, "selection.mode": "random"},
        {"lr": 1e-3, "selection.mode": "hard"},
        {"lr": 1e-2, "selection.mode": "hard"},
    ]
    points = places(queries, table.distributions)
    assert distances(points, points)[0] == pytest.approx([0, 1, 0.5, 1])


def test_a_smooth_answer_keeps_what_was_asked_and_averages_neighbors(table: Table) -> None:
    query = {"lr": 1.01e-3, "selection.mode": "hard"}
    params, curve = Smooth(table, rows=3)(query)
    assert params == query
    assert curve[-1] == pytest.approx(table.scores[[19, 21, 17], -1].mean())


def test_a_made_up_effect_is_that_of_what_was_asked_and_grows_with_training(table: Table) -> None:
    near, far = {"lr": 1.6e-3, "selection.mode": "hard"}, {"lr": 1e-4, "selection.mode": "hard"}
    gain = []
    for query in (near, far):
        (params, curve), (_, row) = Bowl(table)(query), Nearest(table)(query)  # type: ignore[misc]
        assert params == query
        gain.append(curve - row)
    assert gain[0][-1] > gain[1][-1]
    assert gain[0] * 27 == pytest.approx(gain[0][-1] * np.array(RUNGS))


def test_a_search_at_full_length_spends_a_training_per_trial_until_the_table_is_used_up(
    table: Table,
) -> None:
    steps = run(table, NONE)
    done = [step for step in steps if step.spent % 27 == 0]
    assert [step.spent for step in done] == [27.0 * (i + 1) for i in range(40)]
    assert done[-1].best == table.scores[:, -1].max()
    assert all(a.best <= b.best for a, b in pairwise(done))


def test_four_workers_spend_four_epochs_at_a_time_and_no_more_than_the_budget(table: Table) -> None:
    steps = run(table, NONE, workers=4, budget=300)
    assert steps[0].spent == 12
    assert math.isnan(steps[0].best)
    assert max(step.spent for step in steps) <= 300
    assert max(step.trials for step in steps) == 12


@pytest.mark.parametrize("workers", [1, 4])
def test_epochs_of_workers_that_find_nothing_more_are_not_counted_on(
    table: Table, workers: int
) -> None:
    assert run(table, NONE, workers=workers)[-1].spent == 40 * 27


def test_halving_finds_the_best_row_in_fewer_epochs_where_rungs_rank(table: Table) -> None:
    best = float(table.scores[:, -1].max())
    epochs_by_pruner = [
        [needed(run(table, pruner, seed=seed), best) for seed in range(5)]
        for pruner in (NONE, HALVING)
    ]
    full, halving = (quartiles_of(epochs)[1] for epochs in epochs_by_pruner)
    assert halving < full / 2


def test_a_seed_gives_the_same_search_and_another_one_another(table: Table) -> None:
    first, again, other = (run(table, HALVING, workers=4, seed=seed) for seed in (1, 1, 2))
    assert repr(first) == repr(again)
    assert repr(first) != repr(other)


def test_rungs_that_the_table_has_not_are_refused(table: Table) -> None:
    with pytest.raises(ValueError, match=r"\[7, 14, 20\], which are not in the table"):
        table.config("made", 0, {"name": "random"}, {"name": "median", "rungs": 4})


def test_what_is_never_reached_is_infinite_and_quartiles_bear_that() -> None:
    steps = [Step(27, 0.3, 0.3, 1), Step(54, 0.4, 0.4, 2)]
    assert needed(steps, 0.35) == 54
    assert needed(steps, 0.5) == math.inf
    assert quartiles_of([54, math.inf, 27, math.inf, math.inf]) == (54, math.inf, math.inf)


def test_a_share_stands_between_the_ends_of_its_interval() -> None:
    runs = [[Step(spent, 0.4, 0.4, 1)] for spent in (27, 54, 81, 108, 135)] + [
        [Step(27, 0.3, 0.3, 1)]
    ] * 2
    low, share, high = shares(runs, 0.4, 270)
    assert low < share == 0.4 < high


def test_shuffled_scores_stay_whole_rows(table: Table) -> None:
    shuffled = table.shuffled(1)
    assert shuffled.params == table.params
    assert sorted(map(tuple, shuffled.scores)) == sorted(map(tuple, table.scores))
    assert (shuffled.scores != table.shuffled(2).scores).any()


def test_the_recorded_table_holds_what_its_study_file_says() -> None:
    recorded = read_table(
        BENCHMARKS / "results" / "search_table.csv", BENCHMARKS / "search_table.yaml"
    )
    assert recorded.scores.shape == (200, 9)
    assert recorded.rungs == RUNGS
    assert {name: len(scores) for name, scores in recorded.baselines.items()} == {
        "scratch": 3,
        "mae": 3,
    }
