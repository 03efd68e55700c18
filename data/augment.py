"""Mirror, pad and crop a batch of images, and change their colours, each image with its draw."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import functional as TF

# From this many pixels per image, a CPU is faster with a few copies per image than with one index for all.
COPY_FROM = 192 * 96


def augment(pixels: Tensor, chosen: Tensor, flip: Tensor, top: Tensor, left: Tensor, pad: int) -> Tensor:
    """Mirror, pad by repeating the edge, and crop, each image with its draw.

    pixels  (n, 3, H, W) uint8
    chosen  (N,) int64 which of them; flip (N,) bool
    top, left  (N,) int64 corner of the crop in the padded image, 0..2*pad
    Returns (N, 3, H, W) uint8.

    The method mirrors before it resizes; the two commute, so it is done here on resized pixels.
    """
    channels, height, width = pixels.shape[1:]
    if pixels.device.type == "cpu" and height * width > COPY_FROM:
        return augment_by_copies(pixels, chosen, flip, top - pad, left - pad)
    steps = torch.arange(max(height, width, channels), device=pixels.device)
    rows = (top[:, None] - pad + steps[:height]).clamp_(0, height - 1)  # (N, H)
    cols = (left[:, None] - pad + steps[:width]).clamp_(0, width - 1)  # (N, W)
    cols = torch.where(flip[:, None], width - 1 - cols, cols)
    # Whole rows first, because they are copied as they lie in memory.
    planes = chosen[:, None] * channels + steps[:channels]  # (N, 3)
    lines = pixels.reshape(-1, width).index_select(0, (planes[:, :, None] * height + rows[:, None, :]).flatten())
    lines = lines.view(len(chosen), channels, height, width)
    return lines.gather(3, cols[:, None, None, :].expand_as(lines))


def augment_by_copies(pixels: Tensor, chosen: Tensor, flip: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """`augment` for large images on CPUs, by copying rectangles; corners are those in the image itself, -pad..pad."""
    height, width = pixels.shape[2:]
    out = pixels.new_empty(len(chosen), *pixels.shape[1:])
    for crop, k, mirrored, y, x in zip(out, *(draw.tolist() for draw in (chosen, flip, top, left)), strict=True):
        image = pixels[k].flip(2) if mirrored else pixels[k]
        # The part of the crop that lies in the image, a row and a column at least, then what repeats its edges.
        y, x = min(max(y, 1 - height), height - 1), min(max(x, 1 - width), width - 1)
        y0, y1, x0, x1 = max(0, -y), min(height, height - y), max(0, -x), min(width, width - x)
        crop[:, y0:y1, x0:x1] = image[:, y0 + y : y1 + y, x0 + x : x1 + x]
        crop[:, y0:y1, :x0] = crop[:, y0:y1, x0 : x0 + 1]
        crop[:, y0:y1, x1:] = crop[:, y0:y1, x1 - 1 : x1]
        crop[:, :y0] = crop[:, y0 : y0 + 1]
        crop[:, y1:] = crop[:, y1 - 1 : y1]
    return out


def draw_colours(images: int, rng: np.random.Generator, *, grayscale_p: float, jitter: float) -> np.ndarray:
    """(images, 5) what `change_colours` does: factors of brightness, contrast and saturation, turn of hue, gray or not.

    Factors are uniform in 1 - jitter..1 + jitter, the turn in -jitter / 10..jitter / 10 of the circle.
    """
    draws = rng.uniform(-jitter, jitter, (images, 4)) * (1, 1, 1, 0.1) + (1, 1, 1, 0)
    return np.column_stack([draws, rng.random(images) < grayscale_p])


def change_colours(pixels: Tensor, draws: np.ndarray) -> Tensor:
    """Images (N, 3, H, W) uint8 with the colours that `draws` (N, 5) of `draw_colours` asks for, by torchvision."""
    changed = []
    for image, (brightness, contrast, saturation, hue, gray) in zip(pixels, draws.tolist(), strict=True):
        for adjust, amount in (
            (TF.adjust_brightness, brightness),
            (TF.adjust_contrast, contrast),
            (TF.adjust_saturation, saturation),
        ):
            image = adjust(image, amount) if amount != 1 else image
        image = TF.adjust_hue(image, hue) if hue else image
        changed.append(TF.rgb_to_grayscale(image, num_output_channels=3) if gray else image)
    return torch.stack(changed)
