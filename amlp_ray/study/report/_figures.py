"""The figures of a report, as plotly figures with a sentence on how to read each."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.io import to_html

from amlp_ray.config import Range
from amlp_ray.study.report._compare import Arm
from amlp_ray.study.report._curves import curves
from amlp_ray.study.report._facts import Facts, finite
from amlp_ray.study.report._plot import ACCENT, ARM_COLOURS, PALE, SCALE, Figure, empty, hover, layout

# plotly.js 4 offers to upload a figure to a cloud; figures of medical data stay where they are
CONFIG = {"responsive": True, "displaylogo": False, "showSendToCloud": False, "plotlyServerURL": ""}
UNUSED = "\u2013"  # tick of a parameter that a trial did not have


def figures(facts: Facts, arms: list[Arm]) -> list[Figure]:
    return [_history(facts, arms), _importances(facts), _parallel(facts), *curves(facts)]


def html(items: list[Figure]) -> dict[str, str]:
    """Return the HTML of each figure by its key; the first holds plotly.js, so that the page needs no network."""
    out: dict[str, str] = {}
    for item in items:
        if item.figure is not None:
            out[item.key] = to_html(
                item.figure,
                full_html=False,
                include_plotlyjs=not out,
                div_id=f"plot-{item.key}",
                default_width="100%",
                default_height=f"{item.height}px",
                config=CONFIG,
            )
    return out


def _history(facts: Facts, arms: list[Arm]) -> Figure:
    title = "Optimisation history"
    caption = (
        "Each mark is a trial in the order of asking; the line is the best complete trial so far, and dashes are means "
        "of arms. Pruned trials stand at their last score, which is not comparable with full length."
    )
    scored = [run for run in facts.search if run.dsc is not None and run.state in ("COMPLETE", "PRUNED")]
    if not scored:
        return Figure("history", title, caption, gap="No trial has been scored yet.")
    figure = empty("trial", "DSC")
    for state, symbol, colour in (("COMPLETE", "circle", "#3a8fb7"), ("PRUNED", "x-thin-open", PALE)):
        runs = [run for run in scored if run.state == state]
        if runs:
            figure.add_scatter(
                x=[run.number for run in runs],
                y=[run.dsc for run in runs],
                mode="markers",
                name=state.lower(),
                marker={"symbol": symbol, "size": 9, "color": colour, "line": {"width": 2, "color": colour}},
                text=[hover(run) for run in runs],
                hovertemplate="%{text}<extra></extra>",
            )
    complete = [run for run in scored if run.state == "COMPLETE"]
    running = [max(run.dsc or 0.0 for run in complete[: i + 1]) for i in range(len(complete))]
    if complete:
        figure.add_scatter(
            x=[run.number for run in complete],
            y=running,
            mode="lines",
            name="best so far",
            line={"shape": "hv", "color": ACCENT},
        )
    ends = [min(run.number for run in scored) - 0.5, max(run.number for run in scored) + 0.5]
    for i, arm in enumerate(arms):
        line = {"dash": "dash", "width": 1.5, "color": ARM_COLOURS[i % len(ARM_COLOURS)]}
        figure.add_scatter(x=ends, y=[arm.dsc] * 2, mode="lines", name=f"arm {escape(arm.name)}", line=line)
    return Figure("history", title, caption, figure)


def _importances(facts: Facts) -> Figure:
    title = "Importances"
    caption = (
        "The longer the bar, the more the best trials differ from all in this parameter (PED-ANOVA, shares of 1); the "
        "bars say nothing about direction, and with tens of trials they are rough."
    )
    if not facts.importances:
        return Figure("importances", title, caption, gap=facts.importances_gap or "")
    names = list(facts.importances)[::-1]
    figure = empty("share", "")
    figure.add_bar(
        x=[facts.importances[name] for name in names],
        y=[escape(name) for name in names],
        orientation="h",
        marker_color="#3a8fb7",
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
    )
    figure.update_yaxes(automargin=True, showgrid=False)
    figure.update_layout(bargap=0.4)
    return Figure("importances", title, caption, figure, height=110 + 32 * len(names))


def _parallel(facts: Facts) -> Figure:
    title = "Parallel coordinates"
    caption = (
        f"Each line is a complete trial, darker for a higher DSC; drag along an axis to pick lines; the tick {UNUSED} "
        f"holds trials in which a parameter had no effect and was not asked for."
    )
    complete = [run for run in facts.search if run.finished]
    names = [name for name in facts.parameters() if any(name in run.params for run in complete)]
    if not names:
        return Figure("parallel", title, caption, gap="No complete trial with a searched parameter yet.")
    dsc = [run.dsc for run in complete]
    axes = [_axis(facts, name, [run.params.get(name) for run in complete]) for name in names]
    figure = go.Figure(layout=layout())
    figure.add_parcoords(
        dimensions=[_axis(facts, "DSC", list(dsc)), *axes],
        line={"color": dsc, "colorscale": SCALE, "showscale": True, "colorbar": {"title": {"text": "DSC"}}},
        labelangle=-15,
    )
    figure.update_layout(margin={"l": 60, "r": 20, "t": 90, "b": 20})
    return Figure("parallel", title, caption, figure, height=460)


def _axis(facts: Facts, name: str, values: list[Any]) -> dict[str, Any]:
    """One axis: numbers as they are or as logarithms, choices as ticks, and a lowest tick for absence."""
    absent = None in values
    numbers = [finite(value) for value in values if value is not None]
    declared = facts.settings.space.get(name)
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
