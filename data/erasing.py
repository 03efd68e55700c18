"""Random erasing: a rectangle of a training image is hidden from the id net."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from data.batch import ALL, Part

ATTEMPTS = 100  # draws of a rectangle until one fits


def erasing_mask(
    images: int,
    height: int,
    width: int,
    p: float,
    rng: np.random.Generator,
    *,
    device: torch.device | str = "cpu",
    part: Part = ALL,
) -> Tensor:
    """Which pixels of a batch of `images` to erase, (N, 1, H, W) bool: with probability `p` per image a rectangle.

    Its share of the area is uniform in 0.02-0.4, its aspect height/width uniform in 0.3-1/0.3. Both are drawn again, up
    to 100 times, until the rectangle fits.

    part  the slice of the batch that the `images` are; the draws are made for the whole batch
    """
    boxes = np.zeros((images * part.count, 4), dtype=np.int64)  # top, bottom, left, right; empty: nothing erased
    for box in boxes:
        if rng.random() > p:
            continue
        for _ in range(ATTEMPTS):
            area = rng.uniform(0.02, 0.4) * height * width
            aspect = rng.uniform(0.3, 1 / 0.3)
            h, w = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
            if h < height and w < width:
                top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
                box[:] = top, top + h, left, left + w
                break
    edges = torch.from_numpy(part.rows(boxes, images)).to(device, non_blocking=True)
    top, bottom, left, right = edges.T[..., None, None, None]
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
