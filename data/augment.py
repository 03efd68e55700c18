"""Mirror, pad and crop a batch of images, each with its draw."""

from __future__ import annotations

import torch
from torch import Tensor


def augment(pixels: Tensor, flip: Tensor, top: Tensor, left: Tensor, pad: int) -> Tensor:
    """Mirror, pad by repeating the edge, and crop, each image with its draw.

    pixels     (N, 3, H, W) uint8
    flip       (N,) bool
    top, left  (N,) int64 corner of the crop in the padded image, 0..2*pad
    Returns (N, 3, H, W) uint8.

    The method mirrors before it resizes; the two commute, so it is done here on resized pixels.
    """
    height, width = pixels.shape[2:]
    rows = (top[:, None] - pad + torch.arange(height, device=pixels.device)).clamp_(0, height - 1)  # (N, H)
    cols = (left[:, None] - pad + torch.arange(width, device=pixels.device)).clamp_(0, width - 1)  # (N, W)
    cols = torch.where(flip[:, None], width - 1 - cols, cols)
    lines = pixels.gather(2, rows[:, None, :, None].expand_as(pixels))
    return lines.gather(3, cols[:, None, None, :].expand_as(pixels))
