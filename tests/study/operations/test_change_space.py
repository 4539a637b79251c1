"""A study whose space changes keeps its trials, their numbers, and the truth about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers.studies import MODE, RATIO, add, make_store
from helpers.tiny_study import TINY
from optuna.trial import TrialState

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.errors import ConfigError, StudyError
from amlp_ray.study.operations.change_space import Change, change_of, differences, migrate
from amlp_ray.study.operations.edit import enqueue
from amlp_ray.study.operations.status import status
from amlp_ray.study.search.suggester import Suggester
from amlp_ray.study.storage.best_trials import best_trial
from amlp_ray.study.storage.study_store import StudyStore

NOTHING = Change()


def with_space(space: dict[str, Any], **changes: Any) -> StudyConfig:
    return build(StudyConfig, {**TINY, "space": space, **changes}, "test")


def filled_store(runs: Path, **changes: Any) -> StudyStore:
    store = make_store(runs, **changes)
    add(store, {"ratio.start": 0.25, "selection.mode": "hard"}, 0.7)
    add(store, {"ratio.start": 0.45, "selection.mode": "soft"}, 0.5)
    add(store, {"ratio.start": 0.48, "selection.mode": "hard"}, 0.4, state=TrialState.PRUNED)
    add(
        store,
        {"ratio.start": 0.41, "selection.mode": "hard"},
        state=TrialState.FAIL,
        reason="no luck",
    )
    return store


def test_a_wider_range_keeps_every_trial_and_samplers_learn_from_all(tmp_path: Path) -> None:
    store = filled_store(tmp_path)
    before = store.search().trials
    wide = with_space({**TINY["space"], "ratio.start": {"low": 0.1, "high": 0.8}})
    done = migrate(store, wide, NOTHING)
    assert (done.kept, done.outside, done.version) == (4, 0, "tiny.v2")
    after = StudyStore.open(store.folder).search().trials
    assert [(t.number, t.state, t.params, t.intermediate_values, t.user_attrs) for t in after] == [
        (t.number, t.state, t.params, t.intermediate_values, t.user_attrs) for t in before
    ]
    assert [t.datetime_complete for t in after] == [t.datetime_complete for t in before]
    expected = optuna.distributions.FloatDistribution(0.1, 0.8)
    assert all(t.distributions["ratio.start"] == expected for t in after)
    assert store.config().space == wide.space
    assert len(optuna.load_study(study_name="tiny", storage=store.storage()).trials) == 4, (
        "the old one stays"
    )


def test_a_trial_outside_of_a_narrower_range_counts_and_is_best_but_teaches_nobody(
    tmp_path: Path,
) -> None:
    store = filled_store(tmp_path)
    narrow = with_space({**TINY["space"], "ratio.start": {"low": 0.4, "high": 0.5}})
    done = migrate(store, narrow, NOTHING)
    assert (done.kept, done.outside) == (3, 1)
    assert list(done.reasons) == [
        "ratio.start=0.25 lies outside of the space, which has 0.4 to 0.5."
    ]
    trials = store.search().trials
    assert trials[0].params == {"ratio.start": 0.25, "selection.mode": "hard"}
    assert "outside" in trials[0].user_attrs
    assert status(store)["budget"]["trials"]["used"] == 4
    assert best_trial(store).number == 0
    suggester = Suggester(store.config(), ["maximize"])
    suggester.update(trials)
    suggestion = suggester.suggest(4)
    assert 0.4 <= suggestion.params["ratio.start"] <= 0.5  # type: ignore[union-attr]


def test_a_trial_is_inside_again_where_the_space_widens_again(tmp_path: Path) -> None:
    store = filled_store(tmp_path)
    migrate(store, with_space({**TINY["space"], "ratio.start": {"low": 0.4, "high": 0.5}}), NOTHING)
    back = migrate(store, with_space(TINY["space"]), NOTHING)
    assert (back.kept, back.outside, back.version) == (4, 0, "tiny.v3")
    assert store.search().study_name == "tiny.v3"


def test_other_choices_are_no_obstacle(tmp_path: Path) -> None:
    store = filled_store(tmp_path)
    other = with_space({**TINY["space"], "selection.mode": {"choices": ["hard", "random"]}})
    done = migrate(store, other, NOTHING)
    assert (done.kept, done.outside) == (3, 1)
    assert store.search().trials[0].distributions["selection.mode"].choices == ("hard", "random")


def test_new_and_lost_names_are_refused_with_the_difference(tmp_path: Path) -> None:
    store = filled_store(tmp_path)
    other = with_space(
        {"ratio.start": {"low": 0.1, "high": 0.5}, "lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    )
    assert differences(store.config(), other) == {
        "added": ["lr"],
        "removed": ["selection.mode"],
        "changed": ["ratio.start"],
    }
    with pytest.raises(ConfigError) as refused:
        migrate(store, other, NOTHING)
    assert "--fill lr=0.001 (what old trials had)" in str(refused.value)
    assert "selection.mode is gone" in str(refused.value)
    assert store.search().study_name == "tiny"


def test_a_new_name_is_filled_with_what_trials_had_and_with_nothing_else(tmp_path: Path) -> None:
    space = {**TINY["space"], "lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    store = filled_store(tmp_path / "true")
    assert migrate(store, with_space(space), change_of([], ["lr=0.001"], [])).kept == 4
    assert store.search().trials[0].params["lr"] == 0.001
    store = filled_store(tmp_path / "false")
    migration = migrate(store, with_space(space), change_of([], ["lr=0.002"], []))
    assert (migration.kept, list(migration.reasons)) == (
        0,
        ["lr was 0.001, and the new space gives 0.002."],
    )


def test_a_dropped_name_is_forgotten_whatever_trials_had(tmp_path: Path) -> None:
    store = filled_store(tmp_path)
    done = migrate(
        store,
        with_space({"ratio.start": {"low": 0.2, "high": 0.5}}),
        change_of([], [], ["selection.mode"]),
    )
    assert done.kept == 4
    assert store.search().trials[1].params == {"ratio.start": 0.45}


def test_a_renamed_helper_gives_the_same_settings_and_another_rule_does_not(tmp_path: Path) -> None:
    def space(helper: str, factor: int) -> dict[str, Any]:
        return {
            helper: {"low": 0.0, "high": 0.3},
            "ratio.start": 0.3,
            "ratio.end": {"expression": f"ratio.start + {factor} * {helper}"},
        }

    store = make_store(tmp_path / "a", space=space("delta", 1))
    delta = {"delta": optuna.distributions.FloatDistribution(0.0, 0.3)}
    add(store, {"delta": 0.2}, 0.5, distributions=delta)
    assert migrate(store, with_space(space("rise", 1)), change_of(["delta=rise"], [], [])).kept == 1
    assert store.search().trials[0].params == {"rise": 0.2}
    migration = migrate(store, with_space(space("rise", 2)), NOTHING)
    assert migration.outside == 1
    assert "ratio.end was 0.5, and the new space gives 0.7" in next(iter(migration.reasons))


def test_waiting_and_interrupted_trials_go_along_or_say_why_not(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add(store, {"ratio.start": 0.25, "selection.mode": "hard"}, state=TrialState.RUNNING)
    add(store, {"ratio.start": 0.45, "selection.mode": "hard"}, state=TrialState.RUNNING)
    enqueue(store, store.config(), {"ratio.start": 0.3})
    enqueue(store, store.config(), {"ratio.start": 0.42})
    migrate(store, with_space({**TINY["space"], "ratio.start": {"low": 0.4, "high": 0.5}}), NOTHING)
    trials = store.search().trials
    assert [t.state.name for t in trials] == ["FAIL", "RUNNING", "FAIL", "WAITING"]
    assert "no longer in the space" in trials[0].user_attrs["reason"]
    assert "no longer in the space" in trials[2].user_attrs["reason"]
    assert trials[3].system_attrs["fixed_params"] == {"ratio.start": 0.42}


def test_what_the_study_knows_of_itself_goes_along(tmp_path: Path) -> None:
    store = filled_store(tmp_path)
    store.search().set_user_attr("budget", {"trials": 9})
    with store.lock():
        pass
    migrate(store, with_space({**TINY["space"], "ratio.start": {"low": 0.1, "high": 0.5}}), NOTHING)
    attributes = store.search().user_attrs
    assert attributes["budget"] == {"trials": 9}
    assert attributes["folder"] == (store.folder / "id").read_text()
    with StudyStore.open(store.folder).lock():
        assert store.search().study_name == "tiny.v2"


def test_a_study_that_is_run_keeps_its_space(tmp_path: Path) -> None:
    store = filled_store(tmp_path)
    with store.lock(), pytest.raises(StudyError, match="pause it before"):
        migrate(
            StudyStore.open(store.folder),
            with_space({"ratio.start": {"low": 0.1, "high": 0.5}}),
            NOTHING,
        )
    assert store.config().space.keys() == TINY["space"].keys()  # type: ignore[union-attr]


def test_a_name_that_is_neither_new_nor_gone_is_refused(tmp_path: Path) -> None:
    store = filled_store(tmp_path)
    wide = with_space({**TINY["space"], "ratio.start": {"low": 0.1, "high": 0.8}})
    with pytest.raises(ConfigError, match="lr is neither new nor gone"):
        migrate(store, wide, change_of([], ["lr=0.1"], []))
    with pytest.raises(ConfigError, match="not of the form old=new"):
        change_of(["lr"], [], [])


def test_a_database_keeps_the_trials_likewise(tmp_path: Path) -> None:
    store = filled_store(tmp_path, storage=f"sqlite:///{tmp_path}/studies.db")
    done = migrate(
        store, with_space({**TINY["space"], "ratio.start": {"low": 0.1, "high": 0.8}}), NOTHING
    )
    assert done.kept == 4
    again = StudyStore.open(store.folder).search()
    assert [t.params["ratio.start"] for t in again.trials] == [0.25, 0.45, 0.48, 0.41]
    assert again.trials[0].distributions["selection.mode"] == MODE
    assert again.trials[0].distributions["ratio.start"] != RATIO
