from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers.runs import Guarded
from safetensors.torch import load_file

from amlp_ray.config import FaultToleranceConfig, ModelConfig, ResourceConfig, SegmentConfig
from amlp_ray.config.base import build
from amlp_ray.data.dataset import PatchDataset, Split
from amlp_ray.errors import CheckpointError, ConfigError, DataError, ResourceError
from amlp_ray.evaluation.evaluate import SIZES, score_segmenter
from amlp_ray.evaluation.finetune import parameter_groups
from amlp_ray.evaluation.labels import lesion_pixels, train_rows
from amlp_ray.evaluation.segmentation import Tuning, segment
from amlp_ray.evaluation.segmenter import Segmenter
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.runtime.worker_context import WorkerContext
from amlp_ray.training.checkpoint.export import export_encoder, load_encoder
from amlp_ray.training.loggers.metrics_file import read_rows
from amlp_ray.utils.json_files import read_json

SMALL: dict[str, Any] = {"epochs": 3, "batch_size": 6, "decoder_width": 8, "lr": 3e-3}


class Spaced(Guarded):
    """The same, with the spacing of pixels, which is not known here."""

    def table(self, *splits: str, columns: object = None) -> pd.DataFrame:
        return super().table(*splits, columns=columns).assign(spacing_y=np.nan, spacing_x=np.nan)


@pytest.fixture
def dataset(phantom_dataset: PatchDataset) -> Guarded:
    return Spaced.from_dataset(phantom_dataset)


def export(dataset: PatchDataset, path: Path, **model: int) -> Path:
    torch.manual_seed(3)
    config = ModelConfig.model_validate(
        {"patch_size": 8, "width": 24, "depth": 2, "heads": 2, "decoder_width": 16} | model
    )
    export_encoder(MaskedAutoencoder(config, dataset.spec).encoder, path, config, dataset.spec)
    return path


def run(
    dataset: PatchDataset, folder: Path, *, from_scratch: bool = False, **overrides: Any
) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    encoder = export(dataset, folder / "encoder.safetensors")
    config = SegmentConfig.model_validate(SMALL | overrides)
    return segment(dataset, encoder, folder / "out", config, from_scratch=from_scratch)


def test_it_learns_to_find_lesions_from_masks_alone(dataset: Guarded, tmp_path: Path) -> None:
    losses: list[float] = []
    config = SegmentConfig.model_validate(SMALL | {"epochs": 25, "decoder_width": 16})
    encoder = export(dataset, tmp_path / "e.safetensors")
    score = segment(
        dataset, encoder, tmp_path / "out", config, progress=lambda m: losses.append(m["loss"])
    )
    assert len(losses) == 25
    assert losses[-1] < 0.8 * losses[0]
    assert score["dsc"] > 0.2  # the whole image as lesion would score about 0.1


def test_files_and_scores_are_complete(dataset: Guarded, tmp_path: Path) -> None:
    score = run(dataset, tmp_path, epochs=1)
    out = tmp_path / "out"
    assert read_json(out / "score.json") == score
    assert SegmentConfig(**yaml.safe_load((out / "config.yaml").read_text())).epochs == 1
    weights = load_file(out / "segmenter.safetensors")
    assert any(key.startswith("encoder.blocks.1") for key in weights)
    assert all(value.isfinite().all() for value in weights.values())

    val, train = dataset.load("val"), dataset.load("train")
    lesion = {val.ids[i] for i in np.flatnonzero(val.masks.any((1, 2)))}
    assert set(score["per_image"]) == lesion
    assert score["images"] == len(lesion) < len(val)
    assert score["dsc"] == pytest.approx(np.mean(list(score["per_image"].values())), abs=1e-5)
    assert 0 <= score["empty_correct"] <= 1
    assert score["num_labeled"] == int(train.masks.any((1, 2)).sum())
    assert score["from_scratch"] is False


