"""Change a study from outside, also while it is run: budget, enqueued trials, retries, deletion.

Each change is one transaction of the store, so that changes of several processes add up.
A changed search space is in `change_space.py`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from amlp_ray.config import BudgetConfig, StudyConfig
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.errors import ConfigError, StudyError
from amlp_ray.study.operations.trials import find_trial
from amlp_ray.study.search_space.space import SearchSpace
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_files import begun_trials

TRASH = "deleted"  # ending of a folder that is being deleted
Amount = str | float | None  # `+10` is added to the current limit, `10` replaces it


def extend(
    store: StudyStore,
    *,
    trials: Amount = None,
    hours: Amount = None,
    gpu_hours: Amount = None,
    epochs: Amount = None,
) -> BudgetConfig:
    """Change the budget of a study, also after its end or while another machine runs it.

    The budget is written to study.yaml, and to the storage, which a running driver polls.

    Raises:
        ConfigError: no amount is given, one cannot be read, or one is added to no limit.
    """
    amounts = {"trials": trials, "hours": hours, "gpu_hours": gpu_hours, "epochs": epochs}
    set_amounts = {name: amount for name, amount in amounts.items() if amount is not None}
    if not set_amounts:
        raise ConfigError(
            "extend needs an amount, such as --trials +10 or --hours 8, or a changed space "
            "(--space)."
        )
    with store.transaction() as config:
        if trials is not None and config.sampler.name == "pbt":
            raise ConfigError(
                "sampler pbt runs whole generations: its trials follow from members and epochs."
            )
        changes = {}
        for name, amount in set_amounts.items():
            changes[name] = _new_limit(name, amount, getattr(config.budget, name))
        budget = build(BudgetConfig, config.budget.model_dump() | changes, "extend")
        search = store.search(create=True)
        # `from` is what the study's file says. While it still says so, a later run keeps `to`.
        extended = search.user_attrs.get("extended") or {}
        original = extended.get("from") or config.budget.model_dump(mode="json")
        limits = budget.model_dump(mode="json")
        search.set_user_attr("extended", {"from": original, "to": limits})
        search.set_user_attr("budget", limits)
        write_yaml(config.model_copy(update={"budget": budget}), store.folder / "study.yaml")
    return budget


def _new_limit(name: str, amount: str | float, limit: float | None) -> float:
    text = str(amount).strip()
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(
            f"extend: {name} is {text!r}, but a number such as 20, or +10 for more, is needed."
        ) from None
    if not text.startswith("+"):
        return number
    if limit is None:
        raise ConfigError(
            f"extend: {name} has no limit so far that {text} could be added to; give the limit "
            f"itself."
        )
    return limit + number


def enqueue(
    store: StudyStore,
    config: StudyConfig,
    params: Mapping[str, Any],
    *,
    retry_of: int | None = None,
) -> int:
    """Store a trial that runs before those of the sampler.

    Args:
        params: by the space's names; the sampler chooses the others.
        retry_of: number of the trial that it runs again.

    Returns:
        Its number.

    Raises:
        ConfigError: the space does not have these values.
    """
    if not params:
        raise ConfigError(
            "enqueue needs values, such as ratio.start=0.3; without any the sampler proposes by "
            "itself."
        )
    _check_enqueue(config, params)  # before anything is written
    with store.transaction(config) as current:
        # As Optuna's own `enqueue_trial` stores it, which does not return the number.
        trial = create_trial(
            state=TrialState.WAITING,
            system_attrs={"fixed_params": _check_enqueue(current, params)},
            user_attrs={} if retry_of is None else {"retry_of": retry_of},
        )
        return store.add_trial(store.search(create=True), trial).number


def _check_enqueue(config: StudyConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters as the space has them; raise ConfigError if it does not."""
    if config.sampler.name == "pbt":
        raise ConfigError(
            "A study of sampler.name=pbt cannot take trials: its members continue each other."
        )
    return SearchSpace(config).fit_some(params)


def retry(store: StudyStore, config: StudyConfig, number: int) -> int:
    """Enqueue a finished trial's parameters as a new trial with its own seed.

    Returns:
        The new trial's number.

    Raises:
        StudyError: there is no such trial, or it has not ended.
        ConfigError: the space has changed since.
    """
    record = find_trial(store, number)
    if not record.is_finished:
        raise StudyError(
            f"Trial {number} of {store.name!r} has not ended ({record.state.name}); it needs no "
            f"retry."
        )
    if not record.params:
        raise StudyError(
            f"Trial {number} of {store.name!r} has no parameters that could be tried again."
        )
    return enqueue(store, config, record.params, retry_of=number)


def delete(store: StudyStore) -> None:
    """Delete a study's folder and, in a database, its Optuna studies with their older versions.

    If it is killed, deleting again finishes it.

    Raises:
        StudyError: somebody runs it.
    """
    with store.transaction() as config:
        if holder := _holder(store, config):
            raise StudyError(
                f"Study {store.name!r} is run by {holder}; cancel it before it is deleted."
            )
        with store.lock_folder():
            if config.storage is not None:
                _delete_from_database(store)
            # In one step, so that nobody meets half a study.
            trash = store.folder.with_name(f".{store.folder.name}.{TRASH}")
            shutil.rmtree(trash, ignore_errors=True)
            store.folder.rename(trash)
    shutil.rmtree(trash)


def _holder(store: StudyStore, config: StudyConfig) -> str | None:
    """Return who runs a study, whose journal may be damaged beyond reading."""
    try:
        return store.holder()
    except StudyError:
        if config.storage is not None:
            raise
        return None


def count_trials(store: StudyStore) -> int:
    """Count the trials that would be deleted, those that only their folders show included."""
    n_stored = 0
    with suppress(StudyError):
        n_stored = len(store.stored_search().get_trials(deepcopy=False))
    return max(n_stored, len(begun_trials(store.folder)))


def _delete_from_database(store: StudyStore) -> None:
    folder_id = store.read_id()
    storage = store.storage()
    folders = {}
    for study in storage.get_all_studies():
        folders[study.study_name] = study.user_attrs.get("folder", folder_id)
    if folders.get(store.search_name(), folder_id) != folder_id:
        raise StudyError(
            f"The database holds a study {store.name!r} of another folder than {store.folder}, "
            f"which is not ours to delete; delete this folder by hand."
        )
    own_names = (store.name, f"{store.name}.baselines", f"{store.name}.confirm")
    version = re.compile(rf"{re.escape(store.name)}\.v\d+")
    for name, folder in folders.items():
        if name in own_names or (version.fullmatch(name) and folder == folder_id):
            with suppress(KeyError):  # somebody else deletes it at the same time
                optuna.delete_study(study_name=name, storage=storage)
