"""How far a study is: who runs it, what it has used, and its best; at any time and from any process.

Imports neither Ray nor torch, and reads a journal once: a status of thousands of trials answers within a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import BudgetConfig, StudyConfig
from amlp_ray.errors import AmlpError
from amlp_ray.study.operations.trials import STATES, folder_of, state_of, time_of
from amlp_ray.study.storage.best_trials import pareto_front
from amlp_ray.study.storage.budget import BudgetTracker, Usage
from amlp_ray.study.storage.lease import lease_seconds
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.study.storage.trial_record import TrialRecord, trial_records
from amlp_ray.training.loggers.metrics_file import read_rows


def status(store: StudyStore, config: StudyConfig | None = None) -> dict[str, Any]:
    """How far a study is: who runs it, trials by state, budget used and allowed, best, baselines, confirmation.

    A RUNNING trial of a study that nobody runs is INTERRUPTED: the next run takes it over.
    """
    config = config or store.config()
    search, baselines, confirmation = store.search(), store.baselines(), store.confirmation()
    trials = search.get_trials(deepcopy=False)
    holder, about = store.holder(), search.user_attrs
    arm_trials = baselines.get_trials(deepcopy=False)
    states, arm_states = _states(trials, holder), _states(arm_trials, holder)
    request = about.get("request")
    spent = spent_by(store, trials, config)
    confirmed = confirmation.get_trials(deepcopy=False)
    repeats: dict[str, dict[str, int]] = {}
    for trial in confirmed:
        of = repeats.setdefault(trial.user_attrs.get("candidate", "?"), {"done": 0, "begun": 0})
        of["begun"] += 1
        of["done"] += trial.state == TrialState.COMPLETE
    return {
        "study": config.name,
        "folder": str(store.folder),
        "state": _state({**arm_states, **states}, holder, request, spent, config.budget),
        "run_by": holder,
        "since": _last_run(store).get("started") if holder else None,
        "request": request,
        "states": states,
        "arm_states": arm_states,
        "imported": sum("source" in trial.user_attrs for trial in trials),
        "budget": {
            name: {"used": used, "allowed": getattr(config.budget, name)}
            for name, used in spent.as_dict().items()
        },
        "objectives": dict(config.objectives),
        "best": [_summary(trial, config) for trial in pareto_front(trial_records(search), config)],
        "baselines": _arms(arm_trials, config),
        "confirmed": repeats,
        "changed": _changed([*trials, *confirmed]),
    }


def list_studies(runs: str | Path) -> list[dict[str, Any]]:
    """All studies of a folder, one row each; one that cannot be read says why under `state`."""
    rows = []
    for file in sorted(Path(runs).glob("*/study.yaml")):
        row: dict[str, Any] = {"name": file.parent.name, "state": None, "trials": None, "of": None}
        row |= {"best": None, "metric": None, "changed": None}
        try:
            facts = status(StudyStore.open(file.parent))
        except AmlpError as error:
            rows.append(row | {"state": f"cannot be read: {error}"})
            continue
        metric = next(iter(facts["objectives"]))
        rows.append(
            row
            | {
                "name": facts["study"],
                "state": facts["state"],
                "trials": facts["budget"]["trials"]["used"],
                "of": facts["budget"]["trials"]["allowed"],
                "best": facts["best"][0][metric] if facts["best"] else None,
                "metric": metric,
                "changed": facts["changed"],
            }
        )
    return rows


def running_rows(store: StudyStore, config: StudyConfig) -> list[dict[str, Any]]:
    """Trials, baselines and confirmations that are RUNNING: how far they are, from the last line of their metrics."""
    rows = []
    for study in (store.search(), store.baselines(), store.confirmation()):
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            last, rungs = _last_line(store, trial), trial.intermediate_values
            rows.append(
                {
                    "run": str(folder_of(store, trial).relative_to(store.folder)),
                    "epoch": last.get("epoch", 0),
                    "of": trial.params.get("epochs", config.trial({}, seed=0).epochs),
                    "loss": last.get("loss"),
                    config.metric: rungs[max(rungs)] if rungs else None,
                    "ratio": last.get("ratio"),
                    "images_per_second": last.get("images_per_second"),
                }
            )
    return rows


def _last_line(store: StudyStore, trial: FrozenTrial) -> dict[str, Any]:
    """The last epoch's metrics of a trial; empty before its first has ended."""
    rows = read_rows(folder_of(store, trial) / "metrics.jsonl")
    return rows[-1] if rows else {}


def spent_by(store: StudyStore, trials: Sequence[FrozenTrial], config: StudyConfig) -> Usage:
    """What a study has used of its budget; of running trials the epochs, and of these what a fork inherited too."""
    records = [TrialRecord.from_frozen(trial) for trial in trials]
    every = [*records, *trial_records(store.baselines())]
    tracker = BudgetTracker.from_trials(every)
    for trial in every:
        if trial.state == TrialState.RUNNING:
            epochs = _last_line(store, trial.frozen).get("epoch", 0)
            tracker.report(str(trial.folder), epochs=epochs, gpu_seconds=0.0)
    return tracker.usage(
        trials=sum(trial.counts_in_budget for trial in records),
        seconds=lease_seconds(store.search()),
    )


def _states(trials: Sequence[FrozenTrial], holder: str | None) -> dict[str, int]:
    found: dict[str, int] = {}
    for trial in trials:
        if "source" not in trial.user_attrs:
            state = state_of(trial, running=holder is not None)
            found[state] = found.get(state, 0) + 1
    return {state: found[state] for state in STATES if state in found}


def _state(
    states: dict[str, int],
    holder: str | None,
    request: dict[str, Any] | None,
    spent: Usage,
    budget: BudgetConfig,
) -> str:
    verb = (request or {}).get("verb")
    if holder:
        return {"pause": "pausing", "stop": "stopping", "cancel": "cancelling"}.get(
            str(verb), "running"
        )
    if not states.keys() - {"WAITING"}:
        return "not begun"
    if "INTERRUPTED" in states:
        return "paused" if verb == "pause" else "interrupted"
    if limit := spent.reached(budget):
        return f"finished ({limit})"
    return {"stop": "stopped", "cancel": "cancelled", "pause": "paused"}.get(str(verb), "ended")


def _summary(trial: TrialRecord, config: StudyConfig) -> dict[str, Any]:
    return {
        "trial": trial.number,
        **trial.objective_values(config),
        "params": dict(trial.params),
    }


def _arms(trials: Sequence[FrozenTrial], config: StudyConfig) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            found.setdefault(trial.user_attrs["baseline"], []).append(trial.values[0])
    return {
        baseline: {"n": len(v), config.metric: sum(v) / len(v)} for baseline, v in found.items()
    }


def _changed(trials: Sequence[FrozenTrial]) -> str | None:
    times = [
        time for trial in trials for time in (trial.datetime_start, trial.datetime_complete) if time
    ]
    return time_of(max(times)) if times else None


def _last_run(store: StudyStore) -> dict[str, Any]:
    """The record of the last run of the study."""
    records = read_rows(store.folder / "environments.jsonl")
    return records[-1] if records else {}
