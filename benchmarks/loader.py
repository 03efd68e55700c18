"""Images per second of the training data, against a plain pipeline: `python -m benchmarks.loader`.

JPEG files of 128 x 64 (Market-1501's size) to augmented batches x and xp of 256 x 128, on one thread, per second of
processor time on a CPU:

plain    Pillow and torchvision's transforms, one image at a time, as the method is written
source   from the cache at the files' size
resized  from the cache of resized images
files    from the files

The embedded renderer draws the images. On a GPU, batches from a cache are made on the GPU.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torchvision import transforms

from benchmarks.machine import (
    benchmark_parser,
    compare,
    describe_machine,
    draw_images,
    finish,
    plain_reader,
    write_result,
)
from data.cache import cached_images
from data.folders import ImageList
from data.loader import PairLoader
from utils import between, pick_device, run_cli, set_threads

HEIGHT, WIDTH, PAD = 256, 128, 10


class PlainPairs:
    """The pairs of docs/method.md, written as such scripts usually are: one image at a time, nothing kept."""

    def __init__(self, images: ImageList) -> None:
        self.paths, self.labels = images.paths, images.labels().tolist()
        self.read = plain_reader(
            transforms.RandomHorizontalFlip(),
            transforms.Resize((HEIGHT, WIDTH), transforms.InterpolationMode.BICUBIC),
            transforms.Pad(PAD, padding_mode="edge"),
            transforms.RandomCrop((HEIGHT, WIDTH)),
        )

    def batch(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = random.sample(range(len(self.paths)), n)
        same = [[j for j, label in enumerate(self.labels) if label == self.labels[i] and j != i] for i in chosen]
        positives = [random.choice(candidates or [i]) for i, candidates in zip(chosen, same, strict=True)]
        x, xp = (torch.stack([self.read(self.paths[i]) for i in indices]) for indices in (chosen, positives))
        return x, xp


def measure_speed(images: ImageList, device: torch.device, *, batch_size: int, batches: int, repeats: int) -> dict:
    """Images per second of every way and the ratios to the plain one, from `repeats` alternating rounds."""
    how = dict(batch_size=batch_size, height=HEIGHT, width=WIDTH, pad=PAD, seed=0, device=device)
    plain, iteration = PlainPairs(images), count()

    def make(batch: Callable[[], Any]) -> None:
        for _ in range(batches):
            batch()
        finish(device)

    caches = {
        mode: PairLoader(images, pixels=cached_images(images.paths, mode, HEIGHT, WIDTH, limit_mb=4096), **how)
        for mode in ("source", "resized")
    }
    ways = {"plain": partial(make, lambda: plain.batch(batch_size))}
    for name, loader in ({"files": PairLoader(images, **how)} | caches).items():
        ways[name] = partial(make, lambda loader=loader: loader.batch(next(iteration)))
    for way in ways.values():
        way()
    made = 2 * batch_size * batches
    sizes = {name: loader.pixels.nbytes / 1e6 for name, loader in caches.items()}
    return compare(ways, repeats, made, device) | {"cache_mb": sizes, "images per round": made}


def main() -> None:
    parser = benchmark_parser("loader", __doc__)
    parser.add_argument("--batch-size", type=between(2), default=32, help="pairs x, xp in a batch (default: 32)")
    parser.add_argument("--quick", action="store_true", help="few images and repeats")
    args = parser.parse_args()
    set_threads(1)
    device = pick_device(args.device)
    identities, batches, repeats = (12, 1, 3) if args.quick else (60, 4, 9)
    result = {"machine": describe_machine(), "device": str(device), "batch_size": args.batch_size}
    with tempfile.TemporaryDirectory() as folder:
        images = draw_images(Path(folder), identities)
        sizes = dict(batch_size=min(args.batch_size, len(images)), batches=batches, repeats=repeats)
        result |= {"images": len(images), "speed": measure_speed(images, device, **sizes)}
    write_result(args.results, "loader", result)


if __name__ == "__main__":
    run_cli(main)
