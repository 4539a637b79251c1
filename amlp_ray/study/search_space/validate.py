"""A search space: checked against the settings before anything runs, then asked of Optuna trial by trial.

It is declared, or a function of a module that is asked as Optuna's own users write it. `asking.py` works it out,
`space_faults.py` finds what is wrong with it as it is written; here is what the rest of a study uses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial
from pydantic import TypeAdapter, ValidationError

from amlp_ray.config import Choice, Parameter, PretrainConfig, Range, StudyConfig
from amlp_ray.config.base import ConfigIssue, ConfigSource, build, config_source
from amlp_ray.config.overrides import flat
from amlp_ray.errors import ConfigError
from amlp_ray.study.search_space.checks import DeclaredSpace
from amlp_ray.study.search_space.space import (
    SETTINGS,
    SearchSpace,
    SuggestedConfig,
    load_function,
    order_of_asking,
    space_of,
)

__all__ = [
    "SuggestedConfig",
    "build_study",
    "check_space",
    "defaults",
    "drawn_settings",
    "holds_requirements",
    "order_of_asking",
    "parameters",
    "searched",
    "suggest",
    "suggestion",
]

FEWEST = 5  # of 100 random draws that `require` must leave: a sampler tries 200 times
PBT_RATIO = "ratio.points"  # what population-based training moves; no setting like others, checked in `population.py`

_PARAMETER: TypeAdapter[Parameter] = TypeAdapter(Parameter)


def suggestion(trial: Trial, config: StudyConfig) -> SuggestedConfig:
    """Ask Optuna for every parameter whose condition holds, and say what follows and whether it is refused.

    A trial that was asked before gives the same again; a FixedTrial gives what follows from its parameters.
    """
    return space_of(config).ask(trial)


def suggest(trial: Trial, config: StudyConfig) -> dict[str, Any]:
    """Ask Optuna as `suggestion` does; return settings by dotted name, fixed and derived ones included.

    Whether they keep the study's requirements is for `holds_requirements` to say.

    Raises:
        ConfigError: an expression gives nothing for these values, or a function refuses them.
    """
    asked = suggestion(trial, config)
    if asked.invalid:
        raise ConfigError(*[f"space: {reason}." for reason in asked.invalid])
    return asked.values


def holds_requirements(at_hand: Mapping[str, Any], config: StudyConfig) -> bool:
    """Whether every requirement holds.

    Args:
        at_hand: values by name, of settings and of helpers: `{**trial.params, **suggest(trial, settings)}`. What is not
            among them has the study's own value; a requirement of a helper that is missing is passed over.
    """
    return space_of(config).broken_requirement(at_hand) is None


def searched(config: StudyConfig) -> dict[str, Range | Choice]:
    """What Optuna is asked for, in the order of asking, helpers included. Of a function: what random draws show."""
    space = space_of(config)
    if space.function is None:
        return {name: p for name, p in space.parameters.items() if isinstance(p, Range | Choice)}
    return {name: _as_parameter(ranges[0]) for name, ranges in _seen(space).items()}


def parameters(config: StudyConfig) -> tuple[str, ...]:
    """Names of what Optuna is asked for, in the order of asking."""
    return tuple(searched(config))


def defaults(config: StudyConfig) -> dict[str, Any] | None:
    """Parameters of the first trial, where the space gives defaults; the study's own value where one is missing.

    Returns:
        What Optuna would be asked for, by name; None where no default is given, or the space is a function.

    Raises:
        ConfigError: one has neither a default nor a value of the study inside its range.
    """
    space = space_of(config)
    if not any(
        p.default is not None for p in space.parameters.values() if isinstance(p, Range | Choice)
    ):
        return None
    params: dict[str, Any] = {}

    def answer(name: str, parameter: Range | Choice) -> Any:
        value = parameter.default
        if value is None:
            value = space.base(params).get(name)
            if value is None or not _inside(parameter, value):
                own = f", and the study's own {value!r} lies outside" if name in SETTINGS else ""
                raise ConfigError(
                    f"space: {name} has no default{own}; the first trial tries defaults, so give one here too.",
                    keys=[f"space.{name}"],
                )
        elif isinstance(parameter, Range) and type(SETTINGS.get(name)) is int:
            value = int(parameter.default)  # type: ignore[arg-type]  # not None here
        params[name] = value
        return value

    asked = space.walk(answer)
    if asked.refused:
        raise ConfigError(f"space: the defaults are refused: {asked.refused}.", keys=["space"])
    return params


def drawn_settings(config: StudyConfig) -> list[PretrainConfig]:
    """Draw settings of trials at random from the space, the same at every call; the study's own where none is searched.

    Raises:
        ConfigError: where a combination of values is refused.
    """
    drawn, faults = _drawn(_of_settings_only(config))
    if faults:
        raise ConfigSource("space").error(
            ConfigIssue(f.key, f.text.removeprefix("space: ")) for f in faults
        )
    return drawn


def check_space(config: StudyConfig, source: ConfigSource | None = None) -> None:
    """Raise ConfigError with every fault of the space: unknown names, values a setting refuses, rules, combinations.

    First each parameter is looked at, then random draws are tried on the settings themselves, so that a combination
    that a setting refuses shows here and not in the middle of a study.

    Args:
        source: of the settings, so that faults are told with the file and line.
    """
    base = flat(config.trial({}, seed=0))
    faults: list[ConfigIssue] = []
    if isinstance(config.space, dict):
        faults = DeclaredSpace(config.space, config.require, base).faults()
    _refuse(faults or _faults_of_draws(config, base, source), source)


def build_study(values: Mapping[str, Any], source: str) -> StudyConfig:
    """Validate a study's settings, its space included, with all faults in one list.

    Args:
        source: what messages call it. Values that `read_yaml` read know it, and the lines of their keys.

    Raises:
        ConfigError: one sentence for each fault, with file and line where these are known.
    """
    origin = config_source(values, source)
    config = build(StudyConfig, values, source, more=_written(values).faults())
    try:
        if isinstance(config.space, str):
            load_function(config.space, Path(origin.name).parent if origin.lines else None)
    except ConfigError as error:
        _refuse([ConfigIssue("space", str(error))], origin)
    check_space(_of_settings_only(config), origin)
    return config


def _of_settings_only(config: StudyConfig) -> StudyConfig:
    if config.sampler.name != "pbt" or not isinstance(config.space, dict):
        return config
    return config.model_copy(
        update={"space": {n: p for n, p in config.space.items() if n != PBT_RATIO}}
    )


def _written(values: Mapping[str, Any]) -> DeclaredSpace:
    """What can be read of a space whose study may be at fault elsewhere."""
    space = values.get("space") if isinstance(values.get("space"), Mapping) else {}
    sampler = values.get("sampler")
    pbt = isinstance(sampler, Mapping) and sampler.get("name") == "pbt"
    read, unread = {}, []
    for name, given in space.items():  # type: ignore[union-attr]  # a mapping, see above
        try:
            if not (pbt and name == PBT_RATIO):
                spelt_out = {"value": given} if isinstance(given, str | int | float) else given
                read[str(name)] = _PARAMETER.validate_python(spelt_out)
        except ValidationError:
            unread.append(str(name))
    try:
        base = flat(build(PretrainConfig, values.get("pretrain") or {}, "pretrain"))
    except (ConfigError, TypeError, ValueError):
        base = None
    require = values.get("require")
    rules = (
        [text for text in require if isinstance(text, str)]
        if isinstance(require, list | tuple)
        else []
    )
    return DeclaredSpace(read, rules, base, unread)


def _faults_of_draws(
    config: StudyConfig, base: Mapping[str, Any], source: ConfigSource | None
) -> list[ConfigIssue]:
    space = space_of(config)
    if space.function is not None and (faults := list(_faults_of_function(config, space, base))):
        return faults
    _, faults = _drawn(config)
    try:
        if (first := defaults(config)) and not faults:
            config.trial({n: v for n, v in first.items() if n in SETTINGS}, seed=0)
    except ConfigError as error:
        faults += [ConfigIssue(error.keys[0], str(error))]
    return faults


def _faults_of_function(
    config: StudyConfig, space: SearchSpace, base: Mapping[str, Any]
) -> Iterator[ConfigIssue]:
    """What a function asks for, looked at as if it were declared."""
    asked: dict[str, Parameter] = {}
    for name, ranges in _seen(space).items():
        for distribution in ranges:
            if type(base.get(name)) is int and isinstance(distribution, FloatDistribution):
                yield ConfigIssue("space", f"space: {name} is an integer; ask with suggest_int.")
            try:
                asked[name] = _as_parameter(distribution)
            except ValidationError:
                yield ConfigIssue(
                    "space",
                    f"space: {name} has choices that are no words, numbers, true, false or None.",
                )
    returns = any(
        draw.suggestion.values.keys() - draw.suggestion.params.keys() for draw in space.draws
    )
    helpers = (
        [name for name in asked if name not in SETTINGS and "." not in name] if returns else []
    )
    # A function that returns settings uses its helpers for them, as an expression would.
    known = {name: parameter for name, parameter in asked.items() if name not in helpers}
    for fault in DeclaredSpace(known, config.require, base, helpers).faults():
        yield ConfigIssue("space" if fault.key.startswith("space") else fault.key, fault.text)


def _drawn(config: StudyConfig) -> tuple[list[PretrainConfig], list[ConfigIssue]]:
    """Settings of random draws, and what speaks against the space."""
    space = space_of(config)
    drawn: list[PretrainConfig] = []
    faults: dict[str, ConfigIssue] = {}  # one of a kind: they differ in the numbers drawn
    refusals: Counter[str] = Counter()
    for draw in space.draws:
        asked = draw.suggestion
        if (asked.broken and not asked.invalid) or (asked.invalid and space.function):
            refusals[asked.refused or ""] += 1
        elif asked.invalid:
            for reason in asked.invalid:
                faults.setdefault(
                    _kind(reason),
                    ConfigIssue(f"space.{reason.partition(':')[0]}", f"space: {reason}."),
                )
        else:
            try:
                drawn.append(config.trial(asked.values, seed=0))
            except ConfigError as error:
                text = error.faults[0].removeprefix(f"{config.name}: ").rstrip(".")
                advice = "make one parameter depend on the other with `when`, say in `require` what must hold, or narrow"
                told = f"space: some combinations are refused ({text}); {advice} the space."
                faults.setdefault(_kind(text), ConfigIssue(f"space.{error.keys[0]}", told))
    if refusals.total() > max(0, len(space.draws) - FEWEST):
        text, count = refusals.most_common(1)[0]
        index = next((i for i, rule in enumerate(config.require) if repr(rule) in text), None)
        told = (
            f"space: {text} in {count} of {len(space.draws)} random draws, so that hardly a trial is left; narrow the "
            f"ranges, or derive one value from the other with `expression`."
        )
        faults[text] = ConfigIssue("space" if index is None else f"require.{index}", told)
    return drawn, list(faults.values())


def _kind(text: str) -> str:
    return re.sub(r"[\d.e-]+", "", text)


def _refuse(faults: list[ConfigIssue], source: ConfigSource | None) -> None:
    if not faults:
        return
    if source is not None:
        raise source.error(faults)
    raise ConfigError(*[fault.text for fault in faults], keys=[fault.key for fault in faults])


def _seen(space: SearchSpace) -> dict[str, list[BaseDistribution]]:
    """What draws of a function were drawn from, each once, by name in the order of asking."""
    seen: dict[str, list[BaseDistribution]] = {}
    for draw in space.draws:
        for name, distribution in draw.distributions.items():
            if distribution not in seen.setdefault(name, []):
                seen[name].append(distribution)
    return seen


def _as_parameter(distribution: BaseDistribution) -> Range | Choice:
    if isinstance(distribution, CategoricalDistribution):
        return Choice(choices=list(distribution.choices))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if distribution.single():
        return Choice(choices=[distribution.low])
    step = (
        None
        if distribution.log
        or (isinstance(distribution, IntDistribution) and distribution.step == 1)
        else distribution.step
    )
    return Range(low=distribution.low, high=distribution.high, log=distribution.log, step=step)


def _inside(parameter: Range | Choice, value: Any) -> bool:
    if isinstance(parameter, Choice):
        return any(type(choice) is type(value) and choice == value for choice in parameter.choices)
    low, high, step = parameter.low, parameter.high, parameter.step
    return low <= value <= high and (
        step is None or abs((value - low) / step - round((value - low) / step)) < 1e-6
    )
