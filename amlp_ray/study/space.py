"""A declared search space: checked against the settings before anything runs, then asked of Optuna trial by trial."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import Trial

from amlp_ray.config import Choice, Parameter, PretrainSettings, Range, StudySettings
from amlp_ray.errors import SettingsError
from amlp_ray.settings import flat

DRAWS = 100  # what one in fifty combinations refuses is found with 87 % probability, within a fifth of a second


def check_space(settings: StudySettings) -> None:
    """Raise SettingsError with every fault of the space: unknown names, values a setting refuses, bad conditions.

    Bounds, choices and then random draws are tried on the settings themselves, so that a combination that a setting
    refuses shows here and not in the middle of a study.
    """
    known = flat(PretrainSettings())
    faults = []
    for name, parameter in settings.space.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            faults.append(f"space: unknown setting {name!r}" + (f"; did you mean {near[0]}?" if near else "."))
            continue
        if name == "seed":
            faults.append("space: seed is not searched; a trial's seed follows from the study's seed and its number.")
            continue
        if isinstance(parameter, Range) and type(known[name]) not in (int, float):
            faults.append(f"space: {name} takes {type(known[name]).__name__} values; give choices instead of a range.")
            continue
        if isinstance(parameter, Range) and type(known[name]) is int and not _whole(parameter):
            faults.append(f"space: {name} is an integer; give low, high and step as whole numbers.")
            continue
        faults += _bad_values(settings, name, parameter)
        faults += _bad_conditions(settings, name, parameter)
    if faults:
        raise SettingsError(" ".join(faults))
    drawn_settings(settings)


def drawn_settings(settings: StudySettings) -> list[PretrainSettings]:
    """Draw settings of trials at random from the space, the same at every call; the study's own where none is searched.

    Raises:
        SettingsError: where a combination of values is refused, or conditions form a circle.
    """
    order_of_asking(settings.space)
    draw = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    drawn = []
    for _ in range(DRAWS if settings.space else 1):
        try:
            drawn.append(settings.trial(suggest(draw.ask(), settings), seed=0))
        except SettingsError as error:
            raise SettingsError(
                f"space: some combinations are refused ({str(error).removeprefix(settings.name + ': ').rstrip('.')}); "
                f"make one parameter depend on the other with `when`, or narrow the space."
            ) from None
    return drawn


def _bad_values(settings: StudySettings, name: str, parameter: Parameter) -> list[str]:
    values = parameter.choices if isinstance(parameter, Choice) else [_cast(name, v) for v in _ends(parameter)]
    faults = []
    for value in values:
        # Conditions may be what makes a value valid, such as the number of heads for a width.
        fixed = {k: v[0] if isinstance(v, list) else v for k, v in (parameter.when or {}).items()}
        try:
            settings.trial({**fixed, name: value}, seed=0)
        except SettingsError as error:
            faults.append(f"space: {str(error).removeprefix(settings.name + ': ')}")
    return faults


def _bad_conditions(settings: StudySettings, name: str, parameter: Parameter) -> list[str]:
    known = flat(PretrainSettings())
    faults = []
    for on, wanted in (parameter.when or {}).items():
        if on not in known:
            faults.append(f"space: {name} depends on {on!r}, which is no setting.")
            continue
        other = settings.space.get(on)
        values = wanted if isinstance(wanted, list) else [wanted]
        possible = other.choices if isinstance(other, Choice) else None
        if other is None:
            possible = [flat(settings.trial({}, seed=0))[on]]
        if possible is not None and not any(value in possible for value in values):
            faults.append(f"space: {name} is never searched, since {on} is never {wanted!r} (it can be {possible}).")
    return faults


def _whole(parameter: Range) -> bool:
    return all(float(v).is_integer() for v in (parameter.low, parameter.high, parameter.step or 1))


def _ends(parameter: Range) -> tuple[float, float]:
    return parameter.low, parameter.high


def order_of_asking(space: Mapping[str, Parameter]) -> list[str]:
    """Names such that each stands after those its condition needs. Raises SettingsError for a circle of conditions."""
    order: list[str] = []
    left = dict(space)
    while left:
        ready = [n for n, p in left.items() if not any(on in left for on in (p.when or {}))]
        if not ready:
            raise SettingsError(f"space: the conditions of {', '.join(left)} depend on each other in a circle.")
        order += ready
        left = {n: p for n, p in left.items() if n not in ready}
    return order


def suggest(trial: Trial, settings: StudySettings) -> dict[str, Any]:
    """Ask Optuna for every parameter whose condition holds; dotted names to values.

    A trial that was asked before gives the same values again.
    """
    params: dict[str, Any] = {}
    for name in order_of_asking(settings.space):
        parameter = settings.space[name]
        if not _holds(parameter.when, params, settings):
            continue
        if isinstance(parameter, Choice):
            params[name] = trial.suggest_categorical(name, parameter.choices)
        elif _is_integer(name):
            step = int(parameter.step or 1)
            params[name] = trial.suggest_int(
                name, int(parameter.low), int(parameter.high), log=parameter.log, step=step
            )
        else:
            params[name] = trial.suggest_float(
                name, parameter.low, parameter.high, log=parameter.log, step=parameter.step
            )
    return params


def _holds(when: Mapping[str, Any] | None, params: Mapping[str, Any], settings: StudySettings) -> bool:
    if not when:
        return True
    values = flat(settings.trial(params, seed=0))
    return all(values[on] in (wanted if isinstance(wanted, list) else [wanted]) for on, wanted in when.items())


def _is_integer(name: str) -> bool:
    return type(flat(PretrainSettings())[name]) is int


def _cast(name: str, value: float) -> float | int:
    return int(value) if _is_integer(name) and value == int(value) else value
