"""Build samplers by name, a new one for every trial.

What a sampler suggests therefore follows from the stored trials alone, and a study continues after
a crash as if nothing had happened. Of a sampler nothing is stored but plain numbers among a trial's
system attributes, such as its generation. Nothing is pickled.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import SamplerConfig, StudyConfig
from amlp_ray.errors import ConfigError
from amlp_ray.study.search_space.given_trial import GivenTrial
from amlp_ray.study.search_space.space import SearchSpace
from amlp_ray.study.storage.optuna_internals import FastTPESampler

# Nobody trains more combinations, and enumerating a few thousand takes a second.
MAX_GRID = 10_000
# System attributes of a trial.
GENERATION = "cma:generation"
POINT = "qmc:point"

Distributions = Mapping[str, BaseDistribution]


class InfiniteSpaceError(Exception):
    """The combinations of a space cannot be enumerated; the message names the reason."""


def make_sampler(
    config: SamplerConfig, seed: int, *, space: Distributions, series: int = 0, point: int = 0
) -> BaseSampler:
    """Build the named sampler for one trial.

    Limits of a study count for tpe, gp, nsga2 and nsga3, which read them from the trials. `grid` is
    enumerated by the suggester; what an enqueued trial leaves open is sampled at random.

    Args:
        config: names the sampler.
        seed: of this trial.
        space: parameters that every trial has, for cmaes, or any trial, for qmc.
        series: seed of the study's sequence of even points, the same for all trials.
        point: index in that sequence.

    Raises:
        ValueError: for pbt, which changes trials as they run.
    """
    startup = config.n_startup_trials
    population = config.population_size
    with warnings.catch_warnings():
        # Experimental samplers are chosen on purpose.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match config.name:
            case "tpe":
                return FastTPESampler(
                    seed=seed,
                    n_startup_trials=startup,
                    multivariate=config.multivariate,
                    group=config.group and config.multivariate,
                )
            case "gp":
                return optuna.samplers.GPSampler(
                    seed=seed, n_startup_trials=startup, warn_independent_sampling=False
                )
            case "cmaes":
                return CmaEsSampler(
                    space, population_size=population, n_startup_trials=startup, seed=seed
                )
            case "qmc":
                return EvenPointsSampler(space, series=series, point=point, seed=seed)
            case "nsga2":
                return optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
            case "nsga3":
                return optuna.samplers.NSGAIIISampler(population_size=population, seed=seed)
            case "random" | "grid":
                return RandomSampler(seed)
    raise ValueError(f"{config.name} is no sampler of single trials")


class _RelativeSampler(RandomSampler):
    """A sampler of some parameters together; the others are sampled at random.

    Attributes:
        attributes: system attributes to store with the trial that was sampled last.
    """

    def __init__(self, space: Distributions, seed: int) -> None:
        super().__init__(seed)
        self._space = dict(space)
        self.attributes: dict[str, Any] = {}

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters that are sampled together."""
        return self._space


class CmaEsSampler(_RelativeSampler):
    """CMA-ES on the numeric parameters that every trial has, for one objective.

    Optuna's own pickles its optimizer into the store. This one replays all generations at each
    suggestion. The attribute `cma:generation` of a trial says in which it was sampled. Pruned
    trials count with their last score: a generation has to move away from them. Limits are ignored.
    """

    def __init__(
        self, space: Distributions, *, population_size: int, n_startup_trials: int, seed: int
    ) -> None:
        numeric = {name: space[name] for name in sorted(space) if is_numeric(space[name])}
        super().__init__(numeric, seed)
        self._population_size = population_size
        self._n_startup_trials = n_startup_trials
        self._seed = seed

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: Distributions
    ) -> dict[str, Any]:
        """Sample one point of the current generation."""
        import cmaes

        states = (TrialState.COMPLETE, TrialState.PRUNED)
        trials = study.get_trials(deepcopy=False, states=states)
        scored = [trial for trial in trials if trial.value is not None]
        if len(scored) < self._n_startup_trials or not search_space:
            return {}
        generations = self._generations(study, scored, search_space)
        size = len(search_space)
        optimizer = cmaes.CMA(
            mean=np.full(size, 0.5),
            sigma=1 / 6,
            bounds=np.tile([0.0, 1.0], (size, 1)),
            n_max_resampling=10 * size,
            population_size=self._population_size,
        )
        while len(batch := generations[optimizer.generation]) >= self._population_size:
            optimizer.tell(batch[: self._population_size])
        optimizer.reseed_rng(self._seed)
        self.attributes = {GENERATION: optimizer.generation}
        point = zip(search_space.items(), optimizer.ask(), strict=True)
        return {name: from_unit(position, d) for (name, d), position in point}

    def _generations(
        self, study: Study, trials: Sequence[FrozenTrial], space: Distributions
    ) -> dict[int, list[tuple[np.ndarray, float]]]:
        """Return the points of each generation and their losses."""
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        generations: dict[int, list[tuple[np.ndarray, float]]] = defaultdict(list)
        for trial in trials:
            if GENERATION in trial.system_attrs and space.keys() <= trial.params.keys():
                position = [to_unit(trial.params[name], d) for name, d in space.items()]
                loss = sign * float(trial.value or 0.0)
                generations[trial.system_attrs[GENERATION]].append((np.array(position), loss))
        return generations


