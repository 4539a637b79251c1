"""What a study and its trials were run with."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.studies import run_spec_of

from amlp_ray.data.dataset import PatchDataset
from amlp_ray.study.storage import provenance
from amlp_ray.study.storage.provenance import (
    commit,
    hardware,
    read_provenance,
    versions,
    write_provenance,
)


def test_a_trial_keeps_code_versions_hardware_data_settings_and_seed(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    run_spec = run_spec_of(tmp_path, phantom_dataset, cpus=2)
    write_provenance(run_spec)
    stored = read_provenance(tmp_path / "trials" / "0")
    assert stored is not None
    assert stored["seed"] == 5
    assert stored["config"] == run_spec.config.model_dump(mode="json")
    assert stored["dataset"]["fingerprint"] == phantom_dataset.manifest.fingerprint
    assert stored["eval_data"] is None
    assert (stored["hardware"]["threads"], stored["hardware"]["workers"]) == (2, 1)
    assert stored["versions"] == versions()
    assert stored["commit"] == commit()
    assert stored["continued"] == []


def test_a_trial_that_goes_on_elsewhere_says_from_which_epoch_and_what_is_other(
    phantom_dataset: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_spec = run_spec_of(tmp_path, phantom_dataset)
    folder = tmp_path / "trials" / "0"
    write_provenance(run_spec)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"epoch": e}) + "\n" for e in (1, 2)))
    write_provenance(run_spec)
    other_hardware = {**hardware(), "processor": "another"}
    monkeypatch.setattr(provenance, "hardware", lambda device="cpu": dict(other_hardware))
    write_provenance(run_spec)
    stored = read_provenance(folder)
    assert stored is not None
    assert stored["hardware"]["processor"] != "another"
    first, second = stored["continued"]
    assert first.keys() == {"epoch", "at"}
    assert (second["epoch"], second["hardware"]["processor"]) == (2, "another")


def test_a_trial_that_had_trained_nothing_begins_anew(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    write_provenance(run_spec_of(tmp_path, phantom_dataset, seed=5))
    write_provenance(run_spec_of(tmp_path, phantom_dataset, seed=6))
    stored = read_provenance(tmp_path / "trials" / "0")
    assert stored is not None
    assert (stored["seed"], stored["continued"]) == (6, [])


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository with a package in it, in the place of ours."""
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("one = 1\n")
    (tmp_path / "repository" / "README.md").write_text("read me\n")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "first"],
    ):
        subprocess.run(["git", *command], cwd=package.parent, check=True)
    monkeypatch.setattr(provenance, "PACKAGE", package)
    caches = (provenance._changes, provenance._is_checkout)
    for cached in caches:
        cached.cache_clear()
    yield package
    for cached in caches:
        cached.cache_clear()


def test_code_as_committed_needs_no_patch(
    checkout: Path, phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    (checkout.parent / "README.md").write_text("not code\n")
    write_provenance(run_spec_of(tmp_path / "study", phantom_dataset))
    stored = read_provenance(tmp_path / "study" / "trials" / "0")
    assert stored is not None
    assert stored["patch"] is None
    assert len(stored["commit"]) == 40


def test_changed_code_is_kept_once_as_a_patch_that_gives_it_back(
    checkout: Path, phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    (checkout / "__init__.py").write_text("one = 2\n")
    (checkout / "new.py").write_text("two = 2\n")
    for _ in range(2):
        write_provenance(run_spec_of(tmp_path / "study", phantom_dataset))
    stored = read_provenance(tmp_path / "study" / "trials" / "0")
    assert stored is not None
    assert stored["commit"].endswith("+changes")
    (patch,) = (tmp_path / "study").glob("dirty-*.patch")
    assert stored["patch"] == patch.name
    subprocess.run(
        ["git", "clone", "-q", str(checkout.parent), str(tmp_path / "clone")], check=True
    )
    subprocess.run(["git", "apply", str(patch)], cwd=tmp_path / "clone", check=True)
    assert (tmp_path / "clone/package/__init__.py").read_text() == "one = 2\n"
    assert (tmp_path / "clone/package/new.py").read_text() == "two = 2\n"


def test_an_installed_package_inside_another_repository_has_no_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = checkout.parent / "site-packages" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    monkeypatch.setattr(provenance, "PACKAGE", installed)
    provenance._is_checkout.cache_clear()
    assert commit() is None