def test_from_scratch_keeps_the_shape_but_not_the_weights(dataset: Guarded, tmp_path: Path) -> None:
    config = {"epochs": 1, "freeze": True}
    tuned, scratch = (
        run(dataset, tmp_path / str(flag), from_scratch=flag, **config) for flag in (False, True)
    )
    assert scratch["from_scratch"] is True
    encoder = load_file(tmp_path / "False" / "encoder.safetensors")
    pretrained, initialized = (
        load_file(tmp_path / name / "out" / "segmenter.safetensors") for name in ("False", "True")
    )
    assert pretrained.keys() == initialized.keys()
    assert all(
        torch.equal(value, pretrained[f"encoder.{key}"]) for key, value in encoder.items()
    )  # frozen
    key = "encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(pretrained[key], initialized[key])
    assert tuned["dsc"] != scratch["dsc"]


def test_without_freezing_the_encoder_is_trained(dataset: Guarded, tmp_path: Path) -> None:
    run(dataset, tmp_path, epochs=1)
    before = load_file(tmp_path / "encoder.safetensors")
    after = load_file(tmp_path / "out" / "segmenter.safetensors")
    changed = {
        key for key, value in before.items() if not torch.equal(value, after[f"encoder.{key}"])
    }
    assert "blocks.0.attn.qkv.weight" in changed
    assert "pos_embed" not in changed


def test_a_run_repeats_exactly(dataset: Guarded, tmp_path: Path) -> None:
    first, second = (run(dataset, tmp_path / name, num_labeled=8) for name in ("a", "b"))
    assert first["num_labeled"] == 8
    assert first["per_image"] == second["per_image"]


@pytest.mark.parametrize(
    "change", [{"patch_size": 16}, {"depth": 1}, {"depth": 5}, {"patch_size": 2, "width": 16}]
)
def test_encoders_of_other_shapes_are_segmenters_too(
    dataset: Guarded, tmp_path: Path, change: dict[str, int]
) -> None:
    encoder = export(dataset, tmp_path / "e.safetensors", **change)
    config = SegmentConfig.model_validate(SMALL | {"epochs": 1, "num_labeled": 4})
    score = segment(dataset, encoder, tmp_path / "out", config)
    assert 0 <= score["dsc"] <= 1


@pytest.mark.parametrize("width", [9, 12, 17])
def test_any_decoder_width_in_range_works(dataset: Guarded, tmp_path: Path, width: int) -> None:
    assert 0 <= run(dataset, tmp_path, epochs=1, num_labeled=4, decoder_width=width)["dsc"] <= 1


def test_an_encoder_of_other_images_is_refused(dataset: Guarded, tmp_path: Path) -> None:
    spec = dataset.spec.model_copy(update={"height": 32, "width": 48})
    config = ModelConfig(patch_size=8, width=24, depth=1, heads=2, decoder_width=16)
    path = tmp_path / "e.safetensors"
    export_encoder(MaskedAutoencoder(config, spec).encoder, path, config, spec)
    with pytest.raises(
        ConfigError, match=r"trained on 1x32x48 .* holds 1x64x64; prepare the data alike"
    ):
        segment(dataset, path, tmp_path / "out", SegmentConfig())
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_encoder_is_refused(dataset: Guarded, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="check the path"):
        segment(dataset, tmp_path / "none.safetensors", tmp_path / "out", SegmentConfig())


def test_too_few_labels_are_refused_with_the_number_found(dataset: Guarded, tmp_path: Path) -> None:
    train = dataset.load("train")
    lesions = int(train.masks.any((1, 2)).sum())
    with pytest.raises(
        DataError, match=rf"has {lesions} labeled train images with a lesion, but 500 are needed"
    ):
        run(dataset, tmp_path, num_labeled=500)


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_split_without_masks_is_refused(dataset: Guarded, tmp_path: Path, name: str) -> None:
    def unlabel(split: str, rows: Split) -> Split:
        return replace(rows, labeled=rows.labeled & (split != name))

    with pytest.raises(
        DataError, match=rf"has 0 labeled {name} images with a lesion, but 1 are needed"
    ):
        run(Spaced.from_dataset(dataset, unlabel), tmp_path)


