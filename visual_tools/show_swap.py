"""Pairs of people in each other's clothes, a column per pair.

python visual_tools/show_swap.py --name latest --input ../Market/pytorch --count 6
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import run_cli
from visual_tools.figure import AT_MOST, add_figure_arguments, check_arguments

COUNT = 6


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pairs of people in each other's clothes, a column per pair.")
    add_figure_arguments(
        parser,
        count=f"pairs (default: {COUNT}, or as many as there are images for)",
        out="PNG to write (default: the run's images/swap_ITERATION.png)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_arguments(args, count=(1, AT_MOST))

    from runs.grid import PAIR_ROWS, paint_grid
    from runs.swapper import open_swapper
    from visual_tools.figure import choose_images, figure_file, read_input, write_image

    model = open_swapper(args)
    out = figure_file(args, model, "swap")
    found = read_input(args, model)
    pairs = args.count or min(COUNT, len(found) // 2)
    images = choose_images(found, 2 * pairs, args.seed, asked=True)
    originals, s, f = model.read(images.paths, args.batchsize)
    a, b = range(pairs), range(pairs, 2 * pairs)
    swaps = list(model.compose(f, s, [*zip(a, b, strict=True), *zip(b, a, strict=True)], args.batchsize))
    figure = paint_grid(
        [originals[:pairs], originals[pairs:], swaps[:pairs], swaps[pairs:]],
        row_labels=[PAIR_ROWS[row] for row in ("x_a", "x_b", "x_ba", "x_ab")],
    )
    write_image(out, figure)
    print(f"swapped pairs written to {out}")


if __name__ == "__main__":
    run_cli(main)
