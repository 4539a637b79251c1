"""A study that pretrains on one data set and scores by the labels of another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from made import made_dataset
from tiny import TINY

from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import DataError, SettingsError, StudyError
from amlp_ray.study.study import Study


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY | changes))
    return file


@pytest.fixture(scope="module")
def unlabelled(
    phantom_dataset: PatchDataset, tmp_path_factory: pytest.TempPathFactory
) -> PatchDataset:
    """The training phantoms, a little brighter and without their masks."""
    images = phantom_dataset.load("train").images.astype(int) + 20
    return made_dataset(
        tmp_path_factory.mktemp("sets") / "unlabelled", images.clip(0, 255).astype(np.uint8)
    )


def with_manifest(dataset: PatchDataset, folder: Path, **changes: Any) -> str:
    shutil.copytree(dataset.path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return str(folder)


@pytest.mark.parametrize(
    "uri",
    ["s3://bucket/a set", "gs://bucket/set/", "s3://b/s?endpoint_override=127.0.0.1:9&scheme=http"],
)
def test_uris_of_both_survive_and_paths_become_absolute(tmp_path: Path, uri: str) -> None:
    told = uri.rstrip("/")
    study = Study.load(write(tmp_path, data=uri, labels="sets/mine"))
    assert study.settings.data == told
    assert study.settings.labels == str(Path("sets/mine").absolute())
    study = Study.load(
        write(tmp_path, data="here", labels="elsewhere"), data=Path("sets/mine"), labels=uri
    )
    assert (study.settings.data, study.settings.labels) == (str(Path("sets/mine").absolute()), told)
    assert Study.load(write(tmp_path), data="here").settings.labels is None


def test_an_unlabelled_set_is_searched_by_the_labels_of_another_alone(
    unlabelled: PatchDataset, phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    file = write(tmp_path)
    with pytest.raises(DataError, match="has 0 labelled training images with a lesion"):
        Study.load(file, data=unlabelled.path).plan()
    plan = Study.load(file, data=unlabelled.path, labels=phantom_dataset.path).plan()
    assert plan.steps_per_trial == 12
    assert plan.seconds_per_probe > 0


@pytest.mark.parametrize(
    ("changes", "settings", "error", "told"),
    [
        (
            {"mean": [3e4], "std": [1e4]},
            {},
            SettingsError,
            "holds values around .* prepare both with the same",
        ),
        (
            {"height": 32, "width": 128},
            {},
            SettingsError,
            "holds 1x64x64 .* holds 1x32x128; prepare the data alike",
        ),
        ({}, {"probe": {"labels": 1000}}, DataError, "labels has .* probe.labels=1000"),
        (None, {}, DataError, "There is no patch dataset .*labels"),
    ],
    ids=["scale", "shape", "too few", "gone"],
)
def test_labels_that_cannot_serve_are_refused_before_anything_is_written(
    unlabelled: PatchDataset, phantom_dataset: PatchDataset, tmp_path: Path,
    changes: dict[str, Any] | None, settings: dict[str, Any], error: type[Exception], told: str,
) -> None:  # fmt: skip
    labels = tmp_path / "labels"
    if changes is not None:
        with_manifest(phantom_dataset, labels, **changes)
    study = Study.load(
        write(tmp_path, **settings), data=unlabelled.path, labels=labels, runs=tmp_path / "runs"
    )
    for attempt in (study.plan, study.run):
        with pytest.raises(error, match=told):
            attempt()
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
def test_a_study_keeps_to_its_labels(
    unlabelled: PatchDataset, phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    file = write(tmp_path, arms=[], budget={"trials": 1}, labels=phantom_dataset.path)
    study = Study.load(file, data=unlabelled.path, runs=tmp_path / "runs").run(
        notify=lambda line: None
    )

    trial = study.store.trial_folder(0)
    score = json.loads((trial / "score.json").read_text())
    known = {name for split in ("train", "val") for name in phantom_dataset.load(split).ids}
    assert score["images"] > 0
    assert set(score["per_image"]) <= known
    assert json.loads((trial / "data.json").read_text())["labels"]["path"] == phantom_dataset.path
    held = json.loads((study.store.folder / "environment.json").read_text())
    assert [held[name]["name"] for name in ("dataset", "labels")] == [
        "unlabelled",
        phantom_dataset.name,
    ]
    assert held["labels"]["fingerprint"] == phantom_dataset.manifest.fingerprint
    assert "Labelled images" in study.report().read_text()

    def again(**given: Any) -> None:
        Study.load(write(tmp_path, **TINY_AGAIN), runs=tmp_path / "runs", **given).run(
            notify=lambda line: None
        )

    moved = with_manifest(phantom_dataset, tmp_path / "moved")
    again(data=unlabelled.path, labels=moved)
    other = with_manifest(phantom_dataset, tmp_path / "other", fingerprint="0" * 64)
    with pytest.raises(
        StudyError, match=r"begun on other labels than .*other holds now; restore the labels"
    ):
        again(data=unlabelled.path, labels=other)
    with pytest.raises(StudyError, match="begun on other data than"):
        again(data=other, labels=moved)
    with pytest.raises(
        StudyError, match=r"begun on other labels than .*own has of its own; restore the labels"
    ):
        again(
            data=with_manifest(
                phantom_dataset, tmp_path / "own", fingerprint=unlabelled.manifest.fingerprint
            )
        )


TINY_AGAIN: dict[str, Any] = {"arms": [], "budget": {"trials": 1}}
