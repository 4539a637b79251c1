from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import amlp_ray.data.parquet as parts
from amlp_ray.config import PrepareConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.layouts import natural_key
from amlp_ray.data.manifest import SPLITS
from amlp_ray.data.path import DataPath
from amlp_ray.data.prepare.pipeline import prepare
from amlp_ray.errors import DataError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="amlp_ray.data.prepare")
    return caplog


def _settings(layout: str, **values: Any) -> PrepareConfig:
    return PrepareConfig.model_validate(
        {"layout": layout, "size": 32, "fractions": (0.6, 0.2, 0.2)} | values
    )


def _rejects(out: Path) -> dict[str, tuple[str, str]]:
    """What the list of rejects says: (action, reason) by name of file."""
    file = out.with_name(f"{out.name}.rejects.csv")
    if not file.exists():
        return {}
    with file.open(newline="") as rows:
        return {
            Path(row["file"]).name: (row["action"], row["reason"]) for row in csv.DictReader(rows)
        }


def _hashes(folder: str | Path) -> dict[str, str]:
    folder = Path(folder)
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in folder.rglob("*.*")
    }


def _everything(dataset: PatchDataset) -> dict[str, tuple[np.ndarray, np.ndarray, bool]]:
    splits = [dataset.load(split) for split in SPLITS]
    return {
        s.ids[i]: (s.images[i], s.masks[i], bool(s.labeled[i]))
        for s in splits
        for i in range(len(s))
    }


