"""Change the search space of a study: its trials are copied into a new Optuna study.

Optuna refuses other choices under an old name, and its samplers ignore parameters whose range has
changed. So all trials are stored anew, in order and with their numbers, by the distributions that
they would have now. The old Optuna study stays in the storage. The file `search` in the study's
folder names the one that counts.

A trial belongs to the new space if it would be given the same settings there. Any other is marked
with the attribute `outside`, which says why. It counts in the budget and may be the best as
before, but no sampler learns from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import StudyConfig
from amlp_ray.config.overrides import flatten, parse_overrides
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.errors import ConfigError, StudyError
from amlp_ray.study.search_space.given_trial import OutOfSpaceError
from amlp_ray.study.search_space.space import FittedParams, SearchSpace
from amlp_ray.study.search_space.validate import check_space
from amlp_ray.study.storage.optuna_storage import IS_VERSION
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import TrialRecord, trial_records
from amlp_ray.utils.files import atomic_write


@dataclass(frozen=True)
class Change:
    """What becomes of names that only one of two spaces has."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """New names by old ones."""
    filled: Mapping[str, Any] = field(default_factory=dict)
    """What old trials had of names that are searched now."""
    dropped: Sequence[str] = ()
    """No longer searched, whatever old trials had of them."""

    def apply(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return an old trial's parameters by the new names."""
        changed = dict(self.filled)
        for name, value in params.items():
            if name not in self.dropped:
                changed[self.renamed.get(name, name)] = value
        return changed


@dataclass(frozen=True)
class Migration:
    """What became of the trials."""

    kept: int
    """How many trials belong to the new space."""
    outside: int
    """How many do not."""
    reasons: dict[str, int]
    """How many are outside for each reason."""
    version: str
    """Name of the new Optuna study."""


def change_of(mapped: Sequence[str], filled: Sequence[str], dropped: Sequence[str]) -> Change:
    """Read a change from texts.

    Args:
        mapped: `old=new` each.
        filled: `name=value` each.
        dropped: names.

    Raises:
        ConfigError: a text has another form.
    """
    renamed = {}
    for text in mapped:
        old, _, new = text.partition("=")
        if not (old and new):
            raise ConfigError(f"--map {text!r} is not of the form old=new.")
        renamed[old] = new
    return Change(renamed, flatten(parse_overrides(filled, "--fill")), list(dropped))


def migrate(store: StudyStore, new: StudyConfig, change: Change) -> Migration:
    """Give a study the space and requirements of another config, and copy its trials.

    Args:
        new: config whose space and requirements are taken, and nothing else.
        change: what becomes of names that only one of the spaces has.

    Raises:
        StudyError: somebody runs the study.
        ConfigError: the new space is bad, or `change` says nothing of a name that only one space
            has; the message lists these names.
    """
    with store.transaction() as old:
        if holder := store.holder():
            raise StudyError(
                f"Study {store.name!r} is run by {holder}; its space can change when nobody runs "
                f"it: pause it before."
            )
        if old.sampler.name == "pbt":
            raise StudyError(
                f"The space of {store.name!r} cannot change: its members continue each other "
                f"(sampler pbt)."
            )
        config = old.model_copy(update={"space": new.space, "require": new.require})
        check_space(config)
        _check_change(old, config, change)
        return _migrate(store, old, config, change)


def _migrate(store: StudyStore, old: StudyConfig, config: StudyConfig, change: Change) -> Migration:
    """Copy the trials and write the new config, while the study is held."""
    study_file = store.folder / "study.yaml"
    if not trial_records(store.search()):
        store.search(create=True)
        write_yaml(config, study_file)
        return Migration(0, 0, {}, store.search_name())
    with store.lock():
        study = store.search()
        copier = _TrialCopier(old, config, change)
        copies = [copier.copy(record) for record in trial_records(study)]
        name = _next_name(store)
        _store_copies(store, study, name, copies)
        atomic_write(store.folder / "search", name)
        write_yaml(config, study_file)
        store.search().set_user_attr(IS_VERSION, True)
    outside = [copy.user_attrs["outside"] for copy in copies if "outside" in copy.user_attrs]
    n_kept = len(copies) - len(outside)
    return Migration(n_kept, len(outside), dict(Counter(outside)), name)


