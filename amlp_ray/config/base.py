"""Base class of all configs, and one sentence for every value that is refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from amlp_ray.errors import ConfigError


class Config(BaseModel):
    """Base of all configs: immutable; unknown keys, NaN and infinity are errors.

    The string below a field is its description, from which `docs/settings.md` is made.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=Config)
MIN_LIKENESS = 0.7  # by difflib, of a misspelling; at 0.5, words that share two letters are near
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]


class ConfigIssue(NamedTuple):
    """A problem with one setting."""

    key: str  # dotted name
    text: str  # one sentence
    line: int | None = None  # where it is not the first line of `key`


@dataclass(frozen=True)
class ConfigSource:
    """Where settings come from."""

    name: str  # what messages call it, such as the path of a file
    lines: Mapping[str, int] = field(default_factory=dict)  # of every key, by dotted name
    issues: tuple[ConfigIssue, ...] = ()  # found while reading it

    @classmethod
    def from_values(cls, values: Mapping[str, Any], name: str) -> ConfigSource:
        """Return the file that `values` were read from, or else a source called `name`."""
        return values.source if isinstance(values, ConfigValues) else cls(name)

    def line(self, key: str) -> int | None:
        """Return the line of a key; where it has none, that of the group it belongs to."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return self.lines.get(key)

    def error(self, issues: Iterable[ConfigIssue]) -> ConfigError:
        """Return one error for all issues, each with `name:line`, sorted by line."""
        located = [(issue.line or self.line(issue.key), issue) for issue in issues]
        located.sort(key=lambda pair: pair[0] or 0)
        messages = []
        for line, issue in located:
            position = f"{self.name}:{line}" if line else self.name
            messages.append(f"{position}: {issue.text}")
        return ConfigError(*messages, keys=[issue.key for _, issue in located])


class ConfigValues(dict[str, Any]):
    """Values of a settings file, with the file and the lines that they come from."""

    def __init__(self, values: Mapping[str, Any], source: ConfigSource) -> None:
        super().__init__(values)
        self.source = source


def build(
    model: type[ConfigT],
    values: Mapping[str, Any],
    source: str,
    more: Iterable[ConfigIssue] = (),
) -> ConfigT:
    """Validate nested settings as a config.

    Args:
        source: what messages call the values, unless `read_yaml` read them from a file.
        more: issues found elsewhere, to be listed with those found here.

    Raises:
        ConfigError: with one sentence per issue that names the source, the key, the value and
            what is accepted.
    """
    origin = ConfigSource.from_values(values, source)
    issues = [*origin.issues, *more]
    config = None
    try:
        config = model.model_validate(dict(values))
    except ValidationError as error:
        issues += _issues_from(error, model, values)
    if config is None or issues:
        raise origin.error(issues)
    return config


def rejection_reason(model: type[Config], name: str, value: Any) -> str | None:
    """Say why a setting cannot have a value, whatever the others are; None where it can.

    >>> from amlp_ray.config import PretrainConfig
    >>> rejection_reason(PretrainConfig, "ratio.end", 1.2)
    'ratio.end is 1.2, but must be less than 1.'
    """
    try:
        _type_adapter(model, name).validate_python(value)
    except ValidationError as error:
        accepted = dict.fromkeys(_accepted(detail) for detail in error.errors(include_url=False))
        return f"{name} is {value!r}, but {' or '.join(accepted)}."
    return None


@cache
def _type_adapter(model: type[Config], name: str) -> TypeAdapter[Any]:
    info = find_field(model, name)
    annotation = Annotated[info.annotation, info]  # type: ignore[name-defined]
    return TypeAdapter(annotation, config=model.model_config)


def find_field(model: type[BaseModel], name: str) -> FieldInfo:
    """Return the field with a dotted name; its `annotation` is the type of its values."""
    group, dot, rest = name.partition(".")
    info = model.model_fields[group]
    if not dot:
        return info
    assert isinstance(info.annotation, type)
    return find_field(info.annotation, rest)


def _issues_from(
    error: ValidationError, model: type[BaseModel], values: Mapping[str, Any]
) -> list[ConfigIssue]:
    """Turn pydantic's errors into issues with one sentence each."""
    issues: list[ConfigIssue] = []
    # A value that fits no member of a union has an error per member: collect what each accepts.
    accepted: dict[str, dict[str, Any]] = {}
    for detail in error.errors(include_url=False):
        key = _dotted_key(detail["loc"], values, detail["type"])
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            for inner_key, message in zip(cause.keys, cause.messages, strict=True):
                issues.append(ConfigIssue(f"{key}.{inner_key}", message))
        elif detail["type"] == "extra_forbidden":
            issues.append(ConfigIssue(key, _unknown_setting(model, key)))
        elif detail["type"] == "missing":
            issues.append(ConfigIssue(key, f"{key} is missing."))
        elif detail["type"] == "value_error":
            issues.append(_issue_from_validator(key, detail["msg"]))
        else:
            accepted.setdefault(key, {})[_accepted(detail)] = detail["input"]

    keys = [*accepted, *(issue.key for issue in issues)]
    for key, inputs in accepted.items():
        # If something inside is wrong, this was the right member of the union.
        if any(other.startswith(f"{key}.") for other in keys):
            continue
        value = next(iter(inputs.values()))
        shown = repr(value) if len(repr(value)) < 80 else f"of type {type(value).__name__}"
        issues.append(ConfigIssue(key, f"{key} is {shown}, but {' or '.join(inputs)}."))
    return issues


