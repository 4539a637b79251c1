"""Rebuild stored trials from the files in the folders of their runs.

`trial.json` has a trial as it was stored last. Without it, parameters come from `config.yaml`,
scores from `metrics.jsonl`, `rungs/` and `score.json`, and the end from the study's `events.log`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from amlp_ray.config import COST_OBJECTIVES, StudyConfig, StudyObjective
from amlp_ray.config.overrides import flatten
from amlp_ray.config.yaml_file import read_record_values
from amlp_ray.errors import AmlpError
from amlp_ray.study.rungs import rung_epochs
from amlp_ray.study.search_space.space import SearchSpace
from amlp_ray.study.storage.study_store import read_metrics
from amlp_ray.study.storage.trial_files import read_trial_file
from amlp_ray.study.storage.trial_record import finite
from amlp_ray.training.loggers.metrics_file import own_rows
from amlp_ray.utils.json_files import read_json

SCORES = tuple(name for name in get_args(StudyObjective) if name not in COST_OBJECTIVES)
Kind = Literal["search", "baseline", "confirm"]

# How a line of events.log tells that a run began, or how it ended.
_EVENT = re.compile(
    r"^(?P<time>\S+) (?P<label>(?:trial|baseline|confirm) \S+) "
    r"(?P<word>starts|continues|complete|pruned|failed|ends its step)\b[^:]*(?:: (?P<text>.*))?$"
)
_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "ends its step": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclass(frozen=True)
class Ending:
    """How a run ended, by events.log."""

    state: TrialState
    when: datetime | None
    text: str


@dataclass
class Rebuilt:
    """A trial, and what of it cannot be known."""

    trial: FrozenTrial
    unknown: list[str] = field(default_factory=list)


def read_endings(study_folder: Path) -> dict[str, Ending]:
    """Read how runs have ended, by label, such as `trial 3` or `baseline mae-0`."""
    endings: dict[str, Ending] = {}
    path = study_folder / "events.log"
    text = path.read_text(errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        if match := _EVENT.match(line):
            state = _STATES.get(match["word"])
            if state is None:
                endings.pop(match["label"], None)
            else:
                when = _time(match["time"])
                endings[match["label"]] = Ending(state, when, match["text"] or "")
    return endings


def run_seconds(study_folder: Path) -> float:
    """Return for how long a study was run, by the first and last line of each run in events.log."""
    path = study_folder / "events.log"
    text = path.read_text(errors="replace") if path.is_file() else ""
    seconds = 0.0
    begun: datetime | None = None
    last: datetime | None = None
    for line in text.splitlines():
        stamp, _, message = line.partition(" ")
        when = _time(stamp)
        if when is None:
            continue
        if message.startswith("study ") and " side by side, folder " in message:
            seconds += _between(begun, last)
            begun = when
        last = when
    return seconds + _between(begun, last)


def _between(begun: datetime | None, last: datetime | None) -> float:
    return 0.0 if begun is None or last is None else max(0.0, (last - begun).total_seconds())


class Rebuilder:
    """Rebuilds trials of one study."""

    def __init__(self, config: StudyConfig, study_folder: Path) -> None:
        self._config = config
        self._space = SearchSpace(config)
        self._endings = read_endings(study_folder)

    def rebuild(
        self,
        folder: Path,
        kind: Kind,
        label: str,
        attributes: dict[str, Any] | None = None,
        known: FrozenTrial | None = None,
    ) -> Rebuilt:
        """Rebuild the trial of a folder.

        Args:
            label: by which events.log names it.
            attributes: user attributes that follow from its name.
            known: what a damaged storage has of it before its end.
        """
        stored = read_trial_file(folder)
        if stored is not None and stored.state.is_finished():
            return Rebuilt(stored)
        unknown: list[str] = []
        scores = _read_scores(folder)
        rungs = self._rungs(scores)
        settings = _read_settings(folder)
        state = self._state(folder, label, rungs, settings, unknown)
        stats = self._stats(folder, scores)
        values = self._values(kind, state, rungs, scores, stats)
        if state == TrialState.COMPLETE and values is None:
            state = TrialState.PRUNED
            unknown.append("a value of its objectives")
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        user_attrs = dict(attributes or {})
        if stored is not None:
            params, distributions = stored.params, stored.distributions
        elif kind == "search":
            state = self._set_params(
                settings, state, params, distributions, user_attrs, unknown, known
            )
        source = stored or known
        if source is not None:
            user_attrs = {**source.user_attrs, **user_attrs}
        if state.is_finished():
            user_attrs["stats"] = stats
        if state == TrialState.FAIL:
            user_attrs.setdefault("reason", self._reason(folder, label))
        trial = create_trial(
            state=state,
            values=None if state == TrialState.FAIL else values,
            params=params,
            distributions=distributions,
            user_attrs=user_attrs,
            system_attrs={} if source is None else source.system_attrs,
            intermediate_values=rungs,
        )
        trial.datetime_start, trial.datetime_complete = self._times(folder, label, trial)
        return Rebuilt(trial, unknown)

    def _rungs(self, scores: dict[int, dict[str, Any]]) -> dict[int, float]:
        rungs = {}
        for epoch, score in scores.items():
            value = finite(score.get(self._config.metric))
            if value is not None:
                rungs[epoch] = value
        return rungs

    def _state(
        self,
        folder: Path,
        label: str,
        rungs: dict[int, float],
        settings: dict[str, Any],
        unknown: list[str],
    ) -> TrialState:
        if ending := self._endings.get(label):
            return ending.state
        epochs = settings.get("epochs")
        last = max(rungs, default=None)
        if settings.get("objective") == "none" and last is not None:
            return TrialState.COMPLETE
        if isinstance(epochs, int) and last is not None and last >= epochs:
            return TrialState.COMPLETE
        if (folder / "error.txt").is_file():
            return TrialState.FAIL
        if not settings:
            unknown.append("whether it ended")
            return TrialState.FAIL
        rows = own_rows(read_metrics(folder))
        pruner = self._config.pruner
        rungs_of_trial = rung_epochs(epochs, pruner) if isinstance(epochs, int) else ()
        is_at_rung = bool(rows) and rows[-1]["epoch"] == last and last in rungs_of_trial
        if is_at_rung and pruner.name != "none":
            unknown.append("whether it was pruned or interrupted; it counts as pruned")
            return TrialState.PRUNED
        return TrialState.RUNNING

    def _stats(self, folder: Path, scores: dict[int, dict[str, Any]]) -> dict[str, Any]:
        """Return what a trial took, as it stores it at its end."""
        rows = own_rows(read_metrics(folder))
        seconds = 0.0
        for row in rows:
            for name in ("seconds", "evaluate_seconds"):
                seconds += finite(row.get(name)) or 0.0
        gpus = self._config.resources.gpus_per_worker * self._config.resources.max_workers
        stats: dict[str, Any] = {
            "seconds": round(seconds, 2),
            "gpu_seconds": round(seconds * gpus, 2),
            "epochs": len(rows),
        }
        speeds = [finite(row.get("images_per_second")) for row in rows]
        known_speeds = [speed for speed in speeds if speed is not None]
        if known_speeds:
            stats["images_per_second"] = round(sum(known_speeds) / len(known_speeds), 1)
        memory = [finite(row.get("memory")) for row in rows]
        known_memory = [value for value in memory if value is not None]
        if known_memory:
            stats["memory"] = max(known_memory)
        last = scores[max(scores)] if scores else {}
        numbers = {name: finite(last.get(name)) for name in SCORES}
        stats["scores"] = {name: value for name, value in numbers.items() if value is not None}
        return stats

    def _values(
        self,
        kind: Kind,
        state: TrialState,
        rungs: dict[int, float],
        scores: dict[int, dict[str, Any]],
        stats: dict[str, Any],
    ) -> list[float] | None:
        if not rungs or state not in (TrialState.COMPLETE, TrialState.PRUNED):
            return None
        last = max(rungs)
        objectives = list(self._config.objectives)
        if kind != "search" or objectives == [self._config.metric]:
            return [rungs[last]]
        if state == TrialState.PRUNED:
            return None
        values = []
        for name in objectives:
            source = stats if name in COST_OBJECTIVES else scores[last]
            value = finite(source.get(name))
            if value is None:
                return None
            values.append(value)
        return values

    def _set_params(
        self,
        settings: dict[str, Any],
        state: TrialState,
        params: dict[str, Any],
        distributions: dict[str, BaseDistribution],
        user_attrs: dict[str, Any],
        unknown: list[str],
        known: FrozenTrial | None,
    ) -> TrialState:
        """Find the parameters in a trial's settings; return its state, FAIL if it needs them."""
        try:
            fitted = self._space.fit(settings)
        except AmlpError as error:
            if known is not None:
                params |= known.params
                distributions |= known.distributions
                return state
            unknown.append("its parameters")
            user_attrs["outside"] = f"its parameters cannot be restored: {error}"
            if state.is_finished():
                return state
            user_attrs["reason"] = user_attrs["outside"]
            return TrialState.FAIL
        params |= fitted.params
        distributions |= fitted.distributions
        return state

    def _reason(self, folder: Path, label: str) -> str:
        ending = self._endings.get(label)
        if ending and ending.text:
            return ending.text
        error_file = folder / "error.txt"
        lines = error_file.read_text(errors="replace").split("\n") if error_file.is_file() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return last[:500] or "not known: its record was lost"

    def _times(
        self, folder: Path, label: str, trial: FrozenTrial
    ) -> tuple[datetime | None, datetime | None]:
        """Return when a trial began and ended, in local time as Optuna has it."""
        provenance = read_json(folder / "provenance.json") or {}
        started = _time(provenance.get("at"))
        if not trial.state.is_finished():
            return started or datetime.now(), None
        ending = self._endings.get(label)
        written = [
            (folder / name).stat().st_mtime
            for name in ("score.json", "metrics.jsonl", "error.txt", "config.yaml")
            if (folder / name).is_file()
        ]
        latest = datetime.fromtimestamp(max(written)) if written else datetime.now()
        ended = ending.when if ending and ending.when else latest
        return min(started or ended, ended), ended


def _read_scores(folder: Path) -> dict[int, dict[str, Any]]:
    """Return every scoring of a run by its epoch, from all files that have it."""
    scores: dict[int, dict[str, Any]] = {}
    files = [*sorted(folder.glob("rungs/*.json")), folder / "score.json"]
    for file in files:
        score = read_json(file) or {}
        if type(score.get("epoch")) is int and "dsc" in score:
            scores.setdefault(score["epoch"], score)
    for row in own_rows(read_metrics(folder)):
        if "dsc" in row:
            scores[row["epoch"]] = {**scores.get(row["epoch"], {}), **row}
    return scores


def _read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of a run by dotted name; empty if they are lost."""
    try:
        return flatten(dict(read_record_values(folder / "config.yaml")))
    except AmlpError:
        config = (read_json(folder / "provenance.json") or {}).get("config")
        return flatten(config) if isinstance(config, dict) else {}


def _time(text: Any) -> datetime | None:
    """Read a time as local time without a zone."""
    try:
        time = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return time.astimezone().replace(tzinfo=None) if time.tzinfo else time
