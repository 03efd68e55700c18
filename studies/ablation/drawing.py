"""The renderer in processes of its own, for the oracle of `studies.ablation` beside a GPU. No torch here."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from mannequins.dataset import Factors, load_factors

MOST_PROCESSES = 8
_factors: Factors | None = None  # of a process that draws


@contextmanager
def drawing_processes(data: Path, count: int | None = None) -> Iterator[Executor]:
    """Processes that `draw` images of the embedded data set `data`; as many as there are cores, at most 8."""
    count = count or min(MOST_PROCESSES, os.cpu_count() or 1)
    # Not forked: this process has threads, and a GPU.
    pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=_start, initargs=(data,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def draw(appearance_of: str, structure_of: str) -> np.ndarray:
    """A true swap, (H, W, 3) uint8, by a process of `drawing_processes`."""
    return _factors.true_swap(appearance_of, structure_of)


def _start(data: Path) -> None:
    global _factors
    # A signal to the whole group is for the main process, which still needs the swaps of its step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _factors = load_factors(data)
