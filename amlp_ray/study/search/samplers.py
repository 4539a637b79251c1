"""Samplers by name. Each is built anew for every trial, so that what it suggests follows from the trials told alone.

That is what lets a study go on after a crash as if nothing had been: nothing of a sampler is stored but plain numbers
among a trial's system attributes (its generation, its point of a sequence), and no pickle.
"""

from __future__ import annotations

import heapq
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter, itemgetter
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
from optuna.samplers._tpe.sampler import _split_trials, default_gamma, default_gamma_multiobjective
from optuna.search_space.group_decomposed import _GroupDecomposedSearchSpace
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import SamplerConfig, StudyConfig
from amlp_ray.errors import ConfigError
from amlp_ray.study.search.in_memory_study import InMemoryStudy
from amlp_ray.study.search_space.space import space_of

LARGEST_GRID = (
    10_000  # combinations; nobody trains more, and looking for them takes a second per few thousand
)
GENERATION, POINT = "cma:generation", "qmc:point"  # system attributes of a trial

INTERNAL, CONSTRAINTS = (
    attrgetter("internal"),
    attrgetter("constraints"),
)  # asked of thousands of trials at a time

Space = Mapping[str, BaseDistribution]


class UnlimitedError(Exception):
    """A space cannot be walked to its end; the message names the parameter that is in the way."""


def make_sampler(
    config: SamplerConfig, seed: int, *, space: Space, series: int = 0, point: int = 0
) -> BaseSampler:
    """Build the named sampler for one trial.

    Limits of a study count for tpe, gp, nsga2 and nsga3, which read them from the trials; the others draw without.
    `grid` is walked by the proposer: what an enqueued trial leaves open is drawn at random.

    Args:
        seed: of this trial.
        space: parameters that every trial has, for cmaes, or any trial, for qmc.
        series: seed of the study's sequence of even points, the same for all its trials; for qmc.
        point: place in that sequence.

    Raises:
        ValueError: for pbt, which is no sampler but changes trials as they run.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # chosen knowingly
        match config.name:
            case "tpe":
                return Tpe(config, seed)
            case "gp":
                return optuna.samplers.GPSampler(
                    seed=seed,
                    n_startup_trials=config.n_startup_trials,
                    warn_independent_sampling=False,
                )
            case "cmaes":
                return CmaEs(
                    space,
                    population_size=config.population_size,
                    n_startup_trials=config.n_startup_trials,
                    seed=seed,
                )
            case "qmc":
                return EvenPoints(space, series=series, point=point, seed=seed)
            case "nsga2":
                return optuna.samplers.NSGAIISampler(
                    population_size=config.population_size, seed=seed
                )
            case "nsga3":
                return optuna.samplers.NSGAIIISampler(
                    population_size=config.population_size, seed=seed
                )
            case "random" | "grid":
                return RandomSampler(seed)
    raise ValueError(f"{config.name} is no sampler of single trials")


class Tpe(optuna.samplers.TPESampler):
    """Optuna's multivariate TPE with running trials as poor ones, so that parallel ones spread out.

    It suggests what Optuna's own does, to the digit, in half the time at 10,000 trials: these are sorted into
    good and poor once per suggestion instead of once per group of parameters, and each is converted once for all.
    Mirrored trials only (see `Known`).
    """

    def __init__(self, config: SamplerConfig, seed: int) -> None:
        super().__init__(
            seed=seed,
            n_startup_trials=config.n_startup_trials,
            multivariate=config.multivariate,
            group=config.group and config.multivariate,
            constant_liar=True,
        )
        self._split: tuple[list[FrozenTrial], list[FrozenTrial]] | None = None
        if self._group:
            self._group_decomposed_search_space = _Groups(True)

    def _sample(self, study: Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        if self._split is None:
            states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
            trials = [
                t
                for t in study.get_trials(deepcopy=False, states=states)
                if t.number != trial.number
            ]
            good = default_gamma_multiobjective if len(study.directions) > 1 else default_gamma
            self._split = _good_and_poor(
                study, trials, good(sum(t.state is not TrialState.RUNNING for t in trials))
            )
        below, above = (
            self._build_parzen_estimator(study, search_space, trials, handle_below=i == 0)
            for i, trials in enumerate(self._split)
        )
        samples = below.sample(self._rng.rng, self._n_ei_candidates)
        best = self._compare(samples, self._compute_acquisition_func(samples, below, above))
        return {name: d.to_external_repr(best[name]) for name, d in search_space.items()}

    def _get_internal_repr(
        self, trials: Any, search_space: Any, study: Study
    ) -> dict[str, np.ndarray]:
        names = list(search_space)
        of, first, needed = itemgetter(*names), names[0], search_space.keys()
        rows = [
            of(known)
            for known in map(INTERNAL, trials)
            if first in known and needed <= known.keys()
        ]
        columns = np.array(rows, dtype=float).reshape(len(rows), len(names))
        return {name: columns[:, i] for i, name in enumerate(names)}


def _good_and_poor(
    study: Study, trials: list[FrozenTrial], good: int
) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
    """Trials in Optuna's own two parts, without its sorting of pruned ones where enough complete ones are good."""
    complete = [t for t in trials if t.state is TrialState.COMPLETE]
    if len(study.directions) > 1 or len(complete) < good or any(map(CONSTRAINTS, trials)):
        return _split_trials(study, trials, good)
    sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
    best = {id(t) for t in heapq.nsmallest(good, complete, key=lambda t: sign * t.values[0])}
    return [t for t in complete if id(t) in best], [t for t in trials if id(t) not in best]


