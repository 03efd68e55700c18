"""Every pair of a folder's images as a separate file: A_on_B.png has the clothes of A on the person of B.

python visual_tools/show1by1.py --name latest --input people --out swaps
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, from any directory

from utils import run_cli
from visual_tools.options import figure_parser


def main() -> None:
    args = figure_parser(
        __doc__,
        count="images to pair, chosen by --seed (default: all of a folder, 8 of a data set)",
        out="new or empty folder for the PNG files (default: the run's images/one_by_one_ITERATION)",
        most=None,
    ).parse_args()

    from visual_tools.figure import choose_input, file_names, open_figure, write_image

    model, out = open_figure(args, "one_by_one", suffix="")
    images = choose_input(args, model, 8, whole_folder=True)
    _, s, f = model.read(images.paths, args.batchsize)
    names, pairs = file_names(images), list(product(range(len(images)), repeat=2))
    for (i, j), image in zip(pairs, model.compose(f, s, pairs, args.batchsize), strict=True):
        write_image(out / f"{names[i]}_on_{names[j]}.png", image)
    print(f"{len(pairs)} images written to {out}")


if __name__ == "__main__":
    run_cli(main)
