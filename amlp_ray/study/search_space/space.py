"""The search space of a study: suggest configs, fit given parameters, and say what is searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import RandomSampler
from optuna.trial import BaseTrial

from amlp_ray.config import Choice, Derived, Fixed, Range, StudyConfig
from amlp_ray.config.base import nearest_name
from amlp_ray.config.overrides import flatten
from amlp_ray.errors import ConfigError
from amlp_ray.study.search_space.expressions import Expression, ExpressionError
from amlp_ray.study.search_space.given_trial import GivenTrial, OutOfSpaceError
from amlp_ray.study.search_space.parameters import (
    LAYERS,
    SETTINGS,
    annotation,
    as_list,
    equals,
    is_inside,
    is_integer,
    sampling_order,
)
from amlp_ray.study.search_space.space_function import load_function

# Random trials that a space is checked with. What one in fifty combinations refuses is found with
# a probability of 87 %, within a fifth of a second.
N_SAMPLES = 100


@dataclass(frozen=True)
class SuggestedConfig:
    """What a space made of a trial.

    Args:
        values: settings by dotted name, fixed and derived ones included, for `StudyConfig.trial`.
        params: what the trial was asked for, helpers included.
        invalid: why they are no settings: expressions without a value, a function's refusal.
        broken: the requirement that they break.
    """

    values: dict[str, Any]
    params: dict[str, Any]
    invalid: tuple[str, ...] = ()
    broken: str | None = None

    @property
    def refused(self) -> str | None:
        """Return why no trial may have them; None if one may."""
        return self.invalid[0] if self.invalid else self.broken


@dataclass(frozen=True)
class SampledTrial:
    """A trial sampled at random, to check a space with."""

    suggestion: SuggestedConfig
    distributions: Mapping[str, BaseDistribution]


@dataclass(frozen=True)
class FittedParams:
    """Given parameters as Optuna stores them, and the settings that follow from them (`values`)."""

    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    values: dict[str, Any]


class SearchSpace:
    """The space of a study, declared or a Python function."""

    def __init__(self, config: StudyConfig) -> None:
        """Read the space of a study.

        Raises:
            ConfigError: parameters need each other in a circle, an expression cannot be read, or
                the function cannot be imported.
        """
        self.config = config
        declared = config.space if isinstance(config.space, dict) else {}
        self.function = load_function(config.space) if isinstance(config.space, str) else None
        self.declared = {name: declared[name] for name in sampling_order(declared)}
        self._declared_ranges: dict[str, Range | Choice] = {
            n: p for n, p in self.declared.items() if isinstance(p, Range | Choice)
        }
        self._expressions = {}
        for name, parameter in declared.items():
            if isinstance(parameter, Derived):
                self._expressions[name] = _read_expression(name, parameter.expression)
        self._requirements = [_read_expression("require", text) for text in config.require]
        self._base_settings: dict[tuple[Any, ...], dict[str, Any]] = {}

    # Suggestions

    def suggest(self, trial: BaseTrial) -> SuggestedConfig:
        """Ask a trial for every parameter whose condition holds.

        The same trial, suggested for again, answers the same.
        """
        if self.function is not None:
            return self._call(self.function, trial)
        return self._collect(lambda name, parameter: _suggest(trial, name, parameter))

    def config_of(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings by dotted name that follow from a stored trial's parameters.

        Raises:
            OutOfSpaceError: the space asks for a parameter that is missing.
            ConfigError: an expression has no value, or the function refuses the parameters.
        """
        suggestion = self.suggest(GivenTrial(params, check=False))
        if suggestion.invalid:
            raise ConfigError(*[f"space: {reason}." for reason in suggestion.invalid])
        return suggestion.values

    def defaults(self) -> dict[str, Any] | None:
        """Return the parameters of the first trial, if the space declares defaults.

        A parameter without one has the study's own value.

        Returns:
            Parameters by name; None if no default is declared.

        Raises:
            ConfigError: a parameter has neither a default nor a value of the study in its range.
        """
        if not any(parameter.default is not None for parameter in self._declared_ranges.values()):
            return None
        params: dict[str, Any] = {}

        def default(name: str, parameter: Range | Choice) -> Any:
            value = parameter.default
            if value is None:
                value = self._base(params).get(name)
                if value is None or not is_inside(parameter, value):
                    explanation = ""
                    if name in SETTINGS:
                        explanation = f", and the study's own {value!r} lies outside"
                    raise ConfigError(
                        f"space: {name} has no default{explanation}; the first trial tries "
                        f"defaults, so give one here too.",
                        keys=[f"space.{name}"],
                    )
            elif isinstance(parameter, Range) and type(SETTINGS.get(name)) is int:
                value = int(value)
            params[name] = value
            return value

        suggestion = self._collect(default)
        if suggestion.refused:
            raise ConfigError(
                f"space: the defaults are refused: {suggestion.refused}.", keys=["space"]
            )
        return params

    # Given parameters

    def fit(self, params: Mapping[str, Any]) -> FittedParams:
        """Fit all parameters of a trial into the space; those that it does not ask for are dropped.

        Raises:
            OutOfSpaceError: one is missing, lies outside, or they do not go together.
        """
        return self._fit(GivenTrial(params))

    def fit_some(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return some parameters of a trial as the space has them; a sampler may add the others.

        Raises:
            OutOfSpaceError: for an unknown name, a value outside, a condition that the others rule
                out, or if no combination with them is allowed.
        """
        study = optuna.create_study()
        sampler = RandomSampler(0)
        frozen = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)

        def sample(name: str, distribution: BaseDistribution) -> Any:
            return sampler.sample_independent(study, frozen, name, distribution)

        refusal = None
        names = set(self.parameters)
        for _ in range(N_SAMPLES):
            trial = GivenTrial(params, fill=sample)
            try:
                fitted = self._fit(trial)
            except OutOfSpaceError as error:
                refusal = refusal or error
            else:
                if params.keys() <= fitted.params.keys():
                    return {name: fitted.params[name] for name in params}
            names |= trial.params.keys()
        if refusal:
            raise refusal
        for name in params.keys() - names:
            near = nearest_name(name, sorted(names))
            advice = f"searched are {', '.join(sorted(names)) or 'no settings'}."
            if near:
                advice = f"did you mean {near}?"
            raise OutOfSpaceError(f"{name} is not searched by this study; {advice}")
        raise OutOfSpaceError(
            f"{', '.join(params)}: no trial has these values together; `when` of the space says "
            f"what goes with what."
        )

    def _fit(self, trial: GivenTrial) -> FittedParams:
        suggestion = self.suggest(trial)
        if suggestion.refused:
            raise OutOfSpaceError(f"{suggestion.refused}.")
        try:
            self.config.trial(suggestion.values, seed=0)
        except ConfigError as error:
            raise OutOfSpaceError(str(error).removeprefix(f"{self.config.name}: ")) from None
        return FittedParams(dict(trial.params), dict(trial.distributions), suggestion.values)

    # What is searched

    @cached_property
    def parameters(self) -> dict[str, Range | Choice]:
        """Return what trials are asked for in order, helpers included.

        Of a function it is what random samples show.
        """
        if self.function is None:
            return self._declared_ranges
        return {name: as_parameter(ranges[0]) for name, ranges in self.sampled_ranges.items()}

    @cached_property
    def samples(self) -> tuple[SampledTrial, ...]:
        """Return trials sampled at random, the same for the same space."""
        study = optuna.create_study(sampler=RandomSampler(0))
        n_samples = N_SAMPLES if self.declared or self.function else 1
        trials = [study.ask() for _ in range(n_samples)]
        return tuple(SampledTrial(self.suggest(trial), trial.distributions) for trial in trials)

    @cached_property
    def sampled_ranges(self) -> dict[str, list[BaseDistribution]]:
        """Return the ranges that random samples show, each once, by name in order."""
        ranges: dict[str, list[BaseDistribution]] = {}
        for sample in self.samples:
            for name, distribution in sample.distributions.items():
                if distribution not in ranges.setdefault(name, []):
                    ranges[name].append(distribution)
        return ranges

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the range of each parameter by name, sorted.

        A range that depends on other parameters is left out.
        """
        ranges = self.sampled_ranges
        return {name: ranges[name][0] for name in sorted(ranges) if len(ranges[name]) == 1}

    @cached_property
    def unconditional(self) -> dict[str, BaseDistribution]:
        """Return the range of each parameter that every trial has."""
        sampled = [sample.distributions for sample in self.samples]
        return {n: d for n, d in self.distributions.items() if all(n in s for s in sampled)}

    # How values follow from parameters

    def broken_requirement(self, values: Mapping[str, Any]) -> str | None:
        """Return the requirement that a trial breaks; None if all hold.

        A requirement of a helper that the trial does not have says nothing about it.

        Args:
            values: by name, of settings and helpers. Missing settings have the study's own value.
        """
        for requirement in self._requirements:
            if not all(name in values or name in SETTINGS for name in requirement.names):
                continue
            try:
                if not requirement(lambda name: self._value(name, values)):
                    return f"require {requirement.text!r} does not hold"
            except ExpressionError as error:
                return f"require: {error}"
        return None

    def _collect(self, answer: Callable[[str, Range | Choice], Any]) -> SuggestedConfig:
        """Go through a declared space, whose searched parameters `answer` gives."""
        values: dict[str, Any] = {}
        params: dict[str, Any] = {}
        invalid: dict[str, str] = {}
        for name, parameter in self.declared.items():
            if parameter.when and not self._holds(parameter.when, values):
                continue
            if isinstance(parameter, Fixed):
                values[name] = parameter.value
            elif isinstance(parameter, Range | Choice):
                values[name] = params[name] = answer(name, parameter)
            else:
                expression = self._expressions[name]
                if invalid.keys() & set(expression.names):
                    continue  # the reason is given for the name that it follows from
                try:
                    result = expression(lambda other: self._value(other, values))
                    values[name] = _as_setting(name, result)
                except ExpressionError as error:
                    invalid[name] = f"{name}: {error}"
        settings = {name: value for name, value in values.items() if name in SETTINGS}
        broken = self.broken_requirement(values)
        return SuggestedConfig(settings, params, tuple(invalid.values()), broken)

    def _base(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the study's own settings, which a searched variant or encoder changes."""
        layers = tuple((name, values[name]) for name in LAYERS if name in values)
        if layers not in self._base_settings:
            self._base_settings[layers] = flatten(self.config.trial(dict(layers), seed=0))
        return self._base_settings[layers]

    def _value(self, name: str, values: Mapping[str, Any]) -> Any:
        if name in values:
            return values[name]
        if name not in SETTINGS:
            raise ExpressionError(
                f"{name} is not asked for in trials that need it; give both the same `when`"
            )
        return self._base(values)[name]

    def _holds(self, when: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
        for name, allowed in when.items():
            if name not in values and name not in SETTINGS:
                return False  # a helper that this trial does not have
            value = self._value(name, values)
            if not any(equals(value, other) for other in as_list(allowed)):
                return False
        return True

    def _call(self, function: Callable[[Any], Any], trial: BaseTrial) -> SuggestedConfig:
        reference = self.config.space
        invalid: tuple[str, ...] = ()
        returned = None
        try:
            returned = function(trial)
        except (optuna.TrialPruned, ExpressionError) as error:
            invalid = (str(error) or f"{reference} refuses them",)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"space: {reference} failed: {type(error).__name__}: {error}."
            ) from error
        if not isinstance(returned, Mapping | None):
            raise ConfigError(
                f"space: {reference} returned {type(returned).__name__}; it may return nothing, or "
                f"a mapping of settings by dotted name."
            )
        params = dict(trial.params)
        values = {**params, **(returned or {})}
        # A dotted name that is no setting is misspelled, and is left in for the config to refuse.
        settings = {
            name: value
            for name, value in values.items()
            if name in SETTINGS or "." in name or name not in params
        }
        return SuggestedConfig(settings, params, invalid, self.broken_requirement(values))


def as_parameter(distribution: BaseDistribution) -> Range | Choice:
    """Return a distribution as the parameter that a study file would declare."""
    if isinstance(distribution, CategoricalDistribution):
        return Choice(choices=list(distribution.choices))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if distribution.single():
        return Choice(choices=[distribution.low])
    step = distribution.step
    if distribution.log or (isinstance(distribution, IntDistribution) and step == 1):
        step = None
    return Range(low=distribution.low, high=distribution.high, log=distribution.log, step=step)


def _read_expression(name: str, text: str) -> Expression:
    try:
        return Expression(text)
    except ExpressionError as error:
        raise ConfigError(f"space: {name}: {error}.") from None


def _suggest(trial: BaseTrial, name: str, parameter: Range | Choice) -> Any:
    if isinstance(parameter, Choice):
        return trial.suggest_categorical(name, parameter.choices)
    low = parameter.low
    high = parameter.high
    if is_integer(name):
        step = int(parameter.step or 1)
        return trial.suggest_int(name, int(low), int(high), log=parameter.log, step=step)
    return trial.suggest_float(name, low, high, log=parameter.log, step=parameter.step)


def _as_setting(name: str, value: Any) -> Any:
    """Return a derived value in the type of its setting; 3.9999999999 epochs are 4.

    Raises:
        ExpressionError: the setting does not take the value.
    """
    if name not in SETTINGS:
        return value
    if is_integer(name) and not isinstance(value, bool) and isinstance(value, int | float):
        if abs(value - round(value)) > 1e-9:
            raise ExpressionError(
                f"the expression gives {value:g}, but it is a whole number; use round()"
            )
        return round(value)
    kind = annotation(name)
    if (kind is bool) != isinstance(value, bool):
        raise ExpressionError(f"the expression gives {value!r}, which is no value of it")
    return float(value) if kind is float and isinstance(value, int) else value
