"""A study that pretrains on one dataset and scores by the labels of another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.datasets import change_manifest, write_dataset
from helpers.tiny_study import TINY

from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import ConfigError, DataError, StudyError
from amlp_ray.study.study import Study
from amlp_ray.utils.json_files import read_json


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY | changes))
    return file


@pytest.fixture(scope="module")
def unlabeled(
    phantom_dataset: PatchDataset, tmp_path_factory: pytest.TempPathFactory
) -> PatchDataset:
    """The training phantoms, a little brighter and without their masks."""
    images = phantom_dataset.load("train").images.astype(int) + 20
    return write_dataset(
        tmp_path_factory.mktemp("sets") / "unlabeled", images.clip(0, 255).astype(np.uint8)
    )


def with_manifest(dataset: PatchDataset, folder: Path, **changes: Any) -> str:
    shutil.copytree(dataset.path, folder)
    change_manifest(folder, lambda values: values | changes)
    return str(folder)


@pytest.mark.parametrize(
    "uri",
    ["s3://bucket/a set", "gs://bucket/set/", "s3://b/s?endpoint_override=127.0.0.1:9&scheme=http"],
)
def test_uris_of_both_survive_and_paths_become_absolute(tmp_path: Path, uri: str) -> None:
    expected = uri.rstrip("/")
    study = Study.load(write(tmp_path, data=uri, eval_data="sets/mine"))
    assert study.config.data == expected
    assert study.config.eval_data == str(Path("sets/mine").absolute())
    study = Study.load(
        write(tmp_path, data="here", eval_data="elsewhere"), data=Path("sets/mine"), eval_data=uri
    )
    assert (study.config.data, study.config.eval_data) == (
        str(Path("sets/mine").absolute()),
        expected,
    )
    assert Study.load(write(tmp_path), data="here").config.eval_data is None


def test_an_unlabeled_set_is_searched_by_the_labels_of_another_alone(
    unlabeled: PatchDataset, phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    file = write(tmp_path)
    with pytest.raises(DataError, match="has 0 labeled training images with a lesion"):
        Study.load(file, data=unlabeled.path).plan()
    plan = Study.load(file, data=unlabeled.path, eval_data=phantom_dataset.path).plan()
    assert plan.steps_per_trial == 12
    assert plan.seconds_per_probe > 0


@pytest.mark.parametrize(
    ("changes", "config", "error", "message"),
    [
        (
            {"mean": [3e4], "std": [1e4]},
            {},
            ConfigError,
            "holds values around .* prepare both with the same",
        ),
        (
            {"height": 32, "width": 128},
            {},
            ConfigError,
            "holds 1x64x64 .* holds 1x32x128; prepare the data alike",
        ),
        ({}, {"probe": {"num_labeled": 1000}}, DataError, "labels has .* probe.num_labeled=1000"),
        (None, {}, DataError, "There is no patch dataset .*"),
    ],
    ids=["scale", "shape", "too few", "gone"],
)
def test_labels_that_cannot_serve_are_refused_before_anything_is_written(
    unlabeled: PatchDataset,
    phantom_dataset: PatchDataset,
    tmp_path: Path,
    changes: dict[str, Any] | None,
    config: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    eval_data = tmp_path / "labels"
    if changes is not None:
        with_manifest(phantom_dataset, eval_data, **changes)
    study = Study.load(
        write(tmp_path, **config), data=unlabeled.path, eval_data=eval_data, runs=tmp_path / "runs"
    )
    for attempt in (study.plan, study.run):
        with pytest.raises(error, match=message):
            attempt()
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
def test_a_study_keeps_to_its_labels(
    unlabeled: PatchDataset, phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    file = write(tmp_path, baselines=[], budget={"trials": 1}, eval_data=phantom_dataset.path)
    study = Study.load(file, data=unlabeled.path, runs=tmp_path / "runs").run()

    trial = study.store.trial_folder(0)
    score = read_json(trial / "score.json")
    allowed = {name for split in ("train", "val") for name in phantom_dataset.load(split).ids}
    assert score["images"] > 0
    assert set(score["per_image"]) <= allowed
    assert (
        json.loads((trial / "data.json").read_text())["eval_data"]["path"] == phantom_dataset.path
    )
    environment = read_json(study.store.folder / "environment.json")
    assert [environment[name]["name"] for name in ("dataset", "eval_data")] == [
        "unlabeled",
        phantom_dataset.name,
    ]
    assert environment["eval_data"]["fingerprint"] == phantom_dataset.manifest.fingerprint
    assert "Labeled images" in study.report().read_text()

    def again(**options: Any) -> None:
        Study.load(write(tmp_path, **TINY_AGAIN), runs=tmp_path / "runs", **options).run()

    moved = with_manifest(phantom_dataset, tmp_path / "moved")
    again(data=unlabeled.path, eval_data=moved)
    other = with_manifest(phantom_dataset, tmp_path / "other", fingerprint="0" * 64)
    with pytest.raises(
        StudyError, match=r"begun on other eval_data than .*other holds now; restore eval_data"
    ):
        again(data=unlabeled.path, eval_data=other)
    with pytest.raises(StudyError, match="begun on other data than"):
        again(data=other, eval_data=moved)
    with pytest.raises(
        StudyError, match="begun on other eval_data than the study names now; restore eval_data"
    ):
        again(
            data=with_manifest(
                phantom_dataset, tmp_path / "own", fingerprint=unlabeled.manifest.fingerprint
            )
        )


TINY_AGAIN: dict[str, Any] = {"baselines": [], "budget": {"trials": 1}}
