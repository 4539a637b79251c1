from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import GRAY, TINY, build, random_images, tiny
from torch import Tensor

from amlp_ray.config import PretrainConfig
from amlp_ray.method.autoencoder import MaskedAutoencoder
from amlp_ray.method.ema_teacher import predict_complementary_halves, teacher_view, update_teacher
from amlp_ray.method.masking import Masking, TrainingStep
from amlp_ray.method.patches import gather, patchify
from amlp_ray.training.objectives import ReconstructionObjective

Phantoms = tuple[Tensor, Tensor, Tensor]
KEYS = torch.arange(6)
WARM = {"loss": {"warmup": 0.0}}
AMLP = {"variant": "amlp"}


def taught(*layers: dict[str, Any]) -> tuple[MaskedAutoencoder, MaskedAutoencoder, PretrainConfig]:
    """A model that has trained away from its teacher, the teacher, and the settings."""
    config = tiny(*layers)
    model = build(config).train()
    assert model.teacher is not None
    with torch.no_grad():
        for i, parameter in enumerate(model.encoder.parameters()):
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            )
    return model, model.teacher, config


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if not name.startswith("teacher.")
    }


def patches_of(count: int = 6) -> Tensor:
    return patchify(random_images(GRAY, count), 8)


def randomize(model: MaskedAutoencoder, seed: int) -> dict[str, Tensor]:
    """Give the model other weights and return them."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if not name.startswith("teacher."):
                parameter.copy_(
                    torch.randn(
                        parameter.shape, generator=torch.Generator().manual_seed(1000 * seed + i)
                    )
                )
    return weights(model)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_the_teacher_is_the_average_of_what_it_was_shown_with_weights_that_fall_by_decay_a_step(
    decay: float,
) -> None:
    """Each model stands for all steps since the one before; the random start has no weight."""
    model, teacher, _ = taught(AMLP)
    at, states = [0, 3, 4, 11], []
    for k in range(1, len(at)):
        states.append(randomize(model, k))
        update_teacher(model, decay, previous_step=at[k - 1], step=at[k])
    step_weights = [
        [decay ** (at[-1] - 1 - step) for step in range(at[k], at[k + 1])]
        for k in range(len(at) - 1)
    ]
    totals = [sum(part) for part in step_weights]
    for name, now in weights(teacher).items():
        expected = sum(
            total * state[name] for total, state in zip(totals, states, strict=True)
        ) / sum(totals)
        torch.testing.assert_close(now, expected, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(now, states[-1][name]) for name, now in weights(model).items())


def test_a_model_without_a_teacher_has_none_to_move() -> None:
    model = build(tiny({"variant": "mae"}))
    before = weights(model)
    update_teacher(model, 0.5, previous_step=0, step=3)
    assert all(torch.equal(now, before[name]) for name, now in weights(model).items())


@pytest.mark.parametrize(
    ("analysis_interval", "warmup", "analysis_epochs"),
    [
        (5, 0.35, [1, 6, 8, 11, 16]),  # the warm-up ends after epoch 7
        (10, 0.0, [1, 2, 11]),  # in the first epoch its weights are still random
        (0, 0.1, list(range(1, 21))),
    ],
)
def test_the_teacher_moves_at_analyses_alone_by_the_steps_since_the_last(
    analysis_interval: int, warmup: float, analysis_epochs: list[int]
) -> None:
    model, teacher, config = taught(
        AMLP,
        {
            "selection": {"analysis_interval": analysis_interval},
            "loss": {"warmup": warmup},
            "teacher_momentum": 0.9,
        },
    )
    objective = ReconstructionObjective(Masking(model, config))
    name, steps = "encoder.blocks.0.attn.qkv.weight", 3
    for epoch in range(1, 21):
        student, before = randomize(model, epoch)[name], teacher.get_parameter(name).clone()
        objective.begin_epoch(epoch, steps)
        now = teacher.get_parameter(name)
        if epoch in analysis_epochs[1:]:
            since, done = (
                (epoch - analysis_epochs[analysis_epochs.index(epoch) - 1]) * steps,
                (epoch - 1) * steps,
            )
            share = (1 - 0.9**since) / (1 - 0.9**done)
            torch.testing.assert_close(
                now, (1 - share) * before + share * student, atol=1e-5, rtol=1e-4
            )
        else:
            assert torch.equal(now, before)


def test_the_teacher_starts_as_the_model_and_takes_no_gradient() -> None:
    model = build(tiny(AMLP))
    student = weights(model)
    assert model.teacher is not None
    assert all(torch.equal(now, student[name]) for name, now in weights(model.teacher).items())
    assert not any(p.requires_grad for p in model.teacher.parameters())


# Difficulty and category


def test_every_patch_is_masked_once_and_none_has_an_error_of_0() -> None:
    _, teacher, config = taught(AMLP)
    hidden: list[Tensor] = []
    teacher.register_forward_hook(lambda module, inputs, output: hidden.append(inputs[2]))
    error, category = predict_complementary_halves(teacher, patches_of(), KEYS, config, 1)
    assert len(hidden) == 2
    assert torch.equal(torch.cat(hidden, 1).sort(1).values, torch.arange(64).expand(6, -1))
    assert (error > 0).all()
    assert category is not None
    assert ((category > 0) & (category < 1)).all()
    assert category.unique().numel() > 6 * 60  # every patch has its own


def test_errors_and_categories_are_those_of_the_pass_that_hides_the_patch() -> None:
    _, teacher, config = taught(AMLP)
    patches, halves = patches_of(), []
    hook = teacher.register_forward_hook(
        lambda module, inputs, output: halves.append((inputs[1], inputs[2]))
    )
    error, category = predict_complementary_halves(teacher, patches, KEYS, config, 1)
    hook.remove()
    assert category is not None
    for visible, hidden in halves:
        prediction = teacher(patches, visible, hidden)
        expected = (prediction.pixels - gather(patches, hidden)).square().mean(-1)
        torch.testing.assert_close(gather(error, hidden), expected)
        torch.testing.assert_close(gather(category, hidden), prediction.category.sigmoid())


def test_what_is_hidden_together_depends_on_key_epoch_and_seed() -> None:
    _, teacher, config = taught(AMLP)
    patches = patches_of()
    base = predict_complementary_halves(teacher, patches, KEYS, config, 1)[0]
    assert torch.equal(base, predict_complementary_halves(teacher, patches, KEYS, config, 1)[0])
    for keys, epoch, seed in ((KEYS + 1, 1, 0), (KEYS, 2, 0), (KEYS, 1, 1)):
        other = predict_complementary_halves(
            teacher, patches, keys, config.model_copy(update={"seed": seed}), epoch
        )[0]
        assert not torch.equal(base, other)


def test_a_patch_of_noise_in_a_flat_image_is_the_most_difficult_one() -> None:
    _, teacher, config = taught({"variant": "hpm", "loss": {"ranking_weight": 0.0}})
    image = torch.zeros(1, 1, 64, 64)
    image[..., 24:32, 40:48] = 3 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    error, category = predict_complementary_halves(teacher, patchify(image, 8), KEYS[:1], config, 1)
    assert int(error.argmax()) == 3 * 8 + 5
    assert category is None


# What is asked


VIEWS: list[tuple[dict[str, Any], set[str]]] = [
    ({"selection": {"feedback": 0.5}}, {"difficulty", "category"}),
    ({"selection": {"rule": "hardest", "feedback": 0.0}}, {"difficulty", "category"}),
    ({"selection": {"rule": "hardest"}, "loss": {"ccl_weight": 0.0}}, {"difficulty"}),
    ({"selection": {"features": "tokens", "feedback": 0.0}}, {"tokens"}),
    ({"variant": "attmask"}, {"attention"}),
    ({"variant": "hpm"}, {"difficulty"}),
    (
        {"selection": {"mode": "hard", "hard_by": "score", "score": "attention", "feedback": 0.0}},
        {"attention"},
    ),
]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    VIEWS,
    ids=lambda value: ",".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_the_teacher_says_what_the_settings_use_and_nothing_else(
    overrides: dict[str, Any], expected: set[str]
) -> None:
    model, _, config = taught(overrides, WARM)
    view = teacher_view(model, patches_of(), KEYS, config, 1)
    assert {name for name, value in view._asdict().items() if value is not None} == expected
    for name in expected:
        value = getattr(view, name)
        assert value.shape[:2] == (6, 64)
        assert value.isfinite().all()
        assert not value.requires_grad


def test_the_teacher_and_not_the_model_is_asked() -> None:
    model, teacher, config = taught({"variant": "attmask"})
    before = teacher_view(model, patches_of(), KEYS, config, 1).attention
    with torch.no_grad():
        model.encoder.cls_token.add_(5.0)
    assert torch.equal(teacher_view(model, patches_of(), KEYS, config, 1).attention, before)
    with torch.no_grad():
        teacher.encoder.cls_token.add_(5.0)
    assert not torch.equal(teacher_view(model, patches_of(), KEYS, config, 1).attention, before)


def test_predicted_difficulty_is_the_ranking_decoder_s_word_on_whole_images() -> None:
    model, teacher, config = taught({"variant": "hpm"})
    view = teacher_view(model, patches_of(), KEYS, config, 1)
    assert view.difficulty is not None
    assert torch.equal(view.difficulty, teacher.predicted_difficulty(patches_of()))


# End to end


ASKING: list[dict[str, Any]] = [
    {"selection": {"feedback": 0.5}},
    {"selection": {"feedback": 1.0}},
    {"selection": {"rule": "hardest"}},
    {"selection": {"features": "tokens"}},
    {"selection": {"features": "tokens", "scope": "dataset"}},
    {"selection": {"mode": "parts", "features": "tokens"}},
    {"variant": "hpm", "selection": {"score_share_start": 0.5}},
    {"variant": "hpm", "selection": {"score_share_start": 0.5}, "loss": {"ranking_weight": 0.0}},
    {"variant": "attmask"},
    {"variant": "attmask", "model": {**TINY, "class_token": False}},
    {"selection": {"mode": "soft", "score": "attention"}},
    {"selection": {"mode": "hard", "hard_by": "score", "score": "difficulty"}},
]


@pytest.mark.parametrize("overrides", ASKING, ids=str)
def test_masks_follow_the_teacher_once_the_warm_up_is_over(
    ultrasound: Phantoms, overrides: dict[str, Any]
) -> None:
    images, _, keys = ultrasound

    def mask(model: MaskedAutoencoder, config: PretrainConfig, epoch: int) -> Tensor:
        selection = Masking(model, config).mask_augmented(images, keys, keys, TrainingStep(epoch))[
            1
        ]
        assert torch.equal(
            torch.cat([selection.masked, selection.visible], 1).sort(1).values,
            torch.arange(64).expand(16, -1),
        )
        return selection.masked

    config = tiny(overrides, {"loss": {"warmup": 0.1}})
    one, other = build(config), build(config)
    with torch.no_grad():  # at first all attention is alike
        for parameter in other.teacher.parameters():
            parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            )
    assert not torch.equal(mask(one, config, 3), mask(other, config, 3))
    if config.selection.mode != "ranked":  # which asks from the start, as the published ones do
        assert torch.equal(mask(one, config, 2), mask(other, config, 2))
