"""Trials out of a study, as tables for other programs, and into one, as prior knowledge."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import PretrainConfig, StudyConfig
from amlp_ray.config.overrides import flat
from amlp_ray.errors import ConfigError, StudyError
from amlp_ray.study.operations.edit import begin
from amlp_ray.study.operations.trials import folder_of, note_of, state_of
from amlp_ray.study.search_space.values import OutOfSpaceError, config_of_trial, fit
from amlp_ray.study.storage.provenance import read_provenance
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.utils.files import write_whole

FORMATS = ("csv", "parquet", "json")


def export_trials(store: StudyStore, out: Path, format: str | None = None) -> int:
    """Write every trial with parameters, rungs, facts and provenance to a file; return how many.

    In JSON they are nested; in CSV and Parquet columns are dotted: `params.ratio.start`, `rungs.18`, `facts.seconds`.

    Args:
        format: csv, parquet or json; none: by the file's ending.

    Raises:
        ConfigError: for another format.
    """
    chosen = format or out.suffix.lstrip(".").lower()
    if chosen not in FORMATS:
        raise ConfigError(
            f"{out}: the format is {chosen or 'not given'!r}, but must be {', '.join(FORMATS)}."
        )
    rows = list(exported(store))
    out.parent.mkdir(parents=True, exist_ok=True)
    if chosen == "json":
        write_whole(out, json.dumps([_finite(row) for row in rows], indent=1))
        return len(rows)
    table = [flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in table for name in row))
    if chosen == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
            for row in table
        )
        write_whole(out, text.getvalue())
    else:
        _write_parquet(out, columns, table)
    return len(rows)


def exported(store: StudyStore) -> Iterator[dict[str, Any]]:
    """Every trial of the search, the baselines and the confirmation as nested plain values."""
    config, running = store.config(), store.is_run()
    for kind, study in (
        ("search", store.search()),
        ("baseline", store.baselines()),
        ("confirm", store.confirmation()),
    ):
        for trial in study.get_trials(deepcopy=False):
            about = dict(trial.user_attrs)
            facts = about.pop("stats", None) or {}
            names = list(config.objectives) if kind == "search" else [config.metric]
            values = (
                trial.values
                if trial.state == TrialState.COMPLETE and trial.values
                else [None] * len(names)
            )
            yield {
                "study": config.name,
                "kind": kind,
                "number": trial.number,
                "state": state_of(trial, running=running),
                "values": dict(zip(names, values, strict=False)),
                "params": dict(trial.params),
                "rungs": {
                    str(epoch): value for epoch, value in sorted(trial.intermediate_values.items())
                },
                "stats": facts,
                "note": note_of(trial),
                "attributes": about,
                "started": _time(trial.datetime_start),
                "ended": _time(trial.datetime_complete),
                "provenance": _short(read_provenance(folder_of(store, trial))),
            }


@dataclass
class Imported:
    """What an import did. `left_out` says of each trial that was not taken why, by what it is called there."""

    taken: list[int] = field(default_factory=list)  # their numbers here
    known: int = 0  # that the study has already
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def import_trials(
    store: StudyStore,
    config: StudyConfig,
    source: str | Path,
    *,
    runs: str | Path | None = None,
) -> Imported:
    """Give a study the complete trials of another, or of a CSV file, as prior knowledge; it may be begun or not.

    They are stored COMPLETE with the attribute `source`: the sampler learns from them, and they count neither in the
    budget nor as best. What is there already is not stored again.

    Args:
        source: a CSV file with a column per parameter and per objective (an export of ours is one), or the name or
            folder of a study.
        runs: folder of all studies; none: the one that this study lies in.

    Raises:
        ConfigError: the file cannot be read or has no column for an objective. StudyError: there is no such study.
    """
    found, path = Imported(), Path(source)
    if path.suffix.lower() == ".csv" or path.is_file():
        given = _of_file(path, config)
    else:
        folder = (
            path if (path / "study.yaml").is_file() else Path(runs or store.folder.parent) / source
        )
        given = _of_study(StudyStore.open(folder), store, config, found)
    study = begin(store, config)
    there = {
        _key(trial)
        for trial in study.get_trials(deepcopy=False)
        if trial.state == TrialState.COMPLETE
    }
    for name, origin, values, scores in given:
        try:
            if isinstance(scores, str):
                raise OutOfSpaceError(scores)
            asked = fit(values, config)
            _check_set_alike(values, asked.values, config)
        except OutOfSpaceError as misfit:
            found.left_out[name] = str(misfit)
            continue
        trial = _prior(asked.params, asked.distributions, scores, origin)
        if _key(trial) in there:
            found.known += 1
            continue
        there.add(_key(trial))
        storage = study._storage
        found.taken.append(
            storage.get_trial(storage.create_new_trial(study._study_id, trial)).number
        )
    return found


# name there, source attribute, settings and parameters by name, values of the objectives or why there are none
Given = tuple[str, str, dict[str, Any], list[float] | str]


def _of_study(
    other: StudyStore, store: StudyStore, config: StudyConfig, found: Imported
) -> Iterator[Given]:
    theirs = other.config()
    if other.folder == store.folder:
        raise StudyError(f"Study {store.name!r} cannot be imported into itself.")
    for what, ours in (
        ("data", config.data),
        ("probe", config.probe),
        ("epochs", config.pretrain.get("epochs")),
    ):
        if ours != (theirs.pretrain.get("epochs") if what == "epochs" else getattr(theirs, what)):
            found.notes.append(
                f"{theirs.name} has other {what}: its scores may be higher or lower by that alone"
            )
    for trial in other.search().get_trials(deepcopy=False):
        name = f"trial {trial.number}"
        if trial.state != TrialState.COMPLETE:
            yield name, "", {}, f"it is {trial.state.name} and not COMPLETE."
            continue
        try:
            values = {
                **flat(theirs.trial(config_of_trial(trial.params, theirs), seed=0)),
                **trial.params,
            }
        except OutOfSpaceError:
            values = dict(trial.params)  # of an older space there
        yield (
            name,
            f"study {theirs.name} trial {trial.number}",
            values,
            _scores(trial, theirs, config),
        )


def _scores(trial: FrozenTrial, theirs: StudyConfig, config: StudyConfig) -> list[float] | str:
    facts = trial.user_attrs.get("stats") or {}
    known = {
        **(facts.get("scores") or {}),
        **{k: v for k, v in facts.items() if isinstance(v, int | float)},
    }
    known |= dict(zip(theirs.objectives, trial.values, strict=False))
    return _objectives(known, config)


def _of_file(path: Path, config: StudyConfig) -> Iterator[Given]:
    if not path.is_file():
        raise ConfigError(f"There is no file {path}; check the path.")
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")))
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"{path} cannot be read as CSV: {' '.join(str(error).split())}."
        ) from None
    columns = list(reader.fieldnames or [])
    for objective in config.objectives:
        if objective not in columns and f"values.{objective}" not in columns:
            raise ConfigError(
                f"{path} has no column {objective!r}, an objective of {config.name!r}; it has "
                f"{', '.join(columns[:12]) or 'no columns'}."
            )
    for line, row in enumerate(rows, start=2):
        name = f"line {line}"
        if row.get("state") not in (None, "", "COMPLETE") or row.get("kind") not in (
            None,
            "",
            "search",
        ):
            own = row.get("kind") in (None, "", "search")
            why = (
                f"it is {row['state']} and not COMPLETE."
                if own
                else f"it is run {row['kind']}, and no trial of a search."
            )
            yield name, "", {}, why
            continue
        ours = {
            column.removeprefix("params."): _read(text)
            for column, text in row.items()
            if column and text
        }
        known = {
            column.removeprefix("values."): _read(text)
            for column, text in row.items()
            if column and text
        }
        numbers = {
            k: v for k, v in known.items() if isinstance(v, int | float) and not isinstance(v, bool)
        }
        yield name, f"import {path.name}", ours, _objectives(numbers, config)


def _objectives(known: Mapping[str, Any], config: StudyConfig) -> list[float] | str:
    missing = [name for name in config.objectives if not _is_number(known.get(name))]
    return (
        f"it has no {missing[0]}."
        if missing
        else [float(known[name]) for name in config.objectives]
    )


def _read(text: str) -> Any:
    """A value as YAML would read it: `0.3`, `true`, `hard`."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False}.get(text, text)


