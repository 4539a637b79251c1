"""What was searched, what was set, and by which rules."""

from __future__ import annotations

from typing import Any

from amlp_ray.config import Choice, Derived, Fixed, Parameter, PretrainConfig, Range
from amlp_ray.config.overrides import flat
from amlp_ray.study.report.report_data import TITLES, ReportData
from amlp_ray.study.report.tables import MISSING, Cell, Table, show


def space(facts: ReportData) -> Table:
    """Parameters as declared; those that only old trials have are named as such."""
    rows = []
    for name in dict.fromkeys([*facts.space, *facts.parameters()]):
        parameter = facts.space.get(name)
        if parameter is None:
            rows.append([name, "no longer searched", "earlier trials have it", MISSING, MISSING])
            continue
        default = show(parameter.default) if isinstance(parameter, Range | Choice) else MISSING
        rows.append(
            [name, _kind(name, parameter), _values(parameter), default, _condition(parameter.when)]
        )
    columns = ["Parameter", "Is", "Values", "Default", "Only where"]
    plain = {"Is": "searched", "Default": MISSING}  # a column that says this alone says nothing
    shown = [
        i for i, column in enumerate(columns) if any(row[i] != plain.get(column) for row in rows)
    ]
    return Table([columns[i] for i in shown], [[Cell(row[i]) for i in shown] for row in rows])


def fixed(facts: ReportData) -> Table:
    """What the study sets for all of its trials and does not search."""
    rows = [
        (name, value)
        for name, value in flat(facts.config.pretrain).items()
        if name not in facts.space
    ]
    return Table(["Setting", "Value"], [[Cell(name), Cell(show(value))] for name, value in rows])


def rules(facts: ReportData) -> list[str]:
    """Sentences on where the space comes from, what trials strive for, and how they are proposed and stopped."""
    config, sentences = facts.config, []
    if isinstance(config.space, str):
        sentences.append(
            f"The space is the Python function {config.space}; the table shows what trials were drawn from so far."
        )
    if config.require:
        sentences.append("Required of every trial: " + "; ".join(config.require) + ".")
    goals = ", ".join(
        f"{TITLES[name]} ({direction})" for name, direction in config.objectives.items()
    )
    sentences.append(f"Objective{'s' if len(config.objectives) > 1 else ''}: {goals}.")
    if config.limits:
        told = ", ".join(
            f"{TITLES[name]} at most {limit:g}" for name, limit in config.limits.items()
        )
        sentences.append(
            f"Limits: {told}. A trial beyond them is not chosen as the best while one within them is there."
        )
    pruner, rungs = config.pruner, f"{config.pruner.rungs} rungs"
    spacing = ", spaced geometrically" if pruner.spacing == "geometric" else ""
    prunes = f"scored at {rungs}{spacing}, nothing is pruned" if pruner.name == "none" else (
        f"pruner {pruner.name} at {rungs}{spacing}, after {pruner.min_steps} steps at the earliest"
    )  # fmt: skip
    sentences.append(f"Sampler {config.sampler.name}; {prunes}; seed {config.seed}.")
    return sentences


def _kind(name: str, parameter: Parameter) -> str:
    if isinstance(parameter, Fixed):
        return "fixed"
    if isinstance(parameter, Derived):
        return "derived"
    return (
        "searched" if name in flat(PretrainConfig()) else "searched, a helper"
    )  # other expressions use it


def _values(parameter: Parameter) -> str:
    if isinstance(parameter, Fixed):
        return show(parameter.value)
    if isinstance(parameter, Derived):
        return f"= {parameter.expression}"
    if isinstance(parameter, Choice):
        return ", ".join(show(choice) for choice in parameter.choices)
    values = f"{parameter.low:g} to {parameter.high:g}"
    values += f", step {parameter.step:g}" if parameter.step else ""
    return values + (", logarithmic" if parameter.log else "")


def _condition(when: dict[str, Any] | None) -> str:
    if not when:
        return "always"
    return " and ".join(
        f"{name} is {' or '.join(map(show, value)) if isinstance(value, list) else show(value)}"
        for name, value in when.items()
    )
