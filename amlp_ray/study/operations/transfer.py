"""Export trials of a study as tables, and import trials as prior knowledge."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from optuna.trial import TrialState, create_trial

from amlp_ray.config import PretrainConfig, StudyConfig
from amlp_ray.config.overrides import flatten
from amlp_ray.errors import ConfigError, StudyError
from amlp_ray.study.operations.trials import time_text
from amlp_ray.study.search_space import space_function
from amlp_ray.study.search_space.given_trial import OutOfSpaceError
from amlp_ray.study.search_space.space import SearchSpace
from amlp_ray.study.storage.provenance import read_provenance
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import TrialRecord, finite, trial_records
from amlp_ray.utils.csv_text import csv_text, unescape
from amlp_ray.utils.files import atomic_path, atomic_write, local_path, without_nan
from amlp_ray.utils.json_files import JsonError, parse_json

FORMATS = ("csv", "parquet", "json")
# Settings that a score does not follow from, or that are compared otherwise.
IGNORED_SETTINGS = ("seed", "data", "epochs", "compile", "precision", "variant")


# Export


def export_trials(store: StudyStore, out: Path, format: str | None = None) -> int:
    """Write every trial with parameters, rungs, stats and provenance to a file.

    JSON is nested. CSV and Parquet have dotted columns: `params.ratio.start`, `rungs.18`,
    `stats.seconds`.

    Args:
        out: the file.
        format: csv, parquet or json; by default the file's ending.

    Returns:
        How many trials were written.

    Raises:
        ConfigError: the format is another.
    """
    out = local_path(out)
    chosen = format or out.suffix.lstrip(".").lower()
    if chosen not in FORMATS:
        raise ConfigError(
            f"{out}: the format is {chosen or 'not given'!r}, but must be {', '.join(FORMATS)}."
        )
    rows = list(exported_rows(store))
    out.parent.mkdir(parents=True, exist_ok=True)
    if chosen == "json":
        atomic_write(out, json.dumps([without_nan(row) for row in rows], indent=1))
        return len(rows)
    table = [flatten(row) for row in rows]
    columns = list(dict.fromkeys(chain.from_iterable(table)))
    write = _write_csv if chosen == "csv" else _write_parquet
    write(out, columns, table)
    return len(rows)


def exported_rows(store: StudyStore) -> Iterator[dict[str, Any]]:
    """Yield every trial of search, baselines and confirmation as nested plain values."""
    config = store.config()
    is_running = store.is_run()
    studies = {
        "search": store.search(),
        "baseline": store.baselines(),
        "confirm": store.confirmation(),
    }
    for kind, study in studies.items():
        objectives = list(config.objectives) if kind == "search" else [config.metric]
        for record in trial_records(study):
            yield {
                "study": config.name,
                "kind": kind,
                "number": record.number,
                "state": record.status(is_running=is_running),
                "values": _exported_values(record, objectives),
                "params": dict(record.params),
                "rungs": {str(epoch): value for epoch, value in sorted(record.rungs.items())},
                "stats": record.stats,
                "note": record.note,
                "attributes": {k: v for k, v in record.attributes.items() if k != "stats"},
                "started": time_text(record.started, "T"),
                "ended": time_text(record.ended, "T"),
                "provenance": _exported_provenance(read_provenance(store.folder_of(record))),
            }


def _exported_values(record: TrialRecord, objectives: Sequence[str]) -> dict[str, float | None]:
    if not record.is_complete or not record.values:
        return dict.fromkeys(objectives)
    return dict(zip(objectives, record.values, strict=False))


def _exported_provenance(provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the parts of a provenance by which a table of trials is sorted and checked."""
    if provenance is None:
        return {}
    names = ("commit", "patch", "seed", "dataset", "versions", "hardware")
    fingerprint = (provenance.get("dataset") or {}).get("fingerprint")
    return {name: provenance.get(name) for name in names} | {"dataset": fingerprint}


