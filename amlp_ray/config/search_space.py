"""Settings of a search space: what may stand behind a name in `space`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, PositiveFloat, Tag, model_validator

from amlp_ray.config.base import Config

Scalar = str | int | float | bool


class Range(Config):
    """A numeric parameter of a search space."""

    low: float
    """Lower bound, inside the range of the setting itself."""
    high: float
    """Upper bound, inside that range too, and above `low`."""
    log: bool = False
    """Sample on a log scale; needs low > 0 and no step."""
    step: PositiveFloat | None = None
    """Distance between values. null: any value between, or any integer."""
    default: float | None = None
    """A value between. If any parameter has one, the first trial uses all defaults, and the study's
    own value for a parameter without."""
    when: dict[str, Any] | None = None
    """Condition such as {"ratio.shape": "power"}: searched only in trials where it holds."""

    @model_validator(mode="after")
    def _check_order(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must lie below high {self.high:g}")
        if self.log and (self.low <= 0 or self.step):
            raise ValueError("log needs low > 0 and no step")
        if self.default is not None and not self.low <= self.default <= self.high:
            raise ValueError(f"default {self.default:g} lies outside {self.low:g} to {self.high:g}")
        return self


class Choice(Config):
    """A categorical parameter of a search space."""

    choices: list[Scalar | None] = Field(min_length=1)
    """Values, each accepted by the setting itself."""
    default: Scalar | None = None
    """One of the choices; used as the default of a range is."""
    when: dict[str, Any] | None = None
    """Condition, as in a range."""

    @model_validator(mode="after")
    def _check_choices(self) -> Choice:
        # True and 1 are equal, and yet two choices.
        unique = {(type(choice), choice) for choice in self.choices}
        if len(unique) < len(self.choices):
            raise ValueError(f"each choice is named once, not {self.choices}")
        if self.default is not None and self.default not in self.choices:
            raise ValueError(f"default {self.default!r} is none of the choices {self.choices}")
        return self


class Fixed(Config):
    """A value that is set and not searched, in the trials where `when` holds; `name: value` is
    short for it."""

    value: Scalar | None
    """Value, accepted by the setting itself."""
    when: dict[str, Any] | None = None
    """Condition, as in a range."""


class Derived(Config):
    """A value that follows from others, such as `ratio.start + delta`."""

    expression: str = Field(min_length=1)
    """Formula of names of settings and parameters, with + - * / // % **, comparisons, and, or, not,
    min, max, round, abs. A name that is no setting, such as delta, is a helper: it is searched or
    fixed like a setting, and used by rules only."""
    when: dict[str, Any] | None = None
    """Condition, as in a range."""


def _kind(value: Any) -> str:
    if isinstance(value, Choice | Range | Fixed | Derived):
        return type(value).__name__.lower()
    for key, kind in (("choices", "choice"), ("value", "fixed"), ("expression", "derived")):
        if isinstance(value, Mapping) and key in value:
            return kind
    return "range"


Parameter = Annotated[
    Annotated[Range, Tag("range")]
    | Annotated[Choice, Tag("choice")]
    | Annotated[Fixed, Tag("fixed")]
    | Annotated[Derived, Tag("derived")],
    Discriminator(_kind),
]


def function_name(function: Callable[..., Any]) -> str:
    """Return the `module:function` that a space in Python is stored as.

    Raises:
        ValueError: another process cannot import the function.
    """
    module, name = function.__module__, function.__qualname__
    if module == "__main__" or not name.isidentifier():
        raise ValueError(
            f"space: {name} of {module} cannot be imported by another process; "
            f"give a function at the top of a module, no lambda and none of a notebook or script"
        )
    return f"{module}:{name}"
