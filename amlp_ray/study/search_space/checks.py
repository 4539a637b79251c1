"""What is wrong with a space, parameter by parameter, before anything is drawn from it."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amlp_ray.config import Choice, Derived, Fixed, Parameter, PretrainConfig, Range
from amlp_ray.config.base import ConfigIssue, build, field_of, refusal
from amlp_ray.config.overrides import nested
from amlp_ray.errors import ConfigError
from amlp_ray.study.search_space.expressions import Expression, ExpressionError
from amlp_ray.study.search_space.space import (
    LAYERS,
    SETTINGS,
    circle_told,
    is_whole,
    needs,
    same,
    sorted_by_need,
)

GROUPS = {name.partition(".")[0] for name in SETTINGS if "." in name}
_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number"}
_WAYS = 200  # combinations of conditions that are looked through


@dataclass(frozen=True)
class DeclaredSpace:
    """A space as it is written.

    Args:
        parameters: those that could be read.
        unread: names of the others, about which nothing is known.
        base: the study's own settings by dotted name; None where they are at fault themselves.
    """

    parameters: Mapping[str, Parameter]
    require: Sequence[str]
    base: Mapping[str, Any] | None
    unread: Collection[str] = ()

    def faults(self) -> list[ConfigIssue]:
        """Every fault that shows without a draw, each with the key that it is about."""
        rules = dict(self._rules())
        read = {name for rule in rules.values() if rule for name in rule.names}
        read |= {name for p in self.parameters.values() for name in p.when or {}}
        # A rule that cannot be read may use any helper.
        unclear = bool(self.unread) or None in rules.values()
        _, circle = sorted_by_need({name: _needs(name, p) for name, p in self.parameters.items()})
        found = list(self._rule_faults())
        for name, parameter in self.parameters.items():
            if fault := self._name_fault(name, used=name in read or unclear):
                found.append(ConfigIssue(f"space.{name}", fault))
                continue
            found += _value_faults(name, parameter)
            found += self._condition_faults(name, parameter, circular=bool(circle))
        if circle:
            found.append(ConfigIssue(f"space.{circle[0]}", circle_told(circle)))
        return [ConfigIssue(fault.key, f"space: {fault.text}") for fault in found]

    def known(self, name: str) -> bool:
        return name in SETTINGS or name in self.parameters or name in self.unread

    def near(self, name: str) -> str:
        others = [
            other
            for other in self.parameters
            if other not in SETTINGS and "." not in other and other != name
        ]
        close = difflib.get_close_matches(name, [*SETTINGS, *others], n=1, cutoff=0.5)
        return f"; did you mean {close[0]}?" if close else "."

    def _name_fault(self, name: str, *, used: bool) -> str | None:
        if name == "seed":
            return (
                "seed is not searched; a trial's seed follows from the study's seed and its number."
            )
        if name in SETTINGS:
            return None
        if name in GROUPS:
            within = [other for other in SETTINGS if other.startswith(f"{name}.")]
            return f"{name} is a group; give one of its settings with its dotted name, such as {within[0]}."
        if used and "." not in name:
            return None
        hint = self.near(name) if "." in name else self.near_or_helper(name)
        return f"unknown setting {name!r}{hint}"

    def near_or_helper(self, name: str) -> str:
        hint = self.near(name)
        more = "a helper must be used by an expression, `when` or `require`"
        return f", and no rule uses it{hint}" if hint != "." else f"; {more}."

    # Rules: expressions and requirements

    def _rules(self) -> Iterator[tuple[str, Expression | None]]:
        texts = [
            (f"space.{n}.expression", p.expression)
            for n, p in self.parameters.items()
            if isinstance(p, Derived)
        ]
        for key, text in [*texts, *((f"require.{i}", text) for i, text in enumerate(self.require))]:
            try:
                yield key, Expression(text)
            except ExpressionError:
                yield key, None

    def _rule_faults(self) -> Iterator[ConfigIssue]:
        for name, parameter in self.parameters.items():
            if isinstance(parameter, Derived):
                yield from self._expression_faults(
                    f"space.{name}.expression", name, parameter.expression
                )
        for i, text in enumerate(self.require):
            key = f"require.{i}"
            yield from (faults := list(self._expression_faults(key, "require", text)))
            if faults:
                continue
            rule = Expression(text)
            if not rule.decides:
                yield ConfigIssue(
                    key, f"require: {text!r} is no condition; compare with <, <=, >, >=, == or !=."
                )
            elif not any(name in self.parameters or name in self.unread for name in rule.names):
                yield ConfigIssue(
                    key,
                    f"require: {text!r} names nothing that the space sets; it is true or false always.",
                )

    def _expression_faults(self, key: str, name: str, text: str) -> Iterator[ConfigIssue]:
        try:
            rule = Expression(text)
        except ExpressionError as error:
            yield ConfigIssue(key, f"{name}: {error}.")
            return
        for used in rule.names:
            if not self.known(used):
                yield ConfigIssue(
                    key,
                    f"{name}: {text!r} names {used!r}, which is no setting or helper{self.near(used)}",
                )

    # Conditions

    def _condition_faults(
        self, name: str, parameter: Parameter, *, circular: bool
    ) -> list[ConfigIssue]:
        if parameter.when is None:
            return []
        key, found = f"space.{name}.when", []
        if not parameter.when:
            found.append(
                ConfigIssue(key, f"{name} has an empty condition; leave `when` out, or say when.")
            )
        for on, wanted in parameter.when.items():
            at, values = f"{key}.{on}", _listed(wanted)
            if not self.known(on):
                found.append(
                    ConfigIssue(at, f"{name} depends on {on!r}, which is no setting{self.near(on)}")
                )
            elif not values:
                found.append(
                    ConfigIssue(at, f"{name} depends on {on}, but no value of it is named.")
                )
            elif wrong := [
                fault for value in values if on in SETTINGS and (fault := wrong_value(on, value))
            ]:
                found += [
                    ConfigIssue(at, f"{name} is never searched when {text}") for text in wrong
                ]
            elif not circular and not any(self._possible(on, value) for value in values):
                can = self.parameters.get(on)
                it = f" (it can be {can.choices})" if isinstance(can, Choice) else ""
                if on not in self.parameters and self.base is not None:
                    it = f" (it is {self.base[on]!r} in every trial)"
                elif isinstance(can, Range):
                    it = f" (it is drawn from {can.low:g} to {can.high:g})"
                found.append(
                    ConfigIssue(
                        at, f"{name} is never searched, since {on} is never {wanted!r}{it}."
                    )
                )
        if not found and not circular and not self._ways(name):
            found.append(
                ConfigIssue(
                    key, f"{name} is never searched, since its conditions rule each other out."
                )
            )
        return found

    def _possible(self, on: str, value: Any) -> bool:
        """Whether something may have a value at all, in some trial."""
        parameter = self.parameters.get(on)
        return (parameter is not None and _may_be(on, parameter, value)) or self._possible_unasked(
            on, value
        )

    def _possible_unasked(self, on: str, value: Any) -> bool:
        """Whether it may have the value in trials that do not ask for it, where it is the study's own."""
        if on in self.unread:
            return True
        if on not in SETTINGS or (on in self.parameters and not self.parameters[on].when):
            return False
        if self.base is None or any(
            layer in self.parameters or layer in self.unread for layer in LAYERS
        ):
            return True  # which value is not known
        return same(self.base[on], value)

    def _ways(self, name: str) -> list[dict[str, Any]]:
        """Values of others with which a parameter is asked for; none where conditions contradict each other."""
        ways: list[dict[str, Any]] = [{}]
        for on, wanted in (self.parameters[name].when or {}).items():
            options = []
            for value in _listed(wanted):
                parameter = self.parameters.get(on)
                if parameter is not None and _may_be(on, parameter, value):
                    options += [{**way, on: value} for way in self._ways(on)]
                if self._possible_unasked(on, value):
                    options.append({on: value})
            pairs = itertools.product(ways, options)
            merged = (a | b for a, b in pairs if all(a.get(k, v) == v for k, v in b.items()))
            ways = list(itertools.islice(merged, _WAYS))
        return ways


