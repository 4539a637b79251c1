"""The manifest of a patch dataset. It is written last: a folder without one is no dataset.

It holds a digest of itself, and what the parts hold is compared with it when they are read.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from amlp_ray.config import PrepareConfig
from amlp_ray.config.base import Config, Count, build
from amlp_ray.data.parquet import Shape, StoredPart, image_bytes
from amlp_ray.data.path import DataPath
from amlp_ray.errors import ConfigError, DataError, describe_error
from amlp_ray.utils.json_files import JsonError, parse_json_mapping, seal_json, unseal

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
UNFINISHED = ".preparing"  # folder that holds the state of a preparation until it ends
SPLITS = ("train", "val", "test")
# What keeps images together, by `group_by`.
GROUP_RULES = {
    "patient": "patient, as the layout tells",
    "near-duplicates": "near-duplicates by perceptual hash",
    "image": "every image by itself",
}

PREPARE_AGAIN = "prepare the dataset again with `amlp-ray data prepare`"

GroupUnit = Literal["patient", "group", "image"]
Number = Annotated[int, Field(ge=0)]


class Part(Config):
    """One Parquet file."""

    # relative to the dataset
    file: Annotated[str, Field(pattern=r"^(train|val|test)/part-\d+\.parquet$")]
    rows: Count
    bytes: Count
    footer: str  # SHA-256 of the file's footer, by which all its values are found


class Counts(Config):
    """Numbers of images of one split."""

    groups: Number
    images: Number
    labeled: Number
    lesions: Number  # labeled images whose mask is not empty
    kinds: dict[str, int] = Field(
        default_factory=dict
    )  # images of each class, site and column that the split balances


class Manifest(Config):
    """Contents and origin of a patch dataset."""

    format_version: Literal[4] = 4
    created_by: str  # amlp_ray and its version
    name: str
    layout: str  # as given or recognized
    channels: Count
    height: Count
    width: Count
    dtype: Literal["uint8", "uint16", "int16", "float32"]
    mean: tuple[float, ...]  # per channel, in stored units, over the training split
    std: tuple[float, ...]
    counts: dict[str, Counts]
    parts: dict[str, list[Part]]
    group_rows: Count  # rows of every row group but the last of a part
    split_rule: str
    group_rule: str
    left_out: int  # images in the source that the split file does not list
    rejected: int  # files that could not be used; <name>.rejects.csv beside the dataset lists them
    dropped: int  # tiles and slices with too little tissue
    salt: str | None  # mark of the salt of hashed names: tells two salts apart and reveals neither
    config: PrepareConfig
    fingerprint: str  # SHA-256 of the config and of the contents of all sources

    @model_validator(mode="after")
    def _check_consistent(self) -> Manifest:
        for name, values in (("counts", self.counts), ("parts", self.parts)):
            if sorted(values) != sorted(SPLITS):
                raise ValueError(f"{name} must be of {', '.join(SPLITS)}")
        for split in SPLITS:
            images = self.counts[split].images
            rows = sum(part.rows for part in self.parts[split])
            if images != rows:
                raise ValueError(
                    f"counts of {split} are {images} images, but its parts hold {rows}"
                )
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) != self.channels:
                raise ValueError(f"{name} must have a number for each of {self.channels} channels")
        if min(self.std) <= 0:
            raise ValueError("std must be greater than 0")
        return self

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

    def stored_parts(self, root: DataPath, split: str) -> list[StoredPart]:
        """Return the parts of a split of the dataset in the folder `root`, in order."""
        return [
            StoredPart(
                str(root / part.file),
                part.rows,
                self.group_rows,
                part.footer,
                self.shape,
                self.dtype,
            )
            for part in self.parts[split]
        ]

    @property
    def image_bytes(self) -> int:
        """Bytes of one image as stored."""
        return image_bytes(self.shape, self.dtype)


def write_manifest(root: DataPath, manifest: Manifest) -> None:
    """Write the manifest of the dataset in a folder, with a digest of itself. Raises OSError."""
    (root / MANIFEST).atomic_write(seal_json(manifest.model_dump(mode="json")))


def read_manifest(file: DataPath) -> Manifest:
    """Read a manifest.

    Raises:
        DataError: the file is no manifest, one of another format version, or was changed.
    """
    try:
        values = parse_json_mapping(file.read_bytes())
        version = values["format_version"]
    except (JsonError, KeyError, OSError) as error:
        problem = "" if isinstance(error, KeyError) else f" ({describe_error(error)})"
        raise DataError(
            f"{file} is not the manifest of a patch dataset{problem}; {PREPARE_AGAIN}."
        ) from None
    if version != FORMAT_VERSION:
        is_newer = isinstance(version, int) and version > FORMAT_VERSION
        advice = "update amlp_ray" if is_newer else PREPARE_AGAIN
        raise DataError(
            f"{file} has format version {version}, but this amlp_ray reads {FORMAT_VERSION}; "
            f"{advice}."
        )
    try:
        return build(Manifest, unseal(values), str(file))
    except JsonError as error:
        raise DataError(f"{file} {error}; restore it, or {PREPARE_AGAIN}.") from None
    except ConfigError as error:
        raise DataError(f"{error} P{PREPARE_AGAIN[1:]}.") from None
