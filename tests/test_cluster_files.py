"""Cluster files are checked against the schema that Ray itself ships."""

import json
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml

FOLDER = Path(__file__).parents[1] / "cluster"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_launcher_file_fits_rays_schema(file: Path) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load(file.read_text()), schema)
