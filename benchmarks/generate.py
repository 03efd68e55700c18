"""How much of its time does generate.py spend in the nets? `python -m benchmarks.generate`

Makes images from the embedded data set with networks of the published size (ResNet-50, 256 x 128, random weights, a
teacher's soft labels), and keeps the two rates that generate.py prints.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.machine import benchmark_parser, describe_machine, write_result
from config import parse_config
from data.folders import read_split
from files import write_tensors
from mannequins.dataset import make_dataset
from networks import Generator
from reIDmodel import build_id_net, build_teacher
from runs.folder import RunFolder, make_run_folder
from runs.load import save_teacher
from runs.snapshot import flat_file
from utils import ROOT, UserError, between, pick_device, run_cli

RATES = re.compile(r"images/s: ([\d.]+) by the nets alone, ([\d.]+) by the whole command")


def make_run(folder: Path, backbone: str, size: tuple[int, int]) -> None:
    """Write a run `random` of the default config, its teacher of the same name, and the smallest embedded data set."""
    make_dataset(folder / "data", preset="tiny")
    classes = read_split(folder / "data", "train_all").num_classes
    torch.manual_seed(0)
    id_net = build_id_net("AB", classes, backbone=backbone)
    common = {"data_root": str(folder / "data"), "backbone": backbone, "pretrained": False}
    common |= {"crop_image_height": size[0], "crop_image_width": size[1]}
    cfg = parse_config(common | {"teacher": "random", "gen": {"id_dim": id_net.code_dim // 4}}, "benchmark")
    run = RunFolder(folder, "random")
    make_run_folder(run, cfg)
    gen = Generator(code_dim=id_net.code_dim, **cfg.gen.model_dump())
    for name, net in (("gen", gen), ("id", id_net)):
        write_tensors(flat_file(run.checkpoints, name, 1), {"a": net.state_dict()})
    teacher = parse_config(common | {"task": "teacher"}, "benchmark")
    save_teacher(run, teacher, build_teacher(classes, backbone=backbone), classes)


def main() -> None:
    parser = benchmark_parser("generate", __doc__)
    parser.add_argument("--count", type=between(1), default=64, help="images to make (default: 64)")
    parser.add_argument("--batch_size", type=between(1), default=32, help="images at a time (default: 32)")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the nets")
    size = dict(type=between(1), nargs=2, default=(256, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--size", **size, help="of the images (default: 256 128)")
    parser.add_argument("--backbone", default="resnet50", help="trunk of both id nets (default: resnet50)")
    parser.add_argument("--threads", type=between(1), default=1, help="CPU threads (default: 1)")
    args = parser.parse_args()
    device = pick_device(args.device)
    options = {key: getattr(args, key) for key in ("count", "batch_size", "precision", "threads")}
    with tempfile.TemporaryDirectory() as scratch:
        make_run(Path(scratch), args.backbone, tuple(args.size))
        command = [sys.executable, ROOT / "generate.py", "--name", "random", "--output_path", scratch]
        command += ["--out", f"{scratch}/out", "--device", device]
        command += [word for key, value in options.items() for word in (f"--{key}", value)]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    rates = RATES.search(done.stdout)
    if done.returncode or rates is None:
        raise UserError(f"generate.py ended with status {done.returncode}: {done.stderr[-500:]}")
    nets, whole = map(float, rates.groups())
    result = {"machine": describe_machine(), "device": device.type, "backbone": args.backbone, "size": list(args.size)}
    result |= options | {"images/s, nets alone": [nets], "images/s, whole command": [whole]}
    result |= {"whole command / nets alone": round(whole / nets, 3)}
    write_result(args.results, f"generate-{device.type}", result)


if __name__ == "__main__":
    run_cli(main)
