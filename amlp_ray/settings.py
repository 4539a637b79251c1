"""Reading and merging settings, and saying what is wrong with them in one sentence.

`config/` holds the settings themselves; this module holds what all of them share.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from amlp_ray.errors import SettingsError
from amlp_ray.files import write_whole


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys are errors, NaN and infinity are not numbers here."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)


class Fault(NamedTuple):
    """What is wrong with the key of that dotted name, in a sentence; `line` where it is not the key's first."""

    key: str
    text: str
    line: int | None = None


@dataclass(frozen=True)
class Source:
    """Where settings come from: what messages call it, and the line of every key by dotted name."""

    name: str
    lines: Mapping[str, int] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()  # found while reading

    def line(self, key: str) -> int | None:
        """Line of a key; where it has none, of the group that it is in."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return self.lines.get(key)

    def error(self, faults: Iterable[Fault]) -> SettingsError:
        """All faults as one error, each told with `name:line`, in the order of lines."""
        at = [(fault, fault.line or self.line(fault.key)) for fault in faults]
        at.sort(key=lambda found: found[1] or 0)
        told = [f"{self.name}:{line}: {f.text}" if line else f"{self.name}: {f.text}" for f, line in at]
        return SettingsError(*told, keys=[f.key for f, _ in at])


class Read(dict[str, Any]):
    """Values of a settings file, which know where they stand in it."""

    def __init__(self, values: Mapping[str, Any], source: Source) -> None:
        super().__init__(values)
        self.source = source


def source_of(values: Mapping[str, Any], name: str) -> Source:
    """Where values come from: the file that they were read from, or `name`."""
    return values.source if isinstance(values, Read) else Source(name)


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `under` with `over` laid on top; nested mappings are merged, models count as mappings.

    >>> merged({"ratio": {"start": 0.3, "end": 0.5}}, {"ratio": {"end": 0.9}})
    {'ratio': {'start': 0.3, 'end': 0.9}}
    """
    out = dict(under)
    for key, value in over.items():
        if isinstance(value, BaseModel):
            value = value.model_dump()
        if isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
            value = merged(out[key], value)
        out[key] = value
    return out


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted names into nested mappings.

    >>> nested({"epochs": 5, "ratio.start": 0.3})
    {'epochs': 5, 'ratio': {'start': 0.3}}
    """
    out: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        at = out
        for key in path:
            at = at.setdefault(key, {})
        at[last] = value
    return out


def flat(settings: Settings | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested settings into dotted names, the inverse of `nested`."""
    items = settings.model_dump() if isinstance(settings, BaseModel) else settings
    out: dict[str, Any] = {}
    for key, value in items.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def build(model: type[S], values: Mapping[str, Any], source: str, more: Iterable[Fault] = ()) -> S:
    """Validate `values` as `model`.

    Args:
        source: what messages call it. Values that `read_yaml` read know it, and the lines of their keys.
        more: faults found elsewhere, to be told in the same list.

    Raises:
        SettingsError: with one sentence per fault that names `source`, the key, the value and what is accepted.
    """
    origin = source_of(values, source)
    faults = [*origin.faults, *more]
    built = None
    try:
        built = model.model_validate(dict(values))
    except ValidationError as error:
        faults += _faults(model, error, values)
    if built is None or faults:
        raise origin.error(faults)
    return built


def refusal(model: type[Settings], name: str, value: Any) -> str | None:
    """Why a setting cannot have a value, whatever the others are; nothing where it can.

    >>> from amlp_ray.config import PretrainSettings
    >>> refusal(PretrainSettings, "ratio.end", 1.2)
    'ratio.end is 1.2, but must be less than 1.'
    """
    try:
        _adapter(model, name).validate_python(value)
    except ValidationError as error:
        found = error.errors(include_url=False)
        return f"{name} is {value!r}, but {' or '.join(dict.fromkeys(map(_wanted, found)))}."
    return None


@cache
def _adapter(model: type[Settings], name: str) -> TypeAdapter[Any]:
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


def assignments(texts: Iterable[str], source: str = "--set") -> dict[str, Any]:
    """Read `name=value` texts, values as YAML scalars, into nested settings.

    >>> assignments(["epochs=20", "ratio.start=0.3"])
    {'epochs': 20, 'ratio': {'start': 0.3}}
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise SettingsError(f"{source} {text!r} is not of the form name=value, such as epochs=20.")
        try:
            values[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise SettingsError(f"{source} {text!r}: the value cannot be read.") from None
    for name in values:
        if any(other.startswith(f"{name}.") for other in values):
            raise SettingsError(f"{source} gives both a group and a value inside it: {', '.join(values)}.")
    return nested(values)


def from_assignments(model: type[S], base: Mapping[str, Any], texts: Iterable[str], source: str = "--set") -> S:
    """Validate `base`, then with `name=value` texts laid on top, so that a fault of a file is told as the file's."""
    if isinstance(base, Read):
        build(model, base, base.source.name)
    return build(model, merged(base, assignments(texts, source)), source)


