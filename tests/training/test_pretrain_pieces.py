"""A batch taken in pieces, and the loss scale of fp16: the same training with less memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import discs, write
from torch import nn

from amlp_ray.config import PretrainConfig, ResourceConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import Batch, Batches, open_batches
from amlp_ray.errors import NonFiniteLossError
from amlp_ray.method.masking import TrainingStep
from amlp_ray.training.checkpoint.manager import latest
from amlp_ray.training.loggers.metrics_file import Metrics, read_rows
from amlp_ray.training.objectives import make_objective
from amlp_ray.training.pretrain import pretrain, take_gradient, train_epoch
from amlp_ray.training.train_state import TrainState

TINY = {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_heads": 2}
MEASURED = {
    "images_per_second",
    "images_per_second_per_worker",
    "wait_share",
    "seconds",
    "mfu",
    "memory",
}
OF_EACH_PIECE = {"agreement"}  # a kappa, whose mean over pieces is not that of the batch


def settings_of(**overrides: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {"epochs": 2, "batch_size": 10, "model": TINY, **overrides}
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PatchDataset:
    """20 images: two batches."""
    return write(tmp_path_factory.mktemp("data") / "discs", {"train": discs(20)})


def open_train(dataset: PatchDataset, config: PretrainConfig) -> Batches:
    return open_batches(dataset, batch_size=config.batch_size, seed=config.seed, mode="mapped")


def run(
    dataset: PatchDataset, folder: Path, config: PretrainConfig, micro_batch: int | None = None
) -> list[Metrics]:
    resources = ResourceConfig(micro_batch=micro_batch)
    pretrain(config, open_train(dataset, config), folder, resources=resources)
    return [
        {k: v for k, v in row.items() if k not in MEASURED}
        for row in read_rows(folder / "metrics.jsonl")
    ]


GIVEN: dict[str, dict[str, Any]] = {
    "amlp": {"loss": {"warmup": 0.0}},
    "clusters of the dataset": {
        "selection": {"scope": "dataset", "analysis_interval": 1},
        "loss": {"warmup": 0.0},
    },
    "hpm": {"variant": "hpm"},
    "simmim": {"variant": "simmim"},
}


@pytest.mark.parametrize("overrides", GIVEN.values(), ids=GIVEN.keys())
@pytest.mark.parametrize("micro_batch", [1, 3, 10, 99])  # 3: of 2, 3, 2 and 3 images
def test_a_batch_in_pieces_trains_as_the_whole(
    dataset: PatchDataset, tmp_path: Path, overrides: dict[str, Any], micro_batch: int
) -> None:
    config = settings_of(**overrides)
    whole, pieces = (
        run(dataset, tmp_path / "whole", config),
        run(dataset, tmp_path / "in", config, micro_batch),
    )
    assert len(whole) == 2
    for one, other in zip(whole, pieces, strict=True):
        if micro_batch < 10:
            one, other = (
                {k: v for k, v in row.items() if k not in OF_EACH_PIECE} for row in (one, other)
            )
            assert other == pytest.approx(one, rel=2e-5, abs=1e-6)
        else:
            assert other == one


@pytest.mark.parametrize(
    ("micro_batch", "expected"), [(None, [10]), (10, [10]), (9, [5, 5]), (3, [2, 3, 2, 3])]
)
def test_no_more_than_a_piece_is_held_and_the_gradient_is_that_of_the_batch(
    dataset: PatchDataset, micro_batch: int | None, expected: list[int]
) -> None:
    config = settings_of(variant="mae", clip_grad=1e9)
    train_state, piece_sizes = TrainState(config, dataset.spec, "cpu"), []

    class Network(nn.Module):
        def forward(self, patches: torch.Tensor, *overrides: Any) -> Any:
            piece_sizes.append(len(patches))
            return train_state.model(patches, *overrides)

    batch = next(open_train(dataset, config).epoch(1))
    objective = make_objective(train_state.model, config, None)
    take_gradient(Network(), train_state, objective, batch, TrainingStep(1, 0, 2), micro_batch)
    assert piece_sizes == expected
    taken = {
        name: p.grad.clone()
        for name, p in train_state.model.named_parameters()
        if p.grad is not None
    }
    train_state.optimizer.zero_grad()
    values, images = next(objective(train_state.model, batch, TrainingStep(1, 0, 2), "cpu"))
    assert images == 10
    values["loss"].backward()
    assert taken
    for name, p in train_state.model.named_parameters():
        assert (p.grad is None) == (name not in taken)
        assert p.grad is None or torch.allclose(p.grad, taken[name], rtol=1e-4, atol=1e-7), name


# fp16


def test_fp16_trains_close_to_fp32_and_keeps_weights_in_fp32(
    dataset: PatchDataset, tmp_path: Path
) -> None:
    half, full = (
        run(dataset, tmp_path / name, settings_of(precision=name)) for name in ("fp16", "fp32")
    )
    assert half[-1]["loss"] == pytest.approx(full[-1]["loss"], rel=0.05)
    assert half[-1]["loss"] != full[-1]["loss"]
    result = latest(tmp_path / "fp16")
    assert result is not None
    assert {value.dtype for value in result[0]["model"].values() if value.is_floating_point()} == {
        torch.float32
    }
    assert result[0]["scaler"]["scale"] > 0


def test_steps_that_overflow_while_the_scale_is_found_are_left_out(dataset: PatchDataset) -> None:
    config = settings_of(precision="fp16", variant="mae")
    train_state = TrainState(config, dataset.spec, "cpu")
    train_state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = {name: p.clone() for name, p in train_state.model.named_parameters()}
    objective = make_objective(train_state.model, config, None)
    metrics = train_epoch(train_state.model, train_state, objective, open_train(dataset, config), 1)
    assert train_state.scaler.get_scale() == 2.0**28, "both steps have overflowed"
    assert all(torch.equal(p, before[name]) for name, p in train_state.model.named_parameters())
    assert math.isfinite(metrics["loss"])
    for epoch in range(2, 9):
        metrics = train_epoch(
            train_state.model, train_state, objective, open_train(dataset, config), epoch
        )
    assert math.isfinite(metrics["grad_norm"])
    assert any(not torch.equal(p, before[name]) for name, p in train_state.model.named_parameters())


def test_what_is_told_of_an_epoch_whose_steps_were_left_out_is_finite(
    dataset: PatchDataset,
) -> None:
    config = settings_of(precision="fp16", variant="mae")
    train_state = TrainState(config, dataset.spec, "cpu")
    train_state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    objective = make_objective(train_state.model, config, None)
    metrics = train_epoch(train_state.model, train_state, objective, open_train(dataset, config), 1)
    assert [
        name for name, value in metrics.items() if value is not None and not math.isfinite(value)
    ] == []


class Poisoned:
    """Batches whose images are all NaN."""

    def __init__(self, batches: Batches) -> None:
        self.spec, self.steps_per_epoch, self.batches = (
            batches.spec,
            batches.steps_per_epoch,
            batches,
        )

    def epoch(self, epoch: int) -> Iterator[Batch]:
        for batch in self.batches.epoch(epoch):
            yield Batch(torch.full_like(batch.images.float(), math.nan), batch.keys)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_loss_that_is_no_number_stops_fp16_too(
    dataset: PatchDataset, tmp_path: Path, micro_batch: int | None
) -> None:
    config, resources = (
        settings_of(precision="fp16", variant="mae"),
        ResourceConfig(micro_batch=micro_batch),
    )
    with pytest.raises(NonFiniteLossError, match="loss_rec is not finite at epoch 1, step 1"):
        pretrain(config, Poisoned(open_train(dataset, config)), tmp_path, resources=resources)


def test_gradients_that_overflow_whatever_the_scale_stop_the_run(dataset: PatchDataset) -> None:
    config = settings_of(precision="fp16", variant="mae")
    train_state = TrainState(config, dataset.spec, "cpu")
    train_state.scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    next(iter(train_state.model.parameters())).register_hook(lambda gradient: gradient * math.inf)
    objective = make_objective(train_state.model, config, None)
    with pytest.raises(NonFiniteLossError, match="grad_norm is not finite at epoch 1, step 1"):
        train_epoch(train_state.model, train_state, objective, open_train(dataset, config), 1)
