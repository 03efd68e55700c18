"""Training batches: pairs of images of one identity, augmented in batches on the training device.

Every random draw is a function of (seed, iteration), never of a generator's history, so a stream resumed at
iteration t is the one that was interrupted, and the number of workers does not show in it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.augment import augment
from data.batch import Batch
from data.cache import cached_images
from data.folders import ImageList
from data.generated import SoftLabels
from data.images import normalise, resize, resized, to_device
from utils import UserError

# Workers that die close together are no accident: so many within so many batches end the run.
_DEATHS, _CLOSE = 3, 1000
# First word of the seeds after `seed`; without it, permutation 1 and draw 0 would share a generator.
_PERMUTATION, _DRAW = 0, 1


class _Raw(NamedTuple):
    """What is read for a batch, x then xp, before it is augmented.

    Bytes, because this is what worker processes hand over and what a GPU fetches: a quarter of floats.
    """

    pixels: Tensor  # (n, 3, h, w) uint8
    chosen: Tensor  # (N or 2N,) which of them, then the draws of `augment`
    flip: Tensor
    top: Tensor
    left: Tensor
    index: Tensor  # (N,) of x in the image list


class PairLoader:
    """An endless stream of training batches over one image list, which can be entered at any iteration.

    Epochs are independent permutations; the last incomplete batch of each is dropped. Loaders with different
    seeds over the same list give images a and b of the method.

    images         the training images
    batch_size     N; at most the number of images
    height, width  size of the batches' images in pixels
    seed           at least 0; together with the iteration it decides every draw
    pad            pixels added on each side before the random crop
    cache          keep all images in memory, decoded here, once: see `data.cache.cached_images`. A tensor: the
                   `pixels` of another loader over the same list, shared instead of decoded again
    cache_limit_mb  size that the cache may have; the files are read where it does not suffice
    num_workers    processes that read files; 0 reads in one background thread. Unused with a cache
    with_positive  False: no `xp` (teacher training)
    soft_labels    of all images, for `Batch.q`
    device         where batches are augmented, and where all of them but `index` is; a GPU fetches bytes from
                   pinned memory
    part           (rank, world size): batches hold the rank-th of as many equal slices of the N images; the same
                   draws are made in every process, so that the slices together are the batch of one process

    Raises UserError for fewer images than `batch_size`, and while batches are drawn for an undecodable file.
    """

    def __init__(
        self,
        images: ImageList,
        *,
        batch_size: int,
        height: int,
        width: int,
        seed: int,
        pad: int = 10,
        cache: bool | str | Tensor = False,
        cache_limit_mb: int = 4096,
        num_workers: int = 0,
        with_positive: bool = True,
        soft_labels: SoftLabels | None = None,
        device: torch.device | str = "cpu",
        part: tuple[int, int] = (0, 1),
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("image height", height, 1),
            ("image width", width, 1),
            ("seed", seed, 0),
            ("pad", pad, 0),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise UserError(f"{name} {value}: must be at least {least}")
        if len(images) < batch_size:
            where = os.path.commonpath([path.parent for path in images.paths]) if len(images) else "the data set"
            raise UserError(
                f"{where}: {len(images)} training images are fewer than batch_size {batch_size}; "
                "lower batch_size or add images"
            )
        self.images = images
        self.batch_size = batch_size
        self.height = height
        self.width = width
        self.seed = seed
        self.pad = pad
        self.num_workers = num_workers
        self.with_positive = with_positive
        self.soft_labels = soft_labels
        self.device = torch.device(device)
        rank, processes = part
        if batch_size % processes:
            raise ValueError(f"{batch_size} images are not {processes} equal slices")
        self._own = slice(rank * batch_size // processes, (rank + 1) * batch_size // processes)
        self.batches_per_epoch = len(images) // batch_size
        self._labels = images.labels()
        # The images of label k are _by_label[_first[k] : _first[k] + _size[k]]; image i is the _place[i]-th.
        self._by_label = np.argsort(self._labels, kind="stable")
        self._size = np.bincount(self._labels)
        self._first = np.cumsum(self._size) - self._size
        self._place = np.empty(len(images), dtype=np.int64)
        self._place[self._by_label] = np.arange(len(images)) - self._first[self._labels[self._by_label]]
        self._epoch: tuple[int, np.ndarray] | None = None

        self.pixels: Tensor | None
        if isinstance(cache, Tensor):
            if tuple(cache.shape[:2]) != (len(images), 3) or cache.dim() != 4 or cache.dtype != torch.uint8:
                raise ValueError(f"cache is {cache.dtype} {tuple(cache.shape)}, not uint8 ({len(images)}, 3, h, w)")
            self.pixels = cache
        else:
            self.pixels = cached_images(images.paths, cache, height, width, limit_mb=cache_limit_mb)

    @property
    def resized_by(self) -> str:
        """What resizes the images: "Pillow", or "PyTorch, DEVICE" from a cache at the files' size."""
        if self.pixels is None or self.pixels.shape[2:] == (self.height, self.width):
            return "Pillow"
        return f"PyTorch, {self.device.type}"

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The batches of iterations start, start + 1, ... without end, prepared ahead in the background."""
        if start < 0:
            raise ValueError(f"start {start} is negative")
        if self.pixels is None and self.num_workers > 0:
            return self._batches_from_workers(start)
        return self._batches_from_thread(start)

    def batch(self, iteration: int) -> Batch:
        """The batch of one iteration."""
        return self._finish(self._raw(iteration))

    def order(self, epoch: int) -> np.ndarray:
        """(n,) the permutation of the images in an epoch; its batches are consecutive slices."""
        kept = self._epoch
        if kept is None or kept[0] != epoch:
            rng = np.random.default_rng((self.seed, _PERMUTATION, epoch))
            kept = self._epoch = (epoch, rng.permutation(len(self.images)))
        return kept[1]

    def files(self, iteration: int) -> list[Path]:
        """The files of the batch of one iteration, of all processes: those of x, then those of xp."""
        index, positives, _ = self._choose(iteration)
        return [self.images.paths[i] for i in np.concatenate([index, *positives])]

    def _raw(self, iteration: int) -> _Raw:
        index, positives, draws = self._choose(iteration)
        own = self._own
        index = index[own]
        chosen = np.concatenate([index, *(other[own] for other in positives)])
        flip, top, left = (
            torch.from_numpy(np.concatenate([draw[own] for draw in parts])) for parts in zip(*draws, strict=True)
        )
        here = torch.arange(len(chosen))
        if self.pixels is None:
            pixels = torch.stack([resized(self.images.paths[i], self.height, self.width) for i in chosen])
        elif self.device.type == "cpu" and self.pixels.shape[2:] == (self.height, self.width):
            pixels, here = self.pixels, torch.from_numpy(chosen)
        else:
            pixels = self.pixels[torch.from_numpy(chosen)]
        return _Raw(pixels, here, flip, top, left, torch.from_numpy(index.copy()))

    def _choose(self, iteration: int) -> tuple[np.ndarray, list[np.ndarray], list[tuple[np.ndarray, ...]]]:
        """Of the whole batch: the index of x; that of xp, if there is one; the draws of their augmentations."""
        epoch, step = divmod(iteration, self.batches_per_epoch)
        index = self.order(epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        rng = np.random.default_rng((self.seed, _DRAW, iteration))
        draws, positives = [self._draw_augmentation(rng)], []
        if self.with_positive:
            positives = [self._draw_positives(rng, index)]
            draws.append(self._draw_augmentation(rng))
        return index, positives, draws

    def _draw_augmentation(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(N,) mirror or not, (N,) top and (N,) left of the crop."""
        n, places = self.batch_size, 2 * self.pad + 1
        return rng.random(n) < 0.5, rng.integers(0, places, n), rng.integers(0, places, n)

    def _draw_positives(self, rng: np.random.Generator, index: np.ndarray) -> np.ndarray:
        """(N,) for each image another one of its identity, all equally likely; itself if it has no other."""
        label = self._labels[index]
        others = self._size[label] - 1
        place = rng.integers(0, np.maximum(others, 1))
        # Numbers 0..others-1 stand for the images other than this one: step over it.
        place += (place >= self._place[index]) & (others > 0)
        return self._by_label[self._first[label] + place]

    def _finish(self, raw: _Raw) -> Batch:
        pixels, *draws = (to_device(part, self.device) for part in raw[:5])
        images = normalise(augment(resize(pixels, self.height, self.width), *draws, self.pad))
        index, n = raw.index, len(raw.index)
        y = to_device(torch.from_numpy(self._labels[index.numpy()]), self.device)
        q = None
        if self.soft_labels is not None:
            q = to_device(torch.from_numpy(self.soft_labels.rows(index.numpy())), self.device)
        return Batch(images[:n], images[n:], y, index, q)

    def _batches_from_thread(self, start: int) -> Iterator[Batch]:
        # On a CPU the thread does everything. A GPU's work is handed to it from the main thread, in whose stream it is.
        on_cpu = self.device.type == "cpu"
        prepare, finish = (self.batch, lambda batch: batch) if on_cpu else (self._raw, self._finish)
        pool = ThreadPoolExecutor(1)
        try:
            ahead = deque(pool.submit(prepare, start + i) for i in range(2))
            for iteration in count(start + len(ahead)):
                ready = ahead.popleft().result()
                ahead.append(pool.submit(prepare, iteration))
                yield finish(ready)
        finally:
            pool.shutdown(cancel_futures=True)

    def _batches_from_workers(self, start: int) -> Iterator[Batch]:
        iteration, deaths = start, deque(maxlen=_DEATHS)
        workers = _Workers(self, start)
        try:
            while True:
                try:
                    raw = next(workers.batches)
                except (RuntimeError, OSError, EOFError):
                    dead = workers.dead()
                    if not dead:
                        raise
                    workers.close()
                    deaths.append(iteration)
                    if len(deaths) == _DEATHS and iteration - deaths[0] < _CLOSE:
                        raise UserError(
                            f"processes that read images keep dying ({dead}), as when memory or /dev/shm is full; "
                            "lower num_workers, or set cache_images: auto"
                        ) from None
                    # Batches are functions of the iteration, so nothing is lost with a worker.
                    print(f"\nwarning: a process that reads images died ({dead}); started anew", file=sys.stderr)
                    workers = _Workers(self, iteration)
                    continue
                if isinstance(raw, UserError):
                    raise raw
                iteration += 1
                yield self._finish(raw)
        finally:
            workers.close()


