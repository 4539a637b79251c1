"""Every setting as a table: name, accepted values, default, and the reason that stands beside it in the source.

Accepted values come from the models themselves, so that a table says what is checked. A reason is the comment at the
end of a setting's line or, where there is none, the comment above it. A comment above a setting that has one at its
end as well heads those that follow.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from amlp_ray.config import pretrain
from amlp_ray.config.base import Config
from amlp_ray.config.overrides import flat
from amlp_ray.config.pretrain import VARIANTS


@dataclass(frozen=True)
class Setting:
    """One row. `default` is what the setting has under no variant; None and `required` where it must be given."""

    name: str
    accepts: str
    default: Any
    required: bool
    reason: str


@dataclass(frozen=True)
class Section:
    """Settings that belong together: `group` is the dotted name of their model, empty for the outermost."""

    group: str
    about: str
    config: tuple[Setting, ...]


class Comment(NamedTuple):
    """What is said of a statement: in the lines right above it, and at the end of its own lines."""

    above: str
    beside: str


def sections(model: type[Config], group: str = "") -> list[Section]:
    """Every setting of a model, its own first, then those of the models in it; names are dotted.

    Models that are values of a mapping stand under `<name>`, for the name a user gives them.
    """
    comments = field_comments(model)
    schema = model.model_json_schema()["properties"]
    out = [Section(group, " ".join((inspect.getdoc(model) or "").split("\n\n")[0].split()), ())]
    nested: list[Section] = []
    for name, field in model.model_fields.items():
        path = f"{group}.{name}" if group else name
        inner = list(_models(field.annotation))
        mapping = field.annotation not in inner
        for part in inner:
            nested += sections(part, f"{path}.<name>" if mapping else path)
        if inner and not mapping:
            continue
        said = comments[name]
        if said.above and said.beside:
            out.append(Section(group, said.above, ()))
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        row = Setting(
            path, accepted(schema[name]), default, field.is_required(), said.beside or said.above
        )
        out[-1] = Section(group, out[-1].about, (*out[-1].config, row))
    return [section for section in out if section.config] + nested


def variants() -> list[dict[str, Any]]:
    """Every named variant: what it is, and the settings it lays over the defaults, by dotted name."""
    tree = ast.parse(source := inspect.getsource(pretrain))
    table = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and _name(node.target) == "VARIANTS"
    )
    assert isinstance(table, ast.Dict)
    spans = {
        str(ast.literal_eval(key)): (key.lineno, value.end_lineno or value.lineno)
        for key, value in zip(table.keys, table.values, strict=True)
        if key is not None
    }
    said = comments_of(source, spans)
    return [
        {"variant": name, "sets": flat(VARIANTS[name]), "about": said[name].above}
        for name in VARIANTS
    ]


def field_comments(model: type[Config]) -> dict[str, Comment]:
    """The comments of a model's fields, its own and those of the models it builds on, by field."""
    return {
        name: comment
        for base in reversed(model.__mro__)
        if _is_model(base)
        for name, comment in _own(base).items()
    }


def _is_model(base: type) -> bool:
    return issubclass(base, Config) and base is not Config


def _own(model: type) -> dict[str, Comment]:
    source = inspect.getsource(model)
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    fields = [node for node in body.body if isinstance(node, ast.AnnAssign)]
    return comments_of(
        source,
        {_name(node.target): (node.lineno, node.end_lineno or node.lineno) for node in fields},
    )


def comments_of(source: str, spans: Mapping[str, tuple[int, int]]) -> dict[str, Comment]:
    """The comments of statements, given the first and last line of each.

    >>> comments_of("# one\\n# two\\nx = '#'  # three\\n", {"x": (3, 3)})
    {'x': Comment(above='one two', beside='three')}
    """
    beside: dict[int, str] = {}
    above: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = token.line.lstrip().startswith("#")
            (above if alone else beside)[token.start[0]] = token.string.removeprefix("#").strip()
    out = {}
    for name, (first, last) in spans.items():
        top = first
        while top - 1 in above:
            top -= 1
        out[name] = Comment(
            " ".join(above[line] for line in range(top, first)),
            " ".join(beside[line] for line in range(first, last + 1) if line in beside),
        )
    return out


def accepted(schema: Mapping[str, Any]) -> str:
    """What a JSON schema accepts, in words.

    >>> accepted({"type": "number", "exclusiveMinimum": 0, "maximum": 1})
    'number above 0, at most 1'
    """
    if "enum" in schema:
        return ", ".join(map(shown, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(map(accepted, schema["anyOf"]))
    kind = schema["type"]
    if kind == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(map(accepted, schema['prefixItems']))}]"
        return f"list of {accepted(schema['items'])}" + (
            ", not empty" if schema.get("minItems") else ""
        )
    if kind in ("integer", "number"):
        return " ".join(filter(None, (kind, _range(schema))))
    if kind == "string" and "pattern" in schema:
        return f"text like {schema['pattern']}"
    return {"boolean": "true, false", "string": "text", "object": "mapping", "null": "null"}[kind]


def shown(value: Any) -> str:
    """A value as it is written in a settings file."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _range(schema: Mapping[str, Any]) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f"{_bound(schema['minimum'])} to {_bound(schema['maximum'])}"
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    return ", ".join(
        f"{word} {_bound(schema[key])}" for key, word in words.items() if key in schema
    )


def _bound(value: float) -> str:
    large = isinstance(value, int) and value > 2**31 and value.bit_count() == 1
    return f"2^{int(value).bit_length() - 1}" if large else f"{value:g}"


def _models(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""
