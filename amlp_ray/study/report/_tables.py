"""The tables of a report: rows of texts, and of numbers to sort them by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amlp_ray.config import Range
from amlp_ray.settings import flat
from amlp_ray.study.report._compare import Arm, Comparison, read
from amlp_ray.study.report._facts import Facts, Run, finite
from amlp_ray.study.report._verdict import spread

MISSING = "\u2013"
MEASURES = (("ppv", "PPV"), ("sensitivity", "Sensitivity"), ("ap", "Patch AP"))


@dataclass(frozen=True)
class Cell:
    text: str
    order: float | None = None  # sorts before the text does


@dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[list[Cell]]


def scores(facts: Facts, arms: list[Arm], comparisons: list[Comparison]) -> Table:
    """Best trial, arms and floors side by side."""
    columns = ["", "DSC", "Spread", *(title for _, title in MEASURES), "Empties correct"]
    columns += ["Best minus this", "95 % interval", "Best is"]
    rows, best, compared = [], facts.best, {item.arm.name: item for item in comparisons}
    if best is not None:
        subsets = best.measure("dsc_sd")
        noise = "one run" + ("" if subsets is None else f", SD {subsets:.3f} over label subsets")
        rows.append([f"Best trial ({best.number})", _three(best.dsc), noise, *_measured(best), *[MISSING] * 3])
    for arm in arms:
        name = "arm scratch (random frozen encoder)" if arm.name == "scratch" else f"arm {arm.name}"
        item = compared.get(arm.name)
        interval = f"{item.interval[0]:+.3f} to {item.interval[1]:+.3f}" if item and item.interval else MISSING
        versus = [f"{item.difference:+.3f}", interval, item.reading] if item else [MISSING] * 3
        rows.append([name, f"{arm.dsc:.3f}", spread(arm), *_measured(arm), *versus])
    scored = [*([best] if best else []), *(run for arm in arms for run in arm.runs)]
    floor = next((value for run in scored if (value := run.measure("mean_mask_dsc")) is not None), None)
    if floor is not None:
        versus = [MISSING] * 3
        if best and best.dsc is not None:
            difference = round(best.dsc - floor, 6)
            versus = [f"{difference:+.3f}", MISSING, read(difference, facts.settings.tie)]
        rows.append(["mean training mask on every image", _three(floor), *[MISSING] * 5, *versus])
    return Table(columns, [[Cell(text) for text in row] for row in rows])


def space(facts: Facts) -> Table:
    """Searched parameters as declared; those that only old trials have are named as such."""
    rows = []
    for name in facts.parameters():
        parameter = facts.settings.space.get(name)
        if parameter is None:
            rows.append([name, "no longer in the space; earlier trials have it", MISSING])
            continue
        if isinstance(parameter, Range):
            values = f"{parameter.low:g} to {parameter.high:g}"
            values += f", step {parameter.step:g}" if parameter.step else ""
            values += ", logarithmic" if parameter.log else ""
        else:
            values = ", ".join(show(choice) for choice in parameter.choices)
        rows.append([name, values, _condition(parameter.when)])
    return Table(["Parameter", "Values", "Only where"], [[Cell(text) for text in row] for row in rows])


def trials(facts: Facts) -> Table:
    """Every trial of the search, then every repeat of every arm."""
    names = facts.parameters()
    columns = ["Run", "State", "DSC", *(title for _, title in MEASURES), *names, "Epochs", "Seconds", "Seed", "Reason"]
    rows = []
    for place, run in enumerate([*facts.search, *facts.arms]):
        seconds = finite(run.attributes.get("seconds"))
        rows.append([
            Cell(run.name, place),
            Cell(run.state),
            Cell(_three(run.dsc), run.dsc),
            *(Cell(_three(run.measure(key)), run.measure(key)) for key, _ in MEASURES),
            *(_value(run.params[name]) if name in run.params else Cell(MISSING) for name in names),
            Cell(show(run.epochs), run.epochs),
            Cell(MISSING if seconds is None else f"{seconds:.0f}", seconds),
            _value(run.attributes.get("seed")),
            Cell(show(run.attributes.get("reason")) if run.state == "FAIL" else MISSING),
        ])  # fmt: skip
    return Table(columns, rows)


def environment(facts: Facts) -> Table:
    """Everything of environment.json by its dotted name, after the seeds that the settings hold."""
    settings = facts.settings
    rows = [
        ("seed of the study", settings.seed),
        ("seed of the probe's label subsets and folds", settings.probe.seed),
        (
            "seeds of the arms",
            sorted({run.attributes["seed"] for run in facts.arms if "seed" in run.attributes}, key=str),
        ),
        *flat(facts.environment).items(),
    ]
    return Table(["", ""], [[Cell(name), Cell(show(value))] for name, value in rows])


def parameters(run: Run) -> Table:
    rows = [[Cell(name), Cell(show(value))] for name, value in run.params.items()]
    return Table(["Parameter", "Value"], rows)


def fixed(facts: Facts) -> Table:
    """What the study sets for all of its trials and does not search."""
    rows = [(name, value) for name, value in flat(facts.settings.pretrain).items() if name not in facts.settings.space]
    return Table(["Setting", "Value"], [[Cell(name), Cell(show(value))] for name, value in rows])


def show(value: Any) -> str:
    """Show a value as it is written in YAML, with four digits and without line breaks."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(show(item) for item in value) or MISSING
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _value(value: Any) -> Cell:
    return Cell(show(value), finite(value))


def _measured(scored: Run | Arm) -> list[str]:
    return [*(_three(scored.measure(key)) for key, _ in MEASURES), _share(scored.measure("empty_correct"))]


def _condition(when: dict[str, Any] | None) -> str:
    if not when:
        return "always"
    return " and ".join(
        f"{name} is {' or '.join(map(show, value)) if isinstance(value, list) else show(value)}"
        for name, value in when.items()
    )


def _three(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.0f} %"
