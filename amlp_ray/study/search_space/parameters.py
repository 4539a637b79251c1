"""Facts about the parameters of a declared space: settings, order, values and descriptions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from amlp_ray.config import Choice, Derived, Fixed, Parameter, PretrainConfig, Range
from amlp_ray.config.base import find_field
from amlp_ray.config.overrides import flatten
from amlp_ray.errors import ConfigError
from amlp_ray.study.search_space.expressions import Expression

# Every setting that may be searched, and its default.
SETTINGS: Mapping[str, Any] = flatten(PretrainConfig())
# Settings that change the defaults of others.
LAYERS = ("variant", "model.encoder")
STEP_TOLERANCE = 1e-6  # share of a step


def annotation(name: str) -> Any:
    """Return the type of a setting."""
    return find_field(PretrainConfig, name).annotation


def is_integer(name: str) -> bool:
    """Return whether a setting takes integers only; helpers take any number."""
    return name in SETTINGS and annotation(name) is int


def equals(value: Any, other: Any) -> bool:
    """Compare values for conditions: three steps of 0.1 are 0.3."""
    if isinstance(value, float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=1e-9)
    return bool(value == other)


def as_list(values: Any) -> list[Any]:
    """Return the values that a condition allows as a list."""
    return values if isinstance(values, list) else [values]


def is_whole_steps(span: float, step: float) -> bool:
    """Return whether a span is a whole number of steps."""
    return abs(span / step - round(span / step)) < STEP_TOLERANCE


def is_inside(parameter: Range | Choice, value: Any) -> bool:
    """Return whether a parameter can be sampled with this value."""
    if isinstance(parameter, Choice):
        return any(type(choice) is type(value) and choice == value for choice in parameter.choices)
    if not parameter.low <= value <= parameter.high:
        return False
    return parameter.step is None or is_whole_steps(value - parameter.low, parameter.step)


# Order: a parameter is sampled after those that its condition or expression reads


def needs(name: str, parameter: Parameter) -> set[str]:
    """Return the names that a parameter's condition or expression reads.

    Raises:
        ExpressionError: the expression cannot be read.
    """
    names = set(parameter.when or {})
    if isinstance(parameter, Derived):
        names |= set(Expression(parameter.expression).names)
    if not names or name == "variant":
        return names
    # What is not searched has a default, which follows from these.
    return names | set(LAYERS[: LAYERS.index(name)] if name in LAYERS else LAYERS)


def sampling_order(space: Mapping[str, Parameter]) -> list[str]:
    """Return the names as they are declared, but each after those that it needs.

    Raises:
        ConfigError: parameters need each other in a circle.
    """
    order, circle = sort_by_needs({name: needs(name, p) for name, p in space.items()})
    if circle:
        raise ConfigError(f"space: {describe_circle(circle)}", keys=[f"space.{circle[0]}"])
    return order


def sort_by_needs(needed: Mapping[str, set[str]]) -> tuple[list[str], list[str]]:
    """Sort names so that each comes after those that it needs.

    Args:
        needed: by name, the names that it needs.

    Returns:
        The order, and the names in a circle, which have none.
    """
    order: list[str] = []
    left = {name: names & needed.keys() for name, names in needed.items()}
    while ready := next((name for name in left if not left[name] & left.keys()), None):
        order.append(ready)
        del left[ready]
    # Names that nothing needs are in no circle, but behind one.
    while unneeded := left.keys() - set().union(*left.values()):
        for name in unneeded:
            del left[name]
    return order, list(left)


def describe_circle(circle: list[str]) -> str:
    """Say that parameters depend on each other."""
    if len(circle) == 1:
        return f"{circle[0]} depends on itself."
    return f"{', '.join(circle)} depend on each other in a circle, by `when` or `expression`."


def describe_parameter(parameter: Parameter) -> str:
    """Describe a parameter, such as `0.2 to 0.5`, `hard, soft` or `= ratio.start + delta`."""
    if isinstance(parameter, Fixed):
        text = f"= {parameter.value}"
    elif isinstance(parameter, Derived):
        text = f"= {parameter.expression}"
    elif isinstance(parameter, Choice):
        text = ", ".join(map(str, parameter.choices))
    else:
        text = describe_range(parameter.low, parameter.high, parameter.step)
        text += ", logarithmic" if parameter.log else ""
    if parameter.when:
        conditions = [f"{name} is {value}" for name, value in parameter.when.items()]
        text += f" (when {', '.join(conditions)})"
    return text


def describe_range(low: float, high: float, step: float | None) -> str:
    """Describe a range, such as `2 to 8 in steps of 2`."""
    text = f"{low:g} to {high:g}"
    return f"{text} in steps of {step:g}" if step else text