def test_a_segmenter_that_was_saved_scores_as_when_it_was_trained(
    dataset: Guarded, tmp_path: Path
) -> None:
    trained = run(dataset, tmp_path, epochs=1, decoder_width=12)
    result = score_segmenter(dataset, tmp_path / "out", "val")
    assert result == {name: trained[name] for name in result}
    assert trained.keys() - result.keys() == {
        "num_labeled",
        "num_empty_per_epoch",
        "from_scratch",
        "encoder",
        "start",
        "seconds",
    }


def test_test_images_are_read_where_they_are_asked_for_by_name(
    phantom_dataset: PatchDataset, dataset: Guarded, tmp_path: Path
) -> None:
    run(dataset, tmp_path, epochs=1)
    result = score_segmenter(phantom_dataset, tmp_path / "out", "test", sizes=(0.04, 0.08))
    test = phantom_dataset.load("test")
    shares = {test.ids[i]: test.masks[i].mean() for i in np.flatnonzero(test.masks.any((1, 2)))}
    assert set(result["per_image"]) == set(shares)
    large = [result["per_image"][name] for name, share in shares.items() if share > 0.08]
    assert result["dsc_large"] == pytest.approx(np.mean(large), abs=1e-5)


def test_a_segmenter_of_other_images_or_none_is_refused(dataset: Guarded, tmp_path: Path) -> None:
    run(dataset, tmp_path, epochs=1)
    spec = dataset.manifest.model_copy(update={"height": 32})
    with pytest.raises(ConfigError, match=r"out was trained on 1x64x64 .* holds 1x32x64"):
        score_segmenter(Guarded(dataset.root, spec), tmp_path / "out", "val")
    (tmp_path / "out" / "segmenter.safetensors").write_bytes(b"cut short")
    with pytest.raises(
        CheckpointError, match=r"segmenter\.safetensors is no safetensors file of amlp-ray"
    ):
        score_segmenter(dataset, tmp_path / "out", "val")
    (tmp_path / "out" / "segmenter.safetensors").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"There is no .*segmenter\.safetensors; give the folder of a finished",
    ):
        score_segmenter(dataset, tmp_path / "out", "val")


# Scores of images and groups


