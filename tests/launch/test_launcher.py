"""The same job in this process and on Ray Train workers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest
import timm
import torch
from safetensors.torch import load_file

import amlp_ray
from amlp_ray.config import PretrainConfig, ResourceConfig
from amlp_ray.config.base import build
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import CheckpointError, ConfigError, NonFiniteLossError, ResourceError
from amlp_ray.launch.launcher import run_here, run_on_ray
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.training.checkpoint.manager import latest, write_checkpoint
from amlp_ray.training.loggers.metrics_file import Metrics, read_rows
from amlp_ray.training.pretrain import Hooks
from amlp_ray.utils.event_log import count_events, read_events
from amlp_ray.utils.json_files import seal_json

TINY = {
    "epochs": 3,
    "batch_size": 12,
    "model": {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_heads": 2},
}


def make_config(**changes: object) -> PretrainConfig:
    return build(PretrainConfig, TINY | changes, "test")


@pytest.mark.ray
def test_two_workers_follow_the_loss_curve_of_one(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    one, two = ResourceConfig(), ResourceConfig(workers=2, cpus_per_worker=0.9)
    for name, resources in (("one", one), ("two", two)):
        amlp_ray.pretrain(phantom_dataset.path, tmp_path / name, make_config(), resources=resources)
    curves = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for alone, shared in zip(*curves, strict=True):
        for figure in ("loss", "loss_rec", "loss_ccl", "lesion_cluster_share", "ratio"):
            assert shared[figure] == pytest.approx(alone[figure], rel=1e-4, abs=1e-6), figure
    assert {p.name for p in (tmp_path / "two").iterdir()} >= {
        "encoder.safetensors",
        "pictures",
        "config.yaml",
    }


@pytest.mark.ray
def test_a_group_resumes_what_a_process_began(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    amlp_ray.pretrain(phantom_dataset.path, whole, make_config())
    run_here(
        RunSpec(config=make_config(), data=str(phantom_dataset.path), folder=parts),
        Hooks(should_stop=lambda: True),
    )
    assert len(read_rows(parts / "metrics.jsonl")) == 1
    reported: list[int] = []
    amlp_ray.pretrain(
        phantom_dataset.path,
        parts,
        make_config(),
        resources=ResourceConfig(workers=2, cpus_per_worker=0.9),
        report=lambda metrics: reported.append(metrics["epoch"]),
    )
    assert reported == [2, 3]
    losses = [[row["loss"] for row in read_rows(run / "metrics.jsonl")] for run in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_exported_encoder_loads_in_plain_timm(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    import json

    from safetensors import safe_open

    path = amlp_ray.pretrain(phantom_dataset.path, tmp_path / "run", make_config())
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
    plain = timm.create_model(
        header["timm_name"], checkpoint_path=str(path), **json.loads(header["timm_arguments"])
    )
    images = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        features = amlp_ray.load_encoder(path).forward_features(images)
        assert torch.equal(plain.eval().forward_features(images), features)


def test_a_finished_run_is_left_as_it_is(phantom_dataset: PatchDataset, tmp_path: Path) -> None:
    path = amlp_ray.pretrain(phantom_dataset.path, tmp_path / "run", make_config())
    before = path.read_bytes()
    reported: list[object] = []
    amlp_ray.pretrain(phantom_dataset.path, tmp_path / "run", make_config(), report=reported.append)
    assert not reported
    assert path.read_bytes() == before
    with pytest.raises(CheckpointError, match="other settings"):
        amlp_ray.pretrain(phantom_dataset.path, tmp_path / "run", make_config(lr=0.5))
    data_file = tmp_path / "run" / "data.json"
    content = data_file.read_text()
    other = content.replace(phantom_dataset.manifest.fingerprint, "0" * 64)
    data_file.write_text(other)
    with pytest.raises(CheckpointError, match=r"data\.json was changed after it was written"):
        amlp_ray.pretrain(phantom_dataset.path, tmp_path / "run", make_config())
    values = {key: value for key, value in json.loads(other).items() if key != "sha256"}
    data_file.write_text(seal_json(values))
    with pytest.raises(CheckpointError, match="other data"):
        amlp_ray.pretrain(phantom_dataset.path, tmp_path / "run", make_config())
    data_file.write_text(content)
    config_file = tmp_path / "run" / "config.yaml"
    config_file.write_text(config_file.read_text().replace("seed: ", "seed: 1"))
    with pytest.raises(ConfigError, match=r"config\.yaml was changed after it was written"):
        amlp_ray.pretrain(phantom_dataset.path, tmp_path / "run", make_config())


def test_a_finished_run_with_several_workers_starts_no_ray(
    phantom_dataset: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = amlp_ray.pretrain(phantom_dataset.path, tmp_path / "run", make_config())
    monkeypatch.setattr(
        "amlp_ray.launch.launcher.ray_session", lambda address: pytest.fail("Ray was started")
    )
    two = ResourceConfig(workers=2, cpus_per_worker=0.5)
    assert (
        amlp_ray.pretrain(phantom_dataset.path, tmp_path / "run", make_config(), resources=two)
        == path
    )


def test_an_encoder_that_was_cut_short_is_exported_again(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    path = amlp_ray.pretrain(phantom_dataset.path, tmp_path / "run", make_config())
    whole = {name: value.clone() for name, value in load_file(path).items()}  # the file is mapped
    path.write_bytes(path.read_bytes()[:3000])
    amlp_ray.pretrain(phantom_dataset.path, tmp_path / "run", make_config())
    assert all(torch.equal(value, whole[name]) for name, value in load_file(path).items())


def test_a_run_that_never_began_leaves_its_folder_to_the_next(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    (tmp_path / "junk.safetensors").write_text("junk")
    with pytest.raises(ConfigError, match="junk"):
        amlp_ray.pretrain(
            phantom_dataset.path,
            tmp_path / "run",
            make_config(weights=str(tmp_path / "junk.safetensors")),
        )
    assert amlp_ray.pretrain(phantom_dataset.path, tmp_path / "run", make_config()).is_file()


def test_weights_are_missed_before_anything_starts_and_never_by_a_run_that_goes_on(
    phantom_dataset: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    two = ResourceConfig(workers=2, cpus_per_worker=0.5)
    with pytest.raises(CheckpointError, match=f"no encoder file {tmp_path}/gone.safetensors"):
        amlp_ray.pretrain(
            phantom_dataset.path,
            tmp_path / "run",
            make_config(weights="gone.safetensors"),
            resources=two,
        )
    assert not (tmp_path / "run").exists()
    amlp_ray.pretrain(phantom_dataset.path, "start", make_config()).rename("w.safetensors")
    path = amlp_ray.pretrain(phantom_dataset.path, "run", make_config(weights="w.safetensors"))
    path.unlink()
    Path("w.safetensors").unlink()
    assert (
        amlp_ray.pretrain(phantom_dataset.path, "run", make_config(weights="w.safetensors")) == path
    )
    assert path.is_file()


def test_impossible_requests_are_refused_at_once(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match="gpus_per_worker=64"):
        amlp_ray.pretrain(
            phantom_dataset.path,
            tmp_path,
            make_config(),
            resources=ResourceConfig(gpus_per_worker=64),
        )
    with pytest.raises(ConfigError, match="does not divide"):
        amlp_ray.pretrain(phantom_dataset.path, tmp_path, make_config(model={"patch_size": 7}))


@pytest.mark.ray
@pytest.mark.parametrize(
    "resources", [ResourceConfig(), ResourceConfig(workers=2, cpus_per_worker=0.9)]
)
def test_a_stream_trains_as_images_in_memory_do_though_workers_hold_every_cpu(
    phantom_dataset: PatchDataset, tmp_path: Path, resources: ResourceConfig
) -> None:
    amlp_ray.pretrain(
        phantom_dataset.path, tmp_path / "held", make_config(data="mapped", variant="mae")
    )
    amlp_ray.pretrain(
        phantom_dataset.path,
        tmp_path / "run",
        make_config(data="stream", variant="mae"),
        resources=resources,
    )
    in_memory, streamed = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("held", "run"))
    assert [row["epoch"] for row in streamed] == [1, 2, 3]
    for one, other in zip(in_memory, streamed, strict=True):
        assert other["loss_rec"] == pytest.approx(one["loss_rec"], rel=1e-4)


@pytest.mark.ray
def test_a_killed_worker_is_replaced_and_costs_one_ended_epoch_at_most(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    resources = ResourceConfig(workers=2, cpus_per_worker=0.9)
    run_spec = RunSpec(
        config=make_config(epochs=8, variant="mae"),
        data=phantom_dataset.path,
        folder=tmp_path / "run",
        resources=resources,
    )
    alone = RunSpec(config=run_spec.config, data=run_spec.data, folder=tmp_path / "alone")
    run_here(alone)
    victims: list[int] = []

    def report(metrics: Metrics) -> None:
        if metrics["epoch"] >= 3 and not victims:
            worker = next(
                p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name()
            )
            worker.kill()
            victims.append(worker.pid)

    run_on_ray(run_spec, name="killed", should_stop=lambda: bool(time.sleep(0.3)), report=report)
    assert victims
    rows, reference = (
        read_rows(folder / "metrics.jsonl") for folder in (run_spec.folder, alone.folder)
    )
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert [row["loss"] for row in rows] == pytest.approx(
        [row["loss"] for row in reference], rel=1e-4
    )
    starts = [event for event in read_events(run_spec.folder) if event["event"] == "started"]
    assert len(starts) == 2
    assert starts[1]["repeated"] <= 1
    assert count_events(run_spec.folder)["worker lost"] == 1
    (lost,) = [event for event in read_events(run_spec.folder) if event["event"] == "worker lost"]
    assert lost["text"].startswith("A worker was lost (its process died); resuming")


@pytest.mark.ray
def test_a_loss_that_is_not_finite_ends_a_group_at_once(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    resources = ResourceConfig(workers=2, cpus_per_worker=0.9)
    run_spec = RunSpec(
        config=make_config(variant="mae"),
        data=phantom_dataset.path,
        folder=tmp_path / "run",
        resources=resources,
    )
    # A weight is spoiled in the checkpoint that it resumes from: no learning rate surely diverges.
    run_here(run_spec.model_copy(update={"until": 1, "resources": ResourceConfig()}))
    checkpoint = latest(run_spec.folder)
    assert checkpoint is not None
    state, _ = checkpoint
    state["model"]["mask_token"].fill_(float("nan"))
    write_checkpoint(run_spec.folder, state, 1)
    with pytest.raises(NonFiniteLossError, match="epoch 2, step 1"):
        run_on_ray(run_spec, name="diverged")
    assert count_events(run_spec.folder) == {"started": 2, "loss not finite": 1}
