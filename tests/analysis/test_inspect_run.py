from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import change_manifest
from PIL import Image

from amlp_ray.analysis.inspect_run import FIGURES, inspect_run
from amlp_ray.config import PretrainConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import AmlpError, CheckpointError, ConfigError, DataError
from amlp_ray.launch.job import run_job
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.method.augment import normalize
from amlp_ray.method.masking import Masking, TrainingStep
from amlp_ray.training.checkpoint.manager import checkpoints, read_checkpoint
from amlp_ray.training.checkpoint.restore import load_model, read_run_config
from amlp_ray.training.pretrain import Hooks
from amlp_ray.utils.json_files import seal_json

TINY = {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16}


def trained(dataset: PatchDataset, folder: Path, **overrides: Any) -> Path:
    config = PretrainConfig.model_validate(
        {"epochs": 2, "batch_size": 12, "model": TINY, **overrides}
    )
    run_job(RunSpec(config=config, data=str(dataset.path), folder=folder), Hooks())
    return folder


@pytest.fixture(scope="module")
def amlp(phantom_dataset: PatchDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs; read-only."""
    return trained(phantom_dataset, tmp_path_factory.mktemp("runs") / "amlp")


def test_an_inspection_writes_a_strip_per_image_a_sheet_and_the_figures_it_returns(
    phantom_dataset: PatchDataset, amlp: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out"
    inspection = inspect_run(amlp, count=3, out=out)
    assert {path.name for path in out.iterdir()} == {
        row["picture"] for row in inspection["images"]
    } | {
        "sheet.png",
        "inspection.json",
    }
    assert json.loads((out / "inspection.json").read_text()) == inspection
    val = phantom_dataset.load("val")
    assert {row["id"] for row in inspection["images"]} <= {
        val.ids[i] for i in range(len(val)) if val.masks[i].any()
    }
    sizes = {Image.open(out / row["picture"]).size for row in inspection["images"]}
    assert sizes == {(8 * 200 - 8, 214)}
    assert Image.open(out / "sheet.png").width == 8 * 200 - 8
    assert (
        inspection["split"],
        inspection["epoch"],
        inspection["weights_of_epoch"],
        inspection["own_data"],
    ) == (
        "val",
        2,
        2,
        True,
    )
    assert inspection["metrics"]["loss"].keys() == {"first", "last"}
    assert {
        "loss_reference",
        "lesion_precision",
        "lesion_recall",
        "effective_patches",
    } <= inspection["metrics"].keys()


def test_figures_are_those_of_the_run_s_own_masks(
    phantom_dataset: PatchDataset, amlp: Path, tmp_path: Path
) -> None:
    """Computed again patch by patch in numpy."""
    inspection = inspect_run(amlp, count=4, out=tmp_path)
    val, config = phantom_dataset.load("val"), read_run_config(amlp)
    model, _ = load_model(amlp, config, phantom_dataset.spec)
    for row in inspection["images"]:
        i = val.ids.index(row["id"])
        image, key = torch.from_numpy(val.images[i : i + 1]), torch.from_numpy(val.keys[i : i + 1])
        with torch.inference_mode():
            patches, lesion_map, chosen = Masking(model, config).mask_whole_images(
                normalize(image, model.spec), key, TrainingStep(2)
            )
            rebuilt = model(patches, chosen.visible, chosen.masked).pixels[0].numpy()
        share = val.masks[i].reshape(8, 8, 8, 8).mean((1, 3)).ravel()
        true = share >= 0.25 if (share >= 0.25).any() else share > 0
        lesion = lesion_map.lesion[0].numpy() > 0.5
        masked = chosen.masked[0].numpy()
        error = ((rebuilt - patches[0].numpy()[masked]) ** 2).mean(-1)
        inside, tissue = true[masked], chosen.tissue[0].numpy()[masked]
        assert row["true_lesion_share"] == pytest.approx(true.mean())
        assert row["lesion_share"] == pytest.approx(lesion.mean())
        assert row["precision"] == pytest.approx((lesion & true).sum() / lesion.sum())
        assert row["recall"] == pytest.approx((lesion & true).sum() / true.sum())
        assert row["true_lesion_masked"] == pytest.approx(inside.sum() / true.sum())
        assert row["error"] == pytest.approx(error[tissue].mean(), rel=1e-4)
        assert row["error_outside"] == pytest.approx(error[tissue & ~inside].mean(), rel=1e-4)
        if inside.any():
            assert row["error_inside"] == pytest.approx(error[inside].mean(), rel=1e-4)
    for name in FIGURES:
        values = [row[name] for row in inspection["images"] if row[name] is not None]
        assert inspection["mean"][name] == pytest.approx(np.mean(values))


def test_the_latest_model_is_loaded_with_its_teacher_and_centroids(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    selection = {"scope": "dataset", "analysis_interval": 1, "features": "tokens"}
    run = trained(
        phantom_dataset, tmp_path, selection=selection, loss={"warmup": 0.0}, teacher_momentum=0.5
    )
    model, epoch = load_model(run, read_run_config(run), phantom_dataset.spec)
    saved = read_checkpoint(checkpoints(run)[0])["model"]
    assert epoch == 2
    assert any(name.startswith("teacher.") for name in saved)
    assert saved["centroids.centers"].any()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("overrides", "panels", "absent"),
    [
        ({"variant": "mae"}, 5, {"lesion_share", "precision", "recall"}),
        ({"variant": "amlp-soft"}, 7, set()),
        ({"selection": {"rule": "oracle", "feedback": 0.0}, "loss": {"ccl_weight": 0.0}}, 7, set()),
    ],
    ids=["mae", "amlp-soft", "oracle"],
)
def test_what_settings_do_not_use_is_neither_drawn_nor_told(
    phantom_dataset: PatchDataset,
    tmp_path: Path,
    overrides: dict[str, Any],
    panels: int,
    absent: set[str],
) -> None:
    inspection = inspect_run(trained(phantom_dataset, tmp_path, epochs=1, **overrides), count=2)
    (picture, _) = (tmp_path / "inspect" / row["picture"] for row in inspection["images"])
    assert Image.open(picture).width == panels * 200 - 8
    assert {name for name, value in inspection["mean"].items() if value is None} == absent


def test_epoch_and_seed_choose_masks_and_the_same_ones_draw_the_same(
    amlp: Path, tmp_path: Path
) -> None:
    def inspect(name: str, **options: Any) -> tuple[float, bytes]:
        inspection = inspect_run(amlp, count=2, out=tmp_path / name, **options)
        return inspection["ratio"], (tmp_path / name / "sheet.png").read_bytes()

    latest = inspect("a")
    assert inspect("b") == latest == inspect("c", epoch=2, seed=0)
    assert inspect("d", epoch=1)[0] < latest[0]
    other = inspect("e", seed=1)
    assert other[0] == latest[0]
    assert other[1] != latest[1]


def test_an_inspection_replaces_the_pictures_of_an_earlier_one_and_nothing_else(
    amlp: Path, tmp_path: Path
) -> None:
    inspect_run(amlp, count=4, out=tmp_path)
    (tmp_path / "9-mine.png").write_bytes(b"mine")
    inspection = inspect_run(amlp, count=1, out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        inspection["images"][0]["picture"],
        "sheet.png",
        "inspection.json",
        "9-mine.png",
    }


def with_manifest(dataset: PatchDataset, folder: Path, **changes: Any) -> Path:
    """A copy of a dataset with another manifest."""
    shutil.copytree(dataset.path, folder)
    change_manifest(folder, lambda values: values | changes)
    return folder


def test_moved_data_is_the_run_s_own_and_other_data_is_told_apart(
    phantom_dataset: PatchDataset, amlp: Path, tmp_path: Path
) -> None:
    moved = with_manifest(phantom_dataset, tmp_path / "moved")
    other = with_manifest(phantom_dataset, tmp_path / "other", fingerprint="0" * 64)
    assert inspect_run(amlp, data=moved, count=1, out=tmp_path / "a")["own_data"]
    assert not inspect_run(amlp, data=other, count=1, out=tmp_path / "b")["own_data"]


def bad_input(
    case: str, dataset: PatchDataset, run: Path, tmp_path: Path
) -> tuple[Path, dict[str, Any]]:
    """A run's folder, which may be spoiled here, and arguments."""
    if case == "missing folder":
        return tmp_path / "none", {}
    if case == "no run":
        return Path(dataset.path), {}
    if case == "no checkpoint":
        for path in checkpoints(run):
            path.unlink()
    elif case == "damaged checkpoint":
        for path in checkpoints(run):
            path.write_bytes(path.read_bytes()[:500])
    elif case == "no data.json":
        (run / "data.json").unlink()
    elif case == "data.json changed":
        content = (run / "data.json").read_text()
        (run / "data.json").write_text(content.replace('"mean"', '"meam"'))
    elif case == "data gone":
        (run / "data.json").write_text(
            seal_json({"path": str(tmp_path / "gone"), "fingerprint": ""})
        )
    elif case == "patches do not divide":
        return run, {"data": with_manifest(dataset, tmp_path / "data", height=60, width=60)}
    elif case == "count 0":
        return run, {"count": 0}
    elif case == "epoch 0":
        return run, {"epoch": 0}
    elif case == "epoch 3":
        return run, {"epoch": 3}
    elif case == "seed -1":
        return run, {"seed": -1}
    elif case == "variant":
        trained(dataset, tmp_path / "other", variant="simsiam", epochs=1)
        return tmp_path / "other", {}
    elif case == "scratch":
        trained(dataset, tmp_path / "other", variant="scratch", epochs=1)
        return tmp_path / "other", {}
    return run, {}


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("missing folder", CheckpointError, "none does not exist"),
        ("no run", CheckpointError, "has no config.yaml"),
        (
            "no checkpoint",
            CheckpointError,
            "has no checkpoint: the run has not finished an epoch yet",
        ),
        ("damaged checkpoint", CheckpointError, "are damaged"),
        ("no data.json", CheckpointError, "data.json does not say"),
        ("data.json changed", CheckpointError, "data.json does not say"),
        ("data gone", DataError, "There is no patch dataset"),
        ("patches do not divide", ConfigError, "patch_size 8 does not divide"),
        ("count 0", ConfigError, "count is 0, but must be from 1 to 64"),
        ("epoch 0", ConfigError, "epoch is 0, but the run has epochs 1 to 2"),
        ("epoch 3", ConfigError, "epoch is 3, but the run has epochs 1 to 2"),
        ("seed -1", ConfigError, "seed is -1"),
        ("variant", ConfigError, "variant simsiam: it reconstructs nothing"),
        ("scratch", ConfigError, "variant scratch: it reconstructs nothing"),
    ],
)
def test_bad_input_gets_one_sentence_and_nothing_is_written(
    phantom_dataset: PatchDataset,
    amlp: Path,
    tmp_path: Path,
    case: str,
    error: type[AmlpError],
    message: str,
) -> None:
    run = shutil.copytree(amlp, tmp_path / "run")
    folder, arguments = bad_input(case, phantom_dataset, run, tmp_path)
    with pytest.raises(error) as caught:
        inspect_run(folder, **arguments)
    assert message in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("inspect"))


def test_images_of_another_shape_are_refused(
    phantom_dataset: PatchDataset, amlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = phantom_dataset.spec.model_copy(update={"width": 128})
    monkeypatch.setattr(PatchDataset, "spec", wide)
    with pytest.raises(
        ConfigError,
        match=r"amlp was trained on 1x64x64 .* holds 1x64x128; prepare the data alike",
    ):
        inspect_run(amlp, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("summary", ["{", "[]", '{"images": 3}', '{"images": [{"id": 1}]}'])
def test_a_foreign_or_damaged_summary_is_replaced(amlp: Path, tmp_path: Path, summary: str) -> None:
    (tmp_path / "inspection.json").write_text(summary)
    inspect_run(amlp, count=1, out=tmp_path)
    assert len(json.loads((tmp_path / "inspection.json").read_text())["images"]) == 1


def test_a_file_in_place_of_the_folder_is_told(amlp: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ConfigError, match="taken is a file"):
        inspect_run(amlp, count=1, out=tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
