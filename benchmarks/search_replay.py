"""Searches replayed from a table of finished trainings: our sampler and pruner, but no training
and no Ray.

A suggestion is answered by a row of the table, and the search is told that row's own settings,
not those it asked for.
Time is counted in epochs: workers train side by side at one pace, and each asks for a trial when
its last one ends.
"""

from __future__ import annotations

import csv
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState, create_trial

from amlp_ray.config import StudyConfig
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import read_yaml
from amlp_ray.study.rungs import rung_epochs
from amlp_ray.study.search.pruning import Pruning
from amlp_ray.study.search.samplers import to_unit
from amlp_ray.study.search.suggester import Suggester, Suggestion
from amlp_ray.study.search_space.space import SearchSpace

Params = dict[str, Any]
FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Table:
    """A study's trials, each trained at full length and scored at every rung."""

    study: Mapping[str, Any]  # as its file says
    params: list[Params]
    distributions: dict[str, BaseDistribution]
    rungs: tuple[int, ...]  # epochs
    scores: FloatArray  # (rows, rungs)
    baselines: dict[str, list[float]]  # last score of each repeat
    seconds: FloatArray  # (rows,) that each training took

    def config(
        self, name: str, seed: int, sampler: Mapping[str, Any], pruner: Mapping[str, Any]
    ) -> StudyConfig:
        """The study with another sampler and pruner. Hyperband deals trials into brackets by the
        study's name."""
        study = {**self.study, "name": name, "seed": seed, "sampler": sampler, "pruner": pruner}
        config = build(StudyConfig, study, name)
        missing = set(rung_epochs(self.rungs[-1], config.pruner)) - set(self.rungs)
        if missing:
            raise ValueError(
                f"{name} scores trials after epochs {sorted(missing)}, which are not in the table"
            )
        return config

    def shuffled(self, seed: int) -> Table:
        """The same rows and scores, but which setting has which scores is chance."""
        return replace(self, scores=np.random.default_rng(seed).permutation(self.scores))


def read_table(rows: Path, study: Path) -> Table:
    """Read what `amlp-ray study export` wrote as CSV, and the study's file; what is not complete
    is left out."""
    declared = read_yaml(study)
    config = build(StudyConfig, declared, str(study))
    with rows.open(newline="") as file:
        complete_rows = [row for row in csv.DictReader(file) if row["state"] == "COMPLETE"]
    trials = [row for row in complete_rows if row["kind"] == "search"]
    columns = [name for name in trials[0] if name.startswith("rungs.") and trials[0][name]]
    space = SearchSpace(config)
    fits = [space.fit(_params(row, config)) for row in trials]
    baselines: dict[str, list[float]] = {}
    for row in complete_rows:
        if row["kind"] == "baseline":
            baselines.setdefault(row["attributes.baseline"], []).append(float(row["values.dsc"]))
    return Table(
        study=declared,
        params=[one.params for one in fits],
        distributions=fits[0].distributions,
        rungs=tuple(int(name.removeprefix("rungs.")) for name in columns),
        scores=np.array([[float(row[name]) for name in columns] for row in trials]),
        baselines=baselines,
        seconds=np.array([float(row["stats.seconds"]) for row in trials]),
    )


def _params(row: Mapping[str, str], config: StudyConfig) -> Params:
    names = {
        name.removeprefix("params."): text
        for name, text in row.items()
        if name.startswith("params.") and text
    }
    assert isinstance(config.space, dict)
    words = {name for name, p in config.space.items() if hasattr(p, "choices")}
    return {name: text if name in words else float(text) for name, text in names.items()}


# What answers a suggestion: returns the settings that the search is told, and their score at each
# rung of the table
Answer = Callable[[Params], tuple[Params, FloatArray] | None]


class Nearest:
    """Answers by the nearest row; None when all are used up, where each answers once only.

    Numbers are compared as shares of their range, on a log scale where the space has one. Another
    choice counts as a whole range. The distance is Euclidean.
    """

    def __init__(self, table: Table, *, again: bool = False) -> None:
        self._table, self._again = table, again
        self._places = places(table.params, table.distributions)
        self._free = np.ones(len(table.params), bool)

    def __call__(self, params: Params) -> tuple[Params, FloatArray] | None:
        if not self._free.any():
            return None
        row_distances = distances(places([params], self._table.distributions), self._places)[0]
        row = int(np.argmin(np.where(self._free, row_distances, np.inf)))
        self._free[row] = self._again
        return self._table.params[row], self._table.scores[row]


class Smooth:
    """Answers what was asked with the mean scores of the nearest rows, in which lucky seeds
    count less."""

    def __init__(self, table: Table, *, rows: int = 5) -> None:
        self._table, self._rows = table, rows
        self._places = places(table.params, table.distributions)

    def __call__(self, params: Params) -> tuple[Params, FloatArray]:
        row_distances = distances(places([params], self._table.distributions), self._places)[0]
        return params, self._table.scores[np.argsort(row_distances)[: self._rows]].mean(0)


