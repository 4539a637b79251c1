"""Population-based training of the masking-ratio schedule: members train side by side, the poor go on from the good.

What is learned is the schedule itself. A trial of Optuna is one segment of one member: `sampler.interval` epochs that
go on from the checkpoint of the trial named by its user attribute `parent`. Generations are synchronous: the next one
begins when all members have ended, so what it does follows from their scores and from nothing that depends on which
member was faster. Everything is read from the stored trials, and every draw from the study's seed.

After Jaderberg et al. 2017 (arXiv 1711.09846), with one change. There, only a member that was replaced changes its
values; a member that does well keeps them. A ratio that is kept cannot rise, and a schedule consists of its changes: so
the ratio of every member moves on in every segment, by a random step from the level it has reached, and the schedules
whose steps were good are the ones that are copied. All other values change as published, on replacement only.

Members share one seed, so they differ in their values alone: what wins is a schedule, not a lucky start. And where only
the ratio is searched, one run of the learnt schedule with that seed is the whole lineage again, to the bit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from optuna.distributions import BaseDistribution
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from amlp_ray.config import Choice, Parameter, Range, StudyConfig
from amlp_ray.config.base import ConfigIssue
from amlp_ray.config.search_space import Fixed, Scalar
from amlp_ray.config.study import COSTS
from amlp_ray.errors import ConfigError
from amlp_ray.study.search_space.validate import PBT_RATIO, check_space, searched, suggest
from amlp_ray.study.seeds import derived_seed
from amlp_ray.training.checkpoint.restore import HEADED, PERTURBABLE


class Wait(Enum):
    """A generation is not over, so the next cannot begin."""

    WAIT = "wait"


WAIT: Final = Wait.WAIT


@dataclass(frozen=True)
class PbtStep:
    """What one trial does: from the checkpoint of trial `parent` (none: from the seed) up to epoch `until`.

    `params` and `distributions` are what Optuna stores, `values` are dotted settings for `StudyConfig.trial`.
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
    def user_attrs(self) -> dict[str, Any]:
        """What the trial is stored with, and all that is needed to go on with the study."""
        return {"generation": self.generation, "member": self.member, "parent": self.parent}


class Population:
    """Decides segments from stored trials. Trials without the attributes of a segment are no members."""

    def __init__(self, config: StudyConfig) -> None:
        self.config, self.sampler = config, config.sampler
        ratio = config.space[PBT_RATIO]  # type: ignore[index]  # declared: see `check_population`
        assert isinstance(ratio, Range)
        self.ratio = ratio
        self.space: dict[str, Range | Choice] = {
            PBT_RATIO: ratio,
            **searched(without_ratio(config)),
        }
        self.epochs = config.trial({}, seed=0).epochs
        self.generations = math.ceil(self.epochs / self.sampler.interval)

    def next(self, trials: Sequence[FrozenTrial]) -> PbtStep | Wait | None:
        """Return the next segment to begin, WAIT until the generation has ended, or None where none is left to begin.

        None also where a whole generation failed, for there is nothing to go on from. A trial that runs or waits has
        begun; where a member has several trials of a generation, the last counts.
        """
        begun = _by_place(trials)
        for generation in range(self.generations):
            missing = [
                m for m in range(self.sampler.population_size) if (generation, m) not in begun
            ]
            if not missing:
                continue
            before = (
                [begun[generation - 1, m] for m in range(self.sampler.population_size)]
                if generation
                else []
            )
            if not all(trial.state.is_finished() for trial in before):
                return WAIT
            if generation and all(score_of(trial) is None for trial in before):
                return None
            return self._begin(trials, generation, missing[0], before)
        return None

    def segment(self, trials: Sequence[FrozenTrial], number: int) -> PbtStep:
        """Return what trial `number` does, from its stored values: to take it over, to repeat it, or to confirm it.

        Run without the parent, its values give the whole lineage in one go: the learnt schedule, and of other
        parameters the last values.
        """
        trial = _numbered(trials)[number]
        attrs = trial.user_attrs
        return self._segment(
            trials, attrs["generation"], attrs["member"], attrs["parent"], trial.params
        )

    def until(self, generation: int) -> int:
        """Epoch after which the segments of a generation end."""
        return min(self.epochs, (generation + 1) * self.sampler.interval)

    def _begin(
        self,
        trials: Sequence[FrozenTrial],
        generation: int,
        member: int,
        before: Sequence[FrozenTrial],
    ) -> PbtStep:
        draw = random.Random(derived_seed(self.config.seed, "pbt", generation, member))
        if generation == 0:
            return self._segment(trials, 0, member, None, self._first_values(member, draw))
        top, replaced = self._judged(before)
        own = before[member]
        parent = draw.choice(top) if own.number in replaced else own
        moved = {
            name: _moved(parameter, parent.params[name], self.sampler.perturb, draw)
            for name, parameter in self.space.items()
            if name == PBT_RATIO or own.number in replaced
        }
        return self._segment(trials, generation, member, parent.number, {**parent.params, **moved})

    def _judged(self, ended: Sequence[FrozenTrial]) -> tuple[list[FrozenTrial], set[int]]:
        """Members to be copied, best first, and numbers of those replaced: failed ones first, as many as are copied."""
        scored = [trial for trial in ended if score_of(trial) is not None]
        ranked = sorted(
            scored, key=lambda trial: (-(score_of(trial) or 0.0), trial.user_attrs["member"])
        )
        share = max(
            1, math.floor(self.sampler.exploit * len(ended) + 1e-9)
        )  # 1e-9: 0.29 * 100 is 28.999...
        top, rest = ranked[:share], ranked[share:]
        failed = {trial.number for trial in ended} - {trial.number for trial in ranked}
        poor = rest[max(0, len(rest) - max(0, share - len(failed))) :]
        return top, failed | {trial.number for trial in poor}

    def _first_values(self, member: int, draw: random.Random) -> dict[str, Any]:
        """First ratios are spread over their range, one member in each of as many equal parts; others are drawn."""
        defaults = {name: parameter.default for name, parameter in self.space.items()}
        if member == 0 and all(value is not None for value in defaults.values()):
            return defaults
        places = {name: draw.random() for name in self.space}
        places[PBT_RATIO] = (member + places[PBT_RATIO]) / self.sampler.population_size
        return {name: _value_at(parameter, places[name]) for name, parameter in self.space.items()}

    def _segment(
        self,
        trials: Sequence[FrozenTrial],
        generation: int,
        member: int,
        parent: int | None,
        params: Mapping[str, Any],
    ) -> PbtStep:
        numbered = _numbered(trials)
        before = [] if parent is None else lineage(trials, parent)
        levels = [*(numbered[number].params[PBT_RATIO] for number in before), params[PBT_RATIO]]
        # A segment covers the shares of training between the ends of its parent's and its own. Later points change
        # nothing before their own segment, so segments one after another equal one run of the last schedule.
        ends = [[self.until(i) / self.epochs, level] for i, level in enumerate(levels)]
        others = FixedTrial({name: value for name, value in params.items() if name != PBT_RATIO})
        values = suggest(others, without_ratio(self.config))  # type: ignore[arg-type]  # asks the same questions
        level = FixedTrial({PBT_RATIO: params[PBT_RATIO]})
        level.suggest_float(
            PBT_RATIO, self.ratio.low, self.ratio.high, log=self.ratio.log, step=self.ratio.step
        )
        return PbtStep(
            generation=generation,
            member=member,
            parent=parent,
            params=dict(params),
            distributions={**level.distributions, **others.distributions},
            values={**values, "ratio.shape": "points", PBT_RATIO: [[0.0, levels[0]], *ends]},
            seed=derived_seed(self.config.seed, "pbt"),
            until=self.until(generation),
        )


