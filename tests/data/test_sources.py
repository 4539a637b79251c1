from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from amlp_ray.data.sources import find_items, natural_key
from amlp_ray.errors import DataError


def test_busi_lists_images_with_all_their_masks(busi_folder: Path) -> None:
    items = find_items("busi", busi_folder)
    assert [item.id for item in items[:3]] == ["benign (1)", "benign (2)", "benign (3)"]
    assert len(items) == 18
    assert [Path(mask).name for mask in items[0].masks] == [
        "benign (1)_mask.png",
        "benign (1)_mask_1.png",
        "benign (1)_mask_2.png",
    ]
    assert items[0].source == "benign/benign (1).png"
    assert all(Path(path).is_absolute() for item in items for path in (item.image, *item.masks))


def test_busi_image_without_mask_is_unlabelled(busi_folder: Path) -> None:
    (busi_folder / "benign" / "benign (2)_mask.png").unlink()
    assert find_items("busi", busi_folder)[1].masks == ()


def test_paired_matches_every_mask_ending_and_allows_unlabelled(paired_folder: Path) -> None:
    items = find_items("paired", paired_folder)
    assert [item.id for item in items] == [f"case_{i}" for i in range(6)]
    assert [len(item.masks) for item in items] == [1, 1, 1, 1, 0, 0]


def test_paired_prefers_an_exact_name_over_an_ending(paired_folder: Path) -> None:
    Image.new("L", (50, 40)).save(paired_folder / "images" / "case_2_mask.png")
    masks = {item.id: item.masks for item in find_items("paired", paired_folder)}
    assert len(masks["case_2_mask"]) == 1
    assert masks["case_2"] == ()


def test_ids_sort_as_people_count() -> None:
    names = ["b (10)", "b (9)", "b (09)", "a", "b", "b (100)x", "3", "20"]
    assert sorted(names, key=natural_key) == ["3", "20", "a", "b", "b (09)", "b (9)", "b (10)", "b (100)x"]


def test_hidden_twins_and_other_files_are_ignored(paired_folder: Path) -> None:
    (paired_folder / "images" / "._case_0.png").write_bytes(b"resource fork")
    (paired_folder / "images" / "notes.txt").write_text("x")
    assert len(find_items("paired", paired_folder)) == 6


@pytest.mark.parametrize("layout", ["busi", "paired"])
def test_missing_folder_is_named(layout: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(f"no folder {tmp_path / 'gone'}")):
        find_items(layout, tmp_path / "gone")


@pytest.mark.parametrize(("layout", "expected"), [("busi", "benign, malignant, normal"), ("paired", "named images")])
def test_folder_without_images_says_what_is_there_and_what_should_be(
    layout: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError) as caught:
        find_items(layout, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "pictures/" in str(caught.value)
    assert expected in str(caught.value)


def test_busi_mask_without_image_is_named(busi_folder: Path) -> None:
    (busi_folder / "malignant" / "malignant (3).png").unlink()
    with pytest.raises(DataError, match=re.escape("malignant (3)_mask.png is a mask without an image")):
        find_items("busi", busi_folder)


def test_paired_mask_without_image_is_named(paired_folder: Path) -> None:
    (paired_folder / "images" / "case_1.png").unlink()
    with pytest.raises(DataError, match=r"case_1_segmentation\.png is a mask without an image"):
        find_items("paired", paired_folder)


def test_two_images_of_one_name_are_named(paired_folder: Path) -> None:
    Image.new("L", (50, 40)).save(paired_folder / "images" / "case_3.jpg")
    with pytest.raises(DataError, match=r"images/case_3\.jpg and images/case_3\.png .* rename one"):
        find_items("paired", paired_folder)


def test_unknown_layout_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'dicom'; known are busi, paired"):
        find_items("dicom", tmp_path)


def test_data_needs_ray_only_for_preparing_and_streaming() -> None:
    code = (
        "import sys; sys.modules['ray'] = None; sys.modules['ray.data'] = None\n"
        "import amlp_ray.data; assert 'numpy' not in sys.modules and 'torch' not in sys.modules\n"
        "import amlp_ray.data.dataset, amlp_ray.data.stream, amlp_ray.data.phantoms, amlp_ray.data.sources\n"
        "import amlp_ray.data.decode, amlp_ray.data.grouping, amlp_ray.data.splitting\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
