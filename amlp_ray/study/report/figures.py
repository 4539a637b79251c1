"""Figures of what was found: history, Pareto front, importances, settings."""

from __future__ import annotations

import math
from html import escape
from itertools import accumulate
from typing import Any

import plotly.graph_objects as go

from amlp_ray.config import Range
from amlp_ray.study.report.comparison import Baseline
from amlp_ray.study.report.plotting import (
    ACCENT,
    ARM_COLOURS,
    BLUE,
    PALE,
    SCALE,
    Figure,
    empty,
    hover,
    layout,
)
from amlp_ray.study.report.report_data import TITLES, ReportData, ReportedTrial, finite

MANY = 1000  # trials; above, the text under the pointer leaves parameters out, which would be most of the file
UNUSED = "\u2013"  # tick of a parameter that a trial did not have


def history(facts: ReportData, baselines: list[Baseline]) -> Figure:
    title = "Optimisation history"
    caption = (
        "Each mark is a trial in the order of asking; the line is the best complete trial so far, and dashes are means "
        "of baselines. Pruned trials stand at their last score, which is not comparable with full length."
    )
    scored = [
        run for run in facts.search if run.value is not None and run.state in ("COMPLETE", "PRUNED")
    ]
    if not scored:
        return Figure("history", title, caption, gap="No trial has been scored yet.")
    figure = empty("trial", facts.metric)
    for state, symbol, color in (("PRUNED", "x-thin-open", PALE), ("COMPLETE", "circle", BLUE)):
        runs = [run for run in scored if run.state == state]
        if runs:
            figure.add_scatter(
                x=[run.number for run in runs],
                y=[run.value for run in runs],
                mode="markers",
                name=state.lower(),
                marker={
                    "symbol": symbol, "size": 9 if len(scored) < MANY else 5, "color": color,
                    "line": {"width": 2 if state == "PRUNED" else 0, "color": color},
                },
                text=[hover(run, short=len(scored) > MANY) for run in runs],
                hovertemplate="%{text}<extra></extra>",
            )  # fmt: skip
    complete = [run for run in scored if run.state == "COMPLETE" and run.feasible]
    running = list(accumulate((run.value or 0.0 for run in complete), max))
    if complete:
        figure.add_scatter(
            x=[run.number for run in complete],
            y=running,
            mode="lines",
            name="best so far",
            line={"shape": "hv", "color": ACCENT},
            hoverinfo="skip",
        )
    ends = [min(run.number for run in scored) - 0.5, max(run.number for run in scored) + 0.5]
    for i, baseline in enumerate(baselines if facts.config.metric == "dsc" else []):
        line = {"dash": "dash", "width": 1.5, "color": ARM_COLOURS[i % len(ARM_COLOURS)]}
        figure.add_scatter(
            x=ends,
            y=[baseline.dsc] * 2,
            mode="lines",
            name=f"baseline {escape(baseline.name)}",
            line=line,
        )
    return Figure("history", title, caption, figure)


def fronts(facts: ReportData) -> list[Figure]:
    """Draw the metric against every other objective; nothing for a study of one objective."""
    names = list(facts.config.objectives)
    if len(names) < 2:
        return []
    first = facts.config.metric if facts.config.metric in names else names[0]
    return [_against(facts, other, first) for other in names if other != first]


def _against(facts: ReportData, x: str, y: str) -> Figure:
    key, title = f"front_{x}", f"{TITLES[y]} against {TITLES[x]}"
    two = len(facts.config.objectives) == 2
    caption = (
        "Each mark is a complete trial; those of the Pareto front, which no other beats in every objective, are red"
        + (" and joined" if two else "")
        + (", and trials that break a limit are crosses." if facts.config.limits else ".")
    )
    runs = [run for run in facts.search if run.state == "COMPLETE" and {x, y} <= run.values.keys()]
    if not runs:
        return Figure(key, title, caption, gap="No complete trial has all objectives yet.")
    figure = empty(TITLES[x], TITLES[y])
    members = {run.number for run in facts.front}
    kept = [run for run in runs if run.number not in members and run.feasible]
    broken = [run for run in runs if not run.feasible]
    for name, group, marker in (
        (
            "breaks a limit",
            broken,
            {"symbol": "x-thin-open", "size": 8, "color": PALE, "line": {"width": 2}},
        ),
        ("complete", kept, {"size": 7, "color": BLUE}),
        (
            "Pareto front",
            sorted(facts.front, key=lambda run: run.values[x]),
            {"size": 10, "color": ACCENT},
        ),
    ):
        if group:
            figure.add_scatter(
                x=[run.values[x] for run in group],
                y=[run.values[y] for run in group],
                mode="lines+markers" if two and name == "Pareto front" else "markers",
                line={"color": ACCENT, "width": 1.5, "shape": _corner(facts, x, y)},
                name=name,
                marker=marker,
                text=[hover(run, short=len(runs) > MANY) for run in group],
                hovertemplate="%{text}<br>%{x:.4g}<extra></extra>",
            )
    return Figure(key, title, caption, figure)


