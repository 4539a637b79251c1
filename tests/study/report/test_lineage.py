from __future__ import annotations

import json
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.study.report.lineage import lineage_figure, lineage_rows

PBT: dict[str, Any] = {
    "name": "pbt",
    "pretrain": {"epochs": 6},
    "space": {"ratio.points": {"low": 0.1, "high": 0.9}},
    "sampler": {"name": "pbt", "population_size": 2, "interval": 2, "exploit": 0.5},
    "pruner": {"name": "none"},
    "budget": {"trials": 6},
}


@pytest.fixture
def config() -> StudyConfig:
    return build(StudyConfig, PBT, "test")


def trials_of(*rows: tuple[int, int, int | None, float, float | None]) -> list[FrozenTrial]:
    """Trials of (generation, member, parent, ratio, score); without a score they run."""
    study = optuna.create_study(direction="maximize")
    for generation, member, parent, ratio, score in rows:
        study.add_trial(
            create_trial(
                state=TrialState.RUNNING if score is None else TrialState.COMPLETE,
                value=score,
                params={"ratio.points": ratio},
                distributions={"ratio.points": FloatDistribution(0.1, 0.9)},
                user_attrs={"generation": generation, "member": member, "parent": parent},
            )
        )
    return study.get_trials()


# Member 1 leaves its trial 1 for trial 0, and its own trial 3 wins.
TRIALS = [
    (0, 0, None, 0.3, 0.6),
    (0, 1, None, 0.7, 0.4),
    (1, 0, 0, 0.35, 0.61),
    (1, 1, 0, 0.28, 0.65),
    (2, 0, 3, 0.3, 0.66),
    (2, 1, 3, 0.4, None),
]


def test_rows_say_who_went_on_from_whom_and_which_lineage_is_best(config: StudyConfig) -> None:
    rows = lineage_rows(config, trials_of(*TRIALS))
    assert [row["parent"] for row in rows] == [None, None, 0, 0, 3, 3]
    assert [row["left"] for row in rows] == [None, None, None, 1, 2, None]
    assert [row["trial"] for row in rows if row["best"]] == [0, 3, 4]
    assert [(row["from_epoch"], row["to_epoch"]) for row in rows] == [(0, 2)] * 2 + [(2, 4)] * 2 + [
        (4, 6)
    ] * 2
    assert [(row["ratio_from"], row["ratio_to"]) for row in rows[1:4]] == [
        (0.7, 0.7),
        (0.3, 0.35),
        (0.3, 0.28),
    ]
    assert rows[-1]["score"] is None
    assert json.loads(json.dumps(rows)) == rows


def test_the_figure_draws_every_step_every_jump_and_the_best_lineage_thick_and_last(
    config: StudyConfig,
) -> None:
    figure = lineage_figure(lineage_rows(config, trials_of(*TRIALS)), config.metric).figure
    assert figure is not None
    by_name = {trace.name: trace for trace in figure.data if trace.name}
    assert set(by_name) == {
        *(f"trial {i}" for i in range(6)),
        "trial 1 to 0",
        "trial 2 to 3",
        "learned schedule",
    }
    assert list(by_name["trial 1 to 0"].x) == [2, 2]
    assert list(by_name["trial 1 to 0"].y) == [0.7, 0.3]
    best = by_name["learned schedule"]
    assert (list(best.x), list(best.y)) == ([0, 2, 4, 6], [0.3, 0.3, 0.28, 0.3])
    assert best.line.width == max(trace.line.width or 0 for trace in by_name.values())
    assert by_name["trial 5"].line.dash == "dash"  # runs
    colors = {name: by_name[name].line.color for name in ("trial 1", "trial 4")}
    assert colors["trial 1"] != colors["trial 4"]


def test_a_study_that_has_not_begun_has_a_gap(config: StudyConfig) -> None:
    assert lineage_rows(config, []) == []
    assert lineage_figure([], config.metric).gap


def test_a_study_of_another_sampler_has_no_rows() -> None:
    other = build(
        StudyConfig, {"name": "tpe", "space": {"lr": {"low": 0.001, "high": 0.01}}}, "test"
    )
    assert lineage_rows(other, trials_of(*TRIALS)) == []
