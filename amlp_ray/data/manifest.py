"""The manifest of a patch dataset. It is written last: a folder without one is no dataset."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field

from amlp_ray.config import PrepareConfig
from amlp_ray.config.base import Config, build
from amlp_ray.data.parquet import Shape, image_bytes
from amlp_ray.data.path import DataPath
from amlp_ray.errors import ConfigError, DataError

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
UNFINISHED = ".preparing"  # folder that holds the state of a preparation until it ends
SPLITS = ("train", "val", "test")
# What keeps images together, by `group_by`.
GROUP_RULES = {
    "patient": "patient, as the layout tells",
    "near-duplicates": "near-duplicates by perceptual hash",
    "image": "every image by itself",
}

GroupUnit = Literal["patient", "group", "image"]


class Part(Config):
    """One Parquet file."""

    file: str  # relative to the dataset
    rows: int
    bytes: int


class Counts(Config):
    """Numbers of images of one split."""

    groups: int
    images: int
    labeled: int
    lesions: int  # labeled images whose mask is not empty
    kinds: dict[str, int] = Field(
        default_factory=dict
    )  # images of each class, site and column that the split balances


class Manifest(Config):
    """Contents and origin of a patch dataset."""

    format_version: Literal[3] = 3
    created_by: str  # amlp_ray and its version
    name: str
    layout: str  # as given or recognized
    channels: int
    height: int
    width: int
    dtype: Literal["uint8", "uint16", "int16", "float32"]
    mean: tuple[float, ...]  # per channel, in stored units, over the training split
    std: tuple[float, ...]
    counts: dict[str, Counts]
    parts: dict[str, list[Part]]
    group_rows: int  # rows of every row group but the last of a part
    split_rule: str
    group_rule: str
    left_out: int  # images in the source that the split file does not list
    rejected: int  # files that could not be used; <name>.rejects.csv beside the dataset lists them
    dropped: int  # tiles and slices with too little tissue
    salt: str | None  # mark of the salt of hashed names: tells two salts apart and reveals neither
    config: PrepareConfig
    fingerprint: str  # SHA-256 of the config and of the contents of all sources

    @property
    def shape(self) -> Shape:
        """Channels, height and width of every image."""
        return self.channels, self.height, self.width

    @property
    def group_unit(self) -> GroupUnit:
        """What a group is: the unit of statistics, since images of a group are alike."""
        if self.group_rule == GROUP_RULES["patient"]:
            return "patient"
        return "image" if self.group_rule == GROUP_RULES["image"] else "group"

    @property
    def image_bytes(self) -> int:
        """Bytes of one image as stored."""
        return image_bytes(self.shape, self.dtype)


def read_manifest(file: DataPath) -> Manifest:
    """Read a manifest.

    Raises:
        DataError: the file is no manifest, or one of another format version.
    """
    try:
        values = json.loads(file.read_bytes())
        version = values["format_version"]
    except (ValueError, KeyError, TypeError, OSError):
        raise DataError(
            f"{file} is not the manifest of a patch dataset; prepare the dataset again."
        ) from None
    if version != FORMAT_VERSION:
        is_newer = isinstance(version, int) and version > FORMAT_VERSION
        advice = "update amlp_ray" if is_newer else "prepare the dataset again"
        raise DataError(
            f"{file} has format version {version}, but this amlp_ray reads {FORMAT_VERSION}; "
            f"{advice}."
        )
    try:
        return build(Manifest, values, str(file))
    except ConfigError as error:
        raise DataError(f"{error} Prepare the dataset again.") from None
