"""What a space asks of Optuna in a trial, and the settings that follow: conditions, fixed and derived values, rules.

A space is worked out once per study (`space_of`), since a sampler asks it thousands of times.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import Trial

from amlp_ray.config import (
    Choice,
    Derived,
    Fixed,
    Parameter,
    PretrainConfig,
    Range,
    StudyConfig,
)
from amlp_ray.config.base import field_of
from amlp_ray.config.overrides import flat
from amlp_ray.errors import ConfigError
from amlp_ray.study.search_space.expressions import Expression, ExpressionError

DRAWS = 100  # what one in fifty combinations refuses is found with 87 % probability, within a fifth of a second
SETTINGS: Mapping[str, Any] = flat(
    PretrainConfig()
)  # every setting that may be searched, and its default
LAYERS = ("variant", "model.encoder")  # settings that lay values under others


@dataclass(frozen=True)
class SuggestedConfig:
    """What a space made of a trial."""

    values: dict[
        str, Any
    ]  # settings by dotted name, fixed and derived ones included: for `StudyConfig.trial`
    params: dict[str, Any]  # what Optuna was asked for, helpers included
    invalid: tuple[
        str, ...
    ] = ()  # why they are no settings: expressions that give nothing, a function's refusal
    broken: str | None = None  # the requirement that they do not keep

    @property
    def refused(self) -> str | None:
        """Why no trial may have them; nothing where one may."""
        return next(iter(self.invalid), self.broken)


@dataclass(frozen=True)
class SampledTrial:
    """A trial drawn at random, to check a space with."""

    suggestion: SuggestedConfig
    distributions: Mapping[str, BaseDistribution]


class SearchSpace:
    """The space of a study, ready to be asked.

    Raises:
        ConfigError: a circle, an expression that cannot be read, or a function that cannot be imported.
    """

    def __init__(self, config: StudyConfig) -> None:
        self._settings = config
        declared = config.space if isinstance(config.space, dict) else {}
        self.function = load_function(config.space) if isinstance(config.space, str) else None
        self._rules = {
            n: _read(n, p.expression) for n, p in declared.items() if isinstance(p, Derived)
        }
        self.requirements = tuple(_read("require", text) for text in config.require)
        self.parameters = {name: declared[name] for name in order_of_asking(declared)}
        self._bases: dict[tuple[Any, ...], dict[str, Any]] = {}

    def ask(self, trial: Trial) -> SuggestedConfig:
        """Ask Optuna for every parameter whose condition holds. A trial that was asked before answers the same."""
        if self.function is not None:
            return self._ask_function(self.function, trial)
        return self.walk(lambda name, parameter: _ask(trial, name, parameter))

    def walk(self, answer: Callable[[str, Range | Choice], Any]) -> SuggestedConfig:
        """Go through a declared space, where `answer` gives the value of a searched parameter."""
        at_hand: dict[str, Any] = {}
        params: dict[str, Any] = {}
        invalid: dict[str, str] = {}
        for name, parameter in self.parameters.items():
            if parameter.when and not self._holds(parameter.when, at_hand):
                continue
            if isinstance(parameter, Derived):
                rule = self._rules[name]
                if invalid.keys() & set(rule.names):
                    continue  # told of the name that it follows from
                try:
                    at_hand[name] = _as_setting(name, rule(lambda n: self._look(n, at_hand)))
                except ExpressionError as error:
                    invalid[name] = f"{name}: {error}"
            elif isinstance(parameter, Fixed):
                at_hand[name] = parameter.value
            else:
                at_hand[name] = params[name] = answer(name, parameter)
        values = {name: value for name, value in at_hand.items() if name in SETTINGS}
        return SuggestedConfig(
            values, params, tuple(invalid.values()), self.broken_requirement(at_hand)
        )

    def broken_requirement(self, at_hand: Mapping[str, Any]) -> str | None:
        """What the values of a trial, helpers among them, break; nothing where all holds.

        A requirement of a helper that the trial has not says nothing about the trial.
        """
        for rule in self.requirements:
            if not all(name in at_hand or name in SETTINGS for name in rule.names):
                continue
            try:
                if not rule(lambda n: self._look(n, at_hand)):
                    return f"require {rule.text!r} does not hold"
            except ExpressionError as error:
                return f"require: {error}"
        return None

    @cached_property
    def draws(self) -> tuple[SampledTrial, ...]:
        """Trials at random, the same for the same space."""
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
        drawn = []
        for _ in range(DRAWS if self.parameters or self.function else 1):
            trial = study.ask()
            suggestion = self.ask(trial)
            drawn.append(SampledTrial(suggestion, trial.distributions))
        return tuple(drawn)

    def base(self, at_hand: Mapping[str, Any]) -> dict[str, Any]:
        """All settings of the study as they are before a trial's own, which a searched variant changes."""
        layers = tuple((name, at_hand[name]) for name in LAYERS if name in at_hand)
        if layers not in self._bases:
            self._bases[layers] = flat(self._settings.trial(dict(layers), seed=0))
        return self._bases[layers]

    def _look(self, name: str, at_hand: Mapping[str, Any]) -> Any:
        if name in at_hand:
            return at_hand[name]
        if name not in SETTINGS:
            raise ExpressionError(
                f"{name} is not asked for in trials that need it; give both the same `when`"
            )
        return self.base(at_hand)[name]

    def _holds(self, when: Mapping[str, Any], at_hand: Mapping[str, Any]) -> bool:
        for on, wanted in when.items():
            if (
                on not in at_hand and on not in SETTINGS
            ):  # a helper that is not asked for in this trial
                return False
            value = self._look(on, at_hand)
            if not any(
                same(value, one) for one in (wanted if isinstance(wanted, list) else [wanted])
            ):
                return False
        return True

    def _ask_function(self, function: Callable[[Trial], Any], trial: Trial) -> SuggestedConfig:
        invalid: tuple[str, ...] = ()
        more = None
        try:
            more = function(trial)
        except (optuna.TrialPruned, ExpressionError) as error:
            invalid = (str(error) or f"{self._settings.space} refuses them",)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"space: {self._settings.space} failed: {type(error).__name__}: {error}."
            ) from error
        if not isinstance(more, Mapping | None):
            raise ConfigError(
                f"space: {self._settings.space} returned {type(more).__name__}; it may return nothing, or a mapping of "
                f"settings by dotted name."
            )
        params = dict(trial.params)
        at_hand = {**params, **(more or {})}
        # A dotted name that is no setting is misspelt, and left in for the settings to refuse.
        values = {
            name: value
            for name, value in at_hand.items()
            if name in SETTINGS or "." in name or name not in params
        }
        return SuggestedConfig(values, params, invalid, self.broken_requirement(at_hand))


