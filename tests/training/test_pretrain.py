from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amlp_ray.config import VARIANTS, ImageSpec, PretrainConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import Batch, Batches, open_batches
from amlp_ray.errors import CheckpointError, ConfigError, NonFiniteLossError
from amlp_ray.training.checkpoint.export import load_encoder
from amlp_ray.training.checkpoint.manager import checkpoints, latest
from amlp_ray.training.loggers.metrics_file import read_rows
from amlp_ray.training.lr_schedule import learning_rate
from amlp_ray.training.pretrain import Hooks, PretrainResult, pretrain
from amlp_ray.training.train_state import TrainState

MEASURED = {
    "images_per_second",
    "images_per_second_per_worker",
    "wait_share",
    "seconds",
    "mfu",
    "memory",
}
TINY = {"width": 24, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_heads": 2}


def tiny(**overrides: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {"epochs": 4, "batch_size": 12, "model": TINY, **overrides}
    )


def open_train(dataset: PatchDataset, config: PretrainConfig) -> Batches:
    return open_batches(dataset, batch_size=config.batch_size, seed=config.seed)


def run(
    dataset: PatchDataset,
    folder: Path,
    *,
    stop_after: int | None = None,
    batches: Batches | None = None,
    **overrides: Any,
) -> PretrainResult:
    config, reported = tiny(**overrides), []
    hooks = Hooks(
        report=lambda metrics: reported.append(metrics["epoch"]),
        should_stop=lambda: stop_after is not None and reported[-1] >= stop_after,
    )
    return pretrain(config, batches or open_train(dataset, config), folder, hooks=hooks)


def newest(folder: Path) -> dict[str, Any]:
    checkpoint = latest(folder)
    assert checkpoint is not None
    return checkpoint[0]


def weights(result: PretrainResult) -> dict[str, Tensor]:
    return result.model.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_measured(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k not in MEASURED}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def test_the_loss_falls_on_phantoms_and_lies_below_predicting_the_mean(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    result = run(phantom_dataset, tmp_path, epochs=25, variant="mae", lr=3e-3, model=TINY)
    losses = [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert losses[-1] < 0.75 * losses[0]
    assert losses[-1] < 0.8  # images have variance 1
    assert result.epochs == 25
    assert not result.stopped_early


def test_every_epoch_writes_one_line_with_all_its_figures(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    result = run(phantom_dataset, tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert set(row) == MEASURED | {
            "epoch",
            "loss",
            "loss_rec",
            "loss_ccl",
            "loss_rank",
            "effective_patches",
            "agreement",
            "lesion_cluster_share",
            "lesion_masked_share",
            "tissue_masked_share",
            "fallback_share",
            "grad_norm",
            "ratio",
            "lr",
            "workers",
        }
        assert all(math.isfinite(value) for value in row.values())
        assert 0 < row["effective_patches"] <= 1
        assert 0 <= row["wait_share"] <= 1
        assert 0 < row["mfu"] < 1
        assert 0.1 < row["memory"] < 100  # GB, of a process with torch in it
        assert row["workers"] == 1
        assert row["images_per_second_per_worker"] == row["images_per_second"]
    assert [row["ratio"] for row in rows] == pytest.approx([0.25, 0.25 + 1 / 6, 0.25 + 2 / 6, 0.75])
    assert [row["lr"] for row in rows] == [
        learning_rate(tiny(), 3 * epoch - 1, 12) for epoch in (1, 2, 3, 4)
    ]
    assert result.metrics == rows[-1]


TWO_EPOCHS = {
    "analysis_interval": 2
}  # so that a stop after one epoch falls between two analyses of whole images
RESUMED: dict[str, dict[str, Any]] = {
    name: {"variant": name} for name in VARIANTS if name != "scratch"
} | {
    "another analysis": {"selection": {**TWO_EPOCHS, "feedback": 0.5}, "loss": {"warmup": 0.0}},
    "dataset clusters": {"selection": {**TWO_EPOCHS, "scope": "dataset", "clusters": 4}},
    "tokens": {
        "selection": {**TWO_EPOCHS, "features": "tokens", "rule": "hardest"},
        "loss": {"warmup": 0.0},
    },
    "tokens of the dataset": {
        "selection": {"analysis_interval": 0, "features": "tokens", "scope": "dataset"}
    },
    "random ratio": {"ratio": {"shape": "random", "update_per": "step"}},
    "fp16": {"precision": "fp16"},
    "weight_ema": {"weight_ema": 0.9},
}


@pytest.mark.parametrize("overrides", RESUMED.values(), ids=RESUMED.keys())
@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(
    phantom_dataset: PatchDataset, tmp_path: Path, overrides: dict[str, Any], stop_after: int
) -> None:
    whole = run(phantom_dataset, tmp_path / "whole", **overrides)
    torch.manual_seed(99)  # nothing may hang on torch's own generator
    part = run(phantom_dataset, tmp_path / "parts", stop_after=stop_after, **overrides)
    assert part.stopped_early
    assert part.epochs == stop_after
    assert not same(weights(part), weights(whole))
    torch.manual_seed(7)
    resumed = run(phantom_dataset, tmp_path / "parts", **overrides)
    assert resumed.epochs == 4
    assert same(weights(resumed), weights(whole))
    assert without_measured(tmp_path / "parts") == without_measured(tmp_path / "whole")
    saved = [newest(tmp_path / name) for name in ("parts", "whole")]
    assert saved[0]["scaler"] == saved[1]["scaler"]
    for a, b in zip(*(s["optimizer"]["state"].values() for s in saved), strict=True):
        assert same(a, b)
    exported = [
        load_encoder(tmp_path / name / "encoder.safetensors").state_dict()
        for name in ("parts", "whole")
    ]
    assert same(*exported)


def test_amlp_with_every_part_switched_off_is_mae_to_the_bit(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    mae = run(phantom_dataset, tmp_path / "mae", epochs=2, variant="mae")
    off = run(
        phantom_dataset,
        tmp_path / "off",
        epochs=2,
        variant="amlp",
        selection={"mode": "random"},
        ratio={"start": 0.75, "end": 0.75},
        loss={"weighting": "none", "ccl_weight": 0},
    )
    assert same(weights(mae), weights(off))
    assert without_measured(tmp_path / "mae") == without_measured(tmp_path / "off")


NEUTRAL: dict[str, dict[str, Any]] = {
    "soft selection without strength": {"selection": {"mode": "soft", "strength": 0.0}},
    "hard selection that no cluster qualifies for": {
        "selection": {"mode": "hard", "min_patches": 1000}
    },
    "relative loss with gamma 0": {"loss": {"weighting": "rrl", "gamma": 0.0}},
    "attention loss with mix 0": {"loss": {"weighting": "arl", "mix": 0.0}},
    "weights during warm-up": {"loss": {"weighting": "rrl", "warmup": 0.9}, "epochs": 1},
    "a schedule of equal ends": {"ratio": {"start": 0.75, "end": 0.75, "shape": "cosine"}},
}


@pytest.mark.parametrize("part", NEUTRAL)
def test_each_part_switched_off_on_its_own_gives_mae_to_the_bit(
    phantom_dataset: PatchDataset, tmp_path: Path, part: str
) -> None:
    neutral = {"epochs": 1, **NEUTRAL[part]}
    if part == "weights during warm-up":
        neutral["epochs"] = 10  # epochs 1-9 warm up
    stop = {"stop_after": 1}
    mae = run(phantom_dataset, tmp_path / "mae", variant="mae", epochs=neutral["epochs"], **stop)
    off = run(phantom_dataset, tmp_path / "off", variant="mae", **neutral, **stop)
    assert same(weights(mae), weights(off))
    original, reference = (without_measured(tmp_path / name)[0] for name in ("off", "mae"))
    assert original["loss"] == reference["loss"]


def test_a_category_head_without_effect_leaves_all_other_weights_those_of_mae(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    """During warm-up CCL is off, but the head exists."""
    mae = weights(run(phantom_dataset, tmp_path / "mae", variant="mae", epochs=10, stop_after=1))
    with_head = weights(
        run(
            phantom_dataset,
            tmp_path / "ccl",
            variant="mae",
            epochs=10,
            stop_after=1,
            loss={"ccl_weight": 1.0, "warmup": 0.9},
        )
    )
    assert with_head.keys() - mae.keys() == {"category.weight", "category.bias"}
    assert all(torch.equal(mae[name], with_head[name]) for name in mae)


@pytest.mark.parametrize(
    "on",
    [
        {"selection": {"mode": "hard"}},
        {"selection": {"mode": "soft"}},
        {"ratio": {"start": 0.5}},
        {"loss": {"weighting": "rrl", "warmup": 0.0}},
        {"loss": {"weighting": "arl", "warmup": 0.0}},
        {"loss": {"ccl_weight": 1.0, "ccl_threshold": "mean", "warmup": 0.0}},
        {"seed": 1},
    ],
    ids=str,
)
def test_each_part_switched_on_changes_the_weights(
    phantom_dataset: PatchDataset, tmp_path: Path, on: dict[str, Any]
) -> None:
    mae = weights(run(phantom_dataset, tmp_path / "mae", epochs=1, variant="mae"))
    changed = weights(run(phantom_dataset, tmp_path / "on", epochs=1, variant="mae", **on))
    assert any(not torch.equal(mae[name], changed[name]) for name in mae)


def test_a_line_cut_short_and_a_line_beyond_the_checkpoint_are_repaired(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    run(phantom_dataset, tmp_path / "whole")
    folder = tmp_path / "killed"
    run(phantom_dataset, folder, stop_after=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"epoch": 3, "loss": -1.0}) + "\n"
        )  # written, but the checkpoint was not
        file.write('{"epoch": 4, "lo')
    run(phantom_dataset, folder)
    assert without_measured(folder) == without_measured(tmp_path / "whole")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_finished_run_trains_no_further_and_returns_its_last_metrics(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    first = run(phantom_dataset, tmp_path)
    again = run(phantom_dataset, tmp_path)
    assert again.epochs == 4
    assert again.metrics == first.metrics
    assert same(weights(again), weights(first))
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 4


def test_hooks_are_called_once_per_epoch_in_order_when_all_is_on_disk(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    calls: list[str] = []

    def evaluate(model: Any, epoch: int) -> dict[str, Any]:
        assert not model.training
        calls.append(f"evaluate {epoch}")
        return {"dsc": 0.5} if epoch == 2 else {}

    def report(metrics: dict[str, Any]) -> None:
        assert read_rows(tmp_path / "metrics.jsonl")[-1] == metrics
        assert ("dsc" in metrics) == (metrics["epoch"] == 2)
        calls.append(f"report {metrics['epoch']}")

    def should_stop() -> bool:
        calls.append("stop?")
        return False

    config = tiny(epochs=2)
    hooks = Hooks(evaluate=evaluate, report=report, should_stop=should_stop)
    pretrain(config, open_train(phantom_dataset, config), tmp_path, hooks=hooks)
    assert calls == ["evaluate 1", "report 1", "stop?", "evaluate 2", "report 2", "stop?"]


def test_an_evaluation_does_not_change_the_training(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    def evaluate(model: Any, epoch: int) -> dict[str, Any]:
        return {"noise": float(torch.rand(3).sum())}

    config = tiny(epochs=2)
    batches = open_train(phantom_dataset, config)
    with_it = pretrain(config, batches, tmp_path / "a", hooks=Hooks(evaluate=evaluate))
    without = pretrain(config, batches, tmp_path / "b")
    assert same(weights(with_it), weights(without))


class Poisoned:
    """Batches that are all NaN in one step, as from a damaged scan in floating point."""

    def __init__(self, batches: Batches, epoch: int, step: int, value: float = math.nan) -> None:
        self.spec: ImageSpec = batches.spec
        self.steps_per_epoch = batches.steps_per_epoch
        self.batches, self.at, self.value = batches, (epoch, step), value

    def epoch(self, epoch: int) -> Iterator[Batch]:
        for step, batch in enumerate(self.batches.epoch(epoch), 1):
            images = batch.images.float()
            yield Batch(
                images.fill_(self.value) if (epoch, step) == self.at else images, batch.keys
            )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("variant", ["amlp", "amlp-soft", "mae"])
def test_a_loss_that_is_not_finite_stops_naming_epoch_and_step_and_spares_the_checkpoint(
    phantom_dataset: PatchDataset, tmp_path: Path, variant: str, value: float
) -> None:
    batches = open_train(phantom_dataset, tiny())
    assert batches.steps_per_epoch == 3
    with pytest.raises(
        NonFiniteLossError,
        match=r"loss_rec is not finite at epoch 3, step 2 \(all weights still are\).*lower lr",
    ):
        run(
            phantom_dataset, tmp_path / "a", variant=variant, batches=Poisoned(batches, 3, 2, value)
        )
    assert len(read_rows(tmp_path / "a" / "metrics.jsonl")) == 2
    resumed = run(phantom_dataset, tmp_path / "a", variant=variant)  # the data repaired
    assert same(weights(resumed), weights(run(phantom_dataset, tmp_path / "b", variant=variant)))


def test_bf16_on_the_cpu_trains_and_differs_from_fp32(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    low = run(phantom_dataset, tmp_path / "low", epochs=2, precision="bf16")
    full = run(phantom_dataset, tmp_path / "full", epochs=2, precision="fp32")
    assert low.metrics["loss"] == pytest.approx(full.metrics["loss"], rel=0.05)
    assert low.metrics["loss"] != full.metrics["loss"]
    assert all(value.dtype != torch.bfloat16 for value in weights(low).values())


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def damage_overwrite(path: Path) -> None:
    path.write_bytes(b"not a checkpoint")


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_truncate, damage_overwrite, damage_empty])
def test_a_run_without_a_whole_checkpoint_is_refused_in_one_sentence(
    phantom_dataset: PatchDataset, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run(phantom_dataset, tmp_path, stop_after=1)
    damage(checkpoints(tmp_path)[0])
    with pytest.raises(
        CheckpointError, match=r"are damaged \(epoch-1\.\w+\.pt\); delete the folder to start again"
    ):
        run(phantom_dataset, tmp_path)


def test_a_folder_of_other_settings_is_refused_and_the_settings_are_named(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    run(phantom_dataset, tmp_path, stop_after=1)
    with pytest.raises(CheckpointError, match=r"other settings \(lr, ratio\)"):
        run(phantom_dataset, tmp_path, lr=1e-4, ratio={"start": 0.3})


def test_a_folder_of_other_images_is_refused(phantom_dataset: PatchDataset, tmp_path: Path) -> None:
    run(phantom_dataset, tmp_path, stop_after=1)
    batches = open_train(phantom_dataset, tiny())
    batches.spec = batches.spec.model_copy(update={"height": 32})
    with pytest.raises(CheckpointError, match="another size"):
        run(phantom_dataset, tmp_path, batches=batches)


def test_a_patch_size_that_does_not_divide_the_images_is_refused(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"patch_size 7 does not divide .* 64x64"):
        run(phantom_dataset, tmp_path, model={**TINY, "patch_size": 7})


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nearly_zero() -> None:
    config = tiny(lr=0.01, warmup=0.2, lr_scaling="none")
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:20] == pytest.approx([0.01 * (i + 1) / 21 for i in range(20)])
    assert max(rates) == rates[20] == 0.01
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))
    assert rates[60] == pytest.approx(0.005)
    assert 0 < rates[99] < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.99])
def test_the_learning_rate_of_very_short_runs_is_positive_and_at_most_lr(
    steps: int, warmup: float
) -> None:
    rates = [
        learning_rate(tiny(lr=0.01, warmup=warmup, lr_scaling="none"), step, steps)
        for step in range(steps)
    ]
    assert all(0 < rate <= 0.01 for rate in rates)


SCALED = {
    "sqrt": 0.02,
    "linear": 0.04,
    "none": 0.01,
}  # of lr 0.01, at four times the batch it holds for


@pytest.mark.parametrize(("scaling", "highest"), SCALED.items())
def test_the_learning_rate_follows_the_batch(
    phantom_dataset: PatchDataset, tmp_path: Path, scaling: str, highest: float
) -> None:
    overrides = {"lr": 0.01, "lr_batch": 3, "lr_scaling": scaling, "warmup": 0.0}
    assert tiny(**overrides).scaled_lr == pytest.approx(highest)
    assert learning_rate(tiny(**overrides), 0, 12) == pytest.approx(highest)
    assert tiny(**overrides, batch_size=3).scaled_lr == 0.01
    run(phantom_dataset, tmp_path, epochs=2, **overrides)
    row = read_rows(tmp_path / "metrics.jsonl")[0]
    assert row["lr"] == pytest.approx(
        highest * (1 + math.cos(math.pi * 2 / 6)) / 2
    )  # of the third of six steps


def test_matrices_are_decayed_and_biases_norms_and_fixed_positions_are_not(
    phantom_dataset: PatchDataset,
) -> None:
    train_state = TrainState(tiny(), phantom_dataset.spec, "cpu")
    groups = train_state.optimizer.param_groups
    decayed, free = (
        [p for g in groups if g["weight_decay"] == decay for p in g["params"]]
        for decay in (0.05, 0.0)
    )
    assert all(p.dim() > 1 for p in decayed)
    assert all(p.dim() <= 1 for p in free)
    trained = {id(p) for p in train_state.model.parameters() if p.requires_grad}
    assert {id(p) for p in decayed + free} == trained
    assert len(decayed + free) == len(trained)


def test_the_exported_encoder_is_the_trained_one(
    phantom_dataset: PatchDataset, tmp_path: Path
) -> None:
    result = run(phantom_dataset, tmp_path, epochs=1)
    assert result.encoder == tmp_path / "encoder.safetensors"
    assert same(load_encoder(result.encoder).state_dict(), result.model.encoder.state_dict())
