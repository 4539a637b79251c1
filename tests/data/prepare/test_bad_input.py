"""Each kind of bad file in a clinic's folder is rejected or repaired, and the rest survives.

Kinds that can stand beside each other lie in one folder per layout, which is prepared once. Each is
then looked for in the list of rejects.
"""

from __future__ import annotations

import csv
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.datasets import change_manifest
from helpers.volumes import dicom, write_nifti
from PIL import Image

from amlp_ray.config import PrepareConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.manifest import SPLITS
from amlp_ray.data.prepare.pipeline import prepare
from amlp_ray.errors import AmlpError, DataError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(300)]

GOOD = 6  # good images beside the bad ones
SIDE = 40


@dataclass(frozen=True)
class Case:
    """A kind of bad input: what makes it in a folder, and the line of rejects.csv that it gets."""

    kind: str
    make: Callable[[Path], str]
    action: str
    reason: str


def _noise(*shape: int, seed: int = 0, high: int = 256, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


# Pictures, in the layout `paired`: images/<kind>.png with masks/<kind>.png.


def _content(name: str, content: bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / "images" / name).write_bytes(content)
        return name

    return make


def _picture(
    name: str, picture: Callable[[], Image.Image], **options: Any
) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        picture().save(folder / "images" / name, **options)
        return name

    return make


def _array(name: str, values: np.ndarray) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        np.save(folder / "images" / name, values, allow_pickle=True)
        return name

    return make


def _cut(name: str, share: float) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        file = folder / "images" / name
        Image.fromarray(_noise(SIDE, SIDE)).save(file)
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])
        return name

    return make


def _frames(name: str, count: int = 3) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        pages = [Image.fromarray(_noise(SIDE, SIDE, seed=i)) for i in range(count)]
        pages[0].save(folder / "images" / name, save_all=True, append_images=pages[1:])
        return name

    return make


def _link(name: str, to: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / "images" / name).symlink_to(folder / "images" / to)
        return name

    return make


def _with_mask(
    stem: str, mask: Callable[[Path], None], suffix: str = ".png"
) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        seed = zlib.crc32(stem.encode())
        Image.fromarray(_noise(SIDE, SIDE, seed=seed)).save(folder / "images" / f"{stem}.png")
        mask(folder / "masks" / f"{stem}{suffix}")
        return f"{stem}.png"

    return make


