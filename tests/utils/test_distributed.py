"""Several processes train as one does.

Any number of them, whole or cut, going on from each other's checkpoints.
"""

from __future__ import annotations

from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gloo_workers import run_workers
from helpers.runs import discs, write

from amlp_ray.config import PretrainConfig, ResourceConfig
from amlp_ray.data.dataset import PatchDataset
from amlp_ray.data.loading.batches import open_batches
from amlp_ray.training.checkpoint.export import load_encoder
from amlp_ray.training.checkpoint.manager import latest
from amlp_ray.training.loggers.metrics_file import read_rows
from amlp_ray.training.pretrain import Hooks, pretrain
from amlp_ray.training.train_state import TrainState
from amlp_ray.utils import distributed
from amlp_ray.utils.event_log import read_events

TINY = {"width": 24, "depth": 3, "heads": 2, "decoder_width": 16, "decoder_heads": 2}
FIGURES = (
    "loss",
    "loss_rec",
    "loss_ccl",
    "loss_rank",
    "grad_norm",
    "lesion_cluster_share",
    "ratio",
    "lr",
)
_meetings = count()


def settings_of(**overrides: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {"epochs": 3, "batch_size": 10, "model": TINY, **overrides}
    )


def train(
    rank: int,
    data: str,
    folder: Path,
    config: PretrainConfig,
    resources: ResourceConfig,
    stop_after: int | None = None,
    each: Path | None = None,
) -> None:
    """What each worker does; `each` is a folder for the model that it ends with."""
    dataset = PatchDataset.open(data)
    batches = open_batches(
        dataset,
        batch_size=config.batch_size,
        seed=config.seed,
        mode="mapped",
        rank=rank,
        world=distributed.world_size(),
    )
    reported: list[int] = []
    hooks = Hooks(
        report=lambda metrics: reported.append(metrics["epoch"]),
        should_stop=lambda: stop_after is not None and reported[-1] >= stop_after,
    )
    result = pretrain(config, batches, folder, hooks=hooks, resources=resources)
    assert result.epochs == (stop_after or config.epochs)
    assert bool(reported) == (rank == 0)
    if each is not None:
        torch.save(result.model.state_dict(), each / f"{rank}.pt")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PatchDataset:
    """30 images: three batches."""
    return write(tmp_path_factory.mktemp("data") / "discs", {"train": discs(30)})


def go(
    dataset: PatchDataset,
    folder: Path,
    config: PretrainConfig,
    workers: int = 1,
    *more: Any,
    **overrides: Any,
) -> None:
    resources = ResourceConfig(workers=workers, **overrides)
    if workers == 1:
        train(0, dataset.path, folder, config, resources, *more)
    else:
        meeting = folder.parent / f"meeting-{next(_meetings)}"
        run_workers(workers, train, meeting, dataset.path, folder, config, resources, *more)


def curve(folder: Path) -> list[list[float]]:
    return [[row.get(name, 0.0) for name in FIGURES] for row in read_rows(folder / "metrics.jsonl")]


def assert_alike(one: Path, other: Path, rel: float = 1e-5) -> None:
    """The same lines, but for the order in which floats were summed."""
    assert len(curve(one)) == len(curve(other)) == 3
    for a, b in zip(curve(one), curve(other), strict=True):
        assert b == pytest.approx(a, rel=rel, abs=1e-6)


LOOKING = {"variant": "amlp", "loss": {"warmup": 0.0}}
WORKERS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "amlp on two": (2, LOOKING, {}),
    "mae on three, with shares of 3, 3 and 4 in pieces": (
        3,
        {"variant": "mae"},
        {"micro_batch": 2},
    ),
    "clusters of the dataset on three": (
        3,
        {"selection": {"scope": "dataset", "analysis_interval": 2}},
        {},
    ),
    "amlp cut in two, in pieces": (2, LOOKING, {"sharding": "fsdp", "micro_batch": 2}),
    "soft masks on two": (2, {"variant": "amlp-soft", "loss": {"warmup": 0.0}}, {}),
    "simsiam on three": (3, {"variant": "simsiam"}, {}),
    "a teacher cut in two": (2, {"variant": "hpm"}, {"sharding": "fsdp"}),
}


@pytest.mark.parametrize(
    ("workers", "overrides", "resources"), WORKERS.values(), ids=WORKERS.keys()
)
def test_workers_follow_the_curve_of_one_and_end_with_the_same_model(
    dataset: PatchDataset,
    tmp_path: Path,
    workers: int,
    overrides: dict[str, Any],
    resources: dict[str, Any],
) -> None:
    config = settings_of(**overrides)
    go(dataset, tmp_path / "one", config)
    go(dataset, tmp_path / "all", config, workers, None, tmp_path, **resources)
    assert_alike(tmp_path / "one", tmp_path / "all")
    for row in read_rows(tmp_path / "all" / "metrics.jsonl"):
        assert row["workers"] == workers
        assert row["images_per_second_per_worker"] == pytest.approx(
            row["images_per_second"] / workers
        )
    models = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(workers)]
    for model in models[1:]:
        assert model.keys() == models[0].keys()
        assert all(torch.equal(value, models[0][name]) for name, value in model.items())
    exported = load_encoder(tmp_path / "all" / "encoder.safetensors").state_dict()
    assert all(torch.equal(value, models[0][f"encoder.{name}"]) for name, value in exported.items())


