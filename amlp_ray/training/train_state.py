"""What learns in a run: the model, its optimiser, the loss scale of fp16, and the average of its weights."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from amlp_ray.config import ImageSpec, PretrainConfig
from amlp_ray.errors import CheckpointError, ConfigError
from amlp_ray.method.autoencoder import MaskedAutoencoder, build_autoencoder
from amlp_ray.method.encoder import use_fused_attention
from amlp_ray.method.precision import autocast_type
from amlp_ray.method.simsiam import SimSiam
from amlp_ray.training.checkpoint.manager import State
from amlp_ray.training.checkpoint.pretrained import starting_encoder
from amlp_ray.training.checkpoint.restore import agreed_checkpoint
from amlp_ray.training.objectives import Model
from amlp_ray.utils import distributed
from amlp_ray.utils.event_log import EventLog


class TrainState:
    """A run's model with all that changes as it learns. Equal on all workers, but for blocks that are cut among them.

    `whole` is the model that is looked at, scored and exported: the model itself, the average of its weights, or, where
    the model is cut, a whole copy that `refresh` brings up to date. `started_from` says what weights it began with.
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
        """Create everything from the seed, and from `weights` unless it `resumes`: a checkpoint replaces them."""
        self.config, self.device = config, device
        model, self.started_from = new_model(
            config.model_copy(update={"weights": None}) if resumes else config, spec
        )
        self.model = model.to(device)
        use_fused_attention(self.model, device != "cpu" or autocast_type(config, device) is None)
        self.weight_ema = deepcopy(self.model).requires_grad_(False) if config.weight_ema else None
        self.steps = 0  # that the average has seen
        self._copy: Model | None = None
        if distributed.should_shard(sharding, self.model, device):
            self._cut()
        self.optimizer = new_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(
            device.partition(":")[0], enabled=config.precision == "fp16"
        )

    @property
    def eval_model(self) -> Model:
        return self._copy or self.weight_ema or self.model

    def _cut(self) -> None:
        if not isinstance(self.model, MaskedAutoencoder):
            raise ConfigError(
                "resources.sharding=fsdp cuts autoencoders only; use ddp for objective simsiam."
            )
        if self.weight_ema is not None or self.config.precision == "fp16":
            raise ConfigError(
                "resources.sharding=fsdp goes with neither average nor precision=fp16; use ddp or bf16."
            )
        self._copy = deepcopy(self.model).requires_grad_(False)
        models = (
            [self.model, self.model.teacher] if self.model.teacher is not None else [self.model]
        )
        distributed.shard_blocks(
            [block for model in models for block in blocks_to_cut(model)], self.device
        )

    def step(self) -> None:
        """Take the optimiser's step; gradients are whole and clipped."""
        self.scaler.step(self.optimizer)  # leaves out a step whose fp16 gradients have overflowed
        self.scaler.update()
        if self.weight_ema is not None:
            self.steps += 1
            # Young averages forget faster, or a short run's would be of random weights.
            decay = min(self.config.weight_ema, (1 + self.steps) / (10 + self.steps))
            with torch.no_grad():
                for mean, value in zip(
                    self.weight_ema.parameters(), self.model.parameters(), strict=True
                ):
                    mean.lerp_(value.to(mean.dtype), 1 - decay)

    def gather_state(self) -> State:
        """Return what a checkpoint needs, and bring `whole` up to date; all workers call this together."""
        model, optimizer = (
            distributed.gather_state(self.model.state_dict()),
            distributed.gather_state(self.optimizer.state_dict()),
        )
        if self._copy is not None:
            self._copy.load_state_dict(model)
        if self.weight_ema is not None:  # what is no parameter, such as centroids, is not averaged
            for mean, value in zip(self.weight_ema.buffers(), self.model.buffers(), strict=True):
                mean.copy_(value)
        state = {
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "steps": self.steps,
        }
        return state | (
            {"weight_ema": self.weight_ema.state_dict()} if self.weight_ema is not None else {}
        )

    def resume(self, folder: Path, events: EventLog) -> int:
        """Go on from the folder's newest whole checkpoint; return its epoch, 0 where there is none.

        Raises:
            CheckpointError: none is whole, or it belongs to other settings or other images.
        """
        found = agreed_checkpoint(folder, events, self.device)
        if found is None:
            return 0
        state, path = found
        theirs, ours = state["config"], self.config.model_dump(mode="json")
        changed = [
            key for key in ours if theirs.get(key) != ours[key] and key != "data"
        ]  # how images are read
        if changed:
            raise CheckpointError(
                f"{path} was written with other settings ({', '.join(changed)}); "
                f"continue with the same settings or choose another folder."
            )
        self.load(state)
        return int(state["epoch"])

    def load(self, state: State) -> None:
        """Go on from what `refresh` returned.

        Raises:
            CheckpointError: it is of a model of another shape.
        """
        try:
            own = self.model.state_dict()
            self.model.load_state_dict(
                {
                    k: distributed.shard_like(v, own[k]) if k in own else v
                    for k, v in state["model"].items()
                }
            )
            for other in (self._copy, self.weight_ema):
                if other is not None:
                    other.load_state_dict(
                        state["weight_ema"] if other is self.weight_ema else state["model"]
                    )
        except (RuntimeError, KeyError):
            raise CheckpointError(
                "The checkpoint was written for images of another size or number of channels; "
                "continue with the same data or choose another folder."
            ) from None
        self.optimizer.load_state_dict(self._cut_moments(state["optimizer"]))
        self.scaler.load_state_dict(state["scaler"])
        self.steps = state["steps"]

    def _cut_moments(self, state: State) -> State:
        if self._copy is None:
            return state
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            i: {
                name: distributed.shard_like(value, parameters[i]) if value.dim() else value
                for name, value in kept.items()
            }
            for i, kept in state["state"].items()
        }
        return {**state, "state": moments}


def new_model(config: PretrainConfig, spec: ImageSpec) -> tuple[Model, str]:
    """The model of a run, from its seed, and from `weights` where they are given; the same on every worker.

    Returns:
        The model, and a sentence on what was loaded and how it was adapted, empty without weights.
    """
    torch.manual_seed(config.seed)
    if config.objective == "simsiam":
        model: Model = SimSiam(config.model, spec)
    else:
        model = build_autoencoder(config, spec)
    if config.weights is None:
        return model, ""
    start = starting_encoder(config.weights, spec, model=config.model, name=config.model.encoder)
    for one in (model, getattr(model, "teacher", None)):
        if one is not None:
            one.encoder.load_state_dict(start.encoder.state_dict())
    return model, start.told


def blocks_to_cut(model: Model) -> list[nn.Module]:
    """Which blocks are cut among workers, where a model is: all of the encoder but the last one.

    Of decoders, which are narrow, and of a teacher's last block, whose attention is read, the parts are called one by
    one, which a cut block does not bear; and a teacher is cut as its model is.
    """
    return list(model.encoder.blocks[:-1])


def new_optimizer(model: Model, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW as in MAE; biases and norms are not decayed.

    Blocks that may be cut are groups of their own, cut or not: a fused step takes no mixture, and so the state has one
    order, whoever goes on from it.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    in_blocks = {id(p) for block in blocks_to_cut(model) for p in block.parameters()}
    groups = []
    for cut in (True, False):
        some = [p for p in trained if (id(p) in in_blocks) == cut]
        groups += [
            {"params": [p for p in some if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in some if p.dim() <= 1], "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
