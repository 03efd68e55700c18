"""Pairs of people in each other's clothes, a column per pair.

python visual_tools/show_swap.py --name latest --input ../Market/pytorch --count 6
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import run_cli
from visual_tools.options import figure_parser

COUNT = 6


def main() -> None:
    args = figure_parser(
        __doc__,
        count=f"pairs (default: {COUNT}, or as many as there are images for)",
        out="PNG to write (default: the run's images/swap_ITERATION.png)",
        least=1,
    ).parse_args()

    from visual_tools.figure import choose_images, open_figure, read_input, write_grid

    model, out = open_figure(args, "swap")
    images = read_input(args, model)
    n = args.count or min(COUNT, len(images) // 2)
    images = choose_images(images, 2 * n, args.seed)
    originals, s, f = model.read(images.paths, args.batchsize)
    a, b = range(n), range(n, 2 * n)
    swaps = list(model.compose(f, s, [*zip(a, b, strict=True), *zip(b, a, strict=True)], args.batchsize))
    rows = {"a": originals[:n], "b": originals[n:], "a's clothes on b": swaps[:n], "b's clothes on a": swaps[n:]}
    write_grid(out, list(rows.values()), row_labels=list(rows))
    print(f"swapped pairs written to {out}")


if __name__ == "__main__":
    run_cli(main)
