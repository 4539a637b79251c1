"""What a study was run with, for whoever must trust or repeat it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from amlp_ray.config import StudySettings
from amlp_ray.data.dataset import PatchDataset

PACKAGES = ("amlp-ray", "torch", "timm", "ray", "optuna", "scikit-learn", "numpy", "pyarrow")


def environment(
    settings: StudySettings, dataset: PatchDataset, cluster: dict[str, float], labels: PatchDataset | None = None
) -> dict[str, Any]:
    """Commit, versions, hardware, seed and data, as plain values; `labels` is null where none are apart."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "hardware": {
            "machine": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "cluster": {kind: cluster[kind] for kind in ("CPU", "GPU")},
        },
        "seed": settings.seed,
        "dataset": _described(dataset),
        "labels": None if labels is None else _described(labels),
    }


def _described(dataset: PatchDataset) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "path": dataset.path,
        "fingerprint": dataset.manifest.fingerprint,
        "size": f"{dataset.spec.channels} x {dataset.spec.height} x {dataset.spec.width}",
        "counts": {split: count.model_dump() for split, count in dataset.manifest.counts.items()},
    }


def _commit() -> str | None:
    """Commit of the package's own checkout, `+changes` where files differ from it; None for an installed package."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else some other repository that we are installed in
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", str(here)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
