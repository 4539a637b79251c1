"""Training state of a run: model, optimizer, gradient scaler and weight EMA."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.errors import CheckpointError, ConfigError
from amlp_ray.method.autoencoder import MaskedAutoencoder, build_autoencoder
from amlp_ray.method.encoder import use_fused_attention
from amlp_ray.method.precision import autocast_type
from amlp_ray.method.simsiam import SimSiam
from amlp_ray.training.checkpoint.manager import State
from amlp_ray.training.checkpoint.pretrained import load_pretrained_encoder
from amlp_ray.training.checkpoint.restore import load_latest_on_all
from amlp_ray.training.objectives import Model
from amlp_ray.utils import distributed
from amlp_ray.utils.event_log import EventLog


class TrainState:
    """Everything that changes while a run trains. It is equal on all workers, sharded blocks aside.

    Attributes:
        model: the model that is trained.
        optimizer: of its weights.
        scaler: the loss scale of fp16; disabled otherwise.
        weight_ema: the moving average of the weights, as a model; None if it is not configured.
        steps: number of steps in that average.
        initial_weights: a sentence on the weights that the model began with; empty without any.
    """

    def __init__(
        self,
        config: PretrainConfig,
        spec: ImageSpec,
        device: str,
        *,
        sharding: str = "auto",
        resumes: bool = False,
    ) -> None:
        """Create the model from the seed and from `config.weights`.

        Args:
            sharding: `resources.sharding`.
            resumes: whether a checkpoint will replace all weights, so that none need be loaded.
        """
        self.config = config
        self.device = device
        initial = config.model_copy(update={"weights": None}) if resumes else config
        model, self.initial_weights = new_model(initial, spec)
        self.model = model.to(device)
        use_fused_attention(self.model, device != "cpu" or autocast_type(config, device) is None)
        self.weight_ema: Model | None = None
        if config.weight_ema:
            self.weight_ema = deepcopy(self.model).requires_grad_(False)
        self.steps = 0
        self._unsharded: Model | None = None
        if distributed.should_shard(sharding, self.model, device):
            self._shard()
        self.optimizer = new_optimizer(self.model, config)
        device_type = device.partition(":")[0]
        self.scaler = torch.amp.GradScaler(device_type, enabled=config.precision == "fp16")

    @property
    def eval_model(self) -> Model:
        """The model that is evaluated and exported.

        This is the weight EMA, an unsharded copy that `gather_state` updates, or the model itself.
        """
        return self._unsharded or self.weight_ema or self.model

    def _shard(self) -> None:
        if not isinstance(self.model, MaskedAutoencoder):
            raise ConfigError(
                "resources.sharding=fsdp shards autoencoders only; use ddp for objective simsiam."
            )
        if self.weight_ema is not None or self.config.precision == "fp16":
            raise ConfigError(
                "resources.sharding=fsdp supports neither weight_ema nor precision=fp16; "
                "use ddp or bf16."
            )
        self._unsharded = deepcopy(self.model).requires_grad_(False)
        blocks = shardable_blocks(self.model)
        if self.model.teacher is not None:
            blocks += shardable_blocks(self.model.teacher)
        distributed.shard_blocks(blocks, self.device)

    @torch.no_grad()
    def step(self) -> None:
        """Take the optimizer's step with the clipped gradients of the global batch."""
        # Skips a step whose fp16 gradients overflowed.
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.weight_ema is None:
            return
        self.steps += 1
        # A young average forgets faster, or that of a short run would be of random weights.
        decay = min(self.config.weight_ema, (1 + self.steps) / (10 + self.steps))
        for mean, value in zip(self.weight_ema.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(value.to(mean.dtype), 1 - decay)

    def gather_state(self) -> State:
        """Collect what a checkpoint holds and update `eval_model`; all workers call it together.

        Random numbers need no state: they follow from seed, epoch and image (see `counter_rng`).
        """
        model = distributed.gather_state(self.model.state_dict())
        state: State = {
            "model": model,
            "optimizer": distributed.gather_state(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "steps": self.steps,
            "config": self.config.model_dump(mode="json"),
        }
        if self._unsharded is not None:
            self._unsharded.load_state_dict(model)
        if self.weight_ema is not None:
            # Buffers, such as centroids, are copied and not averaged.
            for mean, value in zip(self.weight_ema.buffers(), self.model.buffers(), strict=True):
                mean.copy_(value)
            state["weight_ema"] = self.weight_ema.state_dict()
        return state

    def resume(self, folder: Path, events: EventLog) -> int:
        """Load the newest undamaged checkpoint of the run in `folder`.

        Returns:
            Its epoch; 0 if there is none.

        Raises:
            CheckpointError: all are damaged, or they belong to another config or other images.
        """
        checkpoint = load_latest_on_all(folder, events, self.device)
        if checkpoint is None:
            return 0
        state, path = checkpoint
        # How images are read does not change the result.
        config = self.config.model_dump(mode="json", exclude={"data"})
        changed = [key for key in config if state["config"].get(key) != config[key]]
        if changed:
            raise CheckpointError(
                f"{path} was written with other settings ({', '.join(changed)}); "
                f"continue with the same settings or choose another folder."
            )
        self.load(state)
        return int(state["epoch"])

    def load(self, state: State) -> None:
        """Load what `gather_state` returned.

        Raises:
            CheckpointError: it belongs to a model of another shape.
        """
        try:
            distributed.load_state(self.model, self.optimizer, state["model"], state["optimizer"])
            if self._unsharded is not None:
                self._unsharded.load_state_dict(state["model"])
            if self.weight_ema is not None:
                self.weight_ema.load_state_dict(state["weight_ema"])
        except (RuntimeError, KeyError):
            raise CheckpointError(
                "The checkpoint was written for images of another size or number of channels; "
                "continue with the same data or choose another folder."
            ) from None
        self.scaler.load_state_dict(state["scaler"])
        self.steps = state["steps"]


def new_model(config: PretrainConfig, spec: ImageSpec) -> tuple[Model, str]:
    """Create a run's model from its seed and from `config.weights`; the same on every worker.

    Returns:
        The model, and a sentence on what was loaded and how it was adapted; empty without weights.
    """
    torch.manual_seed(config.seed)
    model: Model
    if config.objective == "simsiam":
        model = SimSiam(config.model, spec)
    else:
        model = build_autoencoder(config, spec)
    if config.weights is None:
        return model, ""
    pretrained = load_pretrained_encoder(
        config.weights, spec, model=config.model, name=config.model.encoder
    )
    weights = pretrained.encoder.state_dict()
    model.encoder.load_state_dict(weights)
    if isinstance(model, MaskedAutoencoder) and model.teacher is not None:
        model.teacher.encoder.load_state_dict(weights)
    return model, pretrained.description


def shardable_blocks(model: Model) -> list[nn.Module]:
    """Return the blocks that are sharded: all of the encoder but the last.

    Decoders are narrow. The attention of a teacher's last block is read by calling its parts, which
    a sharded block does not support, and a teacher is sharded as its model is.
    """
    return list(model.encoder.blocks[:-1])


def new_optimizer(model: Model, config: PretrainConfig) -> torch.optim.AdamW:
    """Create AdamW as in MAE; biases and norms are not decayed.

    Blocks that may be sharded are groups of their own, sharded or not: a fused step takes no
    mixture, and the order of the state is the same whoever resumes from it.
    """
    in_blocks = {id(p) for block in shardable_blocks(model) for p in block.parameters()}
    # Matrices and vectors of shardable blocks, then those of the rest.
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": decay} for decay in (config.weight_decay, 0.0) * 2
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            group = 0 if id(parameter) in in_blocks else 2
            groups[group + (parameter.dim() <= 1)]["params"].append(parameter)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
