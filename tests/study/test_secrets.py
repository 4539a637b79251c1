"""Keys of clouds and services stay out of process lists, logs, runs and reports."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from helpers.tiny_study import TINY

from amlp_ray.data.dataset import PatchDataset

SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "WANDB_API_KEY",
    "PGPASSWORD",
)
PLANTED = "planted-secret"


def command_lines() -> str:
    """What `ps` shows to every user."""
    lines = []
    for process in psutil.process_iter():
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:  # ended meanwhile
            continue
    return "\n".join(lines)


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Folder of Ray's logs, with a short name, since paths of sockets are limited."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_no_secret_shows_in_process_lists_logs_runs_or_reports(
    phantom_dataset: PatchDataset, tmp_path: Path, ray_folder: Path
) -> None:
    study = tmp_path / "tiny.yaml"
    study.write_text(yaml.safe_dump(TINY | {"baselines": ["mae"], "budget": {"trials": 1}}))
    runs, log = tmp_path / "runs", tmp_path / "log"
    environment = os.environ | {name: f"{PLANTED}-{name}" for name in SECRETS}
    environment["RAY_TMPDIR"] = str(ray_folder)
    command = [sys.executable, "-m", "amlp_ray", "study", "run", str(study), "--runs", str(runs)]
    command += ["--data", phantom_dataset.path]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    seen = []
    try:
        while process.poll() is None:
            seen.append(command_lines())
            time.sleep(0.5)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, log.read_text()
    assert any("ray::AmlpTrial" in lines for lines in seen)
    assert not any(PLANTED in lines for lines in seen)
    files = [path for root in (runs, ray_folder) for path in root.rglob("*") if path.is_file()]
    assert any("raylet" in path.name for path in files)
    leaks = [str(path) for path in [log, *files] if PLANTED.encode() in path.read_bytes()]
    assert leaks == []
