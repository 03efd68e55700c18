"""The N x N matrix of swaps: rows are appearance, columns structure, originals on the border (Figures 1 and 6).

python visual_tools/show_rainbow.py --name latest --input ../Market/pytorch --count 8
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, from any directory

from utils import run_cli
from visual_tools.options import figure_parser


def main() -> None:
    args = figure_parser(
        __doc__,
        count="images, of different people as far as possible (default: 8, or all there are)",
        out="PNG to write (default: the run's images/rainbow_ITERATION.png)",
    ).parse_args()

    from visual_tools.figure import choose_input, labels, open_figure, swap_matrix, write_grid

    model, out = open_figure(args, "rainbow")
    images = choose_input(args, model, 8)
    originals, s, f = model.read(images.paths, args.batchsize)
    swaps, people = swap_matrix(model, s, f, args.batchsize), labels(images)
    rows = [[original, *row] for original, row in zip(originals, swaps, strict=True)]
    row_labels = ["structure of", *(f"clothes of {who}" for who in people)]
    write_grid(out, [[None, *originals], *rows], row_labels=row_labels, column_labels=["", *people])
    print(f"swap grid written to {out}")


if __name__ == "__main__":
    run_cli(main)
