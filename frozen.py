"""Passes that treat a net as a frozen copy of itself, without copying it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def weights_frozen(*nets: nn.Module) -> Iterator[None]:
    """Passes inside record no graph for these nets' weights; gradients still reach their inputs.

    Autograd decides at forward time what a pass differentiates, so nothing has to be copied and the
    backward may come after the context has ended.
    """
    weights = [p for net in nets for p in net.parameters() if p.requires_grad]
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)


@contextmanager
def frozen(net: nn.Module, *, batch_statistics: bool) -> Iterator[None]:
    """Passes inside treat `net` as a frozen copy without copying it.

    No graph for the weights, dropout off; BatchNorm uses the batch's statistics or the running ones as they
    stand, and changes neither. Afterwards everything is as before.
    """
    modules = [m for m in net.modules() if isinstance(m, _BatchNorm | nn.Dropout)]
    before = [(m, m.training, getattr(m, "track_running_stats", None)) for m in modules]
    for m in modules:
        if isinstance(m, nn.Dropout):
            m.training = False
        elif batch_statistics:
            m.training, m.track_running_stats = True, False
        else:
            m.training = False
    try:
        with weights_frozen(net):
            yield
    finally:
        for m, training, track in before:
            m.training = training
            if track is not None:
                m.track_running_stats = track
                if not batch_statistics:
                    # The graph keeps the buffers that it has read; later training passes update others.
                    m.running_mean, m.running_var = m.running_mean.clone(), m.running_var.clone()
