from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from amlp_ray.config import PrepareConfig
from amlp_ray.config.data import Layout
from amlp_ray.data.decoders import read_frames
from amlp_ray.data.layouts import LAYOUTS, Listing, find_items, natural_key
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError

ODD_NAMES = ("a b", "x [1] (2)", "line\nbreak", "Läsion-病变", "100%_*?", "case.1.2", "-n")


def find(folder: Path, layout: Layout = "auto", **config: Any) -> Listing:
    return find_items(PrepareConfig(layout=layout, **config), folder)


def save(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 6), value).save(path)
    return path


def masks_of(listing: Listing) -> dict[str, list[str]]:
    return {item.id: [Path(mask).name for mask in item.masks] for item in listing.items}


# All layouts


def test_every_layout_of_the_settings_has_a_reader() -> None:
    assert set(LAYOUTS) == set(Layout.__args__) - {"auto"}  # type: ignore[attr-defined]


def test_ids_sort_as_people_count() -> None:
    names = ["b (10)", "b (9)", "b (09)", "a", "b", "b (100)x", "3", "20"]
    assert sorted(names, key=natural_key) == [
        "3",
        "20",
        "a",
        "b",
        "b (09)",
        "b (9)",
        "b (10)",
        "b (100)x",
    ]


def test_hidden_twins_and_other_files_are_passed_over(paired_folder: Path) -> None:
    (paired_folder / "images" / "._case_0.png").write_bytes(b"resource fork")
    (paired_folder / "images" / "notes.txt").write_text("x")
    listing = find(paired_folder, "paired")
    assert len(listing.items) == 6
    assert listing.rejected == []


