"""The wheel works away from the checkout: ready studies, pages and version are inside."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    copy = tmp_path_factory.mktemp("source")
    # From a copy of what a build reads, so that building leaves nothing in the checkout.
    for name in ("amlp_ray", "studies", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy / name)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(copy)]
    subprocess.run(command, check=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel: its dependencies come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def amlp_ray(installed: Path, folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "amlp_ray", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_what_the_package_reads(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    read = [path for path in (ROOT / "amlp_ray").rglob("*") if path.suffix in (".html", ".css")]
    assert read
    assert {str(path.relative_to(ROOT)) for path in read} <= names
    studies = {f"amlp_ray/studies/{path.name}" for path in (ROOT / "studies").glob("*.yaml")}
    assert studies <= names
    assert "amlp_ray/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "studies/"))]


def test_a_ready_study_is_copied_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    amlp_ray(installed, tmp_path, "study", "init", "mine", "--from", "masking_ratio")
    ready = (ROOT / "studies" / "masking_ratio.yaml").read_text()
    expected = ready.replace("\nname: masking_ratio\n", "\nname: mine\n")
    assert (tmp_path / "mine.yaml").read_text() == expected


def test_the_version_is_that_of_the_wheel(installed: Path, tmp_path: Path, wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    assert amlp_ray(installed, tmp_path, "--version").split() == ["amlp-ray", version]
