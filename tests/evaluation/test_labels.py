"""Which labeled images are chosen and read.

And a labeled dataset apart from the pretraining one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import change_manifest
from helpers.runs import Rows, discs, write

from amlp_ray.analysis.inspect_run import inspect_run
from amlp_ray.config import ImageSpec, PretrainConfig, ProbeConfig, SegmentConfig
from amlp_ray.data.dataset import PatchDataset, Split
from amlp_ray.data.path import DataPath
from amlp_ray.errors import CheckpointError, ConfigError, DataError
from amlp_ray.evaluation.diagnostics import held_out, true_lesions
from amlp_ray.evaluation.labels import by_part, check_fits, lesion_pixels, spread
from amlp_ray.evaluation.linear_probe import Probe
from amlp_ray.evaluation.segmentation import segment
from amlp_ray.launch.job import NUM_PICTURES, claim, run_job
from amlp_ray.launch.launcher import pretrain_dataset
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.method.augment import normalize
from amlp_ray.method.patches import lesion_shares, patchify
from amlp_ray.training.loggers.metrics_file import append_row
from amlp_ray.training.pretrain import Hooks
from amlp_ray.utils.json_files import read_json

MODEL = {"width": 16, "depth": 1, "heads": 2, "decoder_width": 16}
SETTINGS = PretrainConfig.model_validate(
    {"variant": "mae", "epochs": 1, "batch_size": 8, "model": MODEL}
)
FEW = ProbeConfig(num_labeled=8, subsets=2, folds=2)


class Counting(PatchDataset):
    """Notes how many images are read."""

    read: int = 0

    @classmethod
    def from_dataset(cls, dataset: PatchDataset) -> Counting:
        return cls(dataset.root, dataset.manifest)

    def load(self, split: str, rows: np.ndarray | None = None) -> Split:
        loaded = super().load(split, rows)
        self.read += len(loaded)
        return loaded


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> PatchDataset:
    """40 images to fit on, some without a mask, and 23 to score, in parts of 5."""
    train, val = discs(40, seed=1), discs(23, seed=2)
    labeled = np.arange(40) % 4 != 2
    return write(
        tmp_path_factory.mktemp("sets") / "labels",
        {"train": train._replace(labeled=labeled), "val": val},
    )


@pytest.fixture(scope="module")
def unlabeled(tmp_path_factory: pytest.TempPathFactory) -> PatchDataset:
    """24 images of a brighter scanner without any mask."""
    images = (discs(24, seed=3).images.astype(int) + 30).clip(0, 255).astype(np.uint8)
    rows = Rows(images, np.zeros((24, 32, 32), np.uint8), np.zeros(24, bool))
    return write(tmp_path_factory.mktemp("sets") / "unlabeled", {"train": rows})


def changed(dataset: PatchDataset, folder: Path, **manifest: Any) -> PatchDataset:
    """The same dataset with another manifest."""
    shutil.copytree(dataset.path, folder)
    change_manifest(folder, lambda values: values | manifest)
    return PatchDataset.open(folder)


# Choosing


def test_lesion_pixels_are_those_of_the_masks_and_nan_where_there_is_none(
    labels: PatchDataset,
) -> None:
    train = labels.load("train")
    expected = np.where(train.labeled, train.masks.sum((1, 2)), np.nan)
    np.testing.assert_array_equal(lesion_pixels(labels, "train"), expected)
    assert lesion_pixels(labels, "test").shape == (0,)


def test_rows_are_spread_from_the_first_to_the_last() -> None:
    rows = np.arange(10, 30)
    assert spread(rows, 3).tolist() == [10, 19, 29]
    assert spread(rows, 100).tolist() == rows.tolist()
    assert spread(rows[:0], 5).tolist() == []


@pytest.mark.parametrize("rows", [None, [0], [4, 5, 39], [], list(range(40))])
def test_rows_by_part_are_all_rows_once_and_no_part_twice(
    labels: PatchDataset, rows: list[int] | None
) -> None:
    row_indices = None if rows is None else np.array(rows, dtype=np.int64)
    parts = list(by_part(labels, "train", row_indices))
    assert np.concatenate([*parts, np.zeros(0, int)]).tolist() == (
        list(range(40)) if rows is None else rows
    )
    files = [{int(row) // 5 for row in part} for part in parts]
    assert all(len(file) == 1 for file in files)
    assert len(set.union(set(), *files)) == len(files)


def test_held_out_images_are_those_a_look_at_all_would_choose_and_only_they_are_read(
    labels: PatchDataset,
) -> None:
    val = labels.load("val")
    lesion = np.flatnonzero(val.labeled & val.masks.any((1, 2)))
    expected = val.take(lesion[np.linspace(0, len(lesion) - 1, 6).astype(int)])
    counting = Counting.from_dataset(labels)
    actual = held_out(counting, 6)
    assert actual.ids == expected.ids
    assert np.array_equal(actual.images, expected.images)
    assert np.array_equal(actual.masks, expected.masks)
    assert counting.read == 6


def test_without_masks_or_val_held_out_images_are_of_train_and_have_none(
    unlabeled: PatchDataset,
) -> None:
    actual = held_out(unlabeled, 4)
    assert actual.ids == [f"unlabeled train {i}" for i in (0, 7, 15, 23)]
    assert not actual.labeled.any()


def test_true_lesions_are_the_same_read_part_by_part(tmp_path: Path) -> None:
    dataset = write(tmp_path / "all", {"train": discs(17)})
    train = dataset.load("train")
    oracle = PretrainConfig.model_validate(
        {"model": MODEL, "selection": {"mode": "soft", "score": "oracle"}}
    )
    lesions = true_lesions(dataset, oracle)
    assert lesions is not None
    whole = lesion_shares(train.masks, 8).unflatten(1, (4, 4))
    assert list(lesions) == train.keys.tolist()
    assert all(torch.equal(lesions[key], whole[i]) for i, key in enumerate(train.keys.tolist()))


@pytest.mark.parametrize("scoring", ["val", "cross-validation"])
def test_a_probe_reads_what_it_fits_and_scores_and_nothing_else(
    labels: PatchDataset, scoring: str
) -> None:
    counting = Counting.from_dataset(labels)
    probe = Probe(counting, FEW.model_copy(update={"scoring": scoring}), 8)
    train = labels.load("train")
    assert counting.read == len(probe.data)
    labeled = {train.ids[i] for i in np.flatnonzero(train.labeled)}
    assert {name for name in probe.data.ids if "train" in name} <= labeled
    if scoring == "cross-validation":
        assert len(probe.data) == len(labeled) + 23
    else:
        assert set(labels.load("val").ids) <= set(probe.data.ids)
        assert len(probe.data) <= 23 + 2 * 8
    order = [*train.ids, *labels.load("val").ids]
    assert probe.data.ids == sorted(probe.data.ids, key=order.index), (
        "in the order of the splits, as ever"
    )


@pytest.mark.parametrize("scoring", ["val", "cross-validation"])
def test_of_many_labeled_images_a_probe_scores_as_many_as_it_is_told(
    tmp_path: Path, scoring: str
) -> None:
    dataset = write(
        tmp_path / "many", {"train": discs(60, normal=3), "val": discs(150, seed=5, normal=2)}
    )
    counting = Counting.from_dataset(dataset)
    probe = Probe(counting, FEW.model_copy(update={"scoring": scoring, "images": 40}), 8)
    scored = np.concatenate([rows for _, rows in probe.plan])
    lesion = probe.data.masks[scored].any((1, 2))
    assert (int(lesion.sum()), int((~lesion).sum())) == (40, 40)
    assert counting.read == len(probe.data) <= 80 + 2 * 8


# Apart


def test_images_of_another_shape_are_told_with_both(labels: PatchDataset) -> None:
    other = ImageSpec(channels=3, height=32, width=64, mean=(0,) * 3, std=(1,) * 3)
    with pytest.raises(
        ConfigError,
        match=r"^e was trained on 3x32x64 .* holds 1x32x32; prepare the data alike\.$",
    ):
        check_fits(labels, other, "e was trained on")


@pytest.mark.parametrize(("mean", "std"), [(167.0, 20.0), (90.0, 40.0), (200.0, 120.0)])
def test_two_scanners_of_a_kind_fit(labels: PatchDataset, mean: float, std: float) -> None:
    check_fits(labels, ImageSpec(channels=1, height=32, width=32, mean=(mean,), std=(std,)), "x")


@pytest.mark.parametrize(
    ("mean", "std"), [(0.65, 0.15), (42000.0, 10000.0), (-300.0, 100.0), (167.0, 3.0)]
)
def test_values_on_another_scale_are_told_with_both(
    labels: PatchDataset, mean: float, std: float
) -> None:
    spec = ImageSpec(channels=1, height=32, width=32, mean=(mean,), std=(std,))
    with pytest.raises(
        ConfigError,
        match=r"e was trained on values around .* prepare both with the same `values`",
    ):
        check_fits(labels, spec, "e was trained on")


def run_spec(unlabeled: PatchDataset, labels: PatchDataset | None, folder: Path) -> RunSpec:
    eval_data = labels.path if labels else None
    return RunSpec(
        config=SETTINGS,
        data=unlabeled.path,
        folder=folder,
        probe=FEW,
        rungs=(1,),
        eval_data=eval_data,
    )


def test_labels_apart_are_scored_and_drawn_in_the_scale_of_the_images_trained_on(
    unlabeled: PatchDataset, labels: PatchDataset, tmp_path: Path
) -> None:
    result = run_job(
        RunSpec(
            config=SETTINGS,
            data=unlabeled.path,
            folder=tmp_path,
            probe=FEW,
            rungs=(1,),
            eval_data=labels.path,
        ),
        Hooks(),
    )
    assert {"dsc", "loss_reference", "true_lesion_masked"} <= result.metrics.keys(), (
        "pretraining images have no mask"
    )
    score = read_json(tmp_path / "score.json")
    expected = Probe(labels, FEW, 8, unlabeled.spec).score(result.model.encoder)
    assert score["per_image"] == expected.per_image
    assert set(score["per_image"]) <= set(labels.load("train").ids + labels.load("val").ids)
    pictures = sorted(path.stem.partition("-")[2] for path in (tmp_path / "pictures").iterdir())
    assert len(pictures) == NUM_PICTURES
    assert all(name.startswith("labels_val") for name in pictures)
    record = json.loads((tmp_path / "data.json").read_text())
    assert (record["path"], record["eval_data"]["path"]) == (unlabeled.path, labels.path)


def test_a_probe_normalizes_by_the_images_trained_on(
    unlabeled: PatchDataset, labels: PatchDataset
) -> None:
    batches: list[torch.Tensor] = []

    def tokens(patches: torch.Tensor) -> torch.Tensor:
        batches.append(patches)
        return patches

    probe = Probe(labels, FEW, 8, unlabeled.spec)
    probe.score_tokens(tokens)
    expected = patchify(normalize(torch.from_numpy(probe.data.images), unlabeled.spec), 8)
    assert torch.equal(torch.cat(batches), expected)
    assert float(expected.mean()) < -0.4, "darker than what was trained on, and seen so"


def test_the_same_data_set_as_labels_apart_scores_the_same(
    labels: PatchDataset, tmp_path: Path
) -> None:
    scores, eval_data_scores = (
        run_job(
            RunSpec(
                config=SETTINGS,
                data=labels.path,
                folder=tmp_path / str(i),
                probe=FEW,
                rungs=(1,),
                eval_data=overrides,
            ),
            Hooks(),
        ).metrics
        for i, overrides in enumerate((None, labels.path))
    )
    for name in ("dsc", "ap", "loss_reference", "true_lesion_masked", "loss"):
        assert scores[name] == eval_data_scores[name]


def test_a_folder_is_claimed_with_its_labels(
    unlabeled: PatchDataset, labels: PatchDataset, tmp_path: Path
) -> None:
    run = RunSpec(
        config=SETTINGS, data=unlabeled.path, folder=tmp_path / "run", eval_data=labels.path
    )
    claim(run, unlabeled, labels)
    append_row(tmp_path / "run" / "metrics.jsonl", {"epoch": 1})
    moved = changed(labels, tmp_path / "moved")
    claim(run.model_copy(update={"eval_data": moved.path}), unlabeled, moved)
    other = changed(labels, tmp_path / "other", fingerprint="0" * 64)
    for overrides in (other, None):
        with pytest.raises(
            CheckpointError, match=r"holds a run on other data .*moved, prepared differently"
        ):
            claim(run, unlabeled, overrides)
    plain = RunSpec(config=SETTINGS, data=unlabeled.path, folder=tmp_path / "plain")
    claim(plain, unlabeled)
    append_row(tmp_path / "plain" / "metrics.jsonl", {"epoch": 1})
    with pytest.raises(CheckpointError, match="no eval_data"):
        claim(plain, unlabeled, labels)


@pytest.mark.parametrize(
    ("manifest", "error"), [({"mean": [1e4], "std": [1e3]}, ConfigError), (None, DataError)]
)
def test_labels_that_do_not_fit_or_are_gone_are_told_before_training(
    unlabeled: PatchDataset,
    labels: PatchDataset,
    tmp_path: Path,
    manifest: Any,
    error: type[Exception],
) -> None:
    path = (
        str(tmp_path / "gone")
        if manifest is None
        else changed(labels, tmp_path / "other", **manifest).path
    )
    with pytest.raises(error, match="same `values`" if manifest else "There is no patch dataset"):
        run_job(
            RunSpec(
                config=SETTINGS,
                data=unlabeled.path,
                folder=tmp_path / "run",
                probe=FEW,
                rungs=(1,),
                eval_data=path,
            ),
            Hooks(),
        )
    assert not (tmp_path / "run").exists()


def test_an_inspection_shows_the_labels_apart_in_the_scale_of_the_run(
    unlabeled: PatchDataset, labels: PatchDataset, tmp_path: Path
) -> None:
    run_job(
        RunSpec(
            config=SETTINGS, data=unlabeled.path, folder=tmp_path / "run", eval_data=labels.path
        ),
        Hooks(),
    )
    inspection = inspect_run(tmp_path / "run", count=2)
    assert (inspection["data"], inspection["own_data"], inspection["split"]) == (
        labels.path,
        True,
        "val",
    )
    assert inspection["mean"]["true_lesion_masked"] is not None
    again = inspect_run(
        tmp_path / "run", data=changed(labels, tmp_path / "x", mean=[100.0]).path, count=2
    )
    assert again["mean"]["error"] == inspection["mean"]["error"], (
        "mean and SD are the run's, whoever's images are shown"
    )
    trained_on = inspect_run(tmp_path / "run", data=unlabeled.path, count=2)
    assert trained_on["own_data"]


def test_an_encoder_pretrained_on_one_set_segments_another(
    unlabeled: PatchDataset, labels: PatchDataset, tmp_path: Path
) -> None:
    encoder = run_job(
        RunSpec(config=SETTINGS, data=unlabeled.path, folder=tmp_path / "run"), Hooks()
    ).encoder
    config = SegmentConfig.model_validate({"epochs": 2, "batch_size": 6, "decoder_width": 8})
    score = segment(labels, encoder, tmp_path / "out", config)
    train = labels.load("train")
    assert score["num_labeled"] == int((train.labeled & train.masks.any((1, 2))).sum())
    other = changed(labels, tmp_path / "other", mean=[9000.0], std=[900.0])
    with pytest.raises(ConfigError, match=r"encoder.safetensors was trained on values around"):
        segment(other, encoder, tmp_path / "never", config)
    assert not (tmp_path / "never").exists()


def test_labels_in_an_object_store_are_named_by_their_uri(
    unlabeled: PatchDataset, labels: PatchDataset, s3_bucket: str, tmp_path: Path
) -> None:
    labels_path = DataPath(s3_bucket) / "sets" / "labels"
    for file in Path(labels.path).rglob("*.*"):
        (labels_path / file.relative_to(labels.path).as_posix()).atomic_write(file.read_bytes())
    run = tmp_path / "run"
    encoder = run_job(
        RunSpec(
            config=SETTINGS,
            data=unlabeled.path,
            folder=run,
            probe=FEW,
            rungs=(1,),
            eval_data=str(labels_path),
        ),
        Hooks(),
    ).encoder
    assert json.loads((run / "data.json").read_text())["eval_data"]["path"] == str(labels_path)
    assert inspect_run(run, count=1)["data"] == str(labels_path)
    config = SegmentConfig.model_validate({"epochs": 1, "decoder_width": 8, "num_labeled": 4})
    assert (
        segment(PatchDataset.open(str(labels_path)), encoder, tmp_path / "out", config)["images"]
        > 0
    )


def test_pretraining_shows_the_lesions_of_another_set(
    labels: PatchDataset, unlabeled: PatchDataset, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = []
    pretrain_dataset(
        unlabeled.path, tmp_path / "run", SETTINGS, eval_data=labels.path, report=rows.append
    )
    assert "true_lesion_masked" in rows[0]
    assert (
        json.loads((tmp_path / "run" / "data.json").read_text())["eval_data"]["path"] == labels.path
    )
    with pytest.raises(CheckpointError, match="run"):
        pretrain_dataset(unlabeled.path, tmp_path / "run", SETTINGS)
    with pytest.raises(DataError, match="no patch dataset"):
        pretrain_dataset(unlabeled.path, tmp_path / "other", SETTINGS, eval_data=tmp_path / "gone")
    assert not (tmp_path / "other").exists()
