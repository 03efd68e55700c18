"""Training images decoded once and kept in memory as bytes, one copy for all processes of a machine."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from data.images import decoded, fill, load_image, resized
from parallel import collectives
from utils import UserError

Shape = tuple[int, int, int, int]


class _Unequal(Exception):
    """An image is not of the first one's size."""


def cached_images(paths: Sequence[Path], mode: bool | str, height: int, width: int, *, limit_mb: int) -> Tensor | None:
    """All images in memory, (n, 3, h, w) uint8, or None where they are to be read from their files.

    mode      False: None. "source": h and w are those of the files, or height and width where the files' sizes
              differ. "resized" or True: height and width. "auto": "source", unless that is larger than "resized"
    limit_mb  of 10**6 bytes; None, and a line that says so, for images that do not fit

    Several processes of one machine share the memory: the first one decodes while the others wait.
    Raises UserError for an undecodable file.
    """
    if not mode:
        return None
    if collectives.world_size() == 1:
        return _decode(paths, mode, (height, width), limit_mb, lambda shape: torch.empty(shape, dtype=torch.uint8))
    return _shared(paths, mode, (height, width), limit_mb)


def _decode(
    paths: Sequence[Path], mode: bool | str, size: tuple[int, int], limit_mb: int, allocate: Callable[[Shape], Tensor]
) -> Tensor | None:
    sizes, trouble = [size], []
    if mode in ("source", "auto"):
        width, height = load_image(paths[0]).size
        if (height, width) != size and (mode == "source" or height * width <= prod(size)):
            sizes = [(height, width), size]
    for tried in sizes:
        shape = (len(paths), 3, *tried)
        megabytes = f"{prod(shape) / 1e6:,.0f} MB"
        if prod(shape) > limit_mb * 10**6:
            trouble.append(f"{megabytes} at {tried[0]} x {tried[1]} are more than cache_limit_mb {limit_mb}")
            continue
        try:
            pixels = allocate(shape)
        except (OSError, RuntimeError) as error:
            trouble.append(f"no room for {megabytes} ({' '.join(str(error).split())[:80]})")
            continue
        try:
            fill(pixels, _decoder(tried, size), paths)
        except _Unequal as error:
            trouble.append(f"{error}, so all are kept at {size[0]} x {size[1]}")
            continue
        if trouble:
            print(f"note: cache_images: {'; '.join(trouble)}", file=sys.stderr)
        return pixels
    print(f"note: cache_images: {'; '.join(trouble)}; images are read from their files", file=sys.stderr)
    return None


def _decoder(tried: tuple[int, int], size: tuple[int, int]) -> Callable[[Path], Tensor]:
    """A file to pixels (3, *tried): resized to `size`, or as it is, which raises _Unequal for another size."""

    def source(path: Path) -> Tensor:
        pixels = decoded(path)
        if pixels.shape[1:] != tried:
            height, width = pixels.shape[1:]
            raise _Unequal(f"{path.name} is {height} x {width}, others {tried[0]} x {tried[1]}")
        return pixels

    return source if tried != size else lambda path: resized(path, *size)


# --------------------------------------------------------------------------------- one copy for several processes
def _shared(paths: Sequence[Path], mode: bool | str, size: tuple[int, int], limit_mb: int) -> Tensor | None:
    """`cached_images` in every one of several processes."""
    local = int(os.environ.get("LOCAL_RANK", collectives.rank()))
    files: list[BinaryIO] = []

    def allocate(shape: Shape) -> Tensor:
        while files:
            files.pop().close()  # that of an attempt before
        file, pixels = _shared_memory(shape)
        files.append(file)
        return pixels

    told: tuple[str, Shape] | UserError | None = None
    pixels = None
    if local == 0:
        try:
            pixels = _decode(paths, mode, size, limit_mb, allocate)
            if pixels is not None:
                told = f"/proc/{os.getpid()}/fd/{files[-1].fileno()}", tuple(pixels.shape)
        except UserError as error:
            told = error
    told = collectives.gather(told)[collectives.rank() - local]
    if isinstance(told, UserError):
        raise told
    if told is not None and local > 0:
        try:
            pixels = _map(*told)
        except (OSError, RuntimeError):
            # In a container of its own a process cannot see the first one's files.
            pixels = _own_copy(paths, told[1], size)
    collectives.wait_for_all()
    for file in files:
        file.close()
    return pixels


def _own_copy(paths: Sequence[Path], shape: Shape, size: tuple[int, int]) -> Tensor:
    """A process's own copy of a cache of this shape."""
    pixels = torch.empty(shape, dtype=torch.uint8)
    fill(pixels, _decoder(shape[2:], size), paths)
    return pixels


def _shared_memory(shape: Shape) -> tuple[BinaryIO, Tensor]:
    """Memory in a file without a name, of which nothing remains whatever ends the processes.

    Raises OSError where there is no room for it.
    """
    failed = OSError("no folder for it")
    for folder in ("/dev/shm", tempfile.gettempdir()):
        try:
            file = tempfile.TemporaryFile(dir=folder)
            # Without this a full file system would show as a crash while the images are written.
            os.posix_fallocate(file.fileno(), 0, prod(shape))
            return file, _map(f"/proc/self/fd/{file.fileno()}", shape)
        except (OSError, RuntimeError, AttributeError) as error:
            failed = OSError(str(error))
    raise failed


def _map(path: str, shape: Shape) -> Tensor:
    return torch.from_file(path, shared=True, size=prod(shape), dtype=torch.uint8).view(shape)
