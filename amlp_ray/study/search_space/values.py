"""Values that a person gives, or another study had, held against the space of a study before they enter its store."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FixedTrial, Trial

from amlp_ray.config import Choice, Derived, Fixed, Parameter, StudyConfig
from amlp_ray.errors import ConfigError
from amlp_ray.study.search_space.space import space_of
from amlp_ray.study.search_space.validate import searched

DRAWS = 100  # ways to fill in what was not given; what one in fifty of them allows is found with 87 % probability


class OutOfSpaceError(ConfigError):
    """Values that the space does not have; the message says which and what it has instead."""


@dataclass(frozen=True)
class FittedParams:
    """What a space asks for of given values: Optuna's parameters, and the settings that follow (`values`)."""

    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    values: dict[str, Any]


class _Asked(FixedTrial):
    """Answers a space with what was given and refuses what lies outside; what is missing it draws, or refuses."""

    def __init__(self, given: Mapping[str, Any], free: Trial | None = None) -> None:
        super().__init__(dict(given))
        self._free = free

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self._params:
            if self._free is None:
                raise OutOfSpaceError(f"{name} is missing; the space has {words(distribution)}.")
            self._params[name] = self._free._suggest(name, distribution)
        self._params[name] = inside(name, self._params[name], distribution)
        return super()._suggest(name, distribution)


def fit(given: Mapping[str, Any], config: StudyConfig) -> FittedParams:
    """Hold a whole trial's values against the space. Values of parameters that are not asked for are left out.

    Raises:
        Misfit: in a sentence, where a value is missing, lies outside, or the values do not go together.
    """
    return _asked(_Asked(given), config)


class _Recalled(FixedTrial):
    """Answers a space with what a trial had, though the space may be another by now."""

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self._params:
            raise OutOfSpaceError(f"{name} is missing.")
        return self._params[name]


def config_of_trial(params: Mapping[str, Any], config: StudyConfig) -> dict[str, Any]:
    """The settings, by dotted name, that follow from a trial's parameters: derived and fixed ones too.

    Raises:
        Misfit: where the space asks for a parameter that the trial does not have.
    """
    return space_of(config).ask(_Recalled(dict(params))).values  # type: ignore[arg-type]  # asked as a Trial is


def check_given(given: Mapping[str, Any], config: StudyConfig) -> dict[str, Any]:
    """Return some of a trial's values as the space has them; the sampler may fill in the others.

    Raises:
        Misfit: for an unknown name, a value outside, a condition that the others rule out, or no way to go on.
    """
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    refused, known = None, set(searched(config))
    for _ in range(DRAWS):
        trial = _Asked(given, drawn.ask())
        try:
            found = _asked(trial, config)
        except OutOfSpaceError as misfit:
            refused = refused or misfit
        else:
            if given.keys() <= found.params.keys():
                return {name: found.params[name] for name in given}
        known |= trial.params.keys()
    if refused:
        raise refused
    for name in given.keys() - known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise OutOfSpaceError(
            f"{name} is not searched by this study"
            + (
                f"; did you mean {near[0]}?"
                if near
                else f"; searched are {', '.join(sorted(known)) or 'no settings'}."
            )
        )
    raise OutOfSpaceError(
        f"{', '.join(given)}: no trial has these values together; `when` of the space says what goes with what."
    )


def _asked(trial: _Asked, config: StudyConfig) -> FittedParams:
    suggestion = space_of(config).ask(trial)  # type: ignore[arg-type]  # asked as a Trial is
    if suggestion.refused:
        raise OutOfSpaceError(f"{suggestion.refused}.")
    try:
        config.trial(suggestion.values, seed=0)
    except ConfigError as error:
        raise OutOfSpaceError(str(error).removeprefix(f"{config.name}: ")) from None
    return FittedParams(dict(trial.params), dict(trial.distributions), suggestion.values)


def inside(name: str, value: Any, distribution: BaseDistribution) -> Any:
    """Return the value in the type that Optuna stores it in. Raises Misfit where it is none of the distribution's."""
    try:
        if isinstance(distribution, CategoricalDistribution):
            same = [
                choice
                for choice in distribution.choices
                if type(choice) is type(value) and choice == value
            ]
            return (same or [choice for choice in distribution.choices if choice == value])[0]
        if isinstance(value, bool | str):
            raise ValueError
        internal = distribution.to_internal_repr(value)
        if not distribution._contains(internal):
            raise ValueError
        return distribution.to_external_repr(internal)
    except (ValueError, TypeError, IndexError):
        raise OutOfSpaceError(
            f"{name}={value} lies outside of the space, which has {words(distribution)}."
        ) from None


def words(distribution: BaseDistribution) -> str:
    """What a distribution holds, as `0.2 to 0.5` or `hard, soft`."""
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(map(str, distribution.choices))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    step = distribution.step if distribution.step not in (None, 1) else None
    return f"{distribution.low:g} to {distribution.high:g}" + (
        f" in steps of {step:g}" if step else ""
    )


def range_words(parameter: Parameter) -> str:
    """What a parameter of a space may be, as `0.2 to 0.5`, `hard, soft` or `= ratio.start + delta`."""
    if isinstance(parameter, Fixed):
        text = f"= {parameter.value}"
    elif isinstance(parameter, Derived):
        text = f"= {parameter.expression}"
    elif isinstance(parameter, Choice):
        text = ", ".join(map(str, parameter.choices))
    else:
        text = f"{parameter.low:g} to {parameter.high:g}" + (
            f" in steps of {parameter.step:g}" if parameter.step else ""
        )
        text += ", logarithmic" if parameter.log else ""
    return text + (
        f" (when {', '.join(f'{k} is {v}' for k, v in parameter.when.items())})"
        if parameter.when
        else ""
    )
