"""Images per second of test-time features, against a plain loop: `python -m benchmarks.features`.

plain   as such scripts are usually written: one image decoded at a time by a DataLoader without workers, a pass for the
        image and one for its mirror, fp32
ours    what test.py does: decoding in threads while the net works, image and mirror in one pass, fp32 and bf16 (on a
        GPU also fp16), a batch that is chosen by itself
(per second of processor time where the device is a CPU)

The nets are that of configs/latest.yaml (ResNet-50, 256 x 128) and the demo's, with random weights, on images that the
embedded renderer draws. With `--teacher NAME`, or `--name RUN`, also what the precision does to that net's mAP.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.machine import RESULTS, alternate, clock_of, describe_machine, finish, median_ratio, write_result
from data.folders import read_split
from mannequins.dataset import make_dataset
from precision import has_bf16
from reid_eval.features import extract_data_set, extract_features
from reid_eval.report import evaluate_features, summary
from reIDmodel import build_id_net
from runs.folder import resolve_data_root
from runs.load import open_net
from utils import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    UserError,
    add_net_arguments,
    check_net_arguments,
    pick_device,
    run_cli,
    set_threads,
)

PLAIN_BATCH = 32
# By name: backbone, height, width, and images of a round on a CPU and on a GPU.
NETS = {"latest": ("resnet50", 256, 128, 16, 2048), "demo": ("resnet10w16", 64, 32, 256, 2048)}


class PlainImages(Dataset):
    """Normalised images, decoded and resized when they are asked for."""

    def __init__(self, paths: list[Path], height: int, width: int) -> None:
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.Resize((height, width), transforms.InterpolationMode.BICUBIC),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB"))


@torch.no_grad()
def plain_features(net, paths: list[Path], height: int, width: int, device: torch.device) -> np.ndarray:
    """Features (n, heads, dim) float32 by a plain loop."""
    net.eval()
    parts = []
    for x in DataLoader(PlainImages(paths, height, width), batch_size=PLAIN_BATCH):
        total = 0
        for view in (x, torch.flip(x, [3])):
            found = torch.stack(net.embed(view.to(device)), dim=1)
            total = total + F.normalize(found, dim=2)
        parts.append(F.normalize(total, dim=2).cpu())
    return torch.cat(parts).numpy()


def measure_speed(name: str, images: list[Path], device: torch.device, *, count: int | None, repeats: int) -> dict:
    """Images per second of the net called `name` in `NETS`, and the ratios to the plain loop."""
    backbone, height, width, on_cpu, on_gpu = NETS[name]
    count = count or (on_cpu if device.type == "cpu" else on_gpu)
    paths = [images[i % len(images)] for i in range(count)]
    torch.manual_seed(0)
    net = build_id_net("AB", 751, backbone=backbone).eval().to(device)
    ours = partial(extract_features, net, paths, height=height, width=width, device=device, progress=False)
    ways: dict[str, Callable[[], object]] = {"plain": lambda: plain_features(net, paths, height, width, device)}
    ways |= {precision: partial(ours, batch_size=None, precision=precision) for precision in precisions(device)}
    first = {way: extract() for way, extract in ways.items()}  # sets things up
    finish(device)
    seconds = alternate(ways, repeats, clock_of(device))
    # Of unit vectors: 1 where they are the same.
    agreement = {way: float((f * first["plain"]).sum(-1).min()) for way, f in first.items() if way != "plain"}
    return {
        "images/s": {way: count / statistics.median(values) for way, values in seconds.items()},
        "times plain": {way: median_ratio(seconds["plain"], values) for way, values in seconds.items()},
        "least cosine to plain": agreement,
        "seconds": seconds,
        "images": count,
    }


def precisions(device: torch.device) -> list[str]:
    """Those that the device computes in; bf16 is slow where it is only imitated."""
    return ["fp32", *["bf16"] * has_bf16(device), *["fp16"] * (device.type == "cuda")]


def measure_precision(args: argparse.Namespace, device: torch.device) -> dict:
    """mAP and Rank-1 of a trained net in every precision that the device has, on its own data set."""
    tested = open_net(args, device)
    root = resolve_data_root(args.data or tested.data_root)
    found = {}
    for precision in precisions(device):
        how = dict(size=tested.size, batch_size=None, device=device, precision=precision, progress=False)
        sets = extract_data_set(tested.net, root, **how)
        results = evaluate_features(sets.query, sets.gallery)
        rows = summary(results, sets.query, sets.gallery)["tables"]["single query"]
        found[precision] = {
            row: {convention: {key: by[key] for key in ("mAP", "rank1")} for convention, by in values.items()}
            for row, values in rows.items()
        }
    return {"net": tested.title, "precision": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.features", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="*", choices=NETS, default=list(NETS), help="of the speed part (default: both)")
    parser.add_argument("--images", type=int, help="images in a round (default: 16 or 256 on a CPU, 2048 on a GPU)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--quick", action="store_true", help="the demo's net alone, a few images")
    parser.add_argument("--data", metavar="DIR", help="data set of the trained net (default: its own)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the JSON file (default: the project's)"
    )
    add_net_arguments(parser)
    args = parser.parse_args()
    check_net_arguments(args)
    for name in ("images", "repeats"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if not (args.nets or args.quick or args.name or args.teacher):
        raise UserError("--nets: name a net, or a trained one by --name or --teacher; there is nothing to measure")
    if args.quick:
        args.nets, args.images = ["demo"], args.images or 64

    args.threads = args.threads or 1
    set_threads(args.threads)
    device = pick_device(args.device)
    result = {"machine": describe_machine(), "device": str(device), "threads": args.threads, "speed": {}}
    print(f"on {device}, {result['machine']}", flush=True)
    if args.nets:
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(None):
                make_dataset(Path(folder) / "mannequins", train_ids=8, test_ids=2)
            images = read_split(Path(folder) / "mannequins", "train_all", need_names=False).paths
            for name in args.nets:
                found = measure_speed(name, images, device, count=args.images, repeats=args.repeats)
                result["speed"][name] = found
                print(f"{name}: {found['images']} images{'':10}images/s  times plain  least cosine to plain")
                for way, rate in found["images/s"].items():
                    cosine = found["least cosine to plain"].get(way)
                    agrees = "" if cosine is None else f"{cosine:18.5f}"
                    print(f"  {way:24}{rate:12.1f}{found['times plain'][way]:11.2f}{agrees}", flush=True)
    if args.name or args.teacher:
        result |= {"trained": measure_precision(args, device)}
        print(f"{result['trained']['net']}{'':20}mAP, official   mAP, standard   Rank-1")
        for precision, rows in result["trained"]["precision"].items():
            for row, by in rows.items():
                values = by["official"]["mAP"], by["standard"]["mAP"], by["official"]["rank1"]
                print(f"  {precision:6}{row:30}" + "".join(f"{100 * value:12.2f}" for value in values))
    print(f"written to {write_result(args.results, 'features', result)}")


if __name__ == "__main__":
    run_cli(main)
