"""What a search tries next: suggestions of a sampler that looks at a study in memory, not at the store.

Sampling is thus as fast as memory, whatever the storage; a suggestion that is refused or was tried before uses up no
trial number; and nothing that a sampler writes down reaches the store but a few plain numbers (`system_attrs`).
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from amlp_ray.config import SamplerConfig, StudyConfig
from amlp_ray.errors import ConfigError
from amlp_ray.study.search.in_memory_study import InMemoryStudy, ObservedTrial, TrialDelta
from amlp_ray.study.search.samplers import (
    GENERATION,
    POINT,
    Seen,
    UnlimitedError,
    check_sampler,
    combinations,
    make_sampler,
)
from amlp_ray.study.search_space.validate import defaults, suggest, suggestion
from amlp_ray.study.seeds import derived_seed

TRIES = 200  # suggestions per trial
# of the sampler, the others being random: one that models scores knows nothing of refusals and may insist; gp: 2,
# since each takes it a second
INSISTED = 20

_KEPT = (
    GENERATION,
    POINT,
    "NSGAIISampler:",
    "NSGAIIISampler:",
)  # system attributes that go into the store
_RANDOM = SamplerConfig(name="random")
_DONE = (TrialState.COMPLETE, TrialState.PRUNED)

Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Suggestion:
    """Settings of a new trial, and what the store is to keep of it."""

    params: dict[str, Any]  # as Optuna names them, names that are no settings included
    distributions: dict[str, BaseDistribution]
    values: dict[str, Any]  # settings by dotted name, fixed and derived ones included
    system_attrs: dict[str, Any]  # plain numbers, from which a sampler goes on after a restart


@dataclass(frozen=True)
class Duplicate:
    """Settings that were asked for and that a finished trial has had."""

    number: int  # of that trial


class Suggester:
    """Proposes trials, one at a time; `sync` and `propose` may be called from different threads.

    Every proposal follows from the study's settings, the trial's number and the trials known, and from nothing else: a
    new proposer on the same store goes on as this one would.
    """

    def __init__(self, config: StudyConfig, directions: Sequence[StudyDirection | str]) -> None:
        """Raises ConfigError where the sampler cannot work on the space (see `check_sampler`)."""
        check_sampler(config)
        self._settings, self._sampler = config, config.sampler
        names = [d if isinstance(d, str) else d.name.lower() for d in directions]
        # With several objectives, or another one than is scored at rungs, a pruned trial has no value to go by.
        self._scored = list(config.objectives) == [config.metric]
        self._mirror = InMemoryStudy(config.name, names)
        self._lock = threading.Lock()
        self._stored: Sequence[FrozenTrial] = ()
        self._news = TrialDelta()
        self._done: dict[Key, int] = {}  # settings of finished trials
        self._tried: dict[int, Key] = {}  # of all others: those that run, and those that failed
        self._ended: set[int] = set()
        self._sampled: set[int] = set()  # neither imported nor enqueued
        self._point = 0  # next place in the sequence of even points
        self._all: list[dict[str, Any]] | None = None  # combinations of a finite space, shuffled

    def sync(self, trials: Sequence[FrozenTrial]) -> None:
        """Say what the store holds: all trials in their order, taken in by the next `propose`."""
        self._stored = trials

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings by dotted name of a trial with these parameters."""
        return suggest(FixedTrial(dict(params)), self._settings)  # type: ignore[arg-type]  # asks the same questions

    def forget(self, number: int) -> None:
        """Take back a proposal that was not used."""
        with self._lock:
            self._drop(number)

    def propose(
        self, number: int, *, fixed: Mapping[str, Any] | None = None
    ) -> Suggestion | Duplicate | None:
        """Propose the trial of this number; until `sync` says otherwise, it runs.

        The first trial of a search tries the defaults of the space, where all parameters have one. A suggestion that
        `require` or the settings refuse, or that was tried before, is drawn again.

        Args:
            fixed: parameters of an enqueued trial; those that it leaves open are sampled.

        Returns:
            A duplicate only where `fixed` leaves nothing new; None where the space is used up: every combination of a
            finite one runs or has run, or 200 suggestions in a row are refused. None too where a trial of this number
            has ended meanwhile, so that a suggestion made ahead is of no use.

        Raises:
            ConfigError: where `fixed` leaves nothing that is allowed.
        """
        with self._lock:
            self._take_in()
            if number in self._ended:
                return None
            self._drop(number)
            if (
                fixed is None
                and not self._sampled
                and (first := defaults(self._settings)) is not None
            ):
                proposal = self._draw(number, 0, first, _RANDOM)
                if proposal is not None and not self._was_tried(_key(proposal.params)):
                    return self._begin(number, proposal, sampled=True)
            if fixed is None and self._sampler.name == "grid":
                return self._untried(number)
            return self._search(number, dict(fixed or {}))

    def _search(self, number: int, fixed: dict[str, Any]) -> Suggestion | Duplicate | None:
        duplicate, insisted = None, 2 if self._sampler.name == "gp" else INSISTED
        for attempt in range(TRIES):
            if attempt == insisted and not fixed and self._finite() is not None:
                break  # what is left of it is looked for instead
            proposal = self._draw(
                number, attempt, fixed, self._sampler if attempt < insisted else _RANDOM
            )
            if proposal is None:
                continue
            key = _key(proposal.params)
            if not self._was_tried(key) or (fixed and key not in self._done):
                return self._begin(number, proposal, sampled=not fixed)
            if fixed:
                duplicate = Duplicate(self._done[key])
                if proposal.params.keys() <= fixed.keys():
                    break
        if fixed and duplicate is None:
            raise ConfigError(
                f"trial {number}: what was enqueued ({', '.join(f'{k}={v}' for k, v in fixed.items())}) leaves no "
                f"combination that `require` and the settings allow; enqueue other values."
            )
        return duplicate or self._untried(number)

    def _draw(
        self, number: int, attempt: int, fixed: Mapping[str, Any], by: SamplerConfig
    ) -> Suggestion | None:
        """One suggestion; None where it is refused."""
        s = self._settings
        seed = derived_seed(s.seed, "sampler", number, *([attempt] if attempt else []))
        space = {}
        if by.name in ("cmaes", "qmc"):
            space = self._space.always if by.name == "cmaes" else self._space.all
        series = derived_seed(s.seed, "sampler")
        sampler = make_sampler(by, seed, space=space, series=series, point=self._point + attempt)
        asked, trial = self._mirror.draw(
            number, sampler, lambda trial: suggestion(trial, s), fixed=fixed
        )
        if asked.refused:
            return None
        try:
            s.trial(asked.values, seed=0)
        except ConfigError:
            return None
        internal = {
            name: d.to_internal_repr(trial.params[name]) for name, d in trial.distributions.items()
        }
        params = {
            name: d.to_external_repr(internal[name]) for name, d in trial.distributions.items()
        }
        kept = {k: v for k, v in trial.system_attrs.items() if k.startswith(_KEPT)}
        return Suggestion(
            params, dict(trial.distributions), asked.values, kept | self._parents(kept)
        )

    def _begin(self, number: int, proposal: Suggestion, *, sampled: bool) -> Suggestion:
        self._mirror.put(
            ObservedTrial(
                number,
                TrialState.RUNNING,
                params=proposal.params,
                distributions=proposal.distributions,
                system_attrs=proposal.system_attrs,
            )
        )
        self._tried[number] = _key(proposal.params)
        self._point = max(self._point, proposal.system_attrs.get(POINT, -1) + 1)
        if sampled:
            self._sampled.add(number)
        return proposal

    def _untried(self, number: int) -> Suggestion | None:
        """A combination of a finite space that no trial has had; they are in an order of the study's own."""
        for params in self._finite() or ():
            key = _key(params)
            if key in self._done or key in self._tried.values():
                continue
            if proposal := self._draw(number, 0, params, _RANDOM):
                return self._begin(number, proposal, sampled=True)
        return None

    def _finite(self) -> list[dict[str, Any]] | None:
        """Every combination of the space, or None where it has no end."""
        if self._all is None:
            try:
                self._all = combinations(self._settings)
            except UnlimitedError:
                self._all = []
            random.Random(derived_seed(self._settings.seed, "grid")).shuffle(self._all)
        return self._all or None

    @cached_property
    def _space(self) -> Seen:
        return Seen(self._settings)

    def _was_tried(self, key: Key) -> bool:
        return key in self._done or key in (
            k for n, k in self._tried.items() if n not in self._ended
        )

    # What the store holds

    def _take_in(self) -> None:
        for trial in self._news.of(self._stored):
            number = trial.number
            if number in self._ended or trial.state == TrialState.WAITING:
                continue
            if {
                "copy_of",
                "outside",
            } & trial.user_attrs.keys():  # counted already, or of a space that was left
                self._drop(number)
                self._ended.add(number)
                continue
            key = _key(trial.params)
            if trial.state == TrialState.RUNNING and self._tried.get(number) == key:
                continue
            self._drop(number)
            self._mirror.put(self._known(trial))
            self._take_in_parents(trial.system_attrs)
            if "source" not in trial.user_attrs and "fixed_params" not in trial.system_attrs:
                self._sampled.add(number)
            self._point = max(self._point, trial.system_attrs.get(POINT, -1) + 1)
            if (
                trial.state in _DONE and "source" not in trial.user_attrs
            ):  # another study's result answers nothing here
                self._done.setdefault(key, number)
            else:
                self._tried[number] = key
            if trial.state.is_finished():
                self._ended.add(number)

    def _drop(self, number: int) -> None:
        if number not in self._ended and self._tried.pop(number, None) is not None:
            self._mirror.drop(number)
            self._sampled.discard(number)

    def _known(self, trial: FrozenTrial) -> ObservedTrial:
        """A stored trial as samplers are to see it.

        Its ranges are those of the space as it is now, where it lies in them: samplers leave out parameters whose
        ranges differ from trial to trial, and TPE would never look at what a wider one has added. A pruned trial of one
        objective has its last score as value, and gp, which knows complete trials only, gets it as one: it would go on
        suggesting what was pruned. Limits: what a trial took, less the limit; 0 where it is not known.
        """
        state, values, ranges = trial.state, trial.values, dict(trial.distributions)
        for name, now in self._space.all.items():
            if (
                name in ranges
                and type(now) is type(ranges[name])
                and _contains(now, trial.params[name])
            ):
                ranges[name] = now
        rungs = trial.intermediate_values if self._scored else {}
        if state == TrialState.PRUNED:
            values = [rungs[max(rungs)]] if rungs else None
            if values is not None and self._sampler.name == "gp":
                state = TrialState.COMPLETE
        facts = trial.user_attrs.get("stats", {})
        over = {
            name: facts.get(name, limit) - limit for name, limit in self._settings.limits.items()
        }
        return ObservedTrial(
            trial.number,
            state,
            params=trial.params,
            distributions=ranges,
            values=values if state in _DONE else None,
            intermediate_values=rungs,
            system_attrs={k: v for k, v in trial.system_attrs.items() if k.startswith(_KEPT)},
            constraints={n: v if math.isfinite(v) else 0.0 for n, v in over.items()}
            if state in _DONE
            else None,
        )

    # Generations of nsga2 and nsga3 descend from parents that are chosen once; Optuna keeps them with the study

    def _parents(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """The choice that a suggestion of such a generation goes by, to be stored with its trial."""
        chosen = self._mirror.storage.get_study_system_attrs(self._mirror.id)
        names = [
            k.replace(":generation", f":parent:{v}") for k, v in kept.items() if k != GENERATION
        ]
        return {name: list(chosen[name]) for name in names if name in chosen}

    def _take_in_parents(self, stored: Mapping[str, Any]) -> None:
        chosen = self._mirror.storage.get_study_system_attrs(self._mirror.id)
        for name, numbers in stored.items():
            if ":parent:" in name and name not in chosen:
                self._mirror.storage.set_study_system_attr(self._mirror.id, name, list(numbers))


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except ValueError:  # a choice that is none any more
        return False


def _key(params: Mapping[str, Any]) -> Key:
    """What tells settings apart: 1 is not True, and 0.1 + 0.2 is 0.3."""
    return tuple(
        (k, f"{v:.12g}" if type(v) is float else repr(v)) for k, v in sorted(params.items())
    )
