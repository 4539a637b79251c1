"""Merge config values: nested mappings, dotted names, and `name=value` texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from amlp_ray.config.base import Config, ConfigValues, S, build
from amlp_ray.errors import ConfigError


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


def flat(config: Config | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested settings into dotted names, the inverse of `nested`."""
    items = config.model_dump() if isinstance(config, BaseModel) else config
    out: dict[str, Any] = {}
    for key, value in items.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def parse_overrides(texts: Iterable[str], source: str = "--set") -> dict[str, Any]:
    """Read `name=value` texts, values as YAML scalars, into nested settings.

    >>> parse_overrides(["epochs=20", "ratio.start=0.3"])
    {'epochs': 20, 'ratio': {'start': 0.3}}
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(
                f"{source} {text!r} is not of the form name=value, such as epochs=20."
            )
        try:
            values[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{source} {text!r}: the value cannot be read.") from None
    for name in values:
        if any(other.startswith(f"{name}.") for other in values):
            raise ConfigError(
                f"{source} gives both a group and a value inside it: {', '.join(values)}."
            )
    return nested(values)


def build_with_overrides(
    model: type[S], base: Mapping[str, Any], texts: Iterable[str], source: str = "--set"
) -> S:
    """Validate `base`, then with `name=value` texts laid on top, so that a fault of a file is told as the file's."""
    if isinstance(base, ConfigValues):
        build(model, base, base.source.name)
    return build(model, merged(base, parse_overrides(texts, source)), source)
