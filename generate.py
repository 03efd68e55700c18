"""Generate a whole data set: `python generate.py --name latest --count 128000 --out DIR`."""

from __future__ import annotations

import argparse
import signal
import sys
import time

from utils import UserError, add_batch_argument, add_machine_arguments, between, run_cli


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="latest", help="run under outputs/ (default: latest)")
    parser.add_argument("--which_epoch", help="iteration of the snapshot (default: the newest)")
    parser.add_argument("--input", help="data set or folder of images to combine (default: the run's data_root)")
    parser.add_argument("--count", type=between(1), required=True, help="images to generate")
    parser.add_argument("--out", required=True, help="folder to write; new, empty, or to be continued")
    parser.add_argument("--seed", type=between(0), default=0, help="of the choice of pairs")
    parser.add_argument(
        "--labels",
        choices=("appearance", "none"),
        default="appearance",
        help="identity in the names: that of the clothes, or 0000 (default: appearance)",
    )
    parser.add_argument("--format", choices=("jpg", "png"), default="jpg", help="of the files (default: jpg)")
    parser.add_argument("--quality", type=between(1, 100), default=95, help="of JPEG files, 1 to 100 (default: 95)")
    parser.add_argument("--teacher", help="teachers of the soft labels, separated by commas (default: the run's)")
    parser.add_argument("--no-soft-labels", action="store_true", help="go without a teacher")
    parser.add_argument("--top", type=between(1), default=5, help="identities in a soft label (default: 5)")
    parser.add_argument("--data_root", help="data set of the teacher's identities (default: the run's)")
    parser.add_argument("--trust-classes", action="store_true", help="accept a teacher of another data set")
    add_batch_argument(parser, "--batch_size", on_cpu=8)
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the nets")
    parser.add_argument("--gpu_ids", metavar="N,...", help="GPUs to use, a process for each: 0 is --device cuda:0")
    parser.add_argument("--processes", type=int, metavar="N", help="processes that share the images (default: 1)")
    add_machine_arguments(parser)
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    if args.teacher and args.no_soft_labels:
        raise UserError("--teacher and --no-soft-labels: give one of the two")
    if args.teacher is not None and not args.teacher.replace(",", " ").strip():
        raise UserError(f"--teacher {args.teacher!r}: names no teacher; to go without soft labels: --no-soft-labels")


def main() -> int | None:
    started = time.perf_counter()
    args = parse_args()

    from parallel import launch
    from parallel.collectives import is_main
    from runs.swap_set import make_data_set

    if (status := launch.launch_if_asked(args)) is not None:
        return status
    with launch.process_group(args) as device:
        check_args(args)
        report = make_data_set(args, device, started)
        if is_main():
            print(report)
    return None


if __name__ == "__main__":
    # SIGTERM, which ends a batch job, unwinds like Ctrl-C, so that no half-written files stay.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_cli(main)
