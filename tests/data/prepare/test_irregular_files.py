"""Pipes, sockets and devices among the files of a user: told, and never read or waited for."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amlp_ray.config import PrepareConfig
from amlp_ray.data.layouts import find_items
from amlp_ray.data.path import DataPath
from amlp_ray.data.prepare.scan import scan_item
from amlp_ray.errors import DataError

pytestmark = pytest.mark.timeout(30)  # a reader of a pipe would wait for good


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


def write_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def faults(folder: Path, layout: str) -> dict[str, str]:
    """Return why items of a folder cannot be used, by id; empty for those that can."""
    config = PrepareConfig(layout=layout)
    listing = find_items(config, DataPath(folder))
    scanned = {item.id: scan_item(item, config).fault for item in listing.items}
    return scanned | {file.file: file.reason for file in listing.rejected}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_is_no_regular_file_is_told_and_the_others_are_used(
    tmp_path: Path, kind: str
) -> None:
    write_picture(tmp_path / "a.png")
    KINDS[kind](tmp_path / "b.png")
    result = faults(tmp_path, "flat")
    assert result["a"] == ""
    assert f"b.png cannot be read (it is a {kind}, not a regular file)" in result["b"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_is_no_regular_file_is_told(tmp_path: Path, kind: str) -> None:
    for name in "ab":
        write_picture(tmp_path / "images" / f"{name}.png")
    write_picture(tmp_path / "masks" / "a.png")
    KINDS[kind](tmp_path / "masks" / "b.png")
    assert f"it is a {kind}, not a regular file" in faults(tmp_path, "paired")["b"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("dicom", "IM0001"),
        ("dicom", "a.dcm"),
        ("nifti", "a.nii.gz"),
        ("decathlon", "dataset.json"),
        ("coco", "annotations.json"),
    ],
)
def test_every_layout_tells_of_files_that_are_not_regular(
    tmp_path: Path, kind: str, layout: str, name: str
) -> None:
    KINDS[kind](tmp_path / name)
    try:
        told = str(faults(tmp_path, layout))
    except DataError as error:
        told = str(error)
    assert f"it is a {kind}, not a regular file" in told


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_is_recognized_beside_them(tmp_path: Path, kind: str) -> None:
    write_picture(tmp_path / "a.png")
    for name in ("IM0001", "dataset.json", "annotations.json"):
        KINDS[kind](tmp_path / name)
    assert find_items(PrepareConfig(), DataPath(tmp_path)).layout == "flat"
