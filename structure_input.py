"""What the structure encoder sees of an image: its gray version, or its edges (key `single`, spec sections 3, 11)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distributed import own_rows, world_size
from utils import IMAGENET_MEAN, IMAGENET_STD

CANNY_THRESHOLDS = (10, 200)
EDGE_NOISE = 0.1


def to_gray(x: Tensor) -> Tensor:
    """Normalised image (N, 3, H, W) to the mean of its channels (N, 1, H, W)."""
    return x.mean(dim=1, keepdim=True)


def to_edge(x: Tensor, rng: np.random.Generator, images: int | None = None) -> Tensor:
    """Normalised image (N, 3, H, W) to its Canny edges (N, 1, H, W) in -0.5..0.5 plus N(0, 0.1) noise, no gradient.

    images  where x holds this process's slices of batches: of each batch, so that the noise is drawn for the whole
    """
    import cv2

    mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    rgb = ((x.detach() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    edges = np.stack([cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), *CANNY_THRESHOLDS) for image in rgb])
    n, *size = edges.shape
    if images is None:
        noise = rng.standard_normal((n, 1, *size))
    else:
        noise = own_rows(rng.standard_normal((n * world_size(), 1, *size)), images)
    edges = edges[:, None] / 255 - 0.5 + EDGE_NOISE * noise
    return torch.from_numpy(edges).to(x)


def structure_input(x: Tensor, single: str, rng: np.random.Generator | None, images: int | None = None) -> Tensor:
    """What the structure encoder sees of normalised images: (N, 1, H, W). `single` is gray or edge (config).

    rng, images  as in `to_edge`; gray needs neither
    """
    return to_gray(x) if single == "gray" else to_edge(x, rng, images)
