"""Every setting as a table: name, accepted values, default, and description.

Accepted values come from the models' JSON schema, so the tables say what is checked. Descriptions
are the strings below the fields.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from amlp_ray.config.base import Config, models_in
from amlp_ray.config.overrides import flatten
from amlp_ray.config.pretrain import VARIANT_DESCRIPTIONS, VARIANTS

# Keywords of JSON schema, in words.
BOUNDS = (
    ("minimum", "at least"),
    ("exclusiveMinimum", "above"),
    ("maximum", "at most"),
    ("exclusiveMaximum", "below"),
)


@dataclass(frozen=True)
class Setting:
    """One row of a table."""

    name: str  # dotted
    accepts: str  # in words
    default: Any  # without any variant; None where the setting is required
    required: bool
    description: str


@dataclass(frozen=True)
class Section:
    """Settings that belong together."""

    group: str  # dotted name of their model, empty for the outermost
    about: str
    settings: list[Setting] = field(default_factory=list)


def sections(model: type[Config], group: str = "") -> list[Section]:
    """Return every setting of a model, its own first, then those of the models in it.

    Models that are values of a mapping stand under `<name>`, the name that a user gives them.
    """
    schema = model.model_json_schema()["properties"]
    descriptions = field_docstrings(model)
    headings = getattr(model, "SECTIONS", {})
    own = [Section(group, _one_line((inspect.getdoc(model) or "").split("\n\n")[0]))]
    inner: list[Section] = []
    for name, info in model.model_fields.items():
        path = f"{group}.{name}" if group else name
        models = list(models_in(info.annotation))
        if info.annotation in models:
            inner += sections(models[0], path)
            continue
        for value_model in models:
            inner += sections(value_model, f"{path}.<name>")
        if name in headings:
            own.append(Section(group, headings[name]))
        required = info.is_required()
        default = None if required else info.get_default(call_default_factory=True)
        description = descriptions.get(name, "")
        row = Setting(path, accepted(schema[name]), default, required, description)
        own[-1].settings.append(row)
    return [section for section in own if section.settings] + inner


def field_docstrings(model: type) -> dict[str, str]:
    """Return the string below each field of a class and of the configs it inherits from.

    pydantic's `use_attribute_docstrings` parses them whenever a class is made, which raised the
    import of the configs from 0.27 to 0.38 s in every process.
    """
    docstrings = {}
    for base in reversed(model.__mro__):
        if base is Config or not (base is model or issubclass(base, Config)):
            continue
        class_node = ast.parse(inspect.getsource(base)).body[0]
        assert isinstance(class_node, ast.ClassDef)
        for node, following in itertools.pairwise(class_node.body):
            if not isinstance(node, ast.AnnAssign) or not isinstance(following, ast.Expr):
                continue
            if isinstance(node.target, ast.Name) and isinstance(following.value, ast.Constant):
                docstrings[node.target.id] = _one_line(str(following.value.value))
    return docstrings


def variants() -> list[dict[str, Any]]:
    """Return every named variant: what it is, and the settings that differ, by dotted name."""
    return [
        {"variant": name, "sets": flatten(values), "about": VARIANT_DESCRIPTIONS[name]}
        for name, values in VARIANTS.items()
    ]


def accepted(schema: Mapping[str, Any]) -> str:
    """Describe in words what a JSON schema accepts.

    >>> accepted({"type": "number", "exclusiveMinimum": 0, "maximum": 1})
    'number above 0, at most 1'
    """
    if "enum" in schema:
        return ", ".join(map(format_value, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(map(accepted, schema["anyOf"]))
    if "prefixItems" in schema:
        return f"[{', '.join(map(accepted, schema['prefixItems']))}]"
    kind = schema["type"]
    if kind == "array":
        suffix = ", not empty" if schema.get("minItems") else ""
        return f"list of {accepted(schema['items'])}{suffix}"
    if kind in ("integer", "number"):
        return f"{kind} {_range(schema)}".rstrip()
    if kind == "string" and "pattern" in schema:
        return f"text like {schema['pattern']}"
    return {"boolean": "true, false", "string": "text", "object": "mapping", "null": "null"}[kind]


def format_value(value: Any) -> str:
    """Format a value as it is written in a settings file."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _range(schema: Mapping[str, Any]) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f"{_format_bound(schema['minimum'])} to {_format_bound(schema['maximum'])}"
    bounds = [f"{words} {_format_bound(schema[key])}" for key, words in BOUNDS if key in schema]
    return ", ".join(bounds)


def _format_bound(value: float) -> str:
    if isinstance(value, int) and value > 2**31 and value.bit_count() == 1:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
