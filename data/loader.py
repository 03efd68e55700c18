"""Training batches: pairs of images of one identity, augmented in batches on the training device.

Every random draw is a function of (seed, iteration), never of a generator's history. A stream resumed at iteration t
therefore continues the interrupted one, and the number of threads does not change it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.augment import augment, change_colours, draw_colours
from data.batch import ALL, Batch, Part
from data.folders import ImageList
from data.generated import SoftLabels
from data.images import decoded, normalise, resize, to_device
from utils import UserError

# First word of the seeds after `seed`; without it, permutation 1 and draw 0 would share a generator.
_PERMUTATION, _DRAW, _BALANCED, _COLOURS = 0, 1, 2, 3


class _Raw(NamedTuple):
    """What is read for a batch, x then xp, before it is augmented.

    Pixels are bytes, because a GPU fetches them: a quarter of floats.
    """

    pixels: Tensor  # (n, 3, h, w) uint8, then which of them and the other draws of `augment`
    chosen: Tensor
    flip: Tensor
    top: Tensor
    left: Tensor
    index: Tensor  # (N,) of x in the image list
    colours: np.ndarray | None = None  # draws of `change_colours`


@dataclass(eq=False)
class PairLoader:
    """An endless stream of training batches over one image list, which can be entered at any iteration.

    Epochs are independent permutations; the last incomplete batch of an epoch is dropped. Two loaders with different
    seeds over the same list give images a and b of the method.

    batch_size     N of the whole batch, over all processes; at most the number of images
    height, width  size of the batches' images in pixels
    seed           with the iteration it decides every draw
    pad            pixels added on each side before the random crop
    pixels         all images, from `data.cache.cached_images`; None: they are read from their files
    num_workers    threads that read files; 0 reads in the thread that makes the batches. Unused with `pixels`
    with_positive  False: no `xp` (teacher training)
    soft_labels    of all images, for `Batch.q`
    images_per_identity  K > 0: every batch holds batch_size / K identities with K images each, see `_balanced`
    grayscale_p, jitter  see `data.augment.draw_colours`
    device         where batches are augmented and where all their tensors but `index` are
    part           the slice of every batch that this process gets. Draws are made for the whole batch

    Raises UserError for fewer images than `batch_size`, and for an undecodable file while batches are drawn.
    """

    images: ImageList
    _: KW_ONLY
    batch_size: int
    height: int
    width: int
    seed: int
    pad: int = 10
    pixels: Tensor | None = None
    num_workers: int = 0
    with_positive: bool = True
    soft_labels: SoftLabels | None = None
    images_per_identity: int = 0
    grayscale_p: float = 0.0
    jitter: float = 0.0
    device: torch.device | str = "cpu"
    part: Part = ALL

    def __post_init__(self) -> None:
        n = len(self.images)
        if n < self.batch_size:
            raise UserError(
                f"{self.images.folder}: {n} training images are fewer than batch_size {self.batch_size}; "
                "lower batch_size or add images"
            )
        people = self.batch_size // self.images_per_identity if self.images_per_identity else 0
        if people > self.images.num_classes:
            raise UserError(
                f"{self.images.folder}: {self.images.num_classes} identities are fewer than the {people} of a batch; "
                "lower batch_size or raise images_per_identity"
            )
        self.device = torch.device(self.device)
        self.batches_per_epoch = n // self.batch_size
        cached = self.pixels is not None and self.pixels.shape[2:] != (self.height, self.width)
        self.resized_by = f"PyTorch, {self.device.type}" if cached else "Pillow"
        self._map = ThreadPoolExecutor(self.num_workers).map if self.num_workers else map
        self._labels = self.images.labels()
        self._order = 0, self.order(0)  # the newest epoch's
        # The images of label k are _by_label[_first[k] : _first[k] + _size[k]]; image i is the _place[i]-th.
        self._by_label = np.argsort(self._labels, kind="stable")
        self._size = np.bincount(self._labels)
        self._first = np.cumsum(self._size) - self._size
        self._place = np.empty(n, dtype=np.int64)
        self._place[self._by_label] = np.arange(n) - self._first[self._labels[self._by_label]]

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """The batches of iterations start, start + 1, ... without end, made ahead in the background."""
        # On a CPU the thread does everything. A GPU's work is queued by the main thread, in whose stream it belongs.
        on_cpu = self.device.type == "cpu"
        begin: Callable = self.batch if on_cpu else self._raw
        pool = ThreadPoolExecutor(1)
        try:
            ahead = deque(pool.submit(begin, start + i) for i in range(2))
            for iteration in count(start + len(ahead)):
                ready = ahead.popleft().result()
                ahead.append(pool.submit(begin, iteration))
                yield ready if on_cpu else self._finish(ready)
        finally:
            pool.shutdown(cancel_futures=True)

    def batch(self, iteration: int) -> Batch:
        """The batch of one iteration."""
        return self._finish(self._raw(iteration))

    def order(self, epoch: int) -> np.ndarray:
        """(n,) the permutation of the images in an epoch; its batches are consecutive slices."""
        return np.random.default_rng((self.seed, _PERMUTATION, epoch)).permutation(len(self.images))

    def files(self, iteration: int) -> list[Path]:
        """The files of the batch of one iteration, of all processes: those of x, then those of xp."""
        return [self.images.paths[i] for i in self._draw(iteration)[0]]

    # ------------------------------------------------------------------------------------------------ draws
    def _draw(self, iteration: int) -> tuple[np.ndarray, ...]:
        """For the whole batch, x then xp: positions in the image list, mirror or not, top and left of the crop."""
        index = self._balanced(iteration) if self.images_per_identity else self._shuffled(iteration)
        rng = np.random.default_rng((self.seed, _DRAW, iteration))
        draws = [(index, *self._draw_augmentation(rng))]
        if self.with_positive:
            draws.append((self._draw_positives(rng, index), *self._draw_augmentation(rng)))
        return tuple(map(np.concatenate, zip(*draws, strict=True)))

    def _shuffled(self, iteration: int) -> np.ndarray:
        """(N,) the next images of the epoch's permutation."""
        epoch, step = divmod(iteration, self.batches_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, self.order(epoch)
        return self._order[1][step * self.batch_size : (step + 1) * self.batch_size]

    def _balanced(self, iteration: int) -> np.ndarray:
        """(N,) the next identities of a permutation of all, K images of each: different ones if it has as many."""
        each, identities = self.images_per_identity, len(self._size)
        people = self.batch_size // each
        turn, step = divmod(iteration, identities // people)
        order = np.random.default_rng((self.seed, _PERMUTATION, turn)).permutation(identities)
        rng = np.random.default_rng((self.seed, _BALANCED, iteration))
        drawn = [
            self._first[label] + rng.choice(self._size[label], each, replace=self._size[label] < each)
            for label in order[step * people : (step + 1) * people]
        ]
        return self._by_label[np.concatenate(drawn)]

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

    # ----------------------------------------------------------------------------------------------- images
    def _raw(self, iteration: int) -> _Raw:
        raw = self._read(iteration)
        if not (self.grayscale_p or self.jitter):
            return raw
        n = self.batch_size // self.part.count
        rng = np.random.default_rng((self.seed, _COLOURS, iteration))
        draws = draw_colours(len(raw.chosen) * self.part.count, rng, grayscale_p=self.grayscale_p, jitter=self.jitter)
        return raw._replace(colours=self.part.rows(draws, n))

    def _read(self, iteration: int) -> _Raw:
        n = self.batch_size // self.part.count
        chosen, *draws = (torch.from_numpy(self.part.rows(drawn, n)) for drawn in self._draw(iteration))
        all_of_them = torch.arange(len(chosen))
        if self.pixels is None:
            paths = [self.images.paths[i] for i in chosen.tolist()]
            pixels = torch.stack(list(self._map(partial(decoded, size=(self.height, self.width)), paths)))
        elif self.device.type == "cpu" and self.pixels.shape[2:] == (self.height, self.width):
            return _Raw(self.pixels, chosen, *draws, chosen[:n])  # `augment` reads them from the cache
        else:
            pixels = self.pixels[chosen]
        return _Raw(pixels, all_of_them, *draws, chosen[:n])

    def _finish(self, raw: _Raw) -> Batch:
        pixels, *draws = (to_device(part, self.device) for part in raw[:5])
        pixels = augment(resize(pixels, self.height, self.width), *draws, self.pad)
        images = normalise(pixels if raw.colours is None else change_colours(pixels, raw.colours))
        index, n = raw.index, len(raw.index)
        y, q = self._labels[index.numpy()], None
        if self.soft_labels is not None:
            q = to_device(torch.from_numpy(self.soft_labels.rows(index.numpy())), self.device)
        return Batch(images[:n], images[n:], to_device(torch.from_numpy(y), self.device), index, q)
