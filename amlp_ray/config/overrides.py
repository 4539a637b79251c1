"""Merge config values: nested mappings, dotted names, and `name=value` texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from amlp_ray.config.base import Config, ConfigT, ConfigValues, build
from amlp_ray.config.yaml_file import YAML_ERRORS, parse_yaml
from amlp_ray.errors import ConfigError


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` updated with `overrides`; nested mappings and models are merged.

    >>> merge({"ratio": {"start": 0.3, "end": 0.5}}, {"ratio": {"end": 0.9}})
    {'ratio': {'start': 0.3, 'end': 0.9}}
    """
    result = dict(base)
    for key, value in overrides.items():
        if isinstance(value, BaseModel):
            value = value.model_dump()
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            value = merge(result[key], value)
        result[key] = value
    return result


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted names into nested mappings.

    >>> nest({"epochs": 5, "ratio.start": 0.3})
    {'epochs': 5, 'ratio': {'start': 0.3}}
    """
    result: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        mapping = result
        for group in groups:
            mapping = mapping.setdefault(group, {})
        mapping[last] = value
    return result


def flatten(config: Config | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested settings into dotted names, the inverse of `nest`.

    >>> flatten({"epochs": 5, "ratio": {"start": 0.3}})
    {'epochs': 5, 'ratio.start': 0.3}
    """
    values = config.model_dump() if isinstance(config, BaseModel) else config
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flatten(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def parse_overrides(texts: Iterable[str], source: str = "--set") -> dict[str, Any]:
    """Parse `name=value` texts, values as YAML scalars, into nested settings.

    Args:
        texts: such as `ratio.start=0.3`.
        source: what messages call them.

    Raises:
        ConfigError: a text has no name or no value, its value is not YAML, or a group is given
            beside a setting inside it.

    >>> parse_overrides(["epochs=20", "ratio.start=0.3"])
    {'epochs': 20, 'ratio': {'start': 0.3}}
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        start = repr(text if len(text) < 80 else f"{text[:77]}...")
        if not equals or not name:
            raise ConfigError(f"{source} {start} is not of the form name=value, such as epochs=20.")
        try:
            values[name.strip()] = parse_yaml(value)
        except YAML_ERRORS:
            raise ConfigError(
                f"{source} {start}: the value cannot be read; give a number, a word, or a list "
                f"such as [1, 2]."
            ) from None
    for name in values:
        if any(other.startswith(f"{name}.") for other in values):
            names = ", ".join(values)
            raise ConfigError(f"{source} gives both a group and a value inside it: {names}.")
    return nest(values)


def build_with_overrides(
    model: type[ConfigT], base: Mapping[str, Any], texts: Iterable[str]
) -> ConfigT:
    """Validate `base` updated with `name=value` texts.

    A file is validated by itself first, so that its errors name the file and its lines.
    """
    if isinstance(base, ConfigValues):
        build(model, base, base.source.name)
    return build(model, merge(base, parse_overrides(texts)), "--set")
