"""Fine-tune a segmenter on labeled images and score it: for confirmation, not for search.

It costs 20 times a probe. The score is that on val at the threshold 0.5. Test images are scored
only where a confirmation asks for them by name.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amlp_ray.config import FaultToleranceConfig, ImageSpec, ResourceConfig, SegmentConfig
from amlp_ray.config.yaml_file import write_record
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import CheckpointError, ConfigError
from amlp_ray.evaluation.evaluate import SIZES, evaluate
from amlp_ray.evaluation.finetune import finetune
from amlp_ray.evaluation.labels import (
    check_fits,
    empty_count,
    empty_rows,
    labeled_rows,
    train_rows,
)
from amlp_ray.evaluation.metrics import mean_mask
from amlp_ray.evaluation.segmenter import WEIGHTS, Segmenter, save_segmenter
from amlp_ray.method.encoder import build_encoder
from amlp_ray.runtime.resources import check_machine, cluster_resources, jobs_side_by_side
from amlp_ray.runtime.session import ray_session
from amlp_ray.runtime.worker_context import WorkerContext
from amlp_ray.runtime.worker_group import run_group
from amlp_ray.training.checkpoint.pretrained import (
    ONLINE,
    check_patches,
    load_pretrained_encoder,
    pretrained_image_spec,
    read_pretrained_config,
    resolve_weights,
)
from amlp_ray.training.loggers.metrics_file import Metrics, RowTail
from amlp_ray.utils.csv_text import csv_text
from amlp_ray.utils.files import atomic_write, local_path
from amlp_ray.utils.json_files import read_json, seal_json
from amlp_ray.utils.retry import RetryPolicy
from amlp_ray.utils.run_dir import OtherRunError, RunDir

SCORE = "score.json"  # written last: with it, a fine-tuning is finished
IDENTITY = "segment.json"  # what a folder's fine-tuning is of, written first
RESULTS = ("checkpoint/epoch-*.pt", SCORE)  # what another fine-tuning must not replace
LOCK_WAIT_S = 5.0  # a process that was just killed has released the folder by then


def segment(
    data: PatchDataset | str | Path,
    encoder: str | Path,
    out: str | Path,
    config: SegmentConfig | None = None,
    *,
    name: str | None = None,
    from_scratch: bool = False,
    sizes: tuple[float, float] = SIZES,
    resources: ResourceConfig | None = None,
    fault_tolerance: FaultToleranceConfig | None = None,
    address: str | None = None,
    progress: Callable[[Metrics], None] = lambda metrics: None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Fine-tune on labeled training images, and score on val.

    Images without a lesion are among them as `config.empty_share` says.

    A fine-tuning of the same config in `out` is resumed; if it is finished, its score is returned.

    Args:
        data: a patch dataset with masks, or its path, of the shape and scale that the encoder was
            pretrained on.
        encoder: an exported encoder, a timm checkpoint or `timm:NAME` (see `pretrained.py`).
        name: of the timm ViT, for a timm checkpoint.
        from_scratch: keep the encoder's shape but not its weights: the baseline.
        sizes: what is a small and a large lesion, see `probe.sizes`.
        resources: one worker (the default) trains in this process, on `device`; more on Ray Train.
        address: of the Ray cluster; None: several workers start Ray on this machine.

    Returns:
        The score, also in `out/score.json`, beside `segmenter.safetensors` and `per_image.csv`.

    Raises:
        DataError: there are too few labeled images.
        ConfigError: the encoder was made for other images, or the decoder does not fit it.
        CheckpointError: `out` holds another fine-tuning, or the encoder cannot be read.
        AmlpError: resources are missing, or workers or the disk failed too often; run it again.
    """
    dataset = data if isinstance(data, PatchDataset) else PatchDataset.open(data)
    threads = None if resources is None else resources.threads
    resources = resources or ResourceConfig()
    tuning = Tuning(
        config or SegmentConfig(),
        resolve_weights(encoder),
        name,
        local_path(out),
        from_scratch,
        sizes,
        fault_tolerance or FaultToleranceConfig(),
        threads,
    )
    tuning.check(dataset, resources, address)
    run_dir = RunDir(tuning.out, IDENTITY, results=RESULTS)
    with run_dir.lock(wait_s=LOCK_WAIT_S):
        _claim(run_dir, tuning, dataset)
        score = read_json(tuning.out / SCORE)
        if score is None or not (tuning.out / WEIGHTS).is_file():
            write_record(tuning.config, tuning.out / "config.yaml")
            _train(tuning, dataset, resources, address, progress, device)
            score = read_json(tuning.out / SCORE)
    return score or {}


def _claim(run_dir: RunDir, tuning: Tuning, dataset: PatchDataset) -> None:
    """Take the folder for a fine-tuning.

    Raises:
        ConfigError: the folder holds a pretraining run.
        CheckpointError: it holds another fine-tuning.
    """
    out = tuning.out
    holds_pretraining = (out / "checkpoint").exists() or (out / "data.json").exists()
    if run_dir.read_identity() is None and holds_pretraining:
        raise ConfigError(f"{out} holds a pretraining run; give another --out for the segmenter.")
    try:
        run_dir.claim(tuning.identity(dataset))
    except OtherRunError as error:
        raise CheckpointError(
            f"{out} holds a fine-tuning with another {error}; give the same to resume it, or "
            f"another --out."
        ) from None


