"""Report the progress of a study, at any time and from any process.

Imports neither Ray nor torch, and reads a journal once. The status of thousands of trials takes
less than a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from amlp_ray.config import BudgetConfig, StudyConfig
from amlp_ray.errors import AmlpError
from amlp_ray.study.operations.trials import STATES, time_text
from amlp_ray.study.storage.best_trials import pareto_front
from amlp_ray.study.storage.budget import BudgetTracker, Usage
from amlp_ray.study.storage.lease import lease_seconds
from amlp_ray.study.storage.study_store import StudyStore, read_metrics
from amlp_ray.study.storage.trial_record import TrialRecord, trial_records
from amlp_ray.utils.files import local_path
from amlp_ray.utils.json_files import read_json_lines

STATE_WHILE_RUNNING = {"pause": "pausing", "stop": "stopping", "cancel": "cancelling"}
STATE_AFTER_REQUEST = {"pause": "paused", "stop": "stopped", "cancel": "cancelled"}
LISTED = ("name", "state", "trials", "of", "best", "metric", "changed")


def status(store: StudyStore, config: StudyConfig | None = None) -> dict[str, Any]:
    """Return who runs the study, trials by state, budget, best trials, baselines, confirmation.

    A RUNNING trial of a study that nobody runs is INTERRUPTED: the next run resumes it.
    """
    config = config or store.config()
    search = store.search()
    records = trial_records(search)
    baseline_records = trial_records(store.baselines())
    confirm_records = trial_records(store.confirmation())
    holder = store.holder()
    states = _count_states(records, is_running=holder is not None)
    baseline_states = _count_states(baseline_records, is_running=holder is not None)
    request = store.last_request()
    usage = study_usage(store, records)
    last_runs = read_json_lines(store.folder / "environments.jsonl")[-1:] if holder else []
    budget = {}
    for name, used in usage.as_dict().items():
        budget[name] = {"used": used, "allowed": getattr(config.budget, name)}
    return {
        "study": config.name,
        "folder": str(store.folder),
        "state": _study_state(baseline_states | states, holder, request, usage, config.budget),
        "run_by": holder,
        "since": last_runs[0].get("started") if last_runs else None,
        "request": request,
        "states": states,
        "baseline_states": baseline_states,
        "imported": sum(record.is_imported for record in records),
        "budget": budget,
        "objectives": dict(config.objectives),
        "best": [_best_row(record, config) for record in pareto_front(records, config)],
        "baselines": _baseline_means(baseline_records, config),
        "confirmed": _count_confirmed(confirm_records),
        "changed": _last_change([*records, *confirm_records]),
    }


def list_studies(runs: str | Path) -> list[dict[str, Any]]:
    """List all studies of a folder, one row each; one that cannot be read says why in `state`."""
    rows = []
    for file in sorted(local_path(runs).glob("*/study.yaml")):
        row: dict[str, Any] = dict.fromkeys(LISTED)
        row["name"] = file.parent.name
        rows.append(row)
        try:
            current = status(StudyStore.open(file.parent))
        except AmlpError as error:
            row["state"] = f"cannot be read: {error}"
            continue
        metric = next(iter(current["objectives"]))
        trials = current["budget"]["trials"]
        best = current["best"][0][metric] if current["best"] else None
        row |= {
            "name": current["study"],
            "state": current["state"],
            "trials": trials["used"],
            "of": trials["allowed"],
            "best": best,
            "metric": metric,
            "changed": current["changed"],
        }
    return rows


def running_rows(store: StudyStore, config: StudyConfig) -> list[dict[str, Any]]:
    """List all RUNNING trials, baselines and confirmation runs with their last epoch's metrics."""
    default_epochs = config.trial({}, seed=0).epochs
    rows = []
    for study in (store.search(), store.baselines(), store.confirmation()):
        for record in trial_records(study, (TrialState.RUNNING,)):
            metrics = _last_metrics(store, record)
            rows.append(
                {
                    "run": str(store.folder_of(record).relative_to(store.folder)),
                    "epoch": metrics.get("epoch", 0),
                    "of": record.params.get("epochs", default_epochs),
                    "loss": metrics.get("loss"),
                    config.metric: record.last_score,
                    "ratio": metrics.get("ratio"),
                    "images_per_second": metrics.get("images_per_second"),
                }
            )
    return rows


def study_usage(store: StudyStore, records: Sequence[TrialRecord]) -> Usage:
    """Return what a study has used of its budget; `records` are all trials of the search.

    Of running trials the epochs are counted, including those that a fork has inherited.
    """
    all_records = [*records, *trial_records(store.baselines())]
    tracker = BudgetTracker.from_trials(all_records)
    for record in all_records:
        if record.state == TrialState.RUNNING:
            epochs = _last_metrics(store, record).get("epoch", 0)
            tracker.report(str(record.folder), epochs=epochs, gpu_seconds=0.0)
    return tracker.usage(
        trials=sum(record.counts_in_budget for record in records),
        seconds=lease_seconds(store.search()),
    )


def _last_metrics(store: StudyStore, record: TrialRecord) -> dict[str, Any]:
    """Return the last epoch's metrics of a trial; empty before its first has ended."""
    rows = read_metrics(store.folder_of(record))
    return rows[-1] if rows else {}


def _count_states(records: Sequence[TrialRecord], *, is_running: bool) -> dict[str, int]:
    own = [record for record in records if not record.is_imported]
    counts = Counter(record.status(is_running=is_running) for record in own)
    return {state: counts[state] for state in STATES if state in counts}


def _study_state(
    states: Mapping[str, int],
    holder: str | None,
    request: Mapping[str, Any] | None,
    usage: Usage,
    budget: BudgetConfig,
) -> str:
    verb = str((request or {}).get("verb"))
    if holder:
        return STATE_WHILE_RUNNING.get(verb, "running")
    if not states.keys() - {"WAITING"}:
        return "not begun"
    if "INTERRUPTED" in states:
        return "paused" if verb == "pause" else "interrupted"
    if limit := usage.reached(budget):
        return f"finished ({limit})"
    return STATE_AFTER_REQUEST.get(verb, "ended")


def _best_row(record: TrialRecord, config: StudyConfig) -> dict[str, Any]:
    values = record.objective_values(config)
    return {"trial": record.number, **values, "params": dict(record.params)}


def baseline_scores(records: Sequence[TrialRecord]) -> dict[str, list[float]]:
    """Return the scores of the complete runs of each baseline."""
    scores: dict[str, list[float]] = {}
    for record in records:
        if record.is_complete and record.values and record.baseline:
            scores.setdefault(record.baseline, []).append(record.values[0])
    return scores


def _baseline_means(records: Sequence[TrialRecord], config: StudyConfig) -> dict[str, Any]:
    means = {}
    for baseline, scores in baseline_scores(records).items():
        means[baseline] = {"n": len(scores), config.metric: sum(scores) / len(scores)}
    return means


def _count_confirmed(records: Sequence[TrialRecord]) -> dict[str, dict[str, int]]:
    """Count the runs of each candidate: begun and done."""
    counts: dict[str, dict[str, int]] = {}
    for record in records:
        count = counts.setdefault(record.candidate or "?", {"done": 0, "begun": 0})
        count["begun"] += 1
        count["done"] += record.is_complete
    return counts


def _last_change(records: Sequence[TrialRecord]) -> str | None:
    times = []
    for record in records:
        times += [time for time in (record.started, record.ended) if time]
    return time_text(max(times, default=None))
