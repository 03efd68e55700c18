"""Every pair of a folder's images as a file of its own: A_on_B.png has the clothes of A on the person of B.

python visual_tools/show1by1.py --name latest --input people --out swaps
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import run_cli
from visual_tools.figure import add_figure_arguments, check_arguments

COUNT = 8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Every pair of a folder's images as a file of its own: A_on_B.png has the clothes of A on the "
        "person of B; A_on_A.png is A drawn again."
    )
    add_figure_arguments(
        parser,
        count=f"images to pair, chosen by --seed (default: all of a folder, {COUNT} of a data set)",
        out="new or empty folder for the PNG files (default: the run's images/one_by_one_ITERATION)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_arguments(args, count=(2, None))

    from tqdm import tqdm

    from data.folders import is_data_set
    from runs.swapper import open_swapper
    from visual_tools.figure import choose_images, file_names, input_folder, new_folder, read_input, write_image

    model = open_swapper(args)
    found = read_input(args, model)
    count = args.count or (COUNT if is_data_set(input_folder(args, model)) else len(found))
    images = choose_images(found, count, args.seed, asked=args.count is not None)
    _, s, f = model.read(images.paths, args.batchsize)
    out = new_folder(Path(args.out or model.run.images / f"one_by_one_{model.iteration:08d}"), force=args.force)
    names, pairs = file_names(images), list(product(range(len(images)), repeat=2))
    swaps = tqdm(model.compose(f, s, pairs, args.batchsize), "images", total=len(pairs), leave=False, disable=None)
    for (i, j), image in zip(pairs, swaps, strict=True):
        write_image(out / f"{names[i]}_on_{names[j]}.png", image)
    print(f"{len(pairs)} images written to {out}")


if __name__ == "__main__":
    run_cli(main)
