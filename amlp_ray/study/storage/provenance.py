"""What a study and each of its trials were run with, for whoever must trust or repeat them."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from amlp_ray.config import StudyConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.runtime.resources import Cluster
from amlp_ray.training.loggers.metrics_file import own_rows, read_rows
from amlp_ray.utils.files import atomic_write, read_json

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
PLAIN = ("--binary", "--no-ext-diff", "--no-color")


def environment(
    config: StudyConfig,
    dataset: PatchDataset,
    cluster: Cluster,
    eval_data: PatchDataset | None = None,
    *,
    folder: Path,
) -> dict[str, Any]:
    """What one run of a study is run with: commit, versions, hardware, seed and data, as plain values.

    Args:
        labels: the data set of labelled images, where it is one apart.
        folder: the study's; where the code differs from its commit, the difference is kept there as a patch.
    """
    return {
        "started": _now(),
        **_code(folder),
        "hardware": hardware()
        | {"cluster": {kind: cluster.total(kind) for kind in ("CPU", "GPU")}},
        "seed": config.seed,
        "dataset": _described(dataset),
        "eval_data": None if eval_data is None else _described(eval_data),
    }


def write_provenance(run: RunSpec) -> None:
    """Keep what a trial is trained with, in its folder's provenance.json; called by its own process, before it trains.

    Of a trial that goes on in another process, `continued` tells from which epoch on, and what is not as it was.
    """
    import torch

    folder = run.folder
    group = not run.resources.is_single_worker
    cuda = run.gpus > 0 if group else torch.cuda.is_available()
    threads = run.threads
    found = {
        "at": _now(),
        **_code(folder.parents[1]),
        # Sums over threads and workers depend on their number.
        "hardware": hardware("cuda" if cuda else "cpu")
        | {"threads": threads, "workers": run.resources.workers},
        "dataset": _described(PatchDataset.open(run.data)),
        "eval_data": None
        if run.eval_data is None
        else _described(PatchDataset.open(run.eval_data)),
        "seed": run.config.seed,
        "rungs": list(run.rungs),
        "probe": None if run.probe is None else run.probe.model_dump(mode="json"),
        "config": run.config.model_dump(mode="json"),
    }
    held = read_provenance(folder)
    done = max((row["epoch"] for row in own_rows(read_rows(folder / "metrics.jsonl"))), default=0)
    if held is None or done == 0:
        kept = found | {"continued": []}
    else:
        other = {
            key: found[key]
            for key in ("commit", "patch", "versions", "hardware")
            if found[key] != held[key]
        }
        kept = held | {
            "continued": [*held["continued"], {"epoch": done, "at": found["at"], **other}]
        }
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "provenance.json", json.dumps(kept, indent=1))


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """A trial's provenance.json; None where there is none, or it is damaged."""
    return read_json(folder / "provenance.json")


def _code(study: Path) -> dict[str, Any]:
    return {"commit": commit(), "patch": _keep_patch(study), "versions": versions()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }


def hardware(device: str = "cpu") -> dict[str, Any]:
    """The machine as far as results depend on it: processor, what torch uses of it, and the GPU, where one is used."""
    import torch

    found = {
        "machine": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),  # AVX2 and AVX512 sum in another order
        "device": device,
    }
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def commit() -> str | None:
    """Commit of the package's own checkout, `+changes` where files differ from it; None for an installed package."""
    try:
        return (
            _git("rev-parse", "HEAD").strip() + ("+changes" if _dirty() else "")
            if _tracked()
            else None
        )
    except (OSError, subprocess.SubprocessError):
        return None


@cache  # code is what it was when it was imported
def _dirty() -> str:
    """How the package differs from its commit, new files included; as a patch that `git apply` takes."""
    root = Path(_git("rev-parse", "--show-toplevel").strip())
    package = str(PACKAGE.resolve().relative_to(root))
    new = _git("ls-files", "--others", "--exclude-standard", "-z", "--", package, at=root).split(
        "\0"
    )
    parts = [_git("diff", "HEAD", *PLAIN, "--", package, at=root)]
    parts += [
        _git("diff", "--no-index", *PLAIN, "--", os.devnull, name, at=root, ok=(0, 1))
        for name in new
        if name
    ]
    return "".join(parts)


def patch_name() -> str | None:
    """What the difference of the code from its commit is called; None where there is none, or no commit."""
    try:
        patch = _dirty() if _tracked() else ""
    except (OSError, subprocess.SubprocessError):
        return None
    return f"dirty-{hashlib.sha256(patch.encode()).hexdigest()[:12]}.patch" if patch else None


def _keep_patch(study: Path) -> str | None:
    name = patch_name()
    if name and not (study / name).exists():
        study.mkdir(parents=True, exist_ok=True)
        atomic_write(study / name, _dirty())
    return name


@cache
def _tracked() -> bool:
    """Whether the package is a checkout of its own, and not installed inside of some other repository."""
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _git(*arguments: str, at: Path | None = None, ok: tuple[int, ...] = (0,)) -> str:
    """Git's answer, asked in the package's folder. Raises SubprocessError or, where there is no git, OSError."""
    done = subprocess.run(
        ["git", "-C", str(at or PACKAGE), *arguments],
        capture_output=True,
        text=True,
        timeout=10,
        errors="replace",
    )
    if done.returncode not in ok:
        raise subprocess.CalledProcessError(done.returncode, "git")
    return done.stdout


def _described(dataset: PatchDataset) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "path": dataset.path,
        "fingerprint": dataset.manifest.fingerprint,
        "size": f"{dataset.spec.channels} x {dataset.spec.height} x {dataset.spec.width}",
        "counts": {split: count.model_dump() for split, count in dataset.manifest.counts.items()},
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
