"""Putting a report together and writing it."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from amlp_ray.study.confirmation.results import Confirmation, confirmation_of
from amlp_ray.study.report import (
    confirmation,
    environment,
    figures,
    progress,
    rung_correlation,
    search_space,
    tables,
)
from amlp_ray.study.report.comparison import Baseline, compare, finished_baselines, rank_agreement
from amlp_ray.study.report.curves import curves
from amlp_ray.study.report.lineage import lineage_figure, lineage_rows
from amlp_ray.study.report.plotting import Figure
from amlp_ray.study.report.report_data import ReportData, ReportedTrial, collect, count_states
from amlp_ray.study.report.summary import summarize_search
from amlp_ray.study.storage.study_store import StudyStore

HERE = Path(__file__).parent


def write(store: StudyStore) -> Path:
    text = _render(collect(store), confirmation_of(store))
    path = store.folder / "report.html"
    handle, name = tempfile.mkstemp(prefix=".report-", suffix=".html", dir=store.folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)  # mkstemp makes it private; a report is there to be passed on
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _render(facts: ReportData, found: Confirmation | None) -> str:
    # Everything is escaped but the style sheet, plotly.js, and plotly's own HTML, which escapes `<`, `>` and `/` inside
    # its JSON.
    jinja = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    baselines = finished_baselines(facts)
    best = facts.best
    compared = [
        baseline for baseline in baselines if not any(run.diagnosis for run in baseline.runs)
    ]
    comparisons = (
        [compare(best, baseline, facts.config.equivalence_margin) for baseline in compared]
        if best
        else []
    )
    told = progress.timeline(facts)
    rungs, by_epoch = curves(facts)
    early = rung_correlation.ranks(facts)
    figure_groups = {
        "front": figures.fronts(facts),
        "search": [figures.history(facts, compared), progress.efficiency(facts)],
        "settings": [*figures.importances(facts), figures.parallel(facts)],
        "lineage": [lineage_figure(facts.config, facts.trials)]
        if facts.config.sampler.name == "pbt"
        else [],
        "ranks": [rung_correlation.figure(facts, early)]
        if facts.config.sampler.name != "pbt"
        else [],
        "rungs": [rungs],
        "time": [progress.gantt(told)],
        "training": by_epoch,
    }
    return jinja.get_template("report.html").render(
        css=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs())
        if any(item.figure for group in figure_groups.values() for item in group)
        else None,
        facts=facts,
        header=_header(facts, told),
        verdict=confirmation.with_confirmation(
            summarize_search(facts, baselines, comparisons, rank_agreement(facts)), found
        ),
        confirm=confirmation.section(found) if found else None,
        scores=tables.scores(facts, baselines, comparisons),
        sizes=tables.sizes(facts, baselines),
        best=best,
        best_parameters=tables.parameters(best) if best else None,
        best_settings=_text(best.folder / "config.yaml") if best else None,
        load=_loading(best) if best else None,
        front=tables.front(facts),
        space=search_space.space(facts),
        rules=search_space.rules(facts),
        fixed=search_space.fixed(facts),
        lineage=tables.lineage(
            lineage_rows(facts.config, facts.trials) if figure_groups["lineage"] else []
        ),
        outcome=progress.outcome(facts),
        meaning=rung_correlation.meaning(facts, early),
        ranks=rung_correlation.table(early),
        budget=progress.budget(facts),
        figures={key: _drawn(group) for key, group in figure_groups.items()},
        galleries=_galleries(best, baselines),
        trials=tables.trials(facts),
        left_out=tables.left_out(facts),
        environment=environment.latest(facts),
        runs=environment.runs(facts),
        commits=environment.commits(facts),
    )


def _drawn(figures: Iterable[Figure]) -> list[tuple[Figure, Markup]]:
    return [(figure, Markup(figure.html)) for figure in figures]


def _header(facts: ReportData, told: progress.Timeline | None) -> list[tuple[str, str]]:
    """Facts of the study for its head: name and text."""
    rows = [("Data set", _dataset(facts.dataset, facts.config.data))]
    if facts.config.eval_data:
        rows.append(("Labelled images", _dataset(facts.eval_data, facts.config.eval_data)))
    for title, runs in (
        ("Trials", facts.search),
        ("Baseline runs", facts.baselines),
        ("Confirmation", facts.confirmation),
    ):
        states = count_states(runs)
        counted = ", ".join(f"{count} {state}" for state, count in states.items())
        if title == "Trials":
            apart = (
                (len(facts.copies), "answered from the store"),
                (len(facts.imported), "imported"),
            )
            counted += "".join(f"; {count} {what}" for count, what in apart if count)
        if title != "Confirmation" or runs:
            rows.append((title, f"{len(runs)}: {counted}" if counted else "none yet"))
    if told is not None:
        rows.append(
            (
                "Wall time",
                f"{tables.duration(told.end - told.start)} from the first start to the last end",
            )
        )
    rows.append(("Written", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")))
    return rows


def _dataset(about: dict[str, Any], path: str | None) -> str:
    """Name, size and counts by split; the table of the environment has the rest."""
    told = [str(about.get("name") or path or "not recorded")]
    sizes = [key for key in ("size", "channels", "height", "width") if key in about]
    told += [f"{key} {tables.show(about[key])}" for key in sizes]
    counts = about.get("counts")
    for split, count in counts.items() if isinstance(counts, dict) else ():
        parts = count.items() if isinstance(count, dict) else [("images", count)]
        told.append(
            f"{split} " + ", ".join(f"{tables.show(number)} {what}" for what, number in parts)
        )
    return "; ".join(told)


def _loading(best: ReportedTrial) -> str | None:
    """Return the Python lines that load the best encoder, None where it was not kept."""
    path = best.folder / "encoder.safetensors"
    if not path.is_file():
        return None
    quoted = json.dumps(str(path), ensure_ascii=False)
    return f"from amlp_ray import load_encoder\n\nencoder = load_encoder({quoted})"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _galleries(best: ReportedTrial | None, baselines: list[Baseline]) -> list[dict[str, Any]]:
    """Pictures of the best trial and of the first run of baseline mae, as data URIs with captions."""
    runs = [(f"Best trial ({best.number})", best)] if best else []
    runs += [
        (f"Plain MAE (baseline {baseline.name}, first run)", baseline.runs[0])
        for baseline in baselines
        if baseline.name == "mae"
    ]
    galleries = []
    for title, run in runs:
        files = sorted((run.folder / "pictures").glob("*.png"))
        pictures = [
            {
                "caption": file.stem.replace("_", " ").replace("-", " "),
                "uri": "data:image/png;base64,"
                + base64.b64encode(file.read_bytes()).decode("ascii"),
            }
            for file in files
        ]
        galleries.append({"title": title, "pictures": pictures})
    return galleries