class _Groups(_GroupDecomposedSearchSpace):
    """Parameters that always come together; a set of names that was seen before divides them no further."""

    def calculate(self, study: Study, use_cache: bool = False) -> Any:
        seen: set[tuple[str, ...]] = set()
        for trial in study._get_trials(False, (TrialState.COMPLETE, TrialState.PRUNED), use_cache):
            names = tuple(trial.distributions)
            if names not in seen:
                seen.add(names)
                self._search_space.add_distributions(trial.distributions)
        return self._search_space


class CmaEs(BaseSampler):
    """CMA-ES on the numeric parameters that every trial has; what else a space holds is drawn at random.

    Optuna's own pickles its optimiser into the store. Here it is brought up from nothing at each suggestion, generation
    after generation, from what trials were told: `cma:generation` of a trial says which it was drawn in. Trials that
    were pruned count with their last score: they are the poor ones that a generation is to move away from.
    Takes one objective. Knows no limits.
    """

    def __init__(
        self, space: Space, *, population_size: int, n_startup_trials: int, seed: int
    ) -> None:
        self._space = {n: d for n, d in sorted(space.items()) if _is_numeric(d)}
        self._population_size, self._n_startup_trials, self._seed = (
            population_size,
            n_startup_trials,
            seed,
        )
        self._rest = RandomSampler(seed)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: Any
    ) -> dict[str, Any]:
        import cmaes

        told = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        told = [t for t in told if t.value is not None]
        if len(told) < self._n_startup_trials or not self._space:
            return {}
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        generations: dict[int, list[tuple[np.ndarray, float]]] = defaultdict(list)
        for t in told:
            if GENERATION in t.system_attrs and self._space.keys() <= t.params.keys():
                x = np.array([to_unit(t.params[name], d) for name, d in self._space.items()])
                generations[t.system_attrs[GENERATION]].append((x, sign * float(t.value or 0.0)))
        size = len(self._space)
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
        study._storage.set_trial_system_attr(trial._trial_id, GENERATION, optimizer.generation)
        return {
            name: from_unit(u, d)
            for (name, d), u in zip(self._space.items(), optimizer.ask(), strict=True)
        }

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        return self._rest.sample_independent(study, trial, param_name, param_distribution)


class EvenPoints(BaseSampler):
    """One point of a scrambled Sobol sequence over all parameters of a space.

    Optuna's own leaves out every parameter that its first trial did not have. Here each has its coordinate, which a
    trial without it ignores; `qmc:point` of a trial is its place in the sequence.
    """

    def __init__(self, space: Space, *, series: int, point: int, seed: int) -> None:
        self._space = {n: d for n, d in sorted(space.items()) if not d.single()}
        self._series, self._point = series, point
        self._rest = RandomSampler(seed)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: Any
    ) -> dict[str, Any]:
        from scipy.stats.qmc import Sobol

        if not self._space:
            return {}
        sequence = Sobol(len(self._space), scramble=True, rng=self._series)
        if self._point:
            sequence.fast_forward(self._point)
        study._storage.set_trial_system_attr(trial._trial_id, POINT, self._point)
        return {
            n: from_unit(u, d)
            for (n, d), u in zip(self._space.items(), sequence.random(1)[0], strict=True)
        }

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        return self._rest.sample_independent(study, trial, param_name, param_distribution)


