"""Population-based training of the masking-ratio schedule.

Members train side by side, and poor ones continue from the checkpoints of good ones. What is
learned is the schedule itself. A trial of Optuna is one step of one member: it trains for
`sampler.interval` epochs from the checkpoint of the trial named by its attribute `parent`.
Generations are synchronous. The next one begins when all members have ended, so it follows from
their scores and not from which member was faster. Everything is read from the stored trials, and
every random number follows from the study's seed.

After Jaderberg et al. 2017 (arXiv 1711.09846), with one change. There, only a member that was
replaced changes its values. A ratio that is kept cannot rise, and a schedule consists of its
changes. So the ratio of every member takes a random move in every step, and the schedules whose
moves were good are the ones that are copied. All other values change as published, on replacement.

Members share one seed, so they differ in their values alone: what wins is a schedule, not a lucky
initialization. If only the ratio is searched, one run of the learned schedule with that seed is the
whole lineage again, to the bit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from amlp_ray.config import Choice, Parameter, Range, StudyConfig
from amlp_ray.config.base import ConfigIssue
from amlp_ray.config.search_space import Fixed, Scalar
from amlp_ray.config.study import COST_OBJECTIVES
from amlp_ray.errors import ConfigError
from amlp_ray.study.search_space.given_trial import GivenTrial
from amlp_ray.study.search_space.space import SearchSpace
from amlp_ray.study.search_space.validate import (
    PBT_RATIO,
    check_space,
    raise_if_any,
    without_pbt_ratio,
)
from amlp_ray.study.seeds import derived_seed
from amlp_ray.study.storage.trial_record import TrialAttributes, TrialRecord
from amlp_ray.training.checkpoint.restore import HEAD_WEIGHTS, PERTURBABLE


@dataclass(frozen=True)
class PbtStep:
    """What one trial does.

    Args:
        generation: from 0.
        member: of the population, from 0.
        parent: number of the trial whose checkpoint it continues from; None begins from the seed.
        params: as Optuna stores them.
        distributions: what each parameter was sampled from.
        values: settings by dotted name, for `StudyConfig.trial`.
        seed: of the training, the same for all members.
        until: epoch after which it ends.
    """

    generation: int
    member: int
    parent: int | None
    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    values: dict[str, Any]
    seed: int
    until: int

    @property
    def attributes(self) -> TrialAttributes:
        """Return what is stored with the trial, from which the study continues."""
        return {"generation": self.generation, "member": self.member, "parent": self.parent}


class Population:
    """Decides steps from stored trials; those that are no steps are ignored."""

    def __init__(self, config: StudyConfig) -> None:
        """Set up the population of a study that `check_population` accepts."""
        self.config = config
        self.sampler = config.sampler
        ratio = config.space[PBT_RATIO]  # type: ignore[index]  # declared: see `check_population`
        assert isinstance(ratio, Range)
        self._search_space = SearchSpace(without_pbt_ratio(config))
        self._ranges = {PBT_RATIO: ratio, **self._search_space.parameters}
        self._ratio = FloatDistribution(ratio.low, ratio.high, log=ratio.log, step=ratio.step)
        self.epochs = config.trial({}, seed=0).epochs
        self.generations = math.ceil(self.epochs / self.sampler.interval)

    def next_step(self, trials: Sequence[FrozenTrial]) -> PbtStep | Literal["wait"] | None:
        """Return the next step to begin.

        A trial that runs or waits has begun. If a member has several trials of a generation, the
        last one counts.

        Args:
            trials: of the search.

        Returns:
            `wait` until the generation has ended. None if no step is left, or if a whole
            generation failed, because there is nothing to continue from.
        """
        begun = _by_member(trials)
        members = range(self.sampler.population_size)
        for generation in range(self.generations):
            missing = [member for member in members if (generation, member) not in begun]
            if not missing:
                continue
            previous = []
            if generation:
                previous = [begun[generation - 1, member] for member in members]
            if not all(trial.is_finished for trial in previous):
                return "wait"
            if generation and all(trial.value is None for trial in previous):
                return None
            return self._begin(trials, generation, missing[0], previous)
        return None

    def step_of(self, trials: Sequence[FrozenTrial], number: int) -> PbtStep:
        """Return what a trial does, from its stored values, to resume, repeat or confirm it.

        Run without the parent, its values give the whole lineage at once: the learned schedule,
        and the last values of other parameters.
        """
        trial = _line(trials, number)[-1]
        return self._step(trials, trial.generation, trial.member, trial.parent, trial.params)

    def last_epoch(self, generation: int) -> int:
        """Return the epoch after which the steps of a generation end."""
        return min(self.epochs, (generation + 1) * self.sampler.interval)

    def _begin(
        self,
        trials: Sequence[FrozenTrial],
        generation: int,
        member: int,
        previous: Sequence[TrialRecord],
    ) -> PbtStep:
        rng = random.Random(derived_seed(self.config.seed, "pbt", generation, member))
        if generation == 0:
            return self._step(trials, 0, member, None, self._first_params(member, rng))
        best, replaced = self._rank(previous)
        own_step = previous[member]
        is_replaced = own_step.number in replaced
        parent = rng.choice(best) if is_replaced else own_step
        params = dict(parent.params)
        for name, parameter in self._ranges.items():
            if name == PBT_RATIO or is_replaced:
                params[name] = _perturb(parameter, params[name], self.sampler.perturb, rng)
        return self._step(trials, generation, member, parent.number, params)

    def _rank(self, ended: Sequence[TrialRecord]) -> tuple[list[TrialRecord], set[int]]:
        """Return the members to be copied, best first, and the numbers of those to be replaced.

        As many are replaced as are copied, failed ones first.
        """
        scored = [trial for trial in ended if trial.value is not None]
        ranked = sorted(scored, key=lambda trial: (-(trial.value or 0.0), trial.member))
        # 0.29 * 100 is 28.999...
        n_copied = max(1, math.floor(self.sampler.exploit * len(ended) + 1e-9))
        best = ranked[:n_copied]
        others = ranked[n_copied:]
        failed = {trial.number for trial in ended} - {trial.number for trial in ranked}
        n_poor = max(0, n_copied - len(failed))
        poor = others[max(0, len(others) - n_poor) :]
        return best, failed | {trial.number for trial in poor}

    def _first_params(self, member: int, rng: random.Random) -> dict[str, Any]:
        """Sample the first values of a member.

        First ratios are spread over their range, one member in each of as many equal parts.
        """
        defaults = {name: parameter.default for name, parameter in self._ranges.items()}
        if member == 0 and all(value is not None for value in defaults.values()):
            return defaults
        positions = {name: rng.random() for name in self._ranges}
        positions[PBT_RATIO] = (member + positions[PBT_RATIO]) / self.sampler.population_size
        return {name: _value_at(p, positions[name]) for name, p in self._ranges.items()}

    def _step(
        self,
        trials: Sequence[FrozenTrial],
        generation: int,
        member: int,
        parent: int | None,
        params: Mapping[str, Any],
    ) -> PbtStep:
        levels = [ancestor.params[PBT_RATIO] for ancestor in _line(trials, parent)]
        levels.append(params[PBT_RATIO])
        # A step covers the shares of training between its parent's end and its own. Later points
        # change nothing before, so steps one after another equal one run of the last schedule.
        points = [[0.0, levels[0]]]
        for i, level in enumerate(levels):
            points.append([self.last_epoch(i) / self.epochs, level])
        others = {name: value for name, value in params.items() if name != PBT_RATIO}
        trial = GivenTrial(others, check=False)
        suggestion = self._search_space.suggest(trial)
        if suggestion.invalid:
            raise ConfigError(f"space: {suggestion.invalid[0]}.")
        return PbtStep(
            generation=generation,
            member=member,
            parent=parent,
            params=dict(params),
            distributions={PBT_RATIO: self._ratio, **trial.distributions},
            values={**suggestion.values, "ratio.shape": "points", PBT_RATIO: points},
            seed=derived_seed(self.config.seed, "pbt"),
            until=self.last_epoch(generation),
        )


def lineage(trials: Sequence[FrozenTrial], number: int) -> list[int]:
    """Return the numbers of the trials that a trial went through, itself last."""
    return [trial.number for trial in _line(trials, number)]


def learned_schedule(
    config: StudyConfig, trials: Sequence[FrozenTrial], number: int
) -> tuple[tuple[float, float], ...]:
    """Return the schedule that a trial has run as points (share of training, masking ratio)."""
    points = Population(config).step_of(trials, number).values[PBT_RATIO]
    return tuple((share, level) for share, level in points)


def leader(trials: Sequence[FrozenTrial]) -> TrialRecord | None:
    """Return the best trial of the latest generation that has a score."""
    scored = [trial for trial in members(trials) if trial.value is not None]
    return max(scored, key=lambda t: (t.generation, t.value, -t.member), default=None)


def members(trials: Sequence[FrozenTrial]) -> list[TrialRecord]:
    """Return the trials that are steps of a population."""
    records = [TrialRecord.from_frozen(trial) for trial in trials]
    return [record for record in records if record.is_pbt_step]


def check_population(config: StudyConfig) -> None:
    """Check a study of population-based training, its space included.

    Raises:
        ConfigError: with a sentence for each mistake.
    """
    if isinstance(config.space, str):
        raise ConfigError(
            "space: sampler pbt needs a declared space, not a function; write its ranges out.",
            keys=["space"],
        )
    raise_if_any([*_space_issues(config.space), *_study_issues(config)])
    check_space(without_pbt_ratio(config))


def _space_issues(space: Mapping[str, Parameter]) -> Iterator[ConfigIssue]:
    ratio = space.get(PBT_RATIO)
    if not isinstance(ratio, Range) or not 0 < ratio.low < ratio.high < 1:
        problem = "is missing" if ratio is None else "is no range within 0-1"
        yield ConfigIssue(
            f"space.{PBT_RATIO}",
            f"space: {PBT_RATIO}, the masking ratio that a step of pbt moves to, {problem}; "
            f"give low and high, such as {{low: 0.2, high: 0.8}}.",
        )
    for name, parameter in space.items():
        if isinstance(parameter, Fixed):
            continue
        if name != PBT_RATIO and name not in PERTURBABLE:
            text = (
                f"sampler pbt cannot change {name} in a running model; fix it in pretrain, or "
                f"search {PBT_RATIO} and any of {', '.join(PERTURBABLE)}."
            )
        elif parameter.when:
            text = f"{name} has a condition, but with sampler pbt every step needs it; drop `when`."
        elif name in HEAD_WEIGHTS and _lowest(parameter) <= 0:
            text = f"{name} reaches 0 with sampler pbt, where the model loses a part; stay above 0."
        else:
            continue
        yield ConfigIssue(f"space.{name}", f"space: {text}")


def _study_issues(config: StudyConfig) -> Iterator[ConfigIssue]:
    sampler = config.sampler
    pretrain = config.trial({}, seed=0)
    if pretrain.objective != "reconstruction":
        yield ConfigIssue(
            "pretrain",
            f"pretrain.objective {pretrain.objective} masks nothing that sampler pbt could "
            f"schedule.",
        )
    if sampler.interval >= pretrain.epochs:
        yield ConfigIssue(
            "sampler.interval",
            f"sampler.interval {sampler.interval} leaves one generation of the {pretrain.epochs} "
            f"epochs; lower it.",
        )
    if config.pruner.name != "none":
        yield ConfigIssue(
            "pruner.name",
            f"pruner.name {config.pruner.name} does nothing for sampler pbt, whose poor members "
            f"continue from good ones; set it to none.",
        )
    for name in ("require", "limits"):
        if getattr(config, name):
            text = f"{name} is not kept by sampler pbt; drop it, and narrow the ranges instead."
            yield ConfigIssue(name, text)
    objective = next(iter(config.objectives))
    if objective in COST_OBJECTIVES:
        yield ConfigIssue(
            "objectives",
            f"objectives: sampler pbt compares members by a score, not by {objective}; name dsc.",
        )
    generations = math.ceil(pretrain.epochs / sampler.interval)
    n_trials = sampler.population_size * generations
    if config.budget.trials != n_trials:
        yield ConfigIssue(
            "budget.trials",
            f"budget.trials is {config.budget.trials}, but sampler pbt runs "
            f"{sampler.population_size} members x {generations} generations of "
            f"{sampler.interval} epochs; set it to {n_trials}.",
        )


def _by_member(trials: Sequence[FrozenTrial]) -> dict[tuple[int, int], TrialRecord]:
    steps = sorted(members(trials), key=lambda trial: trial.number)
    return {(trial.generation, trial.member): trial for trial in steps}


def _line(trials: Sequence[FrozenTrial], number: int | None) -> list[TrialRecord]:
    """Return a trial after those that it went through; nothing for None."""
    records = {trial.number: TrialRecord.from_frozen(trial) for trial in trials}
    line: list[TrialRecord] = []
    while number is not None:
        line.insert(0, records[number])
        number = records[number].parent
    return line


# The position of a value in its range is from 0 to 1, on a logarithmic scale if it is declared.
# The values of a grid and choices have equal parts.


def _grid(parameter: Range | Choice) -> list[Any]:
    if isinstance(parameter, Choice):
        return parameter.choices
    if parameter.step is None:
        return []
    count = math.floor((parameter.high - parameter.low) / parameter.step + 1e-9) + 1
    return [parameter.low + i * parameter.step for i in range(count)]


def _value_at(parameter: Range | Choice, position: float) -> Scalar:
    if grid := _grid(parameter):
        value: Scalar = grid[min(int(position * len(grid)), len(grid) - 1)]
        return value
    assert isinstance(parameter, Range)
    low = parameter.low
    high = parameter.high
    value = low * (high / low) ** position if parameter.log else low + position * (high - low)
    return min(max(value, low), high)


def _position_of(parameter: Range | Choice, value: Any) -> float:
    if grid := _grid(parameter):
        nearest = min(range(len(grid)), key=lambda i: abs(grid[i] - value))
        return (nearest + 0.5) / len(grid)
    assert isinstance(parameter, Range)
    low = parameter.low
    high = parameter.high
    if parameter.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def _perturb(parameter: Range | Choice, value: Any, distance: float, rng: random.Random) -> Scalar:
    """Move a value at random by at most `distance`, a share of its range.

    On a grid both neighbors can always be reached.
    """
    grid = _grid(parameter)
    reach = max(distance, 1.5 / len(grid)) if grid else distance
    position = _position_of(parameter, value) + rng.uniform(-reach, reach)
    return _value_at(parameter, min(max(position, 0.0), 1.0))


def _lowest(parameter: Parameter) -> float:
    if isinstance(parameter, Range):
        return parameter.low
    choices = parameter.choices if isinstance(parameter, Choice) else []
    return min((value for value in choices if isinstance(value, int | float)), default=math.inf)