def _corner(facts: ReportData, x: str, y: str) -> str:
    """Shape of a line along a front: steps on the side that no trial has reached."""
    directions = {str(name): direction for name, direction in facts.config.objectives.items()}
    return "hv" if (directions[x] == "minimize") == (directions[y] == "maximize") else "vh"


def importances(facts: ReportData) -> list[Figure]:
    """Draw the importances for each objective."""
    several = len(facts.importances) > 1
    return [_importance(facts, name, several) for name in facts.importances]


def _importance(facts: ReportData, name: str, several: bool) -> Figure:
    key = f"importances_{name}" if several else "importances"
    title = "Importances" + (f" for {TITLES[name]}" if several else "")
    caption = (
        "The longer the bar, the more the best trials differ from all in this parameter (PED-ANOVA, shares of 1); the "
        "bars say nothing about direction, and with tens of trials they are rough."
    )
    found = facts.importances[name]
    if not found.shares:
        return Figure(key, title, caption, gap=found.gap or "")
    names = list(found.shares)[::-1]
    figure = empty("share", "")
    figure.add_bar(
        x=[found.shares[name] for name in names],
        y=[escape(name) for name in names],
        orientation="h",
        marker_color=BLUE,
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
    )
    figure.update_yaxes(automargin=True, showgrid=False)
    figure.update_layout(bargap=0.4)
    return Figure(key, title, caption, figure, height=110 + 32 * len(names))


def parallel(facts: ReportData) -> Figure:
    title = "Parallel coordinates"
    caption = (
        f"Each line is a complete trial, darker for a higher {facts.metric}; drag along an axis to pick lines; the "
        f"tick {UNUSED} holds trials in which a parameter had no effect and was not asked for."
    )
    complete = sorted((run for run in facts.search if run.finished), key=_value)[
        -MANY:
    ]  # good ones lie on top
    if sum(run.finished for run in facts.search) > MANY:
        caption += f" Only the best {MANY} trials are drawn."
    names = [name for name in facts.parameters() if any(name in run.params for run in complete)]
    if not names:
        return Figure(
            "parallel", title, caption, gap="No complete trial with a searched parameter yet."
        )
    values = [run.value for run in complete]
    axes = [_axis(facts, name, [run.params.get(name) for run in complete]) for name in names]
    figure = go.Figure(layout=layout())
    figure.add_parcoords(
        dimensions=[_axis(facts, facts.metric, list(values)), *axes],
        line={
            "color": values,
            "colorscale": SCALE,
            "showscale": True,
            "colorbar": {"title": {"text": facts.metric}},
        },
        labelangle=-15,
    )
    figure.update_layout(margin={"l": 60, "r": 20, "t": 90, "b": 20})
    return Figure("parallel", title, caption, figure, height=460, width=160 + 85 * len(names))


def _value(run: ReportedTrial) -> float:
    return run.value or 0.0


def _axis(facts: ReportData, name: str, values: list[Any]) -> dict[str, Any]:
    """One axis: numbers as they are or as logarithms, choices as ticks, and a lowest tick for absence."""
    absent = None in values
    numbers = [finite(value) for value in values if value is not None]
    declared = facts.space.get(name)
    if not numbers or None in numbers or not (declared is None or isinstance(declared, Range)):
        choices = sorted({str(value) for value in values if value is not None})
        ticks = [UNUSED, *choices] if absent else choices
        coded = [ticks.index(UNUSED if value is None else str(value)) for value in values]
        return {
            "label": escape(name),
            "values": coded,
            "range": [-0.2, len(ticks) - 0.8],
            "tickvals": list(range(len(ticks))),
            "ticktext": ticks,
        }
    log = isinstance(declared, Range) and declared.log
    known = [number for number in numbers if number is not None]
    ends = [*known, declared.low, declared.high] if isinstance(declared, Range) else known
    low, high = (math.log10(end) if log else end for end in (min(ends), max(ends)))
    low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    below = low - 0.12 * (high - low)
    marks = [low + (high - low) * i / 4 for i in range(5)]
    shown = [f"{10**mark if log else mark:.3g}" for mark in marks]
    places = [below if v is None else math.log10(v) if log else v for v in values]
    return {
        "label": escape(name),
        "values": places,
        "range": [below if absent else low, high],
        "tickvals": [below, *marks] if absent else marks,
        "ticktext": [UNUSED, *shown] if absent else shown,
    }