def _is_numeric(d: BaseDistribution) -> bool:
    return isinstance(d, FloatDistribution | IntDistribution) and not d.single()


def _edges(d: FloatDistribution | IntDistribution) -> tuple[float, float]:
    """Ends of a range, on its own scale; half a step wider, so that the outermost values are as likely as others."""
    half = (d.step or 0) / 2
    low, high = d.low - half, d.high + half
    return (math.log(low), math.log(high)) if d.log else (low, high)


def to_unit(value: float, d: Any) -> float:
    """Return where in its range (0 to 1) a numeric value lies."""
    low, high = _edges(d)
    return ((math.log(value) if d.log else value) - low) / (high - low)


def from_unit(u: float, d: Any) -> Any:
    """Return the value at a place in a range, or the choice there."""
    if isinstance(d, CategoricalDistribution):
        return d.choices[min(int(u * len(d.choices)), len(d.choices) - 1)]
    low, high = _edges(d)
    value = low + float(u) * (high - low)
    value = math.exp(value) if d.log else value
    if d.step:
        value = d.low + round((value - d.low) / d.step) * d.step
    value = min(max(value, d.low), d.high)
    return int(value) if isinstance(d, IntDistribution) else value


class Seen:
    """What random draws of a space show of it: it may be a function, so asking is the only way to know."""

    def __init__(self, config: StudyConfig) -> None:
        draws = space_of(config).draws
        found: dict[str, list[BaseDistribution]] = defaultdict(list)
        for draw in draws:
            for name, d in draw.distributions.items():
                if d not in found[name]:
                    found[name].append(d)
        # A range that depends on other values has no place of its own in the space.
        self.all = {name: ds[0] for name, ds in sorted(found.items()) if len(ds) == 1}
        self.always = {
            name: d
            for name, d in self.all.items()
            if all(name in draw.distributions for draw in draws)
        }


def combinations(config: StudyConfig) -> list[dict[str, Any]]:
    """Return every combination of parameters of a space, conditions followed.

    Raises:
        UnlimitedError: where a range has no step, or there are more than 10,000 of them.
    """
    mirror, ask = InMemoryStudy("grid", ["maximize"]), space_of(config).ask
    found: list[dict[str, Any]] = []
    walk: _Walk | None = _Walk(())
    while walk is not None:
        found.append(dict(mirror.draw(0, walk, ask)[1].params))
        if len(found) > LARGEST_GRID:
            raise UnlimitedError(f"there are more than {LARGEST_GRID:,} combinations")
        walk = walk.following()
    return found


def check_sampler(config: StudyConfig) -> None:
    """Raise ConfigError where a study's sampler cannot work on its space, or asks more of it."""
    if config.sampler.name == "pbt":
        from amlp_ray.study.search.pbt import check_population

        check_population(config)
    if config.sampler.name == "grid":
        try:
            combinations(config)
        except UnlimitedError as error:
            raise ConfigError(
                f"sampler.name: grid tries every combination, but {error}; give choices or steps, or another sampler."
            ) from None
    if config.sampler.name == "cmaes" and not any(
        _is_numeric(d) for d in Seen(config).always.values()
    ):
        raise ConfigError(
            "sampler.name: cmaes needs a range that is searched in every trial, but all are choices or conditional; "
            "tpe takes those."
        )


class _Walk(BaseSampler):
    """Goes one way through a space: the given turns first, then always the first value."""

    def __init__(self, turns: Sequence[int]) -> None:
        self._turns = turns
        self._taken: list[tuple[int, int]] = []  # which of how many, parameter by parameter

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: Any
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        values = list(_values(param_name, param_distribution))
        at = len(self._taken)
        which = self._turns[at] if at < len(self._turns) else 0
        self._taken.append((which, len(values)))
        return values[which]

    def following(self) -> _Walk | None:
        """Return the next way, or None after the last."""
        for at in reversed(range(len(self._taken))):
            which, many = self._taken[at]
            if which + 1 < many:
                return _Walk([w for w, _ in self._taken[:at]] + [which + 1])
        return None


def _values(name: str, d: Any) -> Iterator[Any]:
    if isinstance(d, CategoricalDistribution):
        yield from d.choices
    elif d.step is None:
        raise UnlimitedError(f"{name} has no step")
    elif (many := int((d.high - d.low) / d.step + 1e-9) + 1) > LARGEST_GRID:
        raise UnlimitedError(f"{name} alone has {many:,} values")
    else:
        yield from (d.low + i * d.step for i in range(many))
