"""`compile` compiles once per number of masked patches: `ratio.round_to` keeps those few."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.models import GRAY, build, random_images, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from amlp_ray.config import PretrainConfig
from amlp_ray.errors import ConfigError
from amlp_ray.method.losses import pretraining_loss
from amlp_ray.method.masking import Masking, TrainingStep
from amlp_ray.method.masking_ratio import masked_count
from amlp_ray.method.patches import gather
from amlp_ray.training.objectives import MAX_SHAPES, ReconstructionObjective

EPOCHS = 40


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        return graph.forward


def trained(chosen: PretrainConfig) -> tuple[int, list[int]]:
    """Graphs compiled over a whole schedule, and the number of masked patches of every epoch."""
    model, backend, counts = build(chosen), Counting(), []
    network: nn.Module = torch.compile(model, backend=backend, dynamic=False)
    masking, images, keys = Masking(model, chosen), random_images(GRAY, 2), torch.arange(2)
    for epoch in range(1, chosen.epochs + 1):
        patches, selection = masking.mask_augmented(images, keys, keys, TrainingStep(epoch))
        prediction = network(patches, selection.visible, selection.masked)
        masked = [
            gather(x, selection.masked) for x in (patches, selection.lesion, selection.tissue)
        ]
        pretraining_loss(prediction, *masked, chosen.loss, warming_up=False).total.backward()
        counts.append(selection.masked.shape[1])
    return backend.graphs, counts


@pytest.mark.parametrize(
    "overrides",
    [
        {"variant": "mae"},
        {"variant": "amlp", "ratio": {"round_to": 8}},
        {"variant": "mps-ams", "ratio": {"round_to": 16, "shape": "random"}},
        {
            "variant": "simmim",
            "model": {"decoder_depth": 0},
            "ratio": {"start": 0.3, "end": 0.6, "round_to": 8},
        },
        {"variant": "hpm", "ratio": {"start": 0.25, "end": 0.75, "round_to": 16}},
    ],
    ids=str,
)
def test_a_schedule_compiles_as_many_graphs_as_it_has_numbers_of_masked_patches(
    overrides: dict[str, Any],
) -> None:
    graphs, counts = trained(tiny(overrides, {"epochs": EPOCHS}))
    assert graphs == len(set(counts)) <= MAX_SHAPES
    assert len(set(counts)) > 1 or overrides == {"variant": "mae"}


def objective(ratio: dict[str, Any], **overrides: Any) -> ReconstructionObjective:
    chosen = tiny(
        {"variant": "mps-ams", "compile": True, "epochs": EPOCHS, "ratio": ratio}, overrides
    )
    return ReconstructionObjective(Masking(build(chosen), chosen))


def test_more_numbers_than_torch_keeps_are_refused_before_training_starts() -> None:
    with pytest.raises(ConfigError, match=r"ratio\.round_to to 6 or more"):
        objective({"start": 0.25, "end": 0.75}).begin_epoch(1, 3)
    objective({"start": 0.25, "end": 0.75, "round_to": 6}).begin_epoch(1, 3)
    objective({"start": 0.25, "end": 0.75}, compile=False).begin_epoch(1, 3)


def test_schedules_per_step_are_counted_by_their_steps() -> None:
    ratio = {"start": 0.25, "end": 0.45}
    objective(ratio, epochs=4).begin_epoch(1, 30)
    with pytest.raises(ConfigError, match=r"ratio\.round_to"):
        objective({**ratio, "update_per": "step"}, epochs=4).begin_epoch(1, 30)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.02, 0.98),
    st.floats(0.02, 0.98),
    st.sampled_from(["linear", "cosine", "exponential", "random"]),
    st.integers(1, 6),
)
def test_the_round_to_that_is_named_suffices(
    start: float, end: float, shape: str, round_to: int
) -> None:
    ratio = {"start": start, "end": end, "shape": shape, "round_to": round_to}
    try:
        objective(ratio).begin_epoch(1, 1)
    except ConfigError as error:
        named = int(str(error).split("ratio.round_to to ")[1].split()[0])
        assert named > round_to
        objective({**ratio, "round_to": named}).begin_epoch(1, 1)
    else:
        masking = objective(ratio).masking
        counts = {
            masked_count(masking.ratio(TrainingStep(epoch)), 64, round_to)
            for epoch in range(1, EPOCHS + 1)
        }
        assert len(counts) <= MAX_SHAPES
