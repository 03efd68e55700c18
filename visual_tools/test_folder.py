"""A whole folder drawn again: every image's structure in the clothes of a random other person's; then the scores.

python visual_tools/test_folder.py --name latest --input ../Market/pytorch --split gallery --out generated
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, run_cli
from visual_tools.figure import add_figure_arguments, check_arguments

if TYPE_CHECKING:
    import numpy as np

    from data.folders import ImageList
    from runs.swapper import Swapper


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A whole folder drawn again: every image's structure in the clothes of somebody else's, chosen at "
        "random. A_on_B.png has the clothes of A on the person of B. Then the scores of gen_eval.score against the "
        "images that were read."
    )
    add_figure_arguments(
        parser,
        count="images to draw, chosen by --seed (default: all)",
        out="new or empty folder for the PNG files (default: the run's images/folder_ITERATION)",
    )
    parser.add_argument("--no-score", action="store_true", help="leave the scores out")
    parser.add_argument("--weights", metavar="DIR", help="folder with the scores' weights, besides PyTorch's cache")
    return parser.parse_args()


def draw_partners(pids: np.ndarray, seed: int) -> np.ndarray:
    """For each of n identities (n,) the index (n,) of an image of another one, all equally likely.

    Where all n are the same person, any other image will do. Needs n of at least 2.
    """
    import numpy as np

    if (pids == pids[0]).all():
        pids = np.arange(len(pids))
    by_person = np.argsort(pids, kind="stable")
    start, end = (np.searchsorted(pids[by_person], pids, side) for side in ("left", "right"))
    # Numbers 0.. stand for the images of the others in the order by person: step over the own ones.
    place = np.random.default_rng(seed).integers(0, len(pids) - (end - start))
    return by_person[np.where(place >= start, place + end - start, place)]


def generate(
    model: Swapper, images: ImageList, partners: np.ndarray, chosen: np.ndarray, out: Path, batch: int
) -> ImageList:
    """Write the images `chosen` (indices) in the clothes of their partners into `out`; returns these."""
    from tqdm import tqdm

    from data.folders import ImageList
    from data.images import iter_images, to_uint8
    from visual_tools.figure import file_names, write_image

    names = file_names(images)
    batches = zip(
        *(iter_images([images.paths[i] for i in side], *model.size, batch) for side in (partners[chosen], chosen)),
        strict=True,
    )
    wanted, written = iter(chosen), []
    with tqdm(total=len(chosen), desc="images", leave=False, disable=None) as bar:
        for x_app, x_str in batches:
            for image in to_uint8(model.swap(x_app, x_str)):
                j = next(wanted)
                written.append(out / f"{names[partners[j]]}_on_{names[j]}.png")
                write_image(written[-1], image)
            bar.update(len(x_str))
    return ImageList(written, images.pids[partners[chosen]], images.camids[partners[chosen]])


def main() -> None:
    args = parse_args()
    check_arguments(args, count=(1, None))

    from data.folders import check_images
    from runs.swapper import open_swapper
    from visual_tools.figure import choose, new_folder, read_input

    model = open_swapper(args)
    images = read_input(args, model)
    check_images(images.paths, skip_bad=False, remedy="remove them")
    chosen = choose(images, args.count or len(images), args.seed, asked=True)
    out = new_folder(Path(args.out or model.run.images / f"folder_{model.iteration:08d}"), force=args.force)
    made = generate(model, images, draw_partners(images.pids, args.seed), chosen, out, args.batchsize)
    print(f"{len(made)} images written to {out}")
    if args.no_score or len(made) < 2:
        return
    from gen_eval.metrics import Protocol
    from gen_eval.score import print_scores

    print()
    protocol = Protocol(seed=args.seed, batch_size=args.batchsize)
    try:
        print_scores(images, made, protocol, model.device, weights=Path(args.weights) if args.weights else None)
    except UserError as error:  # the images are written, whatever the scores lack
        print(f"scores: {error}")


if __name__ == "__main__":
    run_cli(main)
