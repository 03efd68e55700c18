"""How much of its time does generate.py spend in the nets? `python -m benchmarks.generate`

Makes images with networks of the published size (ResNet-50, 256 x 128, random weights, a teacher's soft labels) from
the embedded data set, and compares the images/s of the whole command with those of the nets alone.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, describe_machine, write_result
from config import DGNetConfig, TeacherConfig, parse_config
from data.folders import read_split
from files import write_tensors
from mannequins.dataset import make_dataset
from networks import Generator
from reIDmodel import build_id_net, build_teacher
from runs.folder import RunFolder, make_run_folder
from runs.load import save_teacher
from utils import ROOT, UserError, add_machine_arguments, pick_device, run_cli

SPEEDS = re.compile(r"images/s: ([\d.]+) by the nets alone, ([\d.]+) by the whole command")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=64, help="images to make each time (default: 64)")
    parser.add_argument("--repeats", type=int, default=1, help="how often (default: 1)")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time (default: 32)")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the nets")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(256, 128),
        metavar=("HEIGHT", "WIDTH"),
        help="of the images (default: 256 128)",
    )
    parser.add_argument("--backbone", default="resnet50", help="trunk of both id nets (default: resnet50)")
    parser.add_argument(
        "--results", default=str(RESULTS), help="folder of generate-DEVICE.json (default: the project's)"
    )
    add_machine_arguments(parser)
    return parser.parse_args()


def make_run(folder: Path, backbone: str, size: tuple[int, int]) -> None:
    """A run `random` of the default config with its teacher, and the embedded data in its smallest size."""
    data = folder / "data"
    make_dataset(data, preset="tiny")
    classes = read_split(data, "train_all").num_classes
    torch.manual_seed(0)
    id_net = build_id_net("AB", classes, backbone=backbone)
    code = id_net.code_dim
    common: dict[str, Any] = {"data_root": str(data), "backbone": backbone, "pretrained": False}
    common |= {"crop_image_height": size[0], "crop_image_width": size[1]}
    cfg = parse_config(common | {"teacher": "random", "gen": {"id_dim": code // 4}}, "benchmark")
    assert isinstance(cfg, DGNetConfig)
    run = RunFolder(folder, "random")
    make_run_folder(run, cfg)
    gen = Generator(code_dim=code, **cfg.gen.model_dump())
    for name, net in (("gen", gen), ("id", id_net)):
        write_tensors(run.checkpoints / f"{name}_{1:08d}.pt", {"a": net.state_dict()})
    teacher = parse_config(common | {"task": "teacher"}, "benchmark")
    assert isinstance(teacher, TeacherConfig)
    save_teacher(run, teacher, build_teacher(classes, backbone=backbone), classes)


def measure(folder: Path, out: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Images/s of the nets alone and of the whole command, as generate.py prints them."""
    command = [sys.executable, str(ROOT / "generate.py"), "--name", "random", "--output_path", str(folder)]
    command += ["--out", str(out), "--count", str(args.count), "--batch_size", str(args.batch_size)]
    command += ["--precision", args.precision]
    command += ["--device", args.device] if args.device else []
    command += ["--threads", str(args.threads)] if args.threads else []
    done = subprocess.run(command, capture_output=True, text=True)
    found = SPEEDS.search(done.stdout)
    if done.returncode or not found:
        raise UserError(f"generate.py ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return float(found[1]), float(found[2])


def main() -> None:
    args = parse_args()
    for option in ("count", "repeats", "batch_size"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} {getattr(args, option)}: must be at least 1")
    device = pick_device(args.device)
    result: dict[str, Any] = {"machine": describe_machine(), "device": device.type, "threads": args.threads}
    for option in ("backbone", "size", "count", "repeats", "batch_size", "precision"):
        result[option] = getattr(args, option)
    with tempfile.TemporaryDirectory() as scratch:
        make_run(Path(scratch), args.backbone, tuple(args.size))
        speeds = [measure(Path(scratch), Path(scratch) / f"out-{k}", args) for k in range(args.repeats)]
    result["images/s, nets alone"] = [nets for nets, _ in speeds]
    result["images/s, whole command"] = [command for _, command in speeds]
    result["whole command / nets alone"] = round(statistics.median(command / nets for nets, command in speeds), 3)
    for (nets, command), k in zip(speeds, range(1, args.repeats + 1), strict=True):
        print(f"{k}: {args.count} images, images/s {nets:.2f} by the nets alone, {command:.2f} by the whole command")
    print(f"whole command / nets alone, median: {result['whole command / nets alone']}")
    print(f"written to {write_result(args.results, f'generate-{device.type}', result)}")


if __name__ == "__main__":
    run_cli(main)
