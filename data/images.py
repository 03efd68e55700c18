"""Files to pixels and pixels to what the nets see: decoding, resizing, normalising, batches for evaluation, checks."""

from __future__ import annotations

import logging
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from utils import IMAGENET_MEAN, IMAGENET_STD, UserError, one_line

# What a file may really hold, whatever its suffix. Pillow would also open formats that start other programs.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "GIF", "WEBP", "TIFF")
# What Pillow raises on a broken file.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)
_TAIL_BYTES = 4096
_NAMED_IN_MESSAGE = 3


def load_image(path: str | Path) -> Image.Image:
    """Decode a file to an upright RGB image. Raises UserError naming a file that cannot be decoded."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "I" or upright.mode.startswith("I;16"):
                # Pillow would clip 16-bit gray at 255, not scale it.
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            elif upright.mode == "P":
                # A palette with transparency has to pass through RGBA.
                upright = upright.convert("RGBA")
            return upright.convert("RGB")
    except DECODE_ERRORS as error:
        raise UserError(f"{path}: cannot be decoded ({one_line(error)}); replace or remove the file") from None


def decoded(path: str | Path) -> Tensor:
    """Decode a file: (3, h, w) uint8, at the file's size."""
    return torch.from_numpy(np.array(load_image(path))).permute(2, 0, 1).contiguous()


def resized(path: str | Path, height: int, width: int) -> Tensor:
    """Decode a file and resize it with Pillow, bicubic: (3, height, width) uint8."""
    image = load_image(path).resize((width, height), Image.Resampling.BICUBIC)
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
    fill(pixels, lambda path: resized(path, height, width), paths)
    return pixels


def fill(pixels: Tensor, decode: Callable[[Path], Tensor], paths: Sequence[str | Path]) -> None:
    """Decode all images into `pixels` (n, 3, H, W), in threads. Raises the first error of `decode`."""

    def put(i: int) -> None:
        pixels[i] = decode(paths[i])

    pool = ThreadPoolExecutor(decode_threads())
    try:
        # Drained for its errors; the bar shows on a terminal only.
        for _ in tqdm(pool.map(put, range(len(paths))), "images", total=len(paths), leave=False, disable=None):
            pass
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
    paths: Sequence[str | Path],
    height: int,
    width: int,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Batches for evaluation, in the order of `paths`: (<= batch_size, 3, height, width) float32 on `device`.

    Images are resized, bicubic, and normalised with the ImageNet mean and std. Pillow resizes them; if they are for a
    GPU and a batch's files have one size, the GPU does (see `resize`).

    num_workers  threads that decode; 0: as many as `decode_threads`
    Raises UserError naming an undecodable file.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: must be at least 1")
    device = torch.device(device)
    starts = range(0, len(paths), batch_size)
    pool = ThreadPoolExecutor(num_workers or decode_threads())

    def submit(start: int) -> list[Future[Tensor]]:
        some = paths[start : start + batch_size]
        if device.type == "cpu":
            return [pool.submit(resized, path, height, width) for path in some]
        return [pool.submit(decoded, path) for path in some]

    try:
        # One batch is decoded while the caller works on the one before it.
        ahead = deque(submit(start) for start in starts[:2])
        for start in range(2 * batch_size, len(paths) + 2 * batch_size, batch_size):
            images = [future.result() for future in ahead.popleft()]
            if start < len(paths):
                ahead.append(submit(start))
            if len({image.shape for image in images}) > 1:
                images = [resize(image[None], height, width)[0] for image in images]
            yield normalise(resize(to_device(torch.stack(images), device), height, width))
    finally:
        pool.shutdown(cancel_futures=True)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; a GPU fetches it while this process goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def decode_threads() -> int:
    # Pillow lets go of the interpreter lock while it decodes and resizes.
    return min(8, os.cpu_count() or 1)


# ---------------------------------------------------------------------------------------------- checks
def check_images(
    paths: Sequence[Path],
    *,
    skip_bad: bool,
    remedy: str = "set skip_bad_images: true in the config",
    minimum: int = 1,
) -> list[bool]:
    """Look at the header and the end of every file; True where it is a usable image.

    Bad files are empty, no image, cut short, or of an absurd size. Pixels are decoded only where header and end leave
    a doubt, so that 13,000 files take seconds.

    skip_bad  False: raise UserError if any file is bad. True: name them in a line on stderr
    remedy    what the error offers besides replacing the files
    Raises UserError also if fewer than `minimum` images remain.
    """
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        defects = list(pool.map(_defect, paths, chunksize=64))
    bad = [f"{path} ({why})" for path, why in zip(paths, defects, strict=True) if why is not None]
    if bad:
        more = len(bad) - _NAMED_IN_MESSAGE
        named = ", ".join(bad[:_NAMED_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")
        summary = f"{len(bad)} of {len(paths)} images cannot be read: {named}"
        if not skip_bad:
            raise UserError(f"{summary}; replace them, or {remedy}")
        if len(paths) - len(bad) < minimum:
            raise UserError(f"{summary}; no image remains, give a folder with readable images")
        logging.warning(f"{summary}; left out")
    return [why is None for why in defects]


def _defect(path: Path) -> str | None:
    """What is wrong with an image file, or None."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return "empty file"
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read()
            file.seek(0)
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                    return f"{image.width} x {image.height} pixels are too many"
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
