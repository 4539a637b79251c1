"""Train one model on several workers: replicated (DDP), or with sharded encoder blocks (FSDP2).

This is the only module that imports torch.distributed. In a single process, everything here does
nothing. Checkpoints know nothing of it: a run may resume with another number of workers or another
sharding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

State = dict[str, Any]

# Parameters of a model that `sharding: auto` shards: ViT-L has 300 million, ViT-B 86.
MIN_SHARDED_PARAMETERS = 200e6


def is_distributed() -> bool:
    """Return whether this process belongs to a group of workers, be it a group of one."""
    return dist.is_initialized()


def world_size() -> int:
    """Return the number of workers."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this worker."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all workers."""
    if dist.is_initialized():
        dist.barrier()


# Models


def should_shard(sharding: str, model: nn.Module, device: str) -> bool:
    """Return whether `resources.sharding` means that this model is sharded."""
    if world_size() == 1 or sharding == "ddp":
        return False
    if sharding == "fsdp":
        return True
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters >= MIN_SHARDED_PARAMETERS and device.startswith("cuda")


def shard_blocks(blocks: Iterable[nn.Module], device: str) -> None:
    """Shard blocks over the workers; each block is gathered while it runs."""
    mesh = init_device_mesh(device.partition(":")[0], (world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Return whether a part of the model is sharded."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def wrap_ddp(model: nn.Module) -> nn.Module:
    """Return a module that averages gradients over workers; the model itself needs none if alone.

    Sharded blocks average their own, see `average_unsharded_gradients` for the rest.
    """
    if world_size() == 1 or is_sharded(model):
        return model
    # Buffers are equal without an exchange: they hold positions, and sums over all workers.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.8 does not know the new name
        return DistributedDataParallel(model, broadcast_buffers=False)


# Gradients


@contextmanager
def no_grad_sync(network: nn.Module, unless: bool) -> Iterator[None]:
    """Add up gradients of backward passes in this context without exchanging them.

    Args:
        network: what `wrap_ddp` returned, compiled or not.
        unless: exchange after all, with the last backward pass of a batch.
    """
    # torch.compile hides the module that it compiled.
    model = getattr(network, "_orig_mod", network)
    if isinstance(model, DistributedDataParallel) and not unless:
        with model.no_sync():
            yield
        return
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(unless, recurse=False)
    yield


def average_unsharded_gradients(model: nn.Module) -> None:
    """Average the gradients of a sharded model's other parameters, after the last backward pass."""
    if world_size() == 1 or not is_sharded(model):
        return
    gradients = [gradient for gradient in _gradients(model) if not isinstance(gradient, DTensor)]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    means = flat.split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradient down to a norm of `max_norm`; return its norm before, on all workers."""
    gradients = _gradients(model)
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not sharded:
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norms = [_unshard(nn.utils.get_total_norm(sharded))]
    unsharded = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if unsharded:
        norms.append(nn.utils.get_total_norm(unsharded))
    norm = torch.stack(norms).norm()
    for gradient in gradients:
        gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


# State. torch.distributed.checkpoint.state_dict is not used: it gives an optimizer without state a
# fake step, and refuses the state of one whose parameters have not all had a gradient yet.


def gather_state(state: Any) -> Any:
    """Replace sharded tensors in nested mappings and lists; all workers call it together."""
    if isinstance(state, Tensor):
        return _unshard(state)
    if isinstance(state, dict):
        return {key: gather_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gather_state(value) for value in state)
    return state


def _unshard(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def load_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, model_state: State, optimizer_state: State
) -> None:
    """Load gathered states, with any number of workers and any sharding.

    Raises:
        RuntimeError: they belong to a model of another shape.
        KeyError: the same.
    """
    own_state = model.state_dict()
    model.load_state_dict(
        {
            name: shard_like(value, own_state[name]) if name in own_state else value
            for name, value in model_state.items()
        }
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {}
    for number, values in optimizer_state["state"].items():
        moments[number] = {
            name: shard_like(value, parameters[number]) if value.dim() else value
            for name, value in values.items()
        }
    optimizer.load_state_dict({**optimizer_state, "state": moments})


def shard_like(value: Tensor, model_value: Tensor) -> Tensor:
    """Shard a tensor as one of the model is sharded, if it is."""
    if not isinstance(model_value, DTensor):
        return value
    return distribute_tensor(
        value.to(model_value.device), model_value.device_mesh, model_value.placements
    )


# Values


def mean_over_workers(values: Tensor) -> Tensor:
    """Return the mean of all workers' values, on each of them."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def broadcast_from_rank0(value: int, device: str) -> int:
    """Return the first worker's value, on each of them."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.broadcast(tensor, src=0)
    return int(tensor.item())


def broadcast_tensors_from_rank0(*tensors: Tensor) -> None:
    """Overwrite tensors in place with those of the first worker."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def sum_over_workers(*tensors: Tensor) -> None:
    """Replace tensors in place by their sums over all workers; no gradient passes."""
    if is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all workers in rank order, as in the global batch.

    Workers may hold different numbers of rows.
    """
    if not is_distributed():
        return rows
    parts: list[Tensor] = [rows] * dist.get_world_size()
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts).to(rows.device)


def gather_batch(share: Tensor, count: int) -> Tensor:
    """Return the rows of a batch in its own order; gradients flow to this worker's share.

    Args:
        share: (n, ...), rows `rank::world_size` of the batch; n is equal on all workers.
        count: number of rows of the batch. Rows beyond it are padding.
    """
    if world_size() == 1:
        return share
    parts = [torch.empty_like(share) for _ in range(world_size())]
    dist.all_gather(parts, share.detach().contiguous())
    parts[rank()] = share
    return torch.stack(parts, 1).flatten(0, 1)[:count]


def differentiable_sum(x: Tensor) -> Tensor:
    """Return the sum of all workers' `x`; its gradient is that of the sum of their losses."""
    return _DifferentiableSum.apply(x) if is_distributed() else x


class _DifferentiableSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