def wrong_value(name: str, value: Any) -> str | None:
    """Why a setting cannot have a value; nothing where it can. Stricter than a file is: no "yes" for true."""
    kind = field_of(PretrainConfig, name).annotation
    if kind in _WORDS and (isinstance(value, bool) != (kind is bool) or isinstance(value, str)):
        return f"{name} is {value!r}, but must be {_WORDS[kind]}."
    if (
        name in LAYERS and value is not None
    ):  # what they lay under others must be known, and goes together
        try:
            build(PretrainConfig, nested({name: value}), name)
        except ConfigError as error:
            return error.faults[0].removeprefix(f"{name}: ")
    return refusal(PretrainConfig, name, value)


def _value_faults(name: str, parameter: Parameter) -> list[ConfigIssue]:
    key = f"space.{name}"
    if isinstance(parameter, Derived):
        return []
    if isinstance(parameter, Range):
        return [ConfigIssue(f"{key}.{part}", text) for part, text in _range_faults(name, parameter)]
    if name not in SETTINGS:
        return []
    if isinstance(parameter, Fixed):
        text = wrong_value(name, parameter.value)
        return [ConfigIssue(f"{key}.value", text)] if text else []
    tried = [(i, wrong_value(name, value)) for i, value in enumerate(parameter.choices)]
    return [ConfigIssue(f"{key}.choices.{i}", text) for i, text in tried if text]


