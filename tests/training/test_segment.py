from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from written import Guarded

from amlp_ray.config import ModelSettings, SegmentSettings
from amlp_ray.data.dataset import PatchDataset, Split
from amlp_ray.errors import CheckpointError, DataError, SettingsError
from amlp_ray.method.model import MaskedAutoencoder
from amlp_ray.training.checkpoint import export_encoder
from amlp_ray.training.segment import score_segmenter, segment

SMALL: dict[str, Any] = {"epochs": 3, "batch_size": 6, "decoder_width": 8, "lr": 3e-3}


@pytest.fixture
def dataset(phantom_dataset: PatchDataset) -> Guarded:
    return Guarded.of(phantom_dataset)


def export(dataset: PatchDataset, path: Path, **model: int) -> Path:
    torch.manual_seed(3)
    settings = ModelSettings.model_validate(
        {"patch_size": 8, "width": 24, "depth": 2, "heads": 2, "decoder_width": 16} | model
    )
    export_encoder(MaskedAutoencoder(settings, dataset.spec).encoder, path, settings, dataset.spec)
    return path


def run(dataset: PatchDataset, folder: Path, *, from_scratch: bool = False, **given: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    encoder = export(dataset, folder / "encoder.safetensors")
    settings = SegmentSettings.model_validate(SMALL | given)
    return segment(dataset, encoder, folder / "out", settings, from_scratch=from_scratch)


def test_it_learns_to_find_lesions_from_masks_alone(dataset: Guarded, tmp_path: Path) -> None:
    losses: list[float] = []
    settings = SegmentSettings.model_validate(SMALL | {"epochs": 25, "decoder_width": 16})
    encoder = export(dataset, tmp_path / "e.safetensors")
    score = segment(dataset, encoder, tmp_path / "out", settings, progress=lambda m: losses.append(m["loss"]))
    assert len(losses) == 25
    assert losses[-1] < 0.8 * losses[0]
    assert score["dsc"] > 0.2  # the whole image as lesion would score about 0.1


def test_files_and_scores_are_complete(dataset: Guarded, tmp_path: Path) -> None:
    score = run(dataset, tmp_path, epochs=1)
    out = tmp_path / "out"
    assert json.loads((out / "score.json").read_text()) == score
    assert SegmentSettings(**yaml.safe_load((out / "settings.yaml").read_text())).epochs == 1
    weights = load_file(out / "segmenter.safetensors")
    assert any(key.startswith("encoder.blocks.1") for key in weights)
    assert all(value.isfinite().all() for value in weights.values())

    val, train = dataset.load("val"), dataset.load("train")
    lesion = {val.ids[i] for i in np.flatnonzero(val.masks.any((1, 2)))}
    assert set(score["per_image"]) == lesion
    assert score["images"] == len(lesion) < len(val)
    assert score["dsc"] == pytest.approx(np.mean(list(score["per_image"].values())), abs=1e-5)
    assert 0 <= score["empty_correct"] <= 1
    assert score["labels"] == int(train.masks.any((1, 2)).sum())
    assert score["from_scratch"] is False


def test_from_scratch_keeps_the_shape_but_not_the_weights(dataset: Guarded, tmp_path: Path) -> None:
    settings = {"epochs": 1, "freeze": True}
    tuned, scratch = (run(dataset, tmp_path / str(flag), from_scratch=flag, **settings) for flag in (False, True))
    assert scratch["from_scratch"] is True
    given = load_file(tmp_path / "False" / "encoder.safetensors")
    kept, drawn = (load_file(tmp_path / name / "out" / "segmenter.safetensors") for name in ("False", "True"))
    assert kept.keys() == drawn.keys()
    assert all(torch.equal(value, kept[f"encoder.{key}"]) for key, value in given.items())  # frozen
    key = "encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(kept[key], drawn[key])
    assert tuned["dsc"] != scratch["dsc"]


def test_without_freezing_the_encoder_is_trained(dataset: Guarded, tmp_path: Path) -> None:
    run(dataset, tmp_path, epochs=1)
    before = load_file(tmp_path / "encoder.safetensors")
    after = load_file(tmp_path / "out" / "segmenter.safetensors")
    changed = {key for key, value in before.items() if not torch.equal(value, after[f"encoder.{key}"])}
    assert "blocks.0.attn.qkv.weight" in changed
    assert "pos_embed" not in changed


def test_a_run_repeats_exactly(dataset: Guarded, tmp_path: Path) -> None:
    first, second = (run(dataset, tmp_path / name, labels=8) for name in ("a", "b"))
    assert first["labels"] == 8
    assert first["per_image"] == second["per_image"]


@pytest.mark.parametrize("change", [{"patch_size": 16}, {"depth": 1}, {"depth": 5}, {"patch_size": 2, "width": 16}])
def test_encoders_of_other_shapes_are_segmenters_too(dataset: Guarded, tmp_path: Path, change: dict[str, int]) -> None:
    encoder = export(dataset, tmp_path / "e.safetensors", **change)
    settings = SegmentSettings.model_validate(SMALL | {"epochs": 1, "labels": 4})
    score = segment(dataset, encoder, tmp_path / "out", settings)
    assert 0 <= score["dsc"] <= 1


@pytest.mark.parametrize("width", [9, 12, 17])
def test_any_decoder_width_in_range_works(dataset: Guarded, tmp_path: Path, width: int) -> None:
    assert 0 <= run(dataset, tmp_path, epochs=1, labels=4, decoder_width=width)["dsc"] <= 1


def test_an_encoder_of_other_images_is_refused(dataset: Guarded, tmp_path: Path) -> None:
    spec = dataset.spec.model_copy(update={"height": 32, "width": 48})
    settings = ModelSettings(patch_size=8, width=24, depth=1, heads=2, decoder_width=16)
    path = tmp_path / "e.safetensors"
    export_encoder(MaskedAutoencoder(settings, spec).encoder, path, settings, spec)
    with pytest.raises(SettingsError, match=r"trained on 1x32x48 .* holds 1x64x64; prepare the data alike"):
        segment(dataset, path, tmp_path / "out", SegmentSettings())
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_encoder_is_refused(dataset: Guarded, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="check the path"):
        segment(dataset, tmp_path / "none.safetensors", tmp_path / "out", SegmentSettings())


def test_too_few_labels_are_refused_with_the_number_found(dataset: Guarded, tmp_path: Path) -> None:
    train = dataset.load("train")
    lesions = int(train.masks.any((1, 2)).sum())
    with pytest.raises(DataError, match=rf"has {lesions} labelled train images with a lesion, but 500 are needed"):
        run(dataset, tmp_path, labels=500)


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_split_without_masks_is_refused(dataset: Guarded, tmp_path: Path, name: str) -> None:
    def unlabel(split: str, rows: Split) -> Split:
        return replace(rows, labelled=rows.labelled & (split != name))

    with pytest.raises(DataError, match=rf"has 0 labelled {name} images with a lesion, but 1 are needed"):
        run(Guarded.of(dataset, unlabel), tmp_path)


def test_a_segmenter_that_was_saved_scores_as_when_it_was_trained(dataset: Guarded, tmp_path: Path) -> None:
    trained = run(dataset, tmp_path, epochs=1, decoder_width=12)
    found = score_segmenter(dataset, tmp_path / "encoder.safetensors", tmp_path / "out", "val")
    assert found == {name: trained[name] for name in found}
    assert trained.keys() - found.keys() == {"labels", "from_scratch", "encoder", "seconds"}


def test_test_images_are_read_where_they_are_asked_for_by_name(
    phantom_dataset: PatchDataset, dataset: Guarded, tmp_path: Path
) -> None:
    run(dataset, tmp_path, epochs=1)
    encoder, out = tmp_path / "encoder.safetensors", tmp_path / "out"
    found = score_segmenter(phantom_dataset, encoder, out, "test", sizes=(0.04, 0.08))
    test = phantom_dataset.load("test")
    shares = {test.ids[i]: test.masks[i].mean() for i in np.flatnonzero(test.masks.any((1, 2)))}
    assert set(found["per_image"]) == set(shares)
    large = [found["per_image"][name] for name, share in shares.items() if share > 0.08]
    assert found["dsc_large"] == pytest.approx(np.mean(large), abs=1e-5)


def test_a_segmenter_of_another_encoder_or_none_is_refused(dataset: Guarded, tmp_path: Path) -> None:
    run(dataset, tmp_path, epochs=1)
    other = export(dataset, tmp_path / "other.safetensors", width=48)
    with pytest.raises(CheckpointError, match=r"segmenter\.safetensors cannot be read as a segmenter of its encoder"):
        score_segmenter(dataset, other, tmp_path / "out", "val")
    (tmp_path / "out" / "segmenter.safetensors").unlink()
    with pytest.raises(CheckpointError, match="run `segment` again"):
        score_segmenter(dataset, tmp_path / "encoder.safetensors", tmp_path / "out", "val")