def _check_set_alike(
    given: Mapping[str, Any], values: Mapping[str, Any], config: StudyConfig
) -> None:
    """Raise Misfit where what is known of the trial differs from what the study sets for all of its trials."""
    ours = flat(config.trial(values, seed=0))
    for name in _method_names():
        if (
            name in given
            and name in ours
            and given[name] != ours[name]
            and not _close(given[name], ours[name])
        ):
            raise OutOfSpaceError(f"{name} is {given[name]} there and {ours[name]} here.")


def _method_names() -> list[str]:
    """Settings that a score follows from; how images are read and how long a trial is are told as notes."""
    return [
        name
        for name in flat(PretrainConfig())
        if name not in ("seed", "data", "epochs", "compile", "precision", "variant")
    ]


def _close(a: Any, b: Any) -> bool:
    return _is_number(a) and _is_number(b) and math.isclose(a, b, rel_tol=1e-9)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _prior(
    params: Mapping[str, Any],
    distributions: Mapping[str, Any],
    values: Sequence[float],
    source: str,
) -> FrozenTrial:
    now = datetime.now()
    return FrozenTrial(
        number=-1,
        trial_id=-1,
        state=TrialState.COMPLETE,
        value=None,
        values=list(values),
        datetime_start=now,
        datetime_complete=now,
        params=dict(params),
        distributions=dict(distributions),
        user_attrs={"source": source},
        system_attrs={},
        intermediate_values={},
    )


def _key(trial: FrozenTrial) -> tuple[Any, ...]:
    """What makes two complete trials the same knowledge."""
    return (
        *sorted((name, repr(value)) for name, value in trial.params.items()),
        *map(repr, trial.values),
    )


def _short(provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of a trial's provenance, what a table of trials is sorted and checked by."""
    if provenance is None:
        return {}
    kept = {name: provenance.get(name) for name in ("commit", "patch", "seed")}
    kept |= {"dataset": (provenance.get("dataset") or {}).get("fingerprint")}
    return kept | {name: provenance.get(name) for name in ("versions", "hardware")}


def _time(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="seconds")


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_parquet(out: Path, columns: Sequence[str], table: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    arrays = {}
    for column in columns:
        values = [row.get(column) for row in table]
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:  # a choice of numbers and words
            values = [None if value is None else str(value) for value in values]
        elif kinds == {int, float}:
            values = [None if value is None else float(value) for value in values]
        arrays[column] = pa.array(values)
    partial = out.with_name(f".{out.name}.partial")
    parquet.write_table(pa.table(arrays), partial)
    partial.replace(out)
