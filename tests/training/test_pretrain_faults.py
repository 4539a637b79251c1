"""A run whose disk fills up, whose checkpoint is damaged, or which is killed.

What it costs, and that it is told.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import discs, write

from amlp_ray.config import FaultToleranceConfig, PretrainConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import open_batches
from amlp_ray.errors import StorageError
from amlp_ray.training.checkpoint.export import load_encoder
from amlp_ray.training.checkpoint.manager import checkpoints, epoch_of, latest
from amlp_ray.training.loggers.metrics_file import Metrics, read_rows
from amlp_ray.training.pretrain import Hooks, PretrainResult, pretrain
from amlp_ray.utils.event_log import read_events

TINY = {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_heads": 2}
MEASURED = {
    "images_per_second",
    "images_per_second_per_worker",
    "wait_share",
    "seconds",
    "mfu",
    "memory",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PatchDataset:
    """20 images: two batches."""
    return write(tmp_path_factory.mktemp("data") / "discs", {"train": discs(20)})


def go(
    dataset: PatchDataset,
    folder: Path,
    *,
    report: Callable[[Metrics], None] = lambda metrics: None,
    stop_after: int | None = None,
    fault_tolerance: FaultToleranceConfig | None = None,
    **overrides: Any,
) -> PretrainResult:
    config = PretrainConfig.model_validate(
        {"epochs": 4, "batch_size": 10, "model": TINY, **overrides}
    )
    batches = open_batches(dataset, batch_size=10, seed=config.seed, mode="mapped")
    reported: list[int] = []

    def message(metrics: Metrics) -> None:
        reported.append(metrics["epoch"])
        report(metrics)

    hooks = Hooks(
        report=message, should_stop=lambda: stop_after is not None and reported[-1] >= stop_after
    )
    return pretrain(config, batches, folder, hooks=hooks, fault_tolerance=fault_tolerance)


def figures(folder: Path) -> list[Metrics]:
    return [
        {k: v for k, v in row.items() if k not in MEASURED}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def assert_same(one: Path, other: Path) -> None:
    """To the bit: lines, model and encoder."""
    assert figures(one) == figures(other)
    assert [row["epoch"] for row in figures(one)] == [1, 2, 3, 4]
    states = [checkpoint[0] for folder in (one, other) if (checkpoint := latest(folder))]
    for key in ("model", "weight_ema"):
        assert all(
            torch.equal(v, states[1][key][name]) for name, v in states[0].get(key, {}).items()
        )
    encoders = [
        load_encoder(folder / "encoder.safetensors").state_dict() for folder in (one, other)
    ]
    assert all(torch.equal(value, encoders[1][name]) for name, value in encoders[0].items())


def written() -> None:
    """What a run that was interrupted here was writing is on the disk."""
    for thread in threading.enumerate():
        if thread.name == "amlp-checkpoint":
            thread.join()


def started(folder: Path) -> list[tuple[int, int, int]]:
    events = [event for event in read_events(folder) if event["event"] == "started"]
    return [(event["workers"], event["epoch"], event["repeated"]) for event in events]


def test_a_damaged_newest_checkpoint_costs_its_epoch_and_is_told(
    dataset: PatchDataset, tmp_path: Path
) -> None:
    go(dataset, tmp_path / "whole")
    go(dataset, tmp_path / "run", stop_after=3)
    newest = checkpoints(tmp_path / "run")[0]
    newest.write_bytes(newest.read_bytes()[:-500])
    go(dataset, tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert started(tmp_path / "run") == [(1, 0, 0), (1, 2, 1)]
    (damaged,) = (
        event for event in read_events(tmp_path / "run") if event["event"] == "damaged checkpoint"
    )
    assert (
        damaged["text"]
        == f"{newest} is damaged and skipped; the checkpoint before it is used, if any."
    )
    assert [epoch_of(path) for path in checkpoints(tmp_path / "run")] == [4, 3]


@pytest.mark.parametrize("overrides", [{}, {"weight_ema": 0.9}, {"precision": "fp16"}], ids=str)
def test_a_run_that_was_killed_after_a_line_and_before_its_checkpoint_does_that_epoch_again(
    dataset: PatchDataset, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    go(dataset, tmp_path / "whole", **overrides)

    def killed(metrics: Metrics) -> None:
        if metrics["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(dataset, tmp_path / "run", report=killed, **overrides)
    assert len(figures(tmp_path / "run")) == 3
    written()
    checkpoints(tmp_path / "run")[0].unlink()
    go(dataset, tmp_path / "run", **overrides)
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert started(tmp_path / "run") == [(1, 0, 0), (1, 2, 1)]


def test_a_finished_run_that_is_begun_again_notes_nothing(
    dataset: PatchDataset, tmp_path: Path
) -> None:
    for _ in range(2):
        go(dataset, tmp_path)
    assert started(tmp_path) == [(1, 0, 0)]


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_are_kept_as_asked(
    dataset: PatchDataset, tmp_path: Path, keep: int
) -> None:
    go(dataset, tmp_path, fault_tolerance=FaultToleranceConfig(checkpoints=keep))
    assert [epoch_of(path) for path in checkpoints(tmp_path)] == [4, 3, 2][:keep]


def test_a_folder_that_takes_no_checkpoint_ends_the_run_in_a_sentence_and_it_goes_on_when_repaired(
    dataset: PatchDataset, tmp_path: Path
) -> None:
    go(dataset, tmp_path / "whole")
    folder = tmp_path / "run"

    def spoil(metrics: Metrics) -> None:
        if metrics["epoch"] == 2:
            written()
            (folder / "checkpoint").rename(folder / "kept")
            (folder / "checkpoint").write_text("a file in its place")

    faults = FaultToleranceConfig(storage_minutes=0.001)
    with pytest.raises(StorageError) as message:
        go(dataset, folder, report=spoil, fault_tolerance=faults)
    assert str(message.value) == (
        f"Could not write the checkpoint of epoch 3 to {folder} for 0.001 minutes (File exists); "
        f"make room and run again: the run resumes from its latest checkpoint."
    )
    (folder / "checkpoint").unlink()
    (folder / "kept").rename(folder / "checkpoint")
    go(dataset, folder)
    assert_same(folder, tmp_path / "whole")
    (storage,) = (event for event in read_events(folder) if event["event"] == "storage")
    assert "retrying for 0.001 minutes" in storage["text"]


def test_what_a_hook_meets_is_not_taken_for_a_full_folder(
    dataset: PatchDataset, tmp_path: Path
) -> None:
    def report(metrics: Metrics) -> None:
        raise ConnectionError("a server is gone")  # an OSError too

    with pytest.raises(ConnectionError, match="a server is gone"):
        go(dataset, tmp_path, report=report)


def test_a_line_that_is_not_taken_is_waited_for(dataset: PatchDataset, tmp_path: Path) -> None:
    lines = tmp_path / "metrics.jsonl"

    def spoil(metrics: Metrics) -> None:
        if metrics["epoch"] == 1:
            lines.rename(tmp_path / "aside")
            lines.mkdir()

    class Repair(logging.Handler):
        """Comes when the trouble is told."""

        def emit(self, record: logging.LogRecord) -> None:
            lines.rmdir()
            (tmp_path / "aside").rename(lines)

    logger, handler = logging.getLogger("amlp_ray"), Repair()
    logger.addHandler(handler)
    try:
        go(dataset, tmp_path, report=spoil)
    finally:
        logger.removeHandler(handler)
    assert [json.loads(line)["epoch"] for line in lines.read_text().splitlines()] == [1, 2, 3, 4]


def test_the_average_is_what_is_looked_at_and_exported(
    dataset: PatchDataset, tmp_path: Path
) -> None:
    states: list[dict[str, torch.Tensor]] = []
    config = PretrainConfig.model_validate(
        {"epochs": 2, "batch_size": 10, "model": TINY, "weight_ema": 0.9}
    )

    def evaluate(model: torch.nn.Module, epoch: int) -> Metrics:
        assert not model.training
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return {}

    batches = open_batches(dataset, batch_size=10, seed=0, mode="mapped")
    result = pretrain(config, batches, tmp_path, hooks=Hooks(evaluate=evaluate))
    checkpoint = latest(tmp_path)
    assert checkpoint is not None
    average, last = checkpoint[0]["weight_ema"], checkpoint[0]["model"]
    name = "encoder.blocks.0.mlp.fc1.weight"
    assert not torch.equal(average[name], last[name])
    exported = load_encoder(result.encoder).state_dict()
    for model in (states[-1], result.model.state_dict()):
        assert all(torch.equal(value, average[name]) for name, value in model.items())
    assert all(torch.equal(value, average[f"encoder.{name}"]) for name, value in exported.items())
    plain = pretrain(
        config.model_copy(update={"weight_ema": 0.0}), batches, tmp_path / "plain"
    ).model.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in last.items()), (
        "training itself is as without"
    )
