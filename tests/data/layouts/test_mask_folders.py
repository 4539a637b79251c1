"""Folders of masks: which of several marks lesions, and one folder per image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from amlp_ray.config import PrepareConfig
from amlp_ray.data.decoders import read_frames
from amlp_ray.data.layouts import Listing, find_items
from amlp_ray.data.prepare.rejects import check_stray_masks
from amlp_ray.errors import DataError


def touch(folder: Path, *names: str) -> Path:
    """Make empty files: listing opens none."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def find(folder: Path, **config: Any) -> Listing:
    return find_items(PrepareConfig(**config), folder)


def masks_of(listing: Listing, folder: Path) -> dict[str, list[str]]:
    return {
        item.id: [Path(mask).relative_to(folder).as_posix() for mask in item.masks]
        for item in listing.items
    }


DRIVE = (
    "images/21_training.tif",
    "images/22_training.tif",
    "mask/21_training_mask.gif",
    "mask/22_training_mask.gif",
    "1st_manual/21_manual1.gif",
    "1st_manual/22_manual1.gif",
)


@pytest.mark.parametrize(
    ("names", "chosen", "remark"),
    [
        (DRIVE, "1st_manual/21_manual1.gif", "of 1st_manual, not of mask (fields of view)"),
        (
            (*DRIVE, "2nd_manual/21_manual2.gif"),
            "1st_manual/21_manual1.gif",
            "not of 2nd_manual (a second reading) and mask (fields of view)",
        ),
        (
            ("images/21_dr.jpg", "mask/21_dr_mask.tif", "manual1/21_dr.tif"),
            "manual1/21_dr.tif",
            "of manual1",
        ),
        (
            ("21_dr.jpg", "mask/21_dr_mask.tif", "manual1/21_dr.tif"),
            "manual1/21_dr.tif",
            "of manual1",
        ),
        (
            ("images/21_a.png", "masks/21_a.png", "fov_masks/21_a.png"),
            "masks/21_a.png",
            "not of fov_masks (fields of view)",
        ),
    ],
)
def test_fields_of_view_and_second_readings_are_no_lesions(
    names: tuple[str, ...], chosen: str, remark: str, tmp_path: Path
) -> None:
    listing = find(touch(tmp_path, *names))
    masks = next(item for item in listing.items if "21_" in item.id).masks
    assert masks == (str(tmp_path / chosen),)
    assert remark in listing.summary
    assert listing.rejected == []


