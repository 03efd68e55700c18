"""What the processes of one run exchange, and how they stay in step. In a single process nothing here has an effect.

Every process holds the whole model and an equal slice of each batch, and gradients are averaged after each backward.
`batch_size` counts the whole batch. Every process makes the random draws of the whole batch and keeps those of its
slice, so a run sees the same images and draws on any number of processes. launch.py starts and ends the processes.
"""

from __future__ import annotations

from collections.abc import Iterator
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


class ProcessLost(UserError):
    """Another process of this run has ended or cannot be reached."""

    status = 1  # not bad input


def rank() -> int:
    """This process's number, 0..world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


@contextmanager
def reaching_others() -> Iterator[None]:
    """Around an exchange: what a backend raises when a process is gone becomes ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(f"a process of this run has ended or cannot be reached ({one_line(error)})") from None


# ------------------------------------------------------------------------------------------- exchanges
@torch.no_grad()
def average_gradients(*optimizers: torch.optim.Optimizer) -> None:
    """Replace the gradients of the optimisers' parameters by their mean over the processes.

    Call it after backward, and before the gradients are unscaled, so that an overflow in one process shows in all.
    Parameters without a gradient keep none: which they are depends on the config and the iteration alone, so every
    process skips the same.
    """
    if world_size() == 1:
        return
    grads = [p.grad for o in optimizers for group in o.param_groups for p in group["params"] if p.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    with reaching_others():
        dist.all_reduce(flat)
    flat.div_(world_size())
    for grad, values in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(values.view_as(grad))


def average_terms(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses of the whole batch: means over the processes' equal slices. A loss not finite in one is so in all."""
    if world_size() == 1:
        return terms
    values = torch.stack([term.detach().double() for term in terms.values()])
    with reaching_others():
        dist.all_reduce(values)
    return dict(zip(terms, values / world_size(), strict=True))


def gather(value: T) -> list[T]:
    """The values of all processes by rank, in every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with reaching_others():
        dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Return once every process has called this."""
    gather(None)


# ---------------------------------------------------------------------------------- slices of the batch
def own_batch_size(batch_size: int, *, sync_bn: bool) -> int:
    """The images of a batch that each process has. Raises UserError if they cannot be shared out."""
    n, rest = divmod(batch_size, world_size())
    if rest:
        raise UserError(
            f"batch_size {batch_size} cannot be shared out equally over {world_size()} processes; it counts the images "
            f"of all: make it a multiple of {world_size()}"
        )
    if n == 1 and world_size() > 1 and not sync_bn:
        raise UserError(
            f"batch_size {batch_size} over {world_size()} processes leaves one image in each, too few for the "
            "statistics of BatchNorm; raise batch_size, use fewer processes or set sync_bn: true"
        )
    return n


def own_part() -> Part:
    """This process's slice of every batch."""
    return Part(rank(), world_size())


# ----------------------------------------------------------------------------------- keeping in step
def start_together(trainer: Trainer, start: int, device: torch.device) -> None:
    """Before the first step: give all processes the weights, buffers and random state of process 0.

    Raises UserError if the processes would start at different iterations.
    """
    if world_size() == 1:
        return
    starts = gather(start)
    if len(set(starts)) > 1:
        raise UserError(
            f"the processes found different snapshots, after {', '.join(map(str, starts))} steps; "
            "--output_path must be the same folder for all"
        )
    for net in trainer.networks().values():
        share_tensors([*net.parameters(), *net.buffers()])
    # Equal states make equal masks of dropout; a snapshot holds the state of process 0.
    states = gather((torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None))
    torch.set_rng_state(states[0][0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[0][1], device)


def share_buffers(trainer: Trainer) -> None:
    """Give all processes the running statistics of process 0. A snapshot, which is about to be written, keeps these."""
    for net in trainer.networks().values():
        share_tensors(list(net.buffers()))


@torch.no_grad()
def share_tensors(tensors: list[Tensor]) -> None:
    """Give all processes the values of process 0, in place."""
    if world_size() == 1:
        return
    with reaching_others():
        for tensor in tensors:
            # A broadcast needs contiguous memory, which a channels-last weight has not.
            dense = tensor.contiguous()
            dist.broadcast(dense, src=0)
            if dense is not tensor:
                tensor.copy_(dense)


class Trainer(Protocol):
    cfg: BaseModel
    device: torch.device

    def networks(self) -> dict[str, nn.Module]: ...
    def optimizers(self) -> dict[str, torch.optim.Optimizer]: ...
    def scalers(self) -> dict[str, torch.amp.GradScaler]: ...
