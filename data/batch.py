"""A training batch, and the part of it that one of several processes has. Nothing here touches a disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T")


class Batch(NamedTuple):
    """N training images.

    x      (N, 3, H, W) float32, augmented, normalised with the ImageNet mean and std
    xp     (N, 3, H, W) float32, another image of the same identity (the same image when it is the identity's
           only one), augmented independently; (0, 3, H, W) from a loader without positives
    y      (N,) int64 class numbers, those of `ImageList.labels()`
    index  (N,) int64 positions of x in the image list
    q      (N, K) float32 soft labels that take the place of y; None: y is the label
    """

    x: Tensor
    xp: Tensor
    y: Tensor
    index: Tensor
    q: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """Slice `index` of the `count` equal slices of every batch, one per process.

    Random values are drawn for the whole batch in every process, so the number of processes does not change a run.
    """

    index: int = 0
    count: int = 1

    def rows(self, values: T, images: int) -> T:
        """This slice of values drawn for whole batches: (k * images * count, ...) to (k * images, ...).

        values  array or tensor; k batches one after the other
        images  of a batch in this slice
        """
        rest = values.shape[1:]
        return values.reshape(-1, self.count, images, *rest)[:, self.index].reshape(-1, *rest)


ALL = Part()
