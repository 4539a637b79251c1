"""What learns: its optimizer, the scale of fp16, the average of its weights; in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.errors import CheckpointError, ConfigError
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.training.train_state import TrainState, new_model, shardable_blocks
from amlp_ray.utils import distributed

SPEC = ImageSpec(channels=1, height=32, width=32, mean=(9.0,), std=(3.0,))
MODEL = {"patch_size": 8, "width": 24, "depth": 3, "heads": 2, "decoder_width": 16}


def settings_of(**overrides: Any) -> PretrainConfig:
    return PretrainConfig.model_validate({"model": MODEL, **overrides})


def make_state(**overrides: Any) -> TrainState:
    return TrainState(settings_of(**overrides), SPEC, "cpu")


def give_gradients(train_state: TrainState, value: float) -> None:
    for weight in train_state.model.parameters():
        if weight.requires_grad:
            weight.grad = torch.full_like(weight, value)


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }


@pytest.mark.parametrize("variant", ["amlp", "simsiam"])
def test_a_model_follows_from_its_seed_alone(variant: str) -> None:
    first = copied(new_model(settings_of(variant=variant), SPEC)[0])
    torch.rand(5)
    assert not changed(new_model(settings_of(variant=variant), SPEC)[0], first)
    assert changed(new_model(settings_of(variant=variant, seed=1), SPEC)[0], first)


@pytest.mark.parametrize("variant", ["mae", "hpm", "simsiam"])
def test_blocks_that_may_be_cut_are_groups_apart_and_every_trained_weight_is_in_one(
    variant: str,
) -> None:
    train_state = make_state(variant=variant, weight_decay=0.1)
    groups = [group["params"] for group in train_state.optimizer.param_groups]
    trained = {id(p) for p in train_state.model.parameters() if p.requires_grad}
    assert sorted(id(p) for group in groups for p in group) == sorted(trained)
    blocks = {id(p) for block in shardable_blocks(train_state.model) for p in block.parameters()}
    assert [{id(p) in blocks for p in group} for group in groups] == [
        {True},
        {True},
        {False},
        {False},
    ]
    assert [{p.dim() > 1 for p in group} for group in groups] == [{True}, {False}, {True}, {False}]
    assert [group["weight_decay"] for group in train_state.optimizer.param_groups] == [
        0.1,
        0.0,
        0.1,
        0.0,
    ]


def test_all_encoder_blocks_but_the_last_may_be_cut() -> None:
    model = make_state(variant="mae").model
    assert isinstance(model, MaskedAutoencoder)
    assert shardable_blocks(model) == [model.encoder.blocks[0], model.encoder.blocks[1]]


def test_the_average_is_the_moving_average_of_the_weights_which_forgets_faster_when_young() -> None:
    train_state = make_state(weight_ema=0.25)
    name = "encoder.blocks.0.mlp.fc1.weight"
    mean = train_state.model.state_dict()[name].clone()
    for step in range(1, 5):
        give_gradients(train_state, 1.0 if step % 2 else -1.0)
        train_state.step()
        decay = min(0.25, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * train_state.model.state_dict()[name]
    assert torch.allclose(train_state.eval_model.state_dict()[name], mean, atol=1e-7)
    assert not torch.equal(
        train_state.eval_model.state_dict()[name], train_state.model.state_dict()[name]
    )
    assert not any(p.requires_grad for p in train_state.eval_model.parameters())


def test_without_an_average_the_model_itself_is_whole() -> None:
    train_state = make_state()
    assert train_state.eval_model is train_state.model
    assert "weight_ema" not in train_state.gather_state()


def test_centroids_are_taken_over_and_not_averaged() -> None:
    train_state = make_state(weight_ema=0.5, selection={"scope": "dataset"})
    assert isinstance(train_state.model, MaskedAutoencoder)
    train_state.model.get_buffer("centroids.centers").fill_(3.0)
    assert not train_state.eval_model.get_buffer("centroids.centers").any()
    train_state.gather_state()
    assert (train_state.eval_model.get_buffer("centroids.centers") == 3).all()


def test_a_step_whose_fp16_gradients_have_overflowed_is_left_out_and_the_scale_halved() -> None:
    train_state = make_state(precision="fp16")
    before, scale = copied(train_state.model), train_state.scaler.get_scale()
    train_state.scaler.scale(torch.zeros(1))  # as a backward pass begins
    give_gradients(train_state, float("inf"))
    train_state.scaler.unscale_(train_state.optimizer)
    train_state.step()
    assert not changed(train_state.model, before)
    assert train_state.scaler.get_scale() == scale / 2
    give_gradients(train_state, 1.0)
    train_state.scaler.unscale_(train_state.optimizer)
    train_state.step()
    assert changed(train_state.model, before)
    assert train_state.scaler.get_scale() == scale / 2


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_only_fp16_has_a_scale(precision: str) -> None:
    assert not make_state(precision=precision).scaler.is_enabled()


def test_the_scale_goes_on_where_it_was() -> None:
    train_state = make_state(precision="fp16")
    train_state.scaler.scale(torch.zeros(1))
    train_state.scaler.update(64.0)
    other = make_state(precision="fp16")
    other.load(train_state.gather_state())
    assert other.scaler.get_scale() == 64


def test_a_state_of_a_model_of_another_shape_is_refused() -> None:
    with pytest.raises(CheckpointError, match="images of another size"):
        make_state(variant="mae").load(
            make_state(variant="mae", model={**MODEL, "depth": 2}).gather_state()
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"variant": "simsiam"}, "fsdp shards autoencoders only; use ddp"),
        ({"weight_ema": 0.9}, "supports neither weight_ema nor precision=fp16; use ddp or bf16"),
        ({"precision": "fp16"}, "supports neither weight_ema nor precision=fp16; use ddp or bf16"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        TrainState(settings_of(**overrides), SPEC, "cpu", sharding="fsdp")
