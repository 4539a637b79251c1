"""Answer a search space with given parameters, as an Optuna trial answers it with sampled ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FixedTrial

from amlp_ray.errors import ConfigError
from amlp_ray.study.search_space.parameters import describe_range
from amlp_ray.study.storage.optuna_internals import contains

Fill = Callable[[str, BaseDistribution], Any]


class OutOfSpaceError(ConfigError):
    """Parameters lie outside of a space; the message says which and what the space has."""


class GivenTrial(FixedTrial):
    """A trial whose parameters are given."""

    def __init__(
        self, params: Mapping[str, Any], *, fill: Fill | None = None, check: bool = True
    ) -> None:
        """Set up the trial.

        Args:
            fill: gives a parameter that is missing. Without it, OutOfSpaceError is raised.
            check: whether OutOfSpaceError is raised for a parameter outside of its range. Not for
                a stored trial, whose space may have changed since.
        """
        super().__init__(dict(params))
        self._given = params
        self._fill = fill
        self._check = check
        self._answers: dict[str, Any] = {}
        self._ranges: dict[str, BaseDistribution] = {}

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Return the parameter of this name."""
        return self._answer(name, FloatDistribution(low, high, log=log, step=step))

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        """Return the parameter of this name."""
        return self._answer(name, IntDistribution(low, high, log=log, step=step))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return the parameter of this name."""
        return self._answer(name, CategoricalDistribution(choices=choices))

    @property
    def params(self) -> dict[str, Any]:
        """Return the parameters that were suggested."""
        return self._answers

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the range of each parameter that was suggested."""
        return self._ranges

    def _answer(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self._answers:
            if name in self._given:
                value = self._given[name]
            elif self._fill is not None:
                value = self._fill(name, distribution)
            else:
                raise OutOfSpaceError(
                    f"{name} is missing; the space has {describe_distribution(distribution)}."
                )
            self._answers[name] = fit_value(name, value, distribution) if self._check else value
        self._ranges[name] = distribution
        return self._answers[name]


def fit_value(name: str, value: Any, distribution: BaseDistribution) -> Any:
    """Return a value in the type that Optuna stores it in.

    Raises:
        OutOfSpaceError: the distribution cannot yield it.
    """
    if isinstance(distribution, CategoricalDistribution):
        # 1 is not True where both are choices.
        equal = [choice for choice in distribution.choices if choice == value]
        of_same_type = [choice for choice in equal if type(choice) is type(value)]
        if equal:
            return (of_same_type or equal)[0]
    elif not isinstance(value, bool | str) and contains(distribution, value):
        return distribution.to_external_repr(distribution.to_internal_repr(value))
    raise OutOfSpaceError(
        f"{name}={value} lies outside of the space, which has "
        f"{describe_distribution(distribution)}."
    )


def describe_distribution(distribution: BaseDistribution) -> str:
    """Describe a distribution, such as `0.2 to 0.5` or `hard, soft`."""
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(map(str, distribution.choices))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    step = distribution.step if distribution.step != 1 else None
    return describe_range(distribution.low, distribution.high, step)