def _mask_only(name: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        Image.new("L", (SIDE, SIDE)).save(folder / "masks" / name)
        return name

    return make


def _png(bits: int, color: int, channels: int, size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    row = b"\0" + bytes(SIDE * channels * bits // 8)
    header = struct.pack(">IIBBBBB", *size, bits, color, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * SIDE)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def _clear_corner() -> Image.Image:
    pixels = np.repeat(_noise(SIDE, SIDE, 1, seed=3), 4, axis=2)
    pixels[..., 3] = 255
    pixels[:5, :5, 3] = 0
    return Image.fromarray(pixels, "RGBA")


def _turned() -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif}


def _save(mode: str, size: tuple[int, int] = (SIDE, SIDE)) -> Callable[[Path], None]:
    return lambda path: Image.new(mode, size, 0).save(path)


def _floats(value: float) -> np.ndarray:
    values = np.ones((SIDE, SIDE), np.float32)
    values[3, 4] = value
    return values


PICTURES = [
    Case("truncated PNG", _cut("cut.png", 0.6), "rejected", "damaged, cut off"),
    Case("truncated JPEG", _cut("cut1.jpg", 0.5), "rejected", "damaged, cut off"),
    Case("truncated TIFF", _cut("cut2.tif", 0.5), "rejected", "damaged, cut off"),
    Case("truncated BMP", _cut("cut3.bmp", 0.5), "rejected", "damaged, cut off"),
    Case(
        "PNG header only",
        _content("header.png", b"\x89PNG\r\n\x1a\n"),
        "rejected",
        "damaged, cut off",
    ),
    Case("zero-byte file", _content("empty.png", b""), "rejected", "is empty (0 bytes)"),
    Case(
        "text named .png", _content("text.png", b"patient refused"), "rejected", "is not a picture"
    ),
    Case(
        "web page named .jpg",
        _content("page.jpg", b"<!DOCTYPE html><html>404"),
        "rejected",
        "web page",
    ),
    Case(
        "DICOM named .png",
        _content("scan.png", bytes(128) + b"DICM" + bytes(40)),
        "rejected",
        "DICOM",
    ),
    Case("ZIP named .png", _content("zip.png", b"PK\x03\x04" + bytes(40)), "rejected", "ZIP"),
    Case("PDF named .png", _content("report.png", b"%PDF-1.7\n%"), "rejected", "PDF"),
    Case("gzip named .png", _content("gz.png", b"\x1f\x8b\x08\0" + bytes(20)), "rejected", "gzip"),
    Case(
        "HEIC photograph",
        _content("photo.jpg", b"\0\0\0\x18ftypheic" + bytes(20)),
        "rejected",
        "HEIC",
    ),
    Case(
        "Git LFS pointer",
        _content("lfs.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "rejected",
        "Git LFS pointer",
    ),
    Case("16-bit RGB PNG", _content("rgb16.png", _png(16, 2, 3)), "rejected", "16 bits"),
    Case("16-bit RGBA PNG", _content("rgba16.png", _png(16, 6, 4)), "rejected", "16 bits"),
    Case(
        "8-bit among",
        _array("float.npy", np.ones((SIDE, SIDE), np.float32)),
        "rejected",
        "is float32, but most",
    ),
    Case(
        "16-bit gray among 8",
        _content("gray16.png", _png(16, 0, 1)),
        "rejected",
        "is uint16, but most",
    ),
    Case("animated GIF", _frames("film.gif"), "rejected", "holds 3 frames"),
    Case("multi-page TIFF", _frames("pages.tif"), "rejected", "holds 3 frames"),
    Case("animated PNG", _frames("film1.png"), "rejected", "holds 3 frames"),
    Case(
        "image bomb",
        _content("bomb.png", _png(8, 0, 1, (60000, 60000))),
        "rejected",
        "are the most",
    ),
    Case("link to nothing", _link("gone.png", "nowhere.png"), "rejected", "which does not exist"),
    Case("link to itself", _link("self.png", "self.png"), "rejected", "symbolic links"),
    Case("NaN pixels", _array("nan.npy", _floats(np.nan)), "rejected", "NaN or infinite"),
    Case("infinite pixels", _array("inf.npy", _floats(np.inf)), "rejected", "NaN or infinite"),
    Case(
        "Python objects",
        _array("object.npy", np.array([[{}] * 9] * 9, object)),
        "rejected",
        "Python objects",
    ),
    Case("complex numbers", _array("complex.npy", np.ones((9, 9), complex)), "rejected", "complex"),
    Case("four dimensions", _array("four.npy", np.ones((2, 3, 9, 9))), "rejected", "has the shape"),
    Case("no pixels", _array("none.npy", np.ones((0, 9))), "rejected", "has the shape"),
    Case("huge integers", _array("huge.npy", np.full((9, 9), 2**40)), "rejected", "whole numbers"),
    Case(
        "two channels among one",
        _array("two.npy", _noise(SIDE, SIDE, 2)),
        "rejected",
        "has 2 channels",
    ),
    Case(
        "mask of other size",
        _with_mask("m-size", _save("L", (9, 9))),
        "rejected",
        "mask of 9x9 pixels",
    ),
    Case(
        "mask that is none",
        _with_mask("m-text", lambda p: p.write_bytes(b"x")),
        "rejected",
        "is not a picture",
    ),
    Case(
        "mask of zero bytes",
        _with_mask("m-empty", lambda p: p.write_bytes(b"")),
        "rejected",
        "is empty",
    ),
    Case("mask without image", _mask_only("orphan.png"), "rejected", "without an image"),
    Case(
        "CMYK",
        _picture("cmyk.jpg", lambda: Image.new("CMYK", (SIDE, SIDE), (9, 80, 7, 3))),
        "repaired",
        "CMYK",
    ),
    Case(
        "transparent pixels",
        _picture("clear.png", _clear_corner),
        "repaired",
        "transparency was ignored",
    ),
    Case(
        "orientation tag",
        _picture("turned.jpg", lambda: Image.fromarray(_noise(SIDE, 30, seed=5)), **_turned()),
        "repaired",
        "orientation 6",
    ),
]

# Two of one name: the first is kept.
TWINS = Case(
    "same id twice",
    _picture("good 1.tif", lambda: Image.new("L", (SIDE, SIDE), 9)),
    "rejected",
    "has the id",
)
PICTURES.append(TWINS)

# Odd, but good: nothing is told, and the image is there.
ODD_NAMES = (
    "new\nline",
    "[brackets] (1)",
    "Ünïcödé 超音波",
    "  spaces  ",
    'quote\'s "and" comma,',
    "%s{0}$HOME",
    "-rf",
)


@dataclass(frozen=True)
class Prepared:
    ids: set[str]
    rejects: list[dict[str, str]]
    dataset: PatchDataset


def _prepared(source: Path, out: Path, **config: Any) -> Prepared:
    values = {"size": 32, "group_by": "image", "fractions": (1, 0, 0)} | config
    dataset = prepare(source, out, PrepareConfig.model_validate(values))
    with out.with_name(f"{out.name}.rejects.csv").open(newline="") as file:
        rejects = list(csv.DictReader(file))
    return Prepared(
        {name for split in SPLITS for name in dataset.load(split).ids}, rejects, dataset
    )


@pytest.fixture(scope="module")
def pictures(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("images", "masks"):
        (folder / "in" / name).mkdir(parents=True)
    names = [f"good {i}" for i in range(GOOD)] + list(ODD_NAMES)
    for i, name in enumerate(names):
        Image.fromarray(_noise(SIDE, SIDE, seed=100 + i)).save(
            folder / "in" / "images" / f"{name}.png"
        )
        Image.fromarray(np.eye(SIDE, dtype=np.uint8) * 255).save(
            folder / "in" / "masks" / f"{name}.png"
        )
    for case in PICTURES:
        case.make(folder / "in")
    (folder / "in" / "images" / "loop").symlink_to(
        folder / "in" / "images"
    )  # a folder that holds itself
    (folder / "in" / "images" / ".hidden.png").write_bytes(b"")
    return _prepared(folder / "in", folder / "out", layout="paired")


@pytest.mark.parametrize("case", PICTURES, ids=lambda case: case.kind)
def test_bad_pictures(case: Case, pictures: Prepared, tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    file = case.make(tmp_path)
    rows = [row for row in pictures.rejects if Path(row["file"]).name == file]
    assert len(rows) == 1, rows
    assert rows[0]["action"] == case.action
    assert case.reason in rows[0]["reason"]
    if case is not TWINS:
        assert (Path(file).stem in pictures.ids) == (case.action == "repaired")


def test_the_rest_of_the_pictures_survives(pictures: Prepared) -> None:
    repaired = {Path(row["file"]).stem for row in pictures.rejects if row["action"] == "repaired"}
    assert pictures.ids == {f"good {i}" for i in range(GOOD)} | set(ODD_NAMES) | repaired
    assert len(pictures.rejects) == len(PICTURES)
    assert pictures.dataset.manifest.rejected == len(PICTURES) - len(repaired)
    train = pictures.dataset.load("train")
    good = train.images[train.ids.index("good 1")][0]
    whole = Image.fromarray(_noise(SIDE, SIDE, seed=101)).resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(good, np.asarray(whole))


# Masks whose values are labels


LABELS = [
    Case(
        "values outside the labels",
        _with_mask("outside", lambda p: Image.fromarray(_noise(SIDE, SIDE, high=2) * 7).save(p)),
        "repaired",
        "counted as no lesion",
    ),
    Case(
        "labels in color",
        _with_mask("color", lambda p: Image.fromarray(_noise(SIDE, SIDE, 3)).save(p)),
        "rejected",
        "mask in colors",
    ),
    Case(
        "labels as JPEG",
        _with_mask("jpeg", _save("L"), ".jpg"),
        "rejected",
        "is a JPEG, which blurs",
    ),
]


@pytest.mark.parametrize("case", LABELS, ids=lambda case: case.kind)
def test_bad_labels(case: Case, tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / "in" / name).mkdir(parents=True)
    _with_mask("good", lambda p: Image.fromarray(_noise(SIDE, SIDE, high=3)).save(p))(
        tmp_path / "in"
    )
    file = case.make(tmp_path / "in")
    prepared = _prepared(tmp_path / "in", tmp_path / "out", layout="paired", lesion_labels=(1, 2))
    assert [Path(row["file"]).name for row in prepared.rejects] == [file]
    assert prepared.rejects[0]["action"] == case.action
    assert case.reason in prepared.rejects[0]["reason"]
    assert prepared.ids == {"good"} | ({Path(file).stem} if case.action == "repaired" else set())


# Volumes


def _volume(
    name: str, values: np.ndarray, label: np.ndarray | None = None, **options: Any
) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        write_nifti(folder / f"{name}.nii.gz", values, **options)
        if label is not None:
            write_nifti(folder / f"{name}_seg.nii.gz", label)
        return f"{name}.nii.gz"

    return make


def _broken_gz(name: str, share: float) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        file = write_nifti(folder / f"{name}.nii.gz", _noise(20, 20, 4, dtype=np.int16))
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])
        return file.name

    return make


def _plain(name: str, content: bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return name

    return make


SCAN = _noise(20, 20, 4, high=900, dtype=np.int16)
NAN = SCAN.astype(np.float32)
NAN[3, 3, 1] = np.nan

VOLUMES = [
    Case("NaN volume", _volume("nan", NAN), "rejected", "NaN"),
    Case(
        "label of other shape",
        _volume("shape", SCAN, np.ones((20, 20, 5), np.uint8)),
        "rejected",
        "shape",
    ),
    Case("cut gzip", _broken_gz("cut", 0.5), "rejected", "cannot be unzipped"),
    Case("zero-byte volume", _plain("empty.nii", b""), "rejected", "is empty"),
    Case(
        "no NIfTI inside",
        _plain("text.nii", b"not a volume" * 99),
        "rejected",
        "does not begin as NIfTI files do",
    ),
    Case(
        "five dimensions",
        _volume("five", _noise(9, 9, 4, 2, 2, dtype=np.int16)),
        "rejected",
        "three axes",
    ),
    Case(
        "many time points", _volume("fmri", _noise(9, 9, 2, 40, dtype=np.int16)), "rejected", "40"
    ),
    Case(
        "complex volume",
        _volume("complex", np.ones((9, 9, 3), np.complex64)),
        "rejected",
        "values of kind complex64",
    ),
    Case(
        "two channels among one",
        _volume("two", _noise(20, 20, 4, 2, dtype=np.int16)),
        "rejected",
        "2 channels",
    ),
]


LABEL = np.pad(np.ones((8, 8, 4), np.uint8), ((4, 8), (4, 8), (0, 0)))


@pytest.fixture(scope="module")
def volumes(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("volumes")
    for i in range(GOOD):
        write_nifti(folder / "in" / f"good{i}.nii.gz", SCAN + np.int16(i))
        write_nifti(folder / "in" / f"good{i}_seg.nii.gz", LABEL)
    for case in VOLUMES:
        case.make(folder / "in")
    return _prepared(folder / "in", folder / "out", layout="nifti", group_by="auto")


@pytest.mark.parametrize("case", VOLUMES, ids=lambda case: case.kind)
def test_bad_volumes(case: Case, volumes: Prepared, tmp_path: Path) -> None:
    file = case.make(tmp_path)
    rows = [row for row in volumes.rejects if Path(row["file"]).name == file]
    assert len(rows) == 1, rows
    assert rows[0]["action"] == case.action
    assert case.reason in rows[0]["reason"]


def test_the_rest_of_the_volumes_survives(volumes: Prepared) -> None:
    assert {name.rpartition("/")[0] for name in volumes.ids} == {f"good{i}" for i in range(GOOD)}
    assert len(volumes.ids) == GOOD * 4


def test_a_case_that_lacks_a_modality_is_rejected(tmp_path: Path) -> None:
    for case in ("A", "B", "C"):
        for modality in ("t1", "t1ce", "t2", "flair"):
            if (case, modality) != ("B", "t2"):
                write_nifti(tmp_path / "in" / case / f"{case}_{modality}.nii.gz", SCAN)
    prepared = _prepared(tmp_path / "in", tmp_path / "out", layout="nifti", group_by="auto")
    assert {name.rpartition("/")[0] for name in prepared.ids} == {"A", "C"}
    assert any("t2" in row["reason"] and "B" in row["file"] for row in prepared.rejects)


# DICOM


def _dicom_file(
    name: str, change: Callable[[bytes], bytes] = bytes, **elements: Any
) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        dataset = dicom(_noise(16, 16, dtype=np.int16), **elements)
        if elements.pop("bare", None):
            del dataset.PixelData
        dataset.save_as(folder / name, enforce_file_format=True)
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        return name

    return make


def _without_pixels(name: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        dataset = dicom(_noise(16, 16, dtype=np.int16))
        del dataset.PixelData
        dataset.save_as(folder / name, enforce_file_format=True)
        return name

    return make


DICOMS = [
    Case(
        "cut DICOM",
        _dicom_file("cut.dcm", lambda content: content[:-300]),
        "rejected",
        "cannot be decoded",
    ),
    Case("text named .dcm", _plain("text.dcm", b"no scan"), "rejected", "DICOM"),
    Case("zero-byte DICOM", _plain("empty.dcm", b""), "rejected", "is none"),
    Case("no pixel data", _without_pixels("bare.dcm"), "rejected", "pixel"),
]


@pytest.fixture(scope="module")
def dicoms(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("dicoms")
    (folder / "in").mkdir()
    for i in range(GOOD):
        _dicom_file(f"good{i}.dcm", PatientID=f"P{i}")(folder / "in")
    shutil.copy(folder / "in" / "good0.dcm", folder / "in" / "good0-again.dcm")
    for case in DICOMS:
        case.make(folder / "in")
    return _prepared(folder / "in", folder / "out", layout="dicom", group_by="auto")


@pytest.mark.parametrize("case", DICOMS, ids=lambda case: case.kind)
def test_bad_dicom(case: Case, dicoms: Prepared, tmp_path: Path) -> None:
    file = case.make(tmp_path)
    rows = [row for row in dicoms.rejects if Path(row["file"]).name == file]
    assert len(rows) == 1, rows
    assert rows[0]["action"] == case.action
    assert case.reason in rows[0]["reason"]


def test_the_rest_of_the_dicom_survives_and_a_copy_counts_once(dicoms: Prepared) -> None:
    assert len(dicoms.ids) == GOOD
    assert sum("copy" in row["reason"] for row in dicoms.rejects) == 1
    assert len(dicoms.rejects) == len(DICOMS) + 1


# Folders, settings and datasets that cannot be used at all: one sentence, nothing half-written


def _good_folder(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(_noise(SIDE, SIDE, seed=i)).save(folder / f"{i}.png")
    return folder


def _prepare(source: Path, out: Path, **config: Any) -> PatchDataset:
    return prepare(
        source, out, PrepareConfig.model_validate({"layout": "flat", "size": 32} | config)
    )


def _empty(folder: Path) -> None:
    (folder / "in").mkdir()
    _prepare(folder / "in", folder / "out")


def _split_file(content: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        (folder / "splits.json").write_text(content)
        _prepare(
            _good_folder(folder / "in"), folder / "out", split_file=str(folder / "splits.json")
        )

    return run


def _group_file(content: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        (folder / "groups.csv").write_text(content)
        _prepare(_good_folder(folder / "in"), folder / "out", group_file=str(folder / "groups.csv"))

    return run


def _all_bad(folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "in" / "a.png").write_bytes(b"x")
    _prepare(folder / "in", folder / "out")


def _file_list(content: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        (folder / "list.txt").write_text(content)
        _prepare(_good_folder(folder / "in"), folder / "out", file_list=str(folder / "list.txt"))

    return run


def _with_manifest(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        dataset = _prepare(_good_folder(folder / "in"), folder / "out")
        change_manifest(dataset.root.local, change)
        PatchDataset.open(folder / "out")

    return run


def _with_part(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        dataset = _prepare(_good_folder(folder / "in"), folder / "out", fractions=(1, 0, 0))
        part = dataset.files("train")[0].local
        part.write_bytes(change(part.read_bytes()))
        PatchDataset.open(folder / "out").load("train")

    return run


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return (
        content[:middle]
        + bytes(255 - b for b in content[middle : middle + 9])
        + content[middle + 9 :]
    )


WHOLE: list[tuple[str, Callable[[Path], Any], str]] = [
    (
        "missing folder",
        lambda f: _prepare(f / "gone", f / "out"),
        r"There is no folder .*gone; check the path",
    ),
    (
        "a file for a folder",
        lambda f: _prepare(f, f / "out") if (f / "x").touch() else _prepare(f / "x", f / "out"),
        r"x is a file, but a folder",
    ),
    ("empty folder", _empty, r"in holds nothing"),
    ("no usable file", _all_bad, r"None of 1 image can be used\. The first: .*a\.png"),
    (
        "layout that does not fit",
        lambda f: _prepare(_good_folder(f / "in"), f / "out", layout="lgg"),
        "lgg",
    ),
    (
        "patients nobody knows",
        lambda f: _prepare(_good_folder(f / "in"), f / "out", group_by="patient"),
        "does not know the patients of all images",
    ),
    (
        "channels nobody has",
        lambda f: _prepare(_good_folder(f / "in"), f / "out", channels=5),
        "None of 4 images can be used.*has 1 channels, but the dataset has 5",
    ),
    ("split file that is no JSON", _split_file("{"), r"splits\.json is no valid JSON"),
    (
        "split file of unknown ids",
        _split_file('{"train": ["zz"]}'),
        r"lists 1 image that the source does not have",
    ),
    (
        "split file with an id twice",
        _split_file('{"train": ["0"], "val": ["0"]}'),
        r"lists '0' in train and in val",
    ),
    ("split file without train", _split_file('{"val": ["0"]}'), "lists no images for train"),
    ("group file without columns", _group_file("a,b\n1,2\n"), "columns a, b"),
    (
        "group file that leaves one out",
        _group_file("id,group\n0,a\n1,a\n2,b\n"),
        "has no group for 1 of 4",
    ),
    (
        "group file with two groups",
        _group_file("id,group\n0,a\n0,b\n1,a\n2,b\n3,c\n"),
        "gives '0' two groups",
    ),
    ("file list of nothing", _file_list("# none\n"), r"list\.txt names no file"),
    (
        "manifest of a newer version",
        _with_manifest(lambda m: m | {"format_version": 99}),
        "has format version 99",
    ),
    (
        "manifest with an unknown key",
        _with_manifest(lambda m: m | {"future": 1}),
        "unknown setting 'future'",
    ),
    (
        "manifest without parts",
        _with_manifest(lambda m: {k: m[k] for k in m if k != "parts"}),
        "parts is missing",
    ),
    ("cut Parquet part", _with_part(lambda c: c[:-20]), "is damaged: it has"),
    ("corrupted Parquet part", _with_part(_flipped), "is damaged"),
    ("Parquet part of zeros", _with_part(lambda c: bytes(len(c))), "is damaged"),
]


@pytest.mark.parametrize(("kind", "run", "sentence"), WHOLE, ids=[kind for kind, _, _ in WHOLE])
def test_what_cannot_be_used_at_all(
    kind: str, run: Callable[[Path], Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(AmlpError, match=sentence) as caught:
        run(tmp_path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    if not kind.startswith(("manifest", "cut", "corrupted", "Parquet")):
        assert not (tmp_path / "out").exists()


# What the machine does to us


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_told_and_space_lets_it_go_on(small_disk: Path, tmp_path: Path) -> None:
    source = _good_folder(tmp_path / "in", count=60)
    with pytest.raises(DataError, match=r"cannot be written \(.*[Nn]o space left.*\)") as caught:
        _prepare(source, small_disk / "out", size=128)
    assert caught.value.exit_code == 2
    with pytest.raises(DataError, match="was not finished"):
        PatchDataset.open(small_disk / "out")
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert len(_prepare(source, small_disk / "out", size=128)) == 60


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_a_file_without_rights_is_told(tmp_path: Path) -> None:
    source = _good_folder(tmp_path / "in")
    (source / "1.png").chmod(0)
    for folder in (source, *source.parents):
        if Path(tempfile.gettempdir()) in folder.parents:
            folder.chmod(0o755)
    code = (
        "import os, sys\n"
        "from amlp_ray.data.prepare.scan import scan_item\n"
        "from amlp_ray.data.layouts import SourceImage\n"
        "from amlp_ray.config import PrepareConfig\n"
        "def reason(name):\n"
        "    path = f'{sys.argv[1]}/{name}.png'\n"
        "    item = SourceImage(name, 'picture', (path,), (), path)\n"
        "    return scan_item(item, PrepareConfig()).fault\n"
        # The first call imports all: the other user may not see where we are installed.
        "reason('0')\n"
        "os.setuid(65534)\n"
        "print(reason('0')); print(reason('1'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True
    )
    good, bad = done.stdout.splitlines()
    assert good == ""
    assert "1.png may not be read (permission denied)" in bad


def test_there_are_at_least_60_kinds() -> None:
    """The number that was promised; a full disk, rights, modalities and odd names come on top."""
    assert len(PICTURES) + len(LABELS) + len(VOLUMES) + len(DICOMS) + len(WHOLE) >= 60