def test_busi_images_and_masks_are_what_pillow_reads(
    busi_folder: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    dataset = prepare(busi_folder, tmp_path / "out", _settings("busi"))
    samples = _everything(dataset)
    assert len(samples) == 18
    assert dataset.shape == (1, 32, 32)
    assert all(labeled for _, _, labeled in samples.values())
    for name, (image, mask, _) in samples.items():
        folder = busi_folder / name.split()[0]
        gray = Image.open(folder / f"{name}.png").convert("L")
        np.testing.assert_array_equal(
            image[0], np.asarray(gray.resize((32, 32), Image.Resampling.BICUBIC))
        )
        union = np.zeros((gray.height, gray.width), np.float32)
        for path in sorted(p for p in folder.iterdir() if p.name.startswith(f"{name}_mask")):
            union[np.asarray(Image.open(path).convert("RGB")).max(axis=2) > 0] = 1
        share = np.asarray(Image.fromarray(union).resize((32, 32), Image.Resampling.BOX))
        np.testing.assert_array_equal(mask, share >= 0.5)
        assert mask.any() == (not name.startswith("normal"))
    lower = samples["benign (1)"][1][20:]  # the second and third mask lie there
    assert lower[:, :12].any()
    assert lower[:, 20:].any()
    assert any("18 images" in sentence for sentence in messages.messages)


def test_columns_order_statistics_and_counts(
    busi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_ROWS", 4)
    dataset = prepare(busi_folder, tmp_path / "out", _settings("busi"))
    train = dataset.load("train")
    np.testing.assert_allclose(dataset.manifest.mean, train.images.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(dataset.manifest.std, train.images.std(axis=(0, 2, 3)), rtol=1e-12)
    assert len(dataset.files("train")) > 1
    for split in SPLITS:
        loaded, counts = dataset.load(split), dataset.manifest.counts[split]
        assert loaded.ids == sorted(loaded.ids, key=natural_key)
        lesions = loaded.masks.any(axis=(1, 2)).sum()
        assert (counts.images, counts.labeled, counts.lesions) == (
            len(loaded),
            loaded.labeled.sum(),
            lesions,
        )
    table = pq.read_table(dataset.files("train")[0])
    assert table.column_names == list(parts.COLUMNS)
    row = table.slice(0, 1).to_pylist()[0]
    with Image.open(busi_folder / row["source"]) as image:
        assert (row["height"], row["width"]) == (image.height, image.width)


def test_same_input_gives_same_bytes_and_is_not_prepared_twice(
    busi_folder: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    first = prepare(busi_folder, tmp_path / "a" / "out", _settings("busi"))
    second = prepare(busi_folder, tmp_path / "b" / "out", _settings("busi"))
    assert _hashes(first.path) == _hashes(second.path)
    assert prepare(busi_folder, first.path, _settings("busi")).manifest == first.manifest
    assert "already prepared" in messages.messages[-1]
    with pytest.raises(
        DataError, match=r"out is a patch dataset made from other files or settings; delete it"
    ):
        prepare(busi_folder, first.path, _settings("busi", seed=1))
    (busi_folder / "benign" / "benign (2)_mask.png").unlink()
    with pytest.raises(DataError, match="from other files or settings"):
        prepare(busi_folder, first.path, _settings("busi"))
    assert _hashes(first.path) == _hashes(second.path)


def test_paired_color_images_with_unlabeled_ones(paired_folder: Path, tmp_path: Path) -> None:
    dataset = prepare(paired_folder, tmp_path / "out", _settings("paired", fractions=(1, 0, 0)))
    train = dataset.load("train")
    assert train.images.shape == (6, 3, 32, 32)
    assert train.labeled.tolist() == [True] * 4 + [False] * 2
    assert not train.masks[4:].any()
    assert dataset.manifest.counts["test"].images == 0
    assert len(dataset.load("test")) == 0
    picture = Image.open(paired_folder / "images" / "case_5.png").resize(
        (32, 32), Image.Resampling.BICUBIC
    )
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
    np.testing.assert_array_equal(
        train.images[2, 0], np.asarray(Image.open(tmp_path / "in" / "images" / "2.png"))
    )
    np.testing.assert_allclose(dataset.manifest.std, train.images.std(axis=(0, 2, 3)), rtol=1e-12)
    assert not train.labeled.any()

    Image.new("L", (32, 32)).save(tmp_path / "in" / "images" / "8bit.png")
    other = prepare(tmp_path / "in", tmp_path / "other", _settings("paired", fractions=(1, 0, 0)))
    assert other.load("train").ids == train.ids
    action, reason = _rejects(tmp_path / "other")["8bit.png"]
    assert action == "rejected"
    assert reason.startswith("is uint8, but most pictures are uint16")


def test_split_and_group_files_rule(
    busi_folder: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    splits = {
        "train": [f"benign ({i})" for i in range(1, 7)],
        "val": ["normal (1)"],
        "test": ["malignant (2)"],
    }
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    listed = [name for names in splits.values() for name in names]
    lines = [
        "id,group",
        *(f"{name},{'a' if name.startswith('benign') else name}" for name in listed),
    ]
    (tmp_path / "groups.csv").write_text("\n".join(lines))
    files = {
        "split_file": str(tmp_path / "splits.json"),
        "group_file": str(tmp_path / "groups.csv"),
    }
    dataset = prepare(busi_folder, tmp_path / "out", _settings("busi", **files))
    assert {split: dataset.load(split).ids for split in SPLITS} == splits
    assert set(dataset.load("train").groups) == {"a"}
    assert dataset.manifest.left_out == 10
    assert "10 left out" in messages.messages[-1]

    (tmp_path / "groups.csv").write_text(
        "\n".join(lines).replace("malignant (2),malignant (2)", "malignant (2),a")
    )
    with pytest.raises(
        DataError, match=r"splits\.json puts group 'a' of .*groups\.csv into train and test"
    ):
        prepare(busi_folder, tmp_path / "leak", _settings("busi", **files))


def test_near_copies_never_lie_in_two_splits(busi_folder: Path, tmp_path: Path) -> None:
    for i in range(1, 5):  # a mirrored twin would be another picture, a brighter one is not
        with Image.open(busi_folder / "benign" / f"benign ({i}).png") as image:
            image.point(lambda value: min(255, value + 12)).save(
                busi_folder / "benign" / f"benign ({20 + i}).png"
            )
    dataset = prepare(busi_folder, tmp_path / "out", _settings("busi"))
    groups = {split: set(dataset.load(split).groups) for split in SPLITS}
    assert sum(len(names) for names in groups.values()) == len(set().union(*groups.values())) == 18
    everything = dataset.load("train").concat(dataset.load("val"), dataset.load("test"))
    group_of = dict(zip(everything.ids, everything.groups, strict=True))
    assert all(group_of[f"benign ({20 + i})"] == f"benign ({i})" for i in range(1, 5))


def test_faults_are_listed_and_the_rest_survives(
    busi_folder: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    (busi_folder / "benign" / "benign (3).png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.new("L", (5, 5)).save(busi_folder / "normal" / "normal (2)_mask.png")
    dataset = prepare(busi_folder, tmp_path / "out", _settings("busi"))
    assert sorted(_everything(dataset), key=natural_key) == [
        *(f"benign ({i})" for i in range(1, 9) if i != 3),
        *(f"malignant ({i})" for i in range(1, 7)),
        *(f"normal ({i})" for i in (1, 3, 4)),
    ]
    assert dataset.manifest.rejected == 2
    assert messages.messages[-1].startswith("2 files rejected and 0 repaired, see ")
    rejects = _rejects(tmp_path / "out")
    assert set(rejects) == {"benign (3).png", "normal (2).png"}
    assert "mask of 5x5 pixels" in rejects["normal (2).png"][1]

    (busi_folder / "benign" / "benign (3).png").unlink()
    (busi_folder / "normal" / "normal (2)_mask.png").unlink()
    (busi_folder / "benign" / "benign (3)_mask.png").unlink()
    for file in ("out", "out.rejects.csv"):
        DataPath(tmp_path / file).delete()
    prepare(busi_folder, tmp_path / "out", _settings("busi"))
    assert not _rejects(tmp_path / "out")


def test_strict_stops_at_the_first_fault_and_leaves_only_the_list(
    busi_folder: Path, tmp_path: Path
) -> None:
    (busi_folder / "benign" / "benign (3).png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(
        DataError, match=r"benign \(3\)\.png is a PNG .*--strict stops at the first"
    ):
        prepare(busi_folder, tmp_path / "out", _settings("busi"), strict=True)
    assert not (tmp_path / "out").exists()
    assert set(_rejects(tmp_path / "out")) == {"benign (3).png"}


def test_a_set_without_a_usable_image_leaves_only_the_list(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"None of 2 images can be used\. The first: .*a\.png"):
        prepare(tmp_path / "in", tmp_path / "out", _settings("flat"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.rejects.csv"]


def test_failure_at_the_end_goes_on_from_there(
    busi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(busi_folder, tmp_path / "whole" / "out", _settings("busi"))
    with monkeypatch.context() as patch:
        patch.setattr(PatchDataset, "open", lambda *_: None)
        patch.setattr(
            "amlp_ray.data.prepare.pipeline.Manifest.model_dump",
            lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            prepare(busi_folder, tmp_path / "out", _settings("busi"))
    with pytest.raises(DataError, match="was not finished; run the same"):
        PatchDataset.open(tmp_path / "out")
    with pytest.raises(DataError, match="unfinished dataset of other files or settings; delete it"):
        prepare(busi_folder, tmp_path / "out", _settings("busi", seed=1))
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*.parquet")}
    assert before
    again = prepare(busi_folder, tmp_path / "out", _settings("busi"))
    assert {
        f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*.parquet")
    } == before  # none written twice
    assert _hashes(again.path) == _hashes(whole.path)


KILLED = """
import sys
import amlp_ray.data.parquet as parts
from amlp_ray.data.prepare import pipeline, resume
from amlp_ray.config import PrepareConfig
from amlp_ray.runtime.session import ray_session
parts.PART_ROWS = 4
pipeline.SCAN_PICTURES = 2
resume.FLUSH_JOBS = 1
with ray_session():
    pipeline.prepare(sys.argv[1], sys.argv[2], PrepareConfig(layout="flat", size=64))
"""


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(120):
        blocks = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(blocks).resize((300, 280), Image.Resampling.BICUBIC).save(
            tmp_path / "in" / f"{i}.png"
        )
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "in"), str(out)]
    for pattern, least in (
        ("scanned-*.json", 2),
        ("train-*.json", 3),
    ):  # in the middle of pass 1, then of pass 2
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(out.glob(f".preparing/{pattern}"))) < least:
            assert process.poll() is None
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "manifest.json").exists()
        with pytest.raises(DataError, match="was not finished"):
            PatchDataset.open(out)
    # What was done is not done again: these parts keep their times.
    done = {json.loads(f.read_text())["file"] for f in out.glob(".preparing/train-*.json")}
    before = {name: (out / name).stat().st_mtime_ns for name in done}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert {name: (out / name).stat().st_mtime_ns for name in done} == before
    monkeypatch.setattr(parts, "PART_ROWS", 4)
    prepare(tmp_path / "in", tmp_path / "whole" / "killed", PrepareConfig(layout="flat", size=64))
    assert _hashes(out) == _hashes(tmp_path / "whole" / "killed")
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "test", "train", "val"]


def test_two_preparations_of_one_folder_do_not_meet(busi_folder: Path, tmp_path: Path) -> None:
    from amlp_ray.data.prepare.resume import PreparationState

    with (
        PreparationState(DataPath(tmp_path / "out"), "x").lock(),
        pytest.raises(
            DataError, match="out is being prepared by another process; wait for it or stop it"
        ),
    ):
        prepare(busi_folder, tmp_path / "out", _settings("busi"))


def test_a_file_that_changes_on_the_way_is_noticed(
    busi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import amlp_ray.data.prepare.pipeline as module

    assign = module.assign

    def change(*arguments: Any) -> Any:
        Image.new("RGB", (80, 80), "red").save(busi_folder / "benign" / "benign (2).png")
        Image.new("L", (80, 80)).save(busi_folder / "benign" / "benign (2)_mask.png")
        return assign(*arguments)

    monkeypatch.setattr(module, "assign", change)
    with pytest.raises(
        DataError, match=r"benign \(2\)\.png changed while the dataset was prepared"
    ):
        prepare(busi_folder, tmp_path / "out", _settings("busi"))
    assert not (tmp_path / "out").exists()


def test_from_and_to_an_object_store(busi_folder: Path, tmp_path: Path, s3_bucket: str) -> None:
    local = prepare(busi_folder, tmp_path / "out", _settings("busi"))
    source, out = DataPath(s3_bucket) / "source", DataPath(s3_bucket) / "sets" / "out"
    for entry in DataPath(busi_folder).entries():
        (source / entry.name).atomic_write((busi_folder / entry.name).read_bytes())
    (source / "benign/benign (99).png").atomic_write(b"not a picture")
    remote = prepare(source, out, _settings("busi"))
    assert {
        e.name: (out / e.name).read_bytes() for e in out.entries() if e.name != "manifest.json"
    } == {
        e.name: (local.root / e.name).read_bytes()
        for e in local.root.entries()
        if e.name != "manifest.json"
    }
    assert remote.manifest.fingerprint == local.manifest.fingerprint
    assert b"benign (99).png" in (out.parent / "out.rejects.csv").read_bytes()
    assert not (out / ".preparing").is_folder()


def test_tiles_keep_full_detail_and_drop_air(tmp_path: Path) -> None:
    (tmp_path / "in" / "images").mkdir(parents=True)
    (tmp_path / "in" / "masks").mkdir()
    pixels = np.random.default_rng(0).integers(60, 256, (90, 130), dtype=np.uint8)
    pixels[:, :66] = 0  # a black border of two tiles
    lesion = np.zeros((90, 130), bool)
    lesion[5:9, 3:9] = True  # in the black: kept all the same
    Image.fromarray(pixels).save(tmp_path / "in" / "images" / "a.png")
    Image.fromarray(lesion).save(tmp_path / "in" / "masks" / "a.png")
    dataset = prepare(
        tmp_path / "in", tmp_path / "out", _settings("paired", fit="tiles", fractions=(1, 0, 0))
    )
    table = dataset.table()
    split = dataset.load("train")
    assert dataset.manifest.dropped == 5
    assert sorted(zip(table["y"], table["x"], strict=True)) == [
        (y, x) for y in (0, 32, 58) for x in (0, 64, 96, 98) if (y, x) == (0, 0) or x > 60
    ]
    assert split.ids[0] == "a@0,0"
    for i, (y, x) in enumerate(zip(table["y"], table["x"], strict=True)):
        np.testing.assert_array_equal(split.images[i, 0], pixels[y : y + 32, x : x + 32])
        np.testing.assert_array_equal(split.masks[i], lesion[y : y + 32, x : x + 32])
    assert set(split.groups) == {"a"}
    assert table["background"].between(0, 1).all()
    assert (table["height"] == 90).all()


def test_names_are_hashed_where_asked(
    busi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMLP_RAY_SALT", "one")
    one = prepare(busi_folder, tmp_path / "one", _settings("busi", hash_names=True))
    content = b"".join(file.read_bytes() for file in (tmp_path / "one").rglob("*.*"))
    assert b"benign" not in content
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in one.load("train").ids)
    monkeypatch.setenv("AMLP_RAY_SALT", "two")
    two = prepare(busi_folder, tmp_path / "two", _settings("busi", hash_names=True))
    assert not set(one.load("train").ids) & set(two.load("train").ids)
    assert one.manifest.salt != two.manifest.salt
    np.testing.assert_array_equal(one.load("val").images, two.load("val").images)


def test_place_that_cannot_be_written_is_named(busi_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'file'}")):
        prepare(busi_folder, tmp_path / "file" / "out", _settings("busi"))


def test_other_things_at_the_target_are_refused(busi_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(
        DataError, match=r"photos exists and is not a patch dataset; delete it or choose another"
    ):
        prepare(busi_folder, tmp_path / "photos", _settings("busi"))
    manifest = (
        prepare(busi_folder, tmp_path / "good", _settings("busi")).root.local / "manifest.json"
    )
    manifest.write_text("{")
    with pytest.raises(
        DataError, match=r"manifest\.json is not the manifest .* Delete .*good first\."
    ):
        prepare(busi_folder, manifest.parent, _settings("busi"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file exists and is not a patch dataset"):
        prepare(busi_folder, tmp_path / "file", _settings("busi"))


@pytest.mark.real
def test_real_busi(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "busi" / "Dataset_BUSI_with_GT"
    config = _settings(
        "busi",
        size=64,
        split_file=str(real_data / "splits/busi.json"),
        group_file=str(real_data / "busi/groups.csv"),
    )
    dataset = prepare(source, tmp_path / "out", config)
    assert {split: len(dataset.load(split)) for split in SPLITS} == {
        "train": 104,
        "val": 15,
        "test": 29,
    }
    assert dataset.shape == (1, 64, 64)  # gray in spite of a few colored calipers
    samples = _everything(dataset)
    assert len(samples) == 148
    assert sum(mask.any() for _, mask, _ in samples.values()) == 128
    assert not any(
        mask.any() for name, (_, mask, _) in samples.items() if name.startswith("normal")
    )
    for name in ("benign (4)", "benign (54)"):  # RGBA masks, opaque everywhere
        assert 0 < samples[name][1].mean() < 0.5
    areas = {name: mask.mean() for name, (_, mask, _) in samples.items() if mask.any()}
    assert np.mean(list(areas.values())) == pytest.approx(0.089, abs=0.003)
    lesions = dataset.summary()["splits"]["train"]["lesions"]
    assert lesions == 90


@pytest.mark.real
def test_real_color_images(real_data: Path, tmp_path: Path) -> None:
    config = _settings("paired", size=64, split_file=str(real_data / "splits/isic2017.json"))
    dataset = prepare(real_data / "isic2017", tmp_path / "out", config)
    assert dataset.shape == (3, 64, 64)
    assert {split: len(dataset.load(split)) for split in SPLITS} == {
        "train": 43,
        "val": 7,
        "test": 13,
    }
    assert all(dataset.load(split).masks.any(axis=(1, 2)).all() for split in SPLITS)


# What a review broke


@pytest.fixture
def unfinished(busi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A preparation by split and group file that was stopped right before its manifest."""
    ids = [f"benign ({i})" for i in range(1, 9)] + [f"malignant ({i})" for i in range(1, 7)]
    (tmp_path / "s.json").write_text(json.dumps({"train": ids[:8], "test": ids[8:]}))
    (tmp_path / "g.csv").write_text("id,group\n" + "\n".join(f"{name},{name}" for name in ids))
    with monkeypatch.context() as patch:
        stop = "amlp_ray.data.prepare.pipeline.Manifest.model_dump"
        patch.setattr(stop, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(busi_folder, tmp_path / "out", _by_files(tmp_path))
    return tmp_path


def _by_files(folder: Path, **values: Any) -> PrepareConfig:
    return _settings(
        "busi", split_file=str(folder / "s.json"), group_file=str(folder / "g.csv"), **values
    )


@pytest.mark.parametrize("edited", ["s.json", "g.csv"])
def test_edited_split_and_group_files_are_no_way_to_go_on(
    edited: str, unfinished: Path, busi_folder: Path
) -> None:
    if edited == "s.json":
        splits = json.loads((unfinished / edited).read_text())
        (unfinished / edited).write_text(
            json.dumps({"train": splits["test"], "test": splits["train"]})
        )
    else:
        (unfinished / edited).write_text(
            (unfinished / edited).read_text().replace(",benign (1)", ",benign (2)")
        )
    with pytest.raises(DataError, match="unfinished dataset of other files or settings"):
        prepare(busi_folder, unfinished / "out", _by_files(unfinished))


def test_another_salt_is_no_way_to_go_on(
    busi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMLP_RAY_SALT", "one")
    prepare(busi_folder, tmp_path / "out", _settings("busi", hash_names=True))
    monkeypatch.setenv("AMLP_RAY_SALT", "two")
    with pytest.raises(DataError, match="made from other files or settings"):
        prepare(busi_folder, tmp_path / "out", _settings("busi", hash_names=True))


def test_a_dataset_says_nothing_of_where_files_lay(unfinished: Path, busi_folder: Path) -> None:
    prepare(busi_folder, unfinished / "out", _by_files(unfinished))
    assert str(unfinished) not in (unfinished / "out" / "manifest.json").read_text()


def test_a_failure_deletes_nothing_of_the_user_s(busi_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".important").write_text("x")
    with pytest.raises(DataError, match="out exists and is not a patch dataset"):
        prepare(tmp_path / "bad", tmp_path / "out", _settings("flat"))
    (tmp_path / "out" / ".important").unlink()
    (tmp_path / "out" / ".preparing").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="None of 1 image can be used"):
        prepare(tmp_path / "bad", tmp_path / "out", _settings("flat"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_dataset_that_ended_meanwhile_is_not_touched(
    busi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import amlp_ray.data.prepare.pipeline as module

    find = module.find_items

    def other_first(*arguments: Any) -> Any:
        monkeypatch.setattr(module, "find_items", find)
        prepare(busi_folder, tmp_path / "out", _settings("busi"))
        return find(*arguments)

    monkeypatch.setattr(module, "find_items", other_first)
    with pytest.raises(DataError, match="was finished by another process meanwhile"):
        prepare(busi_folder, tmp_path / "out", _settings("busi", size=48))
    assert PatchDataset.open(tmp_path / "out").shape == (1, 32, 32)
    assert not (tmp_path / "out" / ".preparing").exists()


@pytest.mark.parametrize("values", ["window", "percentile"])
def test_values_of_pictures_are_brought_to_bytes(values: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    arrays = [rng.integers(500, 4000, (32, 32)).astype(np.uint16) for _ in range(3)]
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / "in" / f"{i}.png")
    windowing = {"values": values, "window": (1000, 3000) if values == "window" else None}
    train = prepare(
        tmp_path / "in", tmp_path / "out", _settings("flat", fractions=(1, 0, 0), **windowing)
    ).load("train")
    assert train.images.dtype == np.uint8
    for stored, array in zip(train.images[:, 0], arrays, strict=True):
        low, high = (
            (1000, 3000)
            if values == "window"
            else np.percentile(array[array > array.min()], (0.5, 99.5))
        )
        np.testing.assert_array_equal(
            stored, np.rint(((array.astype(float) - low) / (high - low) * 255.0).clip(0, 255))
        )
    if values == "window":
        with pytest.raises(DataError, match="names no window, so values=window needs one"):
            prepare(tmp_path / "in", tmp_path / "other", _settings("flat", values="window"))


def test_padding_does_not_make_a_small_picture_air(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(60, 250, (40, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
    dataset = prepare(
        tmp_path / "in",
        tmp_path / "out",
        _settings("flat", fit="tiles", size=224, fractions=(1, 0, 0)),
    )
    assert len(dataset) == 3
    assert (dataset.table()["background"] > 0.95).all()


def test_pictures_that_a_layout_has_no_place_for_are_told(
    paired_folder: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    Image.new("L", (50, 40)).save(paired_folder / "stray.png")
    prepare(
        paired_folder,
        tmp_path / "out",
        _settings("auto", fractions=(1, 0, 0)),
    )
    assert messages.messages[0].endswith(
        "1 picture has no place in it and is left out, such as 'stray.png'"
    )


def test_the_list_of_rejects_comes_back_when_it_is_lost(busi_folder: Path, tmp_path: Path) -> None:
    (busi_folder / "benign" / "benign (3).png").write_bytes(b"x")
    (busi_folder / "normal" / "normal (1).png").unlink()
    prepare(busi_folder, tmp_path / "out", _settings("busi"))
    before = (tmp_path / "out.rejects.csv").read_text()
    assert all(row.startswith(("file,", f"{busi_folder}/")) for row in before.splitlines())
    (tmp_path / "out.rejects.csv").unlink()
    prepare(busi_folder, tmp_path / "out", _settings("busi"))
    assert (tmp_path / "out.rejects.csv").read_text() == before


def test_small_splits_are_filled_and_empty_ones_told(
    tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(2):
        blocks = Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 6), dtype=np.uint8))
        blocks.resize((40, 40)).save(tmp_path / "in" / f"{i}.png")
    config = _settings("flat", fractions=(0.7, 0.1, 0.2))
    prepare(tmp_path / "in", tmp_path / "out", config)
    assert any(
        "stays empty: there are too few groups (2)" in sentence for sentence in messages.messages
    )