@pytest.mark.parametrize(
    "names",
    [
        ("images/a.png", "masks/a.png", "labels/a.png"),
        ("images/a.png", "masks/a.png", "lesion_masks/a_mask.png"),
        ("train/images/a.png", "train/mask/a.png", "train/vessels/a_vessel.png"),
        ("a.png", "gt/a.png", "segmentation/a.png"),
    ],
)
def test_folders_of_masks_that_names_do_not_tell_apart_are_asked_about(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    touch(tmp_path, *names)
    image, *masks = names
    with pytest.raises(DataError, match=r"several folders of masks for the same images") as caught:
        find(tmp_path)
    for mask in masks:
        folder = Path(mask).parent.name
        assert f"{folder} (1 file)" in str(caught.value)
        listing = find(tmp_path, mask_folder=folder.upper())
        assert [item.masks for item in listing.items] == [(str(tmp_path / mask),)]
        assert listing.items[0].source == image


@pytest.mark.parametrize(
    "names",
    [
        ("train/images/a.png", "train/masks/a.png", "val/images/b.png", "val/labels/b.png"),
        ("images/a.png", "images/b.png", "masks/a.png", "masks/b.png", "thumbnails/a.png"),
    ],
)
def test_folders_of_other_images_or_other_use_are_not_asked_about(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    listing = find(touch(tmp_path, *names))
    assert [len(item.masks) for item in listing.items] == [1, 1]


def test_masks_in_a_folder_of_unknown_name_are_asked_about(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "images/b.png", "vessels/a.png", "vessels/b.png")
    with pytest.raises(DataError, match=r"folder 'vessels' .* add --mask-folder vessels"):
        find(tmp_path)
    assert [len(item.masks) for item in find(tmp_path, mask_folder="vessels").items] == [1, 1]
    assert len(find(tmp_path, layout="flat").items) == 4


def test_first_words_match_only_where_they_are_unique(tmp_path: Path) -> None:
    touch(tmp_path, "images/case1_left.png", "images/case1_right.png", "vessels/case1_v.png")
    listing = find(tmp_path, mask_folder="vessels")
    assert [item.masks for item in listing.items] == [(), ()]
    assert [file.file for file in listing.stray_masks] == ["vessels/case1_v.png"]


def test_a_mask_folder_that_is_not_there_or_not_used_is_named(tmp_path: Path) -> None:
    touch(tmp_path, *DRIVE)
    with pytest.raises(DataError, match=r"no folder of pictures named 'gt'; its .* 1st_manual"):
        find(tmp_path, mask_folder="gt")
    with pytest.raises(ValidationError, match="mask_folder needs layout=paired"):
        PrepareConfig(mask_folder="gt", layout="nifti")


# A folder per image


def test_masks_of_any_names_belong_to_the_image_of_their_folder(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "stage1/7f/images/7f.png",
        "stage1/7f/masks/01.png",
        "stage1/7f/masks/02.png",
        "stage1/a3/images/a3.png",
        "stage1/a3/masks/7f.png",
        "stage1/b5/images/b5.png",
        "stage1/c6/c6.png",
        "stage1/c6/masks/x.png",
    )
    listing = find(tmp_path)
    assert listing.layout == "folders"
    assert "a folder per image with masks such as 'stage1/7f/masks/01.png'" in listing.summary
    assert masks_of(listing, tmp_path) == {
        "stage1/7f": ["stage1/7f/masks/01.png", "stage1/7f/masks/02.png"],
        "stage1/a3": ["stage1/a3/masks/7f.png"],
        "stage1/b5": [],
        "stage1/c6": ["stage1/c6/masks/x.png"],
    }
    assert listing.rejected == []


def test_masks_of_a_folder_are_united(tmp_path: Path) -> None:
    union = np.zeros((8, 8), np.uint8)
    for number in range(3):
        mask = np.zeros((8, 8), np.uint8)
        mask[2 * number : 2 * number + 2, number : number + 3] = 255
        union |= mask // 255
        path = tmp_path / "id" / "masks" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    (tmp_path / "id" / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "id" / "images" / "id.png")
    (item,) = find(tmp_path).items
    frame = next(iter(read_frames(item, PrepareConfig())))
    np.testing.assert_array_equal(frame.mask, union)


def test_a_folder_of_several_images_or_none_is_rejected(tmp_path: Path) -> None:
    touch(tmp_path, "a/images/1.png", "a/images/2.png", "a/masks/m.png", "b/masks/m.png")
    touch(tmp_path, "c/images/1.png", "c/masks/m.png", "d/images/1.png", "d/masks/m.png")
    listing = find(tmp_path, layout="folders")
    assert list(masks_of(listing, tmp_path)) == ["c", "d"]
    assert {file.file: file.reason for file in listing.stray_masks} == {
        "a/masks/m.png": "is a mask in a, which holds 2 images; one is needed",
        "b/masks/m.png": "is a mask in b, which holds no images; one is needed",
    }


@pytest.mark.parametrize(
    "names",
    [
        ("p1/images/a.png", "p1/masks/a.png", "p2/images/b.png", "p2/masks/b.png"),
        ("images/a.png", "images/b.png", "masks/a_mask.png", "masks/b_mask.png"),
        ("images/a.png", "masks/b.png"),
    ],
)
def test_masks_named_like_their_images_stay_paired(names: tuple[str, ...], tmp_path: Path) -> None:
    assert find(touch(tmp_path, *names)).layout == "paired"


# Most masks lost


@pytest.mark.parametrize(
    ("layout", "names", "sentence"),
    [
        (
            "paired",
            ("images/a.png", "images/b.png", "masks/b.png", "masks/x.png", "masks/y.png"),
            r"2 of 3 masks belong to no image.* masks/x\.png is a mask without an image",
        ),
        (
            "paired",
            ("7f/images/7f.png", "7f/masks/1.png", "7f/masks/2.png"),
            r"2 of 2 masks .* the layout paired is not theirs",
        ),
        (
            "busi",
            ("benign/a.png", "benign/b_mask.png", "benign/c_mask.png", "benign/a_mask.png"),
            r"2 of 3 masks",
        ),
        ("lgg", ("p/1.tif", "p/2_mask.tif"), r"1 of 1 mask belong"),
        (
            "nifti",
            ("imagesTr/a.nii", "labelsTr/b.nii"),
            r"1 of 1 mask .*labelsTr/b\.nii is a label",
        ),
    ],
)
def test_most_masks_without_an_image_stop_preparing(
    layout: Any, names: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    listing = find(touch(tmp_path, *names), layout=layout)
    with pytest.raises(DataError, match=re.compile(sentence, re.DOTALL)):
        check_stray_masks(listing)


def test_half_of_the_masks_without_an_image_are_only_listed(tmp_path: Path) -> None:
    listing = find(touch(tmp_path, "images/a.png", "masks/a.png", "masks/b.png"))
    check_stray_masks(listing)
    assert [file.file for file in listing.rejected] == ["masks/b.png"]