def differences(old: StudyConfig, new: StudyConfig) -> dict[str, list[str]]:
    """List the names that a new space adds, removes and changes."""
    before = SearchSpace(old).parameters
    after = SearchSpace(new).parameters
    common = sorted(before.keys() & after.keys())
    return {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "changed": [name for name in common if before[name] != after[name]],
    }


def _check_change(old: StudyConfig, new: StudyConfig, change: Change) -> None:
    """Raise ConfigError if a change leaves out a name, or names one that both spaces have."""
    names = differences(old, new)
    given_new = {*change.filled, *change.renamed.values()}
    given_old = {*change.dropped, *change.renamed}
    base = flatten(old.trial({}, seed=0))
    missing = []
    for name in names["added"]:
        if name not in given_new:
            missing.append(
                f"{name} is new: --fill {name}={base.get(name, 'VALUE')} (what old trials had) or "
                f"--map OLD={name}"
            )
    for name in names["removed"]:
        if name not in given_old:
            missing.append(
                f"{name} is gone: --map {name}=NEW, or --drop {name} (old trials count whatever "
                f"they had)"
            )
    if missing:
        raise ConfigError(
            f"The new space of {old.name!r} has other names than the old one, and old trials need "
            f"to be told what becomes of them: {'; '.join(missing)}."
        )
    unknown = sorted((given_old - set(names["removed"])) | (given_new - set(names["added"])))
    if unknown:
        raise ConfigError(
            f"{unknown[0]} is neither new nor gone in the space of {old.name!r} (new: "
            f"{', '.join(names['added']) or 'none'}; gone: "
            f"{', '.join(names['removed']) or 'none'}); leave it out."
        )


class _TrialCopier:
    """Copies stored trials of an old space as the new space has them."""

    def __init__(self, old: StudyConfig, new: StudyConfig, change: Change) -> None:
        self._old = old
        self._new = new
        self._old_space = SearchSpace(old)
        self._new_space = SearchSpace(new)
        self._change = change

    def copy(self, record: TrialRecord) -> FrozenTrial:
        """Return a trial for the new Optuna study."""
        trial = deepcopy(record.frozen)
        trial.user_attrs.pop("outside", None)
        fixed_params = trial.system_attrs.pop("fixed_params", {})
        try:
            if trial.state == TrialState.WAITING:
                what = "what was enqueued is"
                # A process that died may have stored parameters before the trial ran.
                trial.params = {}
                trial.distributions = {}
                changed_params = self._change.apply(fixed_params)
                trial.system_attrs["fixed_params"] = self._new_space.fit_some(changed_params)
            else:
                what = "its settings are"
                fitted = self._new_space.fit(self._change.apply(record.params))
                self._check_same_settings(record, fitted)
                trial.params = dict(fitted.params)
                trial.distributions = dict(fitted.distributions)
        except OutOfSpaceError as error:
            trial.user_attrs["outside"] = str(error)
            if not trial.state.is_finished():
                trial.user_attrs["reason"] = f"{what} no longer in the space: {error}"
                trial.state = TrialState.FAIL
                trial.datetime_complete = datetime.now()
        return trial

    def _check_same_settings(self, record: TrialRecord, fitted: FittedParams) -> None:
        """Raise OutOfSpaceError if the new space gives a trial other settings than it had."""
        old_values = self._old_space.config_of(record.params)
        before = flatten(self._old.trial(old_values, seed=0))
        after = flatten(self._new.trial(fitted.values, seed=0))
        for name, value in after.items():
            if before.get(name) != value and name not in self._change.dropped:
                raise OutOfSpaceError(
                    f"{name} was {before.get(name)}, and the new space gives {value}."
                )


def _next_name(store: StudyStore) -> str:
    """Return a free name for the new Optuna study; a killed migration may have left one."""
    names = {study.study_name for study in store.storage().get_all_studies()}
    version = 2
    while f"{store.name}.v{version}" in names:
        version += 1
    return f"{store.name}.v{version}"


def _store_copies(
    store: StudyStore, old: optuna.Study, name: str, copies: Sequence[FrozenTrial]
) -> None:
    study = optuna.create_study(study_name=name, storage=store.storage(), directions=old.directions)
    for key, value in old.user_attrs.items():
        # The new study's lease is free: this process holds the old one's.
        study.set_user_attr(key, value | {"over": True} if key == "lease" else value)
    for copy in copies:
        store.add_trial(study, copy)
