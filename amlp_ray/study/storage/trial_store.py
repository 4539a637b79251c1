"""Write trials into an Optuna storage: the one place that knows how Optuna stores them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from amlp_ray.study.storage.trial_files import write_trial_file
from amlp_ray.study.storage.trial_record import TrialAttributes, TrialRecord, finite


class TrialStore(ABC):
    """Trials of a storage, by Optuna study and number."""

    def __init__(self) -> None:
        self._ids: dict[tuple[str, int], int] = {}

    @abstractmethod
    def storage(self) -> BaseStorage:
        """Return the storage, opened once."""

    @abstractmethod
    def folder_of(self, trial: TrialRecord) -> Path:
        """Return the folder of a trial."""

    def add_trial(self, study: optuna.Study, trial: FrozenTrial) -> TrialRecord:
        """Store a new trial of `optuna.trial.create_trial` and return it with its number."""
        storage = self.storage()
        study_id = storage.get_study_id_from_name(study.study_name)
        trial_id = storage.create_new_trial(study_id, trial)
        stored = storage.get_trial(trial_id)
        self._ids[study.study_name, stored.number] = trial_id
        return TrialRecord.from_frozen(stored)

    def trial(self, study: optuna.Study, number: int) -> TrialRecord:
        """Read one trial as it is stored now."""
        return TrialRecord.from_frozen(self.storage().get_trial(self._id_of(study, number)))

    def report(self, study: optuna.Study, number: int, epoch: int, value: float | None) -> bool:
        """Store the score of a rung, unless it is missing, not finite or stored already.

        Returns:
            Whether it was stored.
        """
        score = finite(value)
        trial_id = self._id_of(study, number)
        if score is None or epoch in self.storage().get_trial(trial_id).intermediate_values:
            return False
        self.storage().set_trial_intermediate_value(trial_id, epoch, score)
        self._write_file(study, number)
        return True

    def finish(
        self,
        study: optuna.Study,
        number: int,
        state: TrialState,
        values: Sequence[float] | None = None,
    ) -> None:
        """Store that a trial ended as COMPLETE, PRUNED or FAIL, and its values by objective."""
        self.storage().set_trial_state_values(self._id_of(study, number), state, values)
        self._write_file(study, number)

    def start_enqueued(
        self,
        study: optuna.Study,
        number: int,
        params: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
    ) -> TrialRecord:
        """Store the parameters of a waiting trial, and that it runs now."""
        self.set_params(study, number, params, distributions)
        self.storage().set_trial_state_values(self._id_of(study, number), TrialState.RUNNING)
        return self.trial(study, number)

    def set_params(
        self,
        study: optuna.Study,
        number: int,
        params: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
    ) -> None:
        """Store the parameters of a waiting trial."""
        trial_id = self._id_of(study, number)
        for name, distribution in distributions.items():
            internal = distribution.to_internal_repr(params[name])
            self.storage().set_trial_param(trial_id, name, internal, distribution)

    def set_attrs(
        self, study: optuna.Study, number: int, **attributes: Unpack[TrialAttributes]
    ) -> None:
        """Store user attributes of a trial."""
        trial_id = self._id_of(study, number)
        for name, value in attributes.items():
            self.storage().set_trial_user_attr(trial_id, name, value)

    def set_constraints(self, study: optuna.Study, number: int, excess: Sequence[float]) -> None:
        """Store by how much a trial exceeds each limit, where Optuna's dashboard reads it."""
        trial_id = self._id_of(study, number)
        self.storage().set_trial_system_attr(trial_id, "constraints", list(excess))

    def _write_file(self, study: optuna.Study, number: int) -> None:
        record = self.trial(study, number)
        write_trial_file(self.folder_of(record), record.frozen)

    def _id_of(self, study: optuna.Study, number: int) -> int:
        key = study.study_name, number
        if key not in self._ids:
            storage = self.storage()
            study_id = storage.get_study_id_from_name(study.study_name)
            self._ids[key] = storage.get_trial_id_from_study_id_trial_number(study_id, number)
        return self._ids[key]