class _Same:
    """A study's settings as a key: these very ones, since mappings inside them have no hash."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config

    def __hash__(self) -> int:
        return id(self.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.config is self.config


def space_of(config: StudyConfig) -> SearchSpace:
    """The space of a study, worked out once. Raises ConfigError as `Space` does."""
    return _space_of(_Same(config))


@lru_cache(maxsize=16)
def _space_of(key: _Same) -> SearchSpace:
    return SearchSpace(key.config)


def needs(name: str, parameter: Parameter) -> set[str]:
    """Names that a parameter's condition or expression reads; ExpressionError where that cannot be read."""
    names = set(parameter.when or {})
    if isinstance(parameter, Derived):
        names |= set(Expression(parameter.expression).names)
    if names and name != "variant":
        names |= set(
            LAYERS[: LAYERS.index(name)] if name in LAYERS else LAYERS
        )  # what is not searched rests on these
    return names


def order_of_asking(space: Mapping[str, Parameter]) -> list[str]:
    """Names as they are written, but each after those it needs. Raises ConfigError for a circle."""
    order, circle = sorted_by_need(
        {name: needs(name, parameter) for name, parameter in space.items()}
    )
    if circle:
        raise ConfigError(f"space: {circle_told(circle)}", keys=[f"space.{circle[0]}"])
    return order


