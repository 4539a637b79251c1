"""Print the reference of the public Python API in Markdown, from the docstrings: `make docs`.

What `amlp_ray.__all__` lists is public. Configs are described in settings.md, field by field.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from types import NoneType
from typing import Any

import amlp_ray
from amlp_ray.config.base import Config
from amlp_ray.config.reference import field_docstrings

HEADER = """\
# Python API

Everything here is imported from `amlp_ray` itself. Written by `make docs` from the docstrings.
"""
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")


def page() -> str:
    """Return the whole page."""
    public = {name: getattr(amlp_ray, name) for name in amlp_ray.__all__}
    configs = {name: item for name, item in public.items() if _is_config(item)}
    blocks = [HEADER]
    for name, item in public.items():
        if name not in configs:
            blocks += _class(name, item) if inspect.isclass(item) else _function(name, item)
    blocks.append("## Result types\n")
    blocks.append("What these functions return, and what that holds.\n")
    for item in _result_types(public.values()):
        blocks += _result_type(item)
    blocks.append("## Configs\n")
    blocks.append("Their fields are the settings of [settings.md](settings.md).\n")
    blocks += [f"- `{name}`: {_summary(item)}" for name, item in configs.items()]
    return "\n".join(blocks).rstrip() + "\n"


def _is_config(item: Any) -> bool:
    return inspect.isclass(item) and issubclass(item, Config)


def _function(name: str, function: Any, level: str = "##") -> Iterator[str]:
    yield f"{level} `{name}`\n"
    yield f"```python\n{_signature(name.rpartition('.')[2], function)}\n```\n"
    yield _markdown(inspect.getdoc(function) or "")


def _class(name: str, item: type) -> Iterator[str]:
    yield f"## `{name}`\n"
    yield _markdown(inspect.getdoc(item) or "")
    for member_name, member in vars(item).items():
        if member_name.startswith("_"):
            continue
        if isinstance(member, classmethod | staticmethod):
            yield from _function(f"{name}.{member_name}", getattr(item, member_name), "###")
        elif inspect.isfunction(member):
            yield from _function(f"{name}.{member_name}", member, "###")
        elif description := inspect.getdoc(member):
            yield f"### `{name}.{member_name}`\n"
            yield _markdown(description)


def _result_types(public: Iterable[Any]) -> list[type]:
    """Return what documented functions return and fields of that hold, if it has fields."""
    known = list(public)
    functions = [item for item in known if inspect.isfunction(item)]
    for item in filter(inspect.isclass, known):
        members = [getattr(item, name) for name in vars(item) if not name.startswith("_")]
        functions += [getattr(member, "__func__", member) for member in members]
    pending = [
        result
        for function in functions
        if inspect.isfunction(function)
        for result in _named_types(function.__annotations__.get("return", ""), function.__module__)
    ]
    results: list[type] = []
    for result in pending:
        if result in results or result in known:
            continue
        results.append(result)
        for annotation in _annotations(result).values():
            pending += _named_types(annotation, result.__module__)
    return sorted(results, key=lambda item: item.__name__)


def _named_types(annotation: str, module: str) -> Iterator[type]:
    """Yield the dataclasses and named tuples of ours that an annotation names."""
    for dotted_name in re.findall(r"[A-Za-z_][\w.]*", annotation):
        first, *rest = dotted_name.split(".")
        item = getattr(sys.modules[module], first, None) or _imported_for_types(first, module)
        for part in rest:
            item = getattr(item, part, None)
        is_record = is_dataclass(item) or hasattr(item, "_fields")
        if is_record and item.__module__.startswith("amlp_ray."):
            yield item


def _imported_for_types(name: str, module: str) -> Any:
    """Return what a module imports by a name for annotations only; None if nothing."""
    for node in ast.walk(ast.parse(inspect.getsource(sys.modules[module]))):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return getattr(importlib.import_module(str(node.module)), name, None)
    return None


def _annotations(item: type) -> dict[str, str]:
    """Return the annotations of a class as written; those of a named tuple are wrapped."""
    annotations = item.__annotations__.items()
    return {name: str(getattr(text, "__forward_arg__", text)) for name, text in annotations}


def _result_type(item: type) -> Iterator[str]:
    yield f"### `{item.__name__}`\n"
    yield _markdown(inspect.getdoc(item) or "")
    texts = field_docstrings(item)
    for name, member in vars(item).items():
        if isinstance(member, property):
            texts[name] = _summary(member)
    lines = []
    annotations = _annotations(item)
    for name in dict.fromkeys([*annotations, *texts]):
        annotation = f": {annotations[name]}" if name in annotations else ""
        text = f": {texts[name]}" if name in texts else ""
        lines.append(f"- `{name}{annotation}`{text}")
    yield "\n".join(lines) + "\n"


def _signature(name: str, function: Any) -> str:
    """Format a signature, one parameter a line where it would be longer than a line."""
    signature = inspect.signature(function)
    parameters = list(_parameters(signature))
    returns = f" -> {signature.return_annotation}"
    if signature.return_annotation is signature.empty:
        returns = ""
    text = f"{name}({', '.join(parameters)}){returns}"
    if len(text) <= 80:
        return text
    lines = [f"    {parameter}," for parameter in parameters]
    return "\n".join([f"{name}(", *lines, f"){returns}"])


def _parameters(signature: inspect.Signature) -> Iterator[str]:
    """Yield the parameters as written, without `self`; annotations are strings here."""
    separated = False  # a star stands before the keyword-only parameters
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            separated = True
        if parameter.kind is parameter.KEYWORD_ONLY and not separated:
            separated = True
            yield "*"
        yield _parameter(parameter)


def _parameter(parameter: inspect.Parameter) -> str:
    stars = ""
    if parameter.kind is parameter.VAR_POSITIONAL:
        stars = "*"
    elif parameter.kind is parameter.VAR_KEYWORD:
        stars = "**"
    text = f"{stars}{parameter.name}: {parameter.annotation}"
    if parameter.default is parameter.empty:
        return text
    default = parameter.default
    shown = default if isinstance(default, bool | int | float | str | tuple | NoneType) else "..."
    return f"{text} = {shown!r}" if shown != "..." else f"{text} = ..."


def _summary(item: Any) -> str:
    return (inspect.getdoc(item) or "").partition("\n\n")[0].replace("\n", " ")


def _markdown(docstring: str) -> str:
    """Turn a Google-style docstring into Markdown: sections as lists, examples as code."""
    blocks = []
    for block in docstring.split("\n\n"):
        heading = block.partition(":")[0]
        if heading in SECTIONS and block.startswith(f"{heading}:\n"):
            blocks.append(_section(heading, block.split("\n")[1:]))
        elif block.startswith(">>>"):
            blocks.append(f"```pycon\n{block}\n```")
        else:
            blocks.append(block)
    return "\n\n".join(blocks) + "\n"


def _section(heading: str, lines: list[str]) -> str:
    items: list[str] = []
    for line in lines:
        if re.match(r" {4}\S", line):
            name, colon, text = line.strip().partition(": ")
            items.append(f"- `{name}`: {text}" if colon else f"- {line.strip()}")
        else:
            items[-1] += f" {line.strip()}"
    return f"**{heading}**\n\n" + "\n".join(items)


if __name__ == "__main__":
    print(page(), end="")
