"""Optimisers and learning rates. A rate at an iteration is a pure function of it, so resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn

from reIDmodel import IdNet


class NesterovSGD(torch.optim.SGD):
    """SGD with Nesterov momentum 0.9 in one fused kernel, whose momentum begins as zeros.

    PyTorch's begins as whatever lies in memory, which the kernel overwrites in the first step. Where that step is
    skipped, as fp16's first loss scale makes likely, the memory's content would stay as momentum. Zeros give the usual
    first step, bit for bit.
    """

    def __init__(self, groups: list[dict[str, Any]], weight_decay: float) -> None:
        super().__init__(groups, momentum=0.9, nesterov=True, weight_decay=weight_decay, fused=True)

    def step(self, closure: None = None) -> None:
        if not self.state:
            for weight in (weight for group in self.param_groups for weight in group["params"]):
                if weight.grad is not None:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        super().step(closure)


def adam(weights: Iterable[nn.Parameter], lr: float, *, betas: tuple[float, float], decay: float) -> torch.optim.Adam:
    """Adam for the generator or the discriminator."""
    return torch.optim.Adam([{"params": list(weights), "initial_lr": lr}], lr, betas, weight_decay=decay, fused=True)


def id_groups(net: IdNet, *, trunk_lr: float, head_lr: float) -> list[dict[str, Any]]:
    """The weights of an id net or a teacher: the trunk in the first group, every head in one of its own."""
    rates = [(net.model, trunk_lr), *((head, head_lr) for head in net.heads())]
    return [{"params": list(m.parameters()), "lr": lr, "initial_lr": lr} for m, lr in rates]


def id_sgd(net: IdNet, *, trunk_lr: float, head_lr: float, decay: float) -> NesterovSGD:
    """SGD for an id net or a teacher."""
    return NesterovSGD(id_groups(net, trunk_lr=trunk_lr, head_lr=head_lr), decay)


def id_adam(net: IdNet, *, trunk_lr: float, head_lr: float, decay: float) -> torch.optim.Adam:
    """Adam for a teacher."""
    return torch.optim.Adam(id_groups(net, trunk_lr=trunk_lr, head_lr=head_lr), weight_decay=decay, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's rate becomes its initial rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


@torch.no_grad()
def update_average(average: nn.Module, net: nn.Module, decay: float, t: int) -> None:
    """Move the weights and statistics of `average` towards those of `net` after iteration `t` (0-based).

    The average keeps `decay` of itself, and less in the first iterations, (1 + t) / (10 + t), so that it soon forgets
    what it began with.
    """
    kept = min(decay, (1 + t) / (10 + t))
    pairs = list(zip(average.state_dict().values(), net.state_dict().values(), strict=True))
    numbers = [(a, b) for a, b in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in numbers], [b for _, b in numbers], 1 - kept)
    for a, b in pairs:
        if not a.is_floating_point():
            a.copy_(b)


def lr_factor(policy: str, t: int, *, step_size: int, gamma: float, max_iter: int) -> float:
    """What DG-Net's learning rates are multiplied by at iteration `t` (0-based).

    multistep  `gamma` once for each of step_size, 1.5 step_size and 1.75 step_size that is at most t + 1
    step       `gamma` once for every `step_size` iterations
    cosine     from 1 to 0 at `max_iter`
    constant   1
    """
    if policy == "multistep":
        return gamma ** sum(milestone * step_size <= t + 1 for milestone in (1, 1.5, 1.75))
    if policy == "step":
        return gamma ** ((t + 1) // step_size)
    if policy == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(t / max_iter, 1)))
    return 1.0


def teacher_lr_factor(policy: str, t: int, *, warm_iter: int, max_iter: int) -> float:
    """What a teacher's learning rates are multiplied by at iteration `t` (0-based).

    A linear warm-up over `warm_iter` iterations; then a tenth after two thirds of the run (step), after 1/3 and 7/12 of
    it (multistep), or a cosine to 0.
    """
    factor = min(1.0, (t + 1) / warm_iter) if warm_iter else 1.0
    if policy == "multistep":
        return factor * 0.1 ** ((t >= max_iter / 3) + (t >= max_iter * 7 / 12))
    if policy == "cosine":
        return factor * 0.5 * (1 + math.cos(math.pi * t / max_iter))
    return factor * (0.1 if t >= max_iter * 2 // 3 else 1.0)
