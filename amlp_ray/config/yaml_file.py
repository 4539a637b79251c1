"""Read and write YAML config files, with the line of every key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from amlp_ray.config.base import Config, ConfigIssue, ConfigSource, ConfigValues
from amlp_ray.errors import ConfigError
from amlp_ray.utils.files import write_whole


def read_yaml(path: str | Path) -> ConfigValues:
    """Read a YAML mapping. Raises ConfigError where the file is missing, not YAML, or no mapping."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no settings file {path}; check the path.")
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
        raise ConfigError(f"{at} is not valid YAML: {problem}.") from None
    # PyYAML lets Python's own errors through where a tag such as !!int stands before something else.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, not {type(values).__name__}.")
    return ConfigValues(values, ConfigSource(str(path), lines, tuple(twice)))


class _Loader(yaml.SafeLoader):
    """YAML without code, in which 1e-3 is a number: YAML 1.1 takes it for text, and asks for 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _note_lines(
    node: yaml.MappingNode, prefix: str, lines: dict[str, int]
) -> Iterator[ConfigIssue]:
    """Fill in the line of each key by dotted name; faults are keys that are given twice."""
    first: dict[str, int] = {}
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if key.value in first and key.value != "<<":
            yield ConfigIssue(
                name,
                f"{name} is given twice, in lines {first[key.value]} and {line}; keep one.",
                line,
            )
        first.setdefault(key.value, line)
        lines.setdefault(name, line)
        yield from _note_inner(value, f"{name}.", lines)


def _note_inner(node: yaml.Node, prefix: str, lines: dict[str, int]) -> Iterator[ConfigIssue]:
    if isinstance(node, yaml.MappingNode):
        yield from _note_lines(node, prefix, lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines.setdefault(f"{prefix}{i}", item.start_mark.line + 1)
            yield from _note_inner(item, f"{prefix}{i}.", lines)


def write_yaml(config: Config | Mapping[str, Any], path: Path) -> None:
    """Write settings in full, so that a later change of a default does not change an old run."""
    values = config.model_dump(mode="json") if isinstance(config, BaseModel) else dict(config)
    write_whole(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