def _train(
    tuning: Tuning,
    dataset: PatchDataset,
    resources: ResourceConfig,
    address: str | None,
    progress: Callable[[Metrics], None],
    device: str,
) -> None:
    """Fine-tune in this process, or on workers."""
    if resources.is_single_worker and address is None:
        tuning.run(dataset, WorkerContext(device=device), progress)
        return
    rows = RowTail(tuning.out / "metrics.jsonl", progress)
    with ray_session(address):
        jobs_side_by_side(resources, cluster_resources())
        run_group(
            partial(_run_worker, dataset.path, tuning),
            resources,
            tuning.fault_tolerance,
            name=f"segment-{tuning.out.name}",
            folder=tuning.out,
            progress=lambda: rows.epoch,
            poll=rows.poll,
        )


def _run_worker(data: str, tuning: Tuning, worker: WorkerContext) -> None:
    """Run one worker's part of a fine-tuning."""
    tuning.run(PatchDataset.open(data), worker, lambda metrics: None)


@dataclass(frozen=True)
class Tuning:
    """One fine-tuning, as plain values that can be sent to a worker. Arguments as in `segment`."""

    config: SegmentConfig
    encoder: str
    name: str | None
    out: Path
    from_scratch: bool
    sizes: tuple[float, float]
    fault_tolerance: FaultToleranceConfig
    threads: int | None  # CPU threads of each worker; None: all

    def check(self, dataset: PatchDataset, resources: ResourceConfig, address: str | None) -> None:
        """Check resources, encoder, images and labels, before anything is written or loaded.

        Raises what `segment` raises.
        """
        self.config.check_workers(resources)
        check_machine(resources, address)
        spec = pretrained_image_spec(self.encoder, dataset.spec)
        check_fits(dataset, spec, f"{self.encoder} was trained on")
        model = read_pretrained_config(self.encoder, self.name)
        check_patches(model, dataset.spec)
        self.config.check_patch_size(model.patch_size)
        train_rows(dataset, self.config)
        labeled_rows(dataset, "val")

    def identity(self, dataset: PatchDataset) -> dict[str, Any]:
        """Return what the result follows from."""
        settings = self.config.model_dump(mode="json")
        identity = {f"settings.{key}": value for key, value in settings.items()}
        is_file = not self.encoder.startswith(ONLINE)
        model = read_pretrained_config(self.encoder, self.name)
        return identity | {
            "data": dataset.manifest.fingerprint,
            "encoder": _digest(Path(self.encoder)) if is_file else self.encoder,
            "model": model.model_dump(mode="json"),
            "from_scratch": self.from_scratch,
            "sizes": list(self.sizes),
        }

    def run(
        self, dataset: PatchDataset, worker: WorkerContext, progress: Callable[[Metrics], None]
    ) -> None:
        """Train as one worker of a group; the first one also scores and saves the segmenter."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        spec = pretrained_image_spec(self.encoder, dataset.spec)
        lesion_rows = train_rows(dataset, self.config)
        rows = np.concatenate([lesion_rows, empty_rows(dataset, self.config)])
        train = dataset.load("train", np.sort(rows))
        has_lesion = train.masks.any((1, 2))
        model, start = self._build(spec)
        model.to(worker.device)
        epochs = finetune(
            model,
            train,
            spec,
            self.config,
            self.out,
            worker=worker,
            fault_tolerance=self.fault_tolerance,
            progress=progress,
        )
        if not worker.is_first:
            return
        floor = mean_mask(train.masks[has_lesion])
        score, table = evaluate(model, dataset, "val", floor, spec, self.sizes)
        score |= {
            "num_labeled": len(lesion_rows),
            "num_empty_per_epoch": empty_count(
                len(lesion_rows), len(rows) - len(lesion_rows), self.config.empty_share
            ),
            "from_scratch": self.from_scratch,
            "encoder": self.encoder,
            "start": start,
            "seconds": sum(row["seconds"] for row in epochs),
        }

        def write() -> None:
            save_segmenter(
                model,
                self.out,
                encoder=read_pretrained_config(self.encoder, self.name),
                spec=spec,
                prepare=dataset.manifest.config,
                config=self.config,
            )
            rows = table.round(6).itertuples(index=False, name=None)
            atomic_write(self.out / "per_image.csv", csv_text(table.columns, rows))
            atomic_write(self.out / SCORE, seal_json(score))

        minutes = self.fault_tolerance.storage_minutes
        RetryPolicy(self.out, minutes=minutes).run(write, "the segmenter and its score")
        # Checkpoints are three times the size of the segmenter.
        shutil.rmtree(self.out / "checkpoint", ignore_errors=True)

    def _build(self, spec: ImageSpec) -> tuple[Segmenter, str]:
        """Build the segmenter, and describe the weights it begins with."""
        torch.manual_seed(self.config.seed)
        if self.from_scratch:
            # The start that pretraining has: timm's own would handicap the baseline.
            encoder = build_encoder(read_pretrained_config(self.encoder, self.name), spec)
            description = f"random weights in the shape of {self.encoder}"
            return Segmenter(encoder, spec, self.config), description
        pretrained = load_pretrained_encoder(self.encoder, spec, name=self.name)
        return Segmenter(pretrained.encoder, spec, self.config), pretrained.description


def _digest(path: Path) -> str:
    """Hash a weights file without the header of safetensors, which has a random order."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            file.seek(int.from_bytes(file.read(8), "little"), 1)
        return hashlib.file_digest(file, "sha256").hexdigest()