class _Workers:
    """Processes that make the raw batches of iterations start, start + 1, ...; `batches` hands them out in order."""

    def __init__(self, loader: PairLoader, start: int) -> None:
        # A worker makes whole batches, handed out and returned in the order of the iterations.
        data = DataLoader(
            _Iterations(loader),
            batch_size=None,
            sampler=count(start),
            num_workers=loader.num_workers,
            collate_fn=_unchanged,
            worker_init_fn=_ignore_signals,
            # Its own, so that starting workers does not advance the global generator.
            generator=torch.Generator(),
        )
        others, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
        self.batches = iter(data)
        self._processes = set(multiprocessing.active_children()) - others
        if threading.current_thread() is threading.main_thread():
            # PyTorch's handler would raise in the middle of a step; a dead worker is noticed between steps as well.
            signal.signal(signal.SIGCHLD, handler)
        atexit.register(self._kill)

    def dead(self) -> str:
        """What has become of those that are no more, in words."""
        return ", ".join(
            f"process {p.pid} " + (f"by signal {-p.exitcode}" if p.exitcode < 0 else f"with status {p.exitcode}")
            for p in self._processes
            if not p.is_alive() and p.exitcode is not None
        )

    def close(self) -> None:
        """End the processes."""
        self.batches = None  # ends them in good order, where they can
        self._kill()
        atexit.unregister(self._kill)

    def _kill(self) -> None:
        # They do not listen to SIGTERM, by which Python's own exit would end them and then wait for ever.
        for process in self._processes:
            process.kill()


def _ignore_signals(_: int) -> None:
    # A signal to the whole group is for the main process, which still needs the batches of its step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Iterations(Dataset):
    """Item t is the raw batch of iteration t."""

    def __init__(self, loader: PairLoader) -> None:
        self.loader = loader

    def __getitem__(self, iteration: int) -> _Raw | UserError:
        try:
            return self.loader._raw(iteration)
        except UserError as error:
            # Raised in a worker it would arrive as a page of traceback.
            return error


def _unchanged(raw: _Raw | UserError) -> _Raw | UserError:
    return raw
