"""Files to pixels and pixels to what the nets see: decoding, resizing, normalising, batches for evaluation, checks."""

from __future__ import annotations

import logging
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data.formats import formats
from data.listing import leave_out
from utils import IMAGENET_MEAN, IMAGENET_STD, UserError, one_line

BACKGROUND = (255, 255, 255)  # behind transparent pixels, whose hidden colours no viewer shows
# What Pillow raises on a broken file.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


@contextmanager
def _open(file: str | Path | BinaryIO) -> Iterator[Image.Image]:
    """Read an image's header. Pillow only warns of an image up to twice as large as it allows."""
    with Image.open(file, formats=formats()) as image:
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are too many")
        yield image


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """A file, or an image of Pillow, as an upright RGB image; what is transparent lets `BACKGROUND` through.

    Raises UserError naming a file that cannot be decoded.
    """
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else _open(source) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "I" or upright.mode.startswith("I;16"):
                # Pillow would clip 16-bit gray at 255, not scale it.
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            elif upright.has_transparency_data:
                background = Image.new("RGBA", upright.size, BACKGROUND)
                upright = Image.alpha_composite(background, upright.convert("RGBA"))
            return upright.convert("RGB")
    except DECODE_ERRORS as error:
        raise UserError(f"{source}: cannot be decoded ({one_line(error)}); replace or remove the file") from None


def decoded(source: str | Path | Image.Image, size: tuple[int, int] | None = None) -> Tensor:
    """Decode a file: (3, h, w) uint8, at the file's size, or at `size` (h, w) by Pillow's bicubic resizing."""
    image = load_image(source)
    if size is not None:
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialias, in batches, on the pixels' device: (N, 3, h, w) to (N, 3, height, width), uint8.

    Within one grey level of Pillow's on photo-like images (not on noise); the same pixels where the size is right.
    """
    if pixels.shape[2:] == (height, width):
        return pixels
    if pixels.device.type == "cpu":
        return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return resize_in_float(pixels, height, width)


def resize_in_float(pixels: Tensor, height: int, width: int) -> Tensor:
    """`resize` for devices without integer kernels: Pillow's two passes, each rounded to whole grey levels."""
    for size in ((pixels.shape[2], width), (height, width)):
        pixels = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).add_(0.5).floor_().clamp_(0, 255)
    return pixels.to(torch.uint8)


def decode_images(paths: Sequence[str | Path], height: int, width: int) -> Tensor:
    """Decode and resize all images into memory: (n, 3, height, width) uint8."""
    pixels = torch.empty(len(paths), 3, height, width, dtype=torch.uint8)
    fill(pixels, lambda path: decoded(path, (height, width)), paths)
    return pixels


def fill(pixels: Tensor, decode: Callable[[Path], Tensor], paths: Sequence[str | Path]) -> None:
    """Decode all images into `pixels` (n, 3, H, W), in threads. Raises the first error of `decode`."""
    with _threads() as pool:
        images = pool.map(lambda i: pixels[i].copy_(decode(paths[i])), range(len(paths)))
        # Drained for its errors. The bar shows on a terminal, and like notes in one of several processes only.
        shown = logging.getLogger().isEnabledFor(logging.INFO)
        deque(tqdm(images, "images", total=len(paths), leave=False, disable=None if shown else True), maxlen=0)


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that decode; Pillow lets go of the interpreter lock meanwhile. What is queued ends with the context."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept, because copying numbers to a GPU waits for it.
    with torch.inference_mode(False):
        return tuple(torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))


def normalise(pixels: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 to float32: scaled to [0, 1], minus the ImageNet mean, over the ImageNet std."""
    mean, std = _mean_and_std(pixels.device)
    return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


def denormalise(x: Tensor) -> Tensor:
    """The inverse of `normalise`, for generated images: (N, 3, H, W) float to the nearest uint8."""
    mean, std = _mean_and_std(x.device)
    return (x.detach().float() * std + mean).clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def to_uint8(x: Tensor) -> np.ndarray:
    """Normalised images (N, 3, H, W) as an array (N, H, W, 3) of uint8, as Pillow takes them."""
    return denormalise(x).permute(0, 2, 3, 1).cpu().numpy()


def iter_images(
    paths: Sequence[str | Path | Image.Image],
    height: int,
    width: int,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Batches for evaluation: (<= batch_size, 3, height, width) float32 on `device`.

    They come in the order of `paths`, which may also be images of Pillow.
    Images are resized, bicubic, and normalised with the ImageNet mean and std. Pillow resizes them; if they are for a
    GPU and a batch's files have one size, the GPU does (see `resize`). Raises UserError naming an undecodable file.
    """
    device = torch.device(device)
    size = (height, width) if device.type == "cpu" else None
    with _threads() as pool:

        def submit(start: int) -> list[Future[Tensor]]:
            return [pool.submit(decoded, path, size) for path in paths[start : start + batch_size]]

        # One batch is decoded while the caller works on the one before it.
        ahead = deque([submit(0), submit(batch_size)])
        for start in range(0, len(paths), batch_size):
            images = [future.result() for future in ahead.popleft()]
            ahead.append(submit(start + 2 * batch_size))
            if len({image.shape for image in images}) > 1:
                images = [resize(image[None], height, width)[0] for image in images]
            yield normalise(resize(to_device(torch.stack(images), device), height, width))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; a GPU fetches it while this process goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


# ---------------------------------------------------------------------------------------------- checks
def check_images(
    paths: Sequence[Path], *, skip_bad: bool, remedy: str = "set skip_bad_images: true in the config", minimum: int = 1
) -> list[bool]:
    """Look at the header and the end of every file; True where it is a usable image.

    Bad files are empty, no image, cut short, or of an absurd size. Pixels are decoded only where header and end leave
    a doubt, so that 13,000 files take seconds.

    skip_bad  False: raise UserError if any file is bad. True: leave them out, which `data.listing.say_reading` says
    remedy    what the error offers besides replacing the files
    Raises UserError also if fewer than `minimum` images remain.
    """
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        defects = list(pool.map(_defect, paths, chunksize=64))
    bad = [f"{path} ({why})" for path, why in zip(paths, defects, strict=True) if why is not None]
    if bad:
        named = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        summary = f"{len(bad)} of {len(paths)} images cannot be read: {named}"
        if not skip_bad:
            raise UserError(f"{summary}; replace them, or {remedy}")
        if len(paths) - len(bad) < minimum:
            raise UserError(f"{summary}; no image remains, give a folder with readable images")
        for path, why in zip(paths, defects, strict=True):
            if why is not None:
                leave_out(path, f"unreadable: {why}")
    return [why is None for why in defects]


def _defect(path: Path) -> str | None:
    """What is wrong with an image file, or None."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return "empty file"
            file.seek(max(0, size - 4096))
            tail = file.read()
            file.seek(0)
            with _open(file) as image:
                if not _ends_well(image.format, tail):
                    image.load()
    except Image.DecompressionBombError:
        return "too many pixels"
    except Image.UnidentifiedImageError:
        return "not an image"
    except (PermissionError, FileNotFoundError) as error:
        return error.strerror
    except DECODE_ERRORS:
        return "damaged or cut short"
    return None


def _ends_well(image_format: str | None, tail: bytes) -> bool:
    """Whether the last bytes of a file prove that its image is complete; False leaves it open."""
    if image_format in ("JPEG", "MPO"):
        # Neither marker occurs inside compressed data. An end before the last start of scan is a thumbnail's.
        return tail.rfind(b"\xff\xd9") > tail.rfind(b"\xff\xda")
    return image_format == "PNG" and b"IEND" in tail[-64:]
