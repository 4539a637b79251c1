"""Reading and merging settings, and saying what is wrong with them in one sentence.

`config/` holds the settings themselves; this module holds what all of them share.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from amlp_ray.errors import SettingsError
from amlp_ray.files import write_whole


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys are errors, NaN and infinity are not numbers here."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)


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


def build(model: type[S], values: Mapping[str, Any], source: str) -> S:
    """Validate `values` as `model`.

    Raises:
        SettingsError: with one sentence per fault that names `source`, the key, the value and what is accepted.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise SettingsError(" ".join(_sentences(model, error, source))) from None


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
    """Validate `base` with `name=value` texts laid on top."""
    return build(model, merged(base, assignments(texts, source)), source)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises SettingsError where the file is missing, not YAML, or no mapping."""
    path = Path(path)
    if not path.is_file():
        raise SettingsError(f"There is no settings file {path}; check the path.")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path} must hold keys and values, not {type(values).__name__}.")
    return values


def write_yaml(settings: Settings | Mapping[str, Any], path: Path) -> None:
    """Write settings in full, so that a later change of a default does not change an old run."""
    values = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else dict(settings)
    write_whole(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _sentences(model: type[BaseModel], error: ValidationError, source: str) -> list[str]:
    known = list(_names(model))
    out = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"] if part not in ("range", "choice"))
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where, known, n=1, cutoff=0.5)
            group = where.rpartition(".")[0]
            siblings = [name for name in known if name.rpartition(".")[0] == group]
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(siblings) or 'none'}."
            out.append(f"{source}: unknown setting {where!r}; {hint}")
        elif fault["type"] == "missing":
            out.append(f"{source}: {where} is missing.")
        else:
            text = fault["msg"].removeprefix("Value error, ").rstrip(".")
            text = text.replace("Input should be", "must be").replace("should have", "must have")
            if fault["type"] == "value_error":
                out.append(f"{source}: {where}: {text}." if where else f"{source}: {text}.")
            else:
                out.append(f"{source}: {where} is {fault['input']!r}, but {text[0].lower()}{text[1:]}.")
    return out


def _names(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name
