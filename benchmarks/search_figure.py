"""The figure of benchmarks/search.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from plotly.subplots import make_subplots
from search_replay import Step, at

Run = tuple[str, str, int, int]  # answer, method, workers, seed
SHOWN = {
    "random": "#52606d",
    "tpe": "#3a8fb7",
    "gp": "#7b2d8b",
    "random+halving": "#e09f3e",
    "tpe+halving": "#d1495b",
    "tpe+hyperband": "#6a994e",
}
SEEN = (
    110,
    math.inf,
)  # epochs between which the best of a search is shown; before, it is that of a few trials


def draw(
    runs: Mapping[Run, Sequence[Step]],
    targets: Mapping[tuple[str, int], float],
    budget: float,
    share: float,
    file: Path,
) -> None:
    """Best DSC of complete trials against epochs spent: medians, and quartiles as bands."""
    panels = list(
        dict.fromkeys((kind, workers) for kind, _, workers, _ in runs if kind in ("once", "bowl"))
    )
    more = {"once": "", "bowl": ", a made-up effect added"}
    titles = [f"{workers} worker{'s' * (workers > 1)}{more[kind]}" for kind, workers in panels]
    figure = make_subplots(1, len(panels), subplot_titles=titles, horizontal_spacing=0.06)
    grid = np.arange(0, budget + 1, 9.0)
    for column, (kind, workers) in enumerate(panels, 1):
        for method, color in SHOWN.items():
            step_lists = [
                steps
                for (k, m, w, _), steps in runs.items()
                if (k, m, w) == (kind, method, workers)
            ]
            if not step_lists:
                continue
            values = np.array(
                [[at(steps, spent, "best") for spent in grid] for steps in step_lists]
            )
            is_finite = np.isfinite(values).all(0)
            low, middle, high = np.percentile(values[:, is_finite], [25, 50, 75], axis=0)
            x = grid[is_finite]
            band = {
                "x": [*x, *x[::-1]],
                "y": [*low, *high[::-1]],
                "fill": "toself",
                "fillcolor": color,
                "opacity": 0.1,
            }
            style = {
                "line_width": 0,
                "mode": "lines",
                "showlegend": False,
                "hoverinfo": "skip",
                "legendgroup": method,
            }
            figure.add_scatter(**band, **style, row=1, col=column)
            line = {"color": color, "width": 2.5, "shape": "hv"}
            named = {"name": method, "legendgroup": method, "showlegend": column == 1}
            figure.add_scatter(x=x, y=middle, mode="lines", line=line, **named, row=1, col=column)
        figure.add_hline(
            targets[kind, workers],
            line={"color": "#9aa5b1", "dash": "dash", "width": 1},
            row=1,
            col=column,
        )
        figure.add_vline(
            share * budget, line={"color": "#9aa5b1", "dash": "dot", "width": 1}, row=1, col=column
        )
        figure.update_xaxes(
            title_text="epochs trained by all trials", range=[0, budget], row=1, col=column
        )
        ends = [
            [at(s, spent, "best") for (k, _, w, _), s in runs.items() if (k, w) == (kind, workers)]
            for spent in SEEN
        ]
        figure.update_yaxes(
            range=[np.nanpercentile(ends[0], 25), np.nanmax(ends[1])], row=1, col=column
        )
    figure.update_yaxes(title_text="best DSC of complete trials", row=1, col=1)
    figure.update_xaxes(gridcolor="#eceff3", zeroline=False)
    figure.update_yaxes(gridcolor="#eceff3", zeroline=False)
    figure.update_layout(
        template="none",
        font={"family": "system-ui, sans-serif", "size": 14},
        width=1200,
        height=520,
    )
    figure.update_layout(
        legend={"orientation": "h", "y": -0.2}, margin={"l": 80, "r": 20, "t": 40, "b": 100}
    )
    figure.update_xaxes(title_standoff=8)
    figure.write_html(file, include_plotlyjs=True, config={"displayModeBar": False})
