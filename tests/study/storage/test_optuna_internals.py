"""What is relied on of Optuna's private members; a release that changes one fails here."""

from __future__ import annotations

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from amlp_ray.study.storage.optuna_internals import (
    RUNNING_TRIAL_OPERATIONS,
    FixedStudy,
    TrialTable,
    contains,
    trial_id_of,
)


def test_only_scores_and_attributes_of_a_trial_are_lines_of_a_running_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    codes: list[int] = []
    append = JournalFileBackend.append_logs

    def record(self: JournalFileBackend, logs: list[dict[str, int]]) -> None:
        codes.extend(log["op_code"] for log in logs)
        append(self, logs)

    monkeypatch.setattr(JournalFileBackend, "append_logs", record)
    file = tmp_path_factory.mktemp("journal") / "journal"
    storage = JournalStorage(JournalFileBackend(str(file)))
    study_id = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "s")
    storage.set_study_user_attr(study_id, "a", 1)
    trial_id = storage.create_new_trial(study_id)
    storage.set_trial_param(trial_id, "x", 0.5, FloatDistribution(0, 1))
    lasting = set(codes)
    codes.clear()
    storage.set_trial_intermediate_value(trial_id, 1, 0.5)
    storage.set_trial_user_attr(trial_id, "a", 1)
    storage.set_trial_system_attr(trial_id, "a", 1)
    assert set(codes) == RUNNING_TRIAL_OPERATIONS
    codes.clear()
    storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.5])
    assert not (lasting | set(codes)) & RUNNING_TRIAL_OPERATIONS


def test_the_id_of_a_trial_is_the_one_that_its_storage_gave() -> None:
    storage = InMemoryStorage()
    for _ in range(2):
        study_id = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE])
        trial_id = storage.create_new_trial(study_id)
        assert trial_id_of(storage.get_trial(trial_id)) == trial_id


@pytest.mark.parametrize(
    ("distribution", "inside", "outside"),
    [
        (FloatDistribution(0.1, 0.5), 0.5, 0.51),
        (FloatDistribution(0.0, 0.5, step=0.25), 0.25, 0.3),
        (IntDistribution(2, 8, step=2), 4, 5),
        (CategoricalDistribution(["hard", "soft"]), "soft", "none"),
    ],
)
def test_a_distribution_contains_what_it_can_yield(
    distribution: optuna.distributions.BaseDistribution, inside: object, outside: object
) -> None:
    assert contains(distribution, inside)
    assert not contains(distribution, outside)


def frozen(number: int, state: TrialState = TrialState.RUNNING) -> FrozenTrial:
    trial = create_trial(state=state, value=0.5 if state == TrialState.COMPLETE else None)
    return FrozenTrial(
        number=number,
        state=state,
        value=trial.value,
        datetime_start=None,
        datetime_complete=None,
        params={},
        distributions={},
        user_attrs={},
        system_attrs={},
        intermediate_values={},
        trial_id=number,
    )


def test_a_trial_is_replaced_and_a_study_of_it_does_not_change() -> None:
    table = TrialTable()
    study_id = table.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "s")
    table.create_new_trial(study_id, frozen(0))
    study = FixedStudy("s", table, RandomSampler(0))
    complete = (TrialState.COMPLETE,)
    assert study.get_trials(deepcopy=False, states=complete) == []
    table.replace_trial(frozen(0, TrialState.COMPLETE))
    assert table.get_trial(0).state == TrialState.COMPLETE
    assert study.get_trials(deepcopy=False, states=complete) == [], "selected once"
    trials = FixedStudy("s", table, RandomSampler(0)).get_trials(deepcopy=False, states=complete)
    assert [trial.number for trial in trials] == [0]