def _range_faults(name: str, parameter: Range) -> Iterator[tuple[str, str]]:
    if name in SETTINGS:
        kind = field_of(PretrainConfig, name).annotation
        if kind not in (int, float):
            takes = (
                "true or false"
                if kind is bool
                else "words"
                if isinstance(SETTINGS[name], str | None)
                else "lists"
            )
            yield "low", f"{name} takes {takes}; give choices instead of a range."
            return
    numbers = {part: getattr(parameter, part) for part in ("low", "high", "step", "default")}
    given = {part: value for part, value in numbers.items() if value is not None}
    if is_whole(name) and (
        odd := [part for part, value in given.items() if not float(value).is_integer()]
    ):
        yield odd[0], f"{name} is an integer; give {', '.join(odd)} without a fraction."
        return
    for part in ("low", "high") if name in SETTINGS else ():
        value = given[part]
        if text := wrong_value(name, int(value) if is_whole(name) else value):
            yield part, text
    if parameter.step:
        low, high, step = parameter.low, parameter.high, parameter.step
        if not _is_step(high - low, step):
            yield (
                "step",
                f"{name}: steps of {step:g} from {low:g} do not end at {high:g}; change step or high.",
            )
        elif parameter.default is not None and not _is_step(parameter.default - low, step):
            yield (
                "default",
                f"{name}: default {parameter.default:g} is no step of {step:g} from {low:g}.",
            )


def _is_step(span: float, step: float) -> bool:
    return abs(span / step - round(span / step)) < 1e-6


def _may_be(name: str, parameter: Parameter, value: Any) -> bool:
    """Whether a parameter can take a value; of a range without steps none is ever hit."""
    if isinstance(parameter, Choice):
        return any(same(choice, value) for choice in parameter.choices)
    if isinstance(parameter, Fixed):
        return same(parameter.value, value)
    if isinstance(parameter, Derived):
        return True
    step = parameter.step or (1 if is_whole(name) else None)
    if step is None or isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return parameter.low <= value <= parameter.high + 1e-9 and _is_step(value - parameter.low, step)


def _needs(name: str, parameter: Parameter) -> set[str]:
    try:
        return needs(name, parameter)
    except ExpressionError:  # told as a fault of its own
        return set(parameter.when or {})


def _listed(wanted: Any) -> list[Any]:
    return wanted if isinstance(wanted, list) else [wanted]