def circle_told(circle: list[str]) -> str:
    if len(circle) == 1:
        return f"{circle[0]} depends on itself."
    return f"{', '.join(circle)} depend on each other in a circle, by `when` or `expression`."


def sorted_by_need(needed: Mapping[str, set[str]]) -> tuple[list[str], list[str]]:
    """Names in the order given, but each after those it needs; and those that no order suits."""
    order: list[str] = []
    left = {name: on & needed.keys() for name, on in needed.items()}
    while ready := next((name for name, on in left.items() if not on & left.keys()), None):
        order.append(ready)
        del left[ready]
    while loose := [
        name for name in left if not any(name in on for on in left.values())
    ]:  # at no circle, but behind one
        for name in loose:
            del left[name]
    return order, list(left)


def same(value: Any, wanted: Any) -> bool:
    """Equality for conditions: steps of 0.1 do not add up to 0.3 exactly."""
    if isinstance(value, float) and isinstance(wanted, int | float):
        return math.isclose(value, wanted, rel_tol=1e-9)
    return bool(value == wanted)


def is_whole(name: str) -> bool:
    """Whether a setting takes whole numbers only; helpers take any."""
    return name in SETTINGS and field_of(PretrainConfig, name).annotation is int


def load_function(reference: str, folder: Path | None = None) -> Callable[[Trial], Any]:
    """Import `module:function`, from `folder` or the working folder too.

    Raises:
        ConfigError: there is no such module or function, it fails, or another module of that name is in use.
    """
    module_name, _, name = reference.partition(":")
    folders = [str(place.absolute()) for place in (folder, Path()) if place is not None]
    before = list(sys.path)
    sys.path[:0] = folders
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        where = " or ".join(dict.fromkeys(folders))
        raise ConfigError(
            f"space: there is no module {missing!r} in {where} or among those installed; start where it lies, or put "
            f"its folder on PYTHONPATH."
        ) from None
    except Exception as error:
        raise ConfigError(
            f"space: module {module_name!r} fails: {type(error).__name__}: {error}."
        ) from error
    finally:
        sys.path[:] = before
    file = module_name.replace(".", "/") + ".py"
    if folder is not None and (folder / file).is_file() and not _is_from(module, folder / file):
        raise ConfigError(
            f"space: {folder / file} cannot be imported, since a module {module_name!r} is in use already, from "
            f"{getattr(module, '__file__', None) or 'Python itself'}; give it another name."
        )
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"space: module {module_name!r} has no function {name!r}.")
    return function


def _is_from(module: Any, file: Path) -> bool:
    found = getattr(module, "__file__", None)
    return found is not None and Path(found).resolve() == file.resolve()


def _read(name: str, text: str) -> Expression:
    try:
        return Expression(text)
    except ExpressionError as error:
        raise ConfigError(f"space: {name}: {error}.") from None


def _ask(trial: Trial, name: str, parameter: Range | Choice) -> Any:
    if isinstance(parameter, Choice):
        return trial.suggest_categorical(name, parameter.choices)
    if is_whole(name):
        step = int(parameter.step or 1)
        return trial.suggest_int(
            name, int(parameter.low), int(parameter.high), log=parameter.log, step=step
        )
    return trial.suggest_float(
        name, parameter.low, parameter.high, log=parameter.log, step=parameter.step
    )


def _as_setting(name: str, value: Any) -> Any:
    """A derived value in the type of its setting; 3.9999999 epochs are 4."""
    if name not in SETTINGS:
        return value
    if is_whole(name) and not isinstance(value, bool) and isinstance(value, int | float):
        if abs(value - round(value)) > 1e-9:
            raise ExpressionError(
                f"the expression gives {value:g}, but it is a whole number; use round()"
            )
        return round(value)
    wanted = field_of(PretrainConfig, name).annotation
    if (wanted is bool) != isinstance(value, bool):
        raise ExpressionError(f"the expression gives {value!r}, which is no value of it")
    return float(value) if wanted is float and isinstance(value, int) else value
