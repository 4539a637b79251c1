"""Several studies side by side: what each found, where they differ, and whether their scores may be compared at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import StudyConfig
from amlp_ray.config.overrides import flatten
from amlp_ray.errors import ConfigError
from amlp_ray.study.operations.status import spent_by
from amlp_ray.study.storage.best_trials import best_trial, pareto_front
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import TrialRecord, trial_records

ASIDE = (
    "name",
    "description",
    "data",
    "eval_data",
    "storage",
    "resources.",
    "faults.",
    "sampler.suggest_ahead",
    "equivalence_margin",
)


def compare(stores: Sequence[StudyStore]) -> dict[str, Any]:
    """Compare studies by their best trials and baselines.

    Returns:
        `studies`: a row each; `comparable`, and in `reasons` why not; `verdict`, in words; `differing` settings, one
        row per setting with a column per study; `overlap` of each pair: parameters searched in both, and trials of the
        same parameters with their mean difference.

    Raises:
        ConfigError: for fewer than two studies.
    """
    names = [store.name for store in stores]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ConfigError(
            f"compare needs two or more different studies, not {', '.join(names) or 'none'}."
        )
    config = [store.config() for store in stores]
    trials = [store.search().get_trials(deepcopy=False) for store in stores]
    rows = [_row(*parts) for parts in zip(stores, config, trials, strict=True)]
    reasons = _reasons(rows, config)
    return {
        "studies": rows,
        "comparable": not reasons,
        "reasons": reasons,
        "verdict": _verdict(rows, config, reasons),
        "differing": _differing(config),
        "overlap": [
            {
                "studies": [names[i], names[j]],
                **_overlap(config[i], trials[i], config[j], trials[j]),
            }
            for i in range(len(names))
            for j in range(i + 1, len(names))
        ],
    }


def _row(store: StudyStore, config: StudyConfig, trials: Sequence[FrozenTrial]) -> dict[str, Any]:
    done = [
        trial for trial in trials if trial.state == TrialState.COMPLETE and TrialRecord(trial).counts_in_budget
    ]
    best = best_trial(store, config) if pareto_front(trial_records(store.search()), config) else None
    place = (
        list(config.objectives).index(config.metric) if config.metric in config.objectives else 0
    )
    baselines: dict[str, list[float]] = {}
    for trial in store.baselines().get_trials(deepcopy=False):
        if trial.state == TrialState.COMPLETE:
            baselines.setdefault(trial.user_attrs["baseline"], []).append(trial.values[0])
    spent = spent_by(store, trials, config)
    return {
        "study": config.name,
        "metric": config.metric,
        "best": None if best is None else best.values[place],
        "trial": None if best is None else best.number,
        "complete": len(done),
        "trials": spent.trials,
        "hours": spent.seconds / 3600,
        "epochs": spent.epochs,
        "baselines": {
            baseline: {"n": len(values), "mean": fmean(values)}
            for baseline, values in baselines.items()
        },
        "data": _fingerprints(store),
    }


def _fingerprints(store: StudyStore) -> dict[str, str | None]:
    """Of the data that a study was begun on, and of its labels where they are apart."""
    try:
        about = json.loads((store.folder / "environment.json").read_text())
    except (OSError, ValueError):
        return {"dataset": None, "eval_data": None}
    return {name: (about.get(name) or {}).get("fingerprint") for name in ("dataset", "eval_data")}


def _reasons(rows: Sequence[Mapping[str, Any]], config: Sequence[StudyConfig]) -> list[str]:
    first, reasons = rows[0], []
    for row, own in zip(rows[1:], config[1:], strict=True):
        pair = f"{first['study']} and {row['study']}"
        if None in (first["data"]["dataset"], row["data"]["dataset"]):
            reasons.append(f"of {pair}, one has not been run: what data it was on is not known")
        elif first["data"] != row["data"]:
            reasons.append(
                f"{pair} were run on different data (see the fingerprints in their environment.json)"
            )
        if first["metric"] != row["metric"]:
            reasons.append(f"{pair} go by {first['metric']} and {row['metric']}")
        if config[0].probe != own.probe:
            reasons.append(f"{pair} score by different probes (settings under probe)")
    return reasons


def _verdict(
    rows: Sequence[Mapping[str, Any]], config: Sequence[StudyConfig], reasons: Sequence[str]
) -> str:
    if reasons:
        return f"Not comparable: {'; '.join(reasons)}."
    scored = sorted((row for row in rows if row["best"] is not None), key=lambda row: -row["best"])
    if len(scored) < 2:
        return "Nothing to compare yet: fewer than two of the studies have a complete trial."
    equivalence_margin, (first, second) = max(own.equivalence_margin for own in config), scored[:2]
    gain = first["best"] - second["best"]
    if gain < equivalence_margin:
        return f"A tie: {first['study']} is {gain:.3f} above {second['study']}, and differences below {equivalence_margin:g} are noise."
    return (
        f"{first['study']} found the best trial, {gain:.3f} above {second['study']}; each is the best of many single "
        f"runs, which `confirm` repeats."
    )


def _differing(config: Sequence[StudyConfig]) -> list[dict[str, Any]]:
    tables = [flatten(own) for own in config]
    names = dict.fromkeys(name for table in tables for name in table)
    return [
        {
            "setting": name,
            **{own.name: table.get(name) for own, table in zip(config, tables, strict=True)},
        }
        for name in names
        if not name.startswith(ASIDE)
        and any(table.get(name) != tables[0].get(name) for table in tables)
    ]


def _overlap(
    a: StudyConfig,
    trials_a: Sequence[FrozenTrial],
    b: StudyConfig,
    trials_b: Sequence[FrozenTrial],
) -> dict[str, Any]:
    searched_a, searched_b = (
        {name for t in trials for name in t.params} for trials in (trials_a, trials_b)
    )
    values_a, values_b = _by_params(a, trials_a), _by_params(b, trials_b)
    both = values_a.keys() & values_b.keys()
    differences = [values_a[key] - values_b[key] for key in both]
    return {
        "searched_in_both": sorted(searched_a & searched_b),
        "only_first": sorted(searched_a - searched_b),
        "only_second": sorted(searched_b - searched_a),
        "same_trials": len(both),
        "mean_difference": fmean(differences) if differences else None,  # first minus second
    }


def _by_params(config: StudyConfig, trials: Sequence[FrozenTrial]) -> dict[tuple[Any, ...], float]:
    place = (
        list(config.objectives).index(config.metric) if config.metric in config.objectives else 0
    )
    return {
        tuple(sorted((name, repr(value)) for name, value in trial.params.items())): trial.values[
            place
        ]
        for trial in trials
        if trial.state == TrialState.COMPLETE and TrialRecord(trial).counts_in_budget and trial.params
    }
