"""Method and training core need torch alone.

In an interpreter where Ray and Optuna cannot be imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from amlp_ray.data.dataset import PatchDataset

SCRIPT = """
import importlib, json, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "optuna", "optuna_dashboard"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
try:
    import ray
except ModuleNotFoundError:
    pass
else:
    sys.exit("the hook does not work")

import amlp_ray.method
import amlp_ray.training
for package in (amlp_ray.method, amlp_ray.training):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)

from amlp_ray.config import ProbeConfig
from amlp_ray.config.base import build
from amlp_ray.config.overrides import nest
from amlp_ray.config import PretrainConfig, SegmentConfig
from amlp_ray.launch.run_spec import RunSpec
from amlp_ray.launch.launcher import run_here
from amlp_ray.evaluation.segmentation import segment
from amlp_ray.data.dataset import PatchDataset
from pathlib import Path

data, out = sys.argv[1:]
tiny = {"epochs": 1, "batch_size": 12, "model.width": 24, "model.depth": 1, "model.heads": 2,
        "model.decoder_width": 16}
settings = build(PretrainConfig, nest(tiny), "test")
job = RunSpec(config=settings, data=data, folder=Path(out), rungs=(1,),
              probe=ProbeConfig(num_labeled=8, subsets=1, folds=2))
result = run_here(job)
tuned = segment(PatchDataset.open(data), result.encoder, Path(out) / "tuned",
                SegmentConfig(epochs=1, num_labeled=4))
loaded = sorted({name.partition(".")[0] for name in sys.modules} & {"ray", "optuna"})
print(json.dumps({"metrics": result.metrics, "dsc": tuned["dsc"], "loaded": loaded}))
"""


def test_pretraining_probe_and_fine_tuning_run_where_ray_and_optuna_are_not_installed(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(phantom_dataset.path), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["loaded"] == []
    assert printed["metrics"]["epoch"] == 1
    assert 0 <= printed["metrics"]["dsc"] <= 1
    assert 0 <= printed["dsc"] <= 1
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {
        "encoder.safetensors",
        "metrics.jsonl",
        "config.yaml",
        "score.json",
        "pictures",
        "checkpoint",
    } <= written
