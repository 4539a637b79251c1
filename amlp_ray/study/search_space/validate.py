"""Validate a study with its search space before anything runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution
from pydantic import TypeAdapter, ValidationError

from amlp_ray.config import Parameter, PretrainConfig, StudyConfig
from amlp_ray.config.base import ConfigIssue, ConfigSource, build
from amlp_ray.config.overrides import flatten
from amlp_ray.errors import ConfigError
from amlp_ray.study.search_space.checks import DeclaredSpace
from amlp_ray.study.search_space.parameters import SETTINGS
from amlp_ray.study.search_space.space import SearchSpace, as_parameter
from amlp_ray.study.search_space.space_function import allow_code, load_function

# Of 100 random samples so many must be allowed: a sampler tries 200 times.
MIN_ALLOWED = 5
# Population-based training moves this schedule. It is no setting like others: `search/pbt.py`
# checks it.
PBT_RATIO = "ratio.points"

_PARAMETER: TypeAdapter[Parameter] = TypeAdapter(Parameter)


def build_study(
    values: Mapping[str, Any], source: str, *, should_allow_code: bool = False
) -> StudyConfig:
    """Validate a study's config, its space included, and list all mistakes at once.

    Args:
        values: as a study file has them. Values of `read_yaml` know their file and lines.
        source: what messages call them otherwise.
        should_allow_code: whether a space that names a Python function may be imported. One that
            is a function already is.

    Raises:
        ConfigError: a sentence for each mistake, with file and line where these are known.
    """
    origin = ConfigSource.from_values(values, source)
    config = build(StudyConfig, values, source, more=_read_space(values).issues())
    if isinstance(config.space, str):
        if should_allow_code or callable(values.get("space")):
            allow_code(config.space)
        folder = Path(origin.name).parent if origin.lines else None
        try:
            load_function(config.space, folder)
        except ConfigError as error:
            raise_if_any([ConfigIssue("space", str(error))], origin)
    check_space(without_pbt_ratio(config), origin)
    return config


def check_space(config: StudyConfig, source: ConfigSource | None = None) -> None:
    """Check the search space of a study.

    Each parameter is checked first. Then random samples are tried on the settings themselves, so
    that a combination that these refuse shows here and not in the middle of a study.

    Args:
        source: where the study comes from, for messages with file and line.

    Raises:
        ConfigError: with every mistake: unknown names, values that a setting refuses, rules,
            combinations.
    """
    base = flatten(config.trial({}, seed=0))
    issues: list[ConfigIssue] = []
    if isinstance(config.space, dict):
        issues = DeclaredSpace(config.space, config.require, base).issues()
    raise_if_any(issues or _sampled_issues(SearchSpace(config), base), source)


def sample_configs(config: StudyConfig) -> list[PretrainConfig]:
    """Return configs of random trials, the same at every call; the study's own without a space.

    Raises:
        ConfigError: a combination of values is refused.
    """
    configs, issues = _build_samples(SearchSpace(without_pbt_ratio(config)))
    if issues:
        raise ConfigSource("space").error(
            ConfigIssue(issue.key, issue.text.removeprefix("space: ")) for issue in issues
        )
    return configs


def without_pbt_ratio(config: StudyConfig) -> StudyConfig:
    """Return a study without the schedule of sampler pbt, so that its space has settings only."""
    if config.sampler.name != "pbt" or not isinstance(config.space, dict):
        return config
    space = {name: parameter for name, parameter in config.space.items() if name != PBT_RATIO}
    return config.model_copy(update={"space": space})


def _read_space(values: Mapping[str, Any]) -> DeclaredSpace:
    """Read what can be read of a space whose study may have mistakes elsewhere."""
    space = values.get("space")
    sampler = values.get("sampler")
    is_pbt = isinstance(sampler, Mapping) and sampler.get("name") == "pbt"
    parameters: dict[str, Parameter] = {}
    unread = []
    for name, value in space.items() if isinstance(space, Mapping) else ():
        if is_pbt and name == PBT_RATIO:
            continue
        # A plain value is short for a fixed parameter.
        written = {"value": value} if isinstance(value, str | int | float) else value
        try:
            parameters[str(name)] = _PARAMETER.validate_python(written)
        except ValidationError:
            unread.append(str(name))
    try:
        base = flatten(build(PretrainConfig, values.get("pretrain") or {}, "pretrain"))
    except (ConfigError, TypeError, ValueError):
        base = None
    require = values.get("require")
    rules = require if isinstance(require, list | tuple) else []
    return DeclaredSpace(parameters, [r for r in rules if isinstance(r, str)], base, unread)


def _sampled_issues(space: SearchSpace, base: Mapping[str, Any]) -> list[ConfigIssue]:
    if space.function is not None:
        issues = list(_function_issues(space, base))
        if issues:
            return issues
    _, issues = _build_samples(space)
    try:
        defaults = space.defaults()
        if defaults and not issues:
            settings = {name: value for name, value in defaults.items() if name in SETTINGS}
            space.config.trial(settings, seed=0)
    except ConfigError as error:
        issues.append(ConfigIssue(error.keys[0], str(error)))
    return issues


def _function_issues(space: SearchSpace, base: Mapping[str, Any]) -> Iterator[ConfigIssue]:
    """Check what a function asks for as if it were declared."""
    parameters: dict[str, Parameter] = {}
    for name, ranges in space.sampled_ranges.items():
        for distribution in ranges:
            if type(base.get(name)) is int and isinstance(distribution, FloatDistribution):
                yield ConfigIssue("space", f"space: {name} is an integer; ask with suggest_int.")
            try:
                parameters[name] = as_parameter(distribution)
            except ValidationError:
                yield ConfigIssue(
                    "space",
                    f"space: {name} has choices that are no words, numbers, true, false or None.",
                )
    # A function that returns settings uses its helpers for them, as an expression would.
    helpers: list[str] = []
    suggestions = [sample.suggestion for sample in space.samples]
    if any(suggestion.values.keys() - suggestion.params.keys() for suggestion in suggestions):
        helpers = [name for name in parameters if name not in SETTINGS and "." not in name]
    settings = {name: parameter for name, parameter in parameters.items() if name not in helpers}
    for issue in DeclaredSpace(settings, space.config.require, base, helpers).issues():
        yield ConfigIssue("space" if issue.key.startswith("space") else issue.key, issue.text)


def _build_samples(space: SearchSpace) -> tuple[list[PretrainConfig], list[ConfigIssue]]:
    """Build the configs of random samples, and collect why some are refused."""
    configs: list[PretrainConfig] = []
    # One issue of a kind: they differ in the sampled numbers.
    issues: dict[str, ConfigIssue] = {}
    refusals: Counter[str] = Counter()
    for sample in space.samples:
        suggestion = sample.suggestion
        is_allowed_to_fail = space.function is not None or not suggestion.invalid
        if suggestion.refused and is_allowed_to_fail:
            refusals[suggestion.refused] += 1
            continue
        for reason in suggestion.invalid:
            key = f"space.{reason.partition(':')[0]}"
            issues.setdefault(_kind(reason), ConfigIssue(key, f"space: {reason}."))
        if suggestion.invalid:
            continue
        try:
            configs.append(space.config.trial(suggestion.values, seed=0))
        except ConfigError as error:
            text = error.messages[0].removeprefix(f"{space.config.name}: ").rstrip(".")
            message = (
                f"space: some combinations are refused ({text}); make one parameter depend on the "
                f"other with `when`, say in `require` what must hold, or narrow the space."
            )
            issues.setdefault(_kind(text), ConfigIssue(f"space.{error.keys[0]}", message))
    if refusals.total() > max(0, len(space.samples) - MIN_ALLOWED):
        text, count = refusals.most_common(1)[0]
        issues[text] = ConfigIssue(
            _requirement_key(space.config, text),
            f"space: {text} in {count} of {len(space.samples)} random draws, so that hardly a "
            f"trial is left; narrow the ranges, or derive one value from the other with "
            f"`expression`.",
        )
    return configs, list(issues.values())


def _requirement_key(config: StudyConfig, refusal: str) -> str:
    for index, requirement in enumerate(config.require):
        if repr(requirement) in refusal:
            return f"require.{index}"
    return "space"


def _kind(text: str) -> str:
    return re.sub(r"[\d.e-]+", "", text)


def raise_if_any(issues: list[ConfigIssue], source: ConfigSource | None = None) -> None:
    """Raise ConfigError with all issues, with file and line if their source is known."""
    if not issues:
        return
    if source is not None:
        raise source.error(issues)
    raise ConfigError(*[issue.text for issue in issues], keys=[issue.key for issue in issues])
