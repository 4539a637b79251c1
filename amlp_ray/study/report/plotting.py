"""Style and building blocks shared by the figures of a report.

Drawn with plotly and not by `optuna.visualization`. Its plots number trials anew where imported
ones are left out. They show neither pruned trials nor baselines in the history, neither limits nor
names on a Pareto front, and no color by score at rungs, and parallel lines cannot be picked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.colors import sample_colorscale
from plotly.io import to_html

from amlp_ray.study.report.report_data import ReportedTrial

ACCENT = "#d1495b"
PALE = "#9aa5b1"
BLUE = "#3a8fb7"
# From low to high scores; all of it readable on white.
SCALE = [[0.0, "#b5dcc6"], [0.5, BLUE], [1.0, "#35155d"]]
BASELINE_COLORS = ["#e09f3e", "#3d5a80", "#6a994e", "#9c6644", "#7b2d8b"]
STATE_COLORS = {
    "COMPLETE": BLUE,
    "PRUNED": "#b8c4d0",
    "FAIL": ACCENT,
    "RUNNING": "#6a994e",
    "INTERRUPTED": "#e09f3e",
    "WAITING": PALE,
    "baseline": "#3d5a80",
    "confirmation": "#7b2d8b",
}
LAYOUT = {
    "template": None,
    "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1f2933"},
    "paper_bgcolor": "white",
    "plot_bgcolor": "white",
    "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    "hovermode": "closest",
}
# plotly.js 4 offers to upload a figure to a cloud; figures of medical data stay where they are.
PLOTLY_CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "displayModeBar": "hover",
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
}


@dataclass(frozen=True)
class Figure:
    """A figure of the report."""

    key: str  # part of its HTML id
    title: str  # above it
    caption: str  # below it
    figure: go.Figure | None = None  # None where there is nothing to draw
    gap: str = ""  # text in its place then
    height: int = 420  # in pixels
    min_width: int = 0  # in pixels; a narrower window scrolls

    @property
    def html(self) -> Markup:
        """Return its HTML, which needs plotly.js in the page; empty where there is a gap."""
        if self.figure is None:
            return Markup()
        html = to_html(
            self.figure,
            full_html=False,
            include_plotlyjs=False,
            div_id=f"plot-{self.key}",
            default_width="100%",
            default_height=f"{self.height}px",
            config=PLOTLY_CONFIG,
        )
        return Markup(html)


def hover_text(trial: ReportedTrial, *, with_params: bool = True) -> str:
    """Return the text of a trial under the pointer: state, score and parameters."""
    title = f"{trial.name}, {trial.state_name}"
    if trial.metric_value is not None:
        title += f", {trial.metric_value:.3f}"
    lines = [title]
    for name, value in trial.params.items() if with_params else ():
        lines.append(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    return "<br>".join(escape(line) for line in lines)


def empty_figure(x_title: str, y_title: str) -> go.Figure:
    """Return a figure in the report's style, with titles of its axes and nothing drawn."""
    figure = go.Figure(layout=LAYOUT)
    style = {"gridcolor": "#eceff3", "zeroline": False, "linecolor": "#c8d0d9"}
    figure.update_xaxes(title_text=x_title, **style)
    figure.update_yaxes(title_text=y_title, **style)
    return figure


def color_of(value: float, values: Sequence[float]) -> str:
    """Return the color of a score among others, darker for a higher one."""
    low, high = min(values), max(values)
    position = (value - low) / (high - low) if high > low else 1.0
    return str(sample_colorscale(SCALE, [position])[0])


def add_color_bar(figure: go.Figure, values: Sequence[float], title: str) -> None:
    """Add a color bar of scores and hide the legend.

    plotly draws a color bar for markers only, so an unseen one carries it.
    """
    low, high = min(values, default=0), max(values, default=0)
    if high > low:
        marker = {
            "color": [low],
            "cmin": low,
            "cmax": high,
            "colorscale": SCALE,
            "showscale": True,
            "colorbar": {"title": {"text": title}, "thickness": 14},
        }
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, hoverinfo="skip")
    figure.update_layout(showlegend=False)