def _write_csv(out: Path, columns: list[str], table: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for row in table:
        values = [row.get(column) for column in columns]
        rows.append([json.dumps(v) if isinstance(v, list) else v for v in values])
    atomic_write(out, csv_text(columns, rows))


def _write_parquet(out: Path, columns: list[str], table: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    arrays = {}
    for column in columns:
        values = [row.get(column) for row in table]
        types = {type(value) for value in values if value is not None}
        if types == {int, float}:
            values = [None if value is None else float(value) for value in values]
        elif len(types) > 1:  # a choice of numbers and words
            values = [None if value is None else str(value) for value in values]
        arrays[column] = pa.array(values)
    with atomic_path(out) as partial:
        parquet.write_table(pa.table(arrays), partial)


# Import


@dataclass
class Imported:
    """What an import did."""

    taken: list[int] = field(default_factory=list)
    """Numbers of the stored trials."""
    known: int = 0
    """How many trials the study has already."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why each of the others was not taken, by its name in the source."""
    notes: list[str] = field(default_factory=list)
    """What differs between source and study."""


@dataclass(frozen=True)
class _ImportedTrial:
    """A trial of the source."""

    name: str  # in the source, for messages
    source: str = ""  # attribute of the stored trial
    values: Mapping[str, Any] = field(default_factory=dict)  # settings and parameters by name
    scores: Mapping[str, Any] = field(default_factory=dict)  # every number that it has, by name
    reason: str = ""  # why it cannot be taken; empty if it can


def import_trials(
    store: StudyStore,
    config: StudyConfig,
    source: str | Path,
    *,
    runs: str | Path | None = None,
    allow_code: bool = False,
) -> Imported:
    """Import the complete trials of another study or a CSV file as prior knowledge.

    They are stored as COMPLETE with the attribute `source`. The sampler learns from them, and they
    count neither in the budget nor as best. Trials that the study has already are not stored again.

    Args:
        store: of the study, which may be begun or not.
        source: a CSV file with a column per parameter and per objective, such as an export; or the
            name or folder of a study.
        runs: folder of all studies; by default the one that this study lies in.
        allow_code: whether the other study's space is imported where it is a Python function.

    Raises:
        ConfigError: the file cannot be read or has no column for an objective.
        StudyError: there is no such study.
    """
    imported = Imported()
    path = Path(source)
    if path.suffix.lower() == ".csv" or path.is_file():
        trials = list(_trials_of_file(path, config))
    else:
        is_folder = (path / "study.yaml").is_file()
        other = StudyStore.open(path if is_folder else Path(runs or store.folder.parent) / source)
        if other.folder == store.folder:
            raise StudyError(f"Study {store.name!r} cannot be imported into itself.")
        if allow_code:
            space_function.allow_code(other.config().space)
        imported.notes = _different_settings(other.config(), config)
        trials = list(_trials_of_study(other))
    with store.transaction(config) as current:
        _import(store, current, trials, imported)
    return imported


def _import(
    store: StudyStore,
    config: StudyConfig,
    trials: Sequence[_ImportedTrial],
    imported: Imported,
) -> None:
    """Store the trials that the study does not have, while it is held."""
    study = store.search(create=True)
    space = SearchSpace(config)
    known = {_key(r.params, r.values) for r in trial_records(study, (TrialState.COMPLETE,))}
    for trial in trials:
        try:
            values = _objective_values(trial, config)
            fitted = space.fit(trial.values)
            _check_same_settings(trial.values, fitted.values, config)
        except OutOfSpaceError as error:
            imported.left_out[trial.name] = str(error)
            continue
        key = _key(fitted.params, values)
        if key in known:
            imported.known += 1
            continue
        known.add(key)
        stored = create_trial(
            values=values,
            params=fitted.params,
            distributions=fitted.distributions,
            user_attrs={"source": trial.source},
        )
        imported.taken.append(store.add_trial(study, stored).number)


def _different_settings(other: StudyConfig, config: StudyConfig) -> list[str]:
    """Say what of another study makes its scores higher or lower."""
    pairs = {
        "data": (config.data, other.data),
        "probe": (config.probe, other.probe),
        "epochs": (config.pretrain.get("epochs"), other.pretrain.get("epochs")),
    }
    notes = []
    for name, (own, others) in pairs.items():
        if own != others:
            notes.append(
                f"{other.name} has other {name}: its scores may be higher or lower by that alone"
            )
    return notes


def _trials_of_study(other: StudyStore) -> Iterator[_ImportedTrial]:
    config = other.config()
    space = SearchSpace(config)
    for record in trial_records(other.search()):
        name = f"trial {record.number}"
        if not record.is_complete:
            yield _ImportedTrial(name, reason=f"it is {record.state.name} and not COMPLETE.")
            continue
        settings: dict[str, Any] = {}
        with suppress(OutOfSpaceError):  # a trial of an older space of that study
            settings = flatten(config.trial(space.config_of(record.params), seed=0))
        source = f"study {config.name} trial {record.number}"
        scores = {**record.measured, **record.stats, **record.objective_values(config)}
        yield _ImportedTrial(name, source, settings | record.params, scores)


def _trials_of_file(path: Path, config: StudyConfig) -> Iterator[_ImportedTrial]:
    if not path.is_file():
        raise ConfigError(f"There is no file {path}; check the path.")
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")))
        rows = [_unescaped(row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"{path} cannot be read as CSV: {' '.join(str(error).split())}."
        ) from None
    columns = [unescape(name) for name in reader.fieldnames or []]
    for objective in config.objectives:
        if objective not in columns and f"values.{objective}" not in columns:
            raise ConfigError(
                f"{path} has no column {objective!r}, an objective of {config.name!r}; it has "
                f"{', '.join(columns[:12]) or 'no columns'}."
            )
    for line, row in enumerate(rows, start=2):
        name = f"line {line}"
        if row.get("kind") not in (None, "", "search"):
            reason = f"it is of kind {row['kind']}, and no trial of a search."
            yield _ImportedTrial(name, reason=reason)
        elif row.get("state") not in (None, "", "COMPLETE"):
            yield _ImportedTrial(name, reason=f"it is {row['state']} and not COMPLETE.")
        else:
            cells = {column: _parse(text) for column, text in row.items()}
            values = {column.removeprefix("params."): value for column, value in cells.items()}
            scores = {column.removeprefix("values."): value for column, value in cells.items()}
            yield _ImportedTrial(name, f"import {path.name}", values, scores)


def _unescaped(row: Mapping[Any, Any]) -> dict[str, str]:
    """Return the named cells of a row as they were before an export marked them as text."""
    return {unescape(name): unescape(text) for name, text in row.items() if name and text}


def _parse(text: str) -> Any:
    """Parse a cell as YAML would: `0.3`, `true`, `hard`."""
    try:
        return parse_json(text)
    except JsonError:
        return {"True": True, "False": False}.get(text, text)


def _objective_values(trial: _ImportedTrial, config: StudyConfig) -> list[float]:
    """Return a value per objective; raise OutOfSpaceError if the trial cannot be taken."""
    if trial.reason:
        raise OutOfSpaceError(trial.reason)
    values = []
    for name in config.objectives:
        value = finite(trial.scores.get(name))
        if value is None:
            raise OutOfSpaceError(f"it has no {name}.")
        values.append(value)
    return values


def _check_same_settings(
    given: Mapping[str, Any], values: Mapping[str, Any], config: StudyConfig
) -> None:
    """Raise OutOfSpaceError if a trial has other settings than the study gives all its trials."""
    settings = flatten(config.trial(values, seed=0))
    for name in flatten(PretrainConfig()):
        if name in IGNORED_SETTINGS or name not in given or name not in settings:
            continue
        if not _is_same(given[name], settings[name]):
            raise OutOfSpaceError(f"{name} is {given[name]} there and {settings[name]} here.")


def _is_same(value: Any, other: Any) -> bool:
    if value == other:
        return True
    number, other_number = finite(value), finite(other)
    if number is None or other_number is None:
        return False
    return math.isclose(number, other_number, rel_tol=1e-9)


def _key(params: Mapping[str, Any], values: Sequence[float] | None) -> tuple[Any, ...]:
    """Return what makes two complete trials the same knowledge."""
    named = sorted((name, repr(value)) for name, value in params.items())
    return (*named, *map(repr, values or ()))
