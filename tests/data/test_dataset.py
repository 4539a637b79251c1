from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.utils.data
from helpers.datasets import write_dataset

from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.manifest import SPLITS, Counts, Manifest, Part
from amlp_ray.data.parquet import (
    COLUMNS,
    StoredPart,
    footer_digest,
    images_of,
    key_of,
    keys_of,
    masks_of,
    read_part,
    write_part,
)
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError

pytestmark = pytest.mark.ray  # all read the shared dataset, which Ray prepared


def test_opened_dataset_describes_itself(phantom_dataset: PatchDataset) -> None:
    again = PatchDataset.open(phantom_dataset.path)
    assert again.name == "dataset"
    assert (again.spec.channels, again.spec.height, again.spec.width) == (1, 64, 64)
    assert again.count("train") == 36
    assert again.bytes("train") == 36 * 64 * 64
    summary = json.loads(json.dumps(again.summary()))
    assert summary["splits"]["train"]["lesions"] == 30
    assert 1 <= summary["splits"]["train"]["lesion_area_percent"]["p50"] <= 15


def test_loaded_arrays_are_typed_writable_and_aligned(phantom_dataset: PatchDataset) -> None:
    split = phantom_dataset.load("val")
    assert split.images.dtype == split.masks.dtype == np.uint8
    assert split.labeled.dtype == bool
    assert split.keys.dtype == np.int64
    assert split.groups.tolist() == split.ids
    assert len(split) == len(split.images) == len(split.masks) == 12
    assert split.images.flags.writeable
    assert split.masks.flags.writeable


def test_take_and_concat_keep_rows_together(phantom_dataset: PatchDataset) -> None:
    split = phantom_dataset.load("val")
    taken = split.take([3, 1, 3])
    assert taken.ids == [split.ids[3], split.ids[1], split.ids[3]]
    np.testing.assert_array_equal(taken.images, split.images[[3, 1, 3]])
    back = split.take(np.arange(5)).concat(split.take(np.arange(5, 12)))
    assert back.ids == split.ids
    np.testing.assert_array_equal(back.masks, split.masks)
    assert len(split.take(np.array([], dtype=int))) == 0


def test_keys_are_stable_and_fit_63_bits() -> None:
    assert key_of("benign (1)") == 8603108941448989223
    keys = keys_of([str(i) for i in range(1000)])
    assert len(set(keys.tolist())) == 1000
    assert keys.min() >= 0


def test_ray_dataset_holds_the_same_images(phantom_dataset: PatchDataset) -> None:
    rows = phantom_dataset.to_ray_dataset("test", columns=["id", "image", "mask"]).take_all()
    split = phantom_dataset.load("test")
    assert [row["id"] for row in rows] == split.ids
    np.testing.assert_array_equal(rows[2]["image"], split.images[2])
    np.testing.assert_array_equal(rows[2]["mask"], split.masks[2])


def test_missing_and_foreign_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=re.escape(f"no patch dataset {tmp_path / 'gone'}; make one with")
    ):
        PatchDataset.open(tmp_path / "gone")
    with pytest.raises(
        DataError, match=re.escape(f"{tmp_path} has no manifest.json, so it is not a patch dataset")
    ):
        PatchDataset.open(tmp_path)


def test_unknown_split_is_named(phantom_dataset: PatchDataset) -> None:
    with pytest.raises(DataError, match=r"no split 'dev' in .*; splits are train, val, test"):
        phantom_dataset.load("dev")


def _row(i: int, mask: bool) -> dict[str, object]:
    return {
        "id": str(i),
        "group": "g",
        **dict.fromkeys(("lesion", "background", "y", "x", "frame", "hash"), 0),
        "image": np.full((2, 8, 8), i * 300, "<u2").tobytes(),
        "mask": np.full((8, 8), 1, np.uint8).tobytes() if mask else None,
        "height": 8,
        "width": 8,
        "source": "s",
    }


def test_parts_decode_any_slice_with_nulls(tmp_path: Path) -> None:
    rows = [_row(i, mask=i % 3 == 0) for i in range(10)]
    assert write_part(DataPath(tmp_path / "p.parquet"), rows, (2, 8, 8), "uint16") == 10
    path = DataPath(tmp_path / "p.parquet")
    part = StoredPart(str(path), 10, 256, footer_digest(path), (2, 8, 8), "uint16")
    table = read_part(part, ["image", "mask"]).slice(2, 6)
    images = images_of(table["image"], (2, 8, 8), "uint16")
    assert images[:, 1, 4, 4].tolist() == [i * 300 for i in range(2, 8)]
    masks, labeled = masks_of(table["mask"], (2, 8, 8))
    assert labeled.tolist() == [i % 3 == 0 for i in range(2, 8)]
    assert masks.any(axis=(1, 2)).tolist() == labeled.tolist()
    assert images_of(table["image"].slice(0, 0), (2, 8, 8), "uint16").shape == (0, 2, 8, 8)
    pieces = pa.chunked_array(
        [table["image"].chunk(0).slice(3, 2), table["image"].chunk(0).slice(0, 1)]
    )
    assert images_of(pieces, (2, 8, 8), "uint16")[:, 0, 0, 0].tolist() == [1500, 1800, 600]


def test_manifest_survives_json(phantom_dataset: PatchDataset) -> None:
    manifest = phantom_dataset.manifest
    assert (
        Manifest.model_validate(json.loads(json.dumps(manifest.model_dump(mode="json"))))
        == manifest
    )
    assert set(manifest.counts) == set(manifest.parts) == set(SPLITS)
    assert isinstance(manifest.counts["val"], Counts)
    assert isinstance(manifest.parts["val"][0], Part)


