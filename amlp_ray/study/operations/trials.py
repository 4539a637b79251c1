"""The trials of a study, as rows for people and programs, at any time and from any process."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import StudyConfig
from amlp_ray.config.yaml_file import read_yaml
from amlp_ray.errors import ConfigError, StudyError
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.utils.files import read_json

STATES = ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "INTERRUPTED", "WAITING")


def trial_rows(store: StudyStore, config: StudyConfig | None = None) -> list[dict[str, Any]]:
    """All trials as plain rows: the search, then baselines, then the confirmation.

    Columns: `kind` (search, a baseline's name, or `confirm CANDIDATE`), `number` (the repeat, but for the search), `state`,
    one per objective and the study's metric at the last rung, what it took, what is to note, and searched settings.
    """
    config = config or store.config()
    studies = store.search(), store.baselines(), store.confirmation()
    search, baselines, confirmation = (study.get_trials(deepcopy=False) for study in studies)
    running = store.is_run()
    names = parameter_names(search, config)
    return (
        [_row(trial, "search", trial.number, names, config, running) for trial in search]
        + [
            _row(
                t,
                t.user_attrs.get("baseline", "baseline"),
                t.user_attrs.get("repeat"),
                names,
                config,
                running,
            )
            for t in baselines
        ]
        + [
            _row(
                t,
                f"confirm {t.user_attrs.get('candidate')}",
                t.user_attrs.get("repeat"),
                names,
                config,
                running,
            )
            for t in confirmation
        ]
    )


def trial_facts(store: StudyStore, number: int) -> dict[str, Any]:
    """Everything about one trial of the search: settings, rungs, what it took, why it ended so, provenance, files.

    Raises:
        StudyError: there is no such trial.
    """
    config, trial = store.config(), find_trial(store, number)
    about, folder = trial.user_attrs, folder_of(store, trial)
    file = folder / "config.yaml"
    values = trial.values if trial.state == TrialState.COMPLETE else None
    return {
        "trial": number,
        "state": state_of(trial, running=store.is_run()),
        "reason": about.get("reason"),
        "note": note_of(trial),
        "values": dict(zip(config.objectives, values, strict=True)) if values else None,
        "metric": config.metric,
        "params": trial.system_attrs.get("fixed_params", {}) | trial.params,
        "rungs": dict(sorted(trial.intermediate_values.items())),
        "stats": about.get("stats") or {},
        "lost": about.get("lost"),
        "started": time_of(trial.datetime_start),
        "ended": time_of(trial.datetime_complete),
        "folder": str(folder),
        "files": sorted(p.name for p in folder.iterdir()) if folder.is_dir() else [],
        "error": str(folder / "error.txt") if (folder / "error.txt").is_file() else None,
        "config": dict(read_yaml(file)) if file.is_file() else {},
        "provenance": {
            k: v for k, v in (read_json(folder / "provenance.json") or {}).items() if k != "config"
        },
    }


def folder_of(store: StudyStore, trial: FrozenTrial) -> Path:
    """The folder of a trial of any of the three Optuna studies; always one inside of the study's own."""
    path = trial.user_attrs.get("path")
    if isinstance(path, str) and (store.folder / path).resolve().is_relative_to(
        store.folder.resolve()
    ):
        return store.folder / path
    return store.trial_folder(trial.number)


def find_trial(store: StudyStore, number: int) -> FrozenTrial:
    """A trial of the search. Raises StudyError where there is none of that number."""
    trials = store.search().get_trials(deepcopy=False)
    if not 0 <= number < len(trials):
        last = f"its trials are 0 to {len(trials) - 1}" if trials else "it has none yet"
        raise StudyError(f"Study {store.name!r} has no trial {number}; {last}.")
    return trials[number]


def chosen_rows(
    rows: Sequence[dict[str, Any]],
    *,
    states: Sequence[str] = (),
    sort: str | None = None,
    columns: Sequence[str] = (),
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Rows of these states, sorted, cut and with these columns only.

    Args:
        sort: a column; `-` before it sorts from high to low. Rows without a value come last.

    Raises:
        ConfigError: for a state or column that there is not.
    """
    wanted = [state.upper() for state in states]
    _check_known("state", wanted, STATES)
    known = list(rows[0]) if rows else [*columns, *([sort.lstrip("-")] if sort else [])]
    _check_known("column", [*columns, *([sort.lstrip("-")] if sort else [])], known)
    kept = [row for row in rows if not wanted or row["state"] in wanted]
    if sort:
        name, down = sort.lstrip("-"), sort.startswith("-")
        there = [row for row in kept if row[name] is not None]
        numeric = all(isinstance(row[name], int | float) for row in there)
        there.sort(key=lambda row: row[name] if numeric else str(row[name]), reverse=down)
        kept = there + [row for row in kept if row[name] is None]
    return [{name: row[name] for name in columns or known} for row in kept[:limit]]


def parameter_names(trials: Sequence[FrozenTrial], config: StudyConfig) -> list[str]:
    """Searched names: as declared, then those that only trials know."""
    declared = config.space if isinstance(config.space, dict) else {}
    known = {name for trial in trials for name in trial.params}
    return [*(name for name in declared if name in known), *sorted(known - declared.keys())]


def state_of(trial: FrozenTrial, *, running: bool) -> str:
    """A trial's state as people are told it; `running`: whether somebody runs the study."""
    return "INTERRUPTED" if trial.state == TrialState.RUNNING and not running else trial.state.name


def note_of(trial: FrozenTrial) -> str | None:
    """Where a trial comes from, where it is not simply proposed and trained."""
    about = trial.user_attrs
    notes = [
        f"from {about['source']}" if "source" in about else None,
        f"same as trial {about['copy_of']}" if "copy_of" in about else None,
        f"trial {about['retry_of']} again" if "retry_of" in about else None,
        f"a segment, goes on from trial {about['parent']}"
        if about.get("parent") is not None
        else None,
        "outside of the space" if "outside" in about else None,
    ]
    return "; ".join(filter(None, notes)) or None


def _row(
    trial: FrozenTrial,
    kind: str,
    number: int | None,
    names: list[str],
    config: StudyConfig,
    running: bool,
) -> dict[str, Any]:
    facts, rungs = trial.user_attrs.get("stats") or {}, trial.intermediate_values
    values = trial.values if trial.state == TrialState.COMPLETE and trial.values else []
    measured = {config.metric: rungs[max(rungs)] if rungs else None}
    measured |= dict.fromkeys(name for name in config.objectives if name != config.metric)
    if len(values) == len(config.objectives):
        measured |= dict(zip(config.objectives, values, strict=True))
    elif values:
        measured[config.metric] = values[
            0
        ]  # baselines have one value, whatever the search strives for
    return {
        "kind": kind,
        "number": trial.number if number is None else number,
        "state": state_of(trial, running=running),
        **measured,
        "epochs": facts.get("epochs", max(rungs, default=0)),
        **{
            name: facts.get(name)
            for name in ("seconds", "gpu_seconds", "memory")
            if name not in measured
        },
        "note": note_of(trial),
        "reason": trial.user_attrs.get("reason"),
        **{name: trial.params.get(name) for name in names},
    }


def time_of(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(sep=" ", timespec="seconds")


def _check_known(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError(
            f"There is no {what} {unknown[0]!r} among the trials; there are {', '.join(known)}."
        )
