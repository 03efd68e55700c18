"""What ends a run before its last step: a signal, numbers that are not finite, fp16 steps that are all skipped.

The watches cost a few tiny kernels a step and never wait for the device; they are read where the loop waits anyway.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from types import FrameType

import torch
from torch import Tensor

from parallel.collectives import Trainer, gather, world_size

# The terms that are sums of all others; one of them is not finite as soon as any other is not.
TOTALS = ("gen_total", "dis_total", "id")
NEVER = 2**62


class StopSignals:
    """Inside, SIGTERM and SIGINT are only noted, in `received`, for the loop to end after its step.

    The second one ends the process at once. Launchers often send one signal twice, to the process and to its group, so
    what follows within half a second is the same one. The handlers from before are put back on leaving. Outside the
    main thread, where no handler can be set, nothing changes.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)
    SAME = 0.5  # seconds
    EXCHANGED = 10  # steps after which several processes tell each other of their signals

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopSignals:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, done: int) -> bool:
        """Whether to stop after `done` steps. To be asked once a step: a signal that comes later is for the next one.

        Several processes have to agree, or one would wait for another that has left. They exchange signals every
        `EXCHANGED` steps.
        """
        if world_size() > 1:
            if done % self.EXCHANGED:
                return False
            self.received = next((signal for signal in gather(self.received) if signal is not None), None)
        return self.received is not None

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = signal.Signals(number), now
        elif now - self._at > self.SAME:
            for process in multiprocessing.active_children():
                process.kill()
            os.write(2, b"\nstopped at once, nothing saved since the last snapshot\n")
            os._exit(128 + number)


class FiniteWatch:
    """Remembers, on the device, the first iteration with a loss that is not finite."""

    KEPT = 1000  # iterations whose terms are kept until they are asked for

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), NEVER, dtype=torch.int64, device=device)
        self._recent: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=self.KEPT)

    def note(self, t: int, terms: dict[str, Tensor]) -> None:
        """Look at the terms of iteration `t`; a few kernels, no waiting."""
        total = torch.stack([terms[name].float() for name in TOTALS if name in terms]).sum()
        self._first = torch.where(total.isfinite(), self._first, self._first.clamp(max=t))
        self._recent.append((t, terms))

    def first(self) -> tuple[int, str] | None:
        """The first bad iteration and its terms in words; None, and a fresh start, while all were finite."""
        first = int(self._first)
        if first == NEVER:
            self._recent.clear()
            return None
        # Where the run has gone too far since, the terms of the oldest one kept tell as much.
        terms = next((terms for t, terms in self._recent if t >= first), {})
        return first, ", ".join(f"{name} {float(value):.4g}" for name, value in terms.items())


class SkippedSteps:
    """Counts the steps that the gradient scalers skip (fp16): a skipped step lowers the scale."""

    WINDOW = 100  # steps, at least, over which they must not be the most

    def __init__(self, scalers: dict[str, torch.amp.GradScaler], device: torch.device) -> None:
        self._scalers = {name: scaler for name, scaler in scalers.items() if scaler.is_enabled()}
        self._one = torch.ones((), device=device)
        # `scale` is the one public way to the scale that does not wait for the device.
        self._scales = {name: scaler.scale(self._one) for name, scaler in self._scalers.items()}
        self._counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in self._scalers}
        self._steps, self._checked, self._before = 0, 0, self.counts()

    def note(self) -> None:
        """Look at the scales after a step; a few kernels, no waiting."""
        self._steps += 1
        for name, scaler in self._scalers.items():
            scale = scaler.scale(self._one)
            self._counts[name] += scale < self._scales[name]
            self._scales[name] = scale

    def counts(self) -> dict[str, int]:
        """Skipped steps since the start, per scaler."""
        return {name: int(count) for name, count in self._counts.items()}

    def most(self) -> str | None:
        """In words, which scaler has skipped more than half of the steps since the last look, `WINDOW` or more."""
        steps, counts = self._steps - self._checked, self.counts()
        if steps < self.WINDOW:
            return None
        skipped = {name: count - self._before[name] for name, count in counts.items()}
        self._checked, self._before = self._steps, counts
        for name, count in skipped.items():
            if 2 * count > steps:
                return (
                    f"{count} of the last {steps} steps of {name} (gradient scale now {float(self._scales[name]):.3g})"
                )
        return None


def not_finite(trainer: Trainer) -> list[str]:
    """Names of the tensors of networks and optimisers that hold an infinity or no number."""
    tensors = {f"{name}.{key}": v for name, net in trainer.networks().items() for key, v in net.state_dict().items()}
    for name, optimizer in trainer.optimizers().items():
        for i, state in enumerate(optimizer.state.values()):
            tensors |= {f"{key} {i} of optimiser {name}": v for key, v in state.items() if isinstance(v, Tensor)}
    # Step counters may lie on the host.
    tensors = {name: v for name, v in tensors.items() if v.is_floating_point() and v.dim() > 0}
    finite = torch.stack([v.isfinite().all() for v in tensors.values()]).tolist()
    return [name for name, good in zip(tensors, finite, strict=True) if not good]
