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
AllowCode = Annotated[
    bool,
    Option(
        "--allow-code",
        help="Import the Python function that the study names as its space, which runs its module.",
        envvar="AMLP_RAY_ALLOW_CODE",
    ),
]

DEFAULT_RUNS = Path("runs")


def load_study(
    file: Path,
    runs: Path,
    *,
    data: str | None = None,
    eval_data: str | None = None,
    overrides: list[str] | None = None,
    allow_code: bool = False,
) -> Study:
    """Load a study from its file, or by its name; `overrides` are `name=value` texts."""
    from amlp_ray.config.overrides import parse_overrides
    from amlp_ray.study.study import Study

    stored_file = runs / file / "study.yaml"
    if not file.is_file() and stored_file.is_file():
        file = stored_file
    values = parse_overrides(overrides or [])
    return Study.load(
        file,
        data=data,
        eval_data=eval_data,
        runs=runs,
        overrides=values,
        allow_code=allow_code,
    )


def open_store(name: str, runs: Path, *, allow_code: bool = False) -> StudyStore:
    """Open the store of a study by its name, without the imports that training needs."""
    from amlp_ray.study.storage.study_store import StudyStore

    store = StudyStore.open(runs / name)
    if allow_code:
        from amlp_ray.study.search_space import space_function

        space_function.allow_code(store.config().space)
    return store


def find_study(
    file: Path, runs: Path, *, allow_code: bool = False
) -> tuple[StudyStore, StudyConfig]:
    """Return store and config of a study by its name, or by its file where it was never run.

    No data is needed.
    """
    from amlp_ray.config.yaml_file import read_yaml
    from amlp_ray.study.search_space.validate import build_study
    from amlp_ray.study.storage.study_store import StudyStore

    if (runs / file / "study.yaml").is_file() or not file.is_file():
        store = open_store(str(file), runs, allow_code=allow_code)
        return store, store.config()
    config = build_study(read_yaml(file), str(file), should_allow_code=allow_code)
    store = StudyStore(runs / config.name)
    was_run = (store.folder / "study.yaml").is_file()
    return store, store.config() if was_run else config
