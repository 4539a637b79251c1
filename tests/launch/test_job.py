from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from amlp_ray.config import PretrainConfig, ProbeConfig
from amlp_ray.config.base import build
from amlp_ray.config.yaml_file import read_yaml
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import CheckpointError
from amlp_ray.launch.job import NUM_PICTURES, _logged_parameters, claim, is_finished, run_job
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.training.checkpoint.export import load_encoder
from amlp_ray.training.loggers.metrics_file import append_row, drop_after, read_rows
from amlp_ray.training.pretrain import Hooks
from amlp_ray.utils.json_files import read_json

TINY = {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16}
SIZES = ("dsc_small", "dsc_medium", "dsc_large")
PROBE = ProbeConfig(num_labeled=8, subsets=1, folds=2)


def job_of(dataset: PatchDataset, folder: Path, **values: Any) -> RunSpec:
    config = PretrainConfig.model_validate({"epochs": 2, "batch_size": 12, "model": TINY, **values})
    return RunSpec(config=config, data=str(dataset.path), folder=folder, probe=PROBE, rungs=(1, 2))


def test_a_job_is_scored_at_its_rungs_and_keeps_the_last_score(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    run_spec = job_of(phantom_dataset, tmp_path, epochs=3).model_copy(update={"rungs": (2, 3)})
    result = run_job(run_spec, Hooks())
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [("dsc" in row, "ap" in row) for row in rows] == [
        (False, False),
        (True, True),
        (True, True),
    ]
    score = read_json(tmp_path / "score.json")
    assert score["epoch"] == 3
    assert score["dsc"] == rows[-1]["dsc"] == result.metrics["dsc"]
    assert len(score["per_image"]) == score["images"]


def test_every_rung_keeps_its_scores_and_the_last_is_that_of_the_run(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    run_job(
        job_of(phantom_dataset, tmp_path, epochs=3).model_copy(update={"rungs": (1, 3)}), Hooks()
    )
    rungs = {path.stem: read_json(path) or {} for path in (tmp_path / "rungs").iterdir()}
    assert {name: rung["epoch"] for name, rung in rungs.items()} == {"1": 1, "3": 3}
    assert rungs["1"]["per_image"].keys() == rungs["3"]["per_image"].keys()
    assert rungs["3"] == read_json(tmp_path / "score.json")
    for row in read_rows(tmp_path / "metrics.jsonl"):
        sizes = {name: row[name] for name in row if name.startswith("dsc_")}
        rung = rungs.get(str(row["epoch"]), {})
        assert sizes == {name: rung[name] for name in SIZES if rung.get(name) is not None}


def test_an_oracle_runs_as_a_trial_does_and_is_scored_and_drawn(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    selection = {"mode": "hard", "hard_by": "cluster", "rule": "oracle", "feedback": 0.0}
    result = run_job(job_of(phantom_dataset, tmp_path, selection=selection), Hooks())
    assert result.epochs == 2
    assert 0 <= result.metrics["dsc"] <= 1
    assert "lesion_precision" not in result.metrics  # of an oracle it says nothing
    assert len(list((tmp_path / "pictures").iterdir())) == NUM_PICTURES


def test_pictures_show_validation_images_with_lesions(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    run_job(job_of(phantom_dataset, tmp_path), Hooks())
    strips = sorted((tmp_path / "pictures").iterdir())
    assert len(strips) == NUM_PICTURES
    val = phantom_dataset.load("val")
    lesions = {val.ids[i] for i in range(len(val)) if val.masks[i].any()}
    assert {path.stem.partition("-")[2] for path in strips} <= lesions
    for path in strips:
        assert (
            Image.open(path).width > 4 * Image.open(path).height
        )  # input, lesion, mask, reconstruction, truth


def test_a_random_encoder_is_scored_once_as_epoch_0_and_exported_untrained(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    reported: list[dict[str, Any]] = []
    run_spec = job_of(phantom_dataset, tmp_path, variant="scratch").model_copy(
        update={"rungs": (0,)}
    )
    result = run_job(run_spec, Hooks(report=reported.append))
    assert [metrics["epoch"] for metrics in reported] == [0]
    assert 0 <= reported[0]["dsc"] <= 1
    exported = load_encoder(result.encoder).state_dict()
    assert all(
        torch.equal(value, exported[key])
        for key, value in result.model.encoder.state_dict().items()
    )
    again = run_job(run_spec.model_copy(update={"folder": tmp_path / "again"}), Hooks())
    assert again.metrics["dsc"] == result.metrics["dsc"]


def test_untrained_weights_are_scored_as_they_are(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    start = run_job(job_of(phantom_dataset, tmp_path / "start", epochs=1, variant="mae"), Hooks())
    run_spec = job_of(
        phantom_dataset, tmp_path / "run", variant="scratch", weights=str(start.encoder)
    )
    assert not is_finished(run_spec)
    result = run_job(run_spec.model_copy(update={"rungs": (0,)}), Hooks())
    untrained = load_encoder(start.encoder).state_dict()
    assert all(
        torch.equal(value, untrained[key])
        for key, value in load_encoder(result.encoder).state_dict().items()
    )
    assert is_finished(run_spec)


def test_an_encoder_of_a_run_that_stopped_early_never_passes_for_the_last(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    run_spec = job_of(phantom_dataset, tmp_path / "run", variant="mae").model_copy(
        update={"probe": None}
    )
    early = run_job(run_spec, Hooks(should_stop=lambda: True))
    assert (early.epochs, early.encoder.is_file()) == (1, True)

    def die(metrics: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # after the last epoch, whose checkpoint is written
        run_job(run_spec, Hooks(report=die))
    assert not early.encoder.exists()
    assert not is_finished(run_spec)
    run_job(run_spec, Hooks())
    assert is_finished(run_spec)
    whole = run_job(run_spec.model_copy(update={"folder": tmp_path / "whole"}), Hooks())
    early_weights, whole_weights = (
        load_encoder(path).state_dict() for path in (early.encoder, whole.encoder)
    )
    assert all(torch.equal(value, whole_weights[key]) for key, value in early_weights.items())


def test_servers_are_told_settings_by_dotted_name_and_no_path() -> None:
    parameters = _logged_parameters(PretrainConfig(weights="/data/hospital/encoder.safetensors"))
    assert parameters["model.width"] == PretrainConfig().model.width
    assert parameters["weights"] == "encoder.safetensors"
    assert "hospital" not in str(parameters)
    assert (
        _logged_parameters(PretrainConfig(weights="timm:vit_tiny_patch16_224"))["weights"]
        == "timm:vit_tiny_patch16_224"
    )


def test_a_folder_is_claimed_by_its_settings_in_full(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    run_spec = job_of(phantom_dataset, tmp_path / "run")
    claim(
        job_of(phantom_dataset, tmp_path / "run", epochs=3), phantom_dataset
    )  # never began, so it is replaced
    claim(run_spec, phantom_dataset)
    append_row(tmp_path / "run" / "metrics.jsonl", {"epoch": 1})
    claim(run_spec, phantom_dataset)
    assert (
        build(PretrainConfig, read_yaml(tmp_path / "run" / "config.yaml"), "x") == run_spec.config
    )
    with pytest.raises(CheckpointError, match="holds a run with other settings"):
        claim(job_of(phantom_dataset, tmp_path / "run", epochs=3), phantom_dataset)
    assert read_yaml(tmp_path / "run" / "config.yaml")["epochs"] == 2


def test_lines_of_metrics_are_read_up_to_the_first_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    for epoch in (1, 2, 3):
        append_row(path, {"epoch": epoch})
    path.write_text(path.read_text()[:-3])
    assert [row["epoch"] for row in read_rows(path)] == [1, 2]
    assert drop_after(path, 1) == ([{"epoch": 1}], [{"epoch": 2}])
    assert read_rows(path) == [{"epoch": 1}]
    assert path.read_text().count("\n") == 1
    assert drop_after(tmp_path / "none.jsonl", 5) == ([], [])


def test_a_run_goes_on_with_images_read_in_another_way(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    first = run_job(job_of(phantom_dataset, tmp_path / "run", epochs=1, data="mapped"), Hooks())
    again = run_job(job_of(phantom_dataset, tmp_path / "run", epochs=1, data="mapped"), Hooks())
    assert again.metrics == first.metrics
