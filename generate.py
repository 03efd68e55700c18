"""Generate a whole data set: `python generate.py --name latest --count 128000 --out DIR`."""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from utils import UserError, add_batch_argument, add_machine_arguments, run_cli, set_threads

if TYPE_CHECKING:
    import torch

    from config import DGNetConfig
    from data.folders import ImageList


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="latest", help="run under outputs/ (default: latest)")
    parser.add_argument("--which_epoch", help="iteration of the snapshot (default: the newest)")
    parser.add_argument("--input", help="data set or folder of images to combine (default: the run's data_root)")
    parser.add_argument("--count", type=int, required=True, help="images to generate")
    parser.add_argument("--out", required=True, help="folder to write; new, empty, or to be continued")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pairs")
    parser.add_argument(
        "--labels",
        choices=("appearance", "none"),
        default="appearance",
        help="identity in the names: that of the clothes, or 0000 (default: appearance)",
    )
    parser.add_argument("--format", choices=("jpg", "png"), default="jpg", help="of the files (default: jpg)")
    parser.add_argument("--quality", type=int, default=95, help="of JPEG files, 1 to 100 (default: 95)")
    parser.add_argument("--teacher", help="teachers of the soft labels, separated by commas (default: the run's)")
    parser.add_argument("--no-soft-labels", action="store_true", help="go without a teacher")
    parser.add_argument("--top", type=int, default=5, help="identities in a soft label (default: 5)")
    parser.add_argument("--data_root", help="data set of the teacher's identities (default: the run's)")
    add_batch_argument(parser, "--batch_size")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the nets")
    parser.add_argument("--gpu_ids", metavar="N,...", help="GPUs to use, a process for each: 0 is --device cuda:0")
    parser.add_argument("--processes", type=int, metavar="N", help="processes that share the images (default: 1)")
    add_machine_arguments(parser)
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    for option, least in (("count", 1), ("batch_size", 1), ("top", 1), ("quality", 1), ("seed", 0)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise UserError(f"--{option} {value}: must be at least {least}")
    if args.quality > 100:
        raise UserError(f"--quality {args.quality}: must be at most 100")
    if args.teacher and args.no_soft_labels:
        raise UserError("--teacher and --no-soft-labels: give one of the two")
    if args.teacher is not None and not args.teacher.replace(",", " ").strip():
        raise UserError(f"--teacher {args.teacher!r}: names no teacher; to go without soft labels: --no-soft-labels")


def read_input(args: argparse.Namespace, cfg: DGNetConfig) -> tuple[Path, ImageList]:
    """The folder of the images to combine, and the checked images."""
    from data.folders import is_data_set, read_people
    from data.images import check_images
    from runs.folder import resolve_data_root

    root = resolve_data_root(args.input or cfg.data_root)
    images = read_people(root, cfg.train_split if is_data_set(root) else None)
    return root, images.select(check_images(images.paths, skip_bad=cfg.skip_bad_images))


def choose_teachers(args: argparse.Namespace, cfg: DGNetConfig) -> tuple[list[str], list[str]]:
    """The teachers' names and the identities of their classes; both empty without soft labels."""
    from data.folders import read_split
    from runs.folder import open_run, resolve_data_root
    from runs.load import find_teacher

    if args.no_soft_labels:
        return [], []
    teachers = [name.strip() for name in (args.teacher or cfg.teacher).split(",") if name.strip()]
    try:
        for name in teachers:
            find_teacher(name, open_run(args.output_path, args.name).output_path)
    except UserError as error:
        raise UserError(f"{error}; or name another --teacher, or go without: --no-soft-labels") from None
    try:
        root = resolve_data_root(args.data_root or cfg.data_root)
        return teachers, read_split(root, cfg.train_split, need_names=False).classes
    except UserError as error:
        raise UserError(f"{error}; soft labels need it: --data_root DIR, or --no-soft-labels") from None


def main() -> int | None:
    started = time.perf_counter()
    args = parse_args()

    from parallel import launch

    if (status := launch.launch_if_asked(args)) is not None:
        return status
    with launch.process_group(args) as device:
        return make_data_set(args, device, started)


def make_data_set(args: argparse.Namespace, device: torch.device, started: float) -> None:
    check_args(args)

    import torch

    from parallel.collectives import gather, is_main
    from precision import pick_precision
    from runs.folder import generator_config, open_run
    from runs.load import pick_epoch
    from runs.swap_set import Job, Nets, choose_batch_size, generate, pass_size, plan

    pick_precision(device, args.precision)  # refuses what it cannot do
    set_threads(args.threads)
    run = open_run(args.output_path, args.name)
    cfg = generator_config(run)
    iteration = pick_epoch(run, args.which_epoch)
    root, images = read_input(args, cfg)
    labelled = args.labels == "appearance"
    rows, sources = plan(images, root, count=args.count, seed=args.seed, labelled=labelled, suffix=f".{args.format}")
    teachers, classes = choose_teachers(args, cfg)
    nets = Nets(run, iteration, teachers, classes, args.precision, device)
    batch_size = args.batch_size or min(gather(choose_batch_size(nets, Path(args.out))))
    same = ("count", "seed", "labels", "format", "quality", "top", "precision")
    settings = {"name": run.name, "iteration": iteration, "weights": nets.digest(), "teachers": teachers}
    settings |= {"input": str(args.input or cfg.data_root), "images": name_images(images, root)}
    settings |= {"device": device.type, "images_per_pass": pass_size(device, batch_size)}
    # On a CPU rounding depends on the number of threads, too.
    settings |= {"threads": torch.get_num_threads() if device.type == "cpu" else None}
    settings |= {option: getattr(args, option) for option in same}
    job = Job(Path(args.out), rows, sources, args.top, args.quality, batch_size)
    speed = generate(job, nets, settings, started)
    if not is_main():
        return
    print(f"{len(rows)} images in {args.out}, {speed.images} of them made now")
    if speed.images:
        print(
            f"images/s: {speed.nets:.2f} by the nets alone, {speed.command:.2f} by the whole command "
            f"({speed.command / speed.nets:.2f} of it)"
        )


def name_images(images: ImageList, root: Path) -> str:
    """A name for a list of images, made from their paths in order."""
    return hashlib.sha256(b"\n".join(os.fsencode(path.relative_to(root)) for path in images.paths)).hexdigest()[:16]


if __name__ == "__main__":
    # SIGTERM, which ends a batch job, unwinds like Ctrl-C, so that no half-written files stay.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_cli(main)
