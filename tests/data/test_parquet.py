"""Parts are read only where their columns have plain types."""

from __future__ import annotations

import base64
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.datasets import change_manifest, write_dataset

from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import open_batches
from amlp_ray.data.parquet import UNDECODABLE, StoredPart, _arrow_schemas, footer_digest, read_part
from amlp_ray.data.path import DataPath
from amlp_ray.errors import DataError


class Payload:
    """Makes a folder when it is unpickled, as an attacker would start a program."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def spoil(part: Path, column: str, marker: Path) -> None:
    """Replace a column by pickled objects, as a dataset's author could."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    table = pq.read_table(part)
    pickled = pa.array([pickle.dumps(Payload(marker))] * len(table), pa.large_binary())
    objects = pa.ExtensionArray.from_storage(ArrowPythonObjectType(), pickled)
    index = table.column_names.index(column)
    pq.write_table(table.set_column(index, column, objects), part)


@pytest.fixture
def spoilt(tmp_path: Path) -> PatchDataset:
    images = np.random.default_rng(0).integers(0, 255, (8, 1, 16, 16), dtype=np.uint8)
    dataset = write_dataset(tmp_path / "d", images)
    (part,) = (tmp_path / "d").rglob("*.parquet")
    spoil(part, "id", tmp_path / "executed")
    # An attacker gives the manifest all digests anew.
    told = {"bytes": part.stat().st_size, "footer": footer_digest(DataPath(part))}
    stored = dataset.manifest.parts["train"][0].model_dump() | told
    parts = {"train": [stored], "val": [], "test": []}
    change_manifest(tmp_path / "d", lambda values: values | {"parts": parts})
    return PatchDataset.open(tmp_path / "d")


def read_batches(dataset: PatchDataset) -> None:
    with open_batches(dataset, batch_size=4, seed=0, mode="mapped") as batches:
        next(iter(batches.epoch(1)))


@pytest.mark.parametrize(
    "read",
    [
        lambda dataset: dataset.load("train"),
        lambda dataset: dataset.table("train"),
        lambda dataset: dataset.to_ray_dataset("train"),
        lambda dataset: dataset[0],
        read_batches,
    ],
    ids=["load", "table", "rows of Ray", "sample", "batches"],
)
def test_a_column_that_would_be_unpickled_is_refused_before_it_is_read(
    spoilt: PatchDataset, tmp_path: Path, read: Callable[[PatchDataset], Any]
) -> None:
    with pytest.raises(DataError, match="columns of types that may run code"):
        read(spoilt)
    assert not (tmp_path / "executed").exists()


def test_the_payload_of_these_tests_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").is_dir()


def test_a_second_value_behind_the_schema_is_refused(tmp_path: Path) -> None:
    """Thrift takes the last value of a field, so that the first one could be a decoy."""
    schema = base64.b64encode(pa.schema([("id", pa.string())]).serialize().to_pybytes())
    length = bytes([len(schema) & 0x7F | 0x80, len(schema) >> 7])
    pair = b"ARROW:schema" + b"\x18" + length + schema
    assert list(_arrow_schemas(pair + b"\x00")) == [schema]
    assert list(_arrow_schemas(pair + b"\x08\x04\x04evil\x00")) == [UNDECODABLE]


def test_a_schema_that_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    """The text behind the name ARROW:schema is shorter than it says, so it is no base64."""
    file = tmp_path / "part.parquet"
    pq.write_table(pa.table({"id": ["a"]}), file)
    content = file.read_bytes()
    start = content.index(b"ARROW:schema") + len(b"ARROW:schema")
    file.write_bytes(content[:start] + b"\x19" + content[start + 1 :])
    with pytest.raises(DataError, match="columns of types that may run code"):
        read_part(StoredPart(str(file), 1, 1, "", (1, 4, 4), "uint8"), ["id"])
