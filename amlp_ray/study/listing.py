"""What there is to say of a study at any time, from any process: how far it is, its trials, its best.

Imports neither Ray nor torch, and reads a journal once: a status of thousands of trials answers within a second.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import BudgetSettings, StudySettings
from amlp_ray.errors import AmlpError, SettingsError, StudyError
from amlp_ray.study.budget import Ledger, Spent, counts
from amlp_ray.study.store import StudyStore

STATES = ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "INTERRUPTED", "WAITING")


def status(store: StudyStore, settings: StudySettings | None = None) -> dict[str, Any]:
    """How far a study is: who runs it, trials by state, budget used and allowed, best, arms, confirmation.

    A RUNNING trial of a study that nobody runs is INTERRUPTED: the next run takes it over.
    """
    settings = settings or store.settings()
    with _in_haste():
        search, arms, confirmation = store.search(), store.arms(), store.confirmation()
        trials = search.get_trials(deepcopy=False)
    holder, about = store.holder(), search.user_attrs
    states = _states(trials, holder)
    request = about.get("request")
    spent = spent_by(store, trials, settings)
    confirmed = confirmation.get_trials(deepcopy=False)
    facts = {
        "study": settings.name,
        "folder": str(store.folder),
        "state": _state(states, holder, request, spent, settings.budget, bool(trials)),
        "run_by": holder,
        "since": _last_run(store).get("started") if holder else None,
        "request": request,
        "states": states,
        "imported": sum("source" in trial.user_attrs for trial in trials),
        "budget": {
            name: {"used": used, "allowed": getattr(settings.budget, name)} for name, used in spent.as_dict().items()
        },
        "objectives": dict(settings.objectives),
        "best": [_summary(trial, settings) for trial in front(trials, settings)],
        "arms": _arms(arms.get_trials(deepcopy=False), settings),
        "confirmed": {},
        "changed": _changed([*trials, *confirmed]),
    }
    for trial in confirmed:
        of = facts["confirmed"].setdefault(trial.user_attrs.get("candidate", "?"), {"done": 0, "begun": 0})
        of["begun"] += 1
        of["done"] += trial.state == TrialState.COMPLETE
    return facts


def trial_rows(store: StudyStore, settings: StudySettings | None = None) -> list[dict[str, Any]]:
    """All trials as plain rows: the search, then arms, then the confirmation.

    Columns: `kind` (search, an arm's name, or `confirm CANDIDATE`), `number` (the repeat, but for the search), `state`,
    one per objective and the study's metric at the last rung, what it took, what is to note, and searched settings.
    """
    settings = settings or store.settings()
    with _in_haste():
        studies = store.search(), store.arms(), store.confirmation()
        search, arms, confirmation = (study.get_trials(deepcopy=False) for study in studies)
    running = store.is_run()
    names = parameter_names(search, settings)
    return (
        [_row(trial, "search", trial.number, names, settings, running) for trial in search]
        + [_row(t, t.user_attrs.get("arm", "arm"), t.user_attrs.get("repeat"), names, settings, running) for t in arms]
        + [
            _row(t, f"confirm {t.user_attrs.get('candidate')}", t.user_attrs.get("repeat"), names, settings, running)
            for t in confirmation
        ]
    )


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
        SettingsError: for a state or column that there is not.
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


def front(trials: Sequence[FrozenTrial], settings: StudySettings) -> list[FrozenTrial]:
    """The best COMPLETE trials of the search: one, or the Pareto front of several objectives; none where none is done.

    What was imported is no result of this study, and a trial beyond `limits` counts only where every one is. Of equals
    the first stands for all; a front goes from the best value of the first objective down.
    """
    signs = [-1 if direction == "maximize" else 1 for direction in settings.objectives.values()]
    done = [t for t in trials if t.state == TrialState.COMPLETE and counts(t) and len(t.values) == len(signs)]
    done = [t for t in done if keeps_limits(t, settings)] or done
    costs = {t.number: tuple(s * value for s, value in zip(signs, t.values, strict=True)) for t in done}
    kept: list[FrozenTrial] = []
    for trial in sorted(done, key=lambda t: (costs[t.number], t.number)):  # who comes later beats none of those before
        cost = costs[trial.number]
        if not any(all(a <= b for a, b in zip(costs[other.number], cost, strict=True)) for other in kept):
            kept.append(trial)
    return kept


def keeps_limits(trial: FrozenTrial, settings: StudySettings) -> bool:
    """Whether a trial keeps `limits`; one that did not measure a cost is taken to."""
    facts = trial.user_attrs.get("facts") or {}
    return all((facts.get(name) or 0.0) <= limit for name, limit in settings.limits.items())


def best_trial(store: StudyStore, settings: StudySettings | None = None) -> FrozenTrial:
    """The COMPLETE trial with the best value of the study's metric; with several objectives, of those on their front.

    Raises:
        StudyError: where none is complete.
    """
    settings = settings or store.settings()
    best = front(store.search().get_trials(deepcopy=False), settings)
    if not best:
        raise StudyError(f"Study {settings.name!r} has no complete trial yet; see `amlp-ray study status`.")
    if settings.metric not in settings.objectives:
        return best[0]
    place = list(settings.objectives).index(settings.metric)
    return max(best, key=lambda trial: (trial.values[place], -trial.number))


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


def spent_by(store: StudyStore, trials: Sequence[FrozenTrial], settings: StudySettings) -> Spent:
    """What a study has used of its budget; of running trials, what they reported at their last rung."""
    every = [*trials, *store.arms().get_trials(deepcopy=False), *store.confirmation().get_trials(deepcopy=False)]
    ledger = Ledger.of(every)
    for trial in every:
        if trial.state == TrialState.RUNNING:
            ledger.report(str(trial._trial_id), epochs=max(trial.intermediate_values, default=0), gpu_seconds=0.0)
    lease = store.search().user_attrs.get("lease") or {}
    return ledger.spent(trials=sum(map(counts, trials)), seconds=float(lease.get("seconds", 0.0)))


def parameter_names(trials: Sequence[FrozenTrial], settings: StudySettings) -> list[str]:
    """Searched names: as declared, then those that only trials know."""
    declared = settings.space if isinstance(settings.space, dict) else {}
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
        f"goes on from trial {about['parent']}" if about.get("parent") is not None else None,
        "outside of the space" if "outside" in about else None,
    ]
    return "; ".join(filter(None, notes)) or None


def _row(
    trial: FrozenTrial, kind: str, number: int | None, names: list[str], settings: StudySettings, running: bool
) -> dict[str, Any]:
    facts, rungs = trial.user_attrs.get("facts") or {}, trial.intermediate_values
    values = trial.values if trial.state == TrialState.COMPLETE and trial.values else []
    measured = {settings.metric: rungs[max(rungs)] if rungs else None}
    measured |= dict.fromkeys(name for name in settings.objectives if name != settings.metric)
    if len(values) == len(settings.objectives):
        measured |= dict(zip(settings.objectives, values, strict=True))
    elif values:
        measured[settings.metric] = values[0]  # arms have one value, whatever the search strives for
    return {
        "kind": kind,
        "number": trial.number if number is None else number,
        "state": state_of(trial, running=running),
        **measured,
        "epochs": facts.get("epochs", max(rungs, default=0)),
        **{name: facts.get(name) for name in ("seconds", "gpu_seconds", "memory") if name not in measured},
        "note": note_of(trial),
        "reason": trial.user_attrs.get("reason"),
        **{name: trial.params.get(name) for name in names},
    }


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
    spent: Spent,
    budget: BudgetSettings,
    begun: bool,
) -> str:
    verb = (request or {}).get("verb")
    if holder:
        return {"pause": "pausing", "stop": "stopping", "cancel": "cancelling"}.get(str(verb), "running")
    if not begun:
        return "not begun"
    if "INTERRUPTED" in states:
        return "paused" if verb == "pause" else "interrupted"
    if limit := spent.reached(budget):
        return f"finished ({limit})"
    return {"stop": "stopped", "cancel": "cancelled", "pause": "paused"}.get(str(verb), "ended")


def _summary(trial: FrozenTrial, settings: StudySettings) -> dict[str, Any]:
    return {
        "trial": trial.number,
        **dict(zip(settings.objectives, trial.values, strict=True)),
        "params": dict(trial.params),
    }


def _arms(trials: Sequence[FrozenTrial], settings: StudySettings) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            found.setdefault(trial.user_attrs["arm"], []).append(trial.values[0])
    return {arm: {"n": len(v), settings.metric: sum(v) / len(v)} for arm, v in found.items()}


def _changed(trials: Sequence[FrozenTrial]) -> str | None:
    times = [time for trial in trials for time in (trial.datetime_start, trial.datetime_complete) if time]
    return max(times).isoformat(sep=" ", timespec="seconds") if times else None


def _last_run(store: StudyStore) -> dict[str, Any]:
    """The record of the last run of the study, in environments.jsonl."""
    file = store.folder / "environments.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    try:
        record = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _check_known(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise SettingsError(f"There is no {what} {unknown[0]!r} among the trials; there are {', '.join(known)}.")


@contextmanager
def _in_haste() -> Iterator[None]:
    """Thousands of trials are read without the collector, which would look through all of them again and again."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
