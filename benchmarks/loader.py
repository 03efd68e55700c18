"""Images per second of the training data, against a plain pipeline: `python -m benchmarks.loader`.

speed  JPEG files of 128 x 64 (Market-1501's size) to augmented batches x and xp of 256 x 128, on one thread:
       plain    Pillow and torchvision's transforms, one image at a time, as the method is written
       source   from the cache at the files' size
       resized  from the cache of resized images
       files    from the files
       (per second of processor time on a CPU)
share  of a training step: the time that the loop waits for its batches, which are made during the step before, and the
       time that one thread takes to make them

The embedded renderer draws the images. On a GPU, batches from a cache are made on the GPU.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torchvision import transforms

from benchmarks.machine import (
    alternate,
    benchmark_parser,
    compare,
    describe_machine,
    draw_images,
    finish,
    plain_reader,
    write_result,
)
from config import load_config
from data.cache import cached_images
from data.folders import ImageList
from data.loader import PairLoader
from runs.folder import open_run
from runs.session import build_session, to_device
from utils import ROOT, between, pick_device, run_cli, set_threads

HEIGHT, WIDTH, PAD = 256, 128, 10
# By name: the config and changes of it. No weights and no teacher are read.
ALONE = ["ID_class=auto", "pretrained=false"]
NO_TEACHER = ["id_init=backbone", "max_teacher_w=0", "teacher_w=0"]
RUNS = {
    "latest": ("latest", NO_TEACHER),
    "demo": ("demo", NO_TEACHER),
    "demo-teacher": ("demo-teacher", []),
    "demo-teacher, files": ("demo-teacher", ["cache_images=false"]),
}


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
        others = [[j for j, label in enumerate(self.labels) if label == self.labels[i] and j != i] for i in chosen]
        positives = [random.choice(same or [i]) for i, same in zip(chosen, others, strict=True)]
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


def measure_share(name: str, data: Path, device: torch.device, *, steps: int, skipped: int) -> dict:
    """Median seconds of a step of the run `name` in `RUNS` and of its batches, and their shares.

    skipped  steps at the start that set things up and do not count
    """
    file, changes = RUNS[name]
    cfg = load_config(ROOT / "configs" / f"{file}.yaml", [f"data_root={data}", *ALONE, *changes])
    session = build_session(cfg, open_run(str(data), "benchmark"), device, resume=False)
    streams = [loader.batches() for loader in session.loaders]
    waited, whole = [], []
    try:
        for t in range(skipped + steps):
            start = time.perf_counter()
            batches = [to_device(next(stream), device, cfg) for stream in streams]
            waited.append(time.perf_counter() - start)
            session.trainer.step(*batches, t)
            finish(device)
            whole.append(time.perf_counter() - start)
    finally:
        for stream in streams:
            stream.close()

    iteration = count()

    def make() -> None:
        t = next(iteration)
        for loader in session.loaders:
            loader.batch(t)
        finish(device)

    step, batch = statistics.median(whole[skipped:]), statistics.median(alternate({"batches": make}, 5)["batches"])
    return {
        "step": step,
        "batches": batch,
        "share waited": sum(waited[skipped:]) / sum(whole[skipped:]),
        "share of one thread": batch / step,
    }


def main() -> None:
    parser = benchmark_parser("loader", __doc__)
    parser.add_argument("--batch-size", type=between(2), default=32, help="pairs x, xp in a batch (default: 32)")
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS), help="of the share part (default: all)")
    parser.add_argument("--quick", action="store_true", help="few images and repeats, and no run of latest.yaml")
    args = parser.parse_args()
    set_threads(1)
    device = pick_device(args.device)
    identities, batches, repeats, steps = (12, 1, 3, 2) if args.quick else (60, 4, 9, 20)
    result = {"machine": describe_machine(), "device": str(device), "batch_size": args.batch_size, "share": {}}
    with tempfile.TemporaryDirectory() as folder:
        images = draw_images(Path(folder), identities)
        sizes = dict(batch_size=min(args.batch_size, len(images)), batches=batches, repeats=repeats)
        result |= {"images": len(images), "speed": measure_speed(images, device, **sizes)}
        for name in args.runs:
            slow = device.type == "cpu" and name == "latest"
            how = dict(steps=1, skipped=0) if slow else dict(steps=steps, skipped=1)
            if not (args.quick and name == "latest"):
                result["share"][name] = measure_share(name, Path(folder) / "mannequins", device, **how)
    write_result(args.results, "loader", result)


if __name__ == "__main__":
    run_cli(main)
