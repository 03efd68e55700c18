"""Write a trained net as a graph for other programs: `python export.py --name latest --out DIR`."""

from __future__ import annotations

import argparse

from utils import UserError, add_net_arguments, check_net_arguments, run_cli


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_net_arguments(parser)
    parser.add_argument("--part", choices=("id", "generator"), default="id", help="net to export (default: id)")
    parser.add_argument("--format", choices=("onnx", "pt2"), default="onnx", help="of the files (default: onnx)")
    parser.add_argument(
        "--input",
        choices=("uint8", "normalised"),
        default="uint8",
        help="images of the graph: (N, H, W, 3) of 0 to 255, or (N, 3, H, W) normalised (default: uint8)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--data", metavar="DIR", help="images to try the files on (default: the config's data_root)")
    parser.add_argument("--int8", action="store_true", help="also write an id net of 8-bit numbers, and what it costs")
    args = parser.parse_args()
    check_net_arguments(args)
    if args.teacher and args.part == "generator":
        raise UserError("--part generator: a teacher has none; give the --name of a DG-Net run")
    if args.int8 and (args.part, args.format) != ("id", "onnx"):
        raise UserError("--int8: is for --part id and --format onnx")
    return args


def main() -> None:
    args = parse_args()

    from runs.export import export

    export(args)


if __name__ == "__main__":
    run_cli(main)
