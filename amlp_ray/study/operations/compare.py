"""Compare studies: what each found, where they differ, and whether their scores are comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from statistics import fmean
from typing import Any

from amlp_ray.config import StudyConfig
from amlp_ray.config.overrides import flatten
from amlp_ray.errors import ConfigError
from amlp_ray.study.operations.status import baseline_scores, study_usage
from amlp_ray.study.operations.trials import searched_names
from amlp_ray.study.storage.best_trials import best_trial, pareto_front
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import TrialRecord, trial_records
from amlp_ray.utils.json_files import read_json

# Settings that may differ without making scores differ.
IGNORED_SETTINGS = (
    "name",
    "description",
    "data",
    "eval_data",
    "storage",
    "resources.",
    "fault_tolerance.",
    "sampler.suggest_ahead",
    "equivalence_margin",
)


@dataclass(frozen=True)
class _Compared:
    """A study, its config and the trials of its search."""

    store: StudyStore
    config: StudyConfig
    records: list[TrialRecord]


def compare(stores: Sequence[StudyStore]) -> dict[str, Any]:
    """Compare studies by their best trials and baselines.

    Returns:
        `studies`: a row each; `comparable`, and in `reasons` why not; `verdict` in words;
        `differing`: a row per setting that differs, with a column per study; `overlap` of each
        pair: parameters searched in both, and trials of the same parameters with their mean
        difference.

    Raises:
        ConfigError: there are fewer than two studies.
    """
    names = [store.name for store in stores]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ConfigError(
            f"compare needs two or more different studies, not {', '.join(names) or 'none'}."
        )
    studies = [_Compared(store, store.config(), trial_records(store.search())) for store in stores]
    rows = [_row(study) for study in studies]
    configs = [study.config for study in studies]
    reasons = _reasons(rows, configs)
    return {
        "studies": rows,
        "comparable": not reasons,
        "reasons": reasons,
        "verdict": _verdict(rows, configs, reasons),
        "differing": _differing_settings(configs),
        "overlap": [_overlap(first, second) for first, second in combinations(studies, 2)],
    }


def _row(study: _Compared) -> dict[str, Any]:
    config = study.config
    counted = [record for record in study.records if record.counts_in_budget]
    best = best_trial(study.store, config) if pareto_front(study.records, config) else None
    usage = study_usage(study.store, study.records)
    baselines = {}
    for name, values in baseline_scores(trial_records(study.store.baselines())).items():
        baselines[name] = {"n": len(values), "mean": fmean(values)}
    return {
        "study": config.name,
        "metric": config.metric,
        "best": None if best is None else _value(best, config),
        "trial": None if best is None else best.number,
        "complete": sum(record.is_complete for record in counted),
        "trials": usage.trials,
        "hours": usage.seconds / 3600,
        "epochs": usage.epochs,
        "baselines": baselines,
        "data": _fingerprints(study.store),
    }


def _value(record: TrialRecord, config: StudyConfig) -> float:
    """Return a complete trial's value of the study's metric, else of its first objective."""
    values = record.objective_values(config)
    return values.get(config.metric, next(iter(values.values())))


def _fingerprints(store: StudyStore) -> dict[str, str | None]:
    """Return the fingerprints of the data that a study was begun on."""
    environment = read_json(store.folder / "environment.json") or {}
    names = ("dataset", "eval_data")
    sections = {name: environment.get(name) for name in names}
    return {
        name: section.get("fingerprint") if isinstance(section, dict) else None
        for name, section in sections.items()
    }


def _reasons(rows: Sequence[Mapping[str, Any]], configs: Sequence[StudyConfig]) -> list[str]:
    """Return why scores are not comparable with those of the first study."""
    first = rows[0]
    reasons = []
    for row, config in zip(rows[1:], configs[1:], strict=True):
        pair = f"{first['study']} and {row['study']}"
        if None in (first["data"]["dataset"], row["data"]["dataset"]):
            reasons.append(f"of {pair}, one has not been run: what data it was on is not known")
        elif first["data"] != row["data"]:
            reasons.append(
                f"{pair} were run on different data (see the fingerprints in their "
                f"environment.json)"
            )
        if first["metric"] != row["metric"]:
            reasons.append(f"{pair} go by {first['metric']} and {row['metric']}")
        if configs[0].probe != config.probe:
            reasons.append(f"{pair} score by different probes (settings under probe)")
    return reasons


def _verdict(
    rows: Sequence[Mapping[str, Any]], configs: Sequence[StudyConfig], reasons: Sequence[str]
) -> str:
    if reasons:
        return f"Not comparable: {'; '.join(reasons)}."
    scored = [row for row in rows if row["best"] is not None]
    if len(scored) < 2:
        return "Nothing to compare yet: fewer than two of the studies have a complete trial."
    scored.sort(key=lambda row: -row["best"])
    first, second = scored[:2]
    margin = max(config.equivalence_margin for config in configs)
    gain = first["best"] - second["best"]
    if gain < margin:
        return (
            f"A tie: {first['study']} is {gain:.3f} above {second['study']}, and differences "
            f"below {margin:g} are noise."
        )
    return (
        f"{first['study']} found the best trial, {gain:.3f} above {second['study']}; each is the "
        f"best of many single runs, which `confirm` repeats."
    )


def _differing_settings(configs: Sequence[StudyConfig]) -> list[dict[str, Any]]:
    studies = [config.name for config in configs]
    tables = [flatten(config) for config in configs]
    rows = []
    for name in dict.fromkeys(chain.from_iterable(tables)):
        values = [table.get(name) for table in tables]
        if name.startswith(IGNORED_SETTINGS) or all(value == values[0] for value in values):
            continue
        rows.append({"setting": name, **dict(zip(studies, values, strict=True))})
    return rows


def _overlap(first: _Compared, second: _Compared) -> dict[str, Any]:
    """Compare the parameters of two searches, and the trials that have the same ones."""
    searched_first = searched_names(first.records)
    searched_second = searched_names(second.records)
    values_first = _values_by_params(first)
    values_second = _values_by_params(second)
    common = values_first.keys() & values_second.keys()
    differences = [values_first[params] - values_second[params] for params in common]
    return {
        "studies": [first.store.name, second.store.name],
        "searched_in_both": sorted(searched_first & searched_second),
        "only_first": sorted(searched_first - searched_second),
        "only_second": sorted(searched_second - searched_first),
        "same_trials": len(common),
        # first minus second
        "mean_difference": fmean(differences) if differences else None,
    }


def _values_by_params(study: _Compared) -> dict[tuple[Any, ...], float]:
    values = {}
    for record in study.records:
        if record.is_complete and record.counts_in_budget and record.params:
            params = tuple(sorted((name, repr(value)) for name, value in record.params.items()))
            values[params] = _value(record, study.config)
    return values
