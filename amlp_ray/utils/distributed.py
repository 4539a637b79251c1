"""One model on several workers: whole on each (DDP), or its encoder's blocks cut among them (FSDP2).

What is exchanged, and how a cut model is put together again for checkpoints, which know nothing of it: a run may go on
with another number of workers, or with another way of cutting. Alone, everything here does nothing.
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

FSDP_FROM = (
    200e6  # parameters of a model that `sharding: auto` cuts: ViT-L has 300 million, ViT-B 86
)


def is_distributed() -> bool:
    """Return whether this process belongs to a group of workers, be it a group of one."""
    return dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def should_shard(sharding: str, model: nn.Module, device: str) -> bool:
    """Whether `resources.sharding` means that this model is cut."""
    if world_size() == 1 or sharding == "ddp":
        return False
    large = sum(parameter.numel() for parameter in model.parameters()) >= FSDP_FROM
    return sharding == "fsdp" or (large and device.startswith("cuda"))


def shard_blocks(blocks: Iterable[nn.Module], device: str) -> None:
    """Cut blocks among the workers; each is put together when it runs, and its gradient is cut again."""
    mesh = init_device_mesh(device.partition(":")[0], (world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def wrap_ddp(model: nn.Module) -> nn.Module:
    """What a step calls: the model itself, or one that averages gradients over workers."""
    if world_size() == 1 or is_sharded(model):
        return model
    # Buffers are the same on all workers without an exchange: they hold positions, and sums that are shared already.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its new name is not known to torch 2.8
        return DistributedDataParallel(model, broadcast_buffers=False)


@contextmanager
def no_grad_sync(network: nn.Module, unless: bool) -> Iterator[None]:
    """Backward passes in here only add up gradients, so that those of a batch are exchanged once, with its last."""
    model = getattr(network, "_orig_mod", network)  # of torch.compile, which hides what it compiled
    if isinstance(model, DistributedDataParallel) and not unless:
        with model.no_sync():
            yield
        return
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(unless, recurse=False)
    yield


def average_loose_gradients(model: nn.Module) -> None:
    """Average over workers the gradients that no block's cutting has averaged; after a batch's last backward."""
    if world_size() == 1 or not is_sharded(model):
        return
    loose = [
        p.grad for p in model.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)
    ]
    flat = torch.cat([gradient.flatten() for gradient in loose])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, mean in zip(loose, flat.split([g.numel() for g in loose]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Shrink the gradient to a norm of `largest` where it exceeds it; return its norm, the same on all workers."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return nn.utils.clip_grad_norm_(model.parameters(), largest)
    kinds = [[g for g in gradients if isinstance(g, DTensor) == cut] for cut in (True, False)]
    norms = [nn.utils.get_total_norm(kind) for kind in kinds if kind]
    total = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    for gradient in gradients:
        gradient.mul_((largest / (total + 1e-6)).clamp(max=1.0))
    return total


def gather_state(state: Any) -> Any:
    """Put cut tensors together, in any nesting of mappings and lists; all workers call this together."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, dict):
        return {key: gather_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gather_state(value) for value in state)
    return state


def shard_like(value: Tensor, model_value: Tensor) -> Tensor:
    """Cut a whole tensor as one of the model is cut."""
    if isinstance(model_value, DTensor):
        return distribute_tensor(
            value.to(model_value.device), model_value.device_mesh, model_value.placements
        )
    return value


def mean_over_workers(values: Tensor) -> Tensor:
    """The mean of all workers' values, on each of them."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def broadcast_from_rank0(value: int, device: str) -> int:
    """The first worker's value, on every worker."""
    if world_size() == 1:
        return value
    told = torch.tensor(value, device=device)
    dist.broadcast(told, src=0)
    return int(told.item())


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
