"""The N x N matrix of swaps, rows appearance, columns structure, originals on the border (Figures 1 and 6).

python visual_tools/show_rainbow.py --name latest --input ../Market/pytorch --count 8
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import run_cli
from visual_tools.figure import AT_MOST, add_figure_arguments, check_arguments

COUNT = 8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The N x N matrix of swaps: rows are appearance, columns structure, originals on the border."
    )
    add_figure_arguments(
        parser,
        count=f"images, of different people as far as possible (default: {COUNT}, or all there are)",
        out="PNG to write (default: the run's images/rainbow_ITERATION.png)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_arguments(args, count=(2, AT_MOST))

    from runs.grid import paint_grid
    from runs.swapper import open_swapper
    from visual_tools.figure import choose_images, figure_file, labels, read_input, write_image

    model = open_swapper(args)
    out = figure_file(args, model, "rainbow")
    images = choose_images(read_input(args, model), args.count or COUNT, args.seed, asked=args.count is not None)
    border, s, f = model.read(images.paths, args.batchsize)
    n = len(border)
    swaps = list(model.compose(f, s, list(product(range(n), range(n))), args.batchsize))
    rows = [[None, *border]] + [[border[i], *swaps[i * n : (i + 1) * n]] for i in range(n)]
    people = labels(images)
    figure = paint_grid(
        rows, row_labels=["structure of", *(f"clothes of {who}" for who in people)], column_labels=["", *people]
    )
    write_image(out, figure)
    print(f"swap grid written to {out}")


if __name__ == "__main__":
    run_cli(main)