def _issue_from_validator(key: str, message: str) -> ConfigIssue:
    """Turn the message of a validator of ours into an issue.

    Such a message begins with the name of the setting that it is about.
    """
    text = message.removeprefix("Value error, ").rstrip(".")
    setting = text.split(maxsplit=1)[0].rstrip(":")
    sentence = f"{key}: {text}." if key else f"{text}."
    return ConfigIssue(f"{key}.{setting}".lstrip("."), sentence)


# What pydantic adds to a location for a member of a union; no file has these as keys.
_UNION_TAGS = ("range", "choice", "fixed", "derived", "str", "int", "float", "bool", "none")


def _dotted_key(location: Sequence[int | str], values: Any, error_type: str) -> str:
    """Return the dotted name of an error's location, without pydantic's names of union members."""
    keys = []
    for index, part in enumerate(location):
        in_mapping = isinstance(values, Mapping) and part in values
        in_list = isinstance(values, list | tuple) and isinstance(part, int) and part < len(values)
        if in_mapping or in_list:
            values = values[part]
        else:
            is_missing_key = error_type == "missing" and index == len(location) - 1
            if not is_missing_key and (part in _UNION_TAGS or "[" in str(part)):
                continue
        keys.append(str(part))
    return ".".join(keys)


def _unknown_setting(model: type[BaseModel], key: str) -> str:
    """Say that a setting is unknown, and which one may be meant."""
    names = list(_setting_names(model))
    group, _, last = key.rpartition(".")
    if key in names:
        # The file has the dotted name as one key.
        groups = group.split(".")
        opening = "".join(f"{name}: {{" for name in groups)
        return f"{key} is written nested, as {opening}{last}: ...{'}' * len(groups)}."
    siblings = _siblings(model, names, group)
    near = nearest_name(key, [*siblings, *names])
    # A word of longer names, such as batch of lr_batch and batch_size, does not say which is meant.
    longer = [name for name in siblings if f"_{last}_" in f"_{name.rpartition('.')[2]}_"]
    if longer:
        similar = dict.fromkeys([near, *longer] if near else longer)
        hint = f"similar here: {', '.join(similar)}."
    elif near:
        hint = f"did you mean {near}?"
    else:
        hint = f"known here: {', '.join(siblings) or 'none'}."
    return f"unknown setting {key!r}; {hint}"


def _siblings(model: type[BaseModel], names: Iterable[str], group: str) -> list[str]:
    """Return the dotted names of the settings and groups that a group holds."""
    depth = len(group.split(".")) if group else 0
    inside = [name.split(".") for name in names if not group or name.startswith(f"{group}.")]
    siblings = [".".join(parts[: depth + 1]) for parts in inside]
    if not siblings:
        # The values of a mapping, such as the parameters of a space.
        field_info = model.model_fields.get(group.partition(".")[0])
        for inner in models_in(field_info and field_info.annotation):
            siblings += [f"{group}.{name}" for name in inner.model_fields]
    return list(dict.fromkeys(siblings))


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """Return the name that one may be a misspelling of; None if there is none.

    Group and last part of a dotted name must both be near. So is the same last part, if only one
    group has it.

    >>> nearest_name("ratio.strat", ["ratio.start", "ratio.end", "loss.mix"])
    'ratio.start'
    >>> nearest_name("mix", ["ratio.start", "ratio.end", "loss.mix"])
    'loss.mix'
    """
    names = list(dict.fromkeys(names))
    likeness = {other: _likeness(name, other) for other in names}
    best = max(names, key=likeness.__getitem__, default=None)
    if best is not None and likeness[best] >= MIN_LIKENESS:
        return best
    last = name.rpartition(".")[2]
    same = [other for other in names if other.rpartition(".")[2] == last]
    return same[0] if len(same) == 1 else None


def _likeness(name: str, other: str) -> float:
    group, _, last = name.rpartition(".")
    other_group, _, other_last = other.rpartition(".")
    return min(_part_likeness(group, other_group), _part_likeness(last, other_last))


def _part_likeness(part: str, other: str) -> float:
    likeness = difflib.SequenceMatcher(None, part, other).ratio()
    if sorted(part) == sorted(other):  # letters that changed places, such as mea for mae
        likeness = max(likeness, MIN_LIKENESS)
    return likeness


def models_in(annotation: Any) -> Iterator[type[Config]]:
    """Yield the configs in a mapping or union, or the one that the annotation is."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def _accepted(detail: Mapping[str, Any]) -> str:
    """Return what pydantic accepts as the second half of a sentence."""
    text = detail["msg"].removeprefix("Value error, ").rstrip(".")
    text = re.sub(r" or instance of \w+$", "", text)
    text = re.sub(r"^(Input|String|List|Dictionary|Tuple|Value) should", "must", text)
    return text[0].lower() + text[1:]


def _setting_names(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _setting_names(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name
