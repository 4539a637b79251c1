"""Show what was searched, what was fixed, and by which rules."""

from __future__ import annotations

from typing import Any

from amlp_ray.config import Choice, Derived, Fixed, Parameter, PretrainConfig, Range
from amlp_ray.config.overrides import flatten
from amlp_ray.study.report.report_data import TITLES, ReportData
from amlp_ray.study.report.tables import MISSING, Table, show, text_table

COLUMNS = ["Parameter", "Is", "Values", "Default", "Only where"]
# A column that says this alone says nothing, and is left out.
PLAIN_VALUES = {"Is": "searched", "Default": MISSING}


def space(data: ReportData) -> Table:
    """List parameters as declared; those that only old trials have are named as such."""
    rows = []
    for name in dict.fromkeys([*data.space, *data.parameter_names()]):
        parameter = data.space.get(name)
        if parameter is None:
            rows.append([name, "no longer searched", "earlier trials have it", MISSING, MISSING])
            continue
        default = show(parameter.default) if isinstance(parameter, Range | Choice) else MISSING
        kind = _kind(name, parameter)
        rows.append([name, kind, _values(parameter), default, _condition(parameter.when)])
    indices = []
    for index, column in enumerate(COLUMNS):
        if any(row[index] != PLAIN_VALUES.get(column) for row in rows):
            indices.append(index)
    columns = [COLUMNS[index] for index in indices]
    return text_table(columns, [[row[index] for index in indices] for row in rows])


def fixed(data: ReportData) -> Table:
    """List what the study sets for all of its trials and does not search."""
    settings = flatten(data.config.pretrain).items()
    rows = [[name, show(value)] for name, value in settings if name not in data.space]
    return text_table(["Setting", "Value"], rows)


def rules(data: ReportData) -> list[str]:
    """Say where the space comes from, what is optimized, and how trials are sampled and pruned."""
    config = data.config
    sentences = []
    if isinstance(config.space, str):
        sentences.append(
            f"The space is the Python function {config.space}; "
            f"the table shows what trials were sampled from so far."
        )
    if config.require:
        sentences.append("Required of every trial: " + "; ".join(config.require) + ".")
    goals = [f"{TITLES[name]} ({direction})" for name, direction in config.objectives.items()]
    sentences.append(f"Objective{'s' if len(goals) > 1 else ''}: {', '.join(goals)}.")
    if config.limits:
        limits = [f"{TITLES[name]} at most {limit:g}" for name, limit in config.limits.items()]
        sentences.append(
            f"Limits: {', '.join(limits)}. A trial beyond them is not chosen as the best while "
            f"one within them is there."
        )
    sampler = f"Sampler {config.sampler.name}"
    sentences.append(f"{sampler}; {_pruning_words(data)}; seed {config.seed}.")
    return sentences


def _pruning_words(data: ReportData) -> str:
    pruner = data.config.pruner
    rungs = f"{pruner.rungs} rungs"
    if pruner.spacing == "geometric":
        rungs += ", spaced geometrically"
    if pruner.name == "none":
        return f"scored at {rungs}, nothing is pruned"
    return f"pruner {pruner.name} at {rungs}, after {pruner.min_steps} steps at the earliest"


def _kind(name: str, parameter: Parameter) -> str:
    if isinstance(parameter, Fixed):
        return "fixed"
    if isinstance(parameter, Derived):
        return "derived"
    is_setting = name in flatten(PretrainConfig())
    return "searched" if is_setting else "searched, a helper"


def _values(parameter: Parameter) -> str:
    if isinstance(parameter, Fixed):
        return show(parameter.value)
    if isinstance(parameter, Derived):
        return f"= {parameter.expression}"
    if isinstance(parameter, Choice):
        return ", ".join(show(choice) for choice in parameter.choices)
    values = f"{parameter.low:g} to {parameter.high:g}"
    if parameter.step:
        values += f", step {parameter.step:g}"
    return values + (", logarithmic" if parameter.log else "")


def _condition(when: dict[str, Any] | None) -> str:
    if not when:
        return "always"
    parts = []
    for name, value in when.items():
        choices = value if isinstance(value, list) else [value]
        parts.append(f"{name} is {' or '.join(show(choice) for choice in choices)}")
    return " and ".join(parts)
