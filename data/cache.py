"""Training images decoded once and kept in memory as bytes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from data.images import decoded, fill, load_image

log = logging.getLogger(__name__)


class _Unequal(Exception):
    """An image is not of the first one's size."""


def cached_images(paths: Sequence[Path], mode: bool | str, height: int, width: int, *, limit_mb: int) -> Tensor | None:
    """All images, (n, 3, h, w) uint8, or None where they are to be read from their files.

    mode      False: None. "source": h and w are those of the files, or height and width where the files' sizes
              differ. "resized" or True: height and width. "auto": "source", unless that is larger than "resized"
    limit_mb  in units of 10**6 bytes. The result is None, with a note, for images that need more

    Raises UserError for an undecodable file.
    """
    if not mode:
        return None
    kept = size = (height, width)
    if mode in ("source", "auto"):
        w, h = load_image(paths[0]).size
        if mode == "source" or h * w <= height * width:
            kept = (h, w)
    shape = (len(paths), 3, *kept)
    if prod(shape) > limit_mb * 10**6:
        what = f"{prod(shape) / 1e6:,.0f} MB at {kept[0]} x {kept[1]} are more than cache_limit_mb {limit_mb}"
        log.info("cache_images: %s; images are read from their files", what)
        return None
    pixels = torch.empty(shape, dtype=torch.uint8)
    try:
        fill(pixels, partial(_pixels, kept=kept, size=size), paths)
    except _Unequal as error:
        log.info("cache_images: %s, so all are kept at %d x %d", error, *size)
        del pixels
        return cached_images(paths, "resized", height, width, limit_mb=limit_mb)
    return pixels


def _pixels(path: Path, kept: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A file's pixels (3, *kept): resized to `size`, or as they are. Raises _Unequal for a file of another size."""
    pixels = decoded(path, size if kept == size else None)
    if pixels.shape[1:] != kept:
        raise _Unequal(f"{path.name} is not of {kept[0]} x {kept[1]} pixels")
    return pixels
