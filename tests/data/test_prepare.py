from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import amlp_ray.data.write as write
from amlp_ray.config import PrepareSettings
from amlp_ray.data.dataset import SPLITS, PatchDataset
from amlp_ray.data.prepare import prepare
from amlp_ray.data.sources import natural_key
from amlp_ray.errors import DataError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def _settings(layout: str, **values: Any) -> PrepareSettings:
    return PrepareSettings.model_validate({"layout": layout, "size": 32, "fractions": (0.6, 0.2, 0.2)} | values)


def _hashes(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*.*")}


def _everything(dataset: PatchDataset) -> dict[str, tuple[np.ndarray, np.ndarray, bool]]:
    splits = [dataset.load(split) for split in SPLITS]
    return {s.ids[i]: (s.images[i], s.masks[i], bool(s.labelled[i])) for s in splits for i in range(len(s))}


def test_busi_images_and_masks_are_what_pillow_reads(busi_folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    dataset = prepare(busi_folder, tmp_path / "out", _settings("busi"), progress=said.append)
    found = _everything(dataset)
    assert len(found) == 18
    assert dataset.shape == (1, 32, 32)
    assert all(labelled for _, _, labelled in found.values())
    for name, (image, mask, _) in found.items():
        folder = busi_folder / name.split()[0]
        grey = Image.open(folder / f"{name}.png").convert("L")
        np.testing.assert_array_equal(image[0], np.asarray(grey.resize((32, 32), Image.Resampling.BICUBIC)))
        union = np.zeros((grey.height, grey.width), np.float32)
        for path in sorted(p for p in folder.iterdir() if p.name.startswith(f"{name}_mask")):
            union[np.asarray(Image.open(path).convert("RGB")).max(axis=2) > 0] = 1
        share = np.asarray(Image.fromarray(union).resize((32, 32), Image.Resampling.BOX))
        np.testing.assert_array_equal(mask, share >= 0.5)
        assert mask.any() == (not name.startswith("normal"))
    lower = found["benign (1)"][1][20:]  # the second and third mask lie there
    assert lower[:, :12].any()
    assert lower[:, 20:].any()
    assert any("18 images" in sentence for sentence in said)


def test_columns_order_statistics_and_counts(
    busi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "ROWS_PER_PART", 4)
    dataset = prepare(busi_folder, tmp_path / "out", _settings("busi"))
    train = dataset.load("train")
    np.testing.assert_allclose(dataset.manifest.mean, train.images.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(dataset.manifest.std, train.images.std(axis=(0, 2, 3)), rtol=1e-12)
    assert len(dataset.files("train")) > 1
    for split in SPLITS:
        loaded, counts = dataset.load(split), dataset.manifest.counts[split]
        assert loaded.ids == sorted(loaded.ids, key=natural_key)
        lesions = loaded.masks.any(axis=(1, 2)).sum()
        assert (counts.images, counts.labelled, counts.lesions) == (len(loaded), loaded.labelled.sum(), lesions)
    table = pq.read_table(dataset.files("train")[0])
    assert table.column_names == ["id", "group", "image", "mask", "height", "width", "source"]
    row = table.slice(0, 1).to_pylist()[0]
    with Image.open(busi_folder / row["source"]) as image:
        assert (row["height"], row["width"]) == (image.height, image.width)


def test_same_input_gives_same_bytes_and_is_not_prepared_twice(busi_folder: Path, tmp_path: Path) -> None:
    first = prepare(busi_folder, tmp_path / "a" / "out", _settings("busi"))
    second = prepare(busi_folder, tmp_path / "b" / "out", _settings("busi"))
    assert _hashes(first.path) == _hashes(second.path)
    said: list[str] = []
    assert prepare(busi_folder, first.path, _settings("busi"), progress=said.append).manifest == first.manifest
    assert "already prepared" in said[-1]
    with pytest.raises(DataError, match=r"out is a patch dataset made from other files or settings; delete it"):
        prepare(busi_folder, first.path, _settings("busi", seed=1))
    (busi_folder / "benign" / "benign (2)_mask.png").unlink()
    with pytest.raises(DataError, match="from other files or settings"):
        prepare(busi_folder, first.path, _settings("busi"))
    assert _hashes(first.path) == _hashes(second.path)


def test_paired_colour_images_with_unlabelled_ones(paired_folder: Path, tmp_path: Path) -> None:
    dataset = prepare(paired_folder, tmp_path / "out", _settings("paired", fractions=(1, 0, 0)))
    train = dataset.load("train")
    assert train.images.shape == (6, 3, 32, 32)
    assert train.labelled.tolist() == [True] * 4 + [False] * 2
    assert not train.masks[4:].any()
    assert dataset.manifest.counts["test"].images == 0
    assert len(dataset.load("test")) == 0
    picture = Image.open(paired_folder / "images" / "case_5.png").resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(train.images[5].transpose(1, 2, 0), np.asarray(picture))


def test_16_bit_images_stay_16_bit(tmp_path: Path) -> None:
    (tmp_path / "in" / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 65536, (32, 32)).astype(np.uint16)
        Image.fromarray(pixels).save(tmp_path / "in" / "images" / f"{i}.png")
    dataset = prepare(tmp_path / "in", tmp_path / "out", _settings("paired", fractions=(1, 0, 0)))
    train = dataset.load("train")
    assert dataset.manifest.dtype == "uint16"
    assert train.images.dtype == np.uint16
    np.testing.assert_array_equal(train.images[2, 0], np.asarray(Image.open(tmp_path / "in" / "images" / "2.png")))
    np.testing.assert_allclose(dataset.manifest.std, train.images.std(axis=(0, 2, 3)), rtol=1e-12)
    assert not train.labelled.any()

    Image.new("L", (32, 32)).save(tmp_path / "in" / "images" / "8bit.png")
    with pytest.raises(DataError, match=r"8bit\.png is uint8, but images/0\.png is uint16"):
        prepare(tmp_path / "in", tmp_path / "other", _settings("paired"))


def test_split_and_group_files_rule(busi_folder: Path, tmp_path: Path) -> None:
    splits = {"train": [f"benign ({i})" for i in range(1, 7)], "val": ["normal (1)"], "test": ["malignant (2)"]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    listed = [name for names in splits.values() for name in names]
    lines = ["id,group", *(f"{name},{'a' if name.startswith('benign') else name}" for name in listed)]
    (tmp_path / "groups.csv").write_text("\n".join(lines))
    given = {"split_file": str(tmp_path / "splits.json"), "group_file": str(tmp_path / "groups.csv")}
    said: list[str] = []
    dataset = prepare(busi_folder, tmp_path / "out", _settings("busi", **given), progress=said.append)
    assert {split: dataset.load(split).ids for split in SPLITS} == splits
    assert set(dataset.load("train").groups) == {"a"}
    assert dataset.manifest.left_out == 10
    assert "10 left out" in said[-1]

    (tmp_path / "groups.csv").write_text("\n".join(lines).replace("malignant (2),malignant (2)", "malignant (2),a"))
    with pytest.raises(DataError, match=r"splits\.json puts group 'a' of .*groups\.csv into train and test"):
        prepare(busi_folder, tmp_path / "leak", _settings("busi", **given))


def test_near_copies_never_lie_in_two_splits(busi_folder: Path, tmp_path: Path) -> None:
    for i in range(1, 5):  # a mirrored twin would be another picture, a brighter one is not
        with Image.open(busi_folder / "benign" / f"benign ({i}).png") as image:
            image.point(lambda value: min(255, value + 12)).save(busi_folder / "benign" / f"benign ({20 + i}).png")
    dataset = prepare(busi_folder, tmp_path / "out", _settings("busi"))
    groups = {split: set(dataset.load(split).groups) for split in SPLITS}
    assert sum(len(names) for names in groups.values()) == len(set().union(*groups.values())) == 18
    everything = dataset.load("train").concat(dataset.load("val"), dataset.load("test"))
    group_of = dict(zip(everything.ids, everything.groups, strict=True))
    assert all(group_of[f"benign ({20 + i})"] == f"benign ({i})" for i in range(1, 5))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("unreadable", r"benign \(3\)\.png cannot be read as an image \(.*; replace or remove it\."),
        ("size", r"normal \(2\)_mask\.png is a mask of 5x5 pixels, but its image has"),
        ("two", r"benign \(3\)\.png cannot be read .* \(1 more files have faults\.\)"),
    ],
)
def test_faults_leave_nothing_behind(fault: str, sentence: str, busi_folder: Path, tmp_path: Path) -> None:
    if fault in ("unreadable", "two"):
        (busi_folder / "benign" / "benign (3).png").write_bytes(b"\x89PNG\r\n\x1a\n")
    if fault in ("size", "two"):
        Image.new("L", (5, 5)).save(busi_folder / "normal" / "normal (2)_mask.png")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=sentence):
        prepare(busi_folder, tmp_path / "out", _settings("busi"))
    assert sorted(tmp_path.rglob("*")) == before


def test_failure_while_writing_leaves_nothing_behind(
    busi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(busi_folder, tmp_path / "out", _settings("busi"))
    assert sorted(tmp_path.rglob("*")) == before


def test_place_that_cannot_be_written_is_named(busi_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'file'}")):
        prepare(busi_folder, tmp_path / "file" / "out", _settings("busi"))


def test_other_things_at_the_target_are_refused(busi_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(DataError, match=r"photos exists and is not a patch dataset; delete it or choose another"):
        prepare(busi_folder, tmp_path / "photos", _settings("busi"))
    manifest = prepare(busi_folder, tmp_path / "good", _settings("busi")).path / "manifest.json"
    manifest.write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json is not the manifest .* Delete .*good first\."):
        prepare(busi_folder, manifest.parent, _settings("busi"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file exists and is not a patch dataset"):
        prepare(busi_folder, tmp_path / "file", _settings("busi"))


@pytest.mark.real
def test_real_busi(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "busi" / "Dataset_BUSI_with_GT"
    settings = _settings(
        "busi", size=64, split_file=str(real_data / "splits/busi.json"), group_file=str(real_data / "busi/groups.csv")
    )
    dataset = prepare(source, tmp_path / "out", settings)
    assert {split: len(dataset.load(split)) for split in SPLITS} == {"train": 104, "val": 15, "test": 29}
    assert dataset.shape == (1, 64, 64)  # grey in spite of a few coloured callipers
    found = _everything(dataset)
    assert len(found) == 148
    assert sum(mask.any() for _, mask, _ in found.values()) == 128
    assert not any(mask.any() for name, (_, mask, _) in found.items() if name.startswith("normal"))
    for name in ("benign (4)", "benign (54)"):  # RGBA masks, opaque everywhere
        assert 0 < found[name][1].mean() < 0.5
    areas = {name: mask.mean() for name, (_, mask, _) in found.items() if mask.any()}
    assert np.mean(list(areas.values())) == pytest.approx(0.089, abs=0.003)
    lesions = dataset.summary()["splits"]["train"]["lesions"]
    assert lesions == 90


@pytest.mark.real
def test_real_colour_images(real_data: Path, tmp_path: Path) -> None:
    settings = _settings("paired", size=64, split_file=str(real_data / "splits/isic2017.json"))
    dataset = prepare(real_data / "isic2017", tmp_path / "out", settings)
    assert dataset.shape == (3, 64, 64)
    assert {split: len(dataset.load(split)) for split in SPLITS} == {"train": 43, "val": 7, "test": 13}
    assert all(dataset.load(split).masks.any(axis=(1, 2)).all() for split in SPLITS)
