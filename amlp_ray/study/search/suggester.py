"""Suggest the parameters of trials with the study's sampler.

Samplers work on a copy of the stored study in memory. A suggestion therefore costs a read of
memory, whatever the storage. One that is refused or was tried before uses up no trial number.
Nothing that a sampler writes reaches the store, except a few plain numbers (`system_attrs`).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from amlp_ray.config import SamplerConfig, StudyConfig
from amlp_ray.errors import ConfigError
from amlp_ray.study.search.in_memory_study import InMemoryStudy, ObservedTrial, TrialDelta
from amlp_ray.study.search.samplers import (
    GENERATION,
    POINT,
    InfiniteSpaceError,
    check_sampler,
    enumerate_params,
    make_sampler,
)
from amlp_ray.study.search_space.space import SearchSpace
from amlp_ray.study.seeds import derived_seed
from amlp_ray.study.storage.optuna_internals import contains
from amlp_ray.study.storage.trial_record import TrialRecord

MAX_ATTEMPTS = 200  # for one trial
# So many attempts are the sampler's, the others are random. A sampler that models scores knows
# nothing of refusals and may insist. One of gp takes a second.
MAX_SAMPLER_ATTEMPTS = 20
MAX_GP_ATTEMPTS = 2

# System attributes that are stored start with these.
_STORED_PREFIXES = (GENERATION, POINT, "NSGAIISampler:", "NSGAIIISampler:")
_RANDOM = SamplerConfig(name="random")
_SCORED = (TrialState.COMPLETE, TrialState.PRUNED)

ParamsKey = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Suggestion:
    """Parameters of a new trial, and what is stored with it.

    Args:
        params: by Optuna's names, helpers included.
        distributions: what each was sampled from.
        values: settings by dotted name, fixed and derived ones included.
        system_attrs: plain numbers from which a sampler continues after a restart.
    """

    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    values: dict[str, Any]
    system_attrs: dict[str, Any]


@dataclass(frozen=True)
class Duplicate:
    """Enqueued parameters that a finished trial has had."""

    number: int  # of that trial


class Suggester:
    """Suggests trials one at a time; different threads may call it.

    Every suggestion follows from the study's config, the trial's number and the known trials alone,
    so a new suggester on the same store continues as this one would.
    """

    def __init__(self, config: StudyConfig, directions: Sequence[StudyDirection | str]) -> None:
        """Set up a suggester that knows no trials yet.

        Raises:
            ConfigError: the sampler cannot work on the space.
        """
        check_sampler(config)
        self._config = config
        self._space = SearchSpace(config)
        # With several objectives, or another one than is scored at rungs, a pruned trial has no
        # value to rank it by.
        self._has_rung_values = list(config.objectives) == [config.metric]
        names = [d if isinstance(d, str) else d.name.lower() for d in directions]
        self._study = InMemoryStudy(config.name, names)
        is_gp = config.sampler.name == "gp"
        self._sampler_attempts = MAX_GP_ATTEMPTS if is_gp else MAX_SAMPLER_ATTEMPTS
        self._lock = threading.Lock()
        self._stored: Sequence[FrozenTrial] = ()
        self._delta = TrialDelta()
        self._finished_params: dict[ParamsKey, int] = {}  # the first trial that had them
        self._other_params: dict[int, ParamsKey] = {}  # of trials that run or failed
        self._ended: set[int] = set()
        self._sampled: set[int] = set()  # trials that were neither imported nor enqueued
        self._next_point = 0  # in the sequence of even points
        self._combinations: list[dict[str, Any]] | None = None  # of a finite space, shuffled

    def update(self, trials: Sequence[FrozenTrial]) -> None:
        """Note all trials of the search in order; the next suggestion reads them."""
        self._stored = trials

    def config_of(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings by dotted name of a trial with these parameters."""
        return self._space.config_of(params)

    def discard(self, number: int) -> None:
        """Take back a suggestion that was not used."""
        with self._lock:
            self._remove(number)

    def suggest(
        self, number: int, *, fixed: Mapping[str, Any] | None = None
    ) -> Suggestion | Duplicate | None:
        """Suggest the trial of this number; until `update` says otherwise, it runs.

        The first trial of a search tries the defaults of the space, if it declares them. What
        `require` or the settings refuse, or what was tried before, is sampled again.

        Args:
            number: of the trial.
            fixed: parameters of an enqueued trial; those that it leaves open are sampled.

        Returns:
            A duplicate only if `fixed` leaves nothing new. None if the space is used up: every
            combination of a finite one runs or has run, or 200 samples in a row are refused. None
            too if a trial of this number has ended, so a suggestion made ahead is of no use.

        Raises:
            ConfigError: `fixed` leaves nothing that is allowed.
        """
        with self._lock:
            self._read_stored()
            if number in self._ended:
                return None
            self._remove(number)
            if fixed is not None:
                return self._suggest_fixed(number, dict(fixed))
            if not self._sampled and (defaults := self._space.defaults()) is not None:
                suggestion = self._sample(number, 0, defaults, _RANDOM)
                if suggestion is not None and not self._is_tried(_key(suggestion.params)):
                    return self._start(number, suggestion, is_sampled=True)
            if self._config.sampler.name == "grid":
                return self._suggest_untried(number)
            return self._suggest_free(number)

    def _suggest_free(self, number: int) -> Suggestion | None:
        for attempt in range(MAX_ATTEMPTS):
            # What is left of a finite space is looked up instead.
            if attempt == self._sampler_attempts and self._finite_space():
                break
            suggestion = self._sample_attempt(number, attempt, {})
            if suggestion is not None and not self._is_tried(_key(suggestion.params)):
                return self._start(number, suggestion, is_sampled=True)
        return self._suggest_untried(number)

    def _suggest_fixed(self, number: int, fixed: dict[str, Any]) -> Suggestion | Duplicate | None:
        if not fixed:
            return self._suggest_free(number)
        duplicate = None
        for attempt in range(MAX_ATTEMPTS):
            suggestion = self._sample_attempt(number, attempt, fixed)
            if suggestion is None:
                continue
            key = _key(suggestion.params)
            # What merely runs may still fail, so only a finished trial answers an enqueued one.
            if key not in self._finished_params:
                return self._start(number, suggestion, is_sampled=False)
            duplicate = Duplicate(self._finished_params[key])
            if suggestion.params.keys() <= fixed.keys():
                break
        if duplicate is None:
            enqueued = ", ".join(f"{name}={value}" for name, value in fixed.items())
            raise ConfigError(
                f"trial {number}: what was enqueued ({enqueued}) leaves no combination that "
                f"`require` and the settings allow; enqueue other values."
            )
        return duplicate

    def _suggest_untried(self, number: int) -> Suggestion | None:
        """Suggest a combination of a finite space that no trial has had, in the study's order."""
        tried = set(self._finished_params) | set(self._other_params.values())
        for params in self._finite_space():
            if _key(params) in tried:
                continue
            if suggestion := self._sample(number, 0, params, _RANDOM):
                return self._start(number, suggestion, is_sampled=True)
        return None

    def _finite_space(self) -> list[dict[str, Any]]:
        """Return every combination of the space; empty if there is no end of them."""
        if self._combinations is None:
            try:
                self._combinations = enumerate_params(self._space)
            except InfiniteSpaceError:
                self._combinations = []
            random.Random(derived_seed(self._config.seed, "grid")).shuffle(self._combinations)
        return self._combinations

    # Sampling

    def _sample_attempt(
        self, number: int, attempt: int, fixed: Mapping[str, Any]
    ) -> Suggestion | None:
        is_samplers = attempt < self._sampler_attempts
        config = self._config.sampler if is_samplers else _RANDOM
        return self._sample(number, attempt, fixed, config)

    def _sample(
        self, number: int, attempt: int, fixed: Mapping[str, Any], config: SamplerConfig
    ) -> Suggestion | None:
        """Sample a trial once; None if it is refused."""
        study_seed = self._config.seed
        seed = derived_seed(study_seed, "sampler", number, *([attempt] if attempt else []))
        ranges: Mapping[str, BaseDistribution] = {}
        if config.name == "cmaes":
            ranges = self._space.unconditional
        elif config.name == "qmc":
            ranges = self._space.distributions
        sampler = make_sampler(
            config,
            seed,
            space=ranges,
            series=derived_seed(study_seed, "sampler"),
            point=self._next_point + attempt,
        )
        suggested, trial = self._study.sample(number, sampler, self._space.suggest, fixed=fixed)
        if suggested.refused:
            return None
        try:
            self._config.trial(suggested.values, seed=0)
        except ConfigError:
            return None
        params = {}
        for name, distribution in trial.distributions.items():
            internal = distribution.to_internal_repr(trial.params[name])
            params[name] = distribution.to_external_repr(internal)
        attributes = _stored_attributes(trial) | getattr(sampler, "attributes", {})
        system_attrs = attributes | self._parents(attributes)
        return Suggestion(params, dict(trial.distributions), suggested.values, system_attrs)

    def _start(self, number: int, suggestion: Suggestion, *, is_sampled: bool) -> Suggestion:
        running = ObservedTrial(
            number,
            TrialState.RUNNING,
            params=suggestion.params,
            distributions=suggestion.distributions,
            system_attrs=suggestion.system_attrs,
        )
        self._study.put(running)
        self._other_params[number] = _key(suggestion.params)
        self._note_point(suggestion.system_attrs)
        if is_sampled:
            self._sampled.add(number)
        return suggestion

    def _note_point(self, system_attrs: Mapping[str, Any]) -> None:
        self._next_point = max(self._next_point, system_attrs.get(POINT, -1) + 1)

    def _is_tried(self, key: ParamsKey) -> bool:
        """Return whether a trial runs with these parameters or has finished with them."""
        if key in self._finished_params:
            return True
        return any(
            other == key and number not in self._ended
            for number, other in self._other_params.items()
        )

    def _remove(self, number: int) -> None:
        if number not in self._ended and self._other_params.pop(number, None) is not None:
            self._study.drop(number)
            self._sampled.discard(number)

    # What the store holds

    def _read_stored(self) -> None:
        for frozen in self._delta.update(self._stored):
            self._read_trial(TrialRecord.from_frozen(frozen))

    def _read_trial(self, trial: TrialRecord) -> None:
        number = trial.number
        if number in self._ended or trial.state == TrialState.WAITING:
            return
        # The original of a copy is known already. No sampler learns from outside of the space.
        if trial.is_copy or trial.outside is not None:
            self._remove(number)
            self._ended.add(number)
            return
        key = _key(trial.params)
        if trial.state == TrialState.RUNNING and self._other_params.get(number) == key:
            return
        self._remove(number)
        self._study.put(self._observed(trial))
        self._read_parents(trial.frozen.system_attrs)
        self._note_point(trial.frozen.system_attrs)
        if not trial.is_imported and not trial.is_enqueued:
            self._sampled.add(number)
        # The result of another study answers no enqueued trial.
        if trial.state in _SCORED and not trial.is_imported:
            self._finished_params.setdefault(key, number)
        else:
            self._other_params[number] = key
        if trial.is_finished:
            self._ended.add(number)

    def _observed(self, trial: TrialRecord) -> ObservedTrial:
        """Return a stored trial as samplers are to see it.

        - Ranges are those of the space as it is now, if the trial lies in them. Samplers ignore
          parameters whose ranges differ, and TPE would never try what a wider one has added.
        - A pruned trial of one objective has its last score as value. For gp, which ignores pruned
          trials and would suggest the same again, it is a complete one.
        - Limits are seen as the excess over each; 0 if it was not measured.
        """
        distributions = dict(trial.distributions)
        for name, current in self._space.distributions.items():
            stored = distributions.get(name)
            if type(current) is type(stored) and contains(current, trial.params[name]):
                distributions[name] = current
        rungs = trial.rungs if self._has_rung_values else {}
        state = trial.state
        values = trial.values if state == TrialState.COMPLETE else None
        if state == TrialState.PRUNED and rungs:
            values = [rungs[max(rungs)]]
            if self._config.sampler.name == "gp":
                state = TrialState.COMPLETE
        excess: dict[str, float] = {}
        if state in _SCORED:
            for name, limit in self._config.limits.items():
                cost = trial.cost(name)
                excess[name] = 0.0 if cost is None else cost - limit
        return ObservedTrial(
            trial.number,
            state,
            params=trial.params,
            distributions=distributions,
            values=values,
            intermediate_values=rungs,
            system_attrs=_stored_attributes(trial.frozen),
            constraints=excess,
        )

    # Generations of nsga2 and nsga3 descend from parents that are chosen once. Optuna stores the
    # choice with the study; here it is stored with each trial of the generation.

    def _parents(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the choice of parents that a suggestion rests on."""
        chosen = self._study.system_attrs
        parents = {}
        for name, generation in attributes.items():
            key = name.replace(":generation", f":parent:{generation}")
            if name != GENERATION and key in chosen:
                parents[key] = list(chosen[key])
        return parents

    def _read_parents(self, stored: Mapping[str, Any]) -> None:
        for name, numbers in stored.items():
            if ":parent:" in name and name not in self._study.system_attrs:
                self._study.set_system_attr(name, list(numbers))


def _stored_attributes(trial: FrozenTrial) -> dict[str, Any]:
    return {k: v for k, v in trial.system_attrs.items() if k.startswith(_STORED_PREFIXES)}


def _key(params: Mapping[str, Any]) -> ParamsKey:
    """Return what identifies parameters: 1 is not True, and 0.1 + 0.2 is 0.3."""
    key = []
    for name in sorted(params):
        value = params[name]
        key.append((name, f"{value:.12g}" if type(value) is float else repr(value)))
    return tuple(key)
