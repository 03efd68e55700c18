"""Pairs of people in each other's clothes, a column per pair.

python visual_tools/show_swap.py --name latest --input ../Market/pytorch --count 6
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to be run as a file, from any directory

from utils import run_cli
from visual_tools.options import figure_parser


def main() -> None:
    args = figure_parser(
        __doc__,
        count="pairs (default: 6, or as many as there are images for)",
        out="PNG to write (default: the run's images/swap_ITERATION.png)",
        least=1,
    ).parse_args()

    from visual_tools.figure import choose_input, open_figure, write_grid

    model, out = open_figure(args, "swap")
    images = choose_input(args, model, 6, group=2)
    originals, s, f = model.read(images.paths, args.batchsize)
    n = len(images) // 2
    pairs = list(zip(range(n), range(n, 2 * n), strict=True))
    swaps = list(model.compose(f, s, [*pairs, *((b, a) for a, b in pairs)], args.batchsize))
    rows = {"a": originals[:n], "b": originals[n:], "a's clothes on b": swaps[:n], "b's clothes on a": swaps[n:]}
    write_grid(out, list(rows.values()), row_labels=list(rows))
    print(f"swapped pairs written to {out}")


if __name__ == "__main__":
    run_cli(main)
