"""Putting a report together and writing it."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from amlp_ray.study.report import _figures, _tables
from amlp_ray.study.report._compare import Arm, compare, finished_arms, rank_agreement
from amlp_ray.study.report._facts import Facts, Run, count_states, gather
from amlp_ray.study.report._verdict import judge
from amlp_ray.study.store import StudyStore

HERE = Path(__file__).parent


def write(store: StudyStore) -> Path:
    text = _render(gather(store))
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


def _render(facts: Facts) -> str:
    # Everything is escaped but the style sheet and plotly's own HTML, which escapes `<`, `>` and `/` inside its JSON.
    jinja = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    arms = finished_arms(facts)
    best = facts.best
    comparisons = [compare(best, arm, facts.settings.tie) for arm in arms] if best else []
    figures = _figures.figures(facts, arms)
    return jinja.get_template("report.html").render(
        css=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        facts=facts,
        header=_header(facts),
        verdict=judge(facts, arms, comparisons, rank_agreement(facts)),
        scores=_tables.scores(facts, arms, comparisons),
        best=best,
        best_parameters=_tables.parameters(best) if best else None,
        best_settings=_text(best.folder / "settings.yaml") if best else None,
        load=_loading(best) if best else None,
        space=_tables.space(facts),
        fixed=_tables.fixed(facts),
        figures=figures,
        plots={key: Markup(html) for key, html in _figures.html(figures).items()},
        galleries=_galleries(best, arms),
        trials=_tables.trials(facts),
        environment=_tables.environment(facts),
    )


def _header(facts: Facts) -> list[tuple[str, str]]:
    """Facts of the study for its head: name and text."""
    rows = [("Data set", _dataset(facts.dataset, facts.settings.data))]
    if facts.settings.labels:
        rows.append(("Labelled images", _dataset(facts.labels, facts.settings.labels)))
    for title, runs in (("Trials", facts.search), ("Arm runs", facts.arms)):
        states = count_states(runs)
        told = ", ".join(f"{count} {state}" for state, count in states.items())
        rows.append((title, f"{len(runs)}: {told}" if states else "none yet"))
    if facts.wall_time is not None:
        rows.append(("Wall time", f"{_duration(facts.wall_time)} from the first start to the last end"))
    rows.append(("Written", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")))
    return rows


def _dataset(about: dict[str, Any], path: str | None) -> str:
    """Name, size and counts by split; the table of the environment has the rest."""
    told = [str(about.get("name") or path or "not recorded")]
    sizes = [key for key in ("size", "channels", "height", "width") if key in about]
    told += [f"{key} {_tables.show(about[key])}" for key in sizes]
    counts = about.get("counts")
    for split, count in counts.items() if isinstance(counts, dict) else ():
        parts = count.items() if isinstance(count, dict) else [("images", count)]
        told.append(f"{split} " + ", ".join(f"{_tables.show(number)} {what}" for what, number in parts))
    return "; ".join(told)


def _duration(time: timedelta) -> str:
    minutes, seconds = divmod(round(time.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _loading(best: Run) -> str | None:
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


def _galleries(best: Run | None, arms: list[Arm]) -> list[dict[str, Any]]:
    """Pictures of the best trial and of the first run of arm mae, as data URIs with captions."""
    runs = [(f"Best trial ({best.number})", best)] if best else []
    runs += [(f"Plain MAE (arm {arm.name}, first run)", arm.runs[0]) for arm in arms if arm.name == "mae"]
    galleries = []
    for title, run in runs:
        files = sorted((run.folder / "pictures").glob("*.png"))
        pictures = [
            {
                "caption": file.stem.replace("_", " ").replace("-", " "),
                "uri": "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii"),
            }
            for file in files
        ]
        galleries.append({"title": title, "pictures": pictures})
    return galleries