def read_yaml(path: str | Path) -> Read:
    """Read a YAML mapping. Raises SettingsError where the file is missing, not YAML, or no mapping."""
    path = Path(path)
    if not path.is_file():
        raise SettingsError(f"There is no settings file {path}; check the path.")
    try:
        loader = _Loader(path.read_text())
        root = loader.get_single_node()
        values = loader.construct_document(root) if root else None
        lines: dict[str, int] = {}
        twice = list(_note_lines(root, "", lines)) if isinstance(root, yaml.MappingNode) else []
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise SettingsError(f"{at} is not valid YAML: {problem}.") from None
    # PyYAML lets Python's own errors through where a tag such as !!int stands before something else.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise SettingsError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path} must hold keys and values, not {type(values).__name__}.")
    return Read(values, Source(str(path), lines, tuple(twice)))


class _Loader(yaml.SafeLoader):
    """YAML without code, in which 1e-3 is a number: YAML 1.1 takes it for text, and asks for 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _note_lines(node: yaml.MappingNode, prefix: str, lines: dict[str, int]) -> Iterator[Fault]:
    """Fill in the line of each key by dotted name; faults are keys that are given twice."""
    first: dict[str, int] = {}
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if key.value in first and key.value != "<<":
            yield Fault(name, f"{name} is given twice, in lines {first[key.value]} and {line}; keep one.", line)
        first.setdefault(key.value, line)
        lines.setdefault(name, line)
        yield from _note_inner(value, f"{name}.", lines)


def _note_inner(node: yaml.Node, prefix: str, lines: dict[str, int]) -> Iterator[Fault]:
    if isinstance(node, yaml.MappingNode):
        yield from _note_lines(node, prefix, lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines.setdefault(f"{prefix}{i}", item.start_mark.line + 1)
            yield from _note_inner(item, f"{prefix}{i}.", lines)


def write_yaml(settings: Settings | Mapping[str, Any], path: Path) -> None:
    """Write settings in full, so that a later change of a default does not change an old run."""
    values = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else dict(settings)
    write_whole(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


_TAGS = ("range", "choice", "fixed", "derived", "str", "int", "float", "bool", "none")


def _faults(model: type[BaseModel], error: ValidationError, values: Mapping[str, Any]) -> list[Fault]:
    out: list[Fault] = []
    wanted: dict[str, dict[str, Any]] = {}  # of values that fit no arm of a union: what each arm takes
    for fault in error.errors(include_url=False):
        where = _place(fault["loc"], values, fault["type"])
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, SettingsError):
            out += [Fault(f"{where}.{key}", text) for key, text in zip(cause.keys, cause.faults, strict=True)]
        elif fault["type"] == "extra_forbidden":
            out.append(Fault(where, _unknown(model, where)))
        elif fault["type"] == "missing":
            out.append(Fault(where, f"{where} is missing."))
        elif fault["type"] == "value_error":
            text = fault["msg"].removeprefix("Value error, ").rstrip(".")
            about = text.split(maxsplit=1)[0].rstrip(
                ":"
            )  # sentences of ours begin with the setting that they are about
            out.append(Fault(f"{where}.{about}".lstrip("."), f"{where}: {text}." if where else f"{text}."))
        else:
            wanted.setdefault(where, {})[_wanted(fault)] = fault["input"]
    for where, texts in wanted.items():
        if any(other.startswith(f"{where}.") for other in [*wanted, *(fault.key for fault in out)]):
            continue  # of the arm that was meant, something inside is at fault
        given = next(iter(texts.values()))
        shown = repr(given) if len(repr(given)) < 80 else f"of type {type(given).__name__}"
        out.append(Fault(where, f"{where} is {shown}, but {' or '.join(texts)}."))
    return out


def _place(loc: Sequence[int | str], values: Any, kind: str) -> str:
    """Dotted name of what is at fault. In `loc` pydantic names the arms of unions as well, which no file has."""
    keys = []
    for i, part in enumerate(loc):
        inside = isinstance(values, Mapping) and part in values
        if inside or (isinstance(values, list | tuple) and isinstance(part, int) and part < len(values)):
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
            f"{group}.{name}" for name in _fields_inside(model.model_fields[where.partition(".")[0]].annotation)
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
    return list(dict.fromkeys(name for part in get_args(annotation) for name in _fields_inside(part)))


def _wanted(fault: Mapping[str, Any]) -> str:
    """What is accepted, in pydantic's words made half a sentence."""
    text = re.sub(r" or instance of \w+$", "", fault["msg"].removeprefix("Value error, ").rstrip("."))
    text = re.sub(r"^(Input|String|List|Dictionary|Tuple|Value) should", "must", text)
    return text[0].lower() + text[1:]


def _names(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, about in model.model_fields.items():
        if isinstance(about.annotation, type) and issubclass(about.annotation, BaseModel):
            yield from _names(about.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name
