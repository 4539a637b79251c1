"""Find mistakes in a declared search space, parameter by parameter, before anything is sampled."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amlp_ray.config import Choice, Derived, Fixed, Parameter, PretrainConfig, Range
from amlp_ray.config.base import ConfigIssue, build, nearest_name, rejection_reason
from amlp_ray.config.overrides import nest
from amlp_ray.errors import ConfigError
from amlp_ray.study.search_space.expressions import Expression, ExpressionError
from amlp_ray.study.search_space.parameters import (
    LAYERS,
    SETTINGS,
    annotation,
    as_list,
    describe_circle,
    equals,
    is_integer,
    is_whole_steps,
    needs,
    sort_by_needs,
)

GROUPS = {name.partition(".")[0] for name in SETTINGS if "." in name}
_KINDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number"}
_MAX_COMBINATIONS = 200  # of conditions that are tried


@dataclass(frozen=True)
class DeclaredSpace:
    """A space as a study file declares it.

    Args:
        parameters: those that could be read.
        require: requirements of the study.
        base: the study's own settings by dotted name; None if these have mistakes.
        unread: names of the other parameters, about which nothing is known.
    """

    parameters: Mapping[str, Parameter]
    require: Sequence[str]
    base: Mapping[str, Any] | None
    unread: Collection[str] = ()

    def issues(self) -> list[ConfigIssue]:
        """Return every mistake that shows without a sample, each with the key that it is about."""
        expressions = [_read(text) for _, _, text in self._rules()]
        used = {name for expression in expressions if expression for name in expression.names}
        for parameter in self.parameters.values():
            used |= set(parameter.when or {})
        # A rule that cannot be read may use any helper.
        is_any_used = bool(self.unread) or None in expressions
        _, circle = sort_by_needs({name: _needs(name, p) for name, p in self.parameters.items()})
        issues = [issue for rule in self._rules() for issue in self._rule_issues(*rule)]
        for name, parameter in self.parameters.items():
            if text := self._name_issue(name, is_used=name in used or is_any_used):
                issues.append(ConfigIssue(f"space.{name}", text))
                continue
            for key, text in _value_issues(name, parameter):
                issues.append(ConfigIssue(f"space.{name}.{key}", text))
            issues += self._condition_issues(name, parameter, is_circular=bool(circle))
        if circle:
            issues.append(ConfigIssue(f"space.{circle[0]}", describe_circle(circle)))
        return [ConfigIssue(issue.key, f"space: {issue.text}") for issue in issues]

    # Names

    def _is_known(self, name: str) -> bool:
        return name in SETTINGS or name in self.parameters or name in self.unread

    def _hint(self, name: str) -> str:
        """Return the end of a message about an unknown name: what may have been meant."""
        others = [other for other in self.parameters if other not in SETTINGS and other != name]
        helpers = [other for other in others if "." not in other]
        near = nearest_name(name, [*SETTINGS, *helpers])
        return f"; did you mean {near}?" if near else "."

    def _name_issue(self, name: str, *, is_used: bool) -> str | None:
        if name == "seed":
            return (
                "seed is not searched; a trial's seed follows from the study's seed and its number."
            )
        if name in SETTINGS:
            return None
        if name in GROUPS:
            example = next(other for other in SETTINGS if other.startswith(f"{name}."))
            return (
                f"{name} is a group; give one of its settings with its dotted name, such as "
                f"{example}."
            )
        hint = self._hint(name)
        if "." not in name:
            if is_used:
                return None
            if hint == ".":
                hint = "; a helper must be used by an expression, `when` or `require`."
            else:
                hint = f", and no rule uses it{hint}"
        return f"unknown setting {name!r}{hint}"

    # Rules: expressions and requirements

    def _rules(self) -> Iterator[tuple[str, str, str]]:
        """Yield the key, name and text of each expression and requirement."""
        for name, parameter in self.parameters.items():
            if isinstance(parameter, Derived):
                yield f"space.{name}.expression", name, parameter.expression
        for i, text in enumerate(self.require):
            yield f"require.{i}", "require", text

    def _rule_issues(self, key: str, name: str, text: str) -> Iterator[ConfigIssue]:
        try:
            expression = Expression(text)
        except ExpressionError as error:
            yield ConfigIssue(key, f"{name}: {error}.")
            return
        unknown = [used for used in expression.names if not self._is_known(used)]
        for used in unknown:
            hint = self._hint(used)
            problem = f"{text!r} names {used!r}, which is no setting or helper{hint}"
            yield ConfigIssue(key, f"{name}: {problem}")
        if unknown or not key.startswith("require."):
            return
        if not expression.is_condition:
            problem = f"{text!r} is no condition; compare with <, <=, >, >=, == or !=."
            yield ConfigIssue(key, f"require: {problem}")
        elif not any(used in self.parameters or used in self.unread for used in expression.names):
            problem = f"{text!r} names nothing that the space sets; it is true or false always."
            yield ConfigIssue(key, f"require: {problem}")

    # Conditions

    def _condition_issues(
        self, name: str, parameter: Parameter, *, is_circular: bool
    ) -> list[ConfigIssue]:
        if parameter.when is None:
            return []
        key = f"space.{name}.when"
        issues: list[ConfigIssue] = []
        if not parameter.when:
            text = f"{name} has an empty condition; leave `when` out, or say when."
            issues.append(ConfigIssue(key, text))
        for other, allowed in parameter.when.items():
            for text in self._allowed_issues(name, other, allowed, is_circular=is_circular):
                issues.append(ConfigIssue(f"{key}.{other}", text))
        if not issues and not is_circular and not self._combinations(name):
            text = f"{name} is never searched, since its conditions rule each other out."
            issues.append(ConfigIssue(key, text))
        return issues

    def _allowed_issues(
        self, name: str, other: str, allowed: Any, *, is_circular: bool
    ) -> list[str]:
        """Return what is wrong with the values of another parameter that a condition allows."""
        values = as_list(allowed)
        if not self._is_known(other):
            return [f"{name} depends on {other!r}, which is no setting{self._hint(other)}"]
        if not values:
            return [f"{name} depends on {other}, but no value of it is named."]
        if other in SETTINGS:
            refused = [text for value in values if (text := value_issue(other, value))]
            if refused:
                return [f"{name} is never searched when {text}" for text in refused]
        if is_circular or any(self._is_possible(other, value) for value in values):
            return []
        parameter = self.parameters.get(other)
        actual = ""
        if parameter is None and self.base is not None:
            actual = f" (it is {self.base[other]!r} in every trial)"
        elif isinstance(parameter, Choice):
            actual = f" (it can be {parameter.choices})"
        elif isinstance(parameter, Range):
            actual = f" (it is drawn from {parameter.low:g} to {parameter.high:g})"
        return [f"{name} is never searched, since {other} is never {allowed!r}{actual}."]

    def _is_possible(self, name: str, value: Any) -> bool:
        """Return whether a setting or helper has a value in some trial."""
        parameter = self.parameters.get(name)
        if parameter is not None and _may_be(name, parameter, value):
            return True
        return self._is_possible_unasked(name, value)

    def _is_possible_unasked(self, name: str, value: Any) -> bool:
        """Return whether it has the value in a trial that has the study's own instead."""
        if name in self.unread:
            return True
        if name not in SETTINGS:
            return False
        if name in self.parameters and not self.parameters[name].when:
            return False
        layers_change = any(layer in self.parameters or layer in self.unread for layer in LAYERS)
        if self.base is None or layers_change:
            return True  # which value it has is not known
        return equals(self.base[name], value)

    def _combinations(self, name: str) -> list[dict[str, Any]]:
        """Return values of others with which a parameter is asked for.

        Empty if its conditions contradict each other.
        """
        combinations: list[dict[str, Any]] = [{}]
        for other, allowed in (self.parameters[name].when or {}).items():
            options = []
            for value in as_list(allowed):
                parameter = self.parameters.get(other)
                if parameter is not None and _may_be(other, parameter, value):
                    for combination in self._combinations(other):
                        options.append({**combination, other: value})
                if self._is_possible_unasked(other, value):
                    options.append({other: value})
            pairs = itertools.product(combinations, options)
            merged = (a | b for a, b in pairs if _agree(a, b))
            combinations = list(itertools.islice(merged, _MAX_COMBINATIONS))
        return combinations


