"""List the trials of a study as rows, at any time and from any process."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from amlp_ray.config import StudyConfig
from amlp_ray.config.yaml_file import read_record_values
from amlp_ray.errors import ConfigError, StudyError
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import TrialRecord, trial_records
from amlp_ray.utils.json_files import read_json

STATES = ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "INTERRUPTED", "WAITING")

Row = dict[str, Any]


def trial_rows(store: StudyStore, config: StudyConfig | None = None) -> list[Row]:
    """List all trials as rows: the search, then baselines, then the confirmation.

    The columns are `kind` (search, a baseline's name, or `confirm CANDIDATE`), `number` (the
    repeat, except in the search), `state`, one per objective and the study's metric at the last
    rung, costs, notes, and the searched parameters.
    """
    config = config or store.config()
    search = trial_records(store.search())
    names = parameter_names(search, config)
    is_running = store.is_run()
    runs = [(record, "search") for record in search]
    for record in trial_records(store.baselines()):
        runs.append((record, record.baseline or "baseline"))
    for record in trial_records(store.confirmation()):
        runs.append((record, f"confirm {record.candidate}"))
    return [_row(record, kind, names, config, is_running) for record, kind in runs]


def _row(
    record: TrialRecord, kind: str, names: list[str], config: StudyConfig, is_running: bool
) -> Row:
    scores: dict[str, float | None] = dict.fromkeys([config.metric, *config.objectives])
    scores[config.metric] = record.last_score
    scores |= record.objective_values(config)
    costs = [name for name in ("seconds", "gpu_seconds", "memory") if name not in scores]
    return {
        "kind": kind,
        "number": record.repeat,
        "state": record.status(is_running=is_running),
        **scores,
        "epochs": record.stats.get("epochs", max(record.rungs, default=0)),
        **{name: record.stats.get(name) for name in costs},
        "note": record.note,
        "reason": record.reason,
        **{name: record.params.get(name) for name in names},
    }


def trial_details(store: StudyStore, number: int) -> dict[str, Any]:
    """Return everything about one trial of the search: settings, rungs, costs, provenance, files.

    Raises:
        StudyError: there is no such trial.
    """
    config = store.config()
    record = find_trial(store, number)
    folder = store.folder_of(record)
    config_file = folder / "config.yaml"
    error_file = folder / "error.txt"
    # `read_provenance` would import pyarrow, which takes longer than all else here.
    provenance = read_json(folder / "provenance.json") or {}
    provenance.pop("config", None)
    return {
        "trial": number,
        "state": record.status(is_running=store.is_run()),
        "reason": record.reason,
        "note": record.note,
        "values": record.objective_values(config) or None,
        "metric": config.metric,
        "params": record.fixed_params | record.params,
        "rungs": dict(sorted(record.rungs.items())),
        "stats": record.stats,
        "lost": record.lost or None,
        "started": time_text(record.started),
        "ended": time_text(record.ended),
        "folder": str(folder),
        "files": sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [],
        "error": str(error_file) if error_file.is_file() else None,
        "config": dict(read_record_values(config_file)) if config_file.is_file() else {},
        "provenance": provenance,
    }


def find_trial(store: StudyStore, number: int) -> TrialRecord:
    """Return a trial of the search.

    Raises:
        StudyError: there is none of that number.
    """
    records = trial_records(store.search())
    if not 0 <= number < len(records):
        known = f"its trials are 0 to {len(records) - 1}" if records else "it has none yet"
        raise StudyError(f"Study {store.name!r} has no trial {number}; {known}.")
    return records[number]


def select_rows(
    rows: Sequence[Row],
    *,
    states: Sequence[str] = (),
    sort: str | None = None,
    columns: Sequence[str] = (),
    limit: int | None = None,
) -> list[Row]:
    """Filter, sort and cut rows, and keep some of their columns.

    Args:
        rows: of `trial_rows`.
        states: to keep; all by default.
        sort: a column; `-` before it sorts from high to low. Rows without a value come last.
        columns: to keep; all by default.
        limit: how many rows to keep.

    Raises:
        ConfigError: there is no such state or column.
    """
    states = [state.upper() for state in states]
    sort = sort or ""
    sort_column = sort.lstrip("-")
    named = [*columns, sort_column] if sort_column else columns
    available = list(rows[0]) if rows else named
    _check_known("state", states, STATES)
    _check_known("column", named, available)
    selected = [row for row in rows if not states or row["state"] in states]
    if sort_column:
        selected = _sorted(selected, sort_column, is_descending=sort.startswith("-"))
    return [{name: row[name] for name in columns or available} for row in selected[:limit]]


def _sorted(rows: Sequence[Row], column: str, *, is_descending: bool) -> list[Row]:
    with_value = [row for row in rows if row[column] is not None]
    without_value = [row for row in rows if row[column] is None]
    is_numeric = all(isinstance(row[column], int | float) for row in with_value)
    with_value.sort(
        key=lambda row: row[column] if is_numeric else str(row[column]), reverse=is_descending
    )
    return with_value + without_value


def _check_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(
                f"There is no {what} {name!r} among the trials; there are {', '.join(known)}."
            )


def parameter_names(records: Sequence[TrialRecord], config: StudyConfig) -> list[str]:
    """Return the searched names: as declared, then those that only trials have."""
    declared = config.space if isinstance(config.space, dict) else {}
    stored = searched_names(records)
    return [*(name for name in declared if name in stored), *sorted(stored - declared.keys())]


def searched_names(records: Sequence[TrialRecord]) -> set[str]:
    """Return the names of all parameters that trials have."""
    names: set[str] = set()
    return names.union(*(record.params for record in records))


def time_text(time: datetime | None, sep: str = " ") -> str | None:
    """Return a time as text, to the second."""
    return None if time is None else time.isoformat(sep, timespec="seconds")
