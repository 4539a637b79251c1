"""Base class of all configs, and one sentence for every value that is refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from amlp_ray.errors import ConfigError


class Config(BaseModel):
    """Base of all settings: immutable, unknown keys are errors, NaN and infinity are not numbers here."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Config)


class ConfigIssue(NamedTuple):
    """What is wrong with the key of that dotted name, in a sentence; `line` where it is not the key's first."""

    key: str
    text: str
    line: int | None = None


@dataclass(frozen=True)
class ConfigSource:
    """Where settings come from: what messages call it, and the line of every key by dotted name."""

    name: str
    lines: Mapping[str, int] = field(default_factory=dict)
    faults: tuple[ConfigIssue, ...] = ()  # found while reading

    def line(self, key: str) -> int | None:
        """Line of a key; where it has none, of the group that it is in."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return self.lines.get(key)

    def error(self, faults: Iterable[ConfigIssue]) -> ConfigError:
        """All faults as one error, each told with `name:line`, in the order of lines."""
        at = [(fault, fault.line or self.line(fault.key)) for fault in faults]
        at.sort(key=lambda found: found[1] or 0)
        told = [
            f"{self.name}:{line}: {f.text}" if line else f"{self.name}: {f.text}" for f, line in at
        ]
        return ConfigError(*told, keys=[f.key for f, _ in at])


class ConfigValues(dict[str, Any]):
    """Values of a settings file, which know where they stand in it."""

    def __init__(self, values: Mapping[str, Any], source: ConfigSource) -> None:
        super().__init__(values)
        self.source = source


def config_source(values: Mapping[str, Any], name: str) -> ConfigSource:
    """Where values come from: the file that they were read from, or `name`."""
    return values.source if isinstance(values, ConfigValues) else ConfigSource(name)


def build(
    model: type[S], values: Mapping[str, Any], source: str, more: Iterable[ConfigIssue] = ()
) -> S:
    """Validate `values` as `model`.

    Args:
        source: what messages call it. Values that `read_yaml` read know it, and the lines of their keys.
        more: faults found elsewhere, to be told in the same list.

    Raises:
        ConfigError: with one sentence per fault that names `source`, the key, the value and what is accepted.
    """
    origin = config_source(values, source)
    faults = [*origin.faults, *more]
    built = None
    try:
        built = model.model_validate(dict(values))
    except ValidationError as error:
        faults += _faults(model, error, values)
    if built is None or faults:
        raise origin.error(faults)
    return built


def refusal(model: type[Config], name: str, value: Any) -> str | None:
    """Why a setting cannot have a value, whatever the others are; nothing where it can.

    >>> from amlp_ray.config import PretrainConfig
    >>> refusal(PretrainConfig, "ratio.end", 1.2)
    'ratio.end is 1.2, but must be less than 1.'
    """
    try:
        _adapter(model, name).validate_python(value)
    except ValidationError as error:
        found = error.errors(include_url=False)
        return f"{name} is {value!r}, but {' or '.join(dict.fromkeys(map(_wanted, found)))}."
    return None


@cache
def _adapter(model: type[Config], name: str) -> TypeAdapter[Any]:
    about = field_of(model, name)
    return TypeAdapter(Annotated[about.annotation, about], config=model.model_config)  # type: ignore[arg-type]


def field_of(model: type[BaseModel], name: str) -> FieldInfo:
    """The field behind a dotted name; its `annotation` is the type of its values."""
    group, dot, rest = name.partition(".")
    field = model.model_fields[group]
    if not dot:
        return field
    assert isinstance(field.annotation, type)
    return field_of(field.annotation, rest)


_TAGS = ("range", "choice", "fixed", "derived", "str", "int", "float", "bool", "none")


def _faults(
    model: type[BaseModel], error: ValidationError, values: Mapping[str, Any]
) -> list[ConfigIssue]:
    out: list[ConfigIssue] = []
    wanted: dict[
        str, dict[str, Any]
    ] = {}  # of values that fit no baseline of a union: what each baseline takes
    for fault in error.errors(include_url=False):
        where = _place(fault["loc"], values, fault["type"])
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            out += [
                ConfigIssue(f"{where}.{key}", text)
                for key, text in zip(cause.keys, cause.faults, strict=True)
            ]
        elif fault["type"] == "extra_forbidden":
            out.append(ConfigIssue(where, _unknown(model, where)))
        elif fault["type"] == "missing":
            out.append(ConfigIssue(where, f"{where} is missing."))
        elif fault["type"] == "value_error":
            text = fault["msg"].removeprefix("Value error, ").rstrip(".")
            about = text.split(maxsplit=1)[0].rstrip(
                ":"
            )  # sentences of ours begin with the setting that they are about
            out.append(
                ConfigIssue(
                    f"{where}.{about}".lstrip("."), f"{where}: {text}." if where else f"{text}."
                )
            )
        else:
            wanted.setdefault(where, {})[_wanted(fault)] = fault["input"]
    for where, texts in wanted.items():
        if any(other.startswith(f"{where}.") for other in [*wanted, *(fault.key for fault in out)]):
            continue  # of the baseline that was meant, something inside is at fault
        given = next(iter(texts.values()))
        shown = repr(given) if len(repr(given)) < 80 else f"of type {type(given).__name__}"
        out.append(ConfigIssue(where, f"{where} is {shown}, but {' or '.join(texts)}."))
    return out


def _place(loc: Sequence[int | str], values: Any, kind: str) -> str:
    """Dotted name of what is at fault. In `loc` pydantic names the baselines of unions as well, which no file has."""
    keys = []
    for i, part in enumerate(loc):
        inside = isinstance(values, Mapping) and part in values
        if inside or (
            isinstance(values, list | tuple) and isinstance(part, int) and part < len(values)
        ):
            values = values[part]
        elif not (kind == "missing" and i == len(loc) - 1) and (part in _TAGS or "[" in str(part)):
            continue
        keys.append(str(part))
    return ".".join(keys)


def _unknown(model: type[BaseModel], where: str) -> str:
    known = list(_names(model))
    if where in known:  # its dots stand in the key itself
        *groups, last = where.split(".")
        opened = "".join(f"{group}: {{" for group in groups)
        return f"{where} is written nested, as {opened}{last}: ...{'}' * len(groups)}."
    group = where.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == group]
    if not siblings and group:
        siblings = [
            f"{group}.{name}"
            for name in _fields_inside(model.model_fields[where.partition(".")[0]].annotation)
        ]
    near = difflib.get_close_matches(where, siblings, n=1, cutoff=0.5) or difflib.get_close_matches(
        where, known, n=1, cutoff=0.5
    )
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(siblings) or 'none'}."
    return f"unknown setting {where!r}; {hint}"


def _fields_inside(annotation: Any) -> list[str]:
    """Names of all fields of the models in a mapping or union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return list(annotation.model_fields)
    return list(
        dict.fromkeys(name for part in get_args(annotation) for name in _fields_inside(part))
    )


def _wanted(fault: Mapping[str, Any]) -> str:
    """What is accepted, in pydantic's words made half a sentence."""
    text = re.sub(
        r" or instance of \w+$", "", fault["msg"].removeprefix("Value error, ").rstrip(".")
    )
    text = re.sub(r"^(Input|String|List|Dictionary|Tuple|Value) should", "must", text)
    return text[0].lower() + text[1:]


def _names(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, about in model.model_fields.items():
        if isinstance(about.annotation, type) and issubclass(about.annotation, BaseModel):
            yield from _names(about.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name
