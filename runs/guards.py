"""What ends a run before its last step: a signal, and numbers that are not finite."""

from __future__ import annotations

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
            os.write(2, b"\nstopped at once, nothing saved since the last snapshot\n")
            os._exit(128 + number)


class FiniteWatch:
    """Remembers, on the device, the first iteration with a loss that is not finite.

    It is asked where the loop waits for the device anyway.
    """

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
