"""Start a study from a commented file, and check a study file."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from amlp_ray.config import Choice, Range
from amlp_ray.config.base import ConfigValues, nearest_name
from amlp_ray.config.study import check_study_name
from amlp_ray.config.yaml_file import read_yaml
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import ConfigError
from amlp_ray.study.baselines import baseline_plans
from amlp_ray.study.rungs import rung_epochs
from amlp_ray.study.search.samplers import check_sampler
from amlp_ray.study.search_space.parameters import describe_parameter
from amlp_ray.study.search_space.validate import build_study
from amlp_ray.utils.files import local_path

GENERAL = """\
# What does this study ask? What does it cost? Say so here, for whoever reads it next year.
# `amlp-ray study validate FILE` checks it, `amlp-ray study plan FILE --data DATASET` prices it,
# `amlp-ray study run FILE --data DATASET` runs it, and resumes where it stopped.
# Every setting with its range and the reason for its default: `amlp-ray settings pretrain study`.
name: NAME
description: Where should the masking ratio start and end, and how are masks placed?
seed: 0
pretrain: # of every trial
  variant: amlp
  epochs: 70 # 400 optimizer steps in all at least: shorter trials do not rank
space: # what is searched; any setting of `pretrain` by its dotted name
  ratio.start: {low: 0.15, high: 0.75}
  ratio.end: {low: 0.3, high: 0.85}
  selection.mode: {choices: [hard, soft]}
  selection.strength: {low: 0.3, high: 2.0, when: {selection.mode: soft}} # only then
# require: ["ratio.start <= ratio.end"] # what holds in every trial
pruner: {name: median, rungs: 4, min_steps: 400} # scored four times; poor ones end early
budget: {trials: 16} # or hours, gpu_hours, epochs: the first one reached ends the study
# resources: {cpus_per_worker: 1, gpus_per_worker: 0.5} # two trials on each GPU
baselines: [scratch, mae] # what the best trial has to beat, in the same budget
baseline_seeds: 2
confirm: {top: 3, seeds: 5} # `amlp-ray study confirm`: repeats, then the test images once
"""


def init_study(name: str, *, template: str | None = None, folder: str | Path = ".") -> Path:
    """Write `<folder>/<name>.yaml`, a commented study file to change.

    Args:
        name: of the study.
        template: a ready study's name, such as `masking_ratio`, or a study file. By default a small
            general one.
        folder: where the file is written.

    Returns:
        The file's path.

    Raises:
        ConfigError: the file exists, there is no such template, or the name is not allowed.
    """
    name = name.removesuffix(".yaml")
    file = local_path(folder) / f"{name}.yaml"
    try:
        check_study_name(name)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    if file.exists():
        raise ConfigError(f"{file} exists and is left as it is; choose another name, or delete it.")
    text = GENERAL if template is None else _template(template)
    if re.search(r"(?m)^name:", text) is None:
        raise ConfigError(f"{template} is no study file: it has no line `name:`.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(re.sub(r"(?m)^name:.*$", f"name: {name}", text, count=1))
    return file


def _studies_folder() -> Path:
    """Return the folder of ready studies, which lies beside the package in a checkout."""
    package = Path(str(files("amlp_ray")))
    installed = package / "studies"
    return installed if installed.is_dir() else package.parent / "studies"


def _ready_studies() -> dict[str, Path]:
    """Return the files of the ready studies by name."""
    return {file.stem: file for file in sorted(_studies_folder().glob("*.yaml"))}


def read_study_file(file: str | Path) -> ConfigValues:
    """Read the settings of a study file.

    Raises:
        ConfigError: there is none, or it is no YAML mapping.
    """
    if Path(file).is_file():
        return read_yaml(file)
    ready = _ready_studies()
    name = Path(file).name.removesuffix(".yaml")
    advice = "check the path, or begin a study with `amlp-ray study init NAME`."
    if name in ready:
        advice = f"begin with the ready study by `amlp-ray study init NAME --from {name}`."
    elif near := nearest_name(name, ready):
        advice = f"did you mean the ready study {near}? `amlp-ray study init NAME --from {near}`."
    raise ConfigError(f"There is no study file or study {str(file)!r}; {advice}")


def _template(name: str) -> str:
    ready = _ready_studies()
    file = ready.get(name, Path(name))
    if file.is_file():
        return file.read_text()
    near = nearest_name(name, ready)
    advice = f"did you mean {near}?" if near else f"ready are {', '.join(ready) or 'none here'}."
    raise ConfigError(f"There is no ready study or file {name!r}; {advice}")


def validate(
    file: str | Path,
    *,
    data: str | None = None,
    eval_data: str | None = None,
    allow_code: bool = False,
) -> dict[str, Any]:
    """Check a study file and summarize what the study is.

    Args:
        file: the study file.
        data: a patch dataset to check shapes, labels and batches against.
        eval_data: another one that scores the encoders.
        allow_code: whether a space that names a Python function is imported.

    Raises:
        ConfigError: the file has mistakes; each is a sentence with its line.
        DataError: the file does not fit the data.
    """
    config = build_study(read_study_file(file), str(file), should_allow_code=allow_code)
    check_sampler(config)
    baselines = baseline_plans(config)
    if data is not None:
        from amlp_ray.study.execution.plan import check_study

        scored = None if eval_data is None else PatchDataset.open(eval_data)
        check_study(config, PatchDataset.open(data), scored)
    epochs = config.trial({}, seed=0).epochs
    space = config.space if isinstance(config.space, dict) else {}
    ranges = {name: describe_parameter(parameter) for name, parameter in space.items()}
    searched = [p for p in space.values() if isinstance(p, Range | Choice)]
    return {
        "study": config.name,
        "space": ranges or config.space or "nothing is searched",
        "objectives": dict(config.objectives),
        "sampler": config.sampler.name,
        "pruner": config.pruner.name,
        "rungs": list(rung_epochs(epochs, config.pruner)),
        "budget": config.budget.model_dump(exclude_none=True),
        "baselines": [plan.name for plan in baselines],
        "baseline_runs": len(baselines) * config.baseline_seeds,
        "searched": len(searched),
        "set": len(space) - len(searched),
        "checked_against": data,
    }