def test_compiled_workers_exchange_a_batch_s_gradient_once_whatever_pieces_they_take(
    dataset: PatchDataset, tmp_path: Path
) -> None:
    config = settings_of(
        variant="mae", batch_size=3, compile=True
    )  # shares of 1 and 2, so 1 piece and 2
    go(dataset, tmp_path / "one", settings_of(variant="mae", batch_size=3))
    resources = ResourceConfig(workers=2, micro_batch=1)
    run_workers(
        2, compiled, tmp_path / "meeting", dataset.path, tmp_path / "all", config, resources
    )
    assert_alike(tmp_path / "one", tmp_path / "all", rel=1e-4)


def compiled(rank: int, *overrides: Any) -> None:
    """Train compiled, by a compiler that takes no minute."""
    torch.compile = partial(torch.compile, backend="eager")
    train(rank, *overrides)


HANDED_ON = {
    "two, then three, then one": [{"workers": 2}, {"workers": 3}, {}],
    "cut in two, then one": [{"workers": 2, "sharding": "fsdp"}, {}],
    "one, then cut in two": [{}, {"workers": 2, "sharding": "fsdp"}],
}


@pytest.mark.parametrize("parts", HANDED_ON.values(), ids=HANDED_ON.keys())
def test_a_run_goes_on_with_other_workers_as_if_it_had_not_been_stopped(
    dataset: PatchDataset, tmp_path: Path, parts: list[dict[str, Any]]
) -> None:
    config = settings_of(**LOOKING)
    go(dataset, tmp_path / "whole", config)
    stops = [1, 2, None] if len(parts) == 3 else [1, None]
    for part, stop in zip(parts, stops, strict=True):
        go(
            dataset,
            tmp_path / "parts",
            config,
            part.get("workers", 1),
            stop,
            sharding=part.get("sharding", "auto"),
        )
    assert_alike(tmp_path / "whole", tmp_path / "parts")
    started = [(e["workers"], e["epoch"], e["repeated"]) for e in read_events(tmp_path / "parts")]
    assert started == [(part.get("workers", 1), epoch, 0) for epoch, part in enumerate(parts)]


def test_a_checkpoint_of_a_cut_model_is_that_of_a_whole_one(
    dataset: PatchDataset, tmp_path: Path
) -> None:
    config = settings_of(variant="mae", epochs=1)
    go(dataset, tmp_path / "one", config)
    go(dataset, tmp_path / "cut", config, 2, sharding="fsdp")
    one, cut = (checkpoint[0] for name in ("one", "cut") if (checkpoint := latest(tmp_path / name)))
    assert one["model"].keys() == cut["model"].keys()
    for name, value in one["model"].items():
        assert value.shape == cut["model"][name].shape
        if not name.endswith(
            "qkv.bias"
        ):  # keys' biases have no gradient but noise, which Adam makes steps of
            assert torch.allclose(value, cut["model"][name], rtol=1e-4, atol=1e-5), name
    assert one["optimizer"]["state"].keys() == cut["optimizer"]["state"].keys()
    for number, moments in one["optimizer"]["state"].items():
        resumed = cut["optimizer"]["state"][number]
        assert all(resumed[name].shape == value.shape for name, value in moments.items())
        assert torch.allclose(moments["exp_avg"], resumed["exp_avg"], rtol=1e-3, atol=1e-6)
    assert one["optimizer"]["param_groups"] == cut["optimizer"]["param_groups"]


# Alone, and which models are cut


def test_alone_nothing_is_exchanged(dataset: PatchDataset) -> None:
    train_state = TrainState(settings_of(), dataset.spec, "cpu", sharding="fsdp")
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert not distributed.is_sharded(train_state.model)
    assert distributed.wrap_ddp(train_state.model) is train_state.model
    assert train_state.eval_model is train_state.model
    values = torch.tensor([1.0, 2.0])
    assert distributed.mean_over_workers(values).tolist() == [1, 2]
    assert distributed.broadcast_from_rank0(7, "cpu") == 7


@pytest.mark.parametrize(
    ("sharding", "device", "parameters", "cut"),
    [
        ("fsdp", "cpu", 10, True),
        ("ddp", "cuda:0", 300_000_000, False),
        ("auto", "cuda:0", 300_000_000, True),
        ("auto", "cuda:0", 86_000_000, False),
        ("auto", "cpu", 300_000_000, False),
    ],
)
def test_large_models_are_cut_on_gpus_or_as_asked(
    monkeypatch: pytest.MonkeyPatch, sharding: str, device: str, parameters: int, cut: bool
) -> None:
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.empty(parameters, device="meta"))
    assert not distributed.should_shard(sharding, model, device)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert distributed.should_shard(sharding, model, device) == cut


def test_a_gradient_is_shrunk_to_its_largest_norm() -> None:
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[2.0, 1.0]]), torch.tensor([2.0])
    assert distributed.clip_gradients(model, 1.5).item() == pytest.approx(3)
    assert torch.cat([model.weight.grad.flatten(), model.bias.grad]).norm().item() == pytest.approx(
        1.5
    )
    assert distributed.clip_gradients(model, 9.0).item() == pytest.approx(1.5)
    assert model.weight.grad[0, 0].item() == pytest.approx(1)
