"""Training images decoded once and kept as bytes, one copy for all processes of a machine."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.images import decoded, fill, load_image
from utils import UserError


class Machine(NamedTuple):
    """How one of several processes of a run reaches those on the same machine.

    first   whether this process decodes for all of them
    tell    returns the first process's argument in all of them, when every one has called it
    """

    first: bool
    tell: Callable[[Any], Any]


class _Unequal(Exception):
    """An image is not of the first one's size."""


def cached_images(
    paths: Sequence[Path], mode: bool | str, height: int, width: int, *, limit_mb: int, machine: Machine | None = None
) -> Tensor | None:
    """All images, (n, 3, h, w) uint8, or None where they are to be read from their files.

    mode      False: None. "source": h and w are those of the files, or height and width where the files' sizes
              differ. "resized" or True: height and width. "auto": "source", unless that is larger than "resized"
    limit_mb  in units of 10**6 bytes. The result is None, with a note, for images that need more
    machine   None: in this process's memory. With several processes, the first one writes the images to a file in the
              system's temporary folder; all of them map it into memory, and it is deleted

    Raises UserError, in every process, for an undecodable file.
    """
    if not mode:
        return None
    decode = partial(_decode, paths, mode, (height, width), limit_mb)
    if machine is None:
        return decode(partial(torch.empty, dtype=torch.uint8))
    answer: Path | UserError | None = None
    with tempfile.TemporaryDirectory(prefix="images-") if machine.first else contextlib.nullcontext() as folder:
        if machine.first:
            file = Path(folder) / "images.npy"
            try:
                answer = None if decode(partial(_allocate, file)) is None else file
            except UserError as error:
                answer = error
        answer = machine.tell(answer)
        if isinstance(answer, UserError):
            raise answer
        # A private mapping: processes share the memory, but a change would be the process's own.
        pixels = None if answer is None else torch.from_numpy(np.load(answer, mmap_mode="c"))
        machine.tell(None)  # By now every process has mapped the file, so that it can go.
    return pixels


def _allocate(file: Path, shape: tuple[int, ...]) -> Tensor:
    pixels = np.lib.format.open_memmap(file, "w+", np.uint8, shape)
    # Without this, a full disk would show as a crash while the images are written.
    if hasattr(os, "posix_fallocate"):  # not on Windows and macOS
        with open(file, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
    return torch.from_numpy(pixels)


def _decode(
    paths: Sequence[Path],
    mode: bool | str,
    size: tuple[int, int],
    limit_mb: int,
    allocate: Callable[[tuple[int, ...]], Tensor],
) -> Tensor | None:
    """All images in memory that `allocate` gives: at the first one's size if `mode` allows and all have it."""
    kept = size
    if mode in ("source", "auto"):
        width, height = load_image(paths[0]).size
        if mode == "source" or height * width <= prod(size):
            kept = (height, width)
    shape = (len(paths), 3, *kept)
    if prod(shape) > limit_mb * 10**6:
        what = f"{prod(shape) / 1e6:,.0f} MB at {kept[0]} x {kept[1]} are more than cache_limit_mb {limit_mb}"
        logging.info(f"cache_images: {what}; images are read from their files")
        return None
    pixels = allocate(shape)
    try:
        fill(pixels, partial(_pixels, kept=kept, size=size), paths)
    except _Unequal as error:
        logging.info(f"cache_images: {error}, so all are kept at {size[0]} x {size[1]}")
        del pixels
        return _decode(paths, "resized", size, limit_mb, allocate)
    return pixels


def _pixels(path: Path, kept: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A file's pixels (3, *kept): resized to `size`, or as they are. Raises _Unequal for a file of another size."""
    pixels = decoded(path, size if kept == size else None)
    if pixels.shape[1:] != kept:
        raise _Unequal(f"{path.name} is not of {kept[0]} x {kept[1]} pixels")
    return pixels