@pytest.mark.parametrize("layout", ["auto", "busi", "paired", "flat", "lgg", "coco"])
def test_missing_folder_is_named(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no folder .*gone; check the path"):
        find(tmp_path / "gone", layout)


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png is a file, but a folder of images is needed"):
        find(save(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("auto", "no layout fits: pictures"),
        ("busi", "folders named benign, malignant, normal"),
        ("paired", "folder named images"),
        ("flat", "in any folders"),
        ("lgg", "one folder per patient"),
        ("coco", "instances.json"),
    ],
)
def test_folder_without_images_says_what_is_there_and_what_should_be(
    layout: Layout, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_text("x")
    with pytest.raises(DataError) as caught:
        find(tmp_path, layout)
    message = str(caught.value)
    assert f"{tmp_path} holds the folders empty/ and 1 file (1 .zip)" in message
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_survive_in_every_layout(name: str, tmp_path: Path) -> None:
    busi = tmp_path / "1" / name
    save(busi / "benign" / f"{name}.png")
    save(busi / "benign" / f"{name}_mask.png")
    save(busi / "benign" / f"{name}_mask_1.png")
    paired = tmp_path / "2" / name
    save(paired / "images" / f"{name}.png")
    save(paired / "masks" / f"{name}_mask.bmp")
    beside = tmp_path / "3" / name
    save(beside / f"{name}.png")
    save(beside / f"{name}_seg.png")
    lgg = tmp_path / "4"
    save(lgg / name / f"{name}.tif")
    save(lgg / name / f"{name}_mask.tif")
    flat = tmp_path / "5"
    save(flat / name / f"{name}.png")
    for folder, layout, masks in (
        (busi, "busi", 2),
        (paired, "paired", 1),
        (beside, "paired", 1),
        (lgg, "lgg", 1),
    ):
        listing = find(folder)
        assert listing.summary.startswith(f"{layout}: ")
        assert [item.id for item in listing.items] == [name]
        assert len(listing.items[0].masks) == masks
        assert listing.rejected == []
    listing = find(flat)
    assert [item.id for item in listing.items] == [f"{name}/{name}"]
    assert all(Path(path).is_file() for item in listing.items for path in item.images)


def test_a_bucket_is_read_as_a_folder_is(s3_bucket: str, paired_folder: Path) -> None:
    root = DataPath(s3_bucket) / "set [1]"
    for path in paired_folder.rglob("*.png"):
        (root / path.relative_to(paired_folder).as_posix()).atomic_write(path.read_bytes())
    local, remote = find(paired_folder), find_items(PrepareConfig(), root)
    assert remote.summary == local.summary
    assert masks_of(remote).keys() == masks_of(local).keys()
    for item, other in zip(local.items, remote.items, strict=True):
        assert other.images[0].startswith("s3://")
        (frame,), (expected,) = (
            read_frames(other, PrepareConfig()),
            read_frames(item, PrepareConfig()),
        )
        np.testing.assert_array_equal(frame.image, expected.image)
        np.testing.assert_array_equal(frame.mask, expected.mask)


def test_a_mask_is_found_however_its_accents_are_written(tmp_path: Path) -> None:
    save(tmp_path / "images" / f"{unicodedata.normalize('NFC', 'é')}.png")
    save(tmp_path / "masks" / f"{unicodedata.normalize('NFD', 'é')}.png")
    assert len(find(tmp_path, "paired").items[0].masks) == 1


def test_a_name_that_is_no_utf8_is_a_fault_and_the_rest_survives(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    try:
        Path(os.fsdecode(bytes(tmp_path) + b"/b\xff.png")).write_bytes(b"x")
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    listing = find(tmp_path, "flat")
    assert [item.id for item in listing.items] == ["a"]
    assert listing.rejected == [
        ("b\\udcff.png", "rejected", "has a name that is not UTF-8; rename it")
    ]


def test_of_two_images_with_one_id_the_first_is_kept(paired_folder: Path) -> None:
    save(paired_folder / "images" / "case_3.jpg")
    listing = find(paired_folder, "paired")
    assert [item.source for item in listing.items if item.id == "case_3"] == ["images/case_3.jpg"]
    (fault,) = listing.rejected
    assert fault.file == "images/case_3.png"
    assert fault.action == "rejected"
    assert fault.reason.startswith("has the id 'case_3', as images/case_3.jpg has, but")


def test_many_files_are_listed_in_seconds(tmp_path: Path) -> None:
    original = save(tmp_path / "images" / "0.png")
    (tmp_path / "masks").mkdir()
    for i in range(1, 10_000):
        (tmp_path / "images" / f"{i}.png").symlink_to(original)
    for i in range(10_000):
        (tmp_path / "masks" / f"{i}_mask.png").symlink_to(original)
    start = time.perf_counter()
    listing = find(tmp_path)
    assert len(listing.items) == 10_000
    assert time.perf_counter() - start < 5  # takes 0.6 s; 200 000 files take 10 s


def test_data_needs_ray_only_for_preparing_and_streaming() -> None:
    code = (
        "import sys; sys.modules['ray'] = None; sys.modules['ray.data'] = None\n"
        "import amlp_ray.data; assert 'numpy' not in sys.modules and 'torch' not in sys.modules\n"
        "import amlp_ray.data.dataset, amlp_ray.data.loading.batches, amlp_ray.data.phantoms\n"
        "import amlp_ray.data.layouts, amlp_ray.data.decoders.image\n"
        "import amlp_ray.data.prepare.near_duplicates, amlp_ray.data.prepare.splits\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_listing_imports_no_decoder() -> None:
    code = (
        "import sys, amlp_ray.data.layouts.detect\n"
        "names = {'PIL', 'torch', 'pydicom', 'nibabel', 'highdicom', 'pycocotools'}\n"
        "assert not names & set(sys.modules), names & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# BUSI


def test_busi_lists_images_with_all_their_masks(busi_folder: Path) -> None:
    listing = find(busi_folder, "busi")
    items = listing.items
    assert [item.id for item in items[:3]] == ["benign (1)", "benign (2)", "benign (3)"]
    assert len(items) == 18
    assert [Path(mask).name for mask in items[0].masks] == [
        "benign (1)_mask.png",
        "benign (1)_mask_1.png",
        "benign (1)_mask_2.png",
    ]
    assert (items[0].source, items[0].stratum, items[0].group) == (
        "benign/benign (1).png",
        "benign",
        "",
    )
    assert all(Path(path).is_absolute() for item in items for path in (*item.images, *item.masks))
    assert listing.rejected == []


def test_busi_image_without_mask_is_unlabeled(busi_folder: Path) -> None:
    (busi_folder / "benign" / "benign (2)_mask.png").unlink()
    assert find(busi_folder, "busi").items[1].masks == ()


def test_busi_mask_without_image_is_a_fault_and_the_rest_survives(busi_folder: Path) -> None:
    (busi_folder / "malignant" / "malignant (3).png").unlink()
    listing = find(busi_folder, "busi")
    assert len(listing.items) == 17
    (fault,) = listing.rejected
    assert fault.file == "malignant/malignant (3)_mask.png"
    assert fault.reason.startswith(
        "is a mask without an image; an image named 'malignant (3)' must stand beside it"
    )


def test_busi_is_found_in_the_folder_of_its_archive(busi_folder: Path) -> None:
    assert len(find(busi_folder.parent).items) == 18


@pytest.mark.real
@pytest.mark.parametrize(
    ("folder", "images", "masks"), [("busi", 148, 156), ("busi_native", 7, 12)]
)
def test_real_busi_is_recognized(folder: str, images: int, masks: int, real_data: Path) -> None:
    listing = find(real_data / folder)
    assert listing.summary.startswith("busi: folders ")
    assert len(listing.items) == images
    assert sum(len(item.masks) for item in listing.items) == masks
    assert listing.rejected == []


@pytest.mark.real
def test_real_isic_is_recognized(real_data: Path) -> None:
    listing = find(real_data / "isic2017")
    assert (
        listing.summary
        == "paired: masks in a folder of their own such as 'masks/ISIC_0001769_segmentation.png'"
    )
    assert len(listing.items) == 63
    assert all(len(item.masks) == 1 for item in listing.items)
    assert listing.items[0].id == "ISIC_0001769"


# Paired


def test_paired_matches_every_mask_ending_and_allows_unlabeled(paired_folder: Path) -> None:
    items = find(paired_folder, "paired").items
    assert [item.id for item in items] == [f"case_{i}" for i in range(6)]
    assert [len(item.masks) for item in items] == [1, 1, 1, 1, 0, 0]


def test_paired_prefers_an_exact_name_over_an_ending(paired_folder: Path) -> None:
    save(paired_folder / "images" / "case_2_mask.png")
    masks = masks_of(find(paired_folder, "paired"))
    assert masks["case_2_mask"] == ["case_2_mask.png"]
    assert masks["case_2"] == []


def test_paired_mask_without_image_is_a_fault_and_the_rest_survives(paired_folder: Path) -> None:
    (paired_folder / "images" / "case_1.png").unlink()
    listing = find(paired_folder, "paired")
    assert len(listing.items) == 5
    assert [fault.file for fault in listing.rejected] == ["masks/case_1_segmentation.png"]
    assert listing.rejected[0].reason.startswith(
        "is a mask without an image; it must be named like an image"
    )


@pytest.mark.parametrize("images", ["images", "IMGS", "Image"])
@pytest.mark.parametrize("masks", ["Labels", "ground_truth", "annotations", "gt"])
def test_paired_knows_the_usual_folder_names_in_any_case(
    images: str, masks: str, tmp_path: Path
) -> None:
    save(tmp_path / images / "a.jpg")
    save(tmp_path / masks / "a_Label.PNG")
    save(tmp_path / "overview.png")
    assert masks_of(find(tmp_path)) == {"a": ["a_Label.PNG"]}


def test_paired_folders_may_lie_deep_and_hold_folders(tmp_path: Path) -> None:
    for part in ("train", "val"):
        save(tmp_path / part / "images" / "p1" / "a.png")
        save(tmp_path / part / "masks" / "p1" / "a.png")
    assert masks_of(find(tmp_path)) == {"train/p1/a": ["a.png"], "val/p1/a": ["a.png"]}


def test_paired_masks_may_stand_beside_images(tmp_path: Path) -> None:
    for name in ("a.jpg", "a_mask.png", "a_mask_2.png", "b.png", "c_gt.png"):
        save(tmp_path / name)
    listing = find(tmp_path)
    assert listing.summary.startswith("paired: masks beside their images")
    assert masks_of(listing) == {"a": ["a_mask.png", "a_mask_2.png"], "b": []}
    assert [fault.file for fault in listing.rejected] == ["c_gt.png"]


def test_images_may_lie_loose_beside_a_folder_of_masks(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "masks" / "a.png")
    assert masks_of(find(tmp_path)) == {"a": ["a.png"]}


# Flat


def test_flat_lists_pictures_at_any_depth(tmp_path: Path) -> None:
    for name in ("a10.png", "a9.JPG", "x/y/a.npy", "x/a.heic"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    for name in ("notes.txt", "x/README", "table.csv"):
        (tmp_path / name).write_text("x")
    listing = find(tmp_path)
    assert [(item.id, item.stratum) for item in listing.items] == [
        ("a9", ""),
        ("a10", ""),
        ("x/a", "x"),
        ("x/y/a", "x/y"),
    ]
    assert all(item.masks == () and item.outlines == "" for item in listing.items)
    assert listing.rejected == []
    assert listing.summary == "flat: 4 pictures such as 'a10.png', and no masks of any known layout"


def test_two_suffixes_of_one_stem_are_a_fault(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png")
    save(tmp_path / "x" / "a.bmp")
    listing = find(tmp_path)
    assert [item.source for item in listing.items] == ["x/a.bmp"]
    assert [fault.file for fault in listing.rejected] == ["x/a.png"]


def test_a_file_list_names_files_relative_or_absolute(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name in ("a.png", "b [1].png", "x/c.png", "d.png", ".hidden.png"):
        save(folder / name)
    outside = save(tmp_path / "other" / "o.png")
    lines = (
        "a.png",
        "",
        "# a comment",
        "./x/../b [1].png",
        str(folder / "x" / "c.png"),
        str(outside),
        "a.png",
    )
    file_list = tmp_path / "list.txt"
    file_list.write_bytes("\r\n".join((*lines, "gone.png", ".hidden.png")).encode("utf-8-sig"))
    listing = find(folder, file_list=str(file_list))
    assert {item.id for item in listing.items} == {
        "a",
        "b [1]",
        "x/c",
        str(outside.with_suffix("")),
        ".hidden",
    }
    assert all(Path(item.images[0]).is_file() for item in listing.items)
    assert [(fault.file, fault.action) for fault in listing.rejected] == [
        ("a.png", "repaired"),
        ("gone.png", "rejected"),
    ]
    assert f"is listed in {file_list}, but there is no such file" in listing.rejected[1].reason


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_list_of_windows_is_read(encoding: str, tmp_path: Path) -> None:
    save(tmp_path / "set" / "x" / "ä.png")
    file_list = tmp_path / "list.txt"
    file_list.write_bytes("x\\ä.png\r\n".encode(encoding))
    listing = find(tmp_path / "set", file_list=str(file_list))
    assert [item.id for item in listing.items] == ["x/ä"]


def test_a_file_list_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(
        DataError, match=r"file list .*gone\.txt cannot be read \(No such file or directory\)"
    ):
        find(tmp_path, file_list=str(tmp_path / "gone.txt"))
    with pytest.raises(DataError, match=r"file list .*a\.png is not text in UTF-8 or UTF-16"):
        find(tmp_path, file_list=str(tmp_path / "a.png"))


# LGG


def test_lgg_groups_by_patient(tmp_path: Path) -> None:
    for patient in ("TCGA_1", "TCGA_2"):
        for i in (1, 2, 10):
            save(tmp_path / patient / f"{patient}_{i}.tif")
            save(tmp_path / patient / f"{patient}_{i}_mask.tif")
    save(tmp_path / "TCGA_2" / "TCGA_2_11_mask.tif")
    save(tmp_path / "TCGA_3" / "1.tif")
    (tmp_path / "data.csv").write_text("Patient\n")
    listing = find(tmp_path)
    assert listing.summary == (
        "lgg: 2 folders of TIFF slices with masks such as 'TCGA_1/TCGA_1_1_mask.tif'"
    )
    assert [item.id for item in listing.items][:4] == [
        "TCGA_1_1",
        "TCGA_1_2",
        "TCGA_1_10",
        "TCGA_2_1",
    ]
    assert {item.group for item in listing.items} == {"TCGA_1", "TCGA_2", "TCGA_3"}
    assert listing.items[-1].id == "TCGA_3/1"
    assert [len(item.masks) for item in listing.items] == [1] * 6 + [0]
    assert [fault.file for fault in listing.rejected] == ["TCGA_2/TCGA_2_11_mask.tif"]


def test_the_site_of_lgg_is_in_the_barcode(tmp_path: Path) -> None:
    for patient in ("TCGA_CS_4941_19960909", "TCGA_DU_5849_19950405", "other"):
        save(tmp_path / patient / f"{patient}_1.tif")
        save(tmp_path / patient / f"{patient}_1_mask.tif")
    assert [item.site for item in find(tmp_path, "lgg").items] == ["CS", "DU", ""]


def test_lgg_slices_keep_all_their_masks_and_a_mask_of_a_mask_is_rejected(tmp_path: Path) -> None:
    for name in ("1.tif", "1_mask.tif", "1_MASK.tiff", "1_mask_mask.tif"):
        save(tmp_path / "TCGA" / name)
    listing = find(tmp_path, "lgg")
    assert masks_of(listing) == {"TCGA/1": ["1_MASK.tiff", "1_mask.tif"]}
    assert [file.file for file in listing.rejected] == ["TCGA/1_mask_mask.tif"]


# COCO

TRIANGLE = [[1.0, 1.0, 5.0, 1.0, 1.0, 5.0]]


def coco(path: Path, names: list[str], annotations: list[dict[str, Any]]) -> Path:
    images = [{"id": i, "file_name": name, "height": 6, "width": 8} for i, name in enumerate(names)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def outline(image: int, category: int = 1, segmentation: Any = TRIANGLE) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "segmentation": segmentation}


def segmentations(listing: Listing) -> dict[str, list[Any] | None]:
    return {
        i.id: json.loads(i.outlines)["segmentations"] if i.outlines else None for i in listing.items
    }


def test_coco_lists_outlines_and_images_without_any(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "unnamed.png"):
        save(tmp_path / "images" / name)
    annotations = [
        outline(0),
        outline(0, 2, TRIANGLE[0]),
        outline(9),
        {"image_id": 0, "category_id": 7},
    ]
    coco(
        tmp_path / "annotations" / "instances_train.json",
        ["a.png", "b.png", "gone.png"],
        annotations,
    )
    listing = find(tmp_path, lesion_labels=(1, 2))
    assert (
        listing.summary
        == "coco: an annotation file 'annotations/instances_train.json' with the keys of COCO"
    )
    assert segmentations(listing) == {"images/a": [TRIANGLE, TRIANGLE], "images/b": []}
    assert [(fault.file, fault.action) for fault in listing.rejected] == [
        ("annotations/instances_train.json", "repaired"),
        ("gone.png", "rejected"),
        ("images/unnamed.png", "rejected"),
    ]
    assert segmentations(find(tmp_path, lesion_labels=(2,)))["images/a"] == [TRIANGLE]


def test_coco_box_without_outline_is_unlabeled(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    coco(
        tmp_path / "any name.json",
        ["a.png"],
        [outline(0), {"image_id": 0, "category_id": 1, "bbox": [0, 0, 2, 2]}],
    )
    listing = find(tmp_path)
    assert segmentations(listing) == {"a": None}
    assert listing.rejected == [
        ("a.png", "repaired", "has a box without an outline: taken as unlabeled")
    ]


def test_coco_tells_pictures_of_one_name_apart_by_folder(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        save(tmp_path / part / "x.png")
        coco(
            tmp_path / part / "_annotations.coco.json",
            ["x.png"],
            [outline(0)] if part == "train" else [],
        )
    assert segmentations(find(tmp_path)) == {"train/x": [TRIANGLE], "valid/x": []}


def test_coco_knows_paths_of_other_machines_but_not_of_other_folders(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "val/c.png"):
        save(tmp_path / name)
    coco(tmp_path / "instances.json", ["C:\\scans\\a.png", "/home/me/b.png", "train/c.png"], [])
    listing = find(tmp_path)
    assert set(segmentations(listing)) == {"a", "b"}
    assert listing.rejected[0] == (
        "train/c.png",
        "rejected",
        "is named in instances.json, but there is no such picture below the folder",
    )


def test_coco_files_of_one_picture_are_united(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    coco(tmp_path / "instances_1.json", ["a.png"], [])
    coco(tmp_path / "instances_2.json", ["a.png"], [outline(0)])
    assert segmentations(find(tmp_path)) == {"a": [TRIANGLE]}


def test_damaged_coco_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "instances.json").write_text('{"images": [')
    with pytest.raises(DataError, match=r"the first fault: instances\.json is no valid JSON"):
        find(tmp_path, "coco")
    (tmp_path / "instances.json").write_text('{"images": {}}')
    with pytest.raises(DataError, match=r"instances\.json has no lists images and annotations"):
        find(tmp_path, "coco")


@pytest.mark.parametrize("bad", [[0], {"a": 1}, None, True])
def test_a_coco_id_that_is_neither_text_nor_number_rejects_its_entry(
    tmp_path: Path, bad: Any
) -> None:
    for name in ("a.png", "b.png"):
        save(tmp_path / name)
    images = [{"id": 1, "file_name": "a.png"}, {"id": bad, "file_name": "b.png"}]
    annotations = [outline(1), outline(bad), outline(1) | {"category_id": bad}]
    document = {"images": images, "annotations": annotations}
    (tmp_path / "instances.json").write_text(json.dumps(document))
    listing = find(tmp_path, "coco", lesion_labels=(1,))
    assert segmentations(listing) == {"a": [TRIANGLE]}
    reasons = " ".join(str(reject) for reject in listing.rejected)
    assert "an image without file_name or an id (text or number)" in reasons
    assert "1 annotation of images that it does not list" in reasons
    assert "1 annotation without a category_id" in reasons


# Recognizing


def test_busi_says_by_what_it_was_recognized(busi_folder: Path) -> None:
    assert find(busi_folder).summary == (
        "busi: folders benign, normal, malignant (of benign, malignant, normal) with masks such as "
        "'benign/benign (1)_mask.png'"
    )


def test_a_folder_of_two_layouts_must_be_told(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    save(tmp_path / "masks" / "a.png")
    coco(tmp_path / "instances.json", ["a.png"], [])
    (tmp_path / "v.nii.gz").write_bytes(b"?")
    with pytest.raises(DataError) as caught:
        find(tmp_path)
    message = str(caught.value)
    assert "fits several layouts (nifti: 1 NIfTI volume such as 'v.nii.gz'; coco: " in message
    assert "paired: masks in a folder of their own such as 'masks/a.png'" in message
    assert "--layout" in message
    assert len(find(tmp_path, "paired").items) == 1


def test_masks_that_fit_no_image_are_not_taken_for_images(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    save(tmp_path / "masks" / "b.png")
    listing = find(tmp_path)
    assert listing.summary.startswith("paired")
    assert [fault.file for fault in listing.rejected] == ["masks/b.png"]


@pytest.mark.parametrize(
    ("files", "layout"),
    [
        ({"a.dcm": b"", "preview.png": b""}, "dicom"),
        ({"x/IM0001": bytes(128) + b"DICM"}, "dicom"),
        ({"1.2.840.113": bytes(128) + b"DICM", "README": b"text"}, "dicom"),
        ({"t1/a.nii.gz": b""}, "nifti"),
        (
            {"dataset.json": b'{"training": [], "labels": {}}', "imagesTr/a.nii.gz": b""},
            "decathlon",
        ),
        ({"dataset.json": b'{"channel_names": {}}', "imagesTr/a.nii.gz": b""}, "nifti"),
        ({"benign/a.png": b"", "malignant/b.png": b"", "info.json": b'{"n": 1}'}, "flat"),
    ],
)
def test_layouts_are_told_by_names_and_first_bytes(
    files: dict[str, bytes], layout: str, tmp_path: Path
) -> None:
    from amlp_ray.data.layouts.detect import recognize
    from amlp_ray.data.layouts.listing import CachedListing

    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    layout_name, reason = recognize(CachedListing(tmp_path))
    assert layout_name == layout
    assert reason.startswith(f"{layout}: ")


def test_a_picture_alone_in_a_folder_beside_those_with_masks_is_an_image_without_masks(
    tmp_path: Path,
) -> None:
    for name in ("a", "b"):
        save(tmp_path / name / "images" / f"{name}.png")
        for number in (1, 2):
            save(tmp_path / name / "masks" / f"{number}.png")
    save(tmp_path / "c" / "c.png")
    save(tmp_path / "several" / "1.png")
    save(tmp_path / "several" / "2.png")
    listing = find(tmp_path, "folders")
    masks = {item.id: len(item.masks) for item in listing.items}
    assert masks == {"a": 2, "b": 2, "c": 0}
