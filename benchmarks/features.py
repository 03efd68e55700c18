"""Images per second of test-time features, against a plain loop: `python -m benchmarks.features`.

plain  as such scripts are usually written: one image at a time from a DataLoader without workers, a pass for the image
       and one for its mirror, fp32
ours   what test.py does: threads decode while the net works, image and mirror in one pass; fp32 and bf16, on a GPU also
       fp16; the batch size chooses itself
(per second of processor time on a CPU)

The nets are that of configs/latest.yaml (ResNet-50, 256 x 128) and the demo's, with random weights, on drawn images.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
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
from precision import has_bf16
from reid_eval.features import extract_features
from reIDmodel import build_id_net
from utils import between, pick_device, run_cli, set_threads

PLAIN_BATCH = 32
REPEATS = 3
# By name: backbone, height, width, and the images of a round on a CPU and on a GPU.
NETS = {"latest": ("resnet50", 256, 128, 16, 2048), "demo": ("resnet10w16", 64, 32, 256, 2048)}


@torch.no_grad()
def plain_features(net, paths: list[Path], height: int, width: int, device: torch.device) -> np.ndarray:
    """Features (n, heads, dim) float32 by a plain loop."""
    read = plain_reader(transforms.Resize((height, width), transforms.InterpolationMode.BICUBIC))
    parts = []
    for x in DataLoader(paths, PLAIN_BATCH, collate_fn=lambda files: torch.stack([read(file) for file in files])):
        views = (torch.stack(net.embed(view.to(device)), dim=1) for view in (x, torch.flip(x, [3])))
        total = sum(F.normalize(view, dim=2) for view in views)
        parts.append(F.normalize(total, dim=2).cpu())
    return torch.cat(parts).numpy()


def measure_speed(name: str, images: list[Path], device: torch.device, count: int | None) -> dict:
    """Images per second of the net called `name` in `NETS`, and the ratios to the plain loop."""
    backbone, height, width, on_cpu, on_gpu = NETS[name]
    count = count or (on_cpu if device.type == "cpu" else on_gpu)
    paths = [images[i % len(images)] for i in range(count)]
    torch.manual_seed(0)
    net = build_id_net("AB", 751, backbone=backbone).eval().to(device)
    ours = partial(extract_features, net, paths, height=height, width=width, device=device, progress=False)
    ways = {"plain": partial(plain_features, net, paths, height, width, device)}
    ways |= {precision: partial(ours, batch_size=None, precision=precision) for precision in precisions(device)}
    first = {way: extract() for way, extract in ways.items()}
    finish(device)
    # Of unit vectors: 1 where they are the same.
    agreement = {way: float((f * first["plain"]).sum(-1).min()) for way, f in first.items() if way != "plain"}
    return compare(ways, REPEATS, count, device) | {"least cosine to plain": agreement, "images": count}


def precisions(device: torch.device) -> list[str]:
    """The precisions that the device computes in. Where bf16 is imitated, it is slow and left out."""
    return ["fp32", *["bf16"] * has_bf16(device), *["fp16"] * (device.type == "cuda")]


def main() -> None:
    parser = benchmark_parser("features", __doc__)
    parser.add_argument("--images", type=between(1), help="images in a round (default: 16 or 256 on a CPU, else 2048)")
    parser.add_argument("--quick", action="store_true", help="the demo's net alone, 64 images")
    args = parser.parse_args()
    set_threads(1)
    device = pick_device(args.device)
    nets, count = (["demo"], args.images or 64) if args.quick else (list(NETS), args.images)
    result = {"machine": describe_machine(), "device": str(device), "speed": {}}
    with tempfile.TemporaryDirectory() as folder:
        images = draw_images(Path(folder), 8).paths
        for name in nets:
            result["speed"][name] = measure_speed(name, images, device, count)
    write_result(args.results, "features", result)


if __name__ == "__main__":
    run_cli(main)