class EvenPointsSampler(_RelativeSampler):
    """One point of a scrambled Sobol sequence over all parameters of a space.

    Optuna's own leaves out every parameter that its first trial did not have. Here each has a
    coordinate, which a trial without it ignores. The attribute `qmc:point` of a trial is its index
    in the sequence.
    """

    def __init__(self, space: Distributions, *, series: int, point: int, seed: int) -> None:
        ranges = {name: space[name] for name in sorted(space) if not space[name].single()}
        super().__init__(ranges, seed)
        self._series = series
        self._point = point

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: Distributions
    ) -> dict[str, Any]:
        """Return the point."""
        from scipy.stats.qmc import Sobol

        if not search_space:
            return {}
        sequence = Sobol(len(search_space), scramble=True, rng=self._series)
        if self._point:
            sequence.fast_forward(self._point)
        self.attributes = {POINT: self._point}
        point = zip(search_space.items(), sequence.random(1)[0], strict=True)
        return {name: from_unit(position, d) for (name, d), position in point}


# A range as the interval from 0 to 1


def is_numeric(d: BaseDistribution) -> bool:
    """Return whether a distribution is a range of numbers, and not of a single one."""
    return isinstance(d, FloatDistribution | IntDistribution) and not d.single()


def _ends(d: FloatDistribution | IntDistribution) -> tuple[float, float]:
    """Return the ends of a range on its own scale.

    They lie half a step further out, so that the outermost values are as likely as others.
    """
    half = (d.step or 0) / 2
    low = d.low - half
    high = d.high + half
    return (math.log(low), math.log(high)) if d.log else (low, high)


def to_unit(value: float, d: Any) -> float:
    """Return the position of a number in its range, from 0 to 1."""
    low, high = _ends(d)
    return ((math.log(value) if d.log else value) - low) / (high - low)


def from_unit(position: float, d: Any) -> Any:
    """Return the number or the choice at a position from 0 to 1."""
    if isinstance(d, CategoricalDistribution):
        return d.choices[min(int(position * len(d.choices)), len(d.choices) - 1)]
    low, high = _ends(d)
    value = low + float(position) * (high - low)
    value = math.exp(value) if d.log else value
    if d.step:
        value = d.low + round((value - d.low) / d.step) * d.step
    value = min(max(value, d.low), d.high)
    return int(value) if isinstance(d, IntDistribution) else value


# Finite spaces


def enumerate_params(space: SearchSpace) -> list[dict[str, Any]]:
    """Return every combination of parameters of a space, conditions followed.

    Optuna's BruteForceSampler does the same with costs that grow with the square of their number:
    2 s for 1,000 combinations.

    Raises:
        InfiniteSpaceError: a range has no step, or there are more than 10,000 combinations.
    """
    combinations: list[dict[str, Any]] = []
    # Of each parameter that was asked for: the index of its value, and how many values it has.
    indices: list[int] = []
    counts: list[int] = []

    def next_value(name: str, distribution: BaseDistribution) -> Any:
        values = _values(name, distribution)
        depth = len(counts)
        counts.append(len(values))
        if depth == len(indices):
            indices.append(0)
        return values[indices[depth]]

    while True:
        counts.clear()
        trial = GivenTrial({}, fill=next_value, check=False)
        space.suggest(trial)
        combinations.append(trial.params)
        if len(combinations) > MAX_GRID:
            raise InfiniteSpaceError(f"there are more than {MAX_GRID:,} combinations")
        while indices and indices[-1] + 1 == counts[len(indices) - 1]:
            indices.pop()
        if not indices:
            return combinations
        indices[-1] += 1


def check_sampler(config: StudyConfig) -> None:
    """Check that a study's sampler can work on its space.

    Raises:
        ConfigError: it cannot, or it needs other settings.
    """
    name = config.sampler.name
    if name == "pbt":
        from amlp_ray.study.search.pbt import check_population

        check_population(config)
    if name == "grid":
        try:
            enumerate_params(SearchSpace(config))
        except InfiniteSpaceError as error:
            raise ConfigError(
                f"sampler.name: grid tries every combination, but {error}; give choices or steps, "
                f"or another sampler."
            ) from None
    if name == "cmaes":
        ranges = SearchSpace(config).unconditional.values()
        if not any(is_numeric(distribution) for distribution in ranges):
            raise ConfigError(
                "sampler.name: cmaes needs a range that is searched in every trial, but all are "
                "choices or conditional; tpe takes those."
            )


def _values(name: str, d: Any) -> Sequence[Any]:
    if isinstance(d, CategoricalDistribution):
        return d.choices
    if d.single():
        return [d.low]
    if d.step is None:
        raise InfiniteSpaceError(f"{name} has no step")
    count = int((d.high - d.low) / d.step + 1e-9) + 1
    if count > MAX_GRID:
        raise InfiniteSpaceError(f"{name} alone has {count:,} values")
    return [d.low + i * d.step for i in range(count)]
