"""A whole folder generated again: every image's structure in the clothes of a random other person.

A_on_B.png has the clothes of A on the person of B. Where the names of A and B do not say who is the same person, the
identity is put in front of both. `python -m gen_eval.score --real INPUT --fake OUT` computes scores.

python visual_tools/test_folder.py --name latest --input ../Market/pytorch --split gallery --out generated
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, from any directory

from utils import run_cli
from visual_tools.options import figure_parser


def main() -> None:
    args = figure_parser(
        __doc__,
        count="images to generate, chosen by --seed (default: all)",
        out="new or empty folder for the PNG files (default: the run's images/folder_ITERATION)",
        least=1,
        most=None,
    ).parse_args()

    from visual_tools.figure import open_figure, read_input, write_swaps

    model, out = open_figure(args, "folder", suffix="")
    images = read_input(args, model)
    count = args.count or len(images)
    write_swaps(model, images, count, args.seed, out, args.batchsize)
    print(f"{count} images written to {out}")


if __name__ == "__main__":
    run_cli(main)