def _agree(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return all(first.get(name, value) == value for name, value in second.items())


def value_issue(name: str, value: Any) -> str | None:
    """Return why a setting cannot have a value; None if it can.

    This is stricter than a config file: "yes" is not true.
    """
    kind = annotation(name)
    is_wrong_kind = isinstance(value, bool) != (kind is bool) or isinstance(value, str)
    if kind in _KINDS and is_wrong_kind:
        return f"{name} is {value!r}, but must be {_KINDS[kind]}."
    if name in LAYERS and value is not None:
        # These change the defaults of others, so the whole config must be valid.
        try:
            build(PretrainConfig, nest({name: value}), name)
        except ConfigError as error:
            return error.messages[0].removeprefix(f"{name}: ")
    return rejection_reason(PretrainConfig, name, value)


def _value_issues(name: str, parameter: Parameter) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a parameter's values, after the key that it is about."""
    if isinstance(parameter, Range):
        yield from _range_issues(name, parameter)
        return
    values: dict[str, Any] = {}
    if isinstance(parameter, Fixed):
        values = {"value": parameter.value}
    elif isinstance(parameter, Choice):
        values = {f"choices.{i}": value for i, value in enumerate(parameter.choices)}
    for key, value in values.items() if name in SETTINGS else ():
        if text := value_issue(name, value):
            yield key, text


def _range_issues(name: str, parameter: Range) -> Iterator[tuple[str, str]]:
    if name in SETTINGS and annotation(name) not in (int, float):
        takes = "words" if isinstance(SETTINGS[name], str | None) else "lists"
        if annotation(name) is bool:
            takes = "true or false"
        yield "low", f"{name} takes {takes}; give choices instead of a range."
        return
    numbers = {}
    for part in ("low", "high", "step", "default"):
        if getattr(parameter, part) is not None:
            numbers[part] = getattr(parameter, part)
    if is_integer(name):
        fractions = [part for part, value in numbers.items() if not float(value).is_integer()]
        if fractions:
            text = f"{name} is an integer; give {', '.join(fractions)} without a fraction."
            yield fractions[0], text
            return
    if name in SETTINGS:
        for part in ("low", "high"):
            value = int(numbers[part]) if is_integer(name) else numbers[part]
            if refusal := value_issue(name, value):
                yield part, refusal
    if not parameter.step:
        return
    low = parameter.low
    high = parameter.high
    step = parameter.step
    default = parameter.default
    if not is_whole_steps(high - low, step):
        text = f"steps of {step:g} from {low:g} do not end at {high:g}; change step or high."
        yield "step", f"{name}: {text}"
    elif default is not None and not is_whole_steps(default - low, step):
        yield "default", f"{name}: default {default:g} is no step of {step:g} from {low:g}."


def _may_be(name: str, parameter: Parameter, value: Any) -> bool:
    """Return whether a parameter can have a value; a range without steps meets none exactly."""
    if isinstance(parameter, Choice):
        return any(equals(choice, value) for choice in parameter.choices)
    if isinstance(parameter, Fixed):
        return equals(parameter.value, value)
    if isinstance(parameter, Derived):
        return True
    step = parameter.step or (1 if is_integer(name) else None)
    if step is None or isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not parameter.low <= value <= parameter.high + 1e-9:
        return False
    return is_whole_steps(value - parameter.low, step)


def _read(text: str) -> Expression | None:
    try:
        return Expression(text)
    except ExpressionError:
        return None


def _needs(name: str, parameter: Parameter) -> set[str]:
    try:
        return needs(name, parameter)
    except ExpressionError:  # reported as an issue of its own
        return set(parameter.when or {})
