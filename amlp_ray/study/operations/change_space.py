"""A study whose space changes: its trials are carried into a new Optuna study that takes the old one's place.

Optuna refuses other choices under an old name, and its samplers leave out of their model what has changed its range. So
all trials are stored anew, in their order and with their numbers, by the distributions that they would have now. The
old Optuna study stays in the storage; the file `search` in the study's folder names the one that counts.

A trial belongs to the new space where it would be given the same settings there. Any other is marked with the attribute
`outside`, which says why: it counts in the budget and may be the best as before, but no sampler learns from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import StudyConfig
from amlp_ray.config.overrides import flat, parse_overrides
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.errors import ConfigError, StudyError
from amlp_ray.study.operations.edit import begin
from amlp_ray.study.search_space.validate import check_space, searched
from amlp_ray.study.search_space.values import (
    FittedParams,
    OutOfSpaceError,
    check_given,
    config_of_trial,
    fit,
)
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.utils.files import write_whole


@dataclass(frozen=True)
class Change:
    """How a new space differs from the one a study has, and what becomes of old names."""

    renamed: Mapping[str, str] = field(default_factory=dict)  # old name: new name
    filled: Mapping[str, Any] = field(
        default_factory=dict
    )  # what old trials had of names that are searched now
    dropped: Sequence[str] = ()  # names that are searched no more, whatever old trials had of them


@dataclass(frozen=True)
class Migration:
    """What became of the trials; `reasons` counts those outside of the new space by why they are."""

    kept: int
    outside: int
    reasons: dict[str, int]
    version: str  # name of the new Optuna study


def change_of(mapped: Sequence[str], filled: Sequence[str], dropped: Sequence[str]) -> Change:
    """Read a change from texts: `old=new`, `name=value` and names.

    Raises:
        ConfigError: one is not of that form.
    """
    pairs = [text.partition("=") for text in mapped]
    for text, (old, equals, new) in zip(mapped, pairs, strict=True):
        if not (old and equals and new):
            raise ConfigError(f"--map {text!r} is not of the form old=new.")
    return Change(
        {old: new for old, _, new in pairs}, flat(parse_overrides(filled, "--fill")), list(dropped)
    )


def migrate(store: StudyStore, new: StudyConfig, change: Change) -> Migration:
    """Give a study the space and requirements of `new`, and carry its trials over. Nothing else of `new` is taken.

    Raises:
        StudyError: somebody runs the study. ConfigError: the new space is bad, or it differs in names that `change`
            does not speak of; the message lists the difference.
    """
    old = store.config()
    if holder := store.holder():
        raise StudyError(
            f"Study {store.name!r} is run by {holder}; its space can change when nobody runs it: pause it before."
        )
    if old.sampler.name == "pbt":
        raise StudyError(
            f"The space of {store.name!r} cannot change: its members go on from each other (sampler pbt)."
        )
    config = old.model_copy(update={"space": new.space, "require": new.require})
    check_space(config)
    _check_spoken_of(old, config, change)
    if not (store.folder / "study.yaml").is_file() or not store.search().get_trials(deepcopy=False):
        begin(store, config)
        write_yaml(config, store.folder / "study.yaml")
        return Migration(0, 0, {}, store.search_name())
    with store.lock():
        study = store.search()
        trials = [
            _carried(trial, old, config, change) for trial in study.get_trials(deepcopy=False)
        ]
        name = _next_name(store)
        _store(store, study, name, trials)
        write_whole(store.folder / "search", name)
        write_yaml(config, store.folder / "study.yaml")
    reasons = Counter(
        trial.user_attrs["outside"] for trial in trials if "outside" in trial.user_attrs
    )
    outside = reasons.total()
    return Migration(len(trials) - outside, outside, dict(reasons), name)


def differences(old: StudyConfig, new: StudyConfig) -> dict[str, list[str]]:
    """Names that a new space adds, removes, and has otherwise than before."""
    before, after = searched(old), searched(new)
    return {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "changed": sorted(
            name for name in before.keys() & after.keys() if before[name] != after[name]
        ),
    }


def _check_spoken_of(old: StudyConfig, new: StudyConfig, change: Change) -> None:
    found = differences(old, new)
    added = [
        name for name in found["added"] if name not in {*change.filled, *change.renamed.values()}
    ]
    removed = [name for name in found["removed"] if name not in {*change.dropped, *change.renamed}]
    base = flat(old.trial({}, seed=0))
    faults = [
        f"{name} is new: --fill {name}={base.get(name, 'VALUE')} (what old trials had) or --map OLD={name}"
        for name in added
    ]
    faults += [
        f"{name} is gone: --map {name}=NEW, or --drop {name} (old trials count whatever they had)"
        for name in removed
    ]
    if faults:
        raise ConfigError(
            f"The new space of {old.name!r} has other names than the old one, and old trials need to be told what "
            f"becomes of them: {'; '.join(faults)}."
        )
    unknown = sorted(
        {*change.renamed, *change.dropped} - set(found["removed"])
        | ({*change.filled, *change.renamed.values()} - set(found["added"]))
    )
    if unknown:
        raise ConfigError(
            f"{unknown[0]} is neither new nor gone in the space of {old.name!r} (new: "
            f"{', '.join(found['added']) or 'none'}; gone: {', '.join(found['removed']) or 'none'}); leave it out."
        )


def _carried(trial: FrozenTrial, old: StudyConfig, new: StudyConfig, change: Change) -> FrozenTrial:
    """A trial as the new study has it."""
    attributes = {name: value for name, value in trial.user_attrs.items() if name != "outside"}
    fixed = trial.system_attrs.get("fixed_params")
    given = trial.params if trial.state != TrialState.WAITING else fixed or {}
    params = {
        change.renamed.get(name, name): value
        for name, value in given.items()
        if name not in change.dropped
    }
    system = {name: value for name, value in trial.system_attrs.items() if name != "fixed_params"}
    if trial.state == TrialState.WAITING:
        return _carried_waiting(trial, {**change.filled, **params}, new, attributes, system)
    try:
        fits = fit({**change.filled, **params}, new)
        _check_same(trial, fits, old, new, change)
    except OutOfSpaceError as misfit:
        state = TrialState.FAIL if trial.state == TrialState.RUNNING else trial.state
        why = {"outside": str(misfit)}
        if state != trial.state:
            why["reason"] = f"its settings are no longer in the space: {misfit}"
        return _copy(
            trial, dict(trial.params), dict(trial.distributions), attributes | why, system, state
        )
    return _copy(trial, fits.params, fits.distributions, attributes, system, trial.state)


def _carried_waiting(
    trial: FrozenTrial,
    params: Mapping[str, Any],
    new: StudyConfig,
    attributes: Mapping[str, Any],
    system: Mapping[str, Any],
) -> FrozenTrial:
    try:
        fixed = check_given(params, new)
    except OutOfSpaceError as misfit:
        why = {
            "outside": str(misfit),
            "reason": f"what was enqueued is no longer in the space: {misfit}",
        }
        return _copy(trial, {}, {}, {**attributes, **why}, system, TrialState.FAIL)
    return _copy(trial, {}, {}, attributes, {**system, "fixed_params": fixed}, TrialState.WAITING)


def _check_same(
    trial: FrozenTrial, fits: FittedParams, old: StudyConfig, new: StudyConfig, change: Change
) -> None:
    """Raise Misfit where the trial was trained with other settings than the new space gives its parameters."""
    before = flat(old.trial(config_of_trial(trial.params, old), seed=0))
    after = flat(new.trial(fits.values, seed=0))
    differing = [n for n in after if before.get(n) != after[n] and n not in change.dropped]
    if differing:
        name = differing[0]
        raise OutOfSpaceError(
            f"{name} was {before.get(name)}, and the new space gives {after[name]}."
        )


def _copy(
    trial: FrozenTrial,
    params: Mapping[str, Any],
    distributions: Mapping[str, Any],
    attributes: Mapping[str, Any],
    system: Mapping[str, Any],
    state: TrialState,
) -> FrozenTrial:
    ended = trial.datetime_complete
    if state.is_finished() and ended is None:
        ended = datetime.now()
    return FrozenTrial(
        number=trial.number,
        trial_id=-1,
        state=state,
        value=None,
        values=None if trial.values is None else list(trial.values),
        datetime_start=trial.datetime_start,
        datetime_complete=ended,
        params=dict(params),
        distributions=dict(distributions),
        user_attrs=dict(attributes),
        system_attrs=dict(system),
        intermediate_values=dict(trial.intermediate_values),
    )


def _next_name(store: StudyStore) -> str:
    """Of the new Optuna study; one that a killed migration left half-written is passed over."""
    there = {study.study_name for study in store.storage().get_all_studies()}
    return next(
        name for n in range(2, len(there) + 3) if (name := f"{store.name}.v{n}") not in there
    )


def _store(store: StudyStore, old: optuna.Study, name: str, trials: Sequence[FrozenTrial]) -> None:
    storage = store.storage()
    study = optuna.create_study(study_name=name, storage=storage, directions=old.directions)
    for key, value in old.user_attrs.items():
        study.set_user_attr(key, value | {"over": True} if key == "lease" else value)
    for trial in trials:
        storage.create_new_trial(study._study_id, trial)
