"""Read and write YAML config files, with the line of every key.

ruamel.yaml keeps lines too, but was slower (7.5 against 3.5 ms for a study file), reads `on`, `yes`
and `010` by another version of YAML, ignores tags that ask for code instead of refusing them, and
stops at the first key that is given twice, where all problems of a file are listed here.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from amlp_ray.config.base import (
    Config,
    ConfigIssue,
    ConfigSource,
    ConfigT,
    ConfigValues,
    build,
)
from amlp_ray.errors import ConfigError, describe_error
from amlp_ray.utils.files import atomic_write
from amlp_ray.utils.text import decode_text

# PyYAML raises Python's own errors where a tag such as !!int or a date does not fit its value.
YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
# Far more than any settings file has. Aliases of aliases would expand to billions.
MAX_BYTES = 1_000_000
MAX_VALUES = 100_000
REPLACED_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp")
DIGEST_LINE = re.compile(r"# sha256 ([0-9a-f]{64}) ")

logger = logging.getLogger(__name__)


def read_yaml(path: str | Path) -> ConfigValues:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is missing, not YAML, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no settings file {path}; check the path.")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(
            f"{path} holds {path.stat().st_size} bytes, but a settings file has at most "
            f"{MAX_BYTES}; check the path."
        )
    keys = _KeyIndex()
    try:
        values, root = _parse(decode_text(path.read_bytes()))
        if isinstance(root, yaml.MappingNode):
            keys.add(root, "")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{position} is not valid YAML: {problem}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not text in UTF-8 or UTF-16 (byte {error.start}); save it as such."
        ) from None
    except YAML_ERRORS as error:
        raise ConfigError(f"{path} is not valid YAML: {describe_error(error)}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, not {type(values).__name__}.")
    return ConfigValues(values, ConfigSource(str(path), keys.lines, tuple(keys.duplicates)))


def parse_yaml(text: str) -> Any:
    """Parse a YAML text such as the value of a `--set`.

    Raises:
        One of YAML_ERRORS: it is no YAML, or too large.
    """
    return _parse(text)[0]


def _parse(text: str) -> tuple[Any, yaml.Node | None]:
    """Return the values and the root node of a YAML text."""
    loader = _Loader(text)
    root = loader.get_single_node()
    if root is None:
        return None, None
    if _count_values(root, {}) > MAX_VALUES:
        raise ValueError(f"its aliases stand for more than {MAX_VALUES} values; write fewer out")
    return loader.construct_document(root), root


def _count_values(node: yaml.Node, counted: dict[int, int]) -> int:
    """Count the values below a node with all aliases written out, without writing them out.

    A node that holds itself counts as too many.
    """
    if id(node) not in counted:
        counted[id(node)] = MAX_VALUES + 1
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in children for child in pair]
        counted[id(node)] = 1 + sum(_count_values(child, counted) for child in children)
    return counted[id(node)]


class _Loader(yaml.SafeLoader):
    """YAML without code, in which numbers and names are what they look like.

    1e-3 is a number, which YAML 1.1 accepts only as 1.0e-3. 010 is ten and not eight, 1:30 is no
    number of seconds, and 2024-05-01 is a text.
    """


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in REPLACED_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0|[1-9][\d_]*|0x[\da-fA-F][\da-fA-F_]*|0b[01][01_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


class _KeyIndex:
    """Lines of all keys by dotted name, and the keys that are given twice."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.duplicates: list[ConfigIssue] = []

    def add(self, node: yaml.Node, prefix: str) -> None:
        """Add the keys below a node; `prefix` ends with a dot unless it is empty."""
        if isinstance(node, yaml.MappingNode):
            self._add_mapping(node, prefix)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.lines.setdefault(f"{prefix}{index}", item.start_mark.line + 1)
                self.add(item, f"{prefix}{index}.")

    def _add_mapping(self, node: yaml.MappingNode, prefix: str) -> None:
        first_lines: dict[str, int] = {}
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            line = key.start_mark.line + 1
            if key.value in first_lines and key.value != "<<":
                first = first_lines[key.value]
                text = f"{name} is given twice, in lines {first} and {line}; keep one."
                self.duplicates.append(ConfigIssue(name, text, line))
            first_lines.setdefault(key.value, line)
            self.lines.setdefault(name, line)
            self.add(value, f"{name}.")


def write_record(config: Config, path: Path) -> None:
    """Write the settings that a run was begun with, and a digest of them in the first line."""
    text = _to_text(config.model_dump(mode="json"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    atomic_write(path, f"# sha256 {digest} of the lines below, which stay as they are\n{text}")


def read_record(model: type[ConfigT], path: Path) -> ConfigT:
    """Read the settings that a run was begun with.

    Raises:
        ConfigError: the file was changed after it was written, or is no such file.
    """
    return build(model, read_record_values(path), str(path))


def read_record_values(path: Path) -> ConfigValues:
    """Read the settings that a run was begun with as they were written, without today's defaults.

    Raises:
        ConfigError: the file was changed after it was written, or is no such file.
    """
    values = read_yaml(path)
    # Whatever the encoding is now, it was written in UTF-8.
    first, _, content = path.read_bytes().partition(b"\n")
    if match := DIGEST_LINE.match(first.decode("utf-8", "replace")):
        if hashlib.sha256(content).hexdigest() != match[1]:
            raise ConfigError(
                f"{path} was changed after it was written: its digest does not fit; restore it, or "
                f"begin again in another folder."
            )
    else:
        logger.warning("%s has no digest, so it is not known whether it was changed.", path)
    return values


def write_yaml(config: Config | Mapping[str, Any], path: Path) -> None:
    """Write settings in full, so that a later change of a default does not change an old run."""
    values = config.model_dump(mode="json") if isinstance(config, BaseModel) else dict(config)
    atomic_write(path, _to_text(values))


def _to_text(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