class Bowl:
    """What the table might be if settings mattered: a made-up effect of what was asked, on top
    of `Nearest`'s noise.

    Scores fall with the distance from one point of the space, the more the longer a trial trains.
    Over the table, this effect is twice as large as the spread that is there.
    """

    def __init__(self, table: Table) -> None:
        self._nearest, self._table = Nearest(table), table
        self._points = places(table.params, table.distributions)
        self._grown = np.array(table.rungs) / table.rungs[-1]

    def __call__(self, params: Params) -> tuple[Params, FloatArray] | None:
        nearest = self._nearest(params)
        if nearest is None:
            return None
        fall = self._fall(self._points)
        effect = (
            self._fall(places([params], self._table.distributions))[0] - fall.mean()
        ) / fall.std()
        return params, nearest[1] + 2 * self._table.scores[:, -1].std() * effect * self._grown

    def _fall(self, points: FloatArray) -> FloatArray:
        best = self._points.mean(0) + 0.1  # off the middle, where a sampler may start
        return -((points - best) ** 2).sum(1)


def places(params: Sequence[Params], distributions: Mapping[str, BaseDistribution]) -> FloatArray:
    """Settings as points (n, d): numbers as shares of their range, choices one column each,
    sqrt(1/2) where taken."""
    columns: list[list[float]] = []
    for name, distribution in distributions.items():
        if isinstance(distribution, CategoricalDistribution):
            columns += [
                [math.sqrt(0.5) * (p[name] == c) for p in params] for c in distribution.choices
            ]
        else:
            columns.append([to_unit(p[name], distribution) for p in params])
    return np.array(columns).T


def distances(a: FloatArray, b: FloatArray) -> FloatArray:
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))


@dataclass(frozen=True)
class Step:
    """Where a search stands after one more score."""

    spent: float  # epochs trained by all workers
    best: float  # highest DSC of complete trials; nan before the first
    # DSC at full length of the trial whose last score is highest, pruned and running ones included
    incumbent: float
    trials: int  # begun


def replay(
    table: Table,
    config: StudyConfig,
    answer: Answer,
    *,
    images: int,
    workers: int,
    budget: float,
) -> list[Step]:
    """Search until the budget of epochs is spent or the table is used up.

    Args:
        images: that a trial trained on, for the pruner's `min_steps`.
    """
    # Of a storage in memory with a single study, a trial's id is its number.
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, direction="maximize")
    suggester = Suggester(config, ["maximize"])
    pruning = Pruning(study, config, images, lambda number: Path())
    rungs = rung_epochs(table.rungs[-1], config.pruner)
    curves: list[FloatArray] = []  # by trial number, at `rungs`
    last: list[float] = []  # score of each trial
    ends = [
        (0.0, worker, -1, 0) for worker in range(workers)
    ]  # when, of whom, trial, index of its next rung
    spent_idle, best = 0.0, math.nan  # epochs by workers that found the table used up
    steps: list[Step] = []

    def begin() -> int | None:
        suggester.update(study.get_trials(deepcopy=False))
        suggestion = suggester.suggest(len(curves))
        if not isinstance(suggestion, Suggestion) or (found := answer(suggestion.params)) is None:
            return None
        params, curve = found
        trial = create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions=table.distributions,
            system_attrs=suggestion.system_attrs,
        )
        study.add_trial(trial)
        curves.append(curve[[table.rungs.index(rung) for rung in rungs]])
        last.append(-math.inf)
        return len(curves) - 1

    while ends:
        now, worker, number, at = heapq.heappop(ends)
        if number >= 0:
            last[number] = float(curves[number][at])
            storage.set_trial_intermediate_value(number, rungs[at], last[number])
            state = None
            if at == len(rungs) - 1:
                state, best = TrialState.COMPLETE, float(np.fmax(best, last[number]))
            elif pruning.should_prune(number, rungs[at]):
                state = TrialState.PRUNED
            spent = now * (len(ends) + 1) + spent_idle
            if spent > budget:
                break
            steps.append(Step(spent, best, float(curves[int(np.argmax(last))][-1]), len(curves)))
            if state is None:
                heapq.heappush(ends, (now + rungs[at + 1] - rungs[at], worker, number, at + 1))
                continue
            storage.set_trial_state_values(number, state, [last[number]])
        if (following := begin()) is None:
            spent_idle += now
        else:
            heapq.heappush(ends, (now + rungs[0], worker, following, 0))
    return steps


def at(steps: Sequence[Step], spent: float, field: str) -> float:
    """What had been found when so many epochs were spent; nan before anything was."""
    values = [getattr(step, field) for step in steps if step.spent <= spent]
    return values[-1] if values else math.nan


def needed(steps: Sequence[Step], target: float) -> float:
    """Epochs until a complete trial was as good; infinite where none was."""
    return next((step.spent for step in steps if step.best >= target), math.inf)
