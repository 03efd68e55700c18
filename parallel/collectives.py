"""Several processes train one run: who is who, what they exchange, and layers that act on the whole batch.

Every process holds the whole model and an equal slice of each batch; gradients are averaged after each backward.
`batch_size` is that of the whole batch, and what is drawn at random is drawn for the whole batch in every process,
which keeps its own slice: the number of processes does not show in what a run sees. In one process everything here
does nothing. Starting and ending the processes: launch.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
from pydantic import BaseModel
from torch import Tensor

from data.batch import Part
from utils import UserError, one_line

T = TypeVar("T")
BUCKET_BYTES = 32 * 2**20  # of gradients in one message: while it travels the next one is packed


class ProcessLost(UserError):
    """Another process of this run has ended or cannot be reached. Not bad input, so its exit status is 1."""

    status = 1


def rank() -> int:
    """This process's number, 0..world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number among the processes of its machine."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


@contextmanager
def reaching_others() -> Iterator[None]:
    """Around each exchange: what the backends raise when a process is gone becomes ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        why = one_line(error)
        raise ProcessLost(
            f"another process of this run has ended or cannot be reached, so all end; continue with --resume ({why})"
        ) from None


# ------------------------------------------------------------------------------------------- exchanges
@torch.no_grad()
def average_gradients(*optimizers: torch.optim.Optimizer) -> None:
    """Replace the gradients of the optimisers' parameters by their mean over the processes.

    To be called after backward and before the step, and before a loss scale is taken back: an overflow in one process
    then shows in all. Parameters without gradient stay without: which they are is the same in every process, because
    it depends on the config and the iteration alone.
    """
    if world_size() == 1:
        return
    grads = [p.grad for o in optimizers for group in o.param_groups for p in group["params"] if p.grad is not None]
    sent = []
    with reaching_others():
        for bucket in buckets(grads, BUCKET_BYTES):
            flat = torch.cat([grad.reshape(-1) for grad in bucket])
            sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, message in sent:
            message.wait()
            flat.div_(world_size())
            for grad, values in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(values.view_as(grad))


def buckets(tensors: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Consecutive tensors of together at most `size` bytes; a larger one is alone."""
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and filled + tensor.nbytes > size:
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.nbytes
    if bucket:
        yield bucket


def average_terms(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms of the whole batch: their means over the processes' equal slices. Not finite in one, in all."""
    if world_size() == 1:
        return terms
    values = torch.stack([term.detach().double() for term in terms.values()])
    with reaching_others():
        dist.all_reduce(values)
    return dict(zip(terms, values / world_size(), strict=True))


def gather(value: T) -> list[T]:
    """The value of every process, in their order, in every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with reaching_others():
        dist.all_gather_object(values, value)
    return values


def from_first_of_machine(value: T) -> T:
    """The value of the first process of this machine, in all its processes."""
    return gather(value)[rank() - local_rank()]


def wait_for_all() -> None:
    """Return when every process has come here."""
    gather(None)


# ---------------------------------------------------------------------------------- slices of the batch
def own_batch_size(batch_size: int, *, sync_bn: bool, processes: int | None = None) -> int:
    """How many images of every batch a process has. Raises UserError where they cannot be shared out."""
    processes = processes or world_size()
    n, rest = divmod(batch_size, processes)
    if rest:
        raise UserError(
            f"batch_size {batch_size} cannot be shared out equally over {processes} processes; it counts the images "
            f"of all: make it a multiple of {processes}"
        )
    if n == 1 and processes > 1 and not sync_bn:
        raise UserError(
            f"batch_size {batch_size} over {processes} processes leaves one image in each, too few for the statistics "
            "of BatchNorm; raise batch_size, use fewer processes or set sync_bn: true"
        )
    return n


def own_part() -> Part:
    """The slice of every batch that this process has."""
    return Part(rank(), world_size())


# ----------------------------------------------------------------------------------- keeping in step
def start_together(trainer: Trainer, start: int, device: torch.device) -> None:
    """Before the first step: weights, buffers and random state of process 0 for all, then `check_ranks`.

    Raises UserError where the processes would start at different iterations.
    """
    if world_size() == 1:
        return
    starts = gather(start)
    if len(set(starts)) > 1:
        raise UserError(
            f"the processes found different snapshots, after {', '.join(map(str, starts))} steps; "
            "--output_path must be the same folder for all"
        )
    share(lambda net: [*net.parameters(), *net.buffers()], trainer)
    # Equal states make equal masks of dropout; a snapshot holds those of process 0.
    states = gather((torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None))
    torch.set_rng_state(states[0][0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[0][1], device)
    check_ranks(trainer, start)


def share_buffers(trainer: Trainer) -> None:
    """The networks' buffers (running statistics) of process 0 for all. Before a snapshot, which keeps these."""
    share(lambda net: list(net.buffers()), trainer)


def share(tensors: Callable[[nn.Module], list[Tensor]], trainer: Trainer) -> None:
    for net in trainer.networks().values():
        share_tensors(tensors(net))


@torch.no_grad()
def share_tensors(tensors: list[Tensor]) -> None:
    """The values of process 0 for all, in place."""
    if world_size() == 1:
        return
    with reaching_others():
        for tensor in tensors:
            # A broadcast wants dense rows, which a channels-last weight has not.
            dense = tensor.contiguous()
            dist.broadcast(dense, src=0)
            if dense is not tensor:
                tensor.copy_(dense)


def check_ranks(trainer: Trainer, t: int) -> None:
    """Raises UserError when a weight or an optimiser's state is not the same, bit for bit, in every process."""
    if world_size() == 1:
        return
    named = [(f"{net}.{name}", p) for net, m in trainer.networks().items() for name, p in m.named_parameters()]
    names = {id(p): name for name, p in named}
    for optimizer in trainer.optimizers().values():
        for p, state in optimizer.state.items():
            named += [(f"{names[id(p)]} ({key})", v) for key, v in state.items() if isinstance(v, Tensor)]
    hashes = torch.stack([checksum(tensor) for _, tensor in named]).cpu()
    theirs = gather(hashes)
    if any(len(other) != len(hashes) for other in theirs):
        raise UserError(f"iteration {t}: the optimisers of the processes hold different states; resume the run")
    differs = (torch.stack(theirs) != hashes).any(dim=0).any(dim=1)
    if differs.any():
        wrong = [name for (name, _), bad in zip(named, differs.tolist(), strict=True) if bad]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"iteration {t}: the processes' weights are no longer the same ({wrong[0]}{more}); "
            "continue from an earlier snapshot with --resume ITERATION"
        )


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """(2,) int64 on the CPU: sums of the values' bits, plain and weighted by their place, modulo 2**64.

    Sums of whole numbers do not depend on their order, so the same values have the same sum on every device.
    """
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(-1).view(whole).to(torch.int64)
    place = torch.arange(1, len(bits) + 1, device=bits.device)
    return torch.stack([bits.sum(), (bits * place).sum()]).cpu()


class Trainer(Protocol):
    cfg: BaseModel
    device: torch.device

    def networks(self) -> dict[str, nn.Module]: ...
    def optimizers(self) -> dict[str, torch.optim.Optimizer]: ...
    def scalers(self) -> dict[str, torch.amp.GradScaler]: ...
