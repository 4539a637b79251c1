"""What the study commands share: their arguments, and how they open a study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from amlp_ray.config import StudyConfig
    from amlp_ray.study.storage.study_store import StudyStore
    from amlp_ray.study.study import Study

File = Annotated[
    Path, typer.Argument(help="Study file, or the name of a study that was run before.")
]
Name = Annotated[str, typer.Argument(help="Name of the study.")]
Number = Annotated[int, typer.Argument(help="Number of the trial.", min=0)]
Data = Annotated[
    str | None, typer.Option(help="Patch dataset, by path or URI, in place of the file's `data`.")
]
Labels = Annotated[
    str | None,
    typer.Option(
        help="Another patch dataset, of the same shape, whose masks score the encoders; `amlp-ray data check LABELS "
        "--against DATA` tells of images in both."
    ),
]
Runs = Annotated[Path, typer.Option(help="Folder of all studies.", envvar="AMLP_RAY_RUNS")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster to join, such as auto; none: start Ray here.")
]


def load(
    file: Path, data: str | None, eval_data: str | None, runs: Path, assign: list[str] | None
) -> Study:
    """Load a study from its file, or by its name."""
    from amlp_ray.config.overrides import parse_overrides
    from amlp_ray.study.study import Study

    if not file.is_file() and (runs / file / "study.yaml").is_file():
        file = runs / file / "study.yaml"
    return Study.load(
        file, data=data, eval_data=eval_data, runs=runs, overrides=parse_overrides(assign or [])
    )


def opened(name: str, runs: Path) -> StudyStore:
    """The store of a study by its name: all that looking and asking needs, without the training side's imports."""
    from amlp_ray.study.storage.study_store import StudyStore

    return StudyStore.open(runs / name)


def begun_or_not(file: Path, runs: Path) -> tuple[StudyStore, StudyConfig]:
    """The store and settings of a study by its name, or by its file where it was never run; no data is needed."""
    from amlp_ray.config.yaml_file import read_yaml
    from amlp_ray.study.search_space.validate import build_study
    from amlp_ray.study.storage.study_store import StudyStore

    if (runs / file / "study.yaml").is_file() or not file.is_file():
        store = opened(str(file), runs)
        return store, store.config()
    config = build_study(read_yaml(file), str(file))
    store = StudyStore(runs / config.name)
    begun = (store.folder / "study.yaml").is_file()
    return store, store.config() if begun else config
