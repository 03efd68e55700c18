"""Train DG-Net or a teacher: `python train.py --config configs/latest.yaml`."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from utils import add_machine_arguments, run_cli, seed_everything, set_threads

if TYPE_CHECKING:
    import torch

    from config import Config
    from runs.folder import RunFolder


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", help="YAML file: configs/latest.yaml, configs/teacher.yaml, ... (default: latest)")
    parser.add_argument("--name", help="name of the run (default: the config's file name)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="ITERATION",
        help="continue from the newest complete snapshot, or from that of ITERATION; `--resume auto` starts or "
        "continues, whichever applies, and passes over damaged snapshots",
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys")
    parser.add_argument("--gpu_ids", metavar="N,...", help="GPUs to use, a process for each: 0 is --device cuda:0")
    parser.add_argument("--processes", type=int, metavar="N", help="processes that share each batch (default: 1)")
    add_machine_arguments(parser)
    parser.add_argument("--backbone-weights", metavar="FILE", help="ImageNet weights instead of torchvision's cache")
    parser.add_argument("--dry-run", action="store_true", help="build everything, print sizes and schedule, stop")
    return parser.parse_args()


def read_config(args: argparse.Namespace) -> tuple[Config, str]:
    """The config with its overrides, and the run's name. A resumed run may take its folder's config."""
    from config import load_config
    from runs.folder import open_run
    from utils import ROOT

    file = Path(args.config or ROOT / "configs" / "latest.yaml")
    if args.config is None and args.resume and args.name:
        own = open_run(args.output_path, args.name).config_file
        if args.resume != "auto" or own.is_file():
            file = own
    name = args.name or file.stem
    # A folder that the release wrote carries keys of other versions.
    own_folder = args.resume and file == open_run(args.output_path, name).config_file
    weights = [f"backbone_weights={json.dumps(args.backbone_weights)}"] if args.backbone_weights else []
    return load_config(file, args.set + weights, strict=not own_folder), name


def resume_command(args: argparse.Namespace, run: RunFolder) -> str:
    """The command that continues a run on the same hardware; its folder has the settings."""
    from parallel import launch
    from utils import ROOT

    if launch.started() and args.processes is None and args.gpu_ids is None:
        return f"the same torchrun command with train.py --resume --name {shlex.quote(run.name)}"
    options = {"--name": run.name, "--output_path": None if run.output_path == ROOT else run.output_path}
    options |= {f"--{key}": getattr(args, key) for key in ("gpu_ids", "processes", "device", "threads")}
    given = [word for key, value in options.items() if value is not None for word in (key, str(value))]
    return shlex.join(["python", "train.py", "--resume", *given])


def main() -> int:
    args = parse_args()

    from parallel import launch

    if (status := launch.launch_if_asked(args)) is not None:
        return status
    with launch.process_group(args) as device:
        return run_training(args, device)


def run_training(args: argparse.Namespace, device: torch.device) -> int:
    cfg, name = read_config(args)

    from parallel.collectives import is_main
    from runs.folder import open_run
    from runs.loop import train
    from runs.session import build_session, describe

    set_threads(args.threads)
    seed_everything(cfg.seed)
    run = open_run(args.output_path, name)
    command = resume_command(args, run)
    session = build_session(cfg, run, device, resume=args.resume is not None, command=command)
    if args.dry_run:
        if is_main():
            print(describe(session))
        return 0
    return train(session, resume=args.resume)


if __name__ == "__main__":
    run_cli(main)
