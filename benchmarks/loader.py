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
from functools import partial
from itertools import count
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms

from benchmarks.machine import benchmark_parser, compare, describe_machine, draw_images, finish, write_result
from config import load_config
from data.cache import cached_images
from data.folders import ImageList
from data.loader import PairLoader
from runs.folder import open_run
from runs.session import build_session, to_device
from utils import IMAGENET_MEAN, IMAGENET_STD, ROOT, between, pick_device, run_cli, set_threads

HEIGHT, WIDTH, PAD = 256, 128, 10
# By name: the config and changes of it. No weights and no teacher are read.
ALONE = ["data_root={data}", "ID_class=auto", "pretrained=false"]
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
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.Resize((HEIGHT, WIDTH), transforms.InterpolationMode.BICUBIC),
                transforms.Pad(PAD, padding_mode="edge"),
                transforms.RandomCrop((HEIGHT, WIDTH)),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def read(self, i: int) -> torch.Tensor:
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB"))

    def batch(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = random.sample(range(len(self.paths)), n)
        others = [[j for j, label in enumerate(self.labels) if label == self.labels[i] and j != i] for i in chosen]
        x = torch.stack([self.read(i) for i in chosen])
        return x, torch.stack([self.read(random.choice(other or [i])) for i, other in zip(chosen, others, strict=True)])


def measure_speed(images: ImageList, device: torch.device, *, batch_size: int, batches: int, repeats: int) -> dict:
    """Images per second of every way and the ratios to the plain one, from `repeats` alternating rounds."""
    how = dict(batch_size=batch_size, height=HEIGHT, width=WIDTH, pad=PAD, seed=0, device=device)
    plain, iteration = PlainPairs(images), count()

    def ours(loader: PairLoader) -> None:
        for _ in range(batches):
            loader.batch(next(iteration))
        finish(device)

    def plainly() -> None:
        for _ in range(batches):
            plain.batch(batch_size)

    caches = {
        mode: PairLoader(images, pixels=cached_images(images.paths, mode, HEIGHT, WIDTH, limit_mb=4096), **how)
        for mode in ("source", "resized")
    }
    loaders = {"files": PairLoader(images, **how)} | caches
    ways = {"plain": plainly} | {name: partial(ours, loader) for name, loader in loaders.items()}
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
    changes = [setting.format(data=data) for setting in ALONE] + changes
    cfg = load_config(ROOT / "configs" / f"{file}.yaml", changes)
    session = build_session(cfg, open_run(str(data), "benchmark"), device, resume=False)
    streams = [loader.batches() for loader in session.loaders]
    waited, whole, making = [], [], []
    try:
        for t in range(skipped + steps):
            start = time.perf_counter()
            batches = [to_device(next(stream), device, cfg) for stream in streams]
            ready = time.perf_counter()
            session.trainer.step(*batches, t)
            finish(device)
            waited.append(ready - start)
            whole.append(time.perf_counter() - start)
    finally:
        for stream in streams:
            stream.close()
    for t in range(5):
        start = time.perf_counter()
        for loader in session.loaders:
            loader.batch(t)
        finish(device)
        making.append(time.perf_counter() - start)
    step, batch = statistics.median(whole[skipped:]), statistics.median(making)
    return {
        "step": step,
        "batches": batch,
        "share waited": sum(waited[skipped:]) / sum(whole[skipped:]),
        "share of one thread": batch / step,
    }


def main() -> None:
    parser = benchmark_parser("loader", __doc__)
    parser.add_argument("--identities", type=between(4), default=60, help="identities to draw (default: 60)")
    parser.add_argument("--batch-size", type=between(2), default=32, help="pairs x, xp in a batch (default: 32)")
    parser.add_argument("--batches", type=between(1), default=4, help="batches in a round (default: 4)")
    parser.add_argument("--repeats", type=between(1), default=9, help="rounds (default: 9)")
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS), help="of the share part (default: all)")
    parser.add_argument("--steps", type=between(1), help="steps of a run (default: 20); one of latest on a CPU")
    parser.add_argument("--quick", action="store_true", help="few repeats, and no run of latest.yaml")
    args = parser.parse_args()
    set_threads(1)
    device = pick_device(args.device)
    if args.quick:
        args.identities, args.batches, args.repeats = min(args.identities, 12), 1, min(args.repeats, 3)
        args.steps = args.steps or 2
        args.runs = [name for name in args.runs if not name.startswith("latest")]
    result = {"machine": describe_machine(), "device": str(device), "batch_size": args.batch_size, "share": {}}
    with tempfile.TemporaryDirectory() as folder:
        images = draw_images(Path(folder), args.identities)
        sizes = dict(batch_size=min(args.batch_size, len(images)), batches=args.batches, repeats=args.repeats)
        result |= {"images": len(images), "speed": measure_speed(images, device, **sizes)}
        for name in args.runs:
            slow = device.type == "cpu" and name.startswith("latest")
            how = dict(steps=1, skipped=0) if slow else dict(steps=args.steps or 20, skipped=1)
            result["share"][name] = measure_share(name, Path(folder) / "mannequins", device, **how)
    write_result(args.results, "loader", result)


if __name__ == "__main__":
    run_cli(main)
