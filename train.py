"""Train DG-Net or a teacher: `python train.py --config configs/latest.yaml`."""

from __future__ import annotations

import argparse

from utils import add_machine_arguments, run_cli


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", help="YAML file: configs/latest.yaml, configs/teacher.yaml, ... (default: latest)")
    parser.add_argument("--name", help="name of the run (default: the config's file name)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="ITERATION",
        help="continue from the newest snapshot, or from that of ITERATION; `--resume auto` starts or "
        "continues, whichever applies, and passes over damaged snapshots",
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys")
    parser.add_argument("--gpu_ids", metavar="N,...", help="GPUs to use, a process for each: 0 is --device cuda:0")
    parser.add_argument("--processes", type=int, metavar="N", help="processes that share each batch (default: 1)")
    add_machine_arguments(parser)
    parser.add_argument("--backbone-weights", metavar="FILE", help="ImageNet weights instead of torchvision's cache")
    parser.add_argument("--dry-run", action="store_true", help="build everything, print sizes and schedule, stop")
    return parser.parse_args()


def main() -> int:
    args = parse_args()

    from runs import command

    return command.main(args)


if __name__ == "__main__":
    run_cli(main)
