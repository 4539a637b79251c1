"""Render a report as one HTML page and write it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from amlp_ray.study.confirmation.results import Confirmation, read_confirmation
from amlp_ray.study.report import (
    environment,
    figures,
    progress,
    rung_correlation,
    search_space,
    tables,
)
from amlp_ray.study.report.comparison import (
    Baseline,
    compare_with_baselines,
    finished_baselines,
)
from amlp_ray.study.report.confirmation import confirmation_section, with_confirmation
from amlp_ray.study.report.curves import curves
from amlp_ray.study.report.lineage import lineage_figure, lineage_rows
from amlp_ray.study.report.plotting import Figure
from amlp_ray.study.report.progress import Timeline
from amlp_ray.study.report.report_data import (
    ReportData,
    ReportedTrial,
    collect,
    count_states,
    states_text,
)
from amlp_ray.study.report.rung_correlation import RungCorrelations
from amlp_ray.study.report.summary import summarize_search
from amlp_ray.study.storage.study_store import StudyStore
from amlp_ray.utils.files import atomic_write

HERE = Path(__file__).parent

# Caption and data URI of each.
Pictures = list[tuple[str, str]]


def write(store: StudyStore, path: Path) -> Path:
    """Write the report of a study to a file and return its path."""
    atomic_write(path, _render(collect(store), read_confirmation(store)))
    return path


def _render(data: ReportData, confirmation: Confirmation | None) -> str:
    # Everything is escaped but the style sheet, plotly.js, and plotly's own HTML, which escapes
    # `<`, `>` and `/` inside its JSON.
    jinja = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    best = data.best
    baselines = finished_baselines(data)
    comparisons = compare_with_baselines(data, baselines)
    first_rung = rung_correlation.first_rung_correlation(data)
    search_verdict = summarize_search(data, baselines, comparisons, first_rung)
    timeline = progress.timeline(data)
    correlations = rung_correlation.rung_correlations(data)
    lineage = lineage_rows(data.config, [trial.frozen for trial in data.search])
    groups = _figure_groups(data, baselines, timeline, correlations, lineage)
    has_figures = any(figure.figure for group in groups.values() for figure in group)
    return jinja.get_template("report.html").render(
        css=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()) if has_figures else None,
        data=data,
        header=_header(data, timeline),
        verdict=with_confirmation(search_verdict, confirmation),
        confirmation=confirmation_section(confirmation) if confirmation else None,
        scores=tables.scores(data, baselines, comparisons),
        sizes=tables.sizes(data, baselines),
        best=best,
        best_parameters=tables.parameters(best) if best else None,
        best_config=_text(best.path / "config.yaml") if best else None,
        load_example=_load_example(best) if best else None,
        front=tables.front(data),
        space=search_space.space(data),
        rules=search_space.rules(data),
        fixed=search_space.fixed(data),
        lineage=tables.lineage(lineage),
        outcome=progress.outcome(data),
        meaning=rung_correlation.meaning(data, correlations),
        ranks=rung_correlation.table(correlations),
        budget=progress.budget(data),
        figures=groups,
        galleries=_galleries(best, baselines),
        trials=tables.trials(data),
        left_out=tables.left_out(data),
        environment=environment.latest(data),
        runs=environment.runs(data),
        commits=environment.commits(data),
    )


def _figure_groups(
    data: ReportData,
    baselines: Sequence[Baseline],
    timeline: Timeline | None,
    correlations: RungCorrelations,
    lineage: list[dict[str, Any]],
) -> dict[str, list[Figure]]:
    compared = [baseline for baseline in baselines if not baseline.uses_ground_truth]
    rungs, by_epoch = curves(data)
    is_pbt = data.config.sampler.name == "pbt"
    return {
        "front": figures.fronts(data),
        "search": [figures.history(data, compared), progress.efficiency(data)],
        "settings": [*figures.importances(data), figures.parallel(data)],
        "lineage": [lineage_figure(lineage, data.config.metric)] if is_pbt else [],
        "ranks": [] if is_pbt else [rung_correlation.figure(data, correlations)],
        "rungs": [rungs],
        "time": [progress.gantt(timeline)],
        "training": by_epoch,
    }


def _header(data: ReportData, timeline: Timeline | None) -> list[tuple[str, str]]:
    """Return what the head of the page says of the study: title and text of each row."""
    rows = [("Dataset", _dataset_text(data.dataset("dataset"), data.config.data))]
    if data.config.eval_data:
        text = _dataset_text(data.dataset("eval_data"), data.config.eval_data)
        rows.append(("Labeled images", text))
    trials = _count_text(data.search)
    if data.copies:
        trials += f"; {len(data.copies)} answered from the store"
    if data.imported:
        trials += f"; {len(data.imported)} imported"
    rows.append(("Trials", trials))
    rows.append(("Baseline runs", _count_text(data.baselines)))
    if data.confirmation:
        rows.append(("Confirmation", _count_text(data.confirmation)))
    if timeline is not None:
        wall_time = tables.duration(timeline.duration)
        rows.append(("Wall time", f"{wall_time} from the first start to the last end"))
    rows.append(("Written", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")))
    return rows


def _count_text(trials: Sequence[ReportedTrial]) -> str:
    states = states_text(count_states(trials))
    return f"{len(trials)}: {states}" if states else "none yet"


def _dataset_text(description: dict[str, Any], path: str | None) -> str:
    """Return name, size and counts by split; the table of the environment has the rest."""
    parts = [str(description.get("name") or path or "not recorded")]
    for key in ("size", "channels", "height", "width"):
        if key in description:
            parts.append(f"{key} {tables.show(description[key])}")
    counts = description.get("counts")
    for split, count in counts.items() if isinstance(counts, dict) else ():
        numbers = dict(count) if isinstance(count, dict) else {"images": count}
        kinds = numbers.pop("kinds", {})
        texts = [f"{tables.show(number)} {what}" for what, number in numbers.items()]
        texts += [f"{number} of {kind}" for kind, number in kinds.items()]
        parts.append(f"{split} {', '.join(texts)}")
    return "; ".join(parts)


def _load_example(best: ReportedTrial) -> str | None:
    """Return the Python lines that load the best encoder; None where it was not kept."""
    path = best.path / "encoder.safetensors"
    if not path.is_file():
        return None
    quoted = json.dumps(str(path), ensure_ascii=False)
    return f"from amlp_ray import load_encoder\n\nencoder = load_encoder({quoted})"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _galleries(best: ReportedTrial | None, baselines: Iterable[Baseline]) -> dict[str, Pictures]:
    """Return the pictures of the best trial and of the first run of baseline mae, by title."""
    galleries = {}
    if best:
        galleries[f"Best trial ({best.number})"] = _pictures(best)
    for baseline in baselines:
        if baseline.name == "mae":
            galleries["Plain MAE (baseline mae, first run)"] = _pictures(baseline.runs[0])
    return galleries


def _pictures(trial: ReportedTrial) -> Pictures:
    pictures = []
    for file in sorted((trial.path / "pictures").glob("*.png")):
        encoded = base64.b64encode(file.read_bytes()).decode("ascii")
        caption = file.stem.replace("_", " ").replace("-", " ")
        pictures.append((caption, f"data:image/png;base64,{encoded}"))
    return pictures
