"""`segment`: fine-tune a segmenter on labelled images, and score it. For confirmation, not for search.

It costs 20 times a probe. Scored on val by the threshold 0.5; on test where a confirmation asks for it by name, and
nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from amlp_ray.config import FaultToleranceConfig, ResourceConfig, SegmentConfig
from amlp_ray.config.yaml_file import write_yaml
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.errors import CheckpointError, ConfigError
from amlp_ray.evaluation.evaluate import SIZES, evaluate
from amlp_ray.evaluation.finetune import finetune
from amlp_ray.evaluation.labels import check_fits, labeled_rows, train_rows
from amlp_ray.evaluation.metrics import mean_mask
from amlp_ray.evaluation.segmenter import WEIGHTS, Segmenter, save_segmenter
from amlp_ray.method.encoder import build_encoder
from amlp_ray.runtime.resources import cluster_resources, jobs_side_by_side, machine_resources
from amlp_ray.runtime.session import is_joined, ray_session
from amlp_ray.runtime.worker_group import WorkerContext, run_group
from amlp_ray.training.checkpoint.pretrained import (
    ONLINE,
    check_patches,
    located,
    starting_encoder,
    starting_model,
    starting_spec,
)
from amlp_ray.training.loggers.metrics_file import Metrics, NewRows
from amlp_ray.utils.files import atomic_write
from amlp_ray.utils.retry import RetryPolicy
from amlp_ray.utils.run_dir import OtherRunError, RunDir

SCORE = "score.json"  # written last: with it, a fine-tuning is finished
RUN = "segment.json"  # what a folder's fine-tuning is of, written first
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
    """Fine-tune on labelled training images with a lesion and score on val.

    A folder `out` that holds a fine-tuning of the same settings is resumed; of a finished one, the score is returned.

    Args:
        data: a patch dataset with masks, or its path; need not be what the encoder was pretrained on, but must be of
            its shape and scale. `amlp-ray data check A --against B` tells whether val images are among those of the
            pretraining set.
        encoder: an exported encoder, whose mean and SD normalise the images; or a timm checkpoint, or `timm:NAME`, for
            which the images' own do (see `starting_encoder`). `from_scratch` keeps the shape but not the weights: the
            baseline.
        name: the timm ViT that a timm checkpoint is of.
        sizes: what counts as a small and as a large lesion, see `probe.sizes`.
        resources: one worker (the default) trains in this process, on `device`; more on Ray Train.
        faults: what the run bears before it gives up.
        address: of the Ray cluster to run on; without one, several workers start Ray here.
        progress: called with the metrics of every epoch.

    Returns:
        Scores, as written to `out/score.json` next to `segmenter.safetensors`, `per_image.csv` and `config.yaml`.

    Raises:
        DataError: too few labelled images. ConfigError: the encoder was made for other images, or the decoder does
        not go with it. CheckpointError: `out` holds another fine-tuning, or the encoder cannot be read. ResourceError:
        there is no room. WorkerLostError, StorageError: more went wrong than `faults` bears; run it again.
    """
    dataset = data if isinstance(data, PatchDataset) else PatchDataset.open(data)
    config, out = config or SegmentConfig(), Path(out).absolute()
    threads = None if resources is None else max(1, int(resources.cpus_per_worker))
    resources, fault_tolerance = (
        resources or ResourceConfig(),
        fault_tolerance or FaultToleranceConfig(),
    )
    config.check_workers(resources)
    if address is None and (resources.is_single_worker or not is_joined()):
        jobs_side_by_side(resources, machine_resources())
    tuning = Tuning(
        config, located(encoder), name, out, from_scratch, sizes, fault_tolerance, threads
    )
    tuning.check(dataset)
    run_dir = RunDir(
        out, RUN, results=("checkpoint/epoch-*.pt", SCORE), outputs=(SCORE, WEIGHTS)
    )
    with run_dir.lock(wait_s=LOCK_WAIT_S):
        _claim(run_dir, tuning, dataset)
        if not run_dir.is_complete:
            write_yaml(config, out / "config.yaml")
            _train(tuning, dataset, resources, address, progress, device)
    return _finished(out)


def _train(
    tuning: Tuning,
    dataset: PatchDataset,
    resources: ResourceConfig,
    address: str | None,
    progress: Callable[[Metrics], None],
    device: str,
) -> None:
    """Fine-tune in this process, or on workers."""
    out, fault_tolerance = tuning.out, tuning.fault_tolerance
    if resources.is_single_worker and address is None:
        tuning.run(dataset, WorkerContext(device=device), progress)
        return
    rows = NewRows(out / "metrics.jsonl", progress)
    with ray_session(address):
        jobs_side_by_side(resources, cluster_resources())
        task = partial(_run_worker, dataset.path, tuning)
        run_group(
            task,
            resources,
            fault_tolerance,
            name=f"segment-{out.name}",
            folder=out,
            progress=lambda: rows.epoch,
            poll=rows.look,
        )


@dataclass(frozen=True)
class Tuning:
    """One fine-tuning: plain values, so that it travels to a worker as it is."""

    config: SegmentConfig
    encoder: str
    name: str | None
    out: Path
    from_scratch: bool
    sizes: tuple[float, float]
    fault_tolerance: FaultToleranceConfig
    threads: int | None  # CPU threads of each worker; None: as many as there are

    def check(self, dataset: PatchDataset) -> None:
        """Raise what `segment` raises of its input, before anything is written or loaded."""
        check_fits(
            dataset, starting_spec(self.encoder, dataset.spec), f"{self.encoder} was trained on"
        )
        model = starting_model(self.encoder, self.name)
        check_patches(model, dataset.spec)
        self.config.check_patch_size(model.patch_size)
        train_rows(dataset, self.config)
        labeled_rows(dataset, "val")

    def described(self, dataset: PatchDataset) -> dict[str, Any]:
        """What its result follows from."""
        return {
            **{
                f"settings.{key}": value
                for key, value in self.config.model_dump(mode="json").items()
            },
            "data": dataset.manifest.fingerprint,
            "encoder": self.encoder
            if self.encoder.startswith(ONLINE)
            else _digest(Path(self.encoder)),
            "model": starting_model(self.encoder, self.name).model_dump(mode="json"),
            "from_scratch": self.from_scratch,
            "sizes": list(self.sizes),
        }

    def run(
        self, dataset: PatchDataset, member: WorkerContext, progress: Callable[[Metrics], None]
    ) -> None:
        """Train as this member of a group, and score as its first."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        config, spec = self.config, starting_spec(self.encoder, dataset.spec)
        train = dataset.load("train", train_rows(dataset, config))
        torch.manual_seed(config.seed)
        shape = starting_model(self.encoder, self.name)
        if self.from_scratch:
            # The start that pretraining has, not timm's: anything else would handicap the baseline.
            vit, told = build_encoder(shape, spec), f"random weights in the shape of {self.encoder}"
        else:
            start = starting_encoder(self.encoder, spec, name=self.name)
            vit, told = start.encoder, start.told
        model = Segmenter(vit, spec, config).to(member.device)
        epochs = finetune(
            model,
            train,
            spec,
            config,
            self.out,
            member=member,
            fault_tolerance=self.fault_tolerance,
            progress=progress,
        )
        if not member.is_first:
            return
        score, table = evaluate(
            model,
            dataset,
            "val",
            labeled_rows(dataset, "val"),
            mean_mask(train.masks),
            spec,
            self.sizes,
            member.device,
        )
        score |= {
            "num_labeled": len(train),
            "from_scratch": self.from_scratch,
            "encoder": self.encoder,
            "start": told,
            "seconds": sum(row["seconds"] for row in epochs),
        }

        def write() -> None:
            prepare = dataset.manifest.config
            save_segmenter(
                model, self.out, encoder=shape, spec=spec, prepare=prepare, config=config
            )
            atomic_write(self.out / "per_image.csv", table.round(6).to_csv(index=False))
            atomic_write(self.out / SCORE, json.dumps(score, indent=1))

        minutes = self.fault_tolerance.storage_minutes
        RetryPolicy(self.out, minutes=minutes).run(write, "the segmenter and its score")
        shutil.rmtree(
            self.out / "checkpoint", ignore_errors=True
        )  # three times the size of the segmenter


def _run_worker(data: str, tuning: Tuning, worker: WorkerContext) -> None:
    """Run one worker's part of a fine-tuning."""
    tuning.run(PatchDataset.open(data), worker, lambda metrics: None)


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
        run_dir.claim(tuning.described(dataset))
    except OtherRunError as error:
        raise CheckpointError(
            f"{out} holds a fine-tuning with another {error}; give the same to resume it, or "
            f"another --out."
        ) from None


def _finished(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / SCORE).read_text())
    return found


def _digest(path: Path) -> str:
    """Of a file of weights; of safetensors without the header, which is written in a random order."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            file.seek(int.from_bytes(file.read(8), "little"), 1)
        return hashlib.file_digest(file, "sha256").hexdigest()
