"""Changing a study from outside: more budget, trials of one's own, a trial again, and its end. Works while it is run.

A changed space is in `migrate.py`.
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
from amlp_ray.study.search_space.values import check_given
from amlp_ray.study.storage.study_store import StudyStore

Amount = str | float | None  # `+10` is added to what is allowed now, `10` takes its place


def begin(store: StudyStore, config: StudyConfig) -> optuna.Study:
    """Return the search's Optuna study; one that was never run is begun, so that it can be given trials beforehand."""
    if not (store.folder / "study.yaml").is_file():
        store.folder.mkdir(parents=True, exist_ok=True)
        write_yaml(config, store.folder / "study.yaml")
    return store.search(create=True, directions=list(config.objectives.values()))


def extend(
    store: StudyStore,
    *,
    trials: Amount = None,
    hours: Amount = None,
    gpu_hours: Amount = None,
    epochs: Amount = None,
) -> BudgetConfig:
    """Change the budget of a study that was begun, also after its end, and while another process or machine runs it.

    It is kept in study.yaml, and in the store, where a running driver looks.

    Raises:
        ConfigError: for no amount, one that cannot be read, or one on top of no limit.
    """
    config = store.config()
    given = {"trials": trials, "hours": hours, "gpu_hours": gpu_hours, "epochs": epochs}
    changes = {
        name: _amount(name, amount, getattr(config.budget, name))
        for name, amount in given.items()
        if amount is not None
    }
    if trials is not None and config.sampler.name == "pbt":
        raise ConfigError(
            "sampler pbt runs whole generations: its trials follow from members and epochs."
        )
    if not changes:
        raise ConfigError(
            "extend needs an amount, such as --trials +10 or --hours 8, or a changed space (--space)."
        )
    budget = build(BudgetConfig, config.budget.model_dump() | changes, "extend")
    search = begin(store, config)
    # A study file that says what it said before is no wish for less: see `Study.run`.
    first = (search.user_attrs.get("extended") or {}).get("from") or config.budget.model_dump(
        mode="json"
    )
    search.set_user_attr("extended", {"from": first, "to": budget.model_dump(mode="json")})
    search.set_user_attr("budget", budget.model_dump(mode="json"))
    write_yaml(config.model_copy(update={"budget": budget}), store.folder / "study.yaml")
    return budget


def _amount(name: str, amount: str | float, now: float | None) -> float:
    text = str(amount).strip()
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(
            f"extend: {name} is {text!r}, but a number such as 20, or +10 for more, is needed."
        ) from None
    if not text.startswith("+"):
        return number
    if now is None:
        raise ConfigError(
            f"extend: {name} has no limit so far that {text} could be added to; give the limit itself."
        )
    return now + number


def enqueue(
    store: StudyStore,
    config: StudyConfig,
    params: Mapping[str, Any],
    *,
    about: Mapping[str, Any] | None = None,
) -> int:
    """Store a trial that is run before the sampler's; what `params` leave open is sampled. Returns its number.

    Args:
        params: by the space's names.
        about: user attributes.

    Raises:
        ConfigError: where the space does not have these values.
    """
    if not params:
        raise ConfigError(
            "enqueue needs values, such as ratio.start=0.3; without any the sampler proposes by itself."
        )
    if config.sampler.name == "pbt":
        raise ConfigError(
            "A study of sampler.name=pbt cannot take trials: its members go on from each other."
        )
    fixed = check_given(params, config)
    study = begin(store, config)
    waiting = create_trial(
        state=TrialState.WAITING, system_attrs={"fixed_params": fixed}, user_attrs=dict(about or {})
    )  # as Optuna's own enqueue_trial stores it, which does not tell the number
    storage = study._storage
    return storage.get_trial(storage.create_new_trial(study._study_id, waiting)).number


def retry(store: StudyStore, config: StudyConfig, number: int) -> int:
    """Enqueue a finished trial's parameters once more, as a new trial with a seed of its own. Returns its number.

    Raises:
        StudyError: there is no such trial, or it has not ended. ConfigError: the space has changed since.
    """
    trial = find_trial(store, number)
    if not trial.state.is_finished():
        raise StudyError(
            f"Trial {number} of {store.name!r} has not ended ({trial.state.name}); it needs no retry."
        )
    if not trial.params:
        raise StudyError(
            f"Trial {number} of {store.name!r} has no parameters that could be tried again."
        )
    return enqueue(store, config, trial.params, about={"retry_of": number})


def delete(store: StudyStore) -> None:
    """Delete a study: its folder and, where it is in a database, its Optuna studies there, older versions included.

    Raises:
        StudyError: somebody runs it.
    """
    if holder := store.holder():
        raise StudyError(
            f"Study {store.name!r} is run by {holder}; cancel it before it is deleted."
        )
    if store.config().storage is not None:
        _delete_from_database(store)
    shutil.rmtree(store.folder)


def _delete_from_database(store: StudyStore) -> None:
    mark = store.folder / "id"
    ours = mark.read_text() if mark.is_file() else None
    search, storage = store.search_name(), store.storage()
    there = {
        study.study_name: study.user_attrs.get("folder", ours)
        for study in storage.get_all_studies()
    }
    if there.get(search, ours) != ours:
        raise StudyError(
            f"The database holds a study {store.name!r} of another folder than {store.folder}, which is not ours to "
            f"delete; delete this folder by hand."
        )
    version = re.compile(rf"{re.escape(store.name)}\.v\d+")
    for name, folder in there.items():
        own = name in (store.name, f"{store.name}.baselines", f"{store.name}.confirm")
        if own or (version.fullmatch(name) and folder == ours):
            with suppress(KeyError):  # deleted by another at this moment
                optuna.delete_study(study_name=name, storage=storage)