def test_a_row_per_image_holds_what_the_score_sums_up(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    grouped = Grouped.from_dataset(phantom_dataset)
    score = run(grouped, tmp_path, epochs=2, decoder="linear")
    table = pd.read_csv(tmp_path / "out" / "per_image.csv").set_index("id")
    val = grouped.load("val")
    assert table.index.tolist() == val.ids
    assert (table["lesion_pixels"].to_numpy() == val.masks.sum((1, 2))).all()
    lesion = table[table["lesion_pixels"] > 0]
    assert (
        table.drop(lesion.index)[["dsc", "ppv", "sensitivity", "iou", "hd95"]].isna().all(axis=None)
    )
    assert lesion["dsc"].to_dict() == pytest.approx(score["per_image"])
    groups = {name: rows["dsc"].mean() for name, rows in lesion.groupby("group")}
    assert score["per_group"] == pytest.approx(groups)
    assert score["groups"] == len(groups) == 2
    assert score["dsc_per_group"] == pytest.approx(np.mean(list(groups.values())), abs=1e-5)
    for name in ("dsc", "ppv", "sensitivity", "iou", "hd95"):
        assert score[name] == pytest.approx(lesion[name].mean(), abs=1e-5)
    assert score["missed"] == int((lesion["predicted_pixels"] == 0).sum())


class Grouped(Spaced):
    """Two patients, of one and of all other images, and pixels of 0.5 x 2 mm."""

    def change(self, name: str, split: Split) -> Split:  # type: ignore[override]
        return replace(split, groups=np.array(["a", *"b" * (len(split) - 1)]))

    def table(self, *splits: str, columns: object = None) -> pd.DataFrame:
        return super().table(*splits, columns=columns).assign(spacing_y=0.5, spacing_x=2.0)


def test_distances_are_in_millimeters_where_every_image_has_a_spacing(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    run(Grouped.from_dataset(phantom_dataset), tmp_path, epochs=1)
    in_mm, in_pixels = (
        score_segmenter(kind.from_dataset(phantom_dataset), tmp_path / "out", "val")
        for kind in (Grouped, Spaced)
    )
    assert (in_mm["hd95_unit"], in_pixels["hd95_unit"]) == ("mm", "pixels")
    assert in_mm["hd95"] != in_pixels["hd95"]
    assert in_mm["per_image"] == in_pixels["per_image"]


# Labels


def test_a_share_of_the_labels_is_of_whole_groups_and_within_a_larger_share(
    phantom_dataset: PatchDataset,
) -> None:
    groups = np.repeat(np.arange(12), 3).astype(str)
    dataset = Spaced.from_dataset(
        phantom_dataset, lambda name, split: replace(split, groups=groups[: len(split)])
    )
    lesions = int((lesion_pixels(dataset, "train") > 0).sum())
    for seed in range(3):
        before: set[int] = set()
        for share in (0.05, 0.1, 0.3, 0.8, 1.0):
            rows = train_rows(dataset, SegmentConfig(label_share=share, seed=seed))
            assert before <= set(rows)
            assert len(rows) >= max(1, share * lesions - 1e-6)
            whole = set(
                np.flatnonzero(
                    (lesion_pixels(dataset, "train") > 0) & np.isin(groups, groups[rows])
                )
            )
            assert set(rows) == whole
            before = set(rows)
        assert len(before) == lesions
    one, other = (
        set(train_rows(dataset, SegmentConfig(label_share=0.3, seed=seed))) for seed in (0, 1)
    )
    assert one != other


# Going on


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "changes",
    [{}, {"decoder": "unetr", "layer_decay": 0.7, "min_crop_area": 0.5, "intensity_jitter": 0.5}],
)
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(
    dataset: Guarded, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = SegmentConfig.model_validate(SMALL | changes)
    encoder = export(dataset, tmp_path / "e.safetensors")
    whole = segment(dataset, encoder, tmp_path / "whole", config)
    epochs: list[int] = []

    def stop(metrics: dict[str, Any]) -> None:
        epochs.append(metrics["epoch"])
        if len(epochs) == 2:
            raise Stop

    with pytest.raises(Stop):
        segment(dataset, encoder, tmp_path / "parts", config, progress=stop)
    assert not (tmp_path / "parts" / "score.json").exists()
    for thread in threading.enumerate():
        if thread.name == "amlp-checkpoint":
            thread.join()
    parts = segment(dataset, encoder, tmp_path / "parts", config, progress=stop)
    assert epochs == [1, 2, 3]
    assert {**parts, "seconds": 0} == {**whole, "seconds": 0}
    original, resumed = (
        load_file(tmp_path / name / "segmenter.safetensors") for name in ("parts", "whole")
    )
    assert all(torch.equal(value, resumed[key]) for key, value in original.items())
    assert [row["epoch"] for row in read_rows(tmp_path / "parts" / "metrics.jsonl")] == [1, 2, 3]
    assert not (tmp_path / "parts" / "checkpoint").exists()


def test_a_finished_run_is_returned_and_one_of_other_settings_refused(
    dataset: Guarded, tmp_path: Path
) -> None:
    first = run(dataset, tmp_path, epochs=1, num_labeled=4)
    before = (tmp_path / "out" / "segmenter.safetensors").stat().st_mtime_ns
    assert run(dataset, tmp_path, epochs=1, num_labeled=4) == first
    assert (tmp_path / "out" / "segmenter.safetensors").stat().st_mtime_ns == before
    with pytest.raises(
        CheckpointError, match=r"out holds a fine-tuning with another settings.lr; give the same"
    ):
        run(dataset, tmp_path, epochs=1, num_labeled=4, lr=0.5)
    with pytest.raises(CheckpointError, match=r"another from_scratch"):
        run(dataset, tmp_path, epochs=1, num_labeled=4, from_scratch=True)
    encoder = export(dataset, tmp_path / "encoder.safetensors", depth=1)
    config = SegmentConfig.model_validate(SMALL | {"epochs": 1, "num_labeled": 4})
    with pytest.raises(CheckpointError, match=r"another encoder"):
        segment(dataset, encoder, tmp_path / "out", config)


def test_paths_will_do(dataset: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export(dataset, Path("encoder.safetensors"))
    config = SegmentConfig.model_validate(SMALL | {"epochs": 1, "num_labeled": 4})
    assert segment(dataset.path, "encoder.safetensors", "out", config)["num_labeled"] == 4
    assert (tmp_path / "out" / "score.json").is_file()


def test_a_finished_run_whose_segmenter_was_deleted_is_trained_again(
    dataset: Guarded, tmp_path: Path
) -> None:
    first = run(dataset, tmp_path, epochs=1, num_labeled=4)
    (tmp_path / "out" / "segmenter.safetensors").unlink()
    assert {**run(dataset, tmp_path, epochs=1, num_labeled=4), "seconds": 0} == {
        **first,
        "seconds": 0,
    }
    assert (tmp_path / "out" / "segmenter.safetensors").is_file()


def test_what_was_refused_or_killed_before_its_first_epoch_leaves_the_folder_free(
    dataset: Guarded, tmp_path: Path
) -> None:
    export(dataset, tmp_path / "e", patch_size=2, width=16)
    with pytest.raises(ConfigError, match="a power of two from 4 on, not 2"):
        segment(dataset, tmp_path / "e", tmp_path / "out", SegmentConfig(decoder="unetr"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "segment.json").write_text(
        json.dumps({"settings.lr": 0.5})
    )  # no checkpoint followed it
    assert run(dataset, tmp_path, epochs=1, num_labeled=4)["num_labeled"] == 4
    assert json.loads((tmp_path / "out" / "segment.json").read_text())["settings.lr"] == SMALL["lr"]


def test_a_folder_of_a_pretraining_run_is_refused(dataset: Guarded, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a pretraining run; give another --out"):
        run(dataset, tmp_path)


# Optimizer


def test_layer_decay_slows_the_first_layers_and_leaves_the_decoder_alone(
    dataset: Guarded, tmp_path: Path
) -> None:
    model = Segmenter(
        load_encoder(export(dataset, tmp_path / "e", depth=3)), dataset.spec, SegmentConfig()
    )
    model.encoder.pos_embed.requires_grad_(False)
    scales = {
        id(p): group["lr_scale"]
        for group in parameter_groups(model, SegmentConfig(layer_decay=0.5))
        for p in group["params"]
    }
    named = {name: scales[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert named["decoder.head.1.weight"] == 1
    assert named["encoder.norm.weight"] == 0.5
    assert [named[f"encoder.blocks.{i}.mlp.fc1.weight"] for i in (2, 1, 0)] == [0.5, 0.25, 0.125]
    assert named["encoder.patch_embed.proj.weight"] == 0.0625
    assert set(map(id, filter(lambda p: p.requires_grad, model.parameters()))) == set(scales)


def test_bf16_trains_too(dataset: Guarded, tmp_path: Path) -> None:
    low = run(dataset, tmp_path / "low", epochs=1, num_labeled=6, precision="bf16")
    full = run(dataset, tmp_path / "full", epochs=1, num_labeled=6, precision="fp32")
    losses = [
        read_rows(tmp_path / name / "out" / "metrics.jsonl")[0]["loss"] for name in ("low", "full")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]
    assert low.keys() == full.keys()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"num_labeled": 8, "label_share": 0.1},
            "num_labeled 8 and label_share 0.1 both say how many images",
        ),
        ({"freeze": True, "layer_decay": 0.7}, "layer_decay 0.7 needs freeze=false"),
        ({"decoder": "unet"}, "decoder is 'unet'"),
        ({"label_share": 0}, "label_share is 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(SegmentConfig, overrides, "here")


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"workers": 7}, r"batch_size 6 is less than resources\.workers 7; raise it"),
        ({"workers": 2, "micro_batch": 1}, "are for pretraining"),
        ({"gpus_per_worker": 64}, "gpus_per_worker=64"),
    ],
)
def test_resources_that_cannot_be_used_are_refused(
    dataset: Guarded, tmp_path: Path, resources: dict[str, Any], message: str
) -> None:
    config = SegmentConfig.model_validate(SMALL)
    with pytest.raises((ConfigError, ResourceError), match=message):
        segment(
            dataset,
            tmp_path / "e",
            tmp_path / "out",
            config,
            resources=ResourceConfig(**resources),
        )


# Workers


def _one_of_two(
    rank: int, meeting: str, data: str, encoder: str, out: str, overrides: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    config = SegmentConfig.model_validate(SMALL | overrides)
    tuning = Tuning(config, encoder, None, Path(out), False, SIZES, FaultToleranceConfig(), None)
    Path(out).mkdir(exist_ok=True)
    tuning.run(PatchDataset.open(data), WorkerContext(rank, 2), lambda metrics: None)
    torch.distributed.destroy_process_group()


def test_two_workers_learn_what_one_does(phantom_dataset: PatchDataset, tmp_path: Path) -> None:
    overrides = {
        "num_labeled": 7,
        "batch_size": 9,
    }  # with two images without a lesion a batch of 9: one worker has four, and one to fill up
    encoder = export(phantom_dataset, tmp_path / "e.safetensors")
    segment(
        phantom_dataset, encoder, tmp_path / "one", SegmentConfig.model_validate(SMALL | overrides)
    )
    meeting, out = f"file://{tmp_path / 'meeting'}", tmp_path / "two"
    torch.multiprocessing.spawn(
        _one_of_two, (meeting, phantom_dataset.path, str(encoder), str(out), overrides), nprocs=2
    )
    assert_alike(tmp_path / "one", out)


@pytest.mark.ray
@pytest.mark.long
def test_a_group_on_ray_learns_what_one_process_does_and_goes_on_from_it(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    config = SegmentConfig.model_validate(SMALL | {"epochs": 2, "num_labeled": 6})
    encoder = export(phantom_dataset, tmp_path / "e.safetensors")
    segment(phantom_dataset, encoder, tmp_path / "one", config)
    epochs: list[int] = []

    def stop(metrics: dict[str, Any]) -> None:
        epochs.append(metrics["epoch"])
        raise Stop

    with pytest.raises(Stop):
        segment(phantom_dataset, encoder, tmp_path / "two", config, progress=stop)
    score = segment(
        phantom_dataset,
        encoder,
        tmp_path / "two",
        config,
        resources=ResourceConfig(workers=2, cpus_per_worker=0.45),
        progress=lambda metrics: epochs.append(metrics["epoch"]),
    )
    assert epochs == [1, 2]
    assert score == read_json(tmp_path / "two" / "score.json")
    assert_alike(tmp_path / "one", tmp_path / "two")


def assert_alike(one: Path, two: Path) -> None:
    for alone, shared in zip(
        *(read_rows(folder / "metrics.jsonl") for folder in (one, two)), strict=True
    ):
        for name in ("loss", "grad_norm", "lr"):
            assert shared[name] == pytest.approx(alone[name], rel=1e-4), name
    scores = [read_json(folder / "score.json") for folder in (one, two)]
    assert scores[0]["dsc"] == pytest.approx(scores[1]["dsc"], abs=0.01)
    weights = [load_file(folder / "segmenter.safetensors") for folder in (one, two)]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=2e-3)
