"""What all figures of a report share: how they look, and what is known of each."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.io import to_html

from amlp_ray.study.report.report_data import ReportedTrial

SCALE = [
    [0.0, "#b5dcc6"],
    [0.5, "#3a8fb7"],
    [1.0, "#35155d"],
]  # low to high; all of it readable on white
ACCENT, PALE, BLUE = "#d1495b", "#9aa5b1", "#3a8fb7"
ARM_COLOURS = ["#e09f3e", "#3d5a80", "#6a994e", "#9c6644", "#7b2d8b"]
STATE_COLOURS = {
    "COMPLETE": BLUE,
    "PRUNED": "#b8c4d0",
    "FAIL": ACCENT,
    "RUNNING": "#6a994e",
    "INTERRUPTED": "#e09f3e",
    "WAITING": PALE,
    "baseline": "#3d5a80",
    "confirmation": "#7b2d8b",
}
# plotly.js 4 offers to upload a figure to a cloud; figures of medical data stay where they are
CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "displayModeBar": "hover",
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
}


@dataclass(frozen=True)
class Figure:
    """A figure of the report; `gap` stands in its place where there is nothing to draw."""

    key: str
    title: str
    caption: str
    figure: go.Figure | None = None
    gap: str = ""
    height: int = 420
    width: int = 0  # at least, in pixels; a narrower window scrolls

    @property
    def html(self) -> str:
        """Its HTML, which needs plotly.js to be in the page already; empty where there is a gap."""
        if self.figure is None:
            return ""
        return str(
            to_html(
                self.figure, full_html=False, include_plotlyjs=False, div_id=f"plot-{self.key}", default_width="100%",
                default_height=f"{self.height}px", config=CONFIG,
            )
        )  # fmt: skip


def hover(run: ReportedTrial, *, short: bool = False) -> str:
    """Text of a run under the pointer: its state and score, and its parameters unless `short`."""
    lines = [f"{run.name}, {run.state}" + ("" if run.value is None else f", {run.value:.3f}")]
    if not short:
        lines += [
            f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"
            for name, value in run.params.items()
        ]
    return "<br>".join(escape(line) for line in lines)


def empty(x: str, y: str) -> go.Figure:
    figure = go.Figure(layout=layout())
    figure.update_xaxes(title_text=x, gridcolor="#eceff3", zeroline=False, linecolor="#c8d0d9")
    figure.update_yaxes(title_text=y, gridcolor="#eceff3", zeroline=False, linecolor="#c8d0d9")
    return figure


def layout() -> dict[str, Any]:
    return {
        "template": None,
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1f2933"},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
    }
