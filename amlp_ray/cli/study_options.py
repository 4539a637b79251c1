"""Arguments that the study commands share, and how they open a study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

if TYPE_CHECKING:
    from amlp_ray.config import StudyConfig
    from amlp_ray.study.storage.study_store import StudyStore
    from amlp_ray.study.study import Study

File = Annotated[Path, Argument(help="Study file, or the name of a study that was run before.")]
Name = Annotated[str, Argument(help="Name of the study.")]
Number = Annotated[int, Argument(help="Number of the trial.", min=0)]
Data = Annotated[
    str | None, Option(help="Patch dataset, by path or URI; replaces the file's `data`.")
]
EvalData = Annotated[
    str | None,
    Option(
        help="Another patch dataset, of the same shape, whose masks score the encoders; "
        "`amlp-ray data check EVAL_DATA --against DATA` finds images that are in both."
    ),
]
Runs = Annotated[Path, Option(help="Folder of all studies.", envvar="AMLP_RAY_RUNS")]
Address = Annotated[
    str | None, Option(help="Ray cluster to join, such as auto; none: start Ray here.")
]

DEFAULT_RUNS = Path("runs")


def load_study(
    file: Path,
    runs: Path,
    *,
    data: str | None = None,
    eval_data: str | None = None,
    overrides: list[str] | None = None,
) -> Study:
    """Load a study from its file, or by its name; `overrides` are `name=value` texts."""
    from amlp_ray.config.overrides import parse_overrides
    from amlp_ray.study.study import Study

    stored_file = runs / file / "study.yaml"
    if not file.is_file() and stored_file.is_file():
        file = stored_file
    values = parse_overrides(overrides or [])
    return Study.load(file, data=data, eval_data=eval_data, runs=runs, overrides=values)


def open_store(name: str, runs: Path) -> StudyStore:
    """Open the store of a study by its name, without the imports that training needs."""
    from amlp_ray.study.storage.study_store import StudyStore

    return StudyStore.open(runs / name)


def find_study(file: Path, runs: Path) -> tuple[StudyStore, StudyConfig]:
    """Return store and config of a study by its name, or by its file where it was never run.

    No data is needed.
    """
    from amlp_ray.config.yaml_file import read_yaml
    from amlp_ray.study.search_space.validate import build_study
    from amlp_ray.study.storage.study_store import StudyStore

    if (runs / file / "study.yaml").is_file() or not file.is_file():
        store = open_store(str(file), runs)
        return store, store.config()
    config = build_study(read_yaml(file), str(file))
    store = StudyStore(runs / config.name)
    was_run = (store.folder / "study.yaml").is_file()
    return store, store.config() if was_run else config
