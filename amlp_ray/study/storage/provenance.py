"""Record what a study and its trials were run with: code, versions, hardware, seed, data."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from amlp_ray.config import StudyConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.runtime.resources import Cluster
from amlp_ray.training.loggers.metrics_file import own_rows, read_rows
from amlp_ray.utils.files import atomic_write
from amlp_ray.utils.json_files import read_json, seal_json

PACKAGES = (
    "amlp-ray",
    "torch",
    "timm",
    "ray",
    "optuna",
    "scikit-learn",
    "scipy",
    "numpy",
    "pyarrow",
    "monai",
)
PACKAGE = Path(__file__).parents[2]
GIT_TIMEOUT_S = 10
GIT_ERRORS = (OSError, subprocess.SubprocessError)  # git is not installed, or fails
DIFF_OPTIONS = ("--binary", "--no-ext-diff", "--no-color")
# What may differ where a trial is resumed.
COMPARED = ("commit", "patch", "versions", "hardware")


def environment(
    config: StudyConfig,
    dataset: PatchDataset,
    cluster: Cluster,
    eval_data: PatchDataset | None = None,
    *,
    folder: Path,
) -> dict[str, Any]:
    """Describe what one run of a study is run with, as plain values.

    Args:
        config: of the study.
        dataset: that trials train on.
        cluster: that runs it.
        eval_data: a separate dataset of labeled images.
        folder: the study's. If the code differs from its commit, the patch is stored there.
    """
    resources = {kind: cluster.total(kind) for kind in ("CPU", "GPU")}
    return {
        "started": _now(),
        **_code(folder),
        "hardware": {**hardware(), "cluster": resources},
        "seed": config.seed,
        "dataset": _describe(dataset),
        "eval_data": None if eval_data is None else _describe(eval_data),
    }


def write_provenance(run: RunSpec) -> None:
    """Write what a trial is trained with to `provenance.json` in its folder.

    The trial's process calls this before it trains. If the trial ran before, `continued` gets an
    entry that says from which epoch on it runs here, and what has changed.
    """
    current = _describe_run(run)
    previous = read_provenance(run.folder)
    rows = own_rows(read_rows(run.folder / "metrics.jsonl"))
    epoch = max((row["epoch"] for row in rows), default=0)
    if previous is None or epoch == 0:
        provenance = {**current, "continued": []}
    else:
        changed = {key: current[key] for key in COMPARED if current[key] != previous[key]}
        entry = {"epoch": epoch, "at": current["at"], **changed}
        provenance = {**previous, "continued": [*previous["continued"], entry]}
    run.folder.mkdir(parents=True, exist_ok=True)
    atomic_write(run.folder / "provenance.json", seal_json(provenance))


def _describe_run(run: RunSpec) -> dict[str, Any]:
    import torch

    uses_gpu = run.gpus > 0
    if run.resources.is_single_worker:
        uses_gpu = torch.cuda.is_available()
    # Sums over threads and workers depend on their number.
    parallel = {"threads": run.resources.threads, "workers": run.resources.workers}
    eval_data = None if run.eval_data is None else _describe(PatchDataset.open(run.eval_data))
    return {
        "at": _now(),
        **_code(run.folder.parents[1]),
        "hardware": {**hardware("cuda" if uses_gpu else "cpu"), **parallel},
        "dataset": _describe(PatchDataset.open(run.data)),
        "eval_data": eval_data,
        "seed": run.config.seed,
        "rungs": list(run.rungs),
        "probe": None if run.probe is None else run.probe.model_dump(mode="json"),
        "config": run.config.model_dump(mode="json"),
    }


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """Read the `provenance.json` of a trial; None if it is missing or damaged."""
    return read_json(folder / "provenance.json")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result may depend on."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **packages}


def hardware(device: str = "cpu") -> dict[str, Any]:
    """Describe the machine as far as results depend on it; `device` is `cpu` or `cuda`."""
    import torch

    described = {
        "machine": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        # AVX2 and AVX512 sum in different orders.
        "capability": torch.backends.cpu.get_cpu_capability(),
        "device": device,
    }
    if device == "cuda":
        described["gpu"] = torch.cuda.get_device_name()
        described["cuda"] = torch.version.cuda
    return described


# The code


def commit() -> str | None:
    """Return the commit of the package's checkout, with `+changes` if files differ from it.

    None for an installed package, or without git.
    """
    with suppress(*GIT_ERRORS):
        if _is_checkout():
            return _git("rev-parse", "HEAD").strip() + ("+changes" if _changes() else "")
    return None


def patch_name() -> str | None:
    """Return the name of the file that the changes to the commit are stored in.

    None if there are no changes, or no commit.
    """
    with suppress(*GIT_ERRORS):
        if _is_checkout() and (patch := _changes()):
            return f"dirty-{hashlib.sha256(patch.encode()).hexdigest()[:12]}.patch"
    return None


def _code(study_folder: Path) -> dict[str, Any]:
    """Describe the code, and store how it differs from its commit in the study's folder."""
    name = patch_name()
    if name and not (study_folder / name).exists():
        study_folder.mkdir(parents=True, exist_ok=True)
        atomic_write(study_folder / name, _changes())
    return {"commit": commit(), "patch": name, "versions": versions()}


@cache  # the code that runs is the one that was imported
def _changes() -> str:
    """Return how the package differs from its commit as a patch, new files included."""
    root = Path(_git("rev-parse", "--show-toplevel").strip())
    package = str(PACKAGE.resolve().relative_to(root))
    new_files = ("ls-files", "--others", "--exclude-standard", "-z", "--", package)
    patches = [_git("diff", "HEAD", *DIFF_OPTIONS, "--", package, folder=root)]
    for name in filter(None, _git(*new_files, folder=root).split("\0")):
        comparison = ("--no-index", *DIFF_OPTIONS, "--", os.devnull, name)
        patches.append(_git("diff", *comparison, folder=root, allowed=(0, 1)))
    return "".join(patches)


@cache
def _is_checkout() -> bool:
    """Return whether git tracks the package, which may also be installed inside a repository."""
    with suppress(*GIT_ERRORS):
        _git("ls-files", "--error-unmatch", "__init__.py")
        return True
    return False


def _git(*arguments: str, folder: Path | None = None, allowed: tuple[int, ...] = (0,)) -> str:
    """Run git in the package's folder or another one and return its output."""
    process = subprocess.run(
        ["git", "-C", str(folder or PACKAGE), *arguments],
        capture_output=True,
        text=True,
        timeout=GIT_TIMEOUT_S,
        errors="replace",
    )
    if process.returncode not in allowed:
        raise subprocess.CalledProcessError(process.returncode, "git")
    return process.stdout


def _describe(dataset: PatchDataset) -> dict[str, Any]:
    spec = dataset.spec
    counts = dataset.manifest.counts
    return {
        "name": dataset.name,
        "path": dataset.path,
        "fingerprint": dataset.manifest.fingerprint,
        "size": f"{spec.channels} x {spec.height} x {spec.width}",
        "counts": {split: count.model_dump() for split, count in counts.items()},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