@pytest.fixture
def small(tmp_path: Path) -> PatchDataset:
    """21 images in two splits and four parts, every third unlabeled."""
    images = np.random.default_rng(0).integers(-1000, 1000, (21, 2, 16, 16)).astype(np.int16)
    masks = [None if i % 3 == 0 else np.eye(16) * (i % 2) for i in range(21)]
    split = ["train"] * 14 + ["val"] * 7
    return write_dataset(
        tmp_path / "small", images, masks, split=split, rows_per_part=5, spacing_y=0.5
    )


def test_a_dataset_is_a_sequence_of_samples(small: PatchDataset) -> None:
    assert len(small) == 21
    assert [sample.id for sample in small] == [f"image {i}" for i in range(21)]
    whole = small.load("train").concat(small.load("val"))
    for i in (0, 7, 20, -1, 13):
        sample = small[i]
        np.testing.assert_array_equal(sample.image, whole.images[i])
        assert (sample.mask is None) == (not whole.labeled[i])
        assert sample.split == ("train" if i in (0, 7, 13) else "val")
    assert small[4].mask is not None
    np.testing.assert_array_equal(small[4].mask, whole.masks[4])
    assert [sample.id for sample in small.split("val")[2:5]] == ["image 16", "image 17", "image 18"]
    assert len(small.split("test")) == 0
    with pytest.raises(IndexError, match="there is no sample 21 of 21"):
        small[21]
    with pytest.raises(DataError, match="no split 'dev'"):
        small.split("dev")


def test_the_table_holds_all_but_pixels(small: PatchDataset) -> None:
    table = small.table()
    assert list(table.columns) == [
        *(name for name in COLUMNS if name not in ("image", "mask")),
        "split",
    ]
    assert len(table) == 21
    assert table["lesion"].isna().sum() == 7
    assert (table["lesion"] == 16).sum() == 7
    assert (table["spacing_y"] == 0.5).all()
    assert table["spacing_x"].isna().all()
    assert list(small.table("val", columns=["id"])["id"]) == small.load("val").ids
    assert len(small.table("test")) == 0
    with pytest.raises(DataError, match="no column 'image' in its table; there are id, group"):
        small.table(columns=["image"])


def test_rows_are_loaded_without_the_rest(
    small: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small.load("train")
    for rows in ([0, 13], [3], [4, 5, 6], []):
        part = small.load("train", np.array(rows, int))
        np.testing.assert_array_equal(part.images, whole.images[rows])
        np.testing.assert_array_equal(part.masks, whole.masks[rows])
        np.testing.assert_array_equal(part.keys, whole.keys[rows])
        assert part.ids == [whole.ids[i] for i in rows]
    for rows in ([14], [-1], [0, 20]):
        with pytest.raises(IndexError, match="the split 'train' has rows 0 to 13 only"):
            small.load("train", np.array(rows))
    (small.root / "train/part-00002.parquet").delete()
    assert small.load("train", np.array([0, 9])).ids == ["image 0", "image 9"]


def test_torch_gets_tensors_in_batches(small: PatchDataset) -> None:
    loader = torch.utils.data.DataLoader(small.to_torch("train"), batch_size=7, shuffle=True)
    batches = list(loader)
    assert [batch["image"].shape for batch in batches] == [(7, 2, 16, 16)] * 2
    assert batches[0]["image"].dtype == torch.int16
    assert batches[0]["mask"].dtype == torch.uint8
    ids = [name for batch in batches for name in batch["id"]]
    assert sorted(ids) == sorted(small.load("train").ids)
    labeled = torch.cat([batch["labeled"] for batch in batches])
    assert int(labeled.sum()) == 9


def test_an_unfinished_dataset_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / ".preparing").mkdir()
    with pytest.raises(
        DataError, match="was not finished; run the same `amlp-ray data prepare` again"
    ):
        PatchDataset.open(tmp_path)


def test_a_dataset_in_an_object_store_reads_like_one_here(
    small: PatchDataset, s3_bucket: str
) -> None:
    remote = DataPath(s3_bucket) / "copy"
    for entry in small.root.entries():
        (remote / entry.name).atomic_write((small.root / entry.name).read_bytes())
    again = PatchDataset.open(remote)
    assert again.path.startswith("s3://")
    np.testing.assert_array_equal(again.load("val").images, small.load("val").images)
    assert again[20].id == "image 20"
    assert again.summary()["splits"] == small.summary()["splits"]
    (remote / "val/part-00001.parquet").delete()
    with pytest.raises(DataError, match=r"s3://.*val/part-00001\.parquet.* is missing"):
        PatchDataset.open(remote)


@pytest.mark.ray
def test_ray_rows_tell_unlabeled_from_lesion_free(ray_session: None, small: PatchDataset) -> None:
    table = small.to_ray_dataset("train").to_pandas()
    split = small.load("train")
    assert table["labeled"].tolist() == split.labeled.tolist()
    assert table["lesion"].isna().tolist() == (~split.labeled).tolist()
    np.testing.assert_array_equal(np.stack(table["image"]), split.images)
    assert small.to_ray_dataset("test", columns=["id"]).count() == 0


@pytest.mark.ray
def test_ray_rows_of_a_damaged_page_are_an_error(ray_session: None, small: PatchDataset) -> None:
    part = small.root.local / "train" / "part-00000.parquet"
    content = bytearray(part.read_bytes())
    images = pq.ParquetFile(part).metadata.row_group(0).column(list(COLUMNS).index("image"))
    content[images.data_page_offset + images.total_compressed_size // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(Exception, match=r"part-00000\.parquet is damaged"):
        small.to_ray_dataset("train", columns=["image"]).take_all()