def lineage(trials: Sequence[FrozenTrial], number: int) -> list[int]:
    """Numbers of the trials that trial `number` went through, from the first segment to itself."""
    numbered, line = _numbered(trials), [number]
    while (parent := numbered[line[0]].user_attrs["parent"]) is not None:
        line.insert(0, parent)
    return line


def learnt_schedule(
    config: StudyConfig, trials: Sequence[FrozenTrial], number: int
) -> tuple[tuple[float, float], ...]:
    """The schedule that trial `number` has run: (share of training, masking ratio), for `ratio.points`."""
    return tuple(
        (share, level)
        for share, level in Population(config).segment(trials, number).values[PBT_RATIO]
    )


def leader(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The best of the latest generation that has a score: the best of all where the population has ended."""
    scored = [trial for trial in members(trials) if score_of(trial) is not None]
    return max(
        scored,
        key=lambda t: (t.user_attrs["generation"], score_of(t), -t.user_attrs["member"]),
        default=None,
    )


def members(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that are segments of a population; enqueued and imported ones are not."""
    return [trial for trial in trials if "generation" in trial.user_attrs]


def score_of(trial: FrozenTrial) -> float | None:
    """Score at the end of a segment; None where it failed, still runs, or ended without one."""
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
        return None
    value = (
        trial.value
        if trial.value is not None
        else trial.intermediate_values.get(trial.last_step or 0)
    )
    return value if value is not None and math.isfinite(value) else None


def without_ratio(config: StudyConfig) -> StudyConfig:
    """The study without the schedule, whose space is one of settings like any other."""
    space = config.space if isinstance(config.space, dict) else {}
    return config.model_copy(
        update={"space": {name: p for name, p in space.items() if name != PBT_RATIO}}
    )


def check_population(config: StudyConfig) -> None:
    """Check a study of population-based training, its space included.

    Raises:
        ConfigError: with a sentence for each fault.
    """
    if isinstance(config.space, str):
        raise ConfigError(
            "space: sampler pbt needs a declared space, not a function; write its ranges out.",
            keys=["space"],
        )
    faults = [*_faults_of_space(config.space), *_faults_of_study(config)]
    if faults:
        raise ConfigError(*[fault.text for fault in faults], keys=[fault.key for fault in faults])
    check_space(without_ratio(config))


def _faults_of_space(space: Mapping[str, Parameter]) -> Iterator[ConfigIssue]:
    ratio = space.get(PBT_RATIO)
    if not isinstance(ratio, Range) or not 0 < ratio.low < ratio.high < 1:
        found = "is missing" if ratio is None else "is no range within 0-1"
        yield ConfigIssue(
            f"space.{PBT_RATIO}",
            f"space: {PBT_RATIO}, the masking ratio that a segment of pbt moves to, {found}; give low and high, "
            f"such as {{low: 0.2, high: 0.8}}.",
        )
    for name, parameter in space.items():
        if isinstance(parameter, Fixed):
            continue
        if name != PBT_RATIO and name not in PERTURBABLE:
            told = (
                f"sampler pbt cannot change {name} in a running model; fix it in pretrain, or search {PBT_RATIO} "
                f"and any of {', '.join(PERTURBABLE)}."
            )
        elif parameter.when:
            told = (
                f"{name} has a condition, but with sampler pbt every segment needs it; drop `when`."
            )
        elif name in HEADED and _lowest(parameter) <= 0:
            told = f"{name} reaches 0 with sampler pbt, where the model loses a part; stay above 0."
        else:
            continue
        yield ConfigIssue(f"space.{name}", f"space: {told}")


def _faults_of_study(config: StudyConfig) -> Iterator[ConfigIssue]:
    sampler, pretrain = config.sampler, config.trial({}, seed=0)
    if pretrain.objective != "reconstruction":
        yield ConfigIssue(
            "pretrain",
            f"pretrain.objective {pretrain.objective} masks nothing that sampler pbt could schedule.",
        )
    if sampler.interval >= pretrain.epochs:
        yield ConfigIssue(
            "sampler.interval",
            f"sampler.interval {sampler.interval} leaves one generation of the {pretrain.epochs} epochs; lower it.",
        )
    if config.pruner.name != "none":
        yield ConfigIssue(
            "pruner.name",
            f"pruner.name {config.pruner.name} does nothing for sampler pbt, whose poor members go on from "
            f"good ones; set it to none.",
        )
    for name in ("require", "limits"):
        if getattr(config, name):
            yield ConfigIssue(
                name, f"{name} is not kept by sampler pbt; drop it, and narrow the ranges instead."
            )
    objective = next(iter(config.objectives))
    if objective in COSTS:
        yield ConfigIssue(
            "objectives",
            f"objectives: sampler pbt compares members by a score, not by {objective}; name dsc.",
        )
    generations = math.ceil(pretrain.epochs / sampler.interval)
    needed = sampler.population_size * generations
    if config.budget.trials != needed:
        yield ConfigIssue(
            "budget.trials",
            f"budget.trials is {config.budget.trials}, but sampler pbt runs {sampler.population_size} members x "
            f"{generations} generations of {sampler.interval} epochs; set it to {needed}.",
        )


def _by_place(trials: Sequence[FrozenTrial]) -> dict[tuple[int, int], FrozenTrial]:
    own = sorted(members(trials), key=lambda trial: trial.number)
    return {(trial.user_attrs["generation"], trial.user_attrs["member"]): trial for trial in own}


def _numbered(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
    return {trial.number: trial for trial in trials}


# A value's place in its range is 0 to 1, on a log scale where it is declared; grid values and choices have equal parts.


def _grid(parameter: Range | Choice) -> list[Any]:
    if isinstance(parameter, Choice):
        return parameter.choices
    if parameter.step is None:
        return []
    count = math.floor((parameter.high - parameter.low) / parameter.step + 1e-9) + 1
    return [parameter.low + i * parameter.step for i in range(count)]


def _value_at(parameter: Range | Choice, place: float) -> Scalar:
    if grid := _grid(parameter):
        value: Scalar = grid[min(int(place * len(grid)), len(grid) - 1)]
        return value
    assert isinstance(parameter, Range)
    low, high = parameter.low, parameter.high
    value = low * (high / low) ** place if parameter.log else low + place * (high - low)
    return min(max(value, low), high)


def _place_of(parameter: Range | Choice, value: Any) -> float:
    if grid := _grid(parameter):
        return (min(range(len(grid)), key=lambda i: abs(grid[i] - value)) + 0.5) / len(grid)
    assert isinstance(parameter, Range)
    low, high = parameter.low, parameter.high
    return (
        math.log(value / low) / math.log(high / low)
        if parameter.log
        else (value - low) / (high - low)
    )


def _moved(parameter: Range | Choice, value: Any, perturb: float, draw: random.Random) -> Scalar:
    """Move a value by at most `perturb` of its range; on a grid so far at least that both neighbours can be met."""
    grid = _grid(parameter)
    reach = max(perturb, 1.5 / len(grid)) if grid else perturb
    place = _place_of(parameter, value) + draw.uniform(-reach, reach)
    return _value_at(parameter, min(max(place, 0.0), 1.0))


def _lowest(parameter: Parameter) -> float:
    values = (
        parameter.choices
        if isinstance(parameter, Choice)
        else [getattr(parameter, "low", math.inf)]
    )
    return min((value for value in values if isinstance(value, int | float)), default=math.inf)
